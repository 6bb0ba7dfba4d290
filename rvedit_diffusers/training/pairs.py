"""What can be trained on: pairs of clips with an instruction, by index."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from ..synthetic import BenchmarkItem, BenchmarkItems, SyntheticEdits, caption
from ..synthetic.edits import DRAWN as DRAWN_EDITS
from ..synthetic.levels import DRAWN as DRAWN_ITEMS
from .data import Bucket, Plan, content_key, load_pair
from .record import ScanRecord


class EditPairs(Protocol):
    """Pairs of clips with an instruction, by index. All of it is a function of the index alone."""

    def __len__(self) -> int: ...

    def bucket(self, index: int) -> Bucket:
        """The size of both clips."""

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and edited clip, each uint8 `(num_frames, height, width, 3)`."""

    def instruction(self, index: int) -> str: ...

    def fps(self, index: int) -> float:
        """Frames per second of both clips."""

    def key(self, index: int) -> str:
        """A hash of all that the methods above return."""

    def hold_out(self, count: int, seed: int) -> tuple["EditPairs", "EditPairs"]:
        """Pairs to train on, and others to validate on, at most `count`."""


class FilePairs:
    """Pairs of files that [`plan_pairs`] has checked, an [`EditPairs`].

    Args:
        plans (`Sequence[Plan]`): How each pair is loaded.
        record (`str` or `os.PathLike`, *optional*): File of a [`ScanRecord`], for the hashes of the files.
    """

    def __init__(self, plans: Sequence[Plan], record: str | os.PathLike | None = None):
        self.plans, self.record = list(plans), ScanRecord(record)

    def __len__(self) -> int:
        return len(self.plans)

    def bucket(self, index: int) -> Bucket:
        return self.plans[index].bucket

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return load_pair(self.plans[index])

    def instruction(self, index: int) -> str:
        return self.plans[index].pair.instruction

    def fps(self, index: int) -> float:
        return float(self.plans[index].fps)

    def key(self, index: int) -> str:
        return content_key(self.plans[index], self.record)

    def hold_out(self, count: int, seed: int) -> tuple["FilePairs", "FilePairs"]:
        """All edits of a source clip are on one side. Which clips are held out hardly depends on the other clips.

        Raises:
            ValueError: There are no more than `count` pairs.
        """
        if count >= len(self):
            raise ValueError(f"--num_validation_pairs has to leave pairs to train on, but is {count} of {len(self)}")
        sources: dict[str, list[int]] = {}
        for index, plan in enumerate(self.plans):
            sources.setdefault(self.record.sha256(plan.pair.source), []).append(index)
        held_out: set[int] = set()
        for source in sorted(sources, key=lambda source: hashlib.sha256(f"{seed} {source}".encode()).digest()):
            if len(held_out) + len(sources[source]) <= count:
                held_out |= set(sources[source])
        parts: tuple[list[Plan], list[Plan]] = [], []
        for index, plan in enumerate(self.plans):
            parts[index in held_out].append(plan)
        return tuple(FilePairs(part, self.record.path) for part in parts)


class SyntheticPairs:
    """The first edits of an endless list, an [`EditPairs`].

    Args:
        edits ([`SyntheticEdits`]): The list.
        num_pairs (`int`): How many of it.
        fps (`float`): The rate that the clips are said to have.
        captioned (`bool`, defaults to `False`): Whether a pair is a source clip alone, with its caption for an
            instruction.
    """

    def __init__(self, edits: SyntheticEdits, num_pairs: int, fps: float, captioned: bool = False):
        self.edits, self.num_pairs, self.rate, self.captioned = edits, num_pairs, fps, captioned

    def __len__(self) -> int:
        return self.num_pairs

    def bucket(self, index: int) -> Bucket:
        return Bucket(*(self.edits.scene_arguments[name] for name in ("num_frames", "height", "width")))

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        edit = self.edits[index]
        return edit.source_frames, edit.source_frames if self.captioned else edit.target_frames

    def instruction(self, index: int) -> str:
        edit = self.edits[index]
        return caption(edit.scene) if self.captioned else edit.instruction

    def fps(self, index: int) -> float:
        return self.rate

    def key(self, index: int) -> str:
        drawn = [DRAWN_EDITS, vars(self.edits), index, self.rate] + ["captioned"] * self.captioned
        return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()

    def hold_out(self, count: int, seed: int) -> tuple["SyntheticPairs", "SyntheticPairs"]:
        unseen = SyntheticEdits(1_000_000 + seed, operations=self.edits.operations, **self.edits.scene_arguments)
        return self, SyntheticPairs(unseen, count, self.rate, self.captioned)


@lru_cache(maxsize=64)
def draw_pair(items: BenchmarkItems, index: int) -> BenchmarkItem:
    """Item `index // 2` for an even index; its twin for an odd one, or the item again if it has none."""
    item = items[index // 2]
    return item.twin if index % 2 and item.twin is not None else item


class BenchmarkPairs:
    """The first items of an endless list, each followed by its twin, an [`EditPairs`].

    Twins have the same source and instructions that differ in one word: which word it is has to be read. Pairs `2k`
    and `2k + 1` are twins. The few items without a twin (a grade to grey) come twice.

    Args:
        items ([`BenchmarkItems`]): The list, of the split `train`.
        num_pairs (`int`): How many pairs: twice the items.
        fps (`float`): The rate that the clips are said to have.
    """

    def __init__(self, items: BenchmarkItems, num_pairs: int, fps: float):
        self.items, self.num_pairs, self.rate = items, num_pairs, fps

    def __len__(self) -> int:
        return self.num_pairs

    def bucket(self, index: int) -> Bucket:
        return Bucket(*(self.items.scene_arguments[name] for name in ("num_frames", "height", "width")))

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        item = draw_pair(self.items, index)
        return item.source_frames, item.target_frames

    def instruction(self, index: int) -> str:
        return draw_pair(self.items, index).instruction

    def fps(self, index: int) -> float:
        return self.rate

    def twin(self, index: int) -> int:
        """The index of the pair's twin; its own, where the last pair of an odd number has none."""
        return min(index ^ 1, self.num_pairs - 1)

    def key(self, index: int) -> str:
        items = self.items
        drawn = [DRAWN_ITEMS, items.levels[index // 2 % len(items.levels)], items.split, items.seed]
        drawn += [items.scene_arguments, index, self.rate] + [items.kinds] * (items.kinds is not None)
        return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()

    def hold_out(self, count: int, seed: int) -> tuple["BenchmarkPairs", "BenchmarkPairs"]:
        items = self.items
        unseen = BenchmarkItems(
            items.levels, 1_000_000 + seed, items.split, kinds=items.kinds, **items.scene_arguments
        )
        return self, BenchmarkPairs(unseen, count, self.rate)
