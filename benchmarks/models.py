"""What the benchmarks have in common: models of the sizes that people use, with random weights, and clocks."""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LucyEditPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from tqdm import tqdm
from transformers import PreTrainedModel, UMT5Config, UMT5EncoderModel

from rvedit_diffusers import RVEDiTPipeline, RVEDiTProcessor, RVEDiTTokenDistiller, RVEDiTTransformer3DModel
from rvedit_diffusers.pipeline_rvedit import TEXT_LENGTHS, merge_padding
from rvedit_diffusers.tiny import build_text_tokenizer, build_tiny_mllm, build_tiny_mllm_processor
from rvedit_diffusers.training.memory import num_bytes
from rvedit_diffusers.training.options import computes_in_bfloat16


# Not every version of PyTorch knows the FLOPs of the CPU's fused attention.
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop)
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop)

WAN_2_1_VAE = {}  # the defaults of AutoencoderKLWan
WAN_2_2_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
UMT5_XXL = {"vocab_size": 256384, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
QWEN3_VL_4B = {
    "hidden_size": 2560,
    "num_layers": 36,
    "num_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vision_hidden_size": 1024,
    "vision_depth": 24,
    "vision_num_heads": 16,
    "vision_intermediate_size": 4096,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (5, 11, 17),
    "patch_size": 16,
    "vocab_size": 151936,
}


@dataclass(frozen=True)
class Preset:
    """A transformer, the encoders beside it, and the shapes of its inputs.

    `latent_size` is (frames, height, width) of the latents, that of 81 frames of 480x832 by default. Visual tokens are
    `num_visual`; a clip that the MLLM sees gives about as many.
    """

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
    vae: dict = field(default_factory=lambda: WAN_2_1_VAE)
    text_encoder: dict = field(default_factory=lambda: UMT5_XXL)
    mllm: dict = field(default_factory=lambda: QWEN3_VL_4B)

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_tokens(self) -> int:
        """Patches of 1x2x2 in a clip."""
        frames, height, width = self.latent_size
        return frames * (height // 2) * (width // 2)

    @property
    def clip_size(self) -> tuple[int, int, int]:
        """(frames, height, width) in pixels."""
        frames, height, width = self.latent_size
        scale = self.vae.get("scale_factor_spatial", 8)
        return 4 * (frames - 1) + 1, scale * height, scale * width


SMALL_MLLM = {"hidden_size": 256, "num_layers": 8, "num_heads": 4, "vision_hidden_size": 128, "vision_depth": 6}
PRESETS = {
    "tiny": Preset(
        num_attention_heads=4,
        attention_head_dim=64,
        ffn_dim=512,
        num_layers=3,
        latent_size=(4, 16, 16),
        text_dim=64,
        num_text=80,
        num_edit=8,
        num_visual=16,
        vae={"base_dim": 3, "num_res_blocks": 1},
        text_encoder={"d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
        mllm={},
    ),
    # as deep as Wan 1.3B, so that the reference branch runs through the same share of the blocks
    "small": Preset(
        num_attention_heads=5,
        attention_head_dim=64,
        ffn_dim=1920,
        num_layers=30,
        latent_size=(9, 32, 32),
        text_dim=512,
        num_text=512,
        num_edit=32,
        num_visual=128,
        vae={"base_dim": 16},
        text_encoder={"d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 8},
        mllm=SMALL_MLLM,
    ),
    "wan-1.3b": Preset(12, 128, 8960, 30),
    "wan-5b": Preset(24, 128, 14336, 30, channels=48, latent_size=(21, 30, 52), vae=WAN_2_2_VAE),
    "wan-14b": Preset(40, 128, 13824, 40),
}


def transformer_config(preset: Preset) -> dict:
    """What the configurations of Wan's transformer and of ours have in common, but for the channels."""
    return {
        "num_attention_heads": preset.num_attention_heads,
        "attention_head_dim": preset.attention_head_dim,
        "text_dim": preset.text_dim,
        "ffn_dim": preset.ffn_dim,
        "num_layers": preset.num_layers,
    }


def build_transformer(preset: Preset, **config) -> RVEDiTTransformer3DModel:
    """The routed transformer of a preset, on torch's default device."""
    channels = {f"{name}_channels": preset.channels for name in ("in", "source", "out")}
    return RVEDiTTransformer3DModel(**transformer_config(preset) | channels | config)


def build_wan(preset: Preset, num_inputs: int = 1) -> WanTransformer3DModel:
    """Wan's transformer of a preset; `num_inputs` latents in its input channels."""
    channels = {"in_channels": num_inputs * preset.channels, "out_channels": preset.channels}
    return WanTransformer3DModel(**transformer_config(preset) | channels)


def build_vace(preset: Preset) -> WanVACETransformer3DModel:
    """Wan's transformer of a preset with VACE's branch beside every second block, as Wan2.1-VACE-1.3B has it."""
    return WanVACETransformer3DModel(
        **transformer_config(preset),
        in_channels=preset.channels,
        out_channels=preset.channels,
        vace_layers=list(range(0, preset.num_layers, 2)),
        vace_in_channels=2 * preset.channels + 64,
    )


def build_mllm(preset: Preset) -> PreTrainedModel:
    """The Qwen3-VL of a preset."""
    settings = dict(preset.mllm)
    vocab_size = settings.pop("vocab_size", None)
    mllm = build_tiny_mllm("qwen3_vl", **settings)
    if vocab_size is not None:
        mllm.resize_token_embeddings(vocab_size, mean_resizing=False)
    return mllm


def build(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, each made on the device in its dtype: a copy in float32 may not fit.

    Args:
        make (`Callable`): Builds the model; its own initial weights are never made.
        device (`torch.device`), dtype (`torch.dtype`): Of the weights; what the model keeps in float32 stays so.
    """
    with init_empty_weights(include_buffers=False):
        model = make().eval().requires_grad_(False)
    kept = kept_in_float32(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_kept = kept & {*path.split("."), name}
            value = torch.empty(parameter.shape, dtype=torch.float32 if is_kept else dtype, device=device)
            if value.ndim == 1:
                value.fill_(float(name == "weight"))  # of a norm, else a bias
            else:
                value.normal_(0, 0.02)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.to(device)


def make_tokens(preset: Preset, device: torch.device, dtype: torch.dtype, batch_size: int = 1) -> dict:
    """Random inputs of the routed transformer, by the names of its arguments."""

    def draw(*shape):
        return torch.randn(batch_size, *shape, device=device, dtype=dtype)

    return {
        "encoder_hidden_states": draw(preset.num_text, preset.text_dim),
        "edit_hidden_states": draw(preset.num_edit, preset.dim),
        "visual_hidden_states": draw(preset.num_visual, preset.dim),
        "visual_positions": torch.rand(batch_size, preset.num_visual, 3, device=device),
        "source_hidden_states": draw(preset.channels, *preset.latent_size),
    }


def merge_text(tokens: dict) -> dict:
    """Arguments of `project_context` as the pipeline gives them, for a text that fits in what it cuts to."""
    text, mask = merge_padding(tokens["encoder_hidden_states"], TEXT_LENGTHS)
    return tokens | {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def build_pipelines(preset: Preset, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> dict:
    """Pipelines around one VAE, one text encoder and one scheduler's settings, with transformers of one size.

    Args:
        preset ([`Preset`]): Of the transformers and encoders.
        names (`Sequence[str]`): Of `"ours"`, `"lucy"` and `"vace"`. Lucy has one timestep for each token, as its
            released checkpoint does; `"lucy-plain"` has one for the clip.
        device, dtype: Of all weights; those that models keep in float32 stay so, and the VAE is in float32, which Lucy
            and VACE give their clips to it in.

    Returns:
        `dict[str, DiffusionPipeline]`
    """
    tokenizer = build_text_tokenizer(model_max_length=preset.num_text)
    config = UMT5Config(d_model=preset.text_dim, **{"vocab_size": len(tokenizer)} | preset.text_encoder)
    text_encoder = build(lambda: UMT5EncoderModel(config), device, dtype)
    with torch.device(device):
        vae = AutoencoderKLWan(**preset.vae).eval()
    shared = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae}

    pipelines: dict[str, DiffusionPipeline] = {}
    for name in names:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
        if name == "ours":
            mllm = build(partial(build_mllm, preset), device, dtype)
            patch_size = preset.mllm.get("patch_size", 8)
            side = 2 * patch_size  # pixels of a visual token; one for two frames
            frames = min(16, preset.clip_size[0])
            with tempfile.TemporaryDirectory() as folder:
                build_tiny_mllm_processor("qwen3_vl", patch_size=patch_size).save_pretrained(folder)
                processor = RVEDiTProcessor.from_mllm(
                    folder,
                    num_edit_tokens=preset.num_edit,
                    max_frames=frames,
                    min_pixels=side**2,
                    max_pixels=max(1, 2 * preset.num_visual // frames) * side**2,
                )
            width = mllm.config.text_config.hidden_size
            distiller = build(partial(RVEDiTTokenDistiller, width, preset.dim, preset.num_edit), device, dtype)
            parts = {"mllm": mllm, "distiller": distiller, "processor": processor}
            make, pipeline = build_transformer, RVEDiTPipeline
        elif name == "vace":
            parts, make, pipeline = {}, build_vace, WanVACEPipeline
        else:
            parts, make = {"expand_timesteps": name == "lucy"}, partial(build_wan, num_inputs=2)
            pipeline = LucyEditPipeline
        transformer = build(partial(make, preset), device, dtype)
        pipelines[name] = pipeline(**shared, **parts, transformer=transformer, scheduler=scheduler)
        pipelines[name].set_progress_bar_config(disable=True)
    return pipelines


def kept_in_float32(model: nn.Module) -> set[str]:
    """Names of layers that stay in float32 where a model is loaded in bfloat16; transformers has more for float16."""
    attribute = "_keep_in_fp32_modules" + "_strict" * isinstance(model, PreTrainedModel)
    return set(getattr(model, attribute, None) or ())


def to_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast as `from_pretrained` does: what the model keeps in float32 stays."""
    kept = kept_in_float32(model)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


# The command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--preset`, `--device` and `--output`."""
    parser.add_argument("--preset", choices=PRESETS, default="small", help="size of the models and clips")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu")
    parser.add_argument("--output", type=Path, help="JSON file for settings, raw figures and ratios")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, kinds: Sequence[str]) -> None:
    """Make `args.device` a device of one of `kinds` and the folder of `args.output`; ends the program otherwise."""
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
            without = "--device meta counts memory and FLOPs without one, " if "meta" in kinds else ""
            parser.error(
                f"--preset {args.preset} needs a GPU, and PyTorch finds none: {without}--device cpu runs it all the"
                " same"
            )
    try:
        args.device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if args.device.type not in kinds:
        named = [{"cpu": "a CPU", "cuda": "a CUDA device", "meta": "meta"}[kind] for kind in kinds]
        parser.error(f"--device has to be {', '.join(named[:-1])} or {named[-1]}, but is {args.device}")
    if args.device.type == "cuda" and (args.device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {args.device} is not there: PyTorch finds {torch.cuda.device_count()} CUDA devices")


# Measuring


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32."""
    return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32


def measure_in_turns(
    actions: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warmups: int = 1,
    prepare: Callable[[str], None] | None = None,
    with_resident: bool = False,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time actions that take turns: A B C, A B C, ...

    Args:
        actions (`Mapping[str, Callable]`): By name.
        device (`torch.device`): On a CPU, seconds are the process' own, summed over its threads: other programs do not
            add to them.
        repeats, warmups (`int`): Turns that count, and those before them that do not.
        prepare (`Callable`, *optional*): Gets the name of each action before its time begins.
        with_resident (`bool`, defaults to `False`): Whether all that lies on the device before an action counts as
            its memory, though it may be that of the others. Of what does not, tensors that it is called with count.

    Returns:
        `tuple`: Seconds of each turn by name; and on CUDA the most memory in bytes of an action by name.
    """
    on_cuda = device.type == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time
    seconds, memory = {name: [] for name in actions}, {}
    for turn in tqdm(range(warmups + repeats), unit="turn", leave=False):
        for name, action in actions.items():
            if prepare is not None:
                prepare(name)
            if on_cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                resident = torch.cuda.memory_allocated(device) - num_argument_bytes(action)
                resident = 0 if with_resident else resident
            started = clock()
            action()
            if on_cuda:
                torch.cuda.synchronize(device)
                memory[name] = max(memory.get(name, 0), torch.cuda.max_memory_allocated(device) - resident)
            if turn >= warmups:
                seconds[name].append(clock() - started)
    return seconds, memory


def num_argument_bytes(action: Callable) -> int:
    """Bytes of the tensors that a `partial` holds, such as a context that is computed once."""
    if not isinstance(action, partial):
        return 0
    leaves = tree_leaves((action.args, action.keywords))
    return num_bytes([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])


def turn_ratios(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> list[float]:
    """Seconds of one action over another's of the same turn, as a machine's speed may drift from turn to turn."""
    return [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]


def spread(values: Sequence[float], spec: str) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):{spec}} ({min(values):{spec}}-{max(values):{spec}})"


def machine(device: torch.device) -> dict[str, str | int]:
    """What figures depend on; of those that are counted, on the meta device, no machine is part of it."""
    if device.type == "meta":
        return {"torch": torch.__version__}
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        name = found[1] if found else name
    on_cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else f"{os.cpu_count()} CPU cores",
        "cpu": name,
        "threads": torch.get_num_threads(),
    }


def publish(path: Path | None, script: str, argv: list[str] | None, text: str, result: dict) -> None:
    """Print Markdown, and write it with all other figures as JSON, whole or not at all.

    Args:
        path (`Path`, *optional*): The JSON file.
        script (`str`), argv (`list[str]`, *optional*): The command: a file name here, and its options, `None` for
            those of the command line.
        text (`str`): Tables.
        result (`dict`): Figures by name.
    """
    print(text)
    if path is None:
        return
    command = shlex.join(["python", f"benchmarks/{script}", *(sys.argv[1:] if argv is None else argv)])
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps({"command": command, **result, "text": text}, indent=2, default=str) + "\n")
    temporary.replace(path)
