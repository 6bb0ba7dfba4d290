"""What can be done to a scene, one operation after another: to its objects, or to the whole of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from .backgrounds import PATTERNS, WALL_COLOURS
from .scenes import COLOURS, GRADES, SHAPES, SIZES, STYLES, Scene, SceneObject


LOCAL = ("recolour", "remove", "add", "replace", "resize", "move")
GLOBAL = ("background", "grade", "stylise")
RESIZES = {"bigger": 1.6, "smaller": 0.6}
# where along (x, y) an object goes: against the low edge (0), to the middle (0.5), against the high edge (1), or stays
SPOTS = {
    "the top left corner": (0.0, 0.0),
    "the top right corner": (1.0, 0.0),
    "the bottom left corner": (0.0, 1.0),
    "the bottom right corner": (1.0, 1.0),
    "the center": (0.5, 0.5),
}
EDGES = {
    "the left edge": (0.0, None),
    "the right edge": (1.0, None),
    "the top edge": (None, 0.0),
    "the bottom edge": (None, 1.0),
}
PLACES = SPOTS | EDGES
GAP = 0.1  # radii between an object and the edge that it is put against
# every value that an operation can have
VALUES: dict[str, tuple[tuple[str, ...], ...]] = {
    "recolour": tuple(product(COLOURS)),
    "remove": ((),),
    "add": tuple(product(COLOURS, SHAPES, SIZES, SPOTS)),
    "replace": tuple(product(COLOURS, SHAPES)),
    "resize": tuple(product(RESIZES)),
    "move": tuple(product(PLACES)),
    "background": tuple(product(PATTERNS, WALL_COLOURS)),
    "grade": tuple(product(GRADES)),
    "stylise": tuple(product(STYLES)),
}


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        kind (`str`): One of `LOCAL` or `GLOBAL`.
        target (`int`, *optional*): Number of the object that it edits, in the order of the source scene's objects;
            added objects go on counting. It stays the same when other objects are removed. `None` for a global one.
        value (`tuple[str, ...]`): One of `VALUES[kind]`: colour; colour and shape; colour, shape, size and place;
            `"bigger"` or `"smaller"`; place; pattern and colour of a wall; grade; style; or nothing.
    """

    kind: str
    target: int | None
    value: tuple[str, ...] = ()


def put(path: Sequence[tuple[float, float]], place: str, radius: tuple[float, float]) -> tuple:
    """Shift a path to one of `PLACES`: as a whole, so that what moves goes on moving, and stays in the frame.

    Args:
        path: Centres over time, (x, y) as shares of width and height.
        place (`str`): One of `PLACES`.
        radius (`tuple[float, float]`): Of the object, as shares of width and height.
    """
    shifted = np.array(path, dtype=np.float64)
    for axis, position in enumerate(PLACES[place]):
        if position is None:
            continue
        low, high = shifted[:, axis].min(), shifted[:, axis].max()
        edge = (1.0 + GAP) * radius[axis]
        wanted = {0.0: edge - low, 0.5: 0.5 - (low + high) / 2, 1.0: 1.0 - edge - high}[position]
        shifted[:, axis] += wanted
    # rounded, as are all paths of the benchmark: the last bits are not the same on every machine
    return tuple(map(tuple, shifted.round(5).tolist()))


def edit_object(scene: Scene, thing: SceneObject | None, operation: Operation) -> SceneObject | None:
    """What a local operation makes of an object; `None` is no object, before or after."""
    kind, value = operation.kind, operation.value
    shorter = min(scene.height, scene.width)
    if kind == "add":
        colour, shape, size, place = value
        radius = (SIZES[size] * shorter / scene.width, SIZES[size] * shorter / scene.height)
        return SceneObject(shape, colour, size, "static", put(((0.5, 0.5),) * scene.num_frames, place, radius))
    if thing is None or kind == "remove":
        return None
    if kind == "recolour":
        return replace(thing, colour=value[0])
    if kind == "replace":
        return replace(thing, colour=value[0], shape=value[1])
    if kind == "resize":
        return replace(thing, scale=round(thing.scale * RESIZES[value[0]], 5))
    if kind == "move":
        radius = (thing.radius * shorter / scene.width, thing.radius * shorter / scene.height)
        return replace(thing, path=put(thing.path, value[0], radius))
    raise ValueError(f"`kind` of a local operation has to be one of {LOCAL}, but is {kind!r}")


def follow(scene: Scene, operations: Sequence[Operation]) -> tuple[Scene, list[int]]:
    """Apply operations in order, and keep track of the objects.

    An operation on an object that is not there does nothing. A grade and a style change the picture as a whole, and
    so all that is in it in the end.

    Returns:
        `tuple[Scene, list[int]]`: The edited scene, and the number of each of its objects in the sense of
        `Operation.target`.
    """
    things: dict[int, SceneObject | None] = dict(enumerate(scene.objects))
    for operation in operations:
        kind, value = operation.kind, operation.value
        if kind == "background":
            scene = replace(scene, background=f"{value[0]} {value[1]} wall")
        elif kind == "grade":
            scene = replace(scene, grade=value[0])
        elif kind == "stylise":
            scene = replace(scene, style=value[0])
        else:
            things[operation.target] = edit_object(scene, things.get(operation.target), operation)
    present = [number for number, thing in things.items() if thing is not None]
    return replace(scene, objects=tuple(things[number] for number in present)), present


def apply_operations(scene: Scene, operations: Sequence[Operation]) -> Scene:
    """The scene after `operations`, applied in order; see [`Operation`]."""
    return follow(scene, operations)[0]


def wrong_values(operation: Operation) -> list[tuple[str, ...]]:
    """The values that differ from the operation's own in one respect: another colour, shape, size, place, ..."""
    return [
        value
        for value in VALUES[operation.kind]
        if sum(mine != other for mine, other in zip(operation.value, value, strict=True)) == 1
    ]
