"""Public benchmarks: their files are read, and results are laid out as their own scorers look for them.

| benchmark | manifest | result |
|---|---|---|
| OpenVE-Bench | `benchmark_videos.csv` | `STEM_edited.mp4`, and a CSV with their paths |
| EditVerseBench | `test.json` | `KEY/generate.mp4`, beside the source as `KEY/video1.mp4` |
| IVEBench | the one `.json` of the folder | `STEM/00000.png`, `STEM/00001.png`, ... |
| FiVE-Bench | `edit_prompt/edit1_FiVE.json` to `edit6_FiVE.json` | `VIDEO/TYPE_PROMPT.mp4`, the prompt cut short |
"""

import csv
import io
import json
import logging
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from ..synthetic.metrics import edit_map, flicker, optical_flow, psnr, ssim, warping_error
from ..video import read_video, write_video
from .record import write_json


logger = logging.getLogger(__name__)

FOLDER_FPS = Fraction(24)  # of frames in a folder, which do not tell
CRF = 10  # of H.264: what the encoder takes away is scored, too
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class PublicEdit:
    """One row of a benchmark.

    Attributes:
        where (`str`): File and row, for messages.
        category (`str`): Of the edit, as the benchmark names it.
        source (`Path`): A clip, or a folder of frames.
        instruction (`str`): What to change.
        result (`str`): Path of the result, an `.mp4` or a folder of frames, from the folder of all results.
        masks (`Path`, *optional*): Folder of masks of what may change, one for each frame and named like it.
        entry (`dict`): The row as it was read.
        source_copy (`str`, *optional*): Path where the scorer looks for the source, an `.mp4`, from the folder of all
            results.
    """

    where: str
    category: str
    source: Path
    instruction: str
    result: str
    masks: Path | None
    entry: dict
    source_copy: str | None = None


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is no text: {error}") from error


def _load_json(path: Path, kind: type):
    text = _read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} has to hold a {kind.__name__}, but holds a {type(value).__name__}")
    return value


def _field(entry, name: str, where: str) -> str:
    value = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} has no `{name}`")
    return value


def _read_openve(data: Path) -> list[PublicEdit]:
    path, edits = data / "benchmark_videos.csv", []
    for number, entry in enumerate(csv.DictReader(io.StringIO(_read_text(path))), 1):
        where = f"{path} row {number}"
        category, prompt, video = (_field(entry, n, where) for n in ("edited_type", "prompt", "original_video"))
        result = f"{Path(video).stem}_edited.mp4"
        # paths begin in the folder or beside it, as its copies differ in
        places = (data / video, data.absolute().parent / video)
        source = next((place for place in places if place.is_file()), places[0])
        edits.append(PublicEdit(where, category, source, prompt, result, None, entry))
    return edits


def _read_editverse(data: Path) -> list[PublicEdit]:
    path, edits, others = data / "test.json", [], 0
    for key, entry in _load_json(path, dict).items():
        where = f"{path} row {key!r}"
        text, category = _field(entry, "<text>", where), _field(entry, "type", where)
        if set(re.findall(r"<\w+>", text)) - {"<video1>"}:
            others += 1
            continue
        instruction = re.sub(r"^\s*<video1>\s*", "", text).replace("<video1>", "the video")
        source = data / _field(entry, "<video1>", where)
        result, copy = f"{key}/generate.mp4", f"{key}/video1.mp4"
        edits.append(PublicEdit(where, category, source, instruction, result, None, entry, copy))
    if others:
        logger.warning("%s: %d edits are left out, they need more than one clip and a text", path, others)
    return edits


def _read_ivebench(data: Path) -> list[PublicEdit]:
    manifests = [data] if data.suffix == ".json" else sorted(data.glob("*.json"))
    if len(manifests) != 1:
        raise ValueError(f"{data} has to hold one .json, but holds {len(manifests)}: name the file itself")
    (path,), edits = manifests, []
    places = defaultdict(list)
    for folder, folders, files in os.walk(path.parent):
        for name in (*folders, *files):
            places[name].append(Path(folder, name))
    for number, entry in enumerate(_load_json(path, list), 1):
        where = f"{path} row {number}"
        video, category, prompt = (_field(entry, n, where) for n in ("src_video_name", "category", "edit_prompt"))
        stem = Path(video).stem
        found = places.get(video) or places.get(stem) or [path.parent / video]
        if len(found) > 1:
            raise ValueError(f"{where}: {video} may be {found[0]} or {found[1]}: only one may lie below {path.parent}")
        edits.append(PublicEdit(where, category, found[0], prompt, stem, None, entry))
    return edits


def _read_five(data: Path) -> list[PublicEdit]:
    edits = []
    for path in [data / "edit_prompt" / f"edit{number}_FiVE.json" for number in range(1, 7)]:
        for number, entry in enumerate(_load_json(path, list), 1):
            where = f"{path} row {number}"
            video, kind, prompt, folder = (
                _field(entry, name, where) for name in ("video_name", "editing_type_id", "target_prompt", "save_dir")
            )
            # instructions are not in all versions of the files; without one, the prompt of text-to-video models
            instruction = entry.get("instruction") or prompt.replace("[", "").replace("]", "")
            result = f"{video}/{kind}_{prompt[: len(folder) - 2]}.mp4"  # as their scorer builds it
            masks = data / "bmasks" / video
            source, masks = data / "images" / video, masks if masks.is_dir() else None
            edits.append(PublicEdit(where, kind, source, instruction, result, masks, entry))
    return edits


READERS = {"openve": _read_openve, "editverse": _read_editverse, "ivebench": _read_ivebench, "five": _read_five}


def read_benchmark(name: str, data: str | os.PathLike, limit: int | None = None) -> list[PublicEdit]:
    """The edits that a public benchmark asks for.

    Args:
        name (`str`): `"openve"`, `"editverse"`, `"ivebench"` or `"five"`.
        data (`str` or `os.PathLike`): Its folder, as it is downloaded; of IVEBench also the `.json` of one subset, in
            whose folder, or anywhere below, the clips are, or their frames in folders.
        limit (`int`, *optional*): The first so many.

    Returns:
        `list[PublicEdit]`: In the order of the manifest. Of EditVerseBench, edits that take further clips or images
        are left out with a logged warning, and so is, of all, an edit whose result would replace that of another.

    Raises:
        ValueError: `name` is none of these, or a manifest is missing, cannot be read, lacks a field or leads out of
            the folder of results; the message names the file, row and field.
    """
    if name not in READERS:
        raise ValueError(f"`name` has to be one of {', '.join(READERS)}, but is {name!r}")
    edits: dict[str, PublicEdit] = {}
    for edit in READERS[name](Path(data)):
        if Path(edit.result).is_absolute() or ".." in Path(edit.result).parts:
            raise ValueError(f"{edit.where} names a result outside of the folder of results: {edit.result}")
        if edit.result in edits:
            logger.warning("%s is left out: its result has the name of %s's", edit.where, edits[edit.result].where)
            continue
        edits[edit.result] = edit
    if not edits:
        raise ValueError(f"{data} has no edit")
    return list(edits.values())[:limit]


def _frame_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def read_clip(path: Path, max_frames: int | None = None) -> tuple[np.ndarray, Fraction]:
    """Read a clip, or the frames in a folder in the order of their names.

    Args:
        path (`Path`): The file or folder.
        max_frames (`int`, *optional*): At most so many, from the first.

    Returns:
        `tuple[np.ndarray, Fraction]`: The frames `(frames, height, width, 3)`, uint8, and their rate; of a folder, 24.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: It cannot be read, or has fewer than two frames.
    """
    if path.is_dir():
        images = [Image.open(each).convert("RGB") for each in _frame_paths(path)[:max_frames]]
        if len({image.size for image in images}) > 1:
            raise ValueError(f"{path} has frames of several sizes")
        frames, fps = np.array([np.asarray(image) for image in images], np.uint8), FOLDER_FPS
    else:
        clip = read_video(path, max_frames=max_frames)
        frames, fps = clip.frames, clip.fps
    if len(frames) < 2:
        raise ValueError(f"{path} has to have at least two frames, but has {len(frames)}")
    return frames, fps


def read_masks(edit: PublicEdit, num_frames: int) -> np.ndarray:
    """What an edit may change.

    Args:
        edit ([`PublicEdit`]): With `masks`, and a folder of frames as `source`.
        num_frames (`int`): The first so many.

    Returns:
        `np.ndarray` of shape `(frames, height, width)`: bool.
    """
    names = [path.name for path in _frame_paths(edit.source)[:num_frames]]
    return np.stack([np.asarray(Image.open(edit.masks / name).convert("L")) > 0 for name in names])


def check_sources(edits: Iterable[PublicEdit]) -> None:
    """Decode the beginning of each clip, and of its masks, of which there has to be one for each frame.

    Raises:
        ValueError: One cannot be read; the message names the manifest and its row, and the file.
    """
    for edit in edits:
        try:
            frames, _ = read_clip(edit.source, 2)
            if edit.masks is None:
                continue
            for path in _frame_paths(edit.source):
                if not (edit.masks / path.name).is_file():
                    raise ValueError(f"there is no mask {edit.masks / path.name}")
            if read_masks(edit, 2).shape != frames.shape[:3]:
                raise ValueError(f"masks in {edit.masks} have another size than the frames in {edit.source}")
        except (OSError, ValueError) as error:
            raise ValueError(f"{edit.where}: {error}") from error


def write_result(root: Path, edit: PublicEdit, source: np.ndarray, frames: np.ndarray, fps: Fraction) -> None:
    """Write the result of an edit where the benchmark's scorer looks for it, as a whole or not at all.

    Args:
        root (`Path`): Folder of all results.
        edit ([`PublicEdit`]): What was edited.
        source, frames (`np.ndarray` of shape `(frames, height, width, 3)`): What was edited, and the result, uint8.
        fps (`Fraction`): Their rate, which a folder of frames does not keep.
    """
    path = root / edit.result
    path.parent.mkdir(parents=True, exist_ok=True)
    if edit.source_copy is not None:
        write_video(root / edit.source_copy, source, fps, crf=CRF)
    if path.suffix == ".mp4":
        write_video(path, frames, fps, crf=CRF)
        return
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"{number:05d}.png")
        folder.rename(path)


def score_result(root: Path, edit: PublicEdit) -> dict[str, float]:
    """What can be measured of a result without any model.

    Args:
        root (`Path`): Folder of all results.
        edit ([`PublicEdit`]): Whose result is there.

    Returns:
        `dict[str, float]`: A dictionary of

        - `source_psnr`: PSNR of the result against the source, in dB: high where little was changed.
        - `edit_area`: the share of the pixels that were edited, in [0, 1]; see [`edit_map`].
        - `flicker`: how much the result changes from frame to frame other than the source does; see [`flicker`].
        - `warping_error`, `source_warping_error`: see [`warping_error`], of the result and of the source along the
          motion of the source. Both `nan` without OpenCV.
        - `outside_psnr`, `outside_ssim`: against the source where nothing may change; with masks alone, and `nan`
          where everything may. In dB; in [-1, 1]. FiVE-Bench's own are higher: they blank what may change in both
          clips, and average over that, too.

    Raises:
        ValueError: The result cannot be read, has more frames than the source, or another size.
    """
    path = root / edit.result
    frames, _ = read_clip(path)
    source, _ = read_clip(edit.source, len(frames))
    if frames.shape != source.shape:
        raise ValueError(f"{path} is {frames.shape}, but its source, cut to its length, {source.shape}")
    scores = {
        "source_psnr": psnr(frames, source),
        "edit_area": float(edit_map(frames, source).mean()),
        "flicker": flicker(frames, source),
    }
    try:
        motion = optical_flow(source)
    except ModuleNotFoundError:
        motion = None
    for name, clip in (("warping_error", frames), ("source_warping_error", source)):
        scores[name] = float("nan") if motion is None else warping_error(clip, motion)
    if edit.masks is not None:
        outside = ~read_masks(edit, len(frames))
        some = outside.any()
        scores["outside_psnr"] = psnr(frames, source, outside) if some else float("nan")
        scores["outside_ssim"] = ssim(frames, source, outside) if some else float("nan")
    return scores


def write_manifest(name: str, output: Path, edits: Sequence[PublicEdit]) -> Path | None:
    """Write the manifest that the benchmark's scorer is to be given: of these edits alone, with the results' paths.

    Args:
        name (`str`): See [`read_benchmark`].
        output (`Path`): The folder for it, with the results in its folder `results`.
        edits (`Sequence[PublicEdit]`): Whose results are there.

    Returns:
        `Path`, *optional*: The file. `None` for FiVE-Bench, whose scorer passes over what is missing.
    """
    if name == "openve":
        path, partial = output / "new_result.csv", output / ".new_result.csv.partial"
        with open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*edits[0].entry, "edited_result_path"])
            results = output.resolve() / "results"
            writer.writerows([*edit.entry.values(), results / edit.result] for edit in edits)
        partial.replace(path)
        return path
    if name == "editverse":
        path = output / "test.json"
        write_json(path, {edit.result.split("/")[0]: edit.entry for edit in edits})
        return path
    if name == "ivebench":
        path = output / "prompts.json"
        write_json(path, [edit.entry for edit in edits])
        return path
    return None
