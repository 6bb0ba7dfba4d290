"""What a training on many GPUs would take: memory of each, time of a step and of a recipe, and how to launch it.

    python benchmarks/plan.py --preset wan-14b --gpus 64 --gpu h100 --frames 81 --size 480x832 --training_type full

Nothing is run. Memory is counted on tensors without data for one block, and by formula for all. Time is the larger of
the FLOPs' at the speeds of matrix products and of attention, over the share of these that a step reaches, and of what
GPUs send each other. `--measured` takes speeds and share from `inference.py`'s JSON of such a GPU; without it they are
shares of the published speed that are assumed, and printed. `--check` compares what this would have said with what
`training.py` measured on the machine of `--measured`; memory, elsewhere than on a GPU, with what it counted there.
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from costs import transformer_flops
from models import PRESETS, Preset, build_mllm, build_transformer, publish
from training import make_samples

from rvedit_diffusers.training.adapters import add_lora
from rvedit_diffusers.training.branches import EditingBranches
from rvedit_diffusers.training.memory import num_bytes, step_bytes


@dataclass(frozen=True)
class GPU:
    """Published figures: FLOPs a second of dense bfloat16 products, memory, and bytes a second to another GPU of the
    same machine and of another one, each way."""

    flops_per_second: float
    memory: float
    near: float
    far: float
    per_machine: int = 8


GIB = 2**30
GPUS = {
    "h100": GPU(989e12, 80e9, 450e9, 50e9),
    "h200": GPU(989e12, 141e9, 450e9, 50e9),
    "a100": GPU(312e12, 80e9, 300e9, 25e9),
    "l40s": GPU(362e12, 48e9, 32e9, 12.5e9),
    "rtx4090": GPU(165e12, 24e9, 32e9, 12.5e9),
}
# Where nothing was measured: shares of the published speed that large products and attention reach.
ASSUMED_SHARES = {"matrix product": 0.7, "attention": 0.5}
ASSUMED_STEP_SHARE = 0.75  # of the time that these allow
MEMORY_SHARE = 0.9  # of a GPU's memory; the rest is CUDA's and fragments
CONFIGS = {"ddp": "examples/accelerate/ddp.yaml", "fsdp2": "examples/accelerate/fsdp2.yaml"}
RECIPE = ("connect", "edit, clips of 17 frames, without alignment", "edit, with alignment")


def resize(preset: Preset, num_frames: int, height: int, width: int) -> Preset:
    """A preset for clips of another size, in pixels."""
    scale = preset.vae.get("scale_factor_spatial", 8)
    return dataclasses.replace(preset, latent_size=((num_frames - 1) // 4 + 1, height // scale, width // scale))


# FLOPs and seconds


def step_flops(
    preset: Preset, training_type: str, checkpointing: bool, aligned: bool, align_blocks: Sequence[int] | None = None
) -> dict[str, float]:
    """FLOPs of a training step on one clip, `linear` and `attention`.

    The backward pass of a linear layer is one product for its input and, if it is trained, one for its weights; that
    of fused attention 2.5 times its forward pass, which it repeats in part. LoRA's own products are left out. The
    reference branch runs forward up to the last of `align_blocks`, by default the first deep block.
    """
    forward = transformer_flops(preset)
    passes = {"linear": 2 + (training_type == "full") + checkpointing, "attention": 3.5 + checkpointing}
    last = preset.num_layers // 3 if align_blocks is None else max(align_blocks)
    share = (last + 1) / preset.num_layers
    return {name: forward[name] * (passes[name] + share * aligned) for name in forward}


def connect_flops(preset: Preset, checkpointing: bool) -> dict[str, float]:
    """FLOPs of a step of the first stage: both branches stop after the last shallow block; gradients pass one of them,
    on their way to the distiller, and no weight of the transformer gets any."""
    forward, share = transformer_flops(preset), (preset.num_layers // 3) / preset.num_layers
    passes = {"linear": 3 + checkpointing, "attention": 4.5 + checkpointing}
    return {name: forward[name] * passes[name] * share for name in forward}


def step_seconds(flops: dict[str, float], speed: dict[str, float], share: float) -> float:
    return (flops["linear"] / speed["matrix product"] + flops["attention"] / speed["attention"]) / share


def traffic(num_weights: int, num_trained: int, num_gpus: int, gpu: GPU, strategy: str) -> float:
    """Seconds a step in which a GPU sends: gradients in float32, and with FSDP weights in bfloat16, twice."""
    if num_gpus == 1:
        return 0.0
    bandwidth = gpu.near if num_gpus <= gpu.per_machine else gpu.far
    ring = (num_gpus - 1) / num_gpus
    gradients = 4 * num_trained * ring * (2 if strategy == "ddp" else 1)  # all-reduce, or reduce-scatter
    return (gradients + (2 * 2 * num_weights * ring if strategy == "fsdp2" else 0)) / bandwidth


# Memory


def count_memory(preset: Preset, training_type: str, checkpointing: bool) -> dict[str, float]:
    """Bytes of one clip a GPU: states by kind, and what passes hold at once.

    Returns:
        `dict[str, float]`: `weights`, `gradients` and `optimizer` of AdamW; `activations`; `block`, a block's weights
        as FSDP gathers them; `mllm`, the weights of the MLLM, which runs in every step of a full training, as its
        queries learn; `num_weights` and `num_trained`.
    """

    def branches(num_layers: int) -> EditingBranches:
        with torch.device("meta"):
            transformer = build_transformer(dataclasses.replace(preset, num_layers=num_layers))
            if training_type == "lora":
                add_lora(transformer.to(torch.bfloat16))
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            return EditingBranches(transformer, align_blocks=[0])

    whole, sample = branches(preset.num_layers), make_samples(preset, 2048)["align"]
    one, two = (step_bytes(branches(count), sample) for count in (1, 2))
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    blocks = [num_bytes(block.parameters()) for block in whole.transformer.blocks]
    own = sum(p.nbytes for p in whole.transformer.blocks[-1].parameters() if p.requires_grad)
    mllm_bytes = 0
    if training_type == "full":
        with torch.device("meta"):
            mllm_bytes = 2 * sum(parameter.numel() for parameter in build_mllm(preset).parameters())
    # A block's gradients and copies in bfloat16 come with it, but not with what autograd keeps of it.
    kept = two - one if not checkpointing else 2 * preset.num_tokens * preset.dim  # its input, in bfloat16
    return {
        "weights": num_bytes(whole.parameters()),
        "gradients": num_bytes(trained),
        "optimizer": 8 * sum(parameter.numel() for parameter in trained),
        "activations": max(one - own, 0) + (preset.num_layers - 1) * max(kept - (0 if checkpointing else own), 0),
        "mllm": mllm_bytes,
        "block": 2 * max(blocks) / whole.transformer.dtype.itemsize * 2,
        "num_weights": sum(parameter.numel() for parameter in whole.parameters()),
        "num_trained": sum(parameter.numel() for parameter in trained),
    }


def total_memory(memory: dict[str, float], num_gpus: int, strategy: str) -> float:
    """Bytes of one GPU."""
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    here = memory["activations"] + memory["mllm"]
    return states + here if strategy == "ddp" else states / num_gpus + here + 2 * memory["block"]


# The command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="wan-14b")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--gpus", type=int, default=8, help="how many; one clip each, a step is one of each")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--size", default="480x832", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--training_type", choices=("lora", "full"), default="full")
    parser.add_argument("--no_gradient_checkpointing", action="store_true")
    parser.add_argument("--num_pairs", type=int, default=100_000, help="of an epoch")
    parser.add_argument(
        "--recipe_steps", type=int, nargs=3, default=(2000, 10_000, 5000), help=f"of the stages: {'; '.join(RECIPE)}"
    )
    parser.add_argument("--measured", type=Path, help="JSON of inference.py on such a GPU")
    parser.add_argument("--check", type=Path, help="JSON of training.py on the machine of --measured")
    parser.add_argument("--output", type=Path, help="JSON file for the prediction")
    args = parser.parse_args(argv)
    size = re.fullmatch(r"(\d+)x(\d+)", args.size)
    if not size or any(int(side) % 32 or not int(side) for side in size.groups()):
        parser.error(f"--size has to be HEIGHTxWIDTH in multiples of 32, but is {args.size}")
    args.height, args.width = map(int, size.groups())
    if args.frames < 1 or args.frames % 4 != 1:
        parser.error(f"--frames has to be a multiple of 4, and 1, but is {args.frames}")
    for name in ("gpus", "num_pairs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    if args.check is not None and args.measured is None:
        parser.error("--check needs --measured, of the same machine")
    for name in ("measured", "check"):
        path = getattr(args, name)
        try:
            setattr(args, f"{name}_result", None if path is None else json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"--{name} {path} cannot be read: {error}")
    if args.measured is not None and "peak_flops_per_second" not in args.measured_result.get("transformer", {}):
        parser.error(f"--measured {args.measured} has to be of inference.py with the part transformer")
    return args


def speeds(args: argparse.Namespace) -> tuple[dict[str, float], float]:
    """FLOPs a second of matrix products and of attention, and the share of them that a step reaches."""
    if args.measured is None:
        published = GPUS[args.gpu].flops_per_second
        return {name: share * published for name, share in ASSUMED_SHARES.items()}, ASSUMED_STEP_SHARE
    found = args.measured_result["transformer"]
    return found["peak_flops_per_second"], found["flops"]["ours"]["attainable_share"]


def check(args: argparse.Namespace) -> list[dict]:
    """FLOPs, memory and seconds of steps, predicted and measured."""
    found, (speed, share) = args.check_result, speeds(args)
    settings, rows = found["settings"], []
    preset = PRESETS[settings["preset"]["name"]]
    options = (settings["training_type"], settings["gradient_checkpointing"])
    memory = count_memory(preset, *options)
    memory["mllm"] = 0  # tokens of training.py come from the cache
    memory["activations"] *= settings["batch_size"]
    for name, aligned in (("plain", False), ("align", True)):
        flops = step_flops(preset, *options, aligned, settings["align_blocks"])
        flops = {kind: settings["batch_size"] * value for kind, value in flops.items()}
        row = {"step": name, "flops": sum(flops.values()), "measured_flops": found["flops"][name]}
        row |= {"memory": total_memory(memory, 1, "ddp"), "measured_memory": found["memory_bytes"][name]}
        if found["seconds"]:
            row["seconds"] = step_seconds(flops, speed, share)
            row["measured_seconds"] = sorted(found["seconds"][name])[len(found["seconds"][name]) // 2]
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    gpu, checkpointing = GPUS[args.gpu], not args.no_gradient_checkpointing
    speed, share = speeds(args)
    preset = resize(PRESETS[args.preset], args.frames, args.height, args.width)

    # 1. Memory, and how to launch
    memory = count_memory(preset, args.training_type, checkpointing)
    totals = {strategy: total_memory(memory, args.gpus, strategy) for strategy in CONFIGS}
    fitting = [strategy for strategy, total in totals.items() if total <= MEMORY_SHARE * gpu.memory]
    strategy = fitting[0] if fitting else "fsdp2"
    lines = [
        f"{args.preset}, {args.training_type}, {args.gpus} x {args.gpu}, {args.frames}x{args.size}:"
        f" {memory['num_weights'] / 1e9:.2f} B parameters, {memory['num_trained'] / 1e9:.3f} B trained,"
        f" {preset.num_tokens:,} tokens a clip\n",
        "| memory of a GPU, GiB | whole | sharded |\n|---|---|---|",
    ]
    for name in ("weights", "gradients", "optimizer"):
        lines.append(f"| {name} | {memory[name] / GIB:.1f} | {memory[name] / args.gpus / GIB:.1f} |")
    for name, label in (("activations", "activations"), ("mllm", "MLLM, which runs in every step")):
        lines.append(f"| {label} | {memory[name] / GIB:.1f} | {memory[name] / GIB:.1f} |")
    lines.append(f"| total | {totals['ddp'] / GIB:.1f} | {totals['fsdp2'] / GIB:.1f} |")
    limit = f"{MEMORY_SHARE:.0%} of the {gpu.memory / GIB:.0f} GiB of one {args.gpu}"
    if fitting:
        launch = "python"
        if args.gpus > 1:
            launch = f"accelerate launch --config_file {CONFIGS[strategy]} --num_processes {args.gpus}"
        if args.gpus > gpu.per_machine:
            machines = math.ceil(args.gpus / gpu.per_machine)
            launch += (
                f" --num_machines {machines} --machine_rank RANK --main_process_ip ADDRESS --main_process_port PORT"
            )
        lines.append(f"\nFits in {limit}: {launch} examples/train.py ...")
    else:
        lines.append(f"\nDoes not fit in {limit}: take more GPUs, smaller clips, or --training_type lora.")

    # 2. Time
    origin = f"measured on {args.measured_result['device']}" if args.measured else "assumed"
    reached = ", ".join(f"{name} {value / 1e12:.3g} TFLOPs/s" for name, value in speed.items())
    lines.append(f"\nSpeeds ({origin}): {reached}; a step reaches {share:.0%} of them.\n")
    sent = traffic(memory["num_weights"], memory["num_trained"], args.gpus, gpu, strategy)
    seconds = {}
    lines.append("| step | TFLOPs a GPU | computing, s | sending, s | step, s | epoch, h |\n|---|---|---|---|---|---|")
    for name, aligned in (("plain", False), ("align", True)):
        flops = step_flops(preset, args.training_type, checkpointing, aligned)
        computed = step_seconds(flops, speed, share)
        seconds[name] = max(computed, sent)  # FSDP and DDP send while they compute
        epoch = math.ceil(args.num_pairs / args.gpus) * seconds[name] / 3600
        cells = [f"{sum(flops.values()) / 1e12:,.0f}", f"{computed:.2f}", f"{sent:.2f}", f"{seconds[name]:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {epoch:,.1f} |")
    short = resize(preset, 17, args.height, args.width)
    gathered = traffic(memory["num_weights"], 0, args.gpus, gpu, strategy)  # the distiller's gradients are small
    stage_seconds = [
        max(step_seconds(connect_flops(preset, checkpointing), speed, share), gathered),
        max(step_seconds(step_flops(short, args.training_type, checkpointing, False), speed, share), sent),
        seconds["align"],
    ]
    lines.append("\n| stage | steps | hours | GPU hours |\n|---|---|---|---|")
    hours = [steps * second / 3600 for steps, second in zip(args.recipe_steps, stage_seconds)]
    for name, steps, hour in zip(RECIPE, args.recipe_steps, hours):
        lines.append(f"| {name} | {steps:,} | {hour:,.1f} | {hour * args.gpus:,.0f} |")
    lines.append(f"| all | {sum(args.recipe_steps):,} | {sum(hours):,.1f} | {sum(hours) * args.gpus:,.0f} |")

    # 3. Against what was measured
    checked, ratios = check(args) if args.check else [], {}
    if checked:
        lines.append("\n| predicted / measured | FLOPs | memory | seconds |\n|---|---|---|---|")
    for row in checked:
        errors = {name: row[name] / row[f"measured_{name}"] for name in ("flops", "memory", "seconds") if name in row}
        cells = [f"{errors[name]:.2f}" if name in errors else "-" for name in ("flops", "memory", "seconds")]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
        ratios |= {f"{row['step']}_{name}_vs_measured": error for name, error in errors.items()}
    settings = {name: value for name, value in vars(args).items() if not name.endswith("_result")}
    publish(
        args.output,
        "plan.py",
        argv,
        "\n".join(lines),
        {
            "ratios": ratios,
            "settings": settings,
            "memory_bytes": memory | {f"total_{name}": total for name, total in totals.items()},
            "fits": bool(fitting),
            "config": CONFIGS[strategy] if fitting and args.gpus > 1 else None,
            "seconds": seconds | {"sending": sent},
            "recipe_hours": dict(zip(RECIPE, hours)),
            "check": checked,
        },
    )


if __name__ == "__main__":
    main()
