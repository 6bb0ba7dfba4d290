"""What an edit costs: a transformer call beside Wan's, a whole edit beside the editors of diffusers, and compiling.

    python benchmarks/inference.py --preset small --output inference.json
    python benchmarks/inference.py --preset wan-1.3b --parts transformer compile

Models have random weights, one width and depth, and one clip; those that are compared take turns in one process:

- transformer: a call of `RVEDiTTransformer3DModel` with its context computed once and the text's padding merged, as
  the pipeline does; with all text tokens; and with its context in each call. Beside it, a call of
  `WanTransformer3DModel`, which does not edit: the least that any editor costs. The text has 32 tokens, and padding to
  Wan's 512;
- edit: `RVEDiTPipeline`, with its MLLM, beside `LucyEditPipeline`, with a timestep for each token as its released
  checkpoint has it and with one for the clip, and `WanVACEPipeline`, from the clip to the edited one;
- compile: a call with `compile_repeated_blocks()` beside an eager one, for both transformers.

On a CPU, seconds are the process' own, summed over its threads: other programs do not add to them. FLOPs are those of
matrix products, attention and convolutions. The attainable time of a call is that of its linear layers' FLOPs at the
speed of a large matrix product and of its attention's at that of one self-attention, both timed in the same turns.
"""

import argparse
import copy
import dataclasses
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch._dynamo.utils
from costs import transformer_flops
from models import (
    PRESETS,
    add_arguments,
    build,
    build_pipelines,
    build_transformer,
    build_wan,
    check_arguments,
    default_dtype,
    machine,
    make_tokens,
    measure_in_turns,
    merge_text,
    publish,
    spread,
    turn_ratios,
)
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rvedit_diffusers.pipeline_rvedit import TEXT_LENGTHS


PARTS = ("transformer", "edit", "compile")
PROMPT = "make the red ball blue and remove the dog"
PROMPT_TOKENS = 32  # of a text for the transformer alone; the rest is padding


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; default: all")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count, after one that warms up")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="of an edit, each with guidance")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 where the device has it")
    args = parser.parse_args(argv)
    for name in ("repeats", "num_inference_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    check_arguments(parser, args, ("cpu", "cuda"))
    args.dtype = default_dtype(args.device) if args.dtype is None else getattr(torch, args.dtype)
    return args


def build_calls(args: argparse.Namespace) -> tuple[dict[str, torch.nn.Module], dict[str, Callable]]:
    """The transformers, `"ours"` and `"wan"`, and calls of them on one clip."""
    preset = PRESETS[args.preset]
    models = {
        name: build(partial(make, preset), args.device, args.dtype)
        for name, make in (("ours", build_transformer), ("wan", build_wan))
    }
    tokens = make_tokens(preset, args.device, args.dtype)
    tokens["encoder_hidden_states"][:, PROMPT_TOKENS:] = 0
    latents = torch.randn(1, preset.channels, *preset.latent_size, device=args.device, dtype=args.dtype)
    condition = {"hidden_states": latents, "timestep": torch.full((1,), 500.0, device=args.device)}
    text = {"encoder_hidden_states": tokens["encoder_hidden_states"]}
    with torch.no_grad():
        context = models["ours"].project_context(latents, **merge_text(tokens))
        whole_context = models["ours"].project_context(latents, **tokens)
    calls = {
        "ours": partial(models["ours"], **condition, context=context),
        "ours, all text tokens": partial(models["ours"], **condition, context=whole_context),
        "ours, context in each call": partial(models["ours"], **condition, **tokens),
        "wan": partial(models["wan"], **condition, **text),
    }
    return models, calls


def peak_calls(args: argparse.Namespace) -> dict[str, tuple[Callable, int]]:
    """A large matrix product and a self-attention of the preset's shape, each with its FLOPs."""
    preset = PRESETS[args.preset]
    side = 8192 if args.device.type == "cuda" else 1024
    left, right = torch.randn(2, side, side, device=args.device, dtype=args.dtype)
    query, key, value = torch.randn(
        3,
        1,
        preset.num_attention_heads,
        preset.num_tokens,
        preset.attention_head_dim,
        device=args.device,
        dtype=args.dtype,
    )
    flops = 4 * preset.num_tokens**2 * preset.dim
    # a small one's launch would count: on a GPU it runs for some milliseconds
    times = math.ceil(5e12 / flops) if args.device.type == "cuda" else 1

    def attend() -> None:
        for _ in range(times):
            F.scaled_dot_product_attention(query, key, value)

    return {"matrix product": (lambda: left @ right, 2 * side**3), "attention": (attend, times * flops)}


def measure_transformer(args: argparse.Namespace) -> dict:
    """Seconds, FLOPs and, on CUDA, memory of single calls."""
    preset = PRESETS[args.preset]
    _, calls = build_calls(args)
    peaks = peak_calls(args)
    seconds, memory = measure_in_turns(
        calls | {name: call for name, (call, _) in peaks.items()}, args.device, args.repeats
    )
    speed = {name: flops / statistics.median(seconds[name]) for name, (_, flops) in peaks.items()}
    flops = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        num_text = min(preset.num_text, TEXT_LENGTHS) if name == "ours" else preset.num_text
        size = dataclasses.replace(preset, num_text=num_text)
        formula = transformer_flops(size, is_wan=name == "wan", with_context="context" in calls[name].keywords)
        attainable = formula["linear"] / speed["matrix product"] + formula["attention"] / speed["attention"]
        flops[name] = {
            "counted": counter.get_total_flops(),
            "formula": sum(formula.values()),
            "attainable_share": attainable / statistics.median(seconds[name]),
        }
    return {"seconds": seconds, "memory_bytes": memory, "flops": flops, "peak_flops_per_second": speed}


def measure_edit(args: argparse.Namespace) -> dict:
    """Seconds and, on CUDA, memory of whole edits."""
    preset = PRESETS[args.preset]
    names = ["ours", "lucy", "lucy-plain"]
    if preset.vae.get("scale_factor_spatial", 8) == 8:  # VACE's masks are made for Wan 2.1's VAE
        names.append("vace")
    home = torch.device("cpu") if args.device.type == "cuda" else args.device  # one pipeline at a time may fit
    pipelines = build_pipelines(preset, names, home, args.dtype)
    num_frames, height, width = preset.clip_size
    clip = torch.rand(num_frames, 3, height, width, generator=torch.Generator().manual_seed(0))
    settings = {
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": 5.0,
    }
    clips = {"ours": clip}
    actions = {name: partial(pipe, video=clips.get(name, clip[None]), **settings) for name, pipe in pipelines.items()}

    def prepare(name: str) -> None:
        if home != args.device:
            for other in pipelines.values():
                other.to(home)
            pipelines[name].to(args.device)

    seconds, memory = measure_in_turns(actions, args.device, args.repeats, prepare=prepare, with_resident=True)
    return {"seconds": seconds, "memory_bytes": memory}


def measure_compile(args: argparse.Namespace) -> dict:
    """Seconds of eager and compiled calls, and how often compiling was done: again for new steps, branches, sizes."""
    preset = PRESETS[args.preset]
    models, calls = build_calls(args)
    actions = {name: calls[name] for name in models}
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch._dynamo.reset()
    for name, model in models.items():
        compiled = copy.deepcopy(model)
        compiled.compile_repeated_blocks()
        actions[f"{name}, compiled"] = partial(compiled, **actions[name].keywords)
    for name in models:
        actions[f"{name}, compiled"]()
    compilations = {"first": counters["stats"]["unique_graphs"]}
    compiled, keywords = actions["ours, compiled"].func, dict(actions["ours, compiled"].keywords)
    for timestep in (900.0, 100.0):
        keywords["timestep"] = torch.full((1,), timestep, device=args.device)
        keywords["context"] = compiled.project_context(
            keywords["hidden_states"], **merge_text(make_tokens(preset, args.device, args.dtype))
        )
        compiled(**keywords)
    compilations["other steps and tokens"] = counters["stats"]["unique_graphs"] - sum(compilations.values())
    # before other sizes are seen, whose graphs would be taken for this one, too, and are slower
    seconds, memory = measure_in_turns(actions, args.device, args.repeats)
    frames, height, width = preset.latent_size
    for more in (1, 2, 3):
        latents = torch.randn(1, preset.channels, frames + more, height, width, device=args.device, dtype=args.dtype)
        tokens = make_tokens(preset, args.device, args.dtype)
        tokens["source_hidden_states"] = torch.randn_like(latents)
        keywords |= {"hidden_states": latents, "context": compiled.project_context(latents, **merge_text(tokens))}
        compiled(**keywords)
    compilations["three other numbers of frames"] = counters["stats"]["unique_graphs"] - sum(compilations.values())
    breaks = sum(counters["graph_break"].values())
    return {"seconds": seconds, "memory_bytes": memory, "compilations": compilations, "graph_breaks": breaks}


MEASURES = {"transformer": measure_transformer, "edit": measure_edit, "compile": measure_compile}
# Name of the ratio: part, what is divided, by what.
RATIOS = {
    "transformer_vs_wan": ("transformer", "ours", "wan"),
    "transformer_all_text_vs_wan": ("transformer", "ours, all text tokens", "wan"),
    "transformer_context_in_each_call_vs_wan": ("transformer", "ours, context in each call", "wan"),
    "edit_vs_lucy": ("edit", "ours", "lucy"),
    "edit_vs_lucy_plain": ("edit", "ours", "lucy-plain"),
    "edit_vs_vace": ("edit", "ours", "vace"),
    "compiled_vs_eager": ("compile", "ours, compiled", "ours"),
    "wan_compiled_vs_eager": ("compile", "wan, compiled", "wan"),
    "compiled_vs_wan_compiled": ("compile", "ours, compiled", "wan, compiled"),
}


def tables(measured: dict[str, dict], turns: dict[str, list[float]]) -> str:
    """What was measured, in Markdown."""
    lines = []
    for part, found in measured.items():
        lines.append(f"| {part} | seconds (min-max) | GiB | TFLOPs counted | by formula | of the attainable speed |")
        lines.append("|---|---|---|---|---|---|")
        for name, values in found["seconds"].items():
            used = f"{found['memory_bytes'][name] / 2**30:.2f}" if name in found["memory_bytes"] else "-"
            cells = ["-"] * 3
            if name in found.get("flops", {}):
                flops = found["flops"][name]
                cells = [f"{flops['counted'] / 1e12:.3f}", f"{flops['formula'] / 1e12:.3f}"]
                cells.append(f"{flops['attainable_share']:.0%}")
            lines.append(f"| {name} | {spread(values, '.3g')} | {used} | {' | '.join(cells)} |")
        if "compilations" in found:
            counts = ", ".join(f"{name} {count}" for name, count in found["compilations"].items())
            lines.append(f"\nGraphs compiled: {counts}; graph breaks: {found['graph_breaks']}.")
        lines.append("")
    lines += ["| ratio | median (min-max) |", "|---|---|"]
    lines += [f"| {name} | {spread(values, '.3f')} |" for name, values in turns.items()]
    return "\n".join(lines)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)
    measured = {part: MEASURES[part](args) for part in PARTS if part in args.parts}
    turns = {
        ratio: turn_ratios(measured[part]["seconds"], name, other)
        for ratio, (part, name, other) in RATIOS.items()
        if part in measured and other in measured[part]["seconds"]
    }
    result = {
        "ratios": {name: statistics.median(values) for name, values in turns.items()},
        "settings": vars(args) | {"preset": {"name": args.preset} | dataclasses.asdict(PRESETS[args.preset])},
        **machine(args.device),
        **measured,
    }
    publish(args.output, "inference.py", argv, tables(measured, turns), result)


if __name__ == "__main__":
    main()
