"""What a training step takes of the accelerator's memory, and a training of the disk, before anything is loaded."""

import argparse
import copy
import math
import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..pipeline_rvedit import RVEDiTPipeline
from .cache import text_length
from .data import Bucket
from .optimizers import build_optimizer
from .pairs import EditPairs
from .samples import Draws


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def pair_tensors(
    pipe: RVEDiTPipeline, bucket: Bucket, tokens: str = "tokens", text: str = "embeds"
) -> dict[str, torch.Tensor]:
    """What [`~rvedit_diffusers.training.cache.encode_pairs`] makes of a pair, as tensors without data.

    Args:
        pipe ([`RVEDiTPipeline`]): Its processor and tokenizer are used, and the configurations of its transformer and
            distiller, which may be on the meta device.
        bucket ([`Bucket`]): Size of both clips.
        tokens, text (`str`): As in `encode_pairs`.

    Returns:
        `dict[str, torch.Tensor]`: On the meta device; an instruction has the greatest length. [`num_bytes`] of the
        values is what the file of a pair takes on disk at most, but for its header of about a kilobyte.
    """
    config = pipe.transformer.config
    latents = torch.empty(
        config.in_channels,
        (bucket.num_frames - 1) // pipe.vae_scale_factor_temporal + 1,
        bucket.height // pipe.vae_scale_factor_spatial,
        bucket.width // pipe.vae_scale_factor_spatial,
        dtype=torch.bfloat16,
        device="meta",
    )
    pair = {"latents": latents, "source_latents": latents}
    if tokens != "none":
        clip = np.zeros((bucket.num_frames, bucket.height, bucket.width, 3), dtype=np.uint8)
        positions = pipe.processor([clip], [""])["visual_positions"][0].to("meta")
        dim = pipe.distiller.config.dim if tokens == "tokens" else pipe.distiller.config.mllm_hidden_size
        for prefix in ("", "reference_"):
            pair[f"{prefix}edit_tokens"] = latents.new_empty(pipe.distiller.config.num_edit_tokens, dim)
            pair[f"{prefix}visual_tokens"] = latents.new_empty(len(positions), dim)
        pair["visual_positions"] = positions
    length = text_length(pipe)
    if text == "embeds":
        pair["prompt_embeds"] = latents.new_empty(length, config.text_dim)
    else:
        pair["input_ids"] = pair["attention_mask"] = torch.empty(length, dtype=torch.int64, device="meta")
    return pair


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make until they are freed; `peak` is the most that there were at once."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.now = self.peak = 0

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def _rms_norm(norm: nn.RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    # CUDA has one kernel for it, and its autocast calls that in float32; a CPU keeps what each of the kernel's steps
    # makes, in bfloat16. A layer norm keeps the same as CUDA's kernel and a mean for each row.
    return F.layer_norm(hidden_states.float(), norm.normalized_shape, norm.weight.float())


def step_bytes(
    module: nn.Module,
    sample: dict[str, torch.Tensor],
    batch_size: int = 1,
    accumulation: int = 1,
    autocast_dtype: torch.dtype | None = torch.bfloat16,
) -> int:
    """The most that the forward and backward passes of a training step hold at once besides the parameters.

    Runs the step on tensors that have no data, in seconds whatever their size: all that autograd keeps, working
    memory, copies of weights in `autocast_dtype` and gradients. Attention is the fused kernel, which keeps nothing
    quadratic. What operations use inside, the fragments between allocations and CUDA's own part come on top;
    compiled blocks take less.

    Args:
        module (`nn.Module`): What [`~rvedit_diffusers.training.branches.EditingBranches`] is: called with a batch, it
            returns a tuple of tensors or `None`. As it will be trained: adapters, `requires_grad`, dtypes, gradient
            checkpointing; not compiled, and without hooks that move or cast weights. It may be on the meta device, and
            does not change.
        sample (`dict[str, torch.Tensor]`): Shapes and dtypes of what a batch holds for each clip: [`pair_tensors`] and
            what [`~rvedit_diffusers.training.samples.Draws`] adds. Floating point is float32 in the batch.
        batch_size (`int`, defaults to 1): Clips in a micro-batch of this process.
        accumulation (`int`, defaults to 1): Micro-batches a step; with several, gradients are there all the time.
        autocast_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): `None`: without autocast.
    """
    with FakeTensorMode():
        copies = {id(buffer): torch.empty(buffer.shape, dtype=buffer.dtype) for buffer in module.buffers()}
        for parameter in module.parameters():
            data = torch.empty(parameter.shape, dtype=parameter.dtype)
            copies[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
        module = copy.deepcopy(module, copies).train()
        for layer in module.modules():
            if isinstance(layer, nn.RMSNorm):
                layer.forward = partial(_rms_norm, layer)

        live = LiveBytes([*module.parameters(), *module.buffers()])
        with live, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            batch = {
                name: torch.empty(
                    (batch_size, *value.shape), dtype=torch.float32 if value.is_floating_point() else value.dtype
                )
                for name, value in sample.items()
            }
            for _ in range(min(accumulation, 2)):
                with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
                    outputs = module(batch)
                sum(output.float().square().mean() for output in outputs if output is not None).backward()
    return live.peak


def state_bytes(optimizer: str, /, **settings) -> float:
    """Bytes of an optimizer's state for each trained number of a matrix; see [`build_optimizer`] for the arguments."""
    if optimizer == "adamw8bit":
        return 2  # of small tensors, which it keeps in float32, a trial would tell something else
    side = 256
    weight = nn.Parameter(torch.zeros(side, side))
    weight.grad = torch.zeros_like(weight)
    trial = build_optimizer(optimizer, [weight], [weight], 1e-3, 0.0, **settings)
    trial.step()
    states = [value for entry in trial.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return num_bytes(state for state in states if state.numel() > 1) / side**2


def estimate_memory(
    module: nn.Module,
    sample: dict[str, torch.Tensor],
    batch_size: int = 1,
    accumulation: int = 1,
    autocast_dtype: torch.dtype | None = torch.bfloat16,
    optimizer_bytes: float = 8,
    ema: bool = False,
) -> dict[str, int]:
    """Bytes that a training takes of the accelerator's memory, for one process that shards nothing.

    Args:
        module, sample, batch_size, accumulation, autocast_dtype: See [`step_bytes`].
        optimizer_bytes (`float`, defaults to 8): The optimizer's state for each trained number, see [`state_bytes`].
        ema (`bool`, defaults to `False`): Whether there is a moving average of what is trained.

    Returns:
        `dict[str, int]`: `weights`, `optimizer`, `ema`, `activations_and_gradients` as in [`step_bytes`] - activations
        go while gradients come, so it is less than the sum of both - and `total`.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    memory = {
        "weights": num_bytes([*module.parameters(), *module.buffers()]),
        "optimizer": round(optimizer_bytes * sum(parameter.numel() for parameter in trained)),
        "ema": num_bytes(trained) if ema else 0,
        "activations_and_gradients": step_bytes(module, sample, batch_size, accumulation, autocast_dtype),
    }
    return memory | {"total": sum(memory.values())}


def checkpoint_bytes(module: nn.Module, optimizer_bytes: float = 8, ema: bool = False) -> int:
    """Bytes that a checkpoint takes on disk, but for headers and settings: what is trained and the optimizer's state.

    Args:
        module, optimizer_bytes, ema: See [`estimate_memory`].
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    states = round(optimizer_bytes * sum(parameter.numel() for parameter in trained))
    return num_bytes(trained) * (2 if ema else 1) + states


def describe_needs(
    args: argparse.Namespace,
    base: Path,
    pipe: RVEDiTPipeline,
    branches: nn.Module,
    pairs: EditPairs,
    draws: Draws,
    tokens: str,
    text: str,
) -> str:
    """A table of what a training takes of the accelerator in its largest bucket, and of the disk in all.

    Args:
        args (`argparse.Namespace`): Options of `examples/train.py`.
        base (`Path`): Folder of the pipeline to train. A result that is a pipeline is as large, but for what learns,
            which is written as it has learned: in float32.
        pipe ([`RVEDiTPipeline`]): See [`pair_tensors`]; without transformer.
        branches ([`~rvedit_diffusers.training.branches.EditingBranches`]): On the meta device, with adapters.
        pairs ([`EditPairs`]): To train on.
        draws ([`Draws`]): Of the training.
        tokens, text (`str`): As in `encode_pairs`.
    """
    transformer = branches.transformer
    pipe.transformer = transformer
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    counts = Counter(pairs.bucket(index) for index in range(len(pairs)))
    largest = max(counts, key=lambda bucket: bucket.num_frames * bucket.height * bucket.width)
    pair = pair_tensors(pipe, largest, "tokens" if branches.distiller is None else "states", "embeds")
    if args.align_negatives == "twin":
        pair |= {f"wrong_{name}": pair[f"reference_{name}"] for name in ("edit_tokens", "visual_tokens")}
    drawn = draws(0, pair["latents"].shape)
    if args.align_weight == 0 and args.stage == "edit":
        del drawn["align_positions"]
    optimizer_bytes = state_bytes(args.optimizer, **args.optimizer_args)
    memory = estimate_memory(
        branches,
        pair | drawn,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        torch.bfloat16 if args.mixed_precision == "bf16" else None,
        optimizer_bytes,
        bool(args.ema_decay),
    )
    cache = sum(
        count * num_bytes(pair_tensors(pipe, bucket, tokens, text).values()) for bucket, count in counts.items()
    )
    num_kept = min(args.checkpoints_total_limit or math.inf, -(-args.max_train_steps // args.checkpointing_steps))
    checkpoint = checkpoint_bytes(branches, optimizer_bytes, bool(args.ema_decay))
    disk = {"cache": cache, f"checkpoints, {num_kept}": num_kept * checkpoint}
    if args.training_type != "lora" or args.train_distiller != "none" or args.train_text_encoder:
        learned = ["transformer"] * (args.training_type == "full") + ["text_encoder"] * args.train_text_encoder
        learned += ["distiller"] * (args.train_distiller != "none")
        copied = [path for path in base.rglob("*") if path.relative_to(base).parts[0] not in learned]
        disk["pipeline"] = sum(path.stat().st_size for path in copied if path.is_file())
        disk["pipeline"] += sum(num_bytes(getattr(pipe, name).state_dict().values()) for name in learned)
    notes = []
    if tokens == "none":
        notes.append("the MLLM, which runs in every step")
    if tokens != "tokens" and branches.distiller is None:
        notes.append("the distiller")
    if text == "ids":
        notes.append("the text encoder")
    if args.layerwise_casting or args.group_offload:
        notes.append("less for frozen weights that rest in 8 bits or in host memory")
    lines = [f"memory of a step of {args.train_batch_size} in bucket {largest}, one process, nothing sharded:"]
    lines += [describe_memory(memory)] + [f"besides: {'; '.join(notes)}"] * bool(notes)
    return "\n".join([*lines, "disk:", describe_memory(disk)])


def describe_memory(memory: dict[str, int]) -> str:
    """A line for each entry of [`estimate_memory`], or of any bytes by name, in GiB, or in MiB if all are less."""
    unit, divisor = ("GiB", 2**30) if max(memory.values()) >= 2**30 else ("MiB", 2**20)
    width = max(map(len, memory))
    return "\n".join(f"{name.replace('_', ' '):{width}} {size / divisor:9.2f} {unit}" for name, size in memory.items())
