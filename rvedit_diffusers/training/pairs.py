"""What can be trained on: pairs of clips with an instruction, by index."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ..synthetic import SyntheticEdits, caption
from ..synthetic.edits import DRAWN
from .data import Bucket, Plan, content_key, load_pair
from .record import ScanRecord
from .sampler import generator


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
        """Pairs to train on, and `count` others to validate on."""


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
        order = torch.randperm(len(self), generator=generator(seed, "held out")).tolist()
        parts = sorted(order[count:]), sorted(order[:count])
        return tuple(FilePairs([self.plans[index] for index in part], self.record.path) for part in parts)


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
        drawn = [DRAWN, vars(self.edits), index, self.rate] + ["captioned"] * self.captioned
        return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()

    def hold_out(self, count: int, seed: int) -> tuple["SyntheticPairs", "SyntheticPairs"]:
        unseen = SyntheticEdits(1_000_000 + seed, operations=self.edits.operations, **self.edits.scene_arguments)
        return self, SyntheticPairs(unseen, count, self.rate, self.captioned)
