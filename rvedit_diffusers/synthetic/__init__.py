"""The procedural benchmark: scenes with exact edit targets, rendered on the fly from a seed.

`SyntheticEdits` are single edits. `BenchmarkItems` are those of the levels L0 to L6 and OOD, with more operations and
twins; `score` measures an edited clip of one.
"""

from .backgrounds import TEST_PHOTOS, TRAIN_PHOTOS
from .edits import NEW_OPERATIONS, OPERATIONS, Edit, SyntheticEdits, demo_edit, referring_expressions
from .items import BenchmarkItem
from .levels import LEVELS, TRAIN_LEVELS, BenchmarkItems
from .manifest import read_manifest
from .metrics import judge, outside_psnr, psnr
from .operations import Operation
from .scenes import COLOURS, GRADES, SHAPES, Scene, SceneObject, caption, render, sample_scene
from .scoring import Judge, score, twin_consistency
from .sheet import write_sheet


__all__ = [
    "BenchmarkItem",
    "BenchmarkItems",
    "COLOURS",
    "Edit",
    "GRADES",
    "Judge",
    "LEVELS",
    "NEW_OPERATIONS",
    "OPERATIONS",
    "Operation",
    "SHAPES",
    "Scene",
    "SceneObject",
    "SyntheticEdits",
    "TEST_PHOTOS",
    "TRAIN_LEVELS",
    "TRAIN_PHOTOS",
    "caption",
    "demo_edit",
    "judge",
    "outside_psnr",
    "psnr",
    "read_manifest",
    "referring_expressions",
    "render",
    "sample_scene",
    "score",
    "twin_consistency",
    "write_sheet",
]
