"""How the cost of a transformer call grows with frames, area and batch, beside Wan's.

    python benchmarks/growth.py --preset wan-1.3b --output growth.json
    python benchmarks/growth.py --preset small --device cpu

For each size both transformers take turns. Without a GPU, or with `--device meta`, nothing is run: FLOPs are those of
`costs.py`, and memory is the most that a call's operations hold at once on tensors without data. The exponent is the
slope of a line through the logarithms, over the number of latent tokens: 1 where the cost is proportional, 2 where
attention rules.
"""

import argparse
import dataclasses
import statistics
from functools import partial

import numpy as np
import torch
from costs import transformer_flops
from memory import live_bytes
from models import (
    PRESETS,
    Preset,
    add_arguments,
    build,
    build_transformer,
    build_wan,
    check_arguments,
    default_dtype,
    machine,
    make_tokens,
    measure_in_turns,
    publish,
)
from torch import nn


FRAMES = (17, 33, 49, 81, 121, 161)
AREAS = (0.25, 0.5, 1.0, 1.5, 2.25)  # of the preset's
BATCHES = (1, 2, 4)
QUANTITIES = {"seconds": "s", "bytes": "GiB", "flops": "TFLOPs"}
UNITS = {"seconds": 1, "bytes": 2**30, "flops": 1e12}


def sizes(preset: Preset) -> dict[str, dict[float, tuple[Preset, int]]]:
    """By axis and place on it: a preset of that size, and how many clips."""
    frames, height, width = preset.latent_size

    def scaled(area: float) -> tuple[int, int, int]:
        return frames, 2 * round(height * area**0.5 / 2), 2 * round(width * area**0.5 / 2)

    def of(size: tuple[int, int, int]) -> Preset:
        return dataclasses.replace(preset, latent_size=size)

    return {
        "frames": {count: (of(((count - 1) // 4 + 1, height, width)), 1) for count in FRAMES},
        "area": {area: (of(scaled(area)), 1) for area in AREAS},
        "batch": {count: (preset, count) for count in BATCHES},
    }


def build_models(preset: Preset, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    return {
        name: build(partial(make, preset), device, dtype)
        for name, make in (("ours", build_transformer), ("wan", build_wan))
    }


def call_on(preset: Preset, num_clips: int, device: torch.device, dtype: torch.dtype, name: str, model: nn.Module):
    """Call a transformer once; the routed one with its context."""
    tokens = make_tokens(preset, device, dtype, num_clips)
    latents = torch.randn(num_clips, preset.channels, *preset.latent_size, device=device, dtype=dtype)
    arguments = {"encoder_hidden_states": tokens["encoder_hidden_states"]}
    if name == "ours":
        arguments = {"context": model.project_context(latents, **tokens)}
    return partial(model, latents, torch.full((num_clips,), 500.0, device=device), **arguments)


def measure(args: argparse.Namespace) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By axis: its places, and by quantity and transformer the figure at each."""
    preset, on_meta = PRESETS[args.preset], args.device.type == "meta"
    models = None if on_meta else build_models(preset, args.device, args.dtype)
    found = {}
    for axis, places in sizes(preset).items():
        values = {quantity: {"ours": [], "wan": []} for quantity in QUANTITIES}
        for size, num_clips in places.values():
            for name in ("ours", "wan"):
                flops = transformer_flops(size, is_wan=name == "wan", with_context=name == "ours")
                values["flops"][name].append(num_clips * sum(flops.values()))
            if on_meta:
                for name, model in build_models(size, args.device, args.dtype).items():
                    call = partial(run, size, num_clips, args.dtype, name)
                    values["bytes"][name].append(live_bytes(model, call))
                continue
            calls = {name: call_on(size, num_clips, args.device, args.dtype, name, models[name]) for name in models}
            seconds, memory = measure_in_turns(calls, args.device, args.repeats)
            for name in models:
                values["seconds"][name].append(statistics.median(seconds[name]))
                values["bytes"][name] += [memory[name]] if memory else []
        kept = {quantity: by_name for quantity, by_name in values.items() if by_name["ours"]}
        tokens = [num_clips * size.num_tokens for size, num_clips in places.values()]
        found[axis] = {"places": list(places), "tokens": tokens, **kept}
    return found


def run(size: Preset, num_clips: int, dtype: torch.dtype, name: str, model: nn.Module) -> object:
    return call_on(size, num_clips, torch.device("cpu"), dtype, name, model)()


def exponent(tokens: list[int], values: list[float]) -> float:
    """Slope of the line of least squares through the logarithms."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="turns that count at each size, after one")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats has to be at least 1, but is {args.repeats}")
    if args.device is None and not torch.cuda.is_available():
        args.device = "meta"
    check_arguments(parser, args, ("cpu", "cuda", "meta"))
    args.dtype = torch.bfloat16 if args.device.type == "meta" else default_dtype(args.device)
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)
    found = measure(args)
    exponents = {}
    lines = ["| axis | quantity | ours, at each place | Wan, at each place | exponent, ours | exponent, Wan |"]
    lines.append("|---" * 6 + "|")
    for axis, values in found.items():
        for quantity, unit in QUANTITIES.items():
            if quantity not in values:
                continue
            slopes = {name: exponent(values["tokens"], values[quantity][name]) for name in ("ours", "wan")}
            exponents[f"{axis}_{quantity}"] = slopes
            shown = [", ".join(f"{v / UNITS[quantity]:.3g}" for v in values[quantity][name]) for name in slopes]
            cells = [f"{axis} {', '.join(map(str, values['places']))}", unit, *shown]
            lines.append(f"| {' | '.join(cells)} | {slopes['ours']:.2f} | {slopes['wan']:.2f} |")
    result = {
        "ratios": {
            f"{axis}_{quantity}_vs_wan": statistics.median(
                a / b for a, b in zip(values[quantity]["ours"], values[quantity]["wan"])
            )
            for axis, values in found.items()
            for quantity in QUANTITIES
            if quantity in values
        },
        "exponents": exponents,
        "settings": vars(args) | {"preset": {"name": args.preset} | dataclasses.asdict(PRESETS[args.preset])},
        **machine(args.device),
        "growth": found,
    }
    publish(args.output, "growth.py", argv, "\n".join(lines), result)


if __name__ == "__main__":
    main()
