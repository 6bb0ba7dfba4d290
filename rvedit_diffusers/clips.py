"""Clips in every form that the pipeline takes, as tensors."""

import math
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from .video import Video, read_video


TOLERANCE = 1e-3  # by which resized clips overshoot [0, 1]


def is_count(value) -> bool:
    """Whether `value` is an integer of at least 1; `True` is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1


def resize_frames(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Resize with an antialiased bicubic kernel; frames that have the size already are returned as they are.

    Args:
        frames (`torch.Tensor` of shape `(frames, 3, height, width)`): float32 in [-1, 1].
        size (`tuple[int, int]`): The new `(height, width)`.
    """
    if tuple(frames.shape[2:]) == size:
        return frames
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp_(-1.0, 1.0)


def transfer_edit(
    edited: torch.Tensor,
    rebuilt: torch.Tensor,
    source: torch.Tensor,
    radius: int = 4,
    eps: float = 1e-3,
    tolerance: float = 0.12,
) -> torch.Tensor:
    """
    Apply an edit that was made on a small or blurred copy of a clip to the clip itself, whose detail it keeps.

    The change from `rebuilt` to `edited` is written as an affine function of the colour for the whole frame, as a
    grade is one; then what that leaves as one for the surroundings of each pixel (the fast guided filter, He and Sun,
    arXiv 1505.00996, of the change, with colours as the guide); and what is left then. The functions are applied to
    the colours of `source`, the rest is added as it is. Where nothing was changed, the result is exactly the source.

    Where something else has come to be seen, the detail of `source` is that of what was there before: the more the
    colours of `edited` say nothing about those of `rebuilt` around a pixel, or these nothing about those, the more
    the result is `edited` itself. So is a frame whose detail the edit takes away, as a mosaic does: what is finer
    than 3 pixels of the copy has less than 0.8 of the amplitude that the frame's grade leaves it, and less than 0.85
    in 60 % of the places that have any; in part from 0.9 and 40 % on. A frame that is graded as well, by more than 0.1
    (root mean square), keeps part of its detail, and by more than 0.2 all: in the dark, copies are blurred more.

    Args:
        edited (`torch.Tensor` of shape `(frames, 3, height, width)`): The edited copy, float32 in [-1, 1].
        rebuilt (`torch.Tensor` of the same shape): The copy as it is without an edit, after all that blurs `edited`.
        source (`torch.Tensor` of shape `(frames, 3, source_height, source_width)`): The clip, float32 in [-1, 1].
        radius (`int`, defaults to 4): Of the windows, in pixels of the copy.
        eps (`float`, defaults to 1e-3): A window whose colours have less than this variance counts as flat.
        tolerance (`float`, defaults to 0.12): Root mean square of a pixel's change, and of the colours around it that
            are not explained: where the lesser of both is this much, the result is half `edited`.

    Returns:
        `torch.Tensor` of the shape of `source`, float32 in [-1, 1].
    """
    size = source.shape[2:]

    def everywhere(values: torch.Tensor) -> torch.Tensor:
        return values.mean(dim=(2, 3), keepdim=True)

    def around(values: torch.Tensor, radius: int = radius) -> torch.Tensor:
        for window, padding in (((2 * radius + 1, 1), (radius, 0)), ((1, 2 * radius + 1), (0, radius))):
            values = F.avg_pool2d(values, window, 1, padding, count_include_pad=False)
        return values

    def apply(slope: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        return (slope.unflatten(1, (3, 3)) * guide.unsqueeze(2)).sum(1)

    def fit(guide: torch.Tensor, values: torch.Tensor, mean: Callable) -> tuple[torch.Tensor, ...]:
        # Least squares of `values` over `guide` in each window: slope (frames, 9, height, width), offset, and the mean
        # square of what is left
        both = torch.cat([guide, values], dim=1)
        products = mean((guide.unsqueeze(2) * both.unsqueeze(1)).flatten(1, 2))
        products = products - (mean(guide).unsqueeze(2) * mean(both).unsqueeze(1)).flatten(1, 2)
        variance, covariance = products.unflatten(1, (3, 6)).permute(0, 3, 4, 1, 2).split(3, dim=-1)
        slope = torch.linalg.solve(variance + eps * torch.eye(3, device=guide.device), covariance)
        explained = (slope * covariance).sum(-2).permute(0, 3, 1, 2)
        left = (mean(values.square()) - mean(values).square() - explained).mean(1, keepdim=True).clamp_(min=0.0)
        slope = slope.flatten(-2).permute(0, 3, 1, 2)
        return slope, mean(values) - apply(slope, mean(guide)), left

    # 1. Functions for the frame, and for the surroundings: a pixel gets the mean of those of all windows it is in
    result, rest = source, edited - rebuilt
    for mean in (everywhere, around):
        slope, offset, _ = fit(rebuilt, rest, mean)
        slope, offset = mean(slope), mean(offset)
        rest = rest - apply(slope, rebuilt) - offset
        if mean is everywhere:
            local = rest
        else:
            slope, offset = (F.interpolate(values, size=size, mode="bilinear") for values in (slope, offset))
        result = result + apply(slope, source) + offset
    result = (result + F.interpolate(rest, size=size, mode="bicubic")).clamp_(-1.0, 1.0)

    # 2. Where the frame's function leaves a change, and one of both copies does not follow from the other
    graded = edited - local
    changed = around(local.square(), 1).mean(1, keepdim=True)
    unlike = torch.maximum(*(fit(*pair, around)[2] for pair in ((graded, edited), (edited, graded))))
    weight = (torch.minimum(changed, unlike) / tolerance**2).square()
    weight = F.interpolate(weight / (1.0 + weight), size=size, mode="bilinear")

    # 3. Where the frame has lost what is fine in it: in sum, and in most places
    before, after = (around((copy - around(copy, 1)).square()).mean(1).flatten(1) for copy in (graded, edited))
    left = (after.sum(1) / before.sum(1).clamp(min=eps)).sqrt()
    detailed = before > eps / 2
    lost = ((after < 0.85**2 * before) & detailed).sum(1) / detailed.sum(1).clamp(min=1)
    faded = torch.minimum((0.9 - left) / 0.1, (lost - 0.4) / 0.2).clamp(0.0, 1.0)
    faded = faded * (2.0 - 10.0 * (graded - rebuilt).square().mean((1, 2, 3)).sqrt()).clamp(0.0, 1.0)
    weight = torch.maximum(weight, faded.view(-1, 1, 1, 1))
    return result.lerp(F.interpolate(edited, size=size, mode="bicubic"), weight).clamp_(-1.0, 1.0)


def longest_clip(transformer_config: Mapping, scale_factor_temporal: int) -> int:
    """
    The number of frames that a transformer has positions for.

    Args:
        transformer_config (`Mapping`): Of an [`RVEDiTTransformer3DModel`], whole.
        scale_factor_temporal (`int`): Frames of the clip in a latent frame, of which the first holds one.
    """
    latent_frames = transformer_config["rope_max_seq_len"] * transformer_config["patch_size"][0]
    return (latent_frames - 1) * scale_factor_temporal + 1


def load_clips(
    video, num_frames: int | None = None, max_frames: int | None = None, fps: float | list[float] | None = None
) -> tuple[list[torch.Tensor], list[float | None]]:
    """
    One clip or a batch of clips as a list of tensors.

    Args:
        video: See [`RVEDiTPipeline.__call__`].
        num_frames (`int`, *optional*): Keep this many frames of each clip, from the first.
        max_frames (`int`, *optional*): Longer clips are refused; of a file no more is decoded.
        fps (`float` or `list[float]`, *optional*): Frames per second, for all clips or for each.

    Returns:
        `tuple`: a list of one `(frames, 3, height, width)` for each clip, uint8 in [0, 255] or float32 in [0, 1], and
        a list of the clips' frames per second: `fps`, otherwise that of a file or [`Video`], otherwise `None`.

    Raises:
        `TypeError`, `ValueError`: naming `video` or the clip `video[i]`, `num_frames` or `fps`.
    """
    if num_frames is not None and not is_count(num_frames):
        raise ValueError(f"`num_frames` has to be an integer of at least 1, got {num_frames!r}.")
    for rate in fps if isinstance(fps, (list, tuple)) else [fps]:
        if rate is None and fps is None:
            break
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 < rate < math.inf:
            raise ValueError(f"`fps` has to be a number above 0, or a list of them, got {fps!r}.")

    if isinstance(video, (np.ndarray, torch.Tensor)):
        if video.ndim not in (4, 5):
            raise ValueError(
                "`video` has to be an array (frames, height, width, 3) or a tensor (frames, 3, height, width), with"
                f" one more axis for a batch, got shape {tuple(video.shape)}."
            )
        items = list(video) if video.ndim == 5 else [video]
    elif isinstance(video, (list, tuple)):
        if len(video) == 0:
            raise ValueError("`video` has to hold at least one frame, got an empty list.")
        is_frame = [
            isinstance(item, PIL.Image.Image) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 3)
            for item in video
        ]
        if any(is_frame) and not all(is_frame):
            raise TypeError("`video` has to be a list of frames or a list of clips, got frames and clips mixed.")
        items = [video] if all(is_frame) else video
    else:
        items = [video]
    if len(items) == 0:
        raise ValueError(f"`video` has to hold at least one clip, got shape {tuple(video.shape)}.")

    if isinstance(fps, (list, tuple)) and len(fps) != len(items):
        raise ValueError(f"`fps` has to be one number, or one for each of the {len(items)} clips, got {fps!r}.")

    is_batch = items is video or len(items) > 1
    clips, rates = [], []
    for index, item in enumerate(items):
        clip, rate = _load_clip(f"video[{index}]" if is_batch else "video", item, num_frames, max_frames)
        clips.append(clip)
        rates.append(rate)
    if fps is not None:
        rates = [float(rate) for rate in (fps if isinstance(fps, (list, tuple)) else [fps] * len(clips))]
    return clips, rates


def _load_clip(name: str, video, num_frames: int | None, max_frames: int | None) -> tuple[torch.Tensor, float | None]:
    # 1. To one array or tensor, no longer than it has to be
    rate = None
    if isinstance(video, (str, os.PathLike)):
        if not Path(video).is_file():
            raise ValueError(f"`{name}` has to be a video file, but there is no file {str(video)!r}.")
        try:
            enough = None if max_frames is None else max_frames + 1
            video = read_video(video, max_frames=num_frames if num_frames is not None else enough)
        except ValueError as error:
            raise ValueError(f"`{name}` has to be a video file: {error}") from error
    if isinstance(video, Video):
        video, rate = video.frames, float(video.fps)
    if isinstance(video, (list, tuple, np.ndarray, torch.Tensor)):
        length = len(video)
        if num_frames is not None and 0 < length < num_frames:
            raise ValueError(f"`num_frames` has to be at most the clip's length, {length} frames, got {num_frames}.")
        if max_frames is not None and min(length, num_frames or length) > max_frames:
            raise ValueError(
                f"`{name}` has more frames than the {max_frames} that this transformer has positions for: pass"
                " `num_frames`, or cut the clip into pieces."
            )
        video = video[:num_frames]
    if isinstance(video, (list, tuple)):
        if len(video) == 0:
            raise ValueError(f"`{name}` has to hold at least one frame, got an empty list.")
        kinds = {
            kind for kind in (PIL.Image.Image, np.ndarray, torch.Tensor) for frame in video if isinstance(frame, kind)
        }
        if len(kinds) != 1 or not all(isinstance(frame, tuple(kinds)) for frame in video):
            found = sorted({type(frame).__name__ for frame in video})
            raise TypeError(f"`{name}` has to be a list of PIL images, of arrays or of tensors, got {found}.")
        is_images = kinds == {PIL.Image.Image}
        sizes = {frame.size if is_images else tuple(frame.shape) for frame in video}
        if len(sizes) > 1:
            raise ValueError(f"`{name}` has to have frames of one size, got {sorted(sizes)}.")
        if is_images:
            video = [np.asarray(image.convert("RGB")) for image in video]
        video = torch.stack(list(video)) if kinds == {torch.Tensor} else np.stack(video)

    # 2. Layout
    if isinstance(video, np.ndarray):
        if video.ndim != 4 or video.shape[3] != 3:
            raise ValueError(f"`{name}` has to be an array (frames, height, width, 3), got shape {video.shape}.")
        if video.dtype != np.uint8 and video.dtype.kind != "f":
            raise TypeError(f"`{name}` has to be uint8 in [0, 255] or floating point in [0, 1], got {video.dtype}.")
        clip = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
    elif isinstance(video, torch.Tensor):
        if video.ndim != 4 or video.shape[1] != 3:
            raise ValueError(
                f"`{name}` has to be a tensor (frames, 3, height, width), got shape {tuple(video.shape)}."
            )
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise TypeError(f"`{name}` has to be uint8 in [0, 255] or floating point in [0, 1], got {video.dtype}.")
        clip = video.detach()
    else:
        raise TypeError(
            f"`{name}` has to be a path, a list of PIL images, an array, a tensor, or a list of those, got"
            f" {type(video).__name__}."
        )
    if clip.numel() == 0:
        raise ValueError(f"`{name}` has to have at least one frame and one pixel, got shape {tuple(video.shape)}.")

    # 3. Range
    if clip.dtype != torch.uint8:
        clip = clip.float()
        low, high = (bound.item() for bound in clip.aminmax())  # NaN if one pixel is
        if not (low >= -TOLERANCE and high <= 1.0 + TOLERANCE):
            found = "NaN" if math.isnan(low) else f"[{low:.4g}, {high:.4g}]"
            raise ValueError(f"`{name}` has to lie in [0, 1], if floating point, got {found}.")
        if low < 0.0 or high > 1.0:
            clip = clip.clamp(0.0, 1.0)
    return clip, rate
