"""The MLLM's front: clips and instructions become a Qwen-VL's inputs and masks of editing slots and visual tokens."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
import transformers
from tokenizers import AddedToken
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoConfig, AutoProcessor, BatchFeature
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize
from transformers.processing_utils import ProcessorMixin
from transformers.video_utils import VideoMetadata


class RVEDiTProcessor(ProcessorMixin):
    """Turns clips and editing instructions into the inputs of a Qwen2.5-VL or Qwen3-VL, ending in editing-token slots.

    It wraps the MLLM's own processor, which keeps the chat template, the expansion of a clip into its visual tokens
    and (Qwen3-VL) the time stamps. One sample reads: system turn, user turn with instruction and clip, assistant
    header, `num_edit_tokens` slots. [`RVEDiTTokenDistiller`] puts its queries into the slots. Masks are made from
    token ids, so neither padding nor the template can shift them.

    Make one with [`~RVEDiTProcessor.from_mllm`]; `save_pretrained` and `from_pretrained` keep every setting.

    Args:
        image_processor: The MLLM's image processor.
        tokenizer: The MLLM's tokenizer. Its `padding_side` is honoured.
        video_processor: The MLLM's video processor. It normalises and patchifies; frame sampling and size are decided
            here, from the settings below, the same way for every MLLM.
        chat_template (`str`): The MLLM's chat template.
        mllm_processor_class (`str`): Name of the transformers processor class that is wrapped.
        num_edit_tokens (`int`, defaults to 64): Slots per sample.
        max_frames (`int`, defaults to 16): At most so many frames of a clip are seen, at least the MLLM's temporal
            patch size. They are spread uniformly and include the first and the last one. The last frame is repeated
            where the temporal patch size asks for it.
        max_pixels (`int`, defaults to 512 * 512): Upper bound of height * width of one frame.
        min_pixels (`int`, defaults to 56 * 56): Lower bound of height * width of one frame; smaller frames are
            enlarged.
        instruction_first (`bool`, defaults to `True`): Instruction before the clip, so that the causal visual tokens
            have read it.
        edit_token (`str`, defaults to `"<|vision_pad|>"`): The token that marks a slot; the chat template must not use
            it. Its own embedding is never read. `<|vision_pad|>` is in every Qwen-VL tokenizer and in no Qwen-VL
            prompt.
        default_fps (`float`, defaults to 16.0): Frames per second of a clip whose rate is not given. Only time stamps
            depend on it.

    Raises:
        TypeError, ValueError: If a setting is of a wrong type or out of its range; it names the setting.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        mllm_processor_class: str = "Qwen2_5_VLProcessor",
        num_edit_tokens: int = 64,
        max_frames: int = 16,
        max_pixels: int = 512 * 512,
        min_pixels: int = 56 * 56,
        instruction_first: bool = True,
        edit_token: str = "<|vision_pad|>",
        default_fps: float = 16.0,
    ):
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        self.mllm_processor_class = mllm_processor_class
        self.num_edit_tokens = num_edit_tokens
        self.max_frames = max_frames
        self.max_pixels = max_pixels
        self.min_pixels = min_pixels
        self.instruction_first = instruction_first
        self.edit_token = edit_token
        self.default_fps = default_fps
        self._check_settings()
        self.edit_token_id = tokenizer.convert_tokens_to_ids(edit_token)
        self.video_token_id = self.mllm_processor.video_token_id
        added_tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._added_token_pattern = re.compile("|".join(re.escape(token) for token in added_tokens))

    @classmethod
    def from_mllm(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        num_edit_tokens: int = 64,
        max_frames: int = 16,
        max_pixels: int = 512 * 512,
        min_pixels: int = 56 * 56,
        instruction_first: bool = True,
        edit_token: str = "<|vision_pad|>",
        default_fps: float = 16.0,
        **kwargs,
    ) -> RVEDiTProcessor:
        """Wrap the processor of a Qwen2.5-VL or Qwen3-VL checkpoint.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of the checkpoint.
            num_edit_tokens, max_frames, max_pixels, min_pixels, instruction_first, edit_token, default_fps: See the
                class. An `edit_token` that the tokenizer lacks is added to it.
            kwargs: Passed to `AutoProcessor.from_pretrained` (`revision`, `subfolder`, `token`, ...).

        Raises:
            ValueError: If the checkpoint's processor takes no video, a setting is out of range, or an added
                `edit_token` would get an id beyond the MLLM's embedding (the embedding is never resized: choose a
                token that exists).
        """
        mllm_processor = AutoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not hasattr(mllm_processor, "video_processor") or not hasattr(mllm_processor, "video_token"):
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a Qwen2.5-VL or Qwen3-VL checkpoint, but the processor of"
                f" {str(pretrained_model_name_or_path)!r} is a {type(mllm_processor).__name__}, which takes no video."
            )
        tokenizer = mllm_processor.tokenizer
        if isinstance(edit_token, str) and edit_token and edit_token not in tokenizer.get_added_vocab():
            tokenizer.add_tokens([AddedToken(edit_token, special=True, normalized=False)])
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
            num_rows = config.get_text_config().vocab_size
            if tokenizer.convert_tokens_to_ids(edit_token) >= num_rows:
                raise ValueError(
                    f"`edit_token` {edit_token!r} is not in the tokenizer and has no room in the MLLM's embedding of"
                    f" {num_rows} rows. Choose a token that the tokenizer has and the chat template does not use."
                )
        video_processor = mllm_processor.video_processor
        if getattr(video_processor, "cap_pixels_per_frame", False) is None:
            # Undecided, the video processor warns about sizes, which are not its business here.
            video_processor.cap_pixels_per_frame = False
        return cls(
            image_processor=mllm_processor.image_processor,
            tokenizer=tokenizer,
            video_processor=video_processor,
            chat_template=mllm_processor.chat_template or tokenizer.chat_template,
            mllm_processor_class=type(mllm_processor).__name__,
            num_edit_tokens=num_edit_tokens,
            max_frames=max_frames,
            max_pixels=max_pixels,
            min_pixels=min_pixels,
            instruction_first=instruction_first,
            edit_token=edit_token,
            default_fps=default_fps,
        )

    @property
    def mllm_processor(self) -> ProcessorMixin:
        """The MLLM's own processor, over this one's tokenizer, image and video processor and chat template."""
        mllm_processor_class = getattr(transformers, self.mllm_processor_class)
        return mllm_processor_class(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            video_processor=self.video_processor,
            chat_template=self.chat_template,
        )

    @property
    def model_input_names(self) -> list[str]:
        return self.mllm_processor.model_input_names + ["edit_mask", "visual_mask", "visual_positions"]

    def __call__(
        self,
        videos,
        text: str | Sequence[str],
        fps: float | Sequence[float] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """
        Args:
            videos: One clip or a list of clips, of any lengths and sizes. A clip is a `torch.Tensor` or `np.ndarray`
                of shape `(frames, 3, height, width)` or `(frames, height, width, 3)`, uint8 in [0, 255] or floating
                point in [0, 1], or a list of `PIL.Image`. A tensor or array with 5 dimensions is a batch. Where both
                layouts fit (height or width of 3), a tensor is read as channels first and an array as channels last.
            text (`str` or `list[str]`): One instruction per clip. It may not contain tokens of the tokenizer's added
                vocabulary, such as `<|video_pad|>`.
            fps (`float` or `list[float]`, *optional*): Frames per second of the clips, > 0; default `default_fps`.
                Only the time stamps that the MLLM sees depend on it.
            return_tensors (`str`, defaults to `"pt"`): Only `"pt"`.

        Returns:
            `BatchFeature`: What the MLLM's own processor returns (`input_ids`, `attention_mask`, `mm_token_type_ids`
            of shape `(batch, seq)`, `pixel_values_videos`, `video_grid_thw`, ...), and

            - `edit_mask`, bool `(batch, seq)`: the slots, `num_edit_tokens` in each row;
            - `visual_mask`, bool `(batch, seq)`: the clip's visual tokens;
            - `visual_positions`, float32 `(batch, num_visual, 3)`: (time, row, column) of the visual tokens as
              fractions of the clip, in the order of `visual_mask`; the `n_i` tokens of sample `i` are its first rows,
              the others are 0. Time is `frame / (frames - 1)`, averaged over the frames of the temporal patch; row and
              column are cell centres in (0, 1).

            Move it with `.to(device)`, without a dtype: the MLLM casts the pixels itself and positions need float32.

        Raises:
            TypeError, ValueError: Naming the argument, before any frame is processed.
        """
        if return_tensors != "pt":
            raise ValueError(f'`return_tensors` must be "pt", got {return_tensors!r}.')
        text = self._check_text(text)
        clips = _split_clips(videos)
        if len(clips) != len(text):
            raise ValueError(
                f"`videos` and `text` must have the same length, got {len(clips)} clip(s) and {len(text)} text(s)."
            )
        fps = self._check_fps(fps, len(clips))
        clips = [_to_frames(clip, f"videos[{index}]") for index, clip in enumerate(clips)]
        sizes = [self._frame_size(clip, f"videos[{index}]") for index, clip in enumerate(clips)]

        # 1. The frames that the MLLM sees, at the size at which it sees them
        frame_indices = [self.sample_frames(clip.shape[0]) for clip in clips]
        frames = [_sample_and_resize(*item) for item in zip(clips, frame_indices, sizes)]

        # 2. The MLLM's own inputs
        metadata = [
            # Frames repeated at the end of a short clip do not raise its rate, hence the maximum.
            VideoMetadata(total_num_frames=max(clip.shape[0], len(indices)), fps=rate, frames_indices=list(indices))
            for clip, indices, rate in zip(clips, frame_indices, fps)
        ]
        inputs = self.mllm_processor(
            text=self._render(text),
            videos=frames,
            video_metadata=metadata,
            do_sample_frames=False,
            do_resize=False,
            input_data_format="channels_first",
            padding=True,
            return_tensors="pt",
        )

        # 3. Where the slots and the visual tokens are
        inputs["edit_mask"] = inputs["input_ids"] == self.edit_token_id
        inputs["visual_mask"] = inputs["input_ids"] == self.video_token_id
        inputs["visual_positions"] = self._visual_positions(clips, frame_indices, inputs["video_grid_thw"])
        assert (inputs["edit_mask"].sum(1) == self.num_edit_tokens).all()
        return inputs

    def sample_frames(self, num_frames: int) -> list[int]:
        """The frames of a clip that the MLLM sees.

        Args:
            num_frames (`int`): Length of the clip, > 0.

        Returns:
            `list[int]`: Increasing frame indices, at most `max_frames`, from 0 to `num_frames - 1` in uniform steps.
            Their number is a multiple of the temporal patch size; the last index is repeated where a short clip falls
            short of one.
        """
        patch = self.video_processor.temporal_patch_size
        count = min(num_frames, self.max_frames // patch * patch)
        last = num_frames - 1
        # Integer arithmetic rounds half up everywhere, so that the choice does not depend on a float library.
        indices = [(2 * i * last + count - 1) // (2 * (count - 1)) for i in range(count)] if count > 1 else [0]
        return indices + [last] * (-count % patch)

    def _render(self, text: list[str]) -> list[str]:
        conversations = []
        for instruction in text:
            content = [{"type": "text", "text": instruction}, {"type": "video"}]
            if not self.instruction_first:
                content.reverse()
            conversations.append([{"role": "user", "content": content}])
        prompts = self.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        return [prompt + self.edit_token * self.num_edit_tokens for prompt in prompts]

    def _visual_positions(
        self, clips: list[torch.Tensor], frame_indices: list[list[int]], video_grid_thw: torch.Tensor
    ) -> torch.Tensor:
        merge = self.video_processor.merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in video_grid_thw.tolist()]
        positions = torch.zeros(len(clips), max(math.prod(grid) for grid in grids), 3)  # (batch, num_visual, 3)
        for row, clip, indices, (t, h, w) in zip(positions, clips, frame_indices, grids):
            time = torch.tensor(indices, dtype=torch.float32).view(t, -1).mean(1) / max(clip.shape[0] - 1, 1)
            y = (torch.arange(h) + 0.5) / h
            x = (torch.arange(w) + 0.5) / w
            row[: t * h * w] = torch.stack(torch.meshgrid(time, y, x, indexing="ij"), dim=-1).view(-1, 3)
        return positions

    def _frame_size(self, frames: torch.Tensor, name: str) -> tuple[int, int]:
        height, width = frames.shape[-2:]
        if max(height, width) > 200 * min(height, width):
            raise ValueError(
                f"`{name}` has frames of {height} x {width}: the longer side may be at most 200 times the shorter."
            )
        factor = self.video_processor.patch_size * self.video_processor.merge_size
        return smart_resize(height, width, factor, self.min_pixels, self.max_pixels)

    def _check_settings(self) -> None:
        for name in ("num_edit_tokens", "max_frames", "max_pixels", "min_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if not isinstance(self.instruction_first, bool):
            raise TypeError(f"`instruction_first` must be True or False, got {self.instruction_first!r}.")
        temporal_patch_size = self.video_processor.temporal_patch_size
        if self.max_frames < temporal_patch_size:
            raise ValueError(
                f"`max_frames` must be at least {temporal_patch_size}, the MLLM's temporal patch size,"
                f" got {self.max_frames}."
            )
        token_pixels = (self.video_processor.patch_size * self.video_processor.merge_size) ** 2
        if self.max_pixels < token_pixels:
            raise ValueError(
                f"`max_pixels` must leave room for one visual token of {token_pixels} pixels, got {self.max_pixels}."
            )
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"`min_pixels` must not exceed `max_pixels`, got {self.min_pixels} > {self.max_pixels}.")
        if not _is_rate(self.default_fps):
            raise ValueError(f"`default_fps` must be a positive number, got {self.default_fps!r}.")
        if self.edit_token not in self.tokenizer.get_added_vocab():
            raise ValueError(
                f"`edit_token` must be a special or added token of the tokenizer, got {self.edit_token!r}."
            )
        if self.edit_token == self.tokenizer.pad_token:
            raise ValueError(f"`edit_token` must not be the padding token, got {self.edit_token!r}.")
        if not hasattr(transformers, self.mllm_processor_class):
            raise ValueError(
                f"`mllm_processor_class` must name a processor of transformers, got {self.mllm_processor_class!r}."
            )
        if not self.chat_template:
            raise ValueError("`chat_template` must be the MLLM's chat template, got none.")
        if self._render([""])[0].count(self.edit_token) != self.num_edit_tokens:
            raise ValueError(
                f"`edit_token` must be a token that the chat template does not use, got {self.edit_token!r}."
            )

    def _check_text(self, text: str | Sequence[str]) -> list[str]:
        text = [text] if isinstance(text, str) else text
        if not isinstance(text, (list, tuple)):
            raise TypeError(f"`text` must be a string or a list of strings, got {type(text).__name__}.")
        if len(text) == 0:
            raise ValueError("`text` must hold at least one instruction, got an empty list.")
        for index, instruction in enumerate(text):
            if not isinstance(instruction, str):
                raise TypeError(f"`text[{index}]` must be a string, got {type(instruction).__name__}.")
            if token := self.find_control_token(instruction):
                raise ValueError(
                    f"`text[{index}]` contains {token!r}, a control token of the MLLM's tokenizer:"
                    " instructions are plain text."
                )
        return list(text)

    def find_control_token(self, instruction: str) -> str | None:
        """The first of the tokenizer's added tokens in an instruction, which may have none; `None` if it has none."""
        match = self._added_token_pattern.search(instruction)
        return match and match.group()

    def _check_fps(self, fps: float | Sequence[float] | None, num_clips: int) -> list[float]:
        if fps is None or isinstance(fps, numbers.Real):
            fps = [self.default_fps if fps is None else fps] * num_clips
        if not isinstance(fps, (list, tuple)):
            raise TypeError(f"`fps` must be a number or a list of numbers, got {type(fps).__name__}.")
        if len(fps) != num_clips:
            raise ValueError(f"`fps` must have one value per clip, got {len(fps)} for {num_clips} clip(s).")
        if not all(_is_rate(rate) for rate in fps):
            raise ValueError(f"`fps` must be positive, finite frames per second, got {fps}.")
        return [float(rate) for rate in fps]


def _is_rate(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _split_clips(videos) -> list:
    if isinstance(videos, (torch.Tensor, np.ndarray)):
        if videos.ndim not in (4, 5):
            raise ValueError(
                "`videos` must have shape (frames, 3, height, width), (frames, height, width, 3) or one more dimension"
                f" for the batch, got {tuple(videos.shape)}."
            )
        videos = [videos] if videos.ndim == 4 else list(videos)
    elif not isinstance(videos, (list, tuple)):
        raise TypeError(f"`videos` must be a tensor, an array or a list of clips, got {type(videos).__name__}.")
    elif len(videos) > 0 and isinstance(videos[0], PIL.Image.Image):
        videos = [videos]
    if len(videos) == 0:
        raise ValueError("`videos` must hold at least one clip, got none.")
    return list(videos)


def _to_frames(clip, name: str) -> torch.Tensor:
    if isinstance(clip, (list, tuple)):
        for index, image in enumerate(clip):
            if not isinstance(image, PIL.Image.Image):
                raise TypeError(
                    f"`{name}[{index}]` must be a PIL.Image, got {type(image).__name__}; stack arrays into one clip."
                )
            if image.size != clip[0].size:
                raise ValueError(f"`{name}` must have frames of one size, got {clip[0].size} and {image.size}.")
        if len(clip) == 0:
            raise ValueError(f"`{name}` must have at least one frame, got 0.")
        frames = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in clip])).permute(0, 3, 1, 2)
    elif isinstance(clip, (torch.Tensor, np.ndarray)):
        is_array = isinstance(clip, np.ndarray)
        channel_dims = [dim for dim in (1, 3) if clip.ndim == 4 and clip.shape[dim] == 3]
        if not channel_dims:
            raise ValueError(
                f"`{name}` must have shape (frames, 3, height, width) or (frames, height, width, 3),"
                f" got {tuple(clip.shape)}."
            )
        channel_dim = channel_dims[-1 if is_array else 0]
        if is_array:
            if clip.dtype != np.uint8 and clip.dtype.kind != "f":
                raise TypeError(f"`{name}` must be uint8 in [0, 255] or floating point in [0, 1], got {clip.dtype}.")
            clip = torch.from_numpy(np.ascontiguousarray(clip))
        frames = clip if channel_dim == 1 else clip.permute(0, 3, 1, 2)
    else:
        raise TypeError(f"`{name}` must be a tensor, an array or a list of PIL.Image, got {type(clip).__name__}.")

    if frames.numel() == 0:
        raise ValueError(f"`{name}` must have at least one frame and one pixel, got shape {tuple(frames.shape)}.")
    if frames.dtype != torch.uint8:
        if not frames.is_floating_point():
            raise TypeError(f"`{name}` must be uint8 in [0, 255] or floating point in [0, 1], got {frames.dtype}.")
        low, high = (bound.item() for bound in torch.aminmax(frames))  # both are NaN if one pixel is
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # resized clips overshoot by rounding
            found = "NaN" if math.isnan(low) or math.isnan(high) else f"[{low:.4g}, {high:.4g}]"
            raise ValueError(f"`{name}` must be in [0, 1] if floating point, got {found}.")
    return frames  # (frames, 3, height, width)


def _sample_and_resize(clip: torch.Tensor, indices: list[int], size: tuple[int, int]) -> torch.Tensor:
    frames = clip if indices == list(range(clip.shape[0])) else clip[indices]
    is_float = frames.is_floating_point()
    if is_float:
        frames = frames.float() * 255
    if tuple(frames.shape[-2:]) != size:
        frames = tvF.resize(frames, list(size), interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)
    return frames.clamp_(0, 255) if is_float else frames  # bicubic overshoots, and uint8 is clamped by the resize
