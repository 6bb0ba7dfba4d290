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


def judge(frames: np.ndarray, edit: Edit, share: float = 0.8) -> str:
    """Name what an edited clip shows: `"success"`, or the failure that it is nearest to.

    The result has to be nearer to the true target than to the source, and than to every wrong edit, in at least
    `share` of the frames. Two clips are told apart where they differ: the source inside the edit's mask, a wrong edit
    inside the mask and wherever it changes something else.

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
    differences = {
        label: np.abs(edit.target_frames.astype(np.int16) - candidate).max(-1) > 2
        for label, candidate in candidates.items()
    }
    shares = {}
    for label, candidate in candidates.items():
        region = edit.mask | differences[label]
        to_target = squared_error(frames, edit.target_frames, region)
        to_candidate = squared_error(frames, candidate, region)
        known = ~np.isnan(to_target)
        shares[label] = (to_target < to_candidate)[known].mean() if known.any() else 1.0
    if min(shares.values()) >= share:
        return "success"
    anywhere = np.logical_or.reduce(list(differences.values()))
    return min(candidates, key=lambda label: np.nanmean(squared_error(frames, candidates[label], anywhere)))


def outside_psnr(frames: np.ndarray, edit: Edit) -> float:
    """PSNR in dB against the true target where nothing was to change; of a grade, which changes all, everywhere."""
    return psnr(frames, edit.target_frames, None if edit.mask.all() else ~edit.mask)
