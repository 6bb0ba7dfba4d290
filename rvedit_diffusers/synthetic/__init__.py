"""The procedural benchmark: scenes with exact edit targets, rendered on the fly from a seed."""

from .backgrounds import TEST_PHOTOS, TRAIN_PHOTOS
from .edits import NEW_OPERATIONS, OPERATIONS, Edit, SyntheticEdits, demo_edit, referring_expressions
from .metrics import judge, outside_psnr, psnr
from .scenes import COLOURS, GRADES, SHAPES, Scene, SceneObject, caption, render, sample_scene


__all__ = [
    "COLOURS",
    "Edit",
    "GRADES",
    "NEW_OPERATIONS",
    "OPERATIONS",
    "SHAPES",
    "Scene",
    "SceneObject",
    "SyntheticEdits",
    "TEST_PHOTOS",
    "TRAIN_PHOTOS",
    "caption",
    "demo_edit",
    "judge",
    "outside_psnr",
    "psnr",
    "referring_expressions",
    "render",
    "sample_scene",
]
