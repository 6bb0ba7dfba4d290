"""Did the edit happen, to the right object, and nothing else? Every wrong edit can be rendered and compared."""

import numpy as np

from .edits import Edit
from .scenes import render


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
    error = np.square(frames.astype(np.float64) - other).mean(-1)
    mean = error.mean() if region is None else error[region].mean()
    return float(10 * np.log10(255.0**2 / max(mean, 1e-10)))


def differs(frames: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where two uint8 clips differ by more than 2 of 255: `(frames, height, width)` bool."""
    return np.abs(frames.astype(np.int16) - other).max(-1) > 2


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
