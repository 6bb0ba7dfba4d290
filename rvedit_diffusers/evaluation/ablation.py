"""What the runs of an ablation amount to: figures with intervals, paired differences, a claim."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..synthetic import LEVELS
from ..training.checkpoint import read_log
from ..training.sampler import derive_seed
from .record import ScoreRecord
from .report import INTERVAL, MEAN_LEVELS, NUM_RESAMPLES, difference_figures, share_figures


CLAIM_POINTS = 5.0
LAST_SHARE = 0.1  # of a log, over which its figures at the end are taken
SUCCESS = "union_success"
FACTS, SETTINGS = "run.json", "settings.json"


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to.

    Attributes:
        row (`str`): The variant.
        seed (`int`): Of its training.
        scores (`dict[str, dict[str, np.ndarray]]`): For each level `union_success` and `op_success` of its items, in
            [0, 1], `(items,)` float64 in the order of their indices.
        curve (`list[tuple[int, float]]`): Held-out flow matching loss by step.
        figures (`dict[str, float]`): Of the training's end, those of `validation_flow`, `information_nats` and
            `seconds_per_step` that were logged: the last, the mean over the last tenth of the log, and the median.
        facts (`dict`): What the run recorded: `parameters` and `ffn_dim` of the transformer, what was `taken` of a
            pipeline to start from, and the `machine`.
        settings (`dict`): What it was run with: `transformer`, `train` and `evaluate`, and others.
    """

    row: str
    seed: int
    scores: dict[str, dict[str, np.ndarray]]
    curve: list[tuple[int, float]]
    figures: dict[str, float]
    facts: dict
    settings: dict


class Estimate(NamedTuple):
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def read_outcome(folder: str | Path, row: str, seed: int) -> Outcome | None:
    """Read the folder of a run: `log.jsonl`, `scores`, `settings.json` and `run.json`.

    Args:
        folder (`str` or `Path`): Of the run.
        row (`str`), seed (`int`): Which run it is.

    Returns:
        [`Outcome`], or `None` if the run is not finished.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        return None
    entries = read_log(folder / "log.jsonl")
    curve = [(entry["step"], entry["validation_flow"]) for entry in entries if "validation_flow" in entry]
    logged = {
        name: [entry[name] for entry in entries if name in entry] for name in ("information_nats", "seconds_per_step")
    }
    figures = {"validation_flow": curve[-1][1]} if curve else {}
    if nats := logged["information_nats"]:
        figures["information_nats"] = float(np.mean(nats[-max(1, round(LAST_SHARE * len(nats))) :]))
    if seconds := logged["seconds_per_step"]:
        figures["seconds_per_step"] = float(np.median(seconds))
    levels: dict[str, list[dict]] = {}
    for entry in sorted(ScoreRecord(folder / "scores").entries().values(), key=lambda entry: entry["index"]):
        levels.setdefault(entry["suite"], []).append(entry["scores"])
    scores = {
        level: {name: np.array([item[name] for item in items], np.float64) for name in (SUCCESS, "op_success")}
        for level, items in sorted(levels.items(), key=lambda item: LEVELS.index(item[0]))
    }
    facts, settings = (json.loads((folder / name).read_text()) for name in (FACTS, SETTINGS))
    return Outcome(row, seed, scores, curve, figures, facts, settings)


def write_outcomes(path: str | Path, outcomes: Sequence[Outcome]) -> None:
    """Write finished runs to one JSON file, which has all that a report is made of."""
    path, lines = Path(path), []
    for run in outcomes:
        scores = {level: {name: v.tolist() for name, v in each.items()} for level, each in run.scores.items()}
        lines.append(json.dumps(vars(run) | {"scores": scores}))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text('{"runs": [\n' + ",\n".join(lines) + "\n]}\n")
    partial.replace(path)


def read_outcomes(path: str | Path) -> dict[tuple[str, int], Outcome]:
    """What [`write_outcomes`] wrote, by row and seed; nothing if there is no such file.

    Raises:
        ValueError: The file holds something else.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        found = {}
        for run in json.loads(path.read_text())["runs"]:
            scores = {
                level: {name: np.array(values, np.float64) for name, values in each.items()}
                for level, each in run["scores"].items()
            }
            curve = [(step, loss) for step, loss in run["curve"]]
            found[run["row"], run["seed"]] = Outcome(**run | {"scores": scores, "curve": curve})
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold the runs of an ablation: {error!r}") from error


def estimate(values: Mapping[str, np.ndarray]) -> Estimate:
    """The mean over levels with the interval of a two-level bootstrap: of seeds, then of items.

    Every resample draws seeds with replacement and, for each level, items with replacement. The items drawn are the
    same for all of its seeds, as all seeds were scored on the same items: each seed with items of its own would count
    them as often as there are seeds, and the interval would be too narrow. Draws depend on the numbers of seeds and
    items and on the levels' names alone, so that differences of rows are paired.

    Args:
        values (`Mapping[str, np.ndarray]`): For each level an array `(seeds, items)`. What is measured once a run has
            one item.

    Returns:
        [`Estimate`]: The levels count the same. With one seed the interval is that of the items alone; of a single
            value there is none, it is `nan`.
    """
    mean = float(np.mean([each.mean() for each in values.values()]))
    if all(each.size == 1 for each in values.values()):
        return Estimate(mean, math.nan, math.nan)
    num_seeds = len(next(iter(values.values())))
    rng = np.random.default_rng(derive_seed("bootstrap", "seeds"))
    seeds = rng.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    resampled = np.zeros(NUM_RESAMPLES)
    for level, each in values.items():
        rng = np.random.default_rng(derive_seed("bootstrap", "items", level))
        items = rng.integers(each.shape[1], size=(NUM_RESAMPLES, each.shape[1]))
        resampled += each[seeds[:, :, None], items[:, None, :]].mean((1, 2)) / len(values)
    low, high = np.percentile(resampled, INTERVAL).tolist()
    return Estimate(mean, low, high)


def _estimate_of(
    name: str, values: Mapping[str, np.ndarray], closed_figures: Callable[[str, np.ndarray], dict[str, float]]
) -> Estimate:
    # Where all values are the same a bootstrap has one sample, and the interval is that of a formula.
    found, every = estimate(values), np.concatenate([each.ravel() for each in values.values()])
    if every.min() == every.max() and not math.isnan(found.low):
        closed = closed_figures(name, every[: sum(each.shape[1] for each in values.values())])
        if closed:
            return Estimate(found.mean, closed[f"{name}_low"], closed[f"{name}_high"])
    return found


def with_interval(value: Estimate | None, decimals: int, sign: str = "") -> str:
    """`"1.2 [0.8, 1.6]"`, or `"-"` where there is no value; `sign` is that of a format specification."""
    if value is None:
        return "-"
    mean, low, high = (f"{each:{sign}.{decimals}f}" for each in value)
    return mean if math.isnan(value.low) else f"{mean} [{low}, {high}]"


class Ablation:
    """The finished runs of a grid.

    Args:
        outcomes (`Sequence[Outcome]`): In the order in which their rows are to be shown.
        baseline (`str`): The row that others are compared with.

    Raises:
        ValueError: Two runs were scored on other levels or numbers of items.
    """

    def __init__(self, outcomes: Sequence[Outcome], baseline: str):
        self.baseline = baseline
        self.runs: dict[str, dict[int, Outcome]] = {}
        for outcome in outcomes:
            self.runs.setdefault(outcome.row, {})[outcome.seed] = outcome
        sizes = {tuple((level, len(each[SUCCESS])) for level, each in o.scores.items()) for o in outcomes}
        if len(sizes) > 1:
            raise ValueError(f"`outcomes` have to be of the same items, but are of {sorted(sizes)}")
        self.levels = list(outcomes[0].scores) if outcomes else []

    def _values(
        self, row: str, name: str, levels: Sequence[str], seeds: Sequence[int]
    ) -> dict[str, np.ndarray] | None:
        runs = [self.runs[row][seed] for seed in seeds]
        if not runs:
            return None
        if levels:
            return {level: np.stack([run.scores[level][name] for run in runs]) for level in levels}
        if not all(name in run.figures for run in runs):
            return None
        return {name: np.array([[run.figures[name]] for run in runs])}

    def figure(self, row: str, name: str, levels: Sequence[str] = ()) -> Estimate | None:
        """A figure of a row over its seeds, or `None` if not all of its runs have it.

        Args:
            row (`str`): With at least one run.
            name (`str`): Of the scores of `levels`, averaged over these; without levels, of `Outcome.figures`, whose
                interval is that of the seeds. Where none of the items succeeded, or all did, it is that of
                [`share_figures`], of as many as there are items: seeds have the same ones.
        """
        values = self._values(row, name, levels, sorted(self.runs[row]))
        return None if values is None else _estimate_of(name, values, share_figures)

    def difference(self, row: str, other: str, name: str, levels: Sequence[str] = ()) -> Estimate | None:
        """How much larger a figure of a row is than another row's, paired by seed and item; see [`Ablation.figure`].

        Over the seeds that both rows have; `None` if there are none, or not all have the figure. Where all pairs
        differ alike, as where they are the same, the interval is that of [`difference_figures`].
        """
        seeds = self.common_seeds(row, other)
        values, others = (self._values(each, name, levels, seeds) for each in (row, other))
        if values is None or others is None:
            return None
        return _estimate_of(name, {level: values[level] - others[level] for level in values}, difference_figures)

    def common_seeds(self, row: str, other: str) -> list[int]:
        return sorted(self.runs.get(row, {}).keys() & self.runs.get(other, {}).keys())

    def num_items(self, levels: Sequence[str]) -> int:
        """Of these levels together, which each run was scored on."""
        run = next(iter(next(iter(self.runs.values())).values()))
        return sum(len(run.scores[level][SUCCESS]) for level in levels)


def verdict(difference: Estimate) -> str:
    """Which way a difference goes, if its interval tells."""
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "no difference shown"


def claim_sentence(ablation: Ablation, row: str, other: str) -> str:
    """Whether a row beats another by at least 5 points of union success on the mean of L2 to L6, in one sentence.

    It is supported if the whole interval of the difference is at 5 points or above.
    """
    claim = f"The claim that `{row}` beats `{other}` by >= {CLAIM_POINTS:g} points on the mean of L2-L6 is"
    found = ablation.difference(row, other, SUCCESS, MEAN_LEVELS)
    if found is None:
        return f"{claim} not tested: no seed of both has been run."
    if math.isnan(found.low):
        return f"{claim} not tested: one seed and one item of each level have no interval."
    difference = Estimate(*(100 * value for value in found))
    num_seeds = len(ablation.common_seeds(row, other))
    facts = f"difference {with_interval(difference, 1, '+')} points, {num_seeds} seed{'s' * (num_seeds > 1)}"
    facts += f", {ablation.num_items(MEAN_LEVELS)} items each"
    if difference.low >= CLAIM_POINTS:
        return f"{claim} supported: {facts}."
    readings = {
        "better": f"`{row}` is better, but the interval reaches below {CLAIM_POINTS:g}",
        "worse": f"`{row}` is worse",
        "no difference shown": "the interval includes 0, so that not even a difference is shown",
    }
    if difference.high < CLAIM_POINTS:
        readings["better"] = f"`{row}` is better, but by less than {CLAIM_POINTS:g}"
    return f"{claim} not supported: {facts}; {readings[verdict(difference)]}."
