"""Pairs of real clips: read from a table, checked, brought to a common clock and size, and loaded frame by frame."""

import csv
import hashlib
import json
import math
import os
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..video import read_frames
from .record import ScanRecord


# Columns of the source clip, the edited clip and the instruction. Ditto-1M (`training_metadata/*.json`) and ReCo-Data
# (`*/*_data_configs.json`) give paths relative to other folders than the table's own: `Ditto-1M/videos`, `ReCo-Data`.
PRESETS = {
    "default": ("source", "edited", "instruction"),
    "kiwi-edit": ("src_video", "tgt_video", "prompt"),
    "openve": ("original_video", "edited_video", "prompt"),
    "ditto": ("source_path", "edited_path", "instruction"),
    "reco": ("src_video", "tar_video", "instruction_final_refine"),
    "captions": ("video", "video", "caption"),  # one clip a row
}

ASPECT_TOLERANCE = 0.05  # aspect ratios that differ by less are taken as the same
TIME_TOLERANCE = Fraction(1, 4)  # of a frame: containers round time stamps, some to milliseconds


@dataclass(frozen=True)
class Bucket:
    """
    A size that clips are brought to.

    Args:
        num_frames (`int`): frames of a clip; 1 for images.
        height, width (`int`): of a frame, in pixels.
    """

    num_frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """
        Read `"81x480x832"`, which is frames x height x width.

        Raises:
            ValueError: `text` is not three numbers of at least 1, joined by `x`.
        """
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text.strip())
        if match is None:
            raise ValueError(f"`--buckets`: {text!r} is not FRAMESxHEIGHTxWIDTH, such as 81x480x832")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    def num_tokens(self, temporal_factor: int, spatial_factor: int) -> int:
        """Tokens of a clip; see [`~Bucket.check`] for the arguments."""
        frames = (self.num_frames - 1) // temporal_factor + 1
        return frames * (self.height // spatial_factor) * (self.width // spatial_factor)

    def check(self, temporal_factor: int, spatial_factor: int) -> None:
        """
        Check that a model takes clips of this size whole.

        Args:
            temporal_factor (`int`): frames of a clip in one frame of latents, after the first.
            spatial_factor (`int`): pixels along one side of a token: the VAE's factor times the patch size.

        Raises:
            ValueError: the frames are not `temporal_factor * k + 1`, or a side is no multiple of `spatial_factor`.
        """
        rest = (self.num_frames - 1) % temporal_factor
        if rest:
            below = self.num_frames - rest
            raise ValueError(
                f"`--buckets`: {self} has {self.num_frames} frames, but the VAE takes {temporal_factor}k + 1, such as"
                f" {below} or {below + temporal_factor}"
            )
        for name, size in (("height", self.height), ("width", self.width)):
            if size % spatial_factor:
                below = size // spatial_factor * spatial_factor
                nearest = f"{below} or {below + spatial_factor}" if below else f"{spatial_factor}"
                raise ValueError(
                    f"`--buckets`: {self} has the {name} {size}, but the model takes multiples of {spatial_factor},"
                    f" such as {nearest}"
                )


def parse_buckets(text: str) -> list[Bucket]:
    """
    Read `"81x480x832,49x480x832,1x1024x1024"`; a bucket that comes twice counts once.

    Raises:
        ValueError: an entry is not frames x height x width.
    """
    return list(dict.fromkeys(Bucket.parse(part) for part in text.split(",")))


@dataclass(frozen=True)
class Pair:
    """
    One row of a table of edits.

    Args:
        source, edited (`Path`): the two files, clips or images; they may not exist.
        instruction (`str`): what turns the first into the second; may be empty.
        row (`int`): number of the row, the first is 0.
    """

    source: Path
    edited: Path
    instruction: str
    row: int


@dataclass(frozen=True)
class Plan:
    """
    How a pair is loaded.

    Args:
        pair ([`Pair`]): its files and instruction.
        bucket ([`Bucket`]): the size that both clips are brought to.
        fps (`Fraction`): frames per second of the result; without meaning for an image.
        source_indices, edited_indices (`tuple[int, ...]`): for each of the bucket's frames, the number of the frame of
            the file; not descending.
        note (`str`): `"kept"`, or what was cut off the end.
    """

    pair: Pair
    bucket: Bucket
    fps: Fraction
    source_indices: tuple[int, ...]
    edited_indices: tuple[int, ...]
    note: str


@dataclass(frozen=True)
class Dropped:
    """
    A pair that cannot be trained on.

    Args:
        pair ([`Pair`]): its files and instruction.
        kind (`str`): the reason in two or three words, of which there are few.
        reason (`str`): the reason for this pair, with its numbers.
    """

    pair: Pair
    kind: str
    reason: str


def read_pairs(
    train_data: str | os.PathLike,
    source_column: str = "source",
    edited_column: str = "edited",
    instruction_column: str = "instruction",
    data_root: str | os.PathLike | None = None,
    option: str = "train_data",
) -> list[Pair]:
    """
    Read a table of edits. The files that it names are not looked at; see [`plan_pairs`].

    Args:
        train_data (`str` or `os.PathLike`): a `.csv`, `.jsonl` or `.json` file (a list of objects); a folder with
            `metadata.csv` or `metadata.jsonl`; a folder written by `datasets.save_to_disk`; or the id of a dataset on
            the Hugging Face Hub. Of several splits, `train` is read, or `validation`, where there is one, if
            `option` is `validation_data`.
        source_column, edited_column, instruction_column (`str`): names of the columns, see `PRESETS`. The first two
            hold paths. In a Hugging Face dataset they may also be videos or images; those whose bytes are in the
            dataset itself are written to files below the cache of `datasets`, once.
        data_root (`str` or `os.PathLike`, *optional*): folder that relative paths start from. By default that of the
            table, or the current one for a dataset on the Hub.
        option (`str`, defaults to `"train_data"`): the option that errors name.

    Returns:
        `list[Pair]`: one for each row, in order.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: `train_data` is a Hugging Face dataset, and `datasets` is not installed.
        ValueError: `train_data` is none of the above, cannot be read or has no rows, or lacks a column.
    """
    columns = {
        "source_column": source_column,
        "edited_column": edited_column,
        "instruction_column": instruction_column,
    }
    path = Path(train_data)
    tables = [path] if path.is_file() else [path / name for name in ("metadata.csv", "metadata.jsonl")]
    table = next((table for table in tables if table.is_file()), None)
    if table is not None:
        rows, root = _read_table(table, option), table.parent
        names = list(dict.fromkeys(name for row in rows for name in row))
    else:
        dataset, root = _load_dataset(str(train_data), option), path if path.is_dir() else Path()
        rows, names = dataset, dataset.column_names
    if len(rows) == 0:
        raise ValueError(f"`--{option}`: {train_data} has no rows")
    for flag, column in columns.items():
        if column not in names:
            raise ValueError(f"`--{flag}`: {train_data} has no column {column!r}, it has {', '.join(names)}")
    if table is None:
        rows = _undecoded(dataset.select_columns(list(dict.fromkeys(columns.values()))))

    root = root if data_root is None else Path(data_root)
    return [
        Pair(
            root / _as_path(row.get(source_column)),
            root / _as_path(row.get(edited_column)),
            str(row.get(instruction_column) or "").strip(),
            number,
        )
        for number, row in enumerate(rows)
    ]


def _read_table(path: Path, option: str) -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file, restkey=""))
                long = [number for number, row in enumerate(rows) if "" in row]
                if long:
                    raise ValueError(f"row {long[0]} has more fields than the header; a comma in a text needs quotes")
            elif path.suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            elif path.suffix == ".json":
                rows = json.load(file)
            else:
                raise ValueError("it has to be a .csv, .jsonl or .json file")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"`--{option}`: {path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"`--{option}`: {path} has to be a list of objects, one for each pair")
    return rows


def _load_dataset(name: str, option: str):
    path = Path(name)
    if path.is_dir() and not any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
        raise ValueError(
            f"`--{option}`: the folder {path} has neither metadata.csv nor metadata.jsonl, nor did"
            " `datasets.save_to_disk` write it"
        )
    if not path.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"`--{option}`: there is no file or folder {name}")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"`--{option}`: to read {name}, a Hugging Face dataset, `datasets` has to be installed"
        ) from error
    if path.is_dir():
        dataset = datasets.load_from_disk(name)
    else:
        try:
            dataset = datasets.load_dataset(name)
        except Exception as error:  # the Hub, the network, and whatever a dataset may hold
            raise ValueError(
                f"`--{option}`: there is no file or folder {name}, and from the Hub it cannot be read: {error}"
            ) from error
    if isinstance(dataset, datasets.DatasetDict):
        split = "validation" if option == "validation_data" and "validation" in dataset else "train"
        if split not in dataset:
            raise ValueError(f"`--{option}`: {name} has no split 'train', it has {', '.join(dataset)}")
        dataset = dataset[split]
    return dataset


def _undecoded(dataset):
    for name, feature in dataset.features.items():
        if hasattr(feature, "decode"):  # a video or an image, which would be decoded whole
            dataset = dataset.cast_column(name, replace(feature, decode=False))
    return dataset


def _as_path(value: str | dict | None) -> str:
    if not isinstance(value, dict):
        return str(value or "")
    if value["bytes"] is None:
        return value["path"] or ""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rvedit_diffusers"
    path = folder / (hashlib.sha256(value["bytes"]).hexdigest() + Path(value["path"] or "").suffix)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(value["bytes"])
        os.replace(temporary, path)
    return str(path.resolve())


def plan_pairs(
    pairs: Sequence[Pair],
    buckets: Sequence[Bucket],
    fps: float | Fraction | None = None,
    num_workers: int = 8,
    record: str | os.PathLike | None = None,
    find_control_token: Callable[[str], str | None] = lambda instruction: None,
) -> tuple[list[Plan], list[Dropped]]:
    """
    Decode all files to their end, and decide for each pair how it is loaded, or why it cannot be.

    The two clips of a pair are brought to a common clock, which starts at the first frame of each: frame `k` is what
    each clip shows at `k / rate` seconds, so clips of different rates stay together. A time stamp up to a quarter of a
    frame late counts as on time. The rate is `fps`, or the lower one of the two clips' rates; the common duration is
    the shorter one's. A still image has one frame.

    Of the buckets that are not longer than the pair, the longest is taken; of these, the one nearest in aspect ratio,
    in steps of 5 %; of these, the largest that is not above the area of the smaller clip, or else the smallest. Images
    go to buckets of one frame alone, and clips to longer ones, unless there are none. The first frames are kept.

    Args:
        pairs (`Sequence[Pair]`): what [`read_pairs`] returned.
        buckets (`Sequence[Bucket]`): sizes to bring the pairs to; at least one.
        fps (`float` or `Fraction`, *optional*): frames per second of all clips, above 0. Higher than a clip's own, it
            repeats frames.
        num_workers (`int`, defaults to 8): files decoded at a time.
        record (`str` or `os.PathLike`, *optional*): file of a [`ScanRecord`]. Files that it knows are not decoded, and
            what the others hold is written to it, each at once, so that a scan that was stopped goes on from there.
        find_control_token (`Callable`, *optional*): as [`RVEDiTProcessor.find_control_token`], of the processor that
            is to read the instructions.

    Returns:
        `tuple[list[Plan], list[Dropped]]`: each in the order of `pairs`. A pair is dropped if its instruction is
        empty or contains a control token; a file is missing, unreadable or damaged; the aspect ratios of its clips
        differ by more than 5 %; one is an image and the other is not; or it is shorter than every bucket.

    Raises:
        ValueError: `buckets` is empty, or `fps` is out of range.
        OSError, RuntimeError: `record` cannot be read or written.
    """
    if not buckets:
        raise ValueError("`buckets` must hold at least one")
    if fps is not None:
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"`fps` must be above 0, got {fps}")
        fps = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)
    plan_pair = partial(
        _plan_pair, buckets=buckets, fps=fps, record=ScanRecord(record), find_control_token=find_control_token
    )
    with ThreadPoolExecutor(num_workers) as executor:
        scanned = list(tqdm(executor.map(plan_pair, pairs), desc="scanning", unit="pair", total=len(pairs)))
    return [item for item in scanned if isinstance(item, Plan)], [
        item for item in scanned if isinstance(item, Dropped)
    ]


def _plan_pair(
    pair: Pair,
    buckets: Sequence[Bucket],
    fps: Fraction | None,
    record: ScanRecord,
    find_control_token: Callable[[str], str | None],
) -> Plan | Dropped:
    # 1. The instruction is text, and both files are there and whole
    if not pair.instruction:
        return Dropped(pair, "empty instruction", "the instruction is empty")
    if token := find_control_token(pair.instruction):
        return Dropped(pair, "control token", f"the instruction contains {token!r}, a control token of the MLLM")
    infos = []
    for name, path in (("source", pair.source), ("edited", pair.edited)):
        try:
            info = record.probe(path)
        except FileNotFoundError:
            return Dropped(pair, "missing file", f"{name}: there is no file {path}")
        except (OSError, ValueError) as error:
            return Dropped(pair, "unreadable file", f"{name}: {str(error).removeprefix('`path`: ')}")
        if info.damage is not None:
            return Dropped(pair, "damaged file", f"{name}: {path} gives {info.num_frames} frames, then {info.damage}")
        infos.append(info)
    source, edited = infos

    # 2. They show the same
    ratio = (source.width * edited.height) / (source.height * edited.width)
    difference = max(ratio, 1 / ratio) - 1
    sizes = [f"{name} {info.width}x{info.height}" for name, info in (("source", source), ("edited", edited))]
    if difference > ASPECT_TOLERANCE:
        return Dropped(pair, "different aspect ratios", f"{sizes[0]}, {sizes[1]}: {difference:.0%} apart")
    is_image = source.num_frames == 1
    if is_image != (edited.num_frames == 1):
        numbers = f"source has {source.num_frames} frames, edited has {edited.num_frames}"
        return Dropped(pair, "an image and a clip", numbers)

    # 3. The common clock, and what of it fits into a bucket
    rate = fps or min(source.fps, edited.fps)
    durations = [info.times[-1] - info.times[0] + 1 / info.fps for info in infos]
    num_common = 1 if is_image else math.floor(min(durations) * rate + TIME_TOLERANCE)
    of_kind = [bucket for bucket in buckets if (bucket.num_frames == 1) == is_image]
    allowed = of_kind if is_image else of_kind or buckets
    fitting = [bucket for bucket in allowed if bucket.num_frames <= num_common]
    if not fitting and is_image:
        return Dropped(pair, "too short", "an image, and no bucket has one frame")
    if not fitting:
        shortest = min(bucket.num_frames for bucket in allowed)
        frames = f"{num_common} {'frame' if num_common == 1 else 'frames'} at {float(rate):.5g} fps"
        return Dropped(pair, "too short", f"{frames}, the shortest bucket has {shortest}")

    # 4. The best bucket
    height, width = min(((info.height, info.width) for info in infos), key=math.prod)

    def preference(bucket: Bucket) -> tuple:
        stretch = abs(math.log(bucket.width / bucket.height * height / width))
        excess = bucket.height * bucket.width - height * width
        return -bucket.num_frames, stretch // ASPECT_TOLERANCE, excess > 0, abs(excess), stretch

    bucket = min(fitting, key=preference)
    cut = 0 if is_image else max(durations) - bucket.num_frames / rate
    note = "kept" if cut * rate < 1 else f"trimmed by {float(cut):.2f} s"
    indices = [_shown(info.times, rate, bucket.num_frames) for info in infos]
    return Plan(pair, bucket, rate, indices[0], indices[1], note)


def _shown(times: Sequence[Fraction], rate: Fraction, num_frames: int) -> tuple[int, ...]:
    moments = [times[0] + (number + TIME_TOLERANCE) / rate for number in range(num_frames)]
    return tuple(bisect_right(times, moment) - 1 for moment in moments)


def load_pair(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """
    Load a pair as planned. The frames cover the bucket, scaled by an antialiased bicubic filter, and what protrudes is
    cut off evenly on both sides, so that two clips of different sizes lie on each other.

    Args:
        plan ([`Plan`]): one of those that [`plan_pairs`] returned.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: source and edited clip, both `(num_frames, height, width, 3)` uint8 RGB of the
        size of the bucket. The same plan and files give the same bytes. Of a captioned clip, a pair of one file, both
        are one array.

    Raises:
        FileNotFoundError: a file has gone.
        ValueError: a file cannot be read as far as it could before.
    """
    source = _load_clip(plan.pair.source, plan.source_indices, plan.bucket)
    if (plan.pair.source, plan.source_indices) == (plan.pair.edited, plan.edited_indices):
        return source, source
    return source, _load_clip(plan.pair.edited, plan.edited_indices, plan.bucket)


def _load_clip(path: Path, indices: tuple[int, ...], bucket: Bucket) -> np.ndarray:
    clip = np.empty((bucket.num_frames, bucket.height, bucket.width, 3), np.uint8)
    for frame, place in zip(read_frames(path, indices), clip):
        height, width, _ = frame.shape
        kept_width = min(width, height * bucket.width / bucket.height)
        kept_height = min(height, width * bucket.height / bucket.width)
        box = (
            (width - kept_width) / 2,
            (height - kept_height) / 2,
            (width + kept_width) / 2,
            (height + kept_height) / 2,
        )
        place[:] = Image.fromarray(frame).resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box)
    return clip


def describe_plans(plans: Sequence[Plan], dropped: Sequence[Dropped]) -> str:
    """
    A table of what [`plan_pairs`] decided: for each bucket how many pairs were kept whole and how many trimmed, and
    for each reason how many were dropped, with the first three of them.
    """
    counts = Counter((plan.bucket, plan.note == "kept") for plan in plans)
    buckets = sorted(
        {plan.bucket for plan in plans}, key=lambda bucket: (-bucket.num_frames, bucket.height, bucket.width)
    )
    rows = [("bucket", "kept", "trimmed")]
    rows += [(str(bucket), str(counts[bucket, True]), str(counts[bucket, False])) for bucket in buckets]
    rows += [("all", str(sum(plan.note == "kept" for plan in plans)), str(sum(plan.note != "kept" for plan in plans)))]
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {kept:>7}  {trimmed:>7}" for name, kept, trimmed in rows]

    kinds = defaultdict(list)
    for item in dropped:
        kinds[item.kind].append(item)
    lines.append(f"dropped: {len(dropped)} of {len(plans) + len(dropped)} pairs")
    for kind, items in sorted(kinds.items(), key=lambda entry: -len(entry[1])):
        lines.append(f"  {kind}: {len(items)}")
        lines += [f"    row {item.pair.row}: {item.reason}" for item in items[:3]]
        lines += [f"    and {len(items) - 3} more"] if len(items) > 3 else []
    return "\n".join(lines)


_IN_MEMORY = ScanRecord()


def content_key(plan: Plan, record: ScanRecord | None = None) -> str:
    """
    A name for what [`load_pair`] returns and for its instruction, which changes when a byte of either file does.

    Args:
        plan ([`Plan`]): one of those that [`plan_pairs`] returned.
        record ([`ScanRecord`], *optional*): files that it knows are not read. By default one that all calls of this
            process share, in memory alone.

    Returns:
        `str`: a SHA-256 in hexadecimal.

    Raises:
        FileNotFoundError: a file has gone.
        RuntimeError: the record cannot be written.
    """
    record = record or _IN_MEMORY
    contents = [
        1,  # to be raised when load_pair makes something else of the same plan
        record.sha256(plan.pair.source),
        record.sha256(plan.pair.edited),
        plan.source_indices,
        plan.edited_indices,
        str(plan.bucket),
        str(plan.fps),
        plan.pair.instruction,
    ]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
