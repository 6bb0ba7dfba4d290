"""Scenes that are fit to be edited: every object can be seen, and has the others that a level asks for."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations, product

import numpy as np

from .edits import visible_share
from .metrics import differs
from .operations import GLOBAL, Operation, follow
from .scenes import COLOURS, SHAPES, Scene, render, sample_scene, scene_background


# Looks that no training item of the levels shows, before or after its edit; single edits may. Their colours and shapes
# are there in other company.
HELD_OUT_LOOKS = (
    ("red", "star"),
    ("green", "triangle"),
    ("blue", "cross"),
    ("yellow", "diamond"),
    ("purple", "circle"),
    ("cyan", "square"),
)
STILL_SHARE = 0.25  # of the scenes, where one object moves alone
# That a person sees an edit is checked on a thumbnail of five frames, 32 pixels high or wide.
THUMBNAIL, NUM_THUMBNAILS = 32, 5
SEEN_PIXELS, SEEN_DIFFERENCE = 10, 48
GLOBAL_SHARE, GLOBAL_DIFFERENCE = 0.25, 16
UNFIT = {"bigger": "large", "smaller": "small"}  # sizes that have no room for a resize
MOVED = 0.25  # least way of a move, as a share of the frame


class Stage:
    """A scene to edit, with its background at thumbnail size."""

    def __init__(self, scene: Scene):
        self.scene, self.thumbnails = scene, {}
        self.thumbnail_background = scene_background(self.shrunk(scene))

    @staticmethod
    def shrunk(scene: Scene) -> Scene:
        factor = THUMBNAIL / min(scene.height, scene.width)
        times = np.linspace(0, scene.num_frames - 1, NUM_THUMBNAILS).round().astype(int)
        things = tuple(replace(thing, path=tuple(thing.path[time] for time in times)) for thing in scene.objects)
        height, width = round(scene.height * factor), round(scene.width * factor)
        return replace(scene, num_frames=NUM_THUMBNAILS, height=height, width=width, objects=things)

    def thumbnail(self, scene: Scene) -> np.ndarray:
        if scene not in self.thumbnails:
            same = scene.background == self.scene.background
            self.thumbnails[scene] = render(self.shrunk(scene), self.thumbnail_background if same else None)
        return self.thumbnails[scene]

    def seen(self, one: Scene, other: Scene, everywhere: bool = False) -> bool:
        """Whether a person sees the difference of two versions of the scene in every frame."""
        difference = GLOBAL_DIFFERENCE if everywhere else SEEN_DIFFERENCE
        pixels = differs(self.thumbnail(one), self.thumbnail(other), difference).sum((1, 2))
        needed = GLOBAL_SHARE * self.thumbnail_background[0, ..., 0].size if everywhere else SEEN_PIXELS
        return bool((pixels >= needed).all())

    @cached_property
    def visible(self) -> list[int]:
        """The objects that are in front through most of the clip."""
        small = self.shrunk(self.scene)
        return [i for i in range(len(small.objects)) if (visible_share(small, i) > 0.5).mean() >= 0.8]


def draw_stage(rng: np.random.Generator, num_objects: tuple[int, int], dressing: str, **arguments) -> Stage | None:
    """Draw a scene whose objects can all be seen; `None` if this try gave none.

    Args:
        rng (`np.random.Generator`): The source of every choice.
        num_objects (`tuple[int, int]`): Least and most objects, both included.
        dressing (`str`): `"unique"`: no colour and no shape twice. `"hard"`: each object shares its colour or its
            shape with another one. `"held out"`: the same, and one object has a look of `HELD_OUT_LOOKS`.
        **arguments: Of [`sample_scene`].
    """
    scene = sample_scene(rng, num_objects=num_objects, **arguments)
    if len(scene.objects) < num_objects[0]:
        return None
    mover = rng.integers(len(scene.objects)) if rng.random() < STILL_SHARE else None
    looks: list[tuple[str, str]] = []
    for _ in scene.objects:
        if not looks and dressing == "held out":
            looks.append(HELD_OUT_LOOKS[rng.integers(len(HELD_OUT_LOOKS))])
            continue
        free = [look for look in product(COLOURS, SHAPES) if look not in looks and look not in HELD_OUT_LOOKS]
        shared = [[sum(a == b for a, b in zip(look, other)) for other in looks] for look in free]
        wanted = [not any(s) if dressing == "unique" or not looks else any(s) for s in shared]
        free = [look for look, fits in zip(free, wanted) if fits]
        looks.append(free[rng.integers(len(free))])
    # back to front is no order of attributes
    looks = [looks[number] for number in rng.permutation(len(looks))]
    things = []
    for number, (thing, (colour, shape)) in enumerate(zip(scene.objects, looks, strict=True)):
        path = tuple(map(tuple, np.round(thing.path, 5).tolist()))  # the last bits differ between machines
        if mover is not None and number != mover:
            path = (path[0],) * scene.num_frames
        motion = "static" if np.ptp(path, axis=0).max() == 0 else thing.motion
        things.append(replace(thing, path=path, colour=colour, shape=shape, motion=motion))
    scene = replace(scene, objects=tuple(things))
    if not told_apart(scene):
        return None
    stage = Stage(scene)
    if all(stage.seen(stage.scene, stage.scene.with_object(number, None)) for number in range(len(things))):
        return stage
    return None


def distances(scene: Scene, one: int, other: int) -> np.ndarray:
    """Of two objects, per frame, in units of the sum of their radii: `(frames,)`."""
    first, second = scene.objects[one], scene.objects[other]
    sides = np.array([scene.width, scene.height]) / min(scene.height, scene.width)
    way = np.linalg.norm((np.array(first.path) - np.array(second.path)) * sides, axis=1)
    return way / (first.radius + second.radius)


def told_apart(scene: Scene) -> bool:
    """Whether no two objects of one colour touch: they would look like one."""
    pairs = combinations(range(len(scene.objects)), 2)
    alike = [pair for pair in pairs if len({scene.objects[number].colour for number in pair}) == 1]
    return all((distances(scene, *pair) > 1.0).all() for pair in alike)


def fits(scene: Scene, number: int) -> bool:
    """Whether an object is inside of the frame, and apart from the others for two thirds of the clip."""
    thing, shorter = scene.objects[number], min(scene.height, scene.width)
    path, sides = np.array(thing.path), np.array([scene.width, scene.height]) / shorter
    reach = 0.8 * thing.radius / sides
    if (path < reach).any() or (path > 1.0 - reach).any():
        return False
    others = [other for other in range(len(scene.objects)) if other != number]
    return all((distances(scene, number, other) < 0.85).mean() <= 0.34 for other in others)


def allowed(scene: Scene, numbers: Sequence[int], operation: Operation, held_out: bool) -> bool:
    """Whether an operation makes sense on a scene whose objects have these numbers: it changes the object, gives no
    second object of the same look, stays in the frame, and has a held-out look only where that is wanted."""
    kind, target, value = operation.kind, operation.target, operation.value
    if kind in GLOBAL:
        return True
    if kind != "add" and target not in numbers:
        return False
    if kind == "remove":
        return True
    taken = {(o.colour, o.shape) for number, o in zip(numbers, scene.objects) if number != target}
    index = len(scene.objects) if kind == "add" else numbers.index(target)
    after, _ = follow(scene, [replace(operation, target=index)])
    new = after.objects[index]
    if (new.colour, new.shape) in taken or ((new.colour, new.shape) in HELD_OUT_LOOKS and not held_out):
        return False
    if kind in ("add", "resize", "move") and not fits(after, index):
        return False
    if kind == "add":
        return True
    old = scene.objects[index]
    if kind == "recolour":
        return new.colour != old.colour
    if kind == "replace":
        return new.shape != old.shape
    if kind == "resize":  # nothing twice
        return old.scale == 1.0 and old.size != UNFIT[value[0]]
    way = np.abs(np.array(new.path) - np.array(old.path)).max()
    return way >= MOVED and np.ptp(old.path, axis=0).max() <= 0.2
