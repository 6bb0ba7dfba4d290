"""Write items of the benchmark as files.

    python -m rvedit_diffusers.synthetic render --level L3 --num 16 --seed 7 --output DIR

DIR gets `manifest.jsonl`, whose lines name what else is there: `source/` and `target/` with the clips, and `masks/`
with a picture for each operation, one bit a pixel, the frames below one another. These are PNGs as they are exact,
small, and read by everything. The clips are H.264 of high quality, not exact: exact frames come from the scene graphs
of the manifest. Each item is followed by its twin, which has the same source.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..video import write_video
from .items import BenchmarkItem
from .levels import LEVELS, SPLITS, BenchmarkItems
from .manifest import manifest_entry
from .sheet import write_sheet


FPS = 8
CRF = 4  # of H.264, where 0 is nearly lossless


def write_item(folder: Path, item: BenchmarkItem, original_video: str | None = None) -> dict:
    """Write the clips and masks of an item; its line of the manifest.

    Args:
        folder (`Path`): Has the folders `source`, `target` and `masks`.
        item ([`BenchmarkItem`]): What to write.
        original_video (`str`, *optional*): The source, where it is written already.
    """
    if original_video is None:
        original_video = f"source/{item.id}.mp4"
        write_video(folder / original_video, item.source_frames, FPS, crf=CRF)
    target_video = f"target/{item.id}.mp4"
    write_video(folder / target_video, item.target_frames, FPS, crf=CRF)
    masks = [f"masks/{item.id}-{number}.png" for number in range(len(item.operations))]
    for name, mask in zip(masks, item.masks, strict=True):
        Image.fromarray(np.concatenate(mask)).save(folder / name)  # (frames * height, width)
    return manifest_entry(item, original_video, target_video, masks)


def render_items(items: BenchmarkItems, num: int, output: Path) -> None:
    """Write the first `num` items, and their twins, to the folder `output`, as a whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        for name in ("source", "target", "masks"):
            (folder / name).mkdir(parents=True)
        with open(folder / "manifest.jsonl", "w") as manifest:
            for index in tqdm(range(num), unit="item"):
                item = items[index]
                entries = [write_item(folder, item)]
                if item.twin is not None:
                    entries.append(write_item(folder, item.twin, entries[0]["original_video"]))
                manifest.writelines(json.dumps(entry) + "\n" for entry in entries)
        if output.is_dir():  # it is empty
            output.rmdir()
        os.rename(folder, output)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rvedit_diffusers.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="render")
    command = commands.add_parser("render", help="write clips, masks and a manifest, or a contact sheet")
    command.add_argument("--level", choices=LEVELS, required=True)
    command.add_argument("--num", type=int, default=16, help="items, without their twins")
    command.add_argument("--seed", type=int, default=0, help="names the list of items")
    command.add_argument("--split", choices=tuple(SPLITS), default="test", help="which photographs backgrounds show")
    command.add_argument("--output", type=Path, help="folder to make")
    command.add_argument("--sheet", type=Path, help="PNG to draw the items in, to look at")
    command.add_argument("--frames", type=int, default=17)
    command.add_argument("--height", type=int, default=64)
    command.add_argument("--width", type=int, default=64)
    args = parser.parse_args(arguments)
    if args.num < 1:
        command.error(f"--num has to be at least 1, but is {args.num}")
    if args.output is None and args.sheet is None:
        command.error("nothing to write: give --output, --sheet or both")
    if args.output is not None and (args.output.is_file() or args.output.is_dir() and any(args.output.iterdir())):
        command.error(f"--output {args.output} is there already: name another folder, or delete it")
    if args.output is not None and args.output.is_mount():
        command.error(f"--output {args.output} is a mount point: name a folder in it")
    if args.sheet is not None and args.sheet.suffix.lower() != ".png":
        command.error(f"--sheet has to end in .png, but is {args.sheet}")
    try:
        items = BenchmarkItems(args.level, args.seed, args.split, args.frames, args.height, args.width)
    except ValueError as error:
        command.error(str(error))
    for path in (args.output, args.sheet):
        if path is not None:
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
    if args.output is not None:
        render_items(items, args.num, args.output.resolve())
        print(f"{args.output}: {args.num} items of {args.level}")
    if args.sheet is not None:
        write_sheet(args.sheet, [items[index] for index in range(args.num)])
        print(args.sheet)


if __name__ == "__main__":
    main()
