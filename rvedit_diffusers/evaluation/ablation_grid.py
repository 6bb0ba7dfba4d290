"""The grid of an ablation: its config, and the runs that follow from it."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..distiller_rvedit import RVEDiTTokenDistiller
from ..synthetic.levels import DRAWN
from ..training.checkpoint import differences, read_log
from ..training.variants import match_parameters, num_parameters
from ..transformer_rvedit import RVEDiTTransformer3DModel
from .ablation import FACTS, SETTINGS
from .report import MEAN_LEVELS


PARTS = ("vae", "mllm", "distiller", "text_encoder", "processor", "tokenizer", "scheduler")  # taken of the base
NEEDED = {"base": str, "transformer": dict, "train": dict, "evaluate": dict, "seeds": list, "rows": dict}
NEEDED |= {"baseline": str, "claim": list}
# Options that the script sets itself, and what all rows have in common.
OWN_TRAIN = (
    "config model output stage plot cache_dir encode_only dry_run seed resume_from_checkpoint allow_config_change"
    " push_to_hub hub_model_id hub_private_repo".split()
)
OWN_EVALUATE = "model lora vae output benchmark data limit operations".split()
SHARED_TRAIN = (
    "train_data validation_data data_root columns source_column edited_column instruction_column buckets fps num_pairs"
    " data_seed levels kinds operations edits_per_scene training_type train_distiller train_text_encoder"
    " max_train_steps train_batch_size gradient_accumulation_steps num_validation_pairs".split()
)
SHARED_TRANSFORMER = (
    "ffn_dim num_attention_heads attention_head_dim in_channels source_channels out_channels patch_size"
    " text_dim".split()
)
DEFAULTS = {
    "training_type": "full",
    "train_distiller": "connectors",
    "buckets": "17x64x64",
    "max_train_steps": 1000,
    "data_seed": 0,
    "report_to": "none",
    "num_validation_edits": 0,
    "checkpoints_total_limit": 1,
}


@dataclass(frozen=True)
class Run:
    """One training and its scores.

    Attributes:
        row (`str`), seed (`int`): Which one.
        folder (`Path`): Of its own, where all of it goes.
        settings (`dict`): All that the result depends on: `transformer`, `train`, `evaluate`, and hashes of weights.
    """

    row: str
    seed: int
    folder: Path
    settings: dict

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def is_trained(self) -> bool:
        return (self.folder / "pipeline" / "model_index.json").is_file()

    @property
    def is_finished(self) -> bool:
        return (self.folder / FACTS).is_file()

    @property
    def size(self) -> int:
        """Steps to train and items to score."""
        levels = self.settings["evaluate"]["levels"]
        return self.settings["train"]["max_train_steps"] + self.settings["evaluate"]["num_samples"] * len(levels)

    @property
    def progress(self) -> int:
        """How much of `size` is done, as far as the logs tell."""
        if self.is_finished:
            return self.size
        log, steps = self.folder / "log.jsonl", 0
        if log.is_file():
            steps = max((entry["step"] for entry in read_log(log)), default=0)
        return steps + sum(path.read_bytes().count(b"\n") for path in self.folder.glob("scores/scores-*.jsonl"))

    def check(self, known: dict | None = None, source: Path | None = None) -> None:
        """Compare with the settings that the folder was begun with, if it was, and with those of a file of runs.

        Args:
            known (`dict`, *optional*): The settings of this run in the file.
            source (`Path`, *optional*): The file.

        Raises:
            ValueError: Some are others; they are listed.
        """
        path = self.folder / SETTINGS
        begun = json.loads(path.read_text()) if path.is_file() else None
        for place, settings, kind in ((self.folder, begun, "folder"), (source, known, "--report")):
            if settings is None:
                continue
            changed = differences(_flat(settings), _flat(json.loads(json.dumps(self.settings))))
            if changed:
                what = "\n  ".join(changed)
                raise ValueError(f"{place} was made with other settings: delete it, or name another {kind}\n  {what}")


def _flat(settings: dict) -> dict:
    inner = {f"{name}.{k}": v for name, value in settings.items() if isinstance(value, dict) for k, v in value.items()}
    return inner | {name: value for name, value in settings.items() if not isinstance(value, dict)}


def read_grid(path: Path) -> dict:
    """Read a grid and refuse what cannot work.

    Args:
        path (`Path`): JSON; see `examples/ablation.py` for what it holds.

    Returns:
        `dict`: With defaults filled in.

    Raises:
        OSError, ValueError: The file cannot be read; or something in it is missing, unknown or not to be set there.
    """
    try:
        grid = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--config {path} is no JSON: {error}") from error
    if not isinstance(grid, dict):
        raise ValueError(f"--config {path} has to hold one JSON object")
    problems = [
        f"`{name}` has to be a {kind.__name__}" if name in grid else f"`{name}` is missing"
        for name, kind in NEEDED.items()
        if not isinstance(grid.get(name), kind)
    ]
    problems += [f"`{name}` is unknown" for name in grid if name not in (*NEEDED, "start")]
    start = grid.get("start")
    if isinstance(start, dict) and (set(start) != {"seed", "train"} or not isinstance(start["train"], dict)):
        problems.append("`start` has to hold `seed` and `train`, or be the folder of a pipeline")
    if not problems:
        rows = grid["rows"]
        problems += [f"`{place}` may not set `{name}`" for place, name in _out_of_place(grid)]
        problems += ["`seeds` is empty"] * (not grid["seeds"])
        problems += [f"`seeds` has to hold integers, not {seed!r}" for seed in grid["seeds"] if type(seed) is not int]
        problems += [f"`rows` {name!r} is no name of a folder" for name in rows if not re.fullmatch(r"[\w.-]+", name)]
        for name, row in rows.items():
            problems += [f"`rows` {name!r} has to say what it is in `says`"] * ("says" not in row)
            problems += [
                f"`rows` {name!r} has unknown {k!r}" for k in row if k not in ("says", "transformer", "train")
            ]
        named = {"baseline": [grid["baseline"]], "claim": grid["claim"]}
        problems += [f"`{k}` {name!r} is no row" for k, names in named.items() for name in names if name not in rows]
        if len(grid["claim"]) != 2:
            problems.append(f"`claim` has to be two rows, but is {grid['claim']}")
        if missing := set(MEAN_LEVELS) - set(grid["evaluate"].get("levels", [])):
            problems.append(f"`evaluate` has to have the levels {', '.join(sorted(missing))}")
        if grid["train"].get("training_type", "full") != "full":
            problems.append("`train` has to have training_type full: the transformers are new")
    if problems:
        raise ValueError(f"--config {path}: {'; '.join(problems)}")
    grid["train"] = DEFAULTS | grid["train"]
    grid["evaluate"] = {"num_samples": 64} | grid["evaluate"]
    return grid


def _out_of_place(grid: dict) -> list[tuple[str, str]]:
    forbidden = [("train", grid["train"], OWN_TRAIN), ("evaluate", grid["evaluate"], OWN_EVALUATE)]
    if isinstance(grid.get("start"), dict):
        forbidden.append(("start.train", grid["start"]["train"], OWN_TRAIN))
    for name, row in grid["rows"].items():
        forbidden.append((f"rows.{name}.train", row.get("train", {}), (*OWN_TRAIN, *SHARED_TRAIN)))
        forbidden.append((f"rows.{name}.transformer", row.get("transformer", {}), SHARED_TRANSFORMER))
    return [(place, name) for place, values, names in forbidden for name in values if name in names]


def _hash_files(folder: Path, parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def plan_runs(grid: dict, output: Path, seeds: Sequence[int], others: Sequence[int] = ()) -> list[Run]:
    """All runs of a grid, seed by seed.

    Args:
        grid (`dict`): Of [`read_grid`].
        output (`Path`): Folder of the grid's runs.
        seeds (`Sequence[int]`): To be run; `others`, and those of other seeds that are there, come after.

    Raises:
        ValueError: There is no pipeline where the config says; a setting of a transformer is unknown; no width gives a
            row its number of parameters; two rows are the same; or what is new would not learn.
    """
    base = Path(grid["base"])
    if not (base / "model_index.json").is_file():
        raise ValueError(f"`base` has to be the folder of a pipeline, but is {base}")
    common = dict(RVEDiTTransformer3DModel.load_config(base, subfolder="transformer"))
    common = {name: value for name, value in common.items() if name[0] != "_"}
    hashes = {"base (hash)": _hash_files(base, PARTS), "start (hash)": None}
    if isinstance(grid.get("start"), str):
        if not (Path(grid["start"]) / "model_index.json").is_file():
            raise ValueError(f"`start` has to be the folder of a pipeline, but is {grid['start']}")
        hashes["start (hash)"] = _hash_files(Path(grid["start"]), ("transformer",))
    first = common | grid["transformer"]
    width, old = first["num_attention_heads"] * first["attention_head_dim"], common["text_dim"]
    old_width = RVEDiTTokenDistiller.load_config(base, subfolder="distiller")["dim"]
    if width != old_width and grid["train"]["train_distiller"] == "none":
        raise ValueError(
            f"`train` has to have train_distiller connectors or all: for width {width} the connectors are new ones, as"
            f" that of `base` is {old_width}"
        )
    if first["text_dim"] != old and not grid["train"].get("train_text_encoder"):
        raise ValueError(
            f"`train` has to have train_text_encoder: for text_dim {first['text_dim']} the text encoder is a new one,"
            f" as that of `base` is {old}"
        )
    configs, target = {}, None
    for name, row in grid["rows"].items():
        overrides = grid["transformer"] | row.get("transformer", {})
        if unknown := set(overrides) - set(common):
            raise ValueError(f"`transformer` of {name} has unknown settings: {', '.join(sorted(unknown))}")
        target = target or num_parameters(common | overrides)
        try:
            configs[name] = match_parameters(common | overrides, target)
        except ValueError as error:
            raise ValueError(f"`rows` {name!r}: {error}") from error
    variants: dict[str, str] = {}
    for name, row in grid["rows"].items():
        variant = json.dumps([configs[name], grid["train"] | row.get("train", {})], sort_keys=True)
        if (same := variants.setdefault(variant, name)) != name:
            raise ValueError(
                f"`rows` {name!r} is the same as {same!r}: what they do not set comes of `transformer`, `train` and"
                f" the transformer of {base}"
            )

    found = {int(path.name[5:]) for path in output.glob("seed-*") if path.name[5:].isdigit()} | set(others)
    return [
        Run(
            name,
            seed,
            output / f"seed-{seed}" / name,
            {
                "transformer": configs[name],
                "train": grid["train"] | row.get("train", {}),
                "evaluate": grid["evaluate"],
                "start": grid.get("start"),
                "version": version("rvedit_diffusers"),
                "drawn": DRAWN,
                **hashes,
            },
        )
        for seed in [*seeds, *sorted(found - set(seeds))]
        for name, row in grid["rows"].items()
    ]


def plan_start(grid: dict, output: Path, first: Run) -> Run | None:
    """The training whose weights all rows begin with, if the grid describes one.

    Args:
        grid (`dict`): Of [`read_grid`].
        output (`Path`): Folder of the grid's runs.
        first ([`Run`]): Of the grid's first row, whose transformer is trained.
    """
    start = grid.get("start")
    if not isinstance(start, dict):
        return None
    settings = first.settings | {"train": grid["train"] | start["train"]}
    return Run("start", start["seed"], output / "start", settings)
