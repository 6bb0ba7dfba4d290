"""What scores amount to: figures with intervals, a table, and strips of clips to look at."""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..synthetic import twin_consistency
from ..training.sampler import derive_seed
from ..video import read_video, write_strip
from .runner import Suite


NUM_RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # per cent
SHARES = ("union_success", "op_success", "twin_consistency")  # of what succeeds or fails
MEAN_LEVELS = ("L2", "L3", "L4", "L5", "L6")
MEAN_NAME = "mean_L2_L6"


def resampled_means(values: np.ndarray, name: str) -> np.ndarray:
    """Means of bootstrap samples, the same in every run.

    Args:
        values (`np.ndarray` of shape `(n,)`): At least one.
        name (`str`): Of what the samples are drawn for; two names have independent samples.

    Returns:
        `np.ndarray` of shape `(1000,)`, float64.
    """
    rng = np.random.default_rng(derive_seed("bootstrap", name))
    return values[rng.integers(len(values), size=(NUM_RESAMPLES, len(values)))].mean(1)


def level_means(values: np.ndarray, level: str, name: str) -> np.ndarray:
    """[`resampled_means`] of a level; of one of `SHARES` that all or no items have, shares that may be behind it.

    All samples of a bootstrap would be the same, and the level would count as certain in a mean of levels. The shares
    are drawn from the posterior of Jeffreys' prior, Beta(0.5, 0.5).
    """
    if not share_figures(name, values):
        return resampled_means(values, f"{level} {name}")
    rng = np.random.default_rng(derive_seed("posterior", f"{level} {name}"))
    successes = values.sum()
    return rng.beta(successes + 0.5, values.size - successes + 0.5, NUM_RESAMPLES)


def figure(name: str, mean: float | None, resampled: np.ndarray | None) -> dict[str, float | None]:
    """A mean as `name`, and its 95 % interval as `name_low` and `name_high`; `None` where there is no value."""
    low, high = (None, None) if resampled is None else np.percentile(resampled, INTERVAL).tolist()
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _unseen_share(count: int) -> float:
    # The largest share of which that none is among `count` says nothing, by Clopper and Pearson
    return 1 - (INTERVAL[0] / 100) ** (1 / count)


def share_figures(name: str, values: np.ndarray) -> dict[str, float]:
    """The 95 % interval of Clopper and Pearson for one of `SHARES` if all its values are 0 or all are 1, else nothing.

    All samples of a bootstrap are the same then, but that none of 10 succeeded does not say that none ever will.
    """
    if name not in SHARES or not values.size or values.min() != values.max() or values[0] not in (0, 1):
        return {}
    reach = _unseen_share(values.size)
    low, high = (0.0, reach) if values[0] == 0 else (1 - reach, 1.0)
    return {f"{name}_low": low, f"{name}_high": high}


def difference_figures(name: str, values: np.ndarray) -> dict[str, float]:
    """Likewise for the paired differences of one of `SHARES`, in [-1, 1], if all are the same: the interval if those
    that might be others, as many as [`share_figures`] allows, were as far off as they can be."""
    if name not in SHARES or not values.size or values.min() != values.max():
        return {}
    value, reach = float(values[0]), _unseen_share(values.size)
    return {f"{name}_low": value - reach * (1 + value), f"{name}_high": value + reach * (1 - value)}


def values_of(scores: Sequence[dict]) -> dict[str, np.ndarray]:
    """The numbers among scores by name, without those that are `None`.

    Args:
        scores (`Sequence[dict]`): Of several clips, each with some of the names.
    """
    names = dict.fromkeys(name for each in scores for name, value in each.items() if not isinstance(value, str))
    return {name: np.array([s[name] for s in scores if s.get(name) is not None], np.float64) for name in names}


def figures_of(values: dict[str, np.ndarray], place: str) -> dict[str, float | None]:
    """[`figure`] of each of several values; `place` names what they were measured on."""
    found = {}
    for name, each in values.items():
        mean = float(each.mean()) if each.size else None
        found |= figure(name, mean, resampled_means(each, f"{place} {name}") if each.size else None)
        found |= share_figures(name, each)
    return found


def level_values(entries: Sequence[dict]) -> dict[str, np.ndarray]:
    """The values of a level that have a mean, by name: scores of the items, and whether both twins are right."""
    values = values_of([entry["scores"] for entry in entries])
    if any("twin" in entry for entry in entries):
        pairs = [(entry["scores"], entry["twin"]) for entry in entries if entry.get("twin")]
        values["twin_consistency"] = np.array([twin_consistency([pair]) for pair in pairs], np.float64)
    return values


def summarize(groups: dict[str, Sequence[dict]]) -> dict[str, dict]:
    """What the items of each level amount to.

    Args:
        groups (`dict[str, Sequence[dict]]`): The entries of a [`ScoreRecord`] by level (or operation), at least one
            in each.

    Returns:
        `dict[str, dict]`: For each level

        - the mean of each number of [`score`], over the items: **twins do not count**. Each has its 95 % bootstrap
          interval beside it, as `union_success_low` and `union_success_high`; `None` where no item has a value. Where
          all items succeed, or none, it is that of [`share_figures`].
        - `twin_consistency`: the share of pairs of twins of which both have union success; over `n_pairs` pairs.
          Neither is there where twins were not scored.
        - `n`: the number of items.
        - `failures`: how often an operation failed, by the verdict up to its colon.
        - `op_success_by_kind`: for each kind of operation how many succeeded (`success`), of how many (`n`).

        And `mean_L2_L6`, if these are there: the mean of the levels' figures, each level counting the same.
    """
    values = {name: level_values(entries) for name, entries in groups.items()}
    levels = {}
    for name, entries in groups.items():
        row = figures_of(values[name], name) | {"n": len(entries)}
        if "twin_consistency" in values[name]:
            row["n_pairs"] = len(values[name]["twin_consistency"])
        failures, kinds = Counter(), defaultdict(lambda: {"success": 0, "n": 0})
        for entry in entries:
            for number, kind in enumerate(entry["kinds"], 1):
                verdict = entry["scores"][f"op_{number}"]
                kinds[kind]["n"] += 1
                kinds[kind]["success"] += verdict == "success"
                if verdict != "success":
                    failures[verdict.partition(":")[0]] += 1
        levels[name] = row | {"failures": dict(sorted(failures.items())), "op_success_by_kind": dict(kinds)}
    if set(MEAN_LEVELS) <= groups.keys():
        levels[MEAN_NAME] = {"n": sum(levels[name]["n"] for name in MEAN_LEVELS)}
        for name in values[MEAN_LEVELS[0]]:
            parts = [(level, values[level].get(name, np.empty(0))) for level in MEAN_LEVELS]
            if all(each.size for _, each in parts):
                resampled = [level_means(each, level, name) for level, each in parts]
                mean = float(np.mean([each.mean() for _, each in parts]))
                levels[MEAN_NAME] |= figure(name, mean, np.mean(resampled, axis=0))
                levels[MEAN_NAME] |= share_figures(name, np.concatenate([each for _, each in parts]))
    return levels


def format_table(rows: dict[str, dict], columns: dict[str, tuple[str, int]]) -> str:
    """A table for the screen.

    Args:
        rows (`dict[str, dict]`): Figures by what they were measured on.
        columns (`dict[str, tuple[str, int]]`): Title and number of decimals by figure; one with an interval shows it
            if its title ends in `"[]"`.
    """
    titles = [title.removesuffix("[]").strip() for title, _ in columns.values()]
    table = [["", *titles]]
    for name, row in rows.items():
        cells = []
        for column, (title, decimals) in columns.items():
            numbers = [row.get(column)]
            if title.endswith("[]"):
                numbers += [row.get(f"{column}_low"), row.get(f"{column}_high")]
            texts = ["-" if number is None else f"{number:.{decimals}f}" for number in numbers]
            cells.append(texts[0] + (f" [{', '.join(texts[1:])}]" if len(texts) > 1 else ""))
        table.append([name, *cells])
    widths = [max(len(line[number]) for line in table) for number in range(len(columns) + 1)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in table
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_strips(folder: Path, suite: Suite, entries: Sequence[dict]) -> Path:
    """Draw the best, the median and the worst item of a level, by its success and by its distance from the target.

    Args:
        folder (`Path`): Of a [`ScoreRecord`], with `clips`; gets `LEVEL.png`.
        suite ([`Level`] or [`SingleEdits`]): Draws the items again.
        entries (`Sequence[dict]`): At least one.

    Returns:
        `Path`: The picture: source, edit and true edit of each, over time.
    """
    names = ("union_success", "op_success", "inside_psnr" if "inside_psnr" in entries[0]["scores"] else "outside_psnr")
    ordered = sorted(entries, key=lambda entry: [entry["scores"][name] for name in names])
    rows = {}
    for word, entry in (("best", ordered[-1]), ("median", ordered[len(ordered) // 2]), ("worst", ordered[0])):
        item = suite.draw(entry["index"])[0]
        rows[f"{word}: source"] = item.source_frames
        rows[f"{word}: {textwrap.shorten(item.instruction, 60)}"] = read_video(
            folder / "clips" / f"{entry['id']}.mp4"
        ).frames
        rows[f"{word}: true edit"] = item.target_frames
    path = folder / f"{suite.name}.png"
    write_strip(path, rows)
    return path
