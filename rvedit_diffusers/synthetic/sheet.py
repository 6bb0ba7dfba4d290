"""A contact sheet: what each item shows, asks for and changes, large enough to look at."""

import math
import os
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .items import BenchmarkItem


CELL, GAP, NUM_FRAMES, NUM_COLUMNS = 112, 4, 4, 3
TINTS = ((255, 70, 70), (70, 150, 255), (80, 220, 90))  # of the masks of the first, second and third operation


def mask_picture(item: BenchmarkItem, frame: int) -> np.ndarray:
    """The target, darkened, with the masks of the operations over it. `(height, width, 3)` uint8."""
    picture = 0.25 * item.target_frames[frame].astype(np.float32)
    for operation, mask, tint in zip(item.operations, item.masks, TINTS):
        share = 0.25 if operation.kind in ("background", "grade", "stylise") else 0.6
        picture = np.where(mask[frame][..., None], (1 - share) * picture + share * np.array(tint), picture)
    return picture.astype(np.uint8)


def draw_block(item: BenchmarkItem) -> Image.Image:
    frames = np.linspace(0, item.scene.num_frames - 1, NUM_FRAMES).round().astype(int)
    height, width = item.source_frames.shape[1:3]
    scale = CELL / max(height, width)
    cell = (round(width * scale), round(height * scale))
    caption = [f"{item.id}: {item.kind}", *textwrap.wrap(item.instruction, 70)]
    if item.twin is not None:
        caption += textwrap.wrap(f"twin: {item.twin.instruction}", 70)
    font, line = ImageFont.load_default(size=13), 17
    rows = 3
    size = (NUM_FRAMES * (cell[0] + GAP) + GAP, len(caption) * line + rows * (cell[1] + GAP) + 3 * GAP)
    block = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(block)
    for number, text in enumerate(caption):
        draw.text((GAP, number * line), text, fill="black" if number else "grey", font=font)
    for column, frame in enumerate(frames):
        pictures = (item.source_frames[frame], item.target_frames[frame], mask_picture(item, frame))
        for row, picture in enumerate(pictures):
            at = (GAP + column * (cell[0] + GAP), len(caption) * line + GAP + row * (cell[1] + GAP))
            block.paste(Image.fromarray(picture).resize(cell, Image.Resampling.NEAREST), at)
    return block


def write_sheet(path: str | os.PathLike, items: Iterable[BenchmarkItem]) -> None:
    """Draw a contact sheet: of each item the source, the target and the masks over time, under its instruction.

    Args:
        path (`str` or `os.PathLike`): The `.png` file to write, as a whole or not at all; its folder must exist.
        items (`Iterable[BenchmarkItem]`): At least one.

    Raises:
        FileNotFoundError: The folder of `path` does not exist.
        ValueError: `path` is not a `.png`, or there are no items.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"`path` has to end in .png, but is {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path`: there is no folder {path.parent}")
    blocks = [draw_block(item) for item in items]
    if not blocks:
        raise ValueError("`items` has to have at least one item")
    lines = [blocks[start : start + NUM_COLUMNS] for start in range(0, len(blocks), NUM_COLUMNS)]
    width = NUM_COLUMNS * max(block.width + 3 * GAP for block in blocks)
    sheet = Image.new("RGB", (width, sum(max(block.height for block in line) for line in lines)), "white")
    top = 0
    for line in lines:
        for column, block in enumerate(line):
            sheet.paste(block, (math.floor(column * width / NUM_COLUMNS), top))
        top += max(block.height for block in line)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        sheet.save(Path(folder) / "sheet.png")
        os.replace(Path(folder) / "sheet.png", path)
