"""What the alignment adds to a training step: seconds, memory and FLOPs.

    python benchmarks/training.py --preset wan-1.3b --training_type full --output training.json
    python benchmarks/training.py --preset wan-14b --device meta

Three kinds of step take turns in one process, on the same random weights and random data:

- plain: flow matching alone;
- align: with the reference branch of `EditingBranches`, which has no gradient and stops after the last aligned block;
- naive: the reference branch is a second whole branch, with all blocks and a flow matching loss of its own, and the
  gradient flows through both.

On a CPU, seconds are the process' own, summed over its threads: other programs do not add to them. Encoders and
distiller do not run: their tokens come from the cache. FLOPs are those of matrix products, attention and
convolutions, counted on tensors without data. Memory is the peak of a step with all weights and optimizer states:
measured on CUDA, else what `training.memory` estimates for an accelerator. `--device meta` runs no step.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop
from tqdm import tqdm

from rvedit_diffusers import RVEDiTTransformer3DModel
from rvedit_diffusers.losses import flow_matching_loss
from rvedit_diffusers.training.adapters import add_lora
from rvedit_diffusers.training.branches import EditingBranches
from rvedit_diffusers.training.memory import estimate_memory
from rvedit_diffusers.training.optimizers import build_optimizer
from rvedit_diffusers.training.samples import Draws


STEPS = ("plain", "align", "naive")
ALIGN_WEIGHT = 0.05
# Not every version of PyTorch knows the FLOPs of the CPU's fused attention.
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop)
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop)


@dataclass(frozen=True)
class Preset:
    """A transformer and the shapes of its inputs; the latents are those of 81 frames of 480 x 832 by default."""

    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    num_layers: int
    channels: int = 16
    latent_size: tuple[int, int, int] = (21, 60, 104)
    text_dim: int = 4096
    num_text: int = 512
    num_edit: int = 256
    num_visual: int = 1000


PRESETS = {
    "tiny": Preset(4, 64, 512, 3, latent_size=(4, 16, 16), text_dim=64, num_text=16, num_edit=8, num_visual=16),
    # as deep as Wan 1.3B, so that the reference branch runs through the same share of the blocks
    "small": Preset(5, 64, 1920, 30, latent_size=(9, 32, 32), text_dim=512, num_text=64, num_edit=32, num_visual=128),
    "wan-1.3b": Preset(12, 128, 8960, 30),
    "wan-5b": Preset(24, 128, 14336, 30, channels=48, latent_size=(21, 30, 52)),
    "wan-14b": Preset(40, 128, 13824, 40),
}


class NaiveBranches(EditingBranches):
    """Two whole branches; the velocities of both are returned, `(2 * batch, ...)`."""

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        level = batch["sigmas"].view(-1, 1, 1, 1, 1)
        condition = {
            "hidden_states": (1 - level) * batch["latents"] + level * batch["noise"],
            "timestep": 1000 * batch["sigmas"],
            "encoder_hidden_states": batch["prompt_embeds"],
            "source_hidden_states": batch["source_latents"] * batch["keep_source"].view(-1, 1, 1, 1, 1),
            "return_features": self.align_blocks,
        }
        reference = self.transformer(**condition, **self._tokens(batch, "reference_"))
        editing = self.transformer(**condition, **self._tokens(batch))
        losses = []
        for head, features, targets in zip(self.heads, editing.features, reference.features, strict=True):
            positions = batch["align_positions"].unsqueeze(-1).expand(-1, -1, features.shape[-1])
            losses.append(self._align(head, features.gather(1, positions), targets.gather(1, positions)))
        return torch.cat([editing.sample, reference.sample]), torch.stack(losses).mean(0)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="size of transformer and clips")
    parser.add_argument("--training_type", choices=("lora", "full"), default="lora")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile the blocks before the steps are timed")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--align_blocks", type=int, nargs="+", help="default: the last shallow and the first deep one")
    parser.add_argument("--align_tokens", type=int, default=2048, help="token positions that are compared in a clip")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind, after one that warms up")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... or meta; default: cuda if there is one, else cpu")
    parser.add_argument("--output", type=Path, help="JSON file for settings, raw times and ratios")
    args = parser.parse_args(argv)

    for name in ("batch_size", "align_tokens", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    last_block = PRESETS[args.preset].num_layers - 1
    if args.align_blocks is not None and not all(0 <= block <= last_block for block in args.align_blocks):
        parser.error(f"--align_blocks has to name blocks in [0, {last_block}], but is {args.align_blocks}")
    if args.output is not None:
        if args.output.is_dir():
            parser.error(f"--output has to be a file, but {args.output} is a folder")
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output: {error}")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.preset.startswith("wan") and args.device == "cpu":
            parser.error(
                f"--preset {args.preset} needs a GPU, and PyTorch finds none: --device meta counts memory and FLOPs"
                " without one, --device cpu runs it all the same"
            )
    try:
        args.device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if args.device.type not in ("cpu", "cuda", "meta"):
        parser.error(f"--device has to be a CPU, a CUDA device or meta, but is {args.device}")
    if args.device.type == "cuda" and (args.device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {args.device} is not there: PyTorch finds {torch.cuda.device_count()} CUDA devices")
    return args


def build_branches(args: argparse.Namespace, device: torch.device) -> dict[str, EditingBranches]:
    """The module of each kind of step, with weights and heads in common, as examples/train.py trains it."""
    preset = PRESETS[args.preset]
    with torch.device(device):
        transformer = RVEDiTTransformer3DModel(
            num_attention_heads=preset.num_attention_heads,
            attention_head_dim=preset.attention_head_dim,
            in_channels=preset.channels,
            source_channels=preset.channels,
            out_channels=preset.channels,
            text_dim=preset.text_dim,
            ffn_dim=preset.ffn_dim,
            num_layers=preset.num_layers,
        )
        if args.training_type == "lora":
            for name, parameter in transformer.named_parameters():
                if not set(name.split(".")) & set(transformer._keep_in_fp32_modules):
                    parameter.data = parameter.data.bfloat16()
            add_lora(transformer)
        if args.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        align = EditingBranches(transformer, align_blocks=args.align_blocks).train()
        naive = NaiveBranches(transformer, align_blocks=args.align_blocks).train()
        naive.heads = align.heads
    return {"plain": align, "align": align, "naive": naive}


def make_samples(args: argparse.Namespace) -> dict[str, dict[str, torch.Tensor]]:
    """What each kind of step trains on: a random clip and random tokens."""
    preset = PRESETS[args.preset]
    dim = preset.num_attention_heads * preset.attention_head_dim
    latents = torch.randn(preset.channels, *preset.latent_size)
    sample = {
        "latents": latents,
        "source_latents": torch.randn_like(latents),
        "prompt_embeds": torch.randn(preset.num_text, preset.text_dim),
        "visual_positions": torch.rand(preset.num_visual, 3),
    }
    for prefix in ("", "reference_"):
        sample[f"{prefix}edit_tokens"] = torch.randn(preset.num_edit, dim)
        sample[f"{prefix}visual_tokens"] = torch.randn(preset.num_visual, dim)
    sample |= Draws(seed=0, drop_instruction=0, drop_all=0, num_positions=args.align_tokens)(0, latents.shape)
    plain = {name: value for name, value in sample.items() if name != "align_positions"}
    return {"plain": plain, "align": sample, "naive": sample}


def make_batch(sample: dict[str, torch.Tensor], batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.stack([value] * batch_size).to(device) for name, value in sample.items()}


def step_loss(branches: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    latents, noise = batch["latents"], batch["noise"]
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocities, align_loss = branches(batch)
    loss = sum(flow_matching_loss(velocity, latents, noise).mean() for velocity in velocities.split(len(latents)))
    return loss if align_loss is None else loss + ALIGN_WEIGHT * align_loss.mean()


def count_flops(args: argparse.Namespace) -> dict[str, int]:
    """FLOPs of each kind of step."""
    branches, samples, cpu = build_branches(args, torch.device("meta")), make_samples(args), torch.device("cpu")
    flops = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        branches["naive"].to_empty(device=cpu)  # on the meta device attention would not be the fused one
        for name in STEPS:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlopCounterMode(display=False) as counter:
                step_loss(branches[name], make_batch(samples[name], args.batch_size, cpu)).backward()
            flops[name] = counter.get_total_flops()
    return flops


def count_memory(args: argparse.Namespace) -> dict[str, int]:
    """Bytes that each kind of step takes of an accelerator's memory."""
    branches, samples = build_branches(args, torch.device("meta")), make_samples(args)
    return {name: estimate_memory(branches[name], samples[name], args.batch_size)["total"] for name in STEPS}


def time_steps(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of the steps of each kind, which take turns, and on CUDA the most memory of a step of each kind."""
    branches, samples = build_branches(args, args.device), make_samples(args)
    batches = {name: make_batch(samples[name], args.batch_size, args.device) for name in STEPS}
    if args.compile:
        branches["plain"].transformer.compile_repeated_blocks()
    parameters = [parameter for parameter in branches["plain"].parameters() if parameter.requires_grad]
    optimizer = build_optimizer("adamw", parameters, [], 1e-5, 0.01)
    on_cuda = args.device.type == "cuda"
    seconds, memory = {name: [] for name in STEPS}, {}
    clock = time.perf_counter if on_cuda else time.process_time
    for turn in tqdm(range(args.steps + 1), unit="turn"):
        for name in STEPS:
            if on_cuda:
                torch.cuda.synchronize(args.device)
                torch.cuda.reset_peak_memory_stats(args.device)
            started = clock()
            step_loss(branches[name], batches[name]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0).item()
            optimizer.step()
            optimizer.zero_grad()
            if on_cuda:
                torch.cuda.synchronize(args.device)
                memory[name] = torch.cuda.max_memory_allocated(args.device)
            if turn:  # the first one warms up
                seconds[name].append(clock() - started)
    return seconds, memory


def spread(values: list[float], spec: str) -> str:
    return f"{statistics.median(values):{spec}} ({min(values):{spec}}-{max(values):{spec}})"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)

    # 1. Count and time
    flops = count_flops(args)
    seconds, memory = ({}, {}) if args.device.type == "meta" else time_steps(args)
    memory = memory or count_memory(args)

    # 2. Ratios; of times within each turn, since a machine's speed may drift from turn to turn
    turns = {name: [t / p for t, p in zip(times, seconds["plain"])] for name, times in seconds.items()}
    ratios = {
        "": {name: statistics.median(values) for name, values in turns.items()},
        "memory_": {name: memory[name] / memory["plain"] for name in STEPS},
        "flops_": {name: flops[name] / flops["plain"] for name in STEPS},
    }

    # 3. Table
    print("| step | seconds (min-max) | / plain (min-max) | GiB | / plain | TFLOPs | / plain |")
    print("|---|---|---|---|---|---|---|")
    for name in STEPS:
        timed = f"{spread(seconds[name], '.3g')} | {spread(turns[name], '.2f')}" if seconds else "- | -"
        used = f"{memory[name] / 2**30:.2f} | {ratios['memory_'][name]:.2f}"
        print(f"| {name} | {timed} | {used} | {flops[name] / 1e12:,.2f} | {ratios['flops_'][name]:.2f} |")

    # 4. JSON
    if args.output is not None:
        on_cuda = args.device.type == "cuda"
        result = {
            "ratios": {
                f"train_{name}_{quantity}vs_plain": ratio
                for quantity, by_step in ratios.items()
                for name, ratio in by_step.items()
                if name != "plain"
            },
            "settings": vars(args) | {"preset": {"name": args.preset} | asdict(PRESETS[args.preset])},
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(args.device) if on_cuda else f"{os.cpu_count()} CPU cores",
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "memory_bytes": memory,
            "flops": flops,
        }
        temporary = args.output.with_name(args.output.name + ".partial")
        temporary.write_text(json.dumps(result, indent=2, default=str) + "\n")
        temporary.replace(args.output)


if __name__ == "__main__":
    main()
