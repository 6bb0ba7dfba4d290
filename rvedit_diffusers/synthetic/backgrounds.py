"""Moving backgrounds: photographs that ship inside scikit-image and scikit-learn, textures and gradients."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


# Photographs by file; the held-out ones never appear in training data.
TRAIN_PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/ihc.png",
    "skimage/data/camera.png",
    "skimage/data/brick.png",
    "skimage/data/grass.png",
    "skimage/data/gravel.png",
    "sklearn/datasets/images/flower.jpg",
)
TEST_PHOTOS = ("skimage/data/coffee.png", "sklearn/datasets/images/china.jpg")
BACKGROUNDS = ("photo", "texture", "gradient")
SHORT_SIDE = 320
# What a background can be exchanged for: looks that follow from their name, so that the target of a swap is exact.
PATTERNS = ("plain", "striped", "checkered")
WALL_COLOURS = {
    "grey": (0.50, 0.50, 0.50),
    "orange": (0.95, 0.52, 0.12),
    "pink": (0.95, 0.60, 0.74),
    "brown": (0.42, 0.27, 0.16),
}
WALLS = tuple(f"{pattern} {colour} wall" for pattern in PATTERNS for colour in WALL_COLOURS)


@cache
def load_photo(name: str) -> Image.Image:
    """Open a packaged photograph as RGB, its shorter side shrunk to at most `SHORT_SIDE` pixels.

    Args:
        name (`str`): An entry of `TRAIN_PHOTOS` or `TEST_PHOTOS`, `package/path/inside/it`.

    Raises:
        ModuleNotFoundError: The package that carries the photograph is not installed.
    """
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(
            f"the photograph {name!r} ships inside `{package}`: install it with `pip install rvedit_diffusers[train]`"
        )
    photo = Image.open(Path(spec.submodule_search_locations[0]) / inside).convert("RGB")
    factor = min(1.0, SHORT_SIDE / min(photo.size))
    return photo.resize([round(side * factor) for side in photo.size], Image.Resampling.LANCZOS)


def render_photo(rng, num_frames: int, height: int, width: int, photos: tuple[str, ...], pace: float) -> np.ndarray:
    """Pan and zoom over a photograph, mirrored or tinted at random. `(frames, height, width, 3)` in [0, 1]."""
    photo = load_photo(photos[rng.integers(len(photos))])
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    largest = min(photo.width / width, photo.height / height)
    zoom = largest * rng.uniform(0.35, 1.0) * np.linspace(1.0, 1.0 + (rng.uniform(0.88, 1.0) - 1.0) * pace, num_frames)
    room = np.array([photo.width - zoom.max() * width, photo.height - zoom.max() * height])
    start = rng.uniform(0.0, 1.0, 2) * room
    # at most a tenth of the view
    end = np.clip(start + rng.uniform(-0.1, 0.1, 2) * zoom[0] * np.array([width, height]), 0.0, room)
    frames = []
    for index in range(num_frames):
        # rounding may not leave the picture
        left, top = np.maximum(start + (end - start) * pace * index / max(num_frames - 1, 1), 0.0)
        box = (left, top, min(left + zoom[index] * width, photo.width), min(top + zoom[index] * height, photo.height))
        frames.append(np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box=box)))
    clip = np.stack(frames).astype(np.float32) / 255.0
    gain = rng.uniform(0.75, 1.15, 3) if rng.random() < 0.5 else np.full(3, rng.uniform(0.75, 1.15))
    return np.clip(clip * gain.astype(np.float32), 0.0, 1.0)


def render_texture(rng: np.random.Generator, num_frames: int, height: int, width: int, pace: float) -> np.ndarray:
    """Drifting sums of plane waves in two colours. Returns `(frames, height, width, 3)` in [0, 1]."""
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    time = np.linspace(0.0, pace, num_frames)[:, None, None]
    field = np.zeros((num_frames, height, width))
    for _ in range(rng.integers(1, 5)):
        angle, frequency = rng.uniform(0.0, np.pi), rng.uniform(1.0, 7.0)
        wave = 2 * np.pi * frequency * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0.0, 2 * np.pi)
        field += rng.uniform(0.3, 1.0) * np.sin(wave[None] + rng.uniform(-2.0, 2.0) * time)
    if rng.random() < 0.3:
        field = np.tanh(4.0 * field)
    field = (field - field.min()) / max(np.ptp(field), 1e-6)
    return mix_colours(rng, field)


def render_gradient(rng: np.random.Generator, num_frames: int, height: int, width: int, pace: float) -> np.ndarray:
    """A linear blend of two colours, slowly turning. Returns `(frames, height, width, 3)` in [0, 1]."""
    y, x = np.meshgrid(np.linspace(-0.5, 0.5, height), np.linspace(-0.5, 0.5, width), indexing="ij")
    angle = rng.uniform(0.0, 2 * np.pi) + np.linspace(0.0, rng.uniform(-0.6, 0.6) * pace, num_frames)[:, None, None]
    field = np.clip(0.5 + (np.cos(angle) * x + np.sin(angle) * y) * rng.uniform(0.6, 1.2), 0.0, 1.0)
    return mix_colours(rng, field)


def render_wall(name: str, num_frames: int, height: int, width: int) -> np.ndarray:
    """Draw one of `WALLS`, at rest. Returns `(frames, height, width, 3)` in [0, 1]."""
    pattern, colour, _ = name.split()
    tile = min(height, width) / 8
    rows, columns = (np.floor((np.arange(side) + 0.5) / tile) for side in (height, width))
    dark = {"plain": 0 * columns, "striped": columns % 2, "checkered": (rows[:, None] + columns) % 2}[pattern]
    shade = 1.0 - 0.3 * np.broadcast_to(dark, (height, width))
    wall = shade[..., None] * np.array(WALL_COLOURS[colour])
    return np.repeat(wall[None].astype(np.float32), num_frames, 0)


def mix_colours(rng: np.random.Generator, field: np.ndarray) -> np.ndarray:
    # muted colours: saturated ones are left to the objects
    first, second = rng.uniform(0.15, 0.85) + rng.uniform(-0.15, 0.15, (2, 3))
    second = np.clip(second + rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 0.35), 0.0, 1.0)
    return (first + (second - first) * field[..., None]).clip(0.0, 1.0).astype(np.float32)


def render_background(
    kind: str,
    seed: int,
    num_frames: int,
    height: int,
    width: int,
    photos: tuple[str, ...] = TRAIN_PHOTOS,
    pace: float = 1.0,
) -> np.ndarray:
    """Render a background that is a function of its arguments alone.

    Args:
        kind (`str`): One of `BACKGROUNDS` or `WALLS`.
        seed (`int`): Chooses picture, path and colours.
        num_frames, height, width (`int`): The clip, in frames and pixels.
        photos (`tuple[str, ...]`): The photographs that a `photo` background may show.
        pace (`float`, defaults to 1.0): The share of its way that it moves over the clip, in [0, 1].

    Returns:
        `np.ndarray` of shape `(num_frames, height, width, 3)`, float32 in [0, 1].
    """
    rng = np.random.default_rng(seed)
    if kind == "photo":
        return render_photo(rng, num_frames, height, width, photos, pace)
    if kind == "texture":
        return render_texture(rng, num_frames, height, width, pace)
    if kind == "gradient":
        return render_gradient(rng, num_frames, height, width, pace)
    if kind in WALLS:
        return render_wall(kind, num_frames, height, width)
    raise ValueError(f"`kind` of background has to be one of {BACKGROUNDS + WALLS}, but is {kind!r}")
