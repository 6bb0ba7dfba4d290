"""Edits of scenes: operation, instruction with a referring expression, exact target and mask."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from .backgrounds import TRAIN_PHOTOS
from .scenes import COLOURS, GRADES, SHAPES, Scene, coverage, render, sample_scene


OPERATIONS = ("recolour", "remove", "replace", "grade")
NEW_OPERATIONS = ("outline",)  # never seen by the embedded checkpoint, to fine-tune it
TEMPLATES = {
    "recolour": ("make {ref} {colour}", "change the color of {ref} to {colour}", "turn {ref} {colour}"),
    "remove": ("remove {ref}", "delete {ref}", "take {ref} away"),
    "replace": ("replace {ref} with a {colour} {shape}", "turn {ref} into a {colour} {shape}"),
    "outline": ("outline the red circle in white",),
    "grey": ("make the video black and white", "remove all color from the video", "turn the whole video grey"),
    "warm": ("make the video warmer", "give the video a warm look", "make the colors of the video warm"),
    "cold": ("make the video colder", "give the video a cold look", "make the colors of the video cold"),
    "bright": ("make the video brighter", "brighten the whole video", "give the video a bright look"),
    "dark": ("make the video darker", "darken the whole video", "give the video a dark look"),
}
DRAWN = 3  # version of what a seed draws, to be raised when scenes, edits or their rendering change
DEMO_SEED = 2_000_071
RELATION_SHARE = 0.3  # of the instructions, where a relation names the object at all
MARGIN = 0.12  # of the width: the lead of the leftmost object in every frame, and the least way of a moving one


@dataclass(frozen=True)
class Edit:
    """One edit of one scene.

    Attributes:
        operation (`str`): One of `OPERATIONS` or `NEW_OPERATIONS`.
        instruction (`str`): What a user would type.
        scene, edited (`Scene`): The scene graph before and after; both render exactly.
        target (`int`, *optional*): Index of the edited object in `scene.objects`; `None` for a grade.
        value (`tuple[str, ...]`): The new colour; the new colour and shape; the outline's colour; or the grade.
    """

    operation: str
    instruction: str
    scene: Scene
    edited: Scene
    target: int | None
    value: tuple[str, ...]

    @cached_property
    def source_frames(self) -> np.ndarray:
        """`(frames, height, width, 3)` uint8."""
        return render(self.scene)

    @cached_property
    def target_frames(self) -> np.ndarray:
        """`(frames, height, width, 3)` uint8."""
        return render(self.edited)

    @cached_property
    def mask(self) -> np.ndarray:
        """`(frames, height, width)` bool: the pixels that the edit changes by more than 2 of 255."""
        if self.operation == "grade":
            return np.ones(self.source_frames.shape[:3], bool)
        return np.abs(self.source_frames.astype(np.int16) - self.target_frames).max(-1) > 2

    def wrong_candidates(self) -> dict[str, Scene]:
        """The scenes that a wrong edit would give, by failure label.

        The same operation on each other object (`wrong object`), or with a value that differs in one respect from what
        was asked for: another grade, colour or shape (`wrong value`).
        """
        values: dict[str, tuple[tuple[str, ...], ...]] = {
            "recolour": tuple(product(COLOURS)),
            "replace": tuple(product(COLOURS, SHAPES)),
            "outline": tuple(product(COLOURS)),
            "grade": tuple(product(GRADES)),
        }
        found = {
            f"wrong value: {' '.join(value)}": apply(self.scene, self.operation, self.target, value)
            for value in values.get(self.operation, ())
            if sum(one != other for one, other in zip(value, self.value, strict=True)) == 1
        }
        found = {label: scene for label, scene in found.items() if scene != self.scene}  # which is no edit
        if self.target is None:
            return found
        others = [index for index in range(len(self.scene.objects)) if index != self.target]
        return found | {
            f"wrong object: {index}": apply(self.scene, self.operation, index, self.value) for index in others
        }


def apply(scene: Scene, operation: str, target: int | None, value: tuple[str, ...]) -> Scene:
    """Edit a scene graph; see [`Edit`] for the arguments."""
    if operation == "grade":
        return replace(scene, grade=value[0])
    if operation == "remove":
        return scene.with_object(target, None)
    if operation == "recolour":
        return scene.with_object(target, replace(scene.objects[target], colour=value[0]))
    if operation == "replace":
        return scene.with_object(target, replace(scene.objects[target], colour=value[0], shape=value[1]))
    if operation == "outline":
        return scene.with_object(target, replace(scene.objects[target], outline=value[0]))
    raise ValueError(f"`operation` has to be one of {OPERATIONS + NEW_OPERATIONS}, but is {operation!r}")


def visible_share(scene: Scene, index: int) -> np.ndarray:
    """Share of object `index` that is in front of all others, per frame: `(frames,)` in [0, 1]."""
    own = coverage(scene, index)
    free = own.copy()
    for other in range(index + 1, len(scene.objects)):
        free = free * (1.0 - coverage(scene, other))
    return free.sum((1, 2)) / np.maximum(own.sum((1, 2)), 1e-6)


def referring_expressions(scene: Scene, index: int) -> tuple[list[str], list[str]]:
    """Every phrase that names object `index` and no other object of the scene: by its looks, and by a relation."""
    thing, others = scene.objects[index], [o for i, o in enumerate(scene.objects) if i != index]
    looks = [f"the {thing.colour} {thing.shape}"]
    if all(o.shape != thing.shape for o in others):
        looks.append(f"the {thing.shape}")
    if all(o.colour != thing.colour for o in others):
        looks.append(f"the {thing.colour} object")
    relations = []
    if all(o.radius < thing.radius for o in others):
        relations.append("the largest object")
    if all(o.radius > thing.radius for o in others):
        relations.append("the smallest object")
    path = np.array(thing.path)
    if np.ptp(path, axis=0).max() >= MARGIN and all(np.ptp(o.path, axis=0).max() == 0 for o in others):
        relations.append("the moving object")
    for axis, (low, high) in enumerate((("leftmost", "rightmost"), ("topmost", "bottommost"))):
        gaps = [np.array(o.path)[:, axis] - path[:, axis] for o in others]
        if all((gap >= MARGIN).all() for gap in gaps):
            relations.append(f"the {low} object")
        if all((gap <= -MARGIN).all() for gap in gaps):
            relations.append(f"the {high} object")
    return looks, relations


def sample_edit(rng: np.random.Generator, scene: Scene, operation: str) -> Edit:
    """Draw an edit of `scene`: its object (visible through most of the clip), value and wording."""
    if operation == "grade":
        grade = GRADES[rng.integers(len(GRADES))]
        instruction = TEMPLATES[grade][rng.integers(len(TEMPLATES[grade]))]
        return Edit(operation, instruction, scene, apply(scene, operation, None, (grade,)), None, (grade,))

    visible = [i for i in range(len(scene.objects)) if (visible_share(scene, i) > 0.5).mean() >= 0.8]
    target = int(rng.choice(visible))
    if operation == "outline":  # the scene gets its red circle, and has one alone
        objects = [replace(o, colour="blue") if (o.colour, o.shape) == ("red", "circle") else o for o in scene.objects]
        objects[target] = replace(objects[target], colour="red", shape="circle")
        scene = replace(scene, objects=tuple(objects))
    thing, taken = scene.objects[target], {(o.colour, o.shape) for o in scene.objects}
    value: tuple[str, ...] = ()
    if operation == "recolour":
        free = [c for c in COLOURS if c != thing.colour and (c, thing.shape) not in taken]
        value = (free[rng.integers(len(free))],)
    elif operation == "replace":
        free = [(c, s) for c in COLOURS for s in SHAPES if s != thing.shape and (c, s) not in taken]
        value = free[rng.integers(len(free))]
    elif operation == "outline":
        value = ("white",)
    looks, relations = referring_expressions(scene, target)
    phrases = relations if relations and rng.random() < RELATION_SHARE else looks
    words = {"ref": phrases[rng.integers(len(phrases))]} | dict(zip(("colour", "shape"), value, strict=False))
    instruction = TEMPLATES[operation][rng.integers(len(TEMPLATES[operation]))].format(**words)
    return Edit(operation, instruction, scene, apply(scene, operation, target, value), target, value)


class SyntheticEdits:
    """An endless, indexable list of edits; item `index` is a function of the arguments and `index` alone.

    Args:
        seed (`int`): Names the list; two seeds share no scene.
        num_frames, height, width (`int`): The clips, in frames and pixels.
        operations (`tuple[str, ...]`): Operations to take turns through, some of `OPERATIONS` and `NEW_OPERATIONS`.
        edits_per_scene (`int`): How many consecutive items share one scene (and so one source clip).
        photos (`tuple[str, ...]`): The photographs that backgrounds may show.
    """

    def __init__(
        self,
        seed: int,
        num_frames: int = 17,
        height: int = 64,
        width: int = 64,
        operations: tuple[str, ...] = OPERATIONS,
        edits_per_scene: int = 1,
        photos: tuple[str, ...] = TRAIN_PHOTOS,
    ):
        unknown = set(operations) - set(OPERATIONS + NEW_OPERATIONS)
        if not operations or unknown:
            raise ValueError(f"`operations` has to name some of {OPERATIONS + NEW_OPERATIONS}, but is {operations}")
        if edits_per_scene < 1:
            raise ValueError(f"`edits_per_scene` has to be at least 1, but is {edits_per_scene}")
        self.seed, self.operations, self.edits_per_scene = seed, tuple(operations), edits_per_scene
        self.scene_arguments = {"num_frames": num_frames, "height": height, "width": width, "photos": tuple(photos)}

    def __getitem__(self, index: int) -> Edit:
        if index < 0:
            raise IndexError(f"`index` has to be at least 0, but is {index}")
        scene_index, variant = divmod(index, self.edits_per_scene)
        scene_rng = np.random.default_rng([self.seed, scene_index])
        scene = sample_scene(scene_rng, **self.scene_arguments)
        operation = self.operations[(scene_index + variant) % len(self.operations)]
        return sample_edit(np.random.default_rng([self.seed, scene_index, 1 + variant]), scene, operation)


def demo_edit() -> Edit:
    """The edit that the demo shows: a fixed item over a procedural background, so that no photograph is needed."""
    return SyntheticEdits(DEMO_SEED, operations=("recolour",))[0]
