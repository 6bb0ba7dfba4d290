"""Maps over the frames of a clip, as one picture over time and as a clip."""

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


CELL, PANEL = 128, 224  # longer side of a frame in pixels, in the picture and in the clip
GAP, LEFT, RIGHT = 6, 176, 132
MAX_WIDTH = 16384  # of a clip in H.264
NOTE_HEIGHT = 15  # of a line beside a bar of colours
TITLE, TEXT, SMALL = (ImageFont.load_default(size=size) for size in (16, 14, 12))
# black over violet and red to yellow, in equal steps
RAMP = np.float32([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])
OUTLINE = (0, 235, 255)


@dataclass
class HeatMap:
    """
    A map over a clip.

    Args:
        values (`np.ndarray` of shape `(num_frames, rows, columns)`): 0 or more.
        unit (`str`): Of the values.
        notes (`Sequence[str]`, *optional*): Lines to stand beside it.
    """

    values: np.ndarray
    unit: str
    notes: Sequence[str] = ()


@dataclass
class Column:
    """
    What is drawn of one pipeline.

    Args:
        title (`str`): Stands above.
        edited (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8.
        outline (`np.ndarray` of shape `(num_frames, rows, columns)`): bool, what to outline in all maps.
        maps (`dict[tuple[str, ...], HeatMap]`): By the lines of its label.
    """

    title: str
    edited: np.ndarray
    outline: np.ndarray
    maps: dict[tuple[str, ...], HeatMap] = field(default_factory=dict)


def number(value: float) -> str:
    """Two digits, and all before the point; `-` for `nan`."""
    return "-" if math.isnan(value) else f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def paint(frame: np.ndarray, values: np.ndarray, highest: float, outline: np.ndarray) -> np.ndarray:
    """
    Lay a map over a frame, which turns grey.

    Args:
        frame (`np.ndarray` of shape `(height, width, 3)`): uint8.
        values (`np.ndarray` of shape `(rows, columns)`): From 0, drawn black, to `highest`, drawn yellow.
        highest (`float`): At least the largest of `values`.
        outline (`np.ndarray` of shape `(rows, columns)`): bool; where it is `True` is outlined.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`: uint8.
    """
    size = frame.shape[:2]
    resized = [F.interpolate(torch.from_numpy(a).float()[None, None], size)[0, 0].numpy() for a in (values, outline)]
    level = resized[0] / highest if highest > 0 else resized[0]
    grey = frame.astype(np.float32).mean(-1, keepdims=True)
    alpha = 0.2 + 0.6 * level[..., None]
    picture = ((1 - alpha) * grey + alpha * _colour(level)).round().astype(np.uint8)
    inside = resized[1] > 0
    around = np.pad(inside, 1, mode="edge")
    is_inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    picture[inside & ~is_inner] = OUTLINE
    return picture


def _colour(level: np.ndarray) -> np.ndarray:
    steps = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(level, steps, channel) for channel in RAMP.T], axis=-1)


def _resize(frames: np.ndarray, longer_side: int) -> np.ndarray:
    height, width = frames.shape[1:3]
    size = [max(2 * round(side * longer_side / max(height, width) / 2), 2) for side in (width, height)]
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def _labels(columns: list[Column]) -> dict[tuple[str, ...], float]:
    # All labels, those of one first line together, and the highest value under each: pipelines side by side share a
    # scale of colours.
    highest = {}
    for column in columns:
        for label, heat in column.maps.items():
            highest[label] = max(highest.get(label, 0.0), float(heat.values.max()))
    first_lines = [label[0] for label in highest]
    return dict(sorted(highest.items(), key=lambda item: first_lines.index(item[0][0])))


def write_attention_picture(
    path: str | os.PathLike,
    title: str,
    source: np.ndarray,
    columns: list[Column],
    footnotes: Sequence[str] = (),
    num_frames: int = 5,
) -> None:
    """
    Draw maps as a PNG: a row for the source, the edit and each map, over time; pipelines side by side.

    Args:
        path (`str` or `os.PathLike`): The file to write.
        title (`str`): Stands above all.
        source (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8.
        columns (`list[Column]`): One for each pipeline. A map that another one lacks is left out there.
        footnotes (`Sequence[str]`, *optional*): Stand below.
        num_frames (`int`, defaults to 5): At most so many frames are drawn, spread evenly.
    """
    numbers = np.unique(np.linspace(0, len(source) - 1, num_frames).round().astype(int))
    source = _resize(source[numbers], CELL)
    height, width = source.shape[1:3]
    labels = _labels(columns)
    scale_at = len(numbers) * (width + GAP)
    part = scale_at + RIGHT  # of one pipeline
    full_width = max(LEFT + len(columns) * part, 640)
    footnotes = [line for note in footnotes for line in textwrap.wrap(note, full_width // 6)]
    top = 68
    num_notes = max((len(heat.notes) for column in columns for heat in column.maps.values()), default=0)
    scale_height = max(height, NOTE_HEIGHT * (num_notes + 2))  # between the numbers at both ends of the bar
    line_height = scale_height + GAP
    full_height = top + (2 + len(labels)) * line_height + 16 * len(footnotes) + 2 * GAP
    picture = Image.new("RGB", (full_width, full_height), "white")
    draw = ImageDraw.Draw(picture)

    # 1. Titles
    draw.text((GAP, 4), title, fill="black", font=TITLE)
    for place, column in enumerate(columns):
        left = LEFT + place * part
        draw.text((left, 28), column.title, fill="black", font=TEXT)
        for at, frame in enumerate(numbers):
            middle = left + at * (width + GAP) + width / 2
            draw.text((middle, top - 8), f"frame {frame}", fill="dimgrey", font=SMALL, anchor="mm")

    # 2. Rows
    for row, label in enumerate([("source",), ("edited",), *labels]):
        y = top + row * line_height
        lines = [*textwrap.wrap(label[0], 24), *label[1:]]
        for line, text in enumerate(lines):
            y_text = y + height / 2 + 17 * (line - (len(lines) - 1) / 2)
            is_measure = line >= len(lines) - len(label[1:])
            draw.text((GAP, y_text), text, fill="dimgrey" if is_measure else "black", font=TEXT, anchor="lm")
        for place, column in enumerate(columns):
            left = LEFT + place * part
            heat = column.maps.get(label)
            if heat is not None:
                values, outline = heat.values[numbers], column.outline[numbers]
                cells = [paint(*cell, labels[label], rim) for *cell, rim in zip(source, values, outline)]
                _draw_scale(picture, left + scale_at, y, scale_height, labels[label], heat)
            elif label in labels:
                draw.text((left, y + height / 2), "not read", fill="dimgrey", font=TEXT, anchor="lm")
                continue
            else:
                cells = source if label == ("source",) else _resize(column.edited[numbers], CELL)
            for at, cell in enumerate(cells):
                picture.paste(Image.fromarray(cell), (left + at * (width + GAP), y))

    # 3. Notes
    for line, text in enumerate(footnotes):
        draw.text((GAP, full_height - 16 * (len(footnotes) - line) - GAP), text, fill="dimgrey", font=SMALL)
    picture.save(Path(path))


def _draw_scale(picture: Image.Image, x: int, y: int, height: int, highest: float, heat: HeatMap) -> None:
    draw = ImageDraw.Draw(picture)
    bar = np.repeat(_colour(np.linspace(1, 0, height))[:, None], 10, axis=1)
    picture.paste(Image.fromarray(bar.round().astype(np.uint8)), (x, y))
    draw.text((x + 14, y), f"{number(highest)} {heat.unit}", fill="black", font=SMALL)
    draw.text((x + 14, y + height), "0", fill="black", font=SMALL, anchor="ls")
    for line, text in enumerate(heat.notes):
        y_text = y + height / 2 + NOTE_HEIGHT * (line - (len(heat.notes) - 1) / 2)
        draw.text((x + 14, y_text), text, fill="dimgrey", font=SMALL, anchor="lm")


def draw_attention_clip(source: np.ndarray, columns: list[Column]) -> np.ndarray:
    """
    Draw maps as a clip: source, edit and maps from left to right, in further rows where H.264 has no room for more;
    pipelines below each other.

    Args:
        source (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8.
        columns (`list[Column]`): One for each pipeline. A map that another one lacks is left out there.

    Returns:
        `np.ndarray` of shape `(num_frames, full_height, full_width, 3)`: uint8, of even size.
    """
    source = _resize(source, PANEL)
    num_frames, height, width = source.shape[:3]
    labels = _labels(columns)
    top = 98  # five lines of text
    step = max(width, 176) + GAP  # as wide as the text
    step += step % 2
    shown = [("source",), ("edited",), *labels]
    per_row = min(len(shown), MAX_WIDTH // step)
    rows = [shown[start : start + per_row] for start in range(0, len(shown), per_row)]
    video = np.full((num_frames, len(columns) * len(rows) * (top + height), per_row * step, 3), 255, np.uint8)
    for place, (column, row) in enumerate(product(columns, rows)):
        head = Image.new("RGB", (video.shape[2], top), "white")
        draw = ImageDraw.Draw(head)
        draw.text((2, 2), column.title, fill="black", font=TEXT)
        y = place * (top + height)
        for at, label in enumerate(row):
            if label in labels and label not in column.maps:
                continue
            x, lines = at * step, list(label)
            if label in labels:
                heat = column.maps[label]
                lines.append(f"0 to {number(labels[label])} {heat.unit}")
                cells = [paint(*cell, labels[label], rim) for *cell, rim in zip(source, heat.values, column.outline)]
            else:
                cells = source if label == ("source",) else _resize(column.edited, PANEL)
            draw.multiline_text((x + 2, 20), "\n".join(lines), fill="black", font=TEXT)
            video[:, y + top : y + top + height, x : x + width] = cells
        video[:, y : y + top] = np.asarray(head)
    return video
