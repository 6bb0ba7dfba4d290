"""Faster edits and what they cost in success: fewer steps, diffusers' caches, and a LoRA for a few steps.

    python benchmarks/quality.py --output quality.json
    python benchmarks/quality.py --model merged --lora runs/few/lora --lora_steps 4 --levels L1 L3

Items of the procedural benchmark are edited in batches, and all settings take turns on each batch, with the same
noise. The caches run at the pipeline's own number of steps; MagCache is calibrated on the first batch. Seconds are
those of whole edits, from the clip to the edited one. On a CPU they are the process' own, summed over its threads:
other programs do not add to them.
"""

import argparse
import io
import json
import re
import statistics
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from models import check_arguments, default_dtype, machine, measure_in_turns, publish, spread
from tqdm import tqdm

from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline
from rvedit_diffusers.evaluation import PipelineEditor, Task
from rvedit_diffusers.evaluation.editors import model_name, reconstruct
from rvedit_diffusers.evaluation.report import difference_figures, figure, resampled_means, share_figures
from rvedit_diffusers.synthetic import LEVELS, BenchmarkItem, BenchmarkItems
from rvedit_diffusers.synthetic.metrics import psnr
from rvedit_diffusers.synthetic.scoring import Judge, union_success


FULL = "full"
LAYERS = [r"blocks\.\d+\.attn[12]", r"blocks\.\d+\.ffn"]


@dataclass(frozen=True)
class Setting:
    """A way to edit: options of the call, and the configuration of a cache of the transformer."""

    options: dict = field(default_factory=dict)
    cache: object | None = None
    with_lora: bool = False


def settings_of(num_steps: int, lora_steps: int | None, mag_ratios: list[float]) -> dict[str, Setting]:
    """What is compared, by name; the first is what the pipeline does by itself."""
    found = {FULL: Setting()}
    for share in (2 / 3, 1 / 2, 1 / 3, 1 / 6):
        count = max(round(share * num_steps), 1)
        found[f"{count} steps"] = Setting({"num_inference_steps": count})
    for threshold in (0.1, 0.2):
        found[f"first block, {threshold}"] = Setting(cache=FirstBlockCacheConfig(threshold=threshold))
    for interval in (2, 3):
        found[f"TaylorSeer, every {interval}"] = Setting(
            cache=TaylorSeerCacheConfig(
                cache_interval=interval,
                disable_cache_before_step=2,
                cache_identifiers=LAYERS,
                taylor_factors_dtype=torch.float32,
            )
        )
    for threshold in (0.1, 0.3):
        found[f"MagCache, {threshold}"] = Setting(
            cache=MagCacheConfig(threshold=threshold, num_inference_steps=num_steps, mag_ratios=mag_ratios)
        )
    for threshold in (0.25, 0.5):
        found[f"SeaCache, {threshold}"] = Setting(cache=SeaCacheConfig(threshold=threshold))
    if lora_steps is not None:
        options = {"num_inference_steps": lora_steps, "guidance_scale": 1.0, "source_guidance_scale": 1.0}
        found[f"LoRA, {lora_steps} steps"] = Setting(options, with_lora=True)
        found[f"no LoRA, {lora_steps} steps, no guidance"] = Setting(options)
    return found


def calibrate(pipe: RVEDiTPipeline, tasks: list[Task], num_steps: int) -> list[float]:
    """MagCache's ratios of a model, the mean over guidance passes; diffusers prints them."""
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=num_steps))
    with redirect_stdout(io.StringIO()) as printed:
        PipelineEditor(pipe)(tasks)
    pipe.transformer.disable_cache()
    found = [json.loads(line) for line in re.findall(r"^\[[\d.].*\]$", printed.getvalue(), re.MULTILINE)]
    return np.mean(found, axis=0).tolist()


def edit(setting: Setting, pipes: dict[bool, RVEDiTPipeline], tasks: list[Task], clips: list) -> None:
    """Edit a batch; `clips` gets the edited ones."""
    pipe = pipes[setting.with_lora]
    if setting.cache is not None:
        pipe.transformer.enable_cache(setting.cache)
    clips[:] = PipelineEditor(pipe, **setting.options)(tasks)
    if setting.cache is not None:
        pipe.transformer.disable_cache()


def tasks_of(items: list[BenchmarkItem]) -> list[Task]:
    return [Task(item.id, item.source_frames, item.instruction, item.target_frames) for item in items]


def score_batch(items: list[BenchmarkItem], clips: dict[str, list[np.ndarray]], reconstructions: list[np.ndarray]):
    """By setting, for each item: union success, the share of operations done, and the PSNR to the full edit."""
    found = {name: [] for name in clips}
    for number, (item, reconstruction) in enumerate(zip(items, reconstructions, strict=True)):
        judge, ceiling = Judge(item), psnr(reconstruction, item.target_frames, item.outside)
        for name, edited in clips.items():
            verdicts = judge(edited[number])
            done = union_success(verdicts, psnr(edited[number], item.target_frames, item.outside), ceiling)
            everywhere = np.ones(item.outside.shape, bool)
            distance = float("nan") if name == FULL else psnr(edited[number], clips[FULL][number], everywhere)
            found[name].append((float(done), verdicts.count("success") / len(verdicts), distance))
    return found


def measure(args: argparse.Namespace, pipes: dict[bool, RVEDiTPipeline]) -> tuple[dict, dict]:
    """Seconds an edit in each turn, and `(items, 3)` scores of [`score_batch`], by setting."""
    size = {"num_frames": args.num_frames, "height": args.height, "width": args.width}
    levels = [BenchmarkItems(level, args.seed, **size) for level in args.levels]
    items = [level[index] for index in range(args.num_samples) for level in levels]
    batches = [items[start : start + args.batch_size] for start in range(0, len(items), args.batch_size)]
    num_steps = pipes[False].config.default_num_inference_steps
    mag_ratios = calibrate(pipes[False], tasks_of(batches[0]), num_steps)
    settings = settings_of(num_steps, args.lora_steps, mag_ratios)
    seconds, scores = {name: [] for name in settings}, {name: [] for name in settings}
    for number, batch in enumerate(tqdm(batches, unit="batch")):
        tasks, clips = tasks_of(batch), {name: [] for name in settings}
        actions = {name: partial(edit, setting, pipes, tasks, clips[name]) for name, setting in settings.items()}
        turn, _ = measure_in_turns(actions, args.device, repeats=1, warmups=int(number == 0))
        for name, values in score_batch(
            batch, clips, reconstruct(pipes[False].vae, [t.target for t in tasks])
        ).items():
            seconds[name].append(turn[name][0] / len(batch))
            scores[name] += values
    return seconds, {name: np.array(values) for name, values in scores.items()}


def summarize(seconds: dict[str, list[float]], scores: dict[str, np.ndarray]) -> dict[str, dict]:
    found = {}
    for name, values in scores.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds[FULL], strict=True)]
        success, difference = values[:, 0], values[:, 0] - scores[FULL][:, 0]
        found[name] = {
            "time_ratio": statistics.median(ratios),
            "time_ratios": ratios,
            **figure("union_success", float(success.mean()), resampled_means(success, "quality")),
            **share_figures("union_success", success),
            **figure("difference", float(difference.mean()), resampled_means(difference, "quality")),
            **{
                name.replace("union_success", "difference"): value
                for name, value in difference_figures("union_success", difference).items()
            },
            "op_success": float(values[:, 1].mean()),
            # of the mean error, as PSNRs of clips that hardly differ say little
            "psnr_to_full": None if name == FULL else float(-10 * np.log10(np.mean(10 ** (-values[:, 2] / 10)))),
        }
    return found


def table(found: dict[str, dict], seconds: dict[str, list[float]]) -> str:
    lines = ["| setting | seconds an edit | of full | union success | against full | operations done | PSNR to full |"]
    lines.append("|---" * 7 + "|")
    for name, row in found.items():
        success = f"{row['union_success']:.2f} [{row['union_success_low']:.2f}, {row['union_success_high']:.2f}]"
        difference = f"{row['difference']:+.2f} [{row['difference_low']:+.2f}, {row['difference_high']:+.2f}]"
        distance = "-" if row["psnr_to_full"] is None else f"{row['psnr_to_full']:.1f}"
        cells = [name, spread(seconds[name], ".2f"), spread(row["time_ratios"], ".2f"), success]
        cells += ["-" if name == FULL else difference, f"{row['op_success']:.2f}", distance]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def load(model: str, lora: Path | None, args: argparse.Namespace) -> RVEDiTPipeline:
    pipe = RVEDiTPipeline.from_pretrained(model, dtype=default_dtype(args.device))
    if lora is not None:
        pipe.load_lora_weights(lora)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY_CHECKPOINT, help="folder or Hub id; default: the embedded checkpoint")
    parser.add_argument("--lora", type=Path, help="folder of LoRA weights for a few steps without guidance")
    parser.add_argument("--lora_steps", type=int, help="that it was made for; needed with --lora")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["L1", "L2"])
    parser.add_argument("--num_samples", type=int, default=32, help="items of each level")
    parser.add_argument("--batch_size", type=int, default=8, help="clips that are edited together")
    parser.add_argument("--seed", type=int, default=0, help="names the items")
    for name, default in (("num_frames", 17), ("height", 64), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu")
    parser.add_argument("--output", type=Path, help="JSON file for settings, raw figures and ratios")
    args = parser.parse_args(argv)
    args.preset = model_name(str(args.model))
    for name in ("lora_steps", "num_samples", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    if (args.lora is None) != (args.lora_steps is None):
        parser.error("--lora and --lora_steps need each other")
    check_arguments(parser, args, ("cpu", "cuda"))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pipes = {False: load(args.model, None, args)}
    if args.lora is not None:
        pipes[True] = load(args.model, args.lora, args)
    seconds, scores = measure(args, pipes)
    found = summarize(seconds, scores)
    result = {
        "ratios": {f"{name}_vs_{FULL}": row["time_ratio"] for name, row in found.items() if name != FULL},
        "settings": vars(args),
        **machine(args.device),
        "quality": found,
        "seconds": seconds,
        "scores": {name: values[:, :2].tolist() for name, values in scores.items()},
    }
    publish(args.output, "quality.py", argv, table(found, seconds), result)


if __name__ == "__main__":
    main()
