"""How clips differ, from pixels alone; and whether a single edit happened, to the right object, and nothing else."""

from itertools import pairwise

import numpy as np

from .edits import Edit
from .scenes import render


EDIT_DIFFERENCE = 20  # of 255, from which on a pixel counts as edited


def squared_error(frames: np.ndarray, other: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Mean squared difference of uint8 clips inside `region`, per frame; `nan` in frames without any region.

    Args:
        frames, other (`np.ndarray` of shape `(frames, height, width, 3)`): uint8.
        region (`np.ndarray` of shape `(frames, height, width)`): bool.

    Returns:
        `np.ndarray` of shape `(frames,)`, float64, of values in [0, 255**2].
    """
    error = np.square(frames.astype(np.float64) - other).mean(-1)
    size = region.sum((1, 2))
    return np.where(size > 0, (error * region).sum((1, 2)) / np.maximum(size, 1), np.nan)


def psnr(frames: np.ndarray, other: np.ndarray, region: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of uint8 clips, over `region` of all frames together.

    Args:
        frames, other (`np.ndarray` of shape `(frames, height, width, 3)`): uint8.
        region (`np.ndarray` of shape `(frames, height, width)`, *optional*): bool; everywhere by default.
    """
    total, count = 0.0, 0
    for time, (one, another) in enumerate(zip(frames, other, strict=True)):  # a long clip has no room for copies
        error = np.square(one.astype(np.float64) - another).mean(-1)
        error = error if region is None else error[region[time]]
        total, count = total + error.sum(), count + error.size
    mean = total / count if count else np.nan
    return float(10 * np.log10(255.0**2 / max(mean, 1e-10)))


def differs(frames: np.ndarray, other: np.ndarray, threshold: int = 2) -> np.ndarray:
    """Where two uint8 clips differ by more than `threshold` of 255 in a channel: `(frames, height, width)` bool."""
    red, green, blue = np.moveaxis(np.abs(frames.astype(np.int16) - other), -1, 0)
    return np.maximum(np.maximum(red, green), blue) > threshold  # many times faster than max(-1)


def share_nearer(frames: np.ndarray, target: np.ndarray, other: np.ndarray, region: np.ndarray) -> float:
    """Share of the frames in which `frames` is nearer to `target` than to `other` inside `region`, in [0, 1].

    Frames in which the two are alike there do not count; 1 if they are alike in all.

    Args:
        frames, target, other (`np.ndarray` of shape `(frames, height, width, 3)`): uint8.
        region (`np.ndarray` of shape `(frames, height, width)`): bool.
    """
    differ = (region & differs(target, other)).any((1, 2))
    nearer = squared_error(frames, target, region) < squared_error(frames, other, region)
    return float(nearer[differ].mean()) if differ.any() else 1.0


def judge(frames: np.ndarray, edit: Edit, share: float = 0.8) -> str:
    """Name what an edited clip shows: `"success"`, or the failure that it is nearest to.

    In at least `share` of the frames the result has to be nearer to the true target than to the source and to every
    wrong edit. It is compared inside the edit's mask, and with each wrong edit also in what that edit alone changes:
    an edit of several objects at once is no success.

    Args:
        frames (`np.ndarray` of shape `(frames, height, width, 3)`): The edited clip, uint8.
        edit ([`Edit`]): What was asked for.
        share (`float`, defaults to 0.8): In (0, 1].

    Returns:
        `str`: `"success"`, `"no edit"`, or a key of `edit.wrong_candidates()`.
    """
    if frames.shape != edit.source_frames.shape or frames.dtype != np.uint8:
        raise ValueError(
            f"`frames` has to be uint8 of shape {edit.source_frames.shape}, but is {frames.dtype} of {frames.shape}"
        )
    candidates = {"no edit": edit.source_frames}
    candidates |= {label: render(scene) for label, scene in edit.wrong_candidates().items()}
    target, elsewhere = edit.target_frames, ~edit.mask
    failures = [
        label
        for label, candidate in candidates.items()
        if share_nearer(frames, target, candidate, edit.mask) < share
        or share_nearer(frames, target, candidate, elsewhere & differs(target, candidate)) < share
    ]
    if not failures:
        return "success"
    anywhere = np.logical_or.reduce([differs(target, candidate) for candidate in candidates.values()])
    return min(failures, key=lambda label: np.nanmean(squared_error(frames, candidates[label], anywhere)))


def outside_psnr(frames: np.ndarray, edit: Edit) -> float:
    """PSNR in dB against the true target where nothing was to change; of a grade, which changes all, everywhere."""
    return psnr(frames, edit.target_frames, None if edit.mask.all() else ~edit.mask)


def ssim(frames: np.ndarray, other: np.ndarray, region: np.ndarray | None = None) -> float:
    """Structural similarity of uint8 clips, in [-1, 1], averaged over `region` of all frames.

    Args:
        frames, other (`np.ndarray` of shape `(frames, height, width, 3)`): uint8, at least 7 pixels high and wide.
        region (`np.ndarray` of shape `(frames, height, width)`, *optional*): bool; everywhere by default. The windows
            of 7 pixels around its rim look beyond it.
    """
    from skimage.metrics import structural_similarity

    pairs = zip(frames, other, strict=True)
    maps = np.stack([structural_similarity(*pair, channel_axis=-1, full=True)[1].mean(-1) for pair in pairs])
    return float(maps.mean() if region is None else maps[region].mean())


def edit_map(frames: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Where a clip was edited: `(frames, height, width)` bool.

    The difference from the source is averaged over 3 x 3 pixels, so that the noise of an autoencoder is no edit.

    Args:
        frames, source (`np.ndarray` of shape `(frames, height, width, 3)`): uint8.
    """
    found = np.empty(frames.shape[:3], bool)
    for time, (one, another) in enumerate(zip(frames, source, strict=True)):
        difference = one.astype(np.float32) - another
        for axis in (0, 1):
            padded = np.pad(difference, [(int(a == axis),) * 2 for a in range(3)], mode="edge")
            low, high = (np.take(padded, range(start, start + difference.shape[axis]), axis) for start in (0, 2))
            difference = (low + difference + high) / 3
        found[time] = np.abs(difference).max(-1) > EDIT_DIFFERENCE
    return found


def edit_overlap(frames: np.ndarray, source: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Compare where a clip was edited with where it had to be.

    Args:
        frames, source, target (`np.ndarray` of shape `(frames, height, width, 3)`): uint8.

    Returns:
        `dict[str, float]`: `edit_iou`, `edit_precision` (1 without any leakage; `nan` where nothing was edited) and
        `edit_recall`, each in [0, 1].
    """
    found, wanted = edit_map(frames, source), edit_map(target, source)
    both = float((found & wanted).sum())
    return {
        "edit_iou": both / max(int((found | wanted).sum()), 1),
        "edit_precision": both / int(found.sum()) if found.any() else float("nan"),
        "edit_recall": both / max(int(wanted.sum()), 1),
    }


def flicker(frames: np.ndarray, target: np.ndarray) -> float:
    """How much a clip changes from frame to frame other than the target does, in [0, 510] of 255; 0 of the target.

    The mean absolute difference of the two clips' frame differences.

    Args:
        frames, target (`np.ndarray` of shape `(frames, height, width, 3)`): uint8, at least 2 frames.
    """
    differences = (one.astype(np.float32) - another for one, another in zip(frames, target, strict=True))
    return float(np.mean([np.abs(later - now).mean() for now, later in pairwise(differences)]))


def optical_flow(source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DIS optical flow from each frame to the next one, and where it can be believed.

    Args:
        source (`np.ndarray` of shape `(frames, height, width, 3)`): uint8, at least 2 frames.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The way of each pixel, `(frames - 1, height, width, 2)` float32 as (x, y) in
        pixels; and where it ends inside of the frame and the flow back agrees with it (Sundaram et al. 2010),
        `(frames - 1, height, width)` bool.

    Raises:
        ModuleNotFoundError: OpenCV is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "optical flow needs OpenCV: install it with `pip install opencv-python-headless`"
        ) from error

    height, width = source.shape[1:3]
    scale = max(1.0, 256 / min(height, width))  # its patches are 8 pixels: objects of a small clip would be lost
    large = (round(width * scale), round(height * scale))
    grey = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), large, interpolation=cv2.INTER_CUBIC) for f in source]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))

    def flow(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        moved = cv2.resize(dis.calc(one, other, None), (width, height), interpolation=cv2.INTER_AREA)
        return moved * np.float32([width / large[0], height / large[1]])

    ways, valid = [], []
    for one, other in zip(grey, grey[1:]):
        forth, back = flow(one, other), flow(other, one)
        returned = cv2.remap(back, x + forth[..., 0], y + forth[..., 1], cv2.INTER_LINEAR)
        tolerance = 0.01 * (np.square(forth).sum(-1) + np.square(returned).sum(-1)) + 0.5
        ends = np.stack([x, y], -1) + forth
        inside = ((ends >= 0) & (ends <= (width - 1, height - 1))).all(-1)
        ways.append(forth)
        valid.append(inside & (np.square(forth + returned).sum(-1) < tolerance))
    return np.stack(ways), np.stack(valid)


def warping_error(
    frames: np.ndarray, motion: tuple[np.ndarray, np.ndarray], region: np.ndarray | None = None
) -> float:
    """How far each frame is from the next one, moved back along the motion of the source: E_warp of Lai et al. 2018.

    Args:
        frames (`np.ndarray` of shape `(frames, height, width, 3)`): uint8.
        motion (`tuple[np.ndarray, np.ndarray]`): The [`optical_flow`] of the source.
        region (`np.ndarray` of shape `(frames, height, width)`, *optional*): bool; everywhere by default. What an edit
            moves or uncovers does not move as the source does, and has to be left out.

    Returns:
        `float`: Mean squared difference of pixels in [0, 1]; `nan` where nothing can be compared.

    Raises:
        ModuleNotFoundError: OpenCV is not installed.
    """
    import cv2

    height, width = frames.shape[1:3]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    region = np.ones(frames.shape[:3], bool) if region is None else region
    errors = []
    for time, (way, valid) in enumerate(zip(*motion, strict=True)):
        at = (x + way[..., 0], y + way[..., 1])
        now, later = frames[time].astype(np.float32) / 255, frames[time + 1].astype(np.float32) / 255
        stays = cv2.remap(region[time + 1].astype(np.float32), *at, cv2.INTER_LINEAR) == 1
        error = np.square(now - cv2.remap(later, *at, cv2.INTER_LINEAR)).mean(-1)
        errors.append(error[valid & region[time] & stays])
    errors = np.concatenate(errors)
    return float(errors.mean()) if errors.size else float("nan")
