"""Scene graphs of moving, coloured shapes, and their exact rendering."""

from dataclasses import dataclass, replace

import numpy as np

from .backgrounds import BACKGROUNDS, TRAIN_PHOTOS, render_background


COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.13, 0.25, 0.88),
    "yellow": (0.96, 0.84, 0.10),
    "purple": (0.58, 0.16, 0.78),
    "cyan": (0.12, 0.80, 0.84),
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
AREAS = {"circle": 3.14, "square": 2.82, "triangle": 1.62, "diamond": 2.76, "star": 1.78, "cross": 2.26}  # of radius 1
OUTLINE_WIDTH = 0.06  # as a share of the shorter side
SIZES = {"small": 0.11, "medium": 0.15, "large": 0.20}  # radius as a share of the shorter side
MOTIONS = ("static", "linear", "bounce", "orbit")
WAY = 17  # frames in which things go all of their way; a clip of fewer frames shows its beginning
GRADES = ("grey", "warm", "cold", "bright", "dark")
STYLES = ("sketch", "poster", "mosaic", "negative")


@dataclass(frozen=True)
class SceneObject:
    """One shape. `path` is its centre over time, `(num_frames, 2)` as (x, y) shares of width and height.

    `outline` is the colour of a line around it, or `None`; `scale` is what its size was resized by.
    """

    shape: str
    colour: str
    size: str
    motion: str
    path: tuple[tuple[float, float], ...]
    outline: str | None = None
    scale: float = 1.0

    @property
    def radius(self) -> float:
        """As a share of the frame's shorter side."""
        return SIZES[self.size] * self.scale

    @property
    def area(self) -> float:
        """As a share of the square of the frame's shorter side."""
        return AREAS[self.shape] * self.radius**2


@dataclass(frozen=True)
class Scene:
    """A background, objects from back to front, and a colour grade and a style over all.

    `seed` and `background` fix the background; `photos` says which photographs it may show; `pace` is the share of its
    way that it moves over the clip; `grade` is `None` or one of `GRADES`; `style`, applied last, is `None` or one of
    `STYLES`. `render` depends on these fields alone, so an edited scene renders to the exact target.
    """

    num_frames: int
    height: int
    width: int
    background: str
    seed: int
    objects: tuple[SceneObject, ...]
    photos: tuple[str, ...] = TRAIN_PHOTOS
    grade: str | None = None
    style: str | None = None
    pace: float = 1.0

    def with_object(self, index: int, new: SceneObject | None) -> "Scene":
        """The scene with object `index` exchanged for `new`, or without it when `new` is `None`."""
        objects = list(self.objects)
        objects[index : index + 1] = [] if new is None else [new]
        return replace(self, objects=tuple(objects))


def caption(scene: Scene) -> str:
    """What a scene shows, as a captioner would say it: "a large red circle and a small blue star over a photo"."""
    things = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.objects]
    listed = " and ".join([", ".join(things[:-1])] * (len(things) > 1) + things[-1:])
    return f"{listed or 'nothing'} over a {scene.background}"


def sample_path(rng: np.random.Generator, motion: str, num_frames: int, radius: float, pace: float) -> np.ndarray:
    time = np.linspace(0.0, pace, num_frames)[:, None]
    low, high = radius * 0.9, 1.0 - radius * 0.9
    start = rng.uniform(low, high, 2)
    if motion == "static":
        path = np.repeat(start[None], num_frames, 0)
    elif motion == "linear":
        angle = rng.uniform(0.0, 2 * np.pi)
        end = np.clip(start + rng.uniform(0.2, 0.45) * np.array([np.cos(angle), np.sin(angle)]), low, high)
        path = start + (end - start) * time
    elif motion == "bounce":
        axis = np.eye(2)[rng.integers(2)]
        path = start + axis * rng.uniform(0.12, 0.25) * np.abs(np.sin(np.pi * rng.uniform(1.0, 2.0) * time))
    else:
        phase = rng.uniform(0.0, 2 * np.pi) + rng.choice([-1.0, 1.0]) * rng.uniform(1.5, 4.0) * time
        reach = rng.uniform(0.08, 0.16)
        path = np.clip(start, low + reach, high - reach) + reach * np.concatenate([np.cos(phase), np.sin(phase)], 1)
    return np.clip(path, low, high)


def sample_scene(
    rng: np.random.Generator,
    num_frames: int = 17,
    height: int = 64,
    width: int = 64,
    photos: tuple[str, ...] = TRAIN_PHOTOS,
    num_objects: tuple[int, int] = (2, 4),
) -> Scene:
    """Draw a scene: 2 to 4 objects, no two alike, mostly apart from one another, over a random background.

    What moves goes all of its way in 17 frames, or in as many as there are if there are more: so that a frame to the
    next is no larger step in a short clip.

    Args:
        rng (`np.random.Generator`): The source of every choice.
        num_frames, height, width (`int`): The clip, in frames and pixels.
        photos (`tuple[str, ...]`): The photographs that the background may show.
        num_objects (`tuple[int, int]`): Least and most objects, both included.
    """
    objects: list[SceneObject] = []
    wanted = int(rng.integers(num_objects[0], num_objects[1] + 1))
    pace = min(1.0, (num_frames - 1) / (WAY - 1))
    for _ in range(60):
        if len(objects) == wanted:
            break
        size, motion = list(SIZES)[rng.integers(len(SIZES))], MOTIONS[rng.integers(len(MOTIONS))]
        path = sample_path(rng, motion, num_frames, SIZES[size], pace)
        shape, colour = SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]
        if any((other.shape, other.colour) == (shape, colour) for other in objects):
            continue
        # occlusions are allowed for a third of the frames
        close = [
            np.linalg.norm(path - np.array(other.path), axis=1) < 0.85 * (SIZES[size] + SIZES[other.size])
            for other in objects
        ]
        if any(frames.mean() > 0.34 for frames in close):
            continue
        objects.append(SceneObject(shape, colour, size, motion, tuple(map(tuple, path.tolist()))))
    background = BACKGROUNDS[rng.choice(3, p=[0.6, 0.25, 0.15])]
    seed = int(rng.integers(2**31))
    return Scene(num_frames, height, width, background, seed, tuple(objects), photos, pace=pace)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline in pixels, negative inside; `x`, `y` are pixel offsets from the centre, y downwards."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius
    if shape == "diamond":
        return (np.abs(x) + 0.8 * np.abs(y) - 1.05 * radius) / np.hypot(1.0, 0.8)
    if shape == "triangle":
        return np.maximum(y - 0.75 * radius, (2.0 * np.abs(x) - y - 1.05 * radius) / np.sqrt(5.0))
    if shape == "cross":
        bar = 0.34 * radius
        upright = np.maximum(np.abs(x) - bar, np.abs(y) - radius)
        return np.minimum(upright, np.maximum(np.abs(y) - bar, np.abs(x) - radius))
    if shape == "star":  # five points: a polar outline between the inner and the outer radius
        angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        inner, outer = 0.5 * 1.1 * radius, 1.1 * radius
        tip = np.array([outer, 0.0])
        notch = inner * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
        normal = normal / np.linalg.norm(normal)
        distance = np.hypot(x, y)
        return distance * np.cos(angle) * normal[0] + distance * np.sin(angle) * normal[1] - tip @ normal
    raise ValueError(f"`shape` has to be one of {SHAPES}, but is {shape!r}")


def coverage(
    scene: Scene, index: int, margin: float = 0.0, rows: slice = slice(None), columns: slice = slice(None)
) -> np.ndarray:
    """Share of each pixel that object `index` covers, before occlusion: `(frames, height, width)` in [0, 1].

    `margin` widens the object on all sides, as a share of the frame's shorter side; `rows` and `columns` cut out the
    pixels that are wanted.
    """
    thing, shorter = scene.objects[index], min(scene.height, scene.width)
    # in float64: machines differ in the last digits of arctan and its like, which float32 would show in some pixels
    path = np.asarray(thing.path) * (scene.width, scene.height)
    x = np.arange(scene.width)[None, None, columns] + 0.5 - path[:, 0, None, None]
    y = np.arange(scene.height)[None, rows, None] + 0.5 - path[:, 1, None, None]
    x, y = np.broadcast_arrays(x, y)
    distance = signed_distance(thing.shape, x, y, thing.radius * shorter) - margin * shorter
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def extent(scene: Scene, index: int, margin: float = 0.0) -> tuple[slice, slice]:
    """Rows and columns outside of which `coverage` of object `index` is 0 in every frame."""
    thing, shorter = scene.objects[index], min(scene.height, scene.width)
    # a diamond is the tallest shape, 1.31 radii; sharp corners widen by more than the margin
    reach = 1.35 * thing.radius * shorter + 3.0 * margin * shorter + 3.0
    path = np.asarray(thing.path) * np.array([scene.width, scene.height])
    low = np.floor(np.maximum(path.min(0) - reach, 0)).astype(int)
    high = np.maximum(np.ceil(path.max(0) + reach), 0).astype(int)
    return slice(low[1], high[1]), slice(low[0], high[0])


def brightness(frames: np.ndarray) -> np.ndarray:
    """Luma of `(..., 3)` frames; summed by hand, as the order of a matrix product's sums is the machine's."""
    red, green, blue = np.moveaxis(frames, -1, 0)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def grade_frames(frames: np.ndarray, grade: str | None) -> np.ndarray:
    """Apply a colour grade to `(..., 3)` float frames in [0, 1]."""
    if grade is None:
        return frames
    if grade == "grey":
        return np.repeat(brightness(frames)[..., None], 3, -1)
    if grade == "warm":
        return np.clip(frames * np.array([1.15, 1.0, 0.65], np.float32) + np.array([0.06, 0.0, 0.0], np.float32), 0, 1)
    if grade == "cold":
        return np.clip(
            frames * np.array([0.65, 0.95, 1.15], np.float32) + np.array([0.0, 0.0, 0.06], np.float32), 0, 1
        )
    if grade == "bright":
        return np.clip(frames * 0.75 + 0.3, 0, 1)
    if grade == "dark":
        return frames * 0.45
    raise ValueError(f"`grade` has to be one of {GRADES}, but is {grade!r}")


def stylise_frames(frames: np.ndarray, style: str | None) -> np.ndarray:
    """Apply a style to `(frames, height, width, 3)` float frames in [0, 1].

    No filter has a hard threshold: rounding that differs between machines stays invisible.
    """
    if style is None:
        return frames
    if style == "sketch":  # dark lines where the brightness changes, on white paper
        luma = brightness(frames)
        padded = np.pad(luma, ((0, 0), (1, 1), (1, 1)), mode="edge")
        across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
        down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
        lines = np.clip(1.0 - 2.5 * np.sqrt(across**2 + down**2), 0.0, 1.0)
        return np.repeat(lines[..., None], 3, -1)
    if style == "poster":  # few levels a channel: a staircase with steep, finite steps
        frames = frames.astype(np.float64)
        for _ in range(3):
            frames = frames - np.sin(6 * np.pi * frames) / (6 * np.pi)  # 1 / 3 apart
        return np.clip(frames, 0.0, 1.0).astype(np.float32)
    if style == "mosaic":  # tiles of a sixteenth of the shorter side
        tile = max(2, min(frames.shape[1:3]) // 16)
        starts = [np.arange(0, side, tile) for side in frames.shape[1:3]]
        sums = np.add.reduceat(np.add.reduceat(frames, starts[0], 1), starts[1], 2)
        sizes = [np.diff(start, append=side) for start, side in zip(starts, frames.shape[1:3], strict=True)]
        tiles = sums / np.multiply.outer(*sizes)[None, :, :, None]
        return np.repeat(np.repeat(tiles, sizes[0], 1), sizes[1], 2).astype(np.float32)
    if style == "negative":
        return 1.0 - frames
    raise ValueError(f"`style` has to be one of {STYLES}, but is {style!r}")


def scene_background(scene: Scene) -> np.ndarray:
    """What a scene shows behind its objects, `(num_frames, height, width, 3)` float32 in [0, 1], without its grade."""
    size = (scene.num_frames, scene.height, scene.width)
    return render_background(scene.background, scene.seed, *size, scene.photos, scene.pace)


def render(scene: Scene, background: np.ndarray | None = None) -> np.ndarray:
    """Render a scene.

    Args:
        scene ([`Scene`]): What to show.
        background (`np.ndarray`, *optional*): Its [`scene_background`], where that is at hand already.

    Returns:
        `np.ndarray` of shape `(num_frames, height, width, 3)`, uint8.
    """
    frames = scene_background(scene) if background is None else background.copy()
    for index, thing in enumerate(scene.objects):
        layers = [] if thing.outline is None else [(OUTLINE_WIDTH, thing.outline)]
        for margin, colour in (*layers, (0.0, thing.colour)):
            rows, columns = extent(scene, index, margin)
            part = frames[:, rows, columns]
            alpha = coverage(scene, index, margin, rows, columns)[..., None]
            part += alpha * (np.array(COLOURS[colour], np.float32) - part)
    frames = stylise_frames(grade_frames(frames, scene.grade), scene.style)
    return np.round(frames * 255.0).astype(np.uint8)
