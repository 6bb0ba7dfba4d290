"""What each stage of an edit takes of an accelerator's memory, and what each setting leaves of it.

    python benchmarks/memory.py --preset wan-1.3b --output memory.json

The stages are those of `RVEDiTPipeline`: text encoder, MLLM, VAE encoder, transformer, VAE decoder. On a CUDA device
an edit is made with each setting, and the peak of each stage is measured. Elsewhere it is counted: the weights that
the setting has on the device, and the most that the stage's operations hold at once on tensors without data; what they
use inside, fragments between allocations and CUDA's own part come on top.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch
from diffusers import AutoencoderKLWan
from diffusers.hooks import apply_layerwise_casting
from models import (
    PRESETS,
    Preset,
    add_arguments,
    build_mllm,
    build_pipelines,
    build_transformer,
    check_arguments,
    machine,
    make_tokens,
    merge_text,
    publish,
    to_dtype,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5Config, UMT5EncoderModel

from rvedit_diffusers import RVEDiTPipeline
from rvedit_diffusers.training.memory import LiveBytes, num_bytes


STAGES = {"text": "text_encoder", "tokens": "mllm", "encode": "vae", "denoise": "transformer", "decode": "vae"}
GIB = 2**30
STEPS = 50  # of an edit, two calls each, for what is moved to the device


def fp8(module: nn.Module) -> None:
    """Let the weights of large layers rest in 8 bits, as the documentation has it for each model."""
    skip = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$", "wo")  # diffusers' own, and UMT5's `wo`
    if hasattr(module, "enable_layerwise_casting"):
        module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    else:
        apply_layerwise_casting(module, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=skip)


def tile(pipe: RVEDiTPipeline, device: torch.device) -> None:
    pipe.vae.enable_tiling()


def cast(pipe: RVEDiTPipeline, device: torch.device) -> None:
    for name in ("text_encoder", "mllm", "transformer"):
        fp8(getattr(pipe, name))


def offload_models(pipe: RVEDiTPipeline, device: torch.device) -> None:
    pipe.enable_model_cpu_offload(device=device)


def offload_groups(pipe: RVEDiTPipeline, device: torch.device) -> None:
    pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=True)


def stay(pipe: RVEDiTPipeline, device: torch.device) -> None:
    pipe.to(device)


# By what is called on the pipeline, the place of the weights last.
SETTINGS: dict[str, tuple[Callable, ...]] = {
    "all on the device": (stay,),
    "model offload": (offload_models,),
    "model offload, tiled VAE": (tile, offload_models),
    "model offload, tiled VAE, weights in fp8": (tile, cast, offload_models),
    "group offload, tiled VAE": (tile, offload_groups),
}


# Counting


def build_parts(preset: Preset, *names: str) -> list[nn.Module]:
    """Models of the pipeline on the meta device, in bfloat16."""
    text_config = UMT5Config(d_model=preset.text_dim, **{"vocab_size": 256384} | preset.text_encoder)
    builders = {
        "text_encoder": lambda: UMT5EncoderModel(text_config),
        "mllm": lambda: build_mllm(preset),
        "vae": lambda: AutoencoderKLWan(**preset.vae),
        "transformer": lambda: build_transformer(preset),
    }
    with torch.device("meta"):
        return [to_dtype(builders[name]().eval().requires_grad_(False), torch.bfloat16) for name in names]


def live_bytes(module: nn.Module, call: Callable[[nn.Module], object]) -> int:
    """The most that a call's operations hold at once besides the weights; the module is of no use afterwards."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
        live = LiveBytes([*module.parameters(), *module.buffers()])
        with live, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            call(module)
    return live.peak


def stage_bytes(preset: Preset, tiled: bool, with_context: bool) -> dict[str, int]:
    """The most that each stage's operations hold at once; that of the MLLM is what its widest layer does.

    Args:
        preset ([`Preset`]): Sizes.
        tiled (`bool`): Whether the VAE works in tiles.
        with_context (`bool`): Whether keys and values are kept over the steps, which group offloading does not.
    """
    dtype, cpu = torch.bfloat16, torch.device("cpu")
    num_frames, height, width = preset.clip_size

    def denoise(transformer: nn.Module) -> list:
        latents = torch.empty(1, preset.channels, *preset.latent_size, dtype=dtype)
        tokens = make_tokens(preset, cpu, dtype)
        if not with_context:
            return [transformer(latents, torch.empty(1), **tokens).sample for _ in range(2)]
        contexts = [transformer.project_context(latents, **merge_text(tokens)) for _ in range(2)]
        shared = {"rotary_emb": contexts[0].rotary_emb, "source_patches": contexts[0].source_patches}
        contexts[1] = contexts[1]._replace(**shared)
        velocities = [transformer(latents, torch.empty(1), context=context).sample for context in contexts]
        return [contexts, velocities]

    def encode(vae: nn.Module) -> object:
        return vae.encode(torch.empty(1, 3, num_frames, height, width, dtype=dtype))

    def decode(vae: nn.Module) -> object:
        return vae.decode(torch.empty(1, preset.channels, *preset.latent_size, dtype=dtype))

    def text(encoder: nn.Module) -> object:
        return encoder(torch.zeros(2, preset.num_text, dtype=torch.int64))  # with the negative prompt

    text_encoder, mllm, transformer, encoder, decoder = build_parts(
        preset, "text_encoder", "mllm", "transformer", "vae", "vae"
    )
    for vae in (encoder, decoder) if tiled else ():
        vae.enable_tiling()
    text_config = mllm.config.text_config
    num_mllm = preset.num_visual + preset.num_edit + 64
    widest = 3 * text_config.intermediate_size + 2 * text_config.hidden_size  # of a layer, and the residual stream
    return {
        "text": live_bytes(text_encoder, text),
        "tokens": num_mllm * widest * dtype.itemsize,
        "encode": live_bytes(encoder, encode),
        "denoise": live_bytes(transformer, denoise),
        "decode": live_bytes(decoder, decode),
    }


def weights(module: nn.Module) -> int:
    return num_bytes([*module.parameters(), *module.buffers()])


def streamed_weights(module: nn.Module) -> int:
    """What the pipeline's group offload with a stream has on the device: all but the blocks, and two of these; or two
    leaves of a model that is not one of diffusers."""
    if hasattr(module, "enable_group_offload"):
        entered = getattr(module, "_group_offload_block_modules", None) or ()
        blocks = [weights(block) for block in streamed_blocks(module, entered)]
        return weights(module) - sum(blocks) + sum(sorted(blocks)[-2:])
    leaves = {id(next(layer.parameters(), layer)): layer for layer in module.modules() if not any(layer.children())}
    return sum(sorted(map(weights, leaves.values()))[-2:])  # UMT5 has its embedding in two places


def streamed_blocks(module: nn.Module, entered: Sequence[str]) -> list[nn.Module]:
    """What diffusers moves one by one: the members of a model's lists, and of those of the children it names."""
    blocks = []
    for name, child in module.named_children():
        if name in entered:
            blocks += streamed_blocks(child, entered)
        elif isinstance(child, (nn.ModuleList, nn.Sequential)):
            blocks += child
    return blocks


def count(preset: Preset) -> dict[str, dict]:
    """Bytes by setting: of each stage, their most, and what an edit of 50 steps with guidance moves to the device."""
    found, names = {}, ("text_encoder", "mllm", "vae", "transformer")
    made = {}
    for name, steps in SETTINGS.items():
        parts = dict(zip(names, build_parts(preset, *names)))
        if cast in steps:
            for part in ("text_encoder", "mllm", "transformer"):
                fp8(parts[part])
        whole = {part: weights(module) for part, module in parts.items()}
        place, kind = steps[-1], (tile in steps, offload_groups not in steps)
        if kind not in made:
            made[kind] = stage_bytes(preset, *kind)
        if place is stay:
            on_device, moved = dict.fromkeys(parts, sum(whole.values())), 0
        elif place is offload_models:
            on_device, moved = whole, sum(whole.values()) + whole["vae"]  # the VAE twice
        else:
            on_device = {part: streamed_weights(module) for part, module in parts.items()}
            moved = sum(whole.values()) + whole["vae"] + (2 * STEPS - 1) * whole["transformer"]
        stages = {stage: on_device[part] + made[kind][stage] for stage, part in STAGES.items()}
        found[name] = {"stages": stages, "peak": max(stages.values()), "moved": moved}
    return found


# Measuring


@contextmanager
def stage_peaks(pipe: RVEDiTPipeline, device: torch.device) -> Iterator[dict[str, int]]:
    """Follow the peak of each stage of the calls inside."""
    peaks = dict.fromkeys(STAGES, 0)

    def begin(*_):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)

    def end(stage: str, *_):
        torch.cuda.synchronize(device)
        peaks[stage] = max(peaks[stage], torch.cuda.max_memory_allocated(device))

    def followed(stage: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            if hasattr(pipe.vae, "_hf_hook"):
                pipe.vae._hf_hook.pre_forward(pipe.vae)  # moves the model before it away, which is no part of this
            begin()
            result = function(*args, **kwargs)
            end(stage)
            return result

        return call

    # the distiller calls the MLLM without its head
    modules = {
        stage: pipe.mllm.base_model if stage == "tokens" else getattr(pipe, part) for stage, part in STAGES.items()
    }
    hooks = []
    for stage, module in modules.items():
        if stage in ("encode", "decode"):  # the autoencoder's methods
            setattr(module, stage, followed(stage, getattr(module, stage)))
        else:  # offloading replaces `forward`, more than once
            hooks.append(module.register_forward_pre_hook(begin))
            hooks.append(module.register_forward_hook(partial(end, stage)))
    yield peaks
    for hook in hooks:
        hook.remove()
    for stage in ("encode", "decode"):
        delattr(modules[stage], stage)


def measure(preset: Preset, device: torch.device, num_inference_steps: int) -> dict[str, dict]:
    """Bytes by setting, of each stage of an edit and their most; and the edit's seconds."""
    found = {}
    num_frames, height, width = preset.clip_size
    clip = torch.rand(num_frames, 3, height, width)
    for name, steps in SETTINGS.items():
        pipe = build_pipelines(preset, ["ours"], torch.device("cpu"), torch.bfloat16)["ours"]
        pipe.vae.to(torch.bfloat16)
        for step in steps:
            step(pipe, device)
        call = partial(pipe, clip, "make it red", height=height, width=width)
        call(num_inference_steps=1)  # which loads kernels
        torch.cuda.synchronize(device)
        with stage_peaks(pipe, device) as peaks:
            start = time.perf_counter()
            call(num_inference_steps=num_inference_steps)
            torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
        found[name] = {"stages": peaks, "peak": max(peaks.values()), "seconds": seconds}
        del pipe, call
        gc.collect()  # hooks refer to the modules that refer to them
        torch.cuda.empty_cache()
    return found


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--num_inference_steps", type=int, default=4, help="of the edits on a GPU; default: 4")
    args = parser.parse_args(argv)
    if args.num_inference_steps < 1:
        parser.error(f"--num_inference_steps has to be at least 1, but is {args.num_inference_steps}")
    if args.device is None and not torch.cuda.is_available():
        args.device = "meta"
    check_arguments(parser, args, ("cuda", "meta"))
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    preset, on_cuda = PRESETS[args.preset], args.device.type == "cuda"
    found = measure(preset, args.device, args.num_inference_steps) if on_cuda else count(preset)
    last = "seconds of the edit" if on_cuda else f"moved in {STEPS} steps"
    lines = [f"| setting, GiB | {' | '.join(STAGES)} | peak | {last} |", "|---" * (len(STAGES) + 3) + "|"]
    for name, values in found.items():
        end = f"{values['seconds']:.1f}" if on_cuda else f"{values['moved'] / GIB:,.1f}"
        cells = [f"{values['stages'][stage] / GIB:.2f}" for stage in STAGES]
        lines.append(f"| {name} | {' | '.join(cells)} | {values['peak'] / GIB:.2f} | {end} |")
    everything = found["all on the device"]["peak"]
    result = {
        "ratios": {
            f"memory {name} vs all on the device": values["peak"] / everything for name, values in found.items()
        },
        "settings": vars(args) | {"preset": {"name": args.preset} | asdict(preset)},
        "is_measured": on_cuda,
        **(machine(args.device) if on_cuda else {"torch": torch.__version__}),
        "bytes": found,
    }
    publish(args.output, "memory.py", argv, "\n".join(lines), result)


if __name__ == "__main__":
    main()
