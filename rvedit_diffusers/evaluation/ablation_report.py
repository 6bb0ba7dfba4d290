"""The report of an ablation: tables in Markdown and a picture, from what its runs recorded and nothing else."""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

from ..model_card import markdown_table
from .ablation import CLAIM_POINTS, SUCCESS, Ablation, Estimate, claim_sentence, verdict, with_interval
from .report import MEAN_LEVELS


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


FEW_SEEDS = 5
METHOD = (
    "Brackets are 95 % intervals of a bootstrap over seeds and items, paired by seed and item for differences; of"
    " figures that a run has once, over seeds; where all values or all pairs are the same, of Clopper and Pearson."
    " `no difference shown` means that the interval includes 0: neither that the row is better or worse, nor that it"
    " is the same. The intervals are not corrected for the number of rows: of twenty rows that do not differ, one is"
    " expected to look as if it did."
)
UNITS = (
    "Information is the lower bound on what the features of both branches tell about each other, at the end of"
    " training. Its ceiling is the log of the number of candidates: bounds of different losses are not comparable."
    " Seconds a step are the median of what was logged, on a machine that may have had other work."
)
# Title, with the name of a figure, the levels it is averaged over, a factor, and decimals.
Columns = dict[str, tuple[str, tuple[str, ...], float, int]]


def _table(ablation: Ablation, columns: Columns, base: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of figures, or of differences to `base`."""
    lines = []
    for row in ablation.runs:
        cells = []
        for name, levels, factor, decimals in columns.values():
            value = (
                ablation.figure(row, name, levels) if base is None else ablation.difference(row, base, name, levels)
            )
            scaled = None if value is None else Estimate(*(factor * each for each in value))
            cells.append(with_interval(scaled, decimals, "" if base is None else "+"))
        if row != base:
            lines.append([f"`{row}`", *cells])
    return ["row", *columns], lines


def tables(ablation: Ablation, says: Mapping[str, str]) -> dict[str, str]:
    """The tables of the report in Markdown, by title.

    Args:
        ablation ([`Ablation`]): At least one run.
        says (`Mapping[str, str]`): What each row is.
    """
    base = ablation.baseline
    success: Columns = {"mean of L2-L6": (SUCCESS, MEAN_LEVELS, 100, 1)}
    success |= {level: (SUCCESS, (level,), 100, 1) for level in ablation.levels}
    others: Columns = {
        "operations done, L2-L6, per cent": ("op_success", MEAN_LEVELS, 100, 1),
        "held-out flow loss": ("validation_flow", (), 1, 4),
        "information, nats": ("information_nats", (), 1, 3),
        "seconds a step": ("seconds_per_step", (), 1, 3),
    }
    found = {"Union success, per cent": markdown_table(*_table(ablation, success))}
    head, lines = _table(ablation, success, base)
    for line in lines:
        difference = ablation.difference(line[0].strip("`"), base, SUCCESS, MEAN_LEVELS)
        line.append("-" if difference is None else verdict(difference))
    found[f"Difference to `{base}`, points of union success"] = markdown_table([*head, "the mean is"], lines)
    found["Other figures"] = markdown_table(*_table(ablation, others))
    found[f"Difference to `{base}`, other figures"] = markdown_table(*_table(ablation, others, base))
    head, lines = ["row", "what it is", "parameters", "width of the feed-forward layers", "seeds"], []
    for row, runs in ablation.runs.items():
        facts = next(iter(runs.values())).facts
        seeds = ", ".join(map(str, sorted(runs)))
        lines.append([f"`{row}`", says[row], f"{facts['parameters']:,}", facts["ffn_dim"], seeds])
        if facts["taken"]:  # of the pipeline that all rows begin with, not all rows can take as much
            lines[-1].append(facts["taken"]["transformer"])
    if len(lines[0]) > len(head):
        head.append("tensors that begin with weights of `start`")
    found["Rows"] = markdown_table(head, lines)
    return found


def describe_setting(ablation: Ablation) -> str:
    """What all rows have in common, and the machines, from what the runs recorded."""
    runs = [run for by_seed in ablation.runs.values() for run in by_seed.values()]
    transformer, train, evaluate = (runs[0].settings[name] for name in ("transformer", "train", "evaluate"))
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    batch = train.get("train_batch_size", 1) * train.get("gradient_accumulation_steps", 1)
    lines = [
        f"A transformer of width {width} with {transformer['num_layers']} blocks, trained for"
        f" {train['max_train_steps']} steps of {batch} pairs, clips of {train['buckets']}. All rows have the same"
        " pairs in the same order, the same noise, the same initial weights in layers that they share, and, by the"
        " width of the feed-forward layers, the same number of parameters within 1 %. Scored on"
        f" {ablation.num_items(ablation.levels[:1])} items of each level, drawn from seed"
        f" {evaluate.get('seed', 0)}, the same for all."
    ]
    if evaluate.get("kinds"):
        lines.append(f"The items are made of these operations alone: {', '.join(evaluate['kinds'])}.")
    if isinstance(start := runs[0].settings.get("start"), dict):
        options = train | start["train"]
        changed = [f"{name} {value}" for name, value in start["train"].items() if name != "max_train_steps"]
        what = ["the first row's transformer", f"of {options['max_train_steps']} steps", f"seed {start['seed']}"]
        what += [f"with {changed[0]}", *changed[1:]] if changed else []
        lines.append(
            f"All rows begin with one training of {', '.join(what)}, but for layers that read tokens, which are new."
        )
    for machine in sorted({json.dumps(run.facts["machine"]) for run in runs}):
        facts = [f"{name} {value}" for name, value in json.loads(machine).items()]
        lines.append(f"Run on: {', '.join(facts)}.")
    return "\n\n".join(lines)


def write_report(
    path: str | Path,
    ablation: Ablation,
    says: Mapping[str, str],
    claim: tuple[str, str],
    command: str,
    num_missing: int = 0,
) -> None:
    """Write the report as Markdown, and the picture beside it as a PNG of the same name.

    Args:
        path (`str` or `Path`): Ends in `.md`.
        ablation ([`Ablation`]): At least one run, scored on L2 to L6 at least.
        says (`Mapping[str, str]`): What each row is.
        claim (`tuple[str, str]`): The row that is said to be better, and the one that it is compared with.
        command (`str`): What makes the report.
        num_missing (`int`, defaults to 0): Runs that are still to be made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix(".png")
    plot_ablation(ablation, picture)
    parts = ["# Ablation", claim_sentence(ablation, *claim)]
    if num_missing:
        parts.append(f"**Not complete:** runs that are still to be made: {num_missing}.")
    counts = {len(runs) for runs in ablation.runs.values()}
    if len(counts) > 1:
        parts.append("Rows have different numbers of seeds; differences are over the seeds that both rows have.")
    if min(counts) == 1:
        parts.append("With one seed the intervals tell how the items vary, not how trainings do.")
    elif min(counts) < FEW_SEEDS:
        parts.append(f"With {min(counts)} seeds the intervals are rough, and rather too narrow.")
    parts += [METHOD, f"```bash\n{command}\n```", describe_setting(ablation)]
    parts.append(f"![Differences with their intervals, and held-out loss over the steps]({picture.name})")
    for title, table in tables(ablation, says).items():
        parts += [f"## {title}", table]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("\n\n".join([*parts, UNITS]) + "\n", encoding="utf-8")
    partial.replace(path)


def plot_ablation(ablation: Ablation, path: str | Path) -> None:
    """Draw the differences to the baseline with their intervals, and the held-out loss of each row over the steps.

    Args:
        ablation ([`Ablation`]): At least one run, scored on L2 to L6 at least.
        path (`str` or `Path`): The PNG.
    """
    rows = list(ablation.runs)
    colours = dict(zip(rows, plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(rows)))))
    height = max(3.5, 0.32 * len(rows) + 1.5)
    figure, (forest, curves) = plt.subplots(1, 2, figsize=(13, height), width_ratios=(1, 1.2))
    for place, row in enumerate(rows):
        difference = ablation.difference(row, ablation.baseline, SUCCESS, MEAN_LEVELS)
        if row == ablation.baseline or difference is None:
            continue
        mean, low, high = (100 * value for value in difference)
        forest.errorbar(
            mean, place, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt="o", color=colours[row], capsize=3
        )
    forest.axvline(0, color="black", linewidth=0.8)
    forest.axvline(CLAIM_POINTS, color="grey", linestyle="--", linewidth=0.8)
    forest.set_yticks(range(len(rows)), rows)
    forest.set_ylim(len(rows) - 0.5, -0.5)
    forest.set(xlabel=f"points of union success more than {ablation.baseline}", title="mean of L2 to L6")
    forest.grid(alpha=0.3, axis="x")
    for row, runs in ablation.runs.items():
        steps = sorted(set.intersection(*({step for step, _ in run.curve} for run in runs.values())))
        if not steps:
            continue
        losses = np.array([[dict(run.curve)[step] for step in steps] for run in runs.values()])  # (seeds, steps)
        curves.plot(steps, losses.mean(0), ".-", color=colours[row], label=row)
        curves.fill_between(steps, losses.min(0), losses.max(0), color=colours[row], alpha=0.12, linewidth=0)
    curves.set(xlabel="step", title="held-out flow matching loss: mean and range of the seeds")
    curves.grid(alpha=0.3)
    if curves.lines:
        curves.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    figure.savefig(partial, dpi=100, format="png")
    partial.replace(path)
    plt.close(figure)
