import functools
import inspect
import math
import numbers
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import get_module_execution_device, is_compiled_module, randn_tensor
from diffusers.video_processor import VideoProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, UMT5EncoderModel

from .clips import is_count, load_clips, longest_clip, resize_frames, transfer_edit
from .distiller_rvedit import RVEDiTTokenDistiller
from .files import forget_names
from .hub import CODE, Repository, open_repository, remove_code, upload, write_card, write_code
from .lora import RVEDiTLoraLoaderMixin
from .pipeline_output import RVEDiTPipelineOutput
from .processing_rvedit import RVEDiTProcessor
from .transformer_rvedit import RVEDiTTransformer3DModel
from .video import Video


EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline, read_video, write_video

        >>> pipe = RVEDiTPipeline.from_pretrained(TINY_CHECKPOINT)
        >>> clip = read_video("source.mp4")
        >>> frames = pipe(clip, "make the video black and white").frames[0]
        >>> write_video("edited.mp4", frames, clip.fps, audio_from=clip.path, audio_start=clip.start_time)
        ```
"""

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
MASKING_BACKENDS = (
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_MATH,
)
TEXT_LENGTHS = 64  # merged texts have a multiple of it, so that most share the graphs of a compiled transformer
TRANSFERRED_AT_ONCE = 2  # frames to which an edit is transferred together: 18 floats a pixel
FRAMES_AT_ONCE = 16  # are resized together: float copies of a whole clip at its own size would outweigh the models


def _offload_at_the_end(call: Callable) -> Callable:
    # Also of a call that was stopped: it would leave models on the device, and caches with the states of its clip.
    @functools.wraps(call)
    def wrapped(self, *args, **kwargs):
        try:
            return call(self, *args, **kwargs)
        finally:
            self.maybe_free_model_hooks()

    return wrapped


class RVEDiTPipeline(DiffusionPipeline, RVEDiTLoraLoaderMixin):
    r"""
    Edits a video as an instruction says (RVEDiT, arXiv 2605.24674): `pipe(video, prompt)`.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (saving, loading, running on a particular device, offloading, etc.). Memory of the
    VAE is saved with `pipe.vae.enable_tiling()` and `pipe.vae.enable_slicing()`.

    `text_encoder` and `tokenizer` may be `None` when `prompt_embeds` are passed to the call, and `processor`, `mllm`
    and `distiller` when the tokens of every stream that the transformer reads are: load such a pipeline with
    `from_pretrained(folder, mllm=None, ...)`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of `text_encoder`.
        text_encoder ([`~transformers.UMT5EncoderModel`]):
            Gives the text tokens, those that a Wan backbone knows.
        processor ([`RVEDiTProcessor`]):
            Turns the clip and the instruction into the MLLM's inputs.
        mllm ([`~transformers.PreTrainedModel`]):
            A Qwen2.5-VL or Qwen3-VL model.
        distiller ([`RVEDiTTokenDistiller`]):
            Reads editing and visual tokens out of one pass of `mllm`.
        vae ([`~diffusers.AutoencoderKLWan`]):
            Encodes the source clip and decodes the edited one.
        transformer ([`RVEDiTTransformer3DModel`]):
            Predicts the flow.
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`] or [`~diffusers.UniPCMultistepScheduler`]):
            Integrates the flow. UniPC needs `prediction_type="flow_prediction"` and `use_flow_sigmas=True`.
        default_num_inference_steps (`int`, defaults to 50):
            `num_inference_steps` of a call that gives none. Kept in `model_index.json`, as are the next four, so that
            a checkpoint brings the settings it was tuned for.
        default_guidance_scale (`float`, defaults to 5.0):
            `guidance_scale` of a call that gives none.
        default_source_guidance_scale (`float`, defaults to 1.0):
            `source_guidance_scale` of a call that gives none.
        default_max_area (`int`, *optional*):
            Clips of more pixels a frame are edited at about this area, in their own aspect ratio, by a call that gives
            neither `height` nor `width`. `None` edits every clip at its own size.
        default_keep_detail (`bool`, *optional*):
            `keep_detail` of a call that gives none. `True` suits a small autoencoder, which blurs.
        conversion (`dict`, *optional*):
            Of a pipeline that was made from other models: which ones, and the stages that it was trained in since.
            Kept in `model_index.json`, for the model card; nothing is computed from it.
    """

    model_cpu_offload_seq = "text_encoder->mllm->distiller->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "processor", "mllm", "distiller"]  # embeddings stand for them
    _callback_tensor_inputs = [
        "latents",
        "source_latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "edit_embeds",
        "negative_edit_embeds",
        "visual_embeds",
        "negative_visual_embeds",
    ]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        processor: RVEDiTProcessor,
        mllm: PreTrainedModel,
        distiller: RVEDiTTokenDistiller,
        vae: AutoencoderKLWan,
        transformer: RVEDiTTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 5.0,
        default_source_guidance_scale: float = 1.0,
        default_max_area: int | None = None,
        default_keep_detail: bool | None = None,
        conversion: dict | None = None,
    ):
        super().__init__()

        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            processor=processor,
            mllm=mllm,
            distiller=distiller,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            default_source_guidance_scale=default_source_guidance_scale,
            default_max_area=default_max_area,
            default_keep_detail=default_keep_detail,
            conversion=conversion,
        )
        self.vae_scale_factor_temporal = self.vae.config.scale_factor_temporal if self.vae is not None else 4
        self.vae_scale_factor_spatial = self.vae.config.scale_factor_spatial if self.vae is not None else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> None:
        r"""
        Save the pipeline to a folder that `from_pretrained` reads. The code of a pipeline that was loaded with
        `trust_remote_code=True`, without this package, goes along.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to write to; made if it does not exist.
            safe_serialization (`bool`, defaults to `True`), variant (`str`, *optional*), max_shard_size (`int` or
                `str`, *optional*), kwargs:
                As in [`DiffusionPipeline.save_pretrained`].
            push_to_hub (`bool`, defaults to `False`):
                Whether to upload the folder afterwards.
            repo_id (`str`, *optional*):
                The repository, `owner/name`; the folder's name, of the user's own, by default.
            commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), create_pr
                (`bool`, defaults to `False`):
                See [`~RVEDiTPipeline.push_to_hub`].

        Raises:
            `ValueError`: if the transformer carries LoRA layers, which would not load, or weights are offloaded to
                disk; before anything is saved.
            `ValueError`, `PermissionError`, `ConnectionError`: see [`~RVEDiTPipeline.push_to_hub`]; before anything is
                saved, unless the connection is lost later, or the folder holds what cannot be uploaded.
        """
        self._check_can_be_saved()
        if push_to_hub:
            _check_format(safe_serialization)
            repository = open_repository(repo_id or Path(save_directory).resolve().name, "pipeline", private, token)
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        forget_names(save_directory)
        if CODE is not None:
            write_code(save_directory, CODE)
        else:
            remove_code(save_directory)
        if push_to_hub:
            _upload_with_card(Path(save_directory), repository, None, commit_message, token, create_pr)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        r"""
        Upload the pipeline, with a model card. The text of a `README.md` that the repository has is kept.

        Args:
            repo_id (`str`):
                The repository, `owner/name`, or `name` of the user's own. It is made if it does not exist, and brought
                up to date if it holds an RVEDiT pipeline.
            commit_message (`str`, *optional*):
                `"Upload RVEDiTPipeline"` by default.
            private (`bool`, *optional*):
                Whether a new repository is private; `None` leaves that to the Hub.
            token (`str`, *optional*):
                The token of `hf auth login` by default.
            create_pr (`bool`, defaults to `False`):
                Whether to open a pull request instead of committing to `main`.
            safe_serialization (`bool`, defaults to `True`):
                Has to be `True`: pickles are not uploaded.
            variant (`str`, *optional*):
                Part of the names of the weights, such as `"fp16"`.
            subfolder (`str`, *optional*):
                Folder of the repository, which may then hold anything, to upload to. No model card goes there.

        Returns:
            `str`: The address of the commit.

        Raises:
            `ValueError`: if `repo_id` is no such name, the repository holds something else, or is public though
                `private` is `True`, or the pipeline cannot be saved, see [`~RVEDiTPipeline.save_pretrained`]; before
                anything is saved.
            `PermissionError`: if the token is refused.
            `ConnectionError`: if the Hub cannot be reached, or not any more. What was uploaded is kept.
        """
        _check_format(safe_serialization)
        self._check_can_be_saved()
        repository = open_repository(repo_id, None if subfolder else "pipeline", private, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            return _upload_with_card(Path(folder), repository, subfolder, commit_message, token, create_pr)

    def _check_can_be_saved(self) -> None:
        self._check_nothing_is_on_disk("what is in memory are not its weights: save the pipeline")
        if adapters := getattr(self.transformer, "peft_config", None):
            raise ValueError(
                f"The transformer carries the LoRA layers {sorted(adapters)}, with which it would not load: call"
                " `unload_lora_weights()` first, and before it `fuse_lora()` if they are to stay. `save_lora_weights`"
                " saves the layers alone."
            )

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | list[str] | None = None,
    ) -> None:
        r"""
        As [`DiffusionPipeline.enable_group_offload`], but on disk each component gets a folder of its own, and the
        text encoder and the MLLM are offloaded by leaves in either case: diffusers finds the blocks of its own models
        alone, and others would be on the device as a whole.

        Args:
            offload_to_disk_path (`str`, *optional*):
                A folder that does not exist or is empty. Without it weights are kept on `offload_device`.
            onload_device, offload_device, offload_type, num_blocks_per_group, non_blocking, use_stream, record_stream,
            low_cpu_mem_usage, exclude_modules:
                As in [`DiffusionPipeline.enable_group_offload`].

        Raises:
            `ValueError`: if `offload_type` is `"block_level"` without `num_blocks_per_group`, or if
                `offload_to_disk_path` holds anything: diffusers would take weights that it finds there for those of
                this pipeline.
        """
        if offload_type == "block_level" and num_blocks_per_group is None:  # before the first component has hooks
            raise ValueError(
                "`num_blocks_per_group` has to be an integer of at least 1 for `offload_type='block_level'`, got None."
            )
        if offload_to_disk_path is not None and os.path.lexists(offload_to_disk_path):
            if not os.path.isdir(offload_to_disk_path) or os.listdir(offload_to_disk_path):
                raise ValueError(
                    "`offload_to_disk_path` has to be a folder that does not exist or is empty, got"
                    f" {offload_to_disk_path!r}."
                )
        settings = {
            "onload_device": onload_device,
            "offload_device": offload_device,
            "num_blocks_per_group": num_blocks_per_group,
            "non_blocking": non_blocking,
            "use_stream": use_stream,
            "record_stream": record_stream,
            "low_cpu_mem_usage": low_cpu_mem_usage,
        }
        excluded = {exclude_modules} if isinstance(exclude_modules, str) else set(exclude_modules or ())
        for name, component in self.components.items():
            if not isinstance(component, torch.nn.Module):
                continue
            if name in excluded:
                component.to(onload_device)
                continue
            if hasattr(component, "set_input_embeddings"):
                # UMT5's two embeddings cannot stay two modules: their one weight would be pinned twice, and written to
                # disk again once it is gone (hooks/group_offloading.py, line 313)
                component.set_input_embeddings(component.get_input_embeddings())
            if offload_to_disk_path is not None:
                # A file is named by its layers alone, and one that exists is taken as written (lines 154 and 304):
                # components cannot share a folder.
                settings["offload_to_disk_path"] = os.path.join(offload_to_disk_path, name)
            if hasattr(component, "enable_group_offload"):
                component.enable_group_offload(**settings, offload_type=offload_type)
            else:
                # blocks are looked for among a model's children (line 739), where transformers has none
                apply_group_offloading(component, **settings, offload_type="leaf_level")

    @property
    def token_streams(self) -> set[str]:
        """The streams, of `"edit"`, `"text"` and `"visual"`, that at least one block of the transformer reads."""
        return {stream for block in self.transformer.blocks for stream in block.tokens}

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 512,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Encode instructions with the text encoder alone. For the MLLM's tokens see [`~RVEDiTPipeline.encode_tokens`].

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Instructions. `None` requires `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to avoid: one text, or one for each prompt. `None` is the empty text. Not used without guidance.
            do_classifier_free_guidance (`bool`, defaults to `True`):
                Whether to encode `negative_prompt`.
            num_videos_per_prompt (`int`, defaults to 1):
                How often to repeat each row.
            prompt_embeds (`torch.Tensor` of shape `(batch, text_len, text_dim)`, *optional*):
                Given, they are returned in place of the encoded `prompt`, repeated like it.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch, text_len, text_dim)`, *optional*):
                Likewise for `negative_prompt`.
            max_sequence_length (`int`, defaults to 512):
                Texts are padded and cut to this many tokens, or to the tokenizer's `model_max_length` if that is less;
                what is cut off is warned of.
            device (`torch.device`, *optional*), dtype (`torch.dtype`, *optional*):
                Of the result; by default the pipeline's execution device and what the text encoder computes in, or
                the dtype of given embeddings.

        Returns:
            `tuple`: `prompt_embeds` and `negative_prompt_embeds`, each `(batch * num_videos_per_prompt, text_len,
            text_dim)` and zero behind the end of the text, as Wan has it; the second is `None` if it is neither given
            nor asked for.

        Raises:
            `TypeError`, `ValueError`: naming the argument, or the component that is `None`.
        """
        device = device or self._execution_device

        prompts = negative_prompts = []
        if prompt_embeds is None:
            _check_texts("prompt", prompt)
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt = "" if negative_prompt is None else negative_prompt
            _check_texts("negative_prompt", negative_prompt)
            negative_prompts = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        if prompts or negative_prompts:  # in one pass: offloaded weights are moved once
            for name in ("tokenizer", "text_encoder"):
                if getattr(self, name) is None:
                    given = "prompt_embeds" if prompts else "negative_prompt_embeds"
                    raise ValueError(f"The pipeline's component `{name}` is None: give `{given}`.")
            text = self._get_t5_prompt_embeds(prompts + negative_prompts, max_sequence_length, device, dtype)
            prompt_embeds = text[: len(prompts)] if prompts else prompt_embeds
            negative_prompt_embeds = text[len(prompts) :] if negative_prompts else negative_prompt_embeds

        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_videos_per_prompt, dim=0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            if negative_prompt_embeds.shape[0] == 1:
                negative_prompt_embeds = negative_prompt_embeds.repeat(prompt_embeds.shape[0], 1, 1)
            else:
                negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0)

        return prompt_embeds, negative_prompt_embeds

    def _get_t5_prompt_embeds(
        self,
        prompt: list[str],
        max_sequence_length: int,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        texts = [prompt_clean(text) for text in prompt]
        length = min(max_sequence_length, self.tokenizer.model_max_length)
        for tokens in self.tokenizer(texts, verbose=False).input_ids:
            if len(tokens) > length:  # the last is the mark of the end, which stays
                lost = self.tokenizer.decode(tokens[length - 1 : -1])
                message = f"The text encoder reads {length} tokens, and not the end of the text: {lost!r}."
                warnings.warn(message, stacklevel=3)
        text_inputs = self.tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        model_device = get_module_execution_device(self.text_encoder)
        text_input_ids, mask = text_inputs.input_ids.to(model_device), text_inputs.attention_mask.to(model_device)
        prompt_embeds = self.text_encoder(text_input_ids, mask).last_hidden_state  # (batch, text_len, text_dim)
        prompt_embeds = prompt_embeds.masked_fill(mask.unsqueeze(-1) == 0, 0.0)
        return prompt_embeds.to(device=device, dtype=dtype)  # by default as computed, which may not be as stored

    def _merged_length(self, *texts: torch.Tensor | None) -> int | None:
        # How many tokens hold all texts and three of their padding; `None`: the attention backend takes no mask
        backend = getattr(self.transformer.blocks[-1].attn2.processor, "_attention_backend", None)
        if (backend or _AttentionBackendRegistry.get_active_backend()[0]) not in MASKING_BACKENDS:
            return None
        longest = 0
        for text in texts:
            if text is not None:
                ends = torch.arange(1, text.shape[1] + 1, device=text.device)
                longest = max(longest, int((ends * text.any(-1).any(0)).amax()))
        return math.ceil((longest + 3) / TEXT_LENGTHS) * TEXT_LENGTHS

    def _merge_tokens(self, conditions: dict[str, Any], text_length: int | None) -> dict[str, Any]:
        # The arguments of `project_context` for tokens that are read alike, as fewer of them
        text, mask = merge_padding(conditions["encoder_hidden_states"], text_length)
        merged = conditions | {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        modules = self.transformer.modules()
        if is_compiled_module(self.transformer) or any(module._compiled_call_impl for module in modules):
            return merged  # each number of tokens would take graphs of its own

        # Null tokens have one value, which is what attention to them returns: one stands for all. In a softmax with
        # other tokens their number counts.
        readers = [set(block.tokens) for block in self.transformer.blocks]
        edit, visual = conditions["edit_hidden_states"], conditions["visual_hidden_states"]
        if edit is not None and not any({"edit", "text"} <= tokens for tokens in readers) and not edit.any():
            merged["edit_hidden_states"] = edit[:, :1]
        if visual is not None and {"visual"} not in readers and not visual.any():
            merged["visual_hidden_states"] = visual[:, :1]
            merged["visual_positions"] = conditions["visual_positions"][:, :1]
        return merged

    def encode_tokens(
        self,
        video,
        prompt: str | list[str],
        num_frames: int | None = None,
        fps: float | list[float] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        r"""
        Distil clips and instructions into editing and visual tokens: one pass of the MLLM.

        Passed back to the call, the result replaces that pass; a negative prompt's first two become
        `negative_edit_embeds` and `negative_visual_embeds`. With gradients enabled the tokens carry the graph of the
        whole MLLM; call it under `torch.no_grad()` to edit with them.

        Args:
            video, prompt, num_frames, fps:
                As in the call. The tokens belong to that `num_frames`.
            device (`torch.device`, *optional*), dtype (`torch.dtype`, *optional*):
                Of the tokens; the pipeline's execution device and the distiller's dtype by default.

        Returns:
            `tuple`: `edit_embeds` `(batch, num_edit_tokens, dim)`, `visual_embeds` `(batch, num_visual, dim)`,
            `visual_positions` `(batch, num_visual, 3)`, float32 (time, row, column) as fractions of the clip padded to
            whole latent frames, and `visual_attention_mask` `(batch, num_visual)`, bool, or `None` if every token is
            valid.

        Raises:
            `TypeError`, `ValueError`: naming the argument, before the MLLM runs.
        """
        for name in ("processor", "mllm", "distiller"):
            if getattr(self, name) is None:
                raise ValueError(f"The pipeline's component `{name}` is None: without it there are no tokens.")
        _check_texts("prompt", prompt)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        clips, rates = load_clips(video, num_frames, self._max_frames(), fps)
        if len(clips) != len(prompts) and 1 not in (len(clips), len(prompts)):
            raise ValueError(
                f"`prompt` has {len(prompts)} entries, but `video` has {len(clips)}: they have to agree, or one has a"
                " single entry for all."
            )
        inputs = self._prepare_mllm_inputs(clips, rates, prompts, "prompt")
        self.distiller.check_inputs(self.mllm, inputs)
        return self._distill([inputs], device, dtype)[0]

    def _prepare_mllm_inputs(
        self, clips: list[torch.Tensor], rates: list[float | None], prompts: list[str], name: str
    ) -> BatchFeature:
        batch_size = max(len(clips), len(prompts))
        rates = [self.processor.default_fps if rate is None else rate for rate in rates]
        num_repeats = batch_size // len(clips)
        try:
            inputs = self.processor(
                videos=clips * num_repeats,
                text=list(prompts) * (batch_size // len(prompts)),
                fps=rates * num_repeats,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"The processor takes no such `video` or `{name}`: {error}") from error

        # Fractions of the clip become fractions of the padded clip, which is what the latent grid covers.
        lengths = [clip.shape[0] for clip in clips]
        factors = torch.tensor([(length - 1) / max(self._padded_length(length) - 1, 1) for length in lengths])
        inputs["visual_positions"][..., 0] *= factors.unsqueeze(1)
        return inputs

    def _distill(
        self, all_inputs: list[BatchFeature], device: torch.device | None, dtype: torch.dtype | None
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        # The two halves instead of the module: an offloading hook on `distiller` would move `mllm` as its argument.
        # First one, then the other, for all inputs: with model offload the second half puts the MLLM back.
        device = device or self._execution_device
        dtype = dtype or self.distiller.dtype
        mllm_device = get_module_execution_device(self.mllm)
        harvests = [self.distiller.harvest(self.mllm, inputs.to(mllm_device)) for inputs in all_inputs]
        results = []
        for edit_states, visual_states, visual_positions, mask in harvests:
            edit_embeds, visual_embeds = self.distiller.connect(edit_states, visual_states)
            edit_embeds, visual_embeds = (tokens.to(device, dtype) for tokens in (edit_embeds, visual_embeds))
            mask = None if mask is None else mask.to(device)
            results.append((edit_embeds, visual_embeds, visual_positions.to(device), mask))
        if hasattr(self.distiller, "_hf_hook"):
            # Both halves loaded the queries, and no forward pass will follow to offload them again.
            self.distiller._hf_hook.post_forward(self.distiller, None)
        return results

    def _offload(self, *models: torch.nn.Module | None) -> None:
        # Model offload: a model that runs moves but the one before it, and others would stay beside the transformer
        for hook in getattr(self, "_all_hooks", ()):
            if any(hook.model is model for model in models):
                hook.offload()

    def _max_frames(self) -> int | None:
        # The longest clip that the transformer has positions for.
        if self.transformer is None:
            return None
        return longest_clip(self.transformer.config, self.vae_scale_factor_temporal)

    def _padded_length(self, num_frames: int) -> int:
        # Latent frame 0 holds one frame, each further one `vae_scale_factor_temporal`; the transformer's patches hold
        # whole latent frames.
        patch_size = self.transformer.config.patch_size[0] if self.transformer is not None else 1
        latent_frames = math.ceil((num_frames - 1) / self.vae_scale_factor_temporal) + 1
        latent_frames = math.ceil(latent_frames / patch_size) * patch_size
        return (latent_frames - 1) * self.vae_scale_factor_temporal + 1

    def _legal_size(
        self, source_height: int, source_width: int, height: int | None, width: int | None
    ) -> tuple[int, int]:
        if height is None and width is None:
            max_area = self.config.default_max_area or math.inf
            factor = min(1.0, math.sqrt(max_area / (source_height * source_width)))
            height, width = source_height * factor, source_width * factor
        elif width is None:
            width = source_width * height / source_height
        elif height is None:
            height = source_height * width / source_width
        multiples = (self.vae_scale_factor_spatial * size for size in self.transformer.config.patch_size[1:])
        height, width = (max(round(size / m), 1) * m for size, m in zip((height, width), multiples))
        return height, width

    def check_inputs(
        self,
        prompt,
        negative_prompt,
        height,
        width,
        num_inference_steps,
        guidance_scale,
        source_guidance_scale,
        num_videos_per_prompt,
        generator,
        latents,
        embeds,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
        attention_kwargs,
        max_sequence_length,
        keep_size=False,
        keep_detail=None,
        reuse_context=True,
        sigmas=None,
    ):
        """Check everything but the clips; the arguments are those of the call, defaults filled in, `embeds` all its
        embeddings by name.

        Raises:
            `TypeError`, `ValueError`: naming the argument, its value and what would be right.
        """
        # 1. Components that every call needs
        for name in ("vae", "transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"The pipeline's component `{name}` is None: no call works without it.")
        # schedulers of other families integrate another equation, without a word
        for name, right in (
            ("prediction_type", "flow_prediction"),
            ("use_flow_sigmas", True),
            ("use_dynamic_shifting", False),
        ):
            value = self.scheduler.config.get(name, right)
            if value != right:
                raise ValueError(
                    f"The pipeline's component `scheduler` has {name}={value!r}, but this transformer predicts a flow,"
                    f" at noise levels with a fixed shift: make it with {name}={right!r}."
                )

        # 2. Numbers, names and callables
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_videos_per_prompt", num_videos_per_prompt),
            ("max_sequence_length", max_sequence_length),
        ):
            if not is_count(value):
                raise ValueError(f"`{name}` has to be an integer of at least 1, got {value!r}.")
        if sigmas is not None:
            if "sigmas" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`sigmas` has to be None for the scheduler {type(self.scheduler).__name__}, which takes none."
                )
            levels = sigmas.tolist() if isinstance(sigmas, (np.ndarray, torch.Tensor)) else sigmas
            levels = levels if isinstance(levels, (list, tuple)) else []
            levels = [level.item() if torch.is_tensor(level) and level.ndim == 0 else level for level in levels]
            are_numbers = all(isinstance(level, numbers.Real) for level in levels)
            if (
                len(levels) != num_inference_steps
                or not are_numbers
                or not all(high > low for high, low in zip([1 + 1e-6, *levels], [*levels, 0]))
            ):
                raise ValueError(
                    f"`sigmas` has to be a list of {num_inference_steps} falling noise levels in (0, 1], one for each"
                    f" of `num_inference_steps`, got {sigmas!r}."
                )
        for name, value in (
            ("guidance_scale", guidance_scale),
            ("source_guidance_scale", source_guidance_scale),
        ):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"`{name}` has to be a finite number, got {value!r}.")
        multiples = [self.vae_scale_factor_spatial * size for size in self.transformer.config.patch_size[1:]]
        for name, value, multiple in zip(("height", "width"), (height, width), multiples):
            if value is not None and (not is_count(value) or value % multiple):
                raise ValueError(
                    f"`{name}` has to be a positive multiple of {multiple}, got {value!r}. Without `height` and"
                    " `width` clips of any size are edited and come back at their own."
                )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` has to be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"`callback_on_step_end` has to be callable, got {type(callback_on_step_end).__name__}.")
        if not isinstance(callback_on_step_end_tensor_inputs, (list, tuple)):
            raise TypeError(
                "`callback_on_step_end_tensor_inputs` has to be a list of names, got"
                f" {callback_on_step_end_tensor_inputs!r}."
            )
        unknown = [k for k in callback_on_step_end_tensor_inputs if k not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to name tensors of {self._callback_tensor_inputs}, got"
                f" {unknown}."
            )
        if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
            raise TypeError(f"`attention_kwargs` has to be a dict, got {type(attention_kwargs).__name__}.")
        if attention_kwargs and set(attention_kwargs) != {"scale"}:
            raise ValueError(f"`attention_kwargs` knows only the key 'scale', got {sorted(attention_kwargs)}.")

        for name, value in (("keep_size", keep_size), ("reuse_context", reuse_context)):
            if value not in (True, False):
                raise ValueError(f"`{name}` has to be True or False, got {value!r}.")
        if keep_detail not in (None, True, False):
            raise ValueError(f"`keep_detail` has to be True, False or None, got {keep_detail!r}.")
        if keep_detail and not self.transformer.config.source_channels:
            raise ValueError("`keep_detail` cannot be True: this transformer does not read the source's latents.")

        # 3. Texts
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if value is not None:
                _check_texts(name, value)

        # 4. Embeddings
        prompt_embeds, negative_prompt_embeds = embeds["prompt_embeds"], embeds["negative_prompt_embeds"]
        edit_embeds, visual_embeds = embeds["edit_embeds"], embeds["visual_embeds"]
        visual_positions = embeds["visual_positions"]
        dim = self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim
        text_dim = self.transformer.config.text_dim
        for name in ("visual_positions", "visual_attention_mask", "negative_visual_embeds"):
            if embeds[name] is not None and visual_embeds is None:
                raise ValueError(f"`{name}` is given, but `visual_embeds`, to which it belongs, is None: pass both.")
        if visual_embeds is not None and visual_positions is None:
            raise ValueError(
                "`visual_positions` is None, but `visual_embeds` is given: pass where the tokens stand, (batch,"
                " num_visual, 3), as `encode_tokens` returns it."
            )
        shapes = {
            "prompt_embeds": ("batch", "text_len", text_dim),
            "negative_prompt_embeds": ("batch", "text_len", text_dim),
            "edit_embeds": ("batch", "num_edit_tokens", dim),
            "negative_edit_embeds": ("batch", "num_edit_tokens", dim),
            "visual_embeds": ("batch", "num_visual", dim),
        }
        for name, shape in shapes.items():
            _check_tensor(name, embeds[name], shape)
        num_visual = None if visual_embeds is None else visual_embeds.shape[1]
        _check_tensor("negative_visual_embeds", embeds["negative_visual_embeds"], ("batch", num_visual, dim))
        _check_tensor("visual_positions", visual_positions, ("batch", num_visual, 3))
        _check_tensor("visual_attention_mask", embeds["visual_attention_mask"], ("batch", num_visual), is_bool=True)
        for name, value in embeds.items():
            stream = name.removeprefix("negative_").split("_")[0].replace("prompt", "text")
            if value is not None and stream not in self.token_streams:
                raise ValueError(f"`{name}` has to be None: no block of this transformer reads the {stream} tokens.")

        # 5. What will have to be computed, and whether it can be
        reads_text = "text" in self.token_streams
        missing = self._missing_tokens(edit_embeds, visual_embeds)
        if prompt is None and reads_text and prompt_embeds is None:
            raise ValueError("`prompt` is None: pass an instruction, or `prompt_embeds` and the MLLM's tokens.")
        if prompt is None and missing:
            raise ValueError(f"`prompt` is None: pass an instruction, or {missing} as `encode_tokens` returns them.")
        unused = "has no use, since embeddings are given for all that it would become: pass one or the other."
        if prompt is not None and not (reads_text and prompt_embeds is None) and not missing:
            raise ValueError(f"`prompt` {prompt!r} {unused}")
        if negative_prompt is not None and not (reads_text and negative_prompt_embeds is None) and not missing:
            raise ValueError(f"`negative_prompt` {negative_prompt!r} {unused}")

        has_null = guidance_scale > 1 or source_guidance_scale != 1
        for name in ("text_encoder", "tokenizer"):
            if getattr(self, name) is None and reads_text and prompt_embeds is None:
                raise ValueError(f"The pipeline's component `{name}` is None: pass `prompt_embeds`.")
            if getattr(self, name) is None and reads_text and has_null and negative_prompt_embeds is None:
                raise ValueError(
                    f"The pipeline's component `{name}` is None: pass `negative_prompt_embeds`, those of the empty"
                    " text for plain guidance."
                )
        for name in ("processor", "mllm", "distiller"):
            if getattr(self, name) is None and missing:
                raise ValueError(
                    f"The pipeline's component `{name}` is None: pass {missing}, as `encode_tokens` returns them."
                )
        if missing and self.distiller.config.dim != dim:
            raise ValueError(
                f"The pipeline's component `distiller` makes tokens of width {self.distiller.config.dim}, but the"
                f" transformer reads {dim}: they have to be made for each other."
            )
        if source_guidance_scale != 1 and not self.transformer.config.source_channels:
            raise ValueError(
                "`source_guidance_scale` has to be 1 for a transformer that takes no source latents, got"
                f" {source_guidance_scale}."
            )

        # 6. Noise
        for item in generator if isinstance(generator, (list, tuple)) else [generator]:
            if not isinstance(item, torch.Generator) and generator is not None:
                raise TypeError(
                    f"`generator` has to be a torch.Generator or a list of them, got {type(item).__name__}."
                )
            device = self._execution_device.type
            if generator is not None and item.device.type not in ("cpu", device):
                raise ValueError(f"`generator` has to be on the CPU or on {device}, got one on {item.device}.")
        _check_tensor("latents", latents, ("batch", "channels", "frames", "height", "width"))

    def _check_clips(
        self,
        clips: list[torch.Tensor],
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        embeds: dict[str, torch.Tensor | None],
        height: int | None,
        width: int | None,
        num_videos_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> None:
        # 1. Batch sizes
        batch_sizes = {"video": len(clips)}
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            batch_sizes[name] = len(value) if isinstance(value, (list, tuple)) else 1
        batch_sizes |= {name: value.shape[0] for name, value in embeds.items() if value is not None}
        largest = max(batch_sizes, key=batch_sizes.get)
        batch_size = batch_sizes[largest]
        for name, size in batch_sizes.items():
            if size not in (1, batch_size):
                raise ValueError(
                    f"`{name}` has {size} entries, but `{largest}` has {batch_size}: each argument has to have one"
                    " entry for the whole batch or one for each sample."
                )
        for index, clip in enumerate(clips):
            if clip.shape != clips[0].shape:
                first, other = ((frames.shape[0], *frames.shape[2:]) for frames in (clips[0], clip))
                raise ValueError(
                    f"`video[{index}]` has (frames, height, width) = {other}, but `video[0]` has {first}: the clips of"
                    " a batch have to agree. Edit clips of different length or size one by one."
                )

        # 2. Noise
        num_outputs = batch_size * num_videos_per_prompt
        if isinstance(generator, (list, tuple)) and len(generator) != num_outputs:
            raise ValueError(
                f"`generator` has to be a list of {num_outputs}, one for each video (batch size times"
                f" `num_videos_per_prompt`), got {len(generator)}."
            )
        latents_shape = self._latents_shape(num_outputs, clips[0], height, width)
        longest = max(size // patch for size, patch in zip(latents_shape[2:], self.transformer.config.patch_size))
        if longest > self.transformer.config.rope_max_seq_len:
            raise ValueError(
                f"`video` gives a grid of {longest} patches on one axis, and this transformer knows at most"
                f" {self.transformer.config.rope_max_seq_len}: pass fewer `num_frames` or a smaller `height` and"
                " `width`."
            )
        _check_tensor("latents", latents, latents_shape)

    def _missing_tokens(self, edit_embeds: torch.Tensor | None, visual_embeds: torch.Tensor | None) -> list[str]:
        tokens = {"edit": edit_embeds, "visual": visual_embeds}
        return [
            f"{stream}_embeds" for stream, value in tokens.items() if value is None and stream in self.token_streams
        ]

    def _latents_shape(
        self, num_outputs: int, clip: torch.Tensor, height: int | None, width: int | None
    ) -> tuple[int, int, int, int, int]:
        height, width = self._legal_size(*clip.shape[2:], height, width)
        return (
            num_outputs,
            self.transformer.config.in_channels,
            (self._padded_length(clip.shape[0]) - 1) // self.vae_scale_factor_temporal + 1,
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )

    def encode_video(self, video: torch.Tensor) -> torch.Tensor:
        r"""
        Encode clips with the VAE.

        Args:
            video (`torch.Tensor` of shape `(batch, 3, num_frames, height, width)`):
                In [-1, 1], of a length and size that the VAE encodes whole.

        Returns:
            `torch.Tensor` of shape `(batch, channels, latent_frames, latent_height, latent_width)`, float32: the mode
            of the latents, normalised by the VAE's mean and standard deviation.
        """
        video = video.to(get_module_execution_device(self.vae), self.vae.dtype)
        latents = self.vae.encode(video).latent_dist.mode().float()
        mean, std = self._latents_statistics(latents.device)
        return (latents - mean) / std

    def prepare_latents(
        self,
        video: torch.Tensor | None,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Draw the noise and encode the source.

        Args:
            video (`torch.Tensor` of shape `(batch, 3, num_frames, height, width)`, *optional*):
                Source clips in [-1, 1], of a legal length and size. `None`: there is no source.
            shape (`tuple[int, int, int, int, int]`):
                `(batch, channels, latent_frames, latent_height, latent_width)` of the noise.
            dtype (`torch.dtype`), device (`torch.device`):
                Of both results.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Draws the noise.
            latents (`torch.Tensor` of shape `shape`, *optional*):
                The noise, if it is not to be drawn.

        Returns:
            `tuple`: the noise, and the mode of the source's latents, normalised by the VAE's mean and standard
            deviation, or `None`.
        """
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            latents = latents.to(device=device, dtype=dtype)

        source_latents = None
        if video is not None:
            source_latents = self.encode_video(video).to(device=device, dtype=dtype)

        return latents, source_latents

    def _prepare_video(self, clips: list[torch.Tensor], size: tuple[int, int], device: torch.device) -> torch.Tensor:
        # Clips as the VAE takes them: (batch, 3, frames, height, width) in [-1, 1], the last frame repeated.
        num_frames = clips[0].shape[0]
        shape = (len(clips), 3, self._padded_length(num_frames), *size)
        video = torch.empty(shape, dtype=self.vae.dtype, device=device)
        for row, clip in zip(video, clips):
            for start in range(0, num_frames, FRAMES_AT_ONCE):
                frames = resize_frames(_frames(clip[start : start + FRAMES_AT_ONCE], device), size)
                row[:, start : start + len(frames)] = frames.transpose(0, 1)
            row[:, num_frames:] = row[:, num_frames - 1 : num_frames]
        return video

    def _finish(
        self,
        video: torch.Tensor,
        size: tuple[int, int],
        output_type: str,
        rebuilt: torch.Tensor | None = None,
        clips: list[torch.Tensor] | None = None,
    ) -> np.ndarray | torch.Tensor | list:
        # Decoded clips (batch, 3, frames, height, width) in [-1, 1] as frames of a size; given copies that are rebuilt
        # without the edits, these are made on `clips`. A long clip of its own size outweighs the models: it is held as
        # floats once, and on the device for "pt" alone.
        num_clips, _, num_frames = video.shape[:3]
        if output_type == "pt":
            result = video.new_empty((num_clips, num_frames, 3, *size), dtype=torch.float32)
        else:
            result = torch.empty((num_clips, num_frames, *size, 3), dtype=torch.float32, device="cpu")
        at_once = FRAMES_AT_ONCE if rebuilt is None else TRANSFERRED_AT_ONCE
        for index, (row, edited) in enumerate(zip(result, video)):
            for start in range(0, num_frames, at_once):
                rows = slice(start, start + at_once)
                frames = edited[:, rows].transpose(0, 1).float()
                if rebuilt is None:
                    frames = resize_frames(frames, size)
                else:
                    number = index * len(clips) // num_clips
                    source = resize_frames(_frames(clips[number][rows], video.device), size)
                    frames = transfer_edit(frames, rebuilt[number][:, rows].transpose(0, 1).float(), source)
                frames = (frames * 0.5 + 0.5).clamp_(0.0, 1.0)
                row[rows] = frames if output_type == "pt" else frames.permute(0, 2, 3, 1)
        if output_type == "pt":
            return result
        result = result.numpy()
        if output_type == "np":
            return result
        return [[self.video_processor.numpy_to_pil(frame)[0] for frame in clip] for clip in result]

    def _decode(self, latents: torch.Tensor, num_frames: int) -> torch.Tensor:
        # Normalised latents to (batch, 3, num_frames, height, width)
        mean, std = self._latents_statistics(latents.device)
        latents = (latents * std + mean).to(get_module_execution_device(self.vae), self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0][:, :, :num_frames]

    def _latents_statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        statistics = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in statistics)
        return mean, std

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def source_guidance_scale(self) -> float:
        return self._source_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def do_source_guidance(self) -> bool:
        return self._source_guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @_offload_at_the_end
    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        video: str | os.PathLike | Video | list | np.ndarray | torch.Tensor,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        source_guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        edit_embeds: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        visual_positions: torch.Tensor | None = None,
        visual_attention_mask: torch.Tensor | None = None,
        negative_edit_embeds: torch.Tensor | None = None,
        negative_visual_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 512,
        fps: float | list[float] | None = None,
        keep_size: bool = False,
        keep_detail: bool | None = None,
        reuse_context: bool = True,
    ) -> RVEDiTPipelineOutput | tuple:
        r"""
        Edit one clip or a batch of clips.

        Everything that has one entry per sample, `video`, `prompt`, `negative_prompt` and all embeddings, may also
        have a single entry for the whole batch: one instruction for many clips, or many instructions for one clip. The
        result has the batch size times `num_videos_per_prompt` clips; those of one sample are neighbours.

        Args:
            video (`str`, `os.PathLike`, [`Video`], `list[PIL.Image.Image]`, `np.ndarray`, `torch.Tensor` or `list`):
                The source clip: a file, the result of [`read_video`], a list of images, an array `(frames, height,
                width, 3)`, a tensor `(frames, 3, height, width)`, or a list of single frames of such shape. A list of
                any of those, or an array or tensor with one more axis, is a batch, whose clips agree in length and
                size. Arrays and tensors are uint8 in [0, 255] or floating point in [0, 1], RGB. Any length up to the
                transformer's positions is fine, since the last frame is repeated up to a length that the VAE encodes
                and the result is cut back.
            prompt (`str` or `list[str]`, *optional*):
                The instruction. The MLLM and the text encoder both read it: `None` requires `prompt_embeds` and the
                MLLM's tokens; next to `prompt_embeds` it goes to the MLLM alone.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to be guided away from. The text encoder reads it, and so does the MLLM unless it is blank or the
                MLLM does not run. `None` is the empty text. Not used without guidance.
            height (`int`, *optional*), width (`int`, *optional*):
                Size in pixels at which the clip is edited, and without `keep_size` that of the result: multiples of
                the VAE's spatial factor times the transformer's patch. Given one, the other follows the clip's aspect
                ratio, rounded. Given none, the clip is edited at its own size, or scaled down to about
                `config.default_max_area` pixels if the checkpoint sets that, rounded to the nearest such multiples,
                and comes back at exactly its own size.
            num_frames (`int`, *optional*):
                Edit this many frames, from the first; all by default. The result has as many.
            num_inference_steps (`int`, *optional*):
                Number of denoising steps, at least 1. By default the checkpoint's
                `config.default_num_inference_steps`: 50, which suits models of Wan's size, unless it was saved with
                another.
            sigmas (`Sequence[float]`, *optional*):
                Noise level of each step, falling, in `(0, 1]`, before the scheduler's shift; the clip is clean after
                the last. By default the scheduler's own, and with [`~diffusers.FlowMatchEulerDiscreteScheduler`]
                `1, (n - 1) / n, ..., 1 / n`: its own end with a step at a noise level of nearly 0, which is lost.
            guidance_scale (`float`, *optional*):
                Strength `s` of the guidance by the instruction; 1 or less turns it off. By default the checkpoint's
                `config.default_guidance_scale` (5.0 unless saved with another).
            source_guidance_scale (`float`, *optional*):
                Strength `s_src` of a second guidance by the source clip; 1 turns it off and saves a third of the time.
                By default the checkpoint's `config.default_source_guidance_scale` (1.0 unless saved with another).
                With both, `v = v(0, 0) + s_src (v(src, 0) - v(0, 0)) + s (v(src, txt) - v(src, 0))`, equation 3 of
                InstructPix2Pix (arXiv 2211.09800): `0` is a source of zero latents, or the negative prompt with zero
                editing and visual tokens where the MLLM read none.
            num_videos_per_prompt (`int`, defaults to 1):
                Edits of each sample, from different noise.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the result deterministic. A list has one for each clip of the result.
            latents (`torch.Tensor`, *optional*):
                Gaussian noise to start from, in place of drawing it: `(batch * num_videos_per_prompt, in_channels,
                latent_frames, latent_height, latent_width)`.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(batch, text_len, text_dim)`, *optional*):
                Text tokens, as [`~RVEDiTPipeline.encode_prompt`] returns them.
            edit_embeds (`torch.Tensor` of shape `(batch, num_edit_tokens, dim)`, *optional*):
                Editing tokens, as [`~RVEDiTPipeline.encode_tokens`] returns them, `dim` being the transformer's width.
                The MLLM does not run when neither these nor `visual_embeds` are missing.
            visual_embeds (`torch.Tensor` of shape `(batch, num_visual, dim)`, *optional*):
                Visual tokens. Requires `visual_positions`.
            visual_positions (`torch.Tensor` of shape `(batch, num_visual, 3)`, *optional*):
                (time, row, column) of the visual tokens in [0, 1], fractions of the clip padded to whole latent
                frames.
            visual_attention_mask (`torch.Tensor` of shape `(batch, num_visual)`, bool, *optional*):
                `True` where a visual token is valid. `None`: all are.
            negative_edit_embeds (`torch.Tensor` of shape `(batch, num_edit_tokens, dim)`, *optional*):
                Editing tokens of the negative prompt. Zeros, the null condition of training, if they are not given and
                the MLLM does not read a negative prompt.
            negative_visual_embeds (`torch.Tensor` of the shape of `visual_embeds`, *optional*):
                Likewise for the visual tokens, which stand at `visual_positions` too.
            output_type (`str`, defaults to `"np"`):
                `"np"`, `"pt"`, `"pil"` or `"latent"`; see [`RVEDiTPipelineOutput`].
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`RVEDiTPipelineOutput`] or a tuple.
            callback_on_step_end (`Callable` or [`~diffusers.callbacks.PipelineCallback`], *optional*):
                `callback_on_step_end(pipe, step, timestep, callback_kwargs)`, called after each step; tensors in the
                dict that it returns replace the pipeline's. Also a
                [`~diffusers.callbacks.MultiPipelineCallbacks`]. Setting `pipe._interrupt = True` skips the remaining
                steps.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("latents",)`):
                Names of the tensors in `callback_kwargs`, out of `pipe._callback_tensor_inputs`. Without guidance the
                negative ones are `None`, unless they were given.
            attention_kwargs (`dict`, *optional*):
                `{"scale": float}` scales the LoRA layers.
            max_sequence_length (`int`, defaults to 512):
                Texts are padded and cut to this many tokens, or to the tokenizer's `model_max_length` if that is less.
            fps (`float` or `list[float]`, *optional*):
                Frames per second of the clips, from which the MLLM gets its time stamps. By default that of the file
                or [`Video`], and for images, arrays and tensors the processor's `default_fps`.
            keep_size (`bool`, defaults to `False`):
                Whether the result has the clip's own size even if `height` or `width` is given, and the clip edited at
                another.
            keep_detail (`bool`, *optional*):
                Whether the result is the clip itself with the change that the edit makes to its autoencoded copy, see
                [`~rvedit_diffusers.clips.transfer_edit`]: what the edit leaves alone keeps the detail that scaling and
                the autoencoder take away. That costs a second decoding. Otherwise the result is the edited copy. By
                default `config.default_keep_detail`; if that is `None`, a clip that was scaled down to be edited, and
                comes back at its own size, is kept so, and no other.
            reuse_context (`bool`, defaults to `True`):
                Whether to keep the keys and values of all tokens in all blocks, which are the same in every step,
                rather than compute them again. They take `4 * batch * tokens * dim * num_layers` bytes in bfloat16 for
                each branch of guidance, and the source's patches `2 * batch * seq * dim`. A callback that loads other
                weights into the same layers in place, as hot-swapping does, needs `False`. Tokens that are read alike
                are then merged, which changes nothing but rounding: those of the null condition, unless the
                transformer is compiled, and the text's padding, see [`merge_padding`], where the attention backend
                takes masks: PyTorch's `native`, the default, does.

        Examples:

        Returns:
            [`RVEDiTPipelineOutput`] or `tuple`: with `return_dict=False` a tuple whose one element is the clips.

        Raises:
            `TypeError`, `ValueError`: naming the argument, its value and what would be right, before any model runs.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
            if isinstance(sigmas, (list, tuple, np.ndarray, torch.Tensor)) and getattr(sigmas, "ndim", 1):
                num_inference_steps = len(sigmas) or num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if source_guidance_scale is None:
            source_guidance_scale = self.config.default_source_guidance_scale
        if keep_detail is None:
            keep_detail = self.config.default_keep_detail

        # 1. Check all inputs and read the clips
        embeds = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "edit_embeds": edit_embeds,
            "negative_edit_embeds": negative_edit_embeds,
            "visual_embeds": visual_embeds,
            "negative_visual_embeds": negative_visual_embeds,
            "visual_positions": visual_positions,
            "visual_attention_mask": visual_attention_mask,
        }
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            source_guidance_scale,
            num_videos_per_prompt,
            generator,
            latents,
            embeds,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            attention_kwargs,
            max_sequence_length,
            keep_size,
            keep_detail,
            reuse_context,
            sigmas,
        )
        generator = list(generator) if isinstance(generator, tuple) else generator
        clips, rates = load_clips(video, num_frames, self._max_frames(), fps)
        self._check_clips(
            clips, prompt, negative_prompt, embeds, height, width, num_videos_per_prompt, generator, latents
        )

        self._guidance_scale = guidance_scale
        self._source_guidance_scale = source_guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False

        # 2. Define call parameters
        device = self._execution_device
        dtype = self.transformer.dtype
        has_null = self.do_classifier_free_guidance or self.do_source_guidance
        prompts = prompt if prompt is None or isinstance(prompt, (list, tuple)) else [prompt]
        negative_prompts = negative_prompt if isinstance(negative_prompt, (list, tuple)) else [negative_prompt or ""]
        batch_size = max(
            len(rows) for rows in (clips, prompts, negative_prompts, *embeds.values()) if rows is not None
        )
        del embeds
        num_outputs = batch_size * num_videos_per_prompt
        num_frames, _, source_height, source_width = clips[0].shape
        latents_shape = self._latents_shape(num_outputs, clips[0], height, width)

        # 3. Prepare timesteps and the MLLM's inputs, the last that can be wrong, before any model runs
        if sigmas is None and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            # UniPC takes arrays alone
            self.scheduler.set_timesteps(sigmas=np.array([float(sigma) for sigma in sigmas]), device=device)
        timesteps = self.scheduler.timesteps
        missing = self._missing_tokens(edit_embeds, visual_embeds)
        mllm_inputs = negative_mllm_inputs = None
        if missing:
            mllm_inputs = self._prepare_mllm_inputs(clips, rates, prompts, "prompt")
            self.distiller.check_inputs(self.mllm, mllm_inputs)
            if has_null and any(text.strip() for text in negative_prompts):
                negative_mllm_inputs = self._prepare_mllm_inputs(clips, rates, negative_prompts, "negative_prompt")

        # 4. Encode the texts
        if "text" in self.token_streams:
            prompt_embeds, negative_prompt_embeds = self.encode_prompt(
                prompt=prompts,
                negative_prompt=negative_prompts,
                do_classifier_free_guidance=has_null,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                max_sequence_length=max_sequence_length,
                device=device,
            )

        # 5. Distil the MLLM's tokens
        all_inputs = [inputs for inputs in (mllm_inputs, negative_mllm_inputs) if inputs is not None]
        distilled = self._distill(all_inputs, device, dtype) if all_inputs else []
        if mllm_inputs is not None:
            edit_tokens, visual_tokens, *positions_and_mask = distilled[0]
            if "edit_embeds" in missing:
                edit_embeds = edit_tokens
            if "visual_embeds" in missing:
                visual_embeds, (visual_positions, visual_attention_mask) = visual_tokens, positions_and_mask
        if negative_mllm_inputs is not None:
            edit_tokens, visual_tokens, *_ = distilled[1]
            # A blank text gets the null condition, alone or among others.
            is_blank = torch.tensor([not text.strip() for text in negative_prompts], device=device).view(-1, 1, 1)
            if edit_embeds is not None and negative_edit_embeds is None:
                negative_edit_embeds = edit_tokens.masked_fill(is_blank, 0.0)
            if "visual_embeds" in missing:
                negative_visual_embeds = visual_tokens.masked_fill(is_blank, 0.0)
        del mllm_inputs, negative_mllm_inputs, all_inputs  # the clips' pixels, on the MLLM's device
        if has_null and edit_embeds is not None and negative_edit_embeds is None:
            negative_edit_embeds = torch.zeros_like(edit_embeds)
        if has_null and visual_embeds is not None and negative_visual_embeds is None:
            negative_visual_embeds = torch.zeros_like(visual_embeds)

        self._offload(self.text_encoder, self.mllm)

        # 6. Give every sample its rows
        embeds = (prompt_embeds, negative_prompt_embeds, edit_embeds, negative_edit_embeds)
        embeds += (visual_embeds, negative_visual_embeds)
        (
            prompt_embeds,
            negative_prompt_embeds,
            edit_embeds,
            negative_edit_embeds,
            visual_embeds,
            negative_visual_embeds,
        ) = (None if rows is None else _repeat(rows.to(device, dtype), num_outputs) for rows in embeds)
        del embeds
        if visual_positions is not None:
            visual_positions = _repeat(visual_positions.to(device, torch.float32), num_outputs)
        if visual_attention_mask is not None:
            # No mask where there is nothing to mask: some attention backends take none.
            all_valid = visual_attention_mask.all()
            visual_attention_mask = None if all_valid else _repeat(visual_attention_mask.to(device), num_outputs)

        # 7. Prepare latents
        source_video = None
        edit_size = self._legal_size(source_height, source_width, height, width)
        is_own_size = height is None and width is None
        size = (source_height, source_width) if is_own_size or keep_size else edit_size
        if keep_detail is None and self.transformer.config.source_channels:
            max_area = (self.config.default_max_area or math.inf) if is_own_size else math.prod(edit_size)
            keep_detail = size != edit_size and math.prod(size) > max_area
        if self.transformer.config.source_channels:
            source_video = self._prepare_video(clips, edit_size, device)
        latents, source_latents = self.prepare_latents(
            source_video, latents_shape, torch.float32, device, generator, latents
        )
        self._offload(self.vae)  # which was there to encode
        copy_latents = source_latents if keep_detail and output_type != "latent" else None
        if source_latents is not None:
            source_latents = _repeat(source_latents.to(dtype), num_outputs)
        # Equals `None`, the source being embedded without bias, but needs no second graph of a compiled transformer.
        no_source = torch.zeros_like(source_latents) if self.do_source_guidance else None
        clips = clips if copy_latents is not None else None
        del source_video

        # 8. Denoising loop
        self._num_timesteps = len(timesteps)
        sigmas = self.scheduler.sigmas.tolist()  # the cache hooks want numbers: read them once, not once a step
        self.scheduler.set_begin_index(0)
        step_kwargs = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator

        contexts = {}
        text_length = self._merged_length(prompt_embeds, negative_prompt_embeds) if reuse_context else None

        def predict(branch, latents, timestep, cache_context, **conditions):
            # The flow of one branch of guidance, whose context is computed once
            conditions["visual_positions"] = visual_positions
            if reuse_context and branch not in contexts:
                context = self.transformer.project_context(
                    latents, attention_kwargs=attention_kwargs, **self._merge_tokens(conditions, text_length)
                )
                if context is not None and "cond" in contexts:  # the same tensors are kept once
                    shared = {"rotary_emb": contexts["cond"].rotary_emb}
                    if conditions["source_hidden_states"] is source_latents:
                        shared["source_patches"] = contexts["cond"].source_patches
                    context = context._replace(**shared)
                contexts[branch] = context
            with self.transformer.cache_context(branch, **cache_context):
                return self.transformer(
                    hidden_states=latents,
                    timestep=timestep,
                    visual_attention_mask=visual_attention_mask,
                    attention_kwargs=attention_kwargs,
                    context=contexts.get(branch),
                    return_dict=False,
                    **conditions,
                )[0].to(torch.float32, copy=True)  # CUDA graphs write the next branch to the same memory

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                self._current_timestep = t
                cache_context = {"step_index": i, "sigma": sigmas[i], "num_inference_steps": self._num_timesteps}
                inputs = (latents.to(dtype), t.expand(num_outputs), cache_context)

                noise_pred = predict(
                    "cond",
                    *inputs,
                    encoder_hidden_states=prompt_embeds,
                    edit_hidden_states=edit_embeds,
                    visual_hidden_states=visual_embeds,
                    source_hidden_states=source_latents,
                )
                if self.do_classifier_free_guidance or self.do_source_guidance:
                    negatives = {
                        "encoder_hidden_states": negative_prompt_embeds,
                        "edit_hidden_states": negative_edit_embeds,
                        "visual_hidden_states": negative_visual_embeds,
                    }
                    noise_uncond = predict("uncond", *inputs, source_hidden_states=source_latents, **negatives)
                    scale = self.guidance_scale if self.do_classifier_free_guidance else 1.0
                    noise_pred = noise_uncond + scale * (noise_pred - noise_uncond)

                if self.do_source_guidance:
                    noise_uncond_source = predict(
                        "uncond_source", *inputs, source_hidden_states=no_source, **negatives
                    )
                    # Equation 3 of InstructPix2Pix, reordered: v(src, 0) is v(0, 0) + 1 (v(src, 0) - v(0, 0)).
                    noise_pred = noise_pred + (self.source_guidance_scale - 1.0) * (noise_uncond - noise_uncond_source)

                # compute the previous noisy sample x_t -> x_t-1
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False, **step_kwargs)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for k in callback_on_step_end_tensor_inputs:
                        callback_kwargs[k] = locals()[k]
                    tokens = {
                        k: v for k, v in locals().items() if k in self._callback_tensor_inputs and k != "latents"
                    }
                    before = _marks_of(self.transformer, tokens)
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs) or {}

                    latents = callback_outputs.pop("latents", latents)
                    # of other tokens, another source or other weights; in inference mode changes in place of what the
                    # callback was given are not counted
                    tokens |= {k: v for k, v in callback_outputs.items() if k in tokens}
                    is_uncounted = torch.is_inference_mode_enabled() and not tokens.keys().isdisjoint(callback_kwargs)
                    if is_uncounted or _marks_of(self.transformer, tokens) != before:
                        contexts.clear()
                    source_latents = callback_outputs.pop("source_latents", source_latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
                    edit_embeds = callback_outputs.pop("edit_embeds", edit_embeds)
                    negative_edit_embeds = callback_outputs.pop("negative_edit_embeds", negative_edit_embeds)
                    visual_embeds = callback_outputs.pop("visual_embeds", visual_embeds)
                    negative_visual_embeds = callback_outputs.pop("negative_visual_embeds", negative_visual_embeds)
                    if reuse_context and not contexts:
                        text_length = self._merged_length(prompt_embeds, negative_prompt_embeds)

                progress_bar.update()

        self._current_timestep = None
        contexts.clear()  # gigabytes for a large model, and not needed to decode

        # 9. Decode, cut the repeated frames and go back to the clip's own size
        if output_type == "latent":
            video = latents
        else:
            rebuilt = None if copy_latents is None else self._decode(copy_latents, num_frames)
            video = self._finish(self._decode(latents, num_frames), size, output_type, rebuilt, clips)

        if not return_dict:
            return (video,)

        return RVEDiTPipelineOutput(frames=video)


def _frames(clip: torch.Tensor, device: torch.device) -> torch.Tensor:
    # A clip as `load_clips` returns it, float32 in [-1, 1]
    clip = clip.to(device)
    return clip.float() / 127.5 - 1.0 if clip.dtype == torch.uint8 else clip * 2.0 - 1.0


def _check_format(safe_serialization: bool) -> None:
    if not safe_serialization:
        raise ValueError("`safe_serialization` has to be True for an upload, got False: pickles are not uploaded.")


def _upload_with_card(
    folder: Path,
    repository: Repository,
    subfolder: str | None,
    commit_message: str | None,
    token: str | None,
    create_pr: bool,
) -> str:
    if not subfolder:
        write_card(folder, repository.repo_id, repository.card)
    return upload(folder, repository, subfolder, commit_message, token, create_pr)


def merge_padding(text: torch.Tensor | None, length: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    r"""
    Cut a text's padding, and let what is left of it count for all of it.

    The text has no positions in cross-attention, so padding tokens, which are all zero, have one key and one value:
    one of them whose logit is raised by `log(n)` stands for `n`. The last three that are left share the `n` between
    them, such that rounding a logit to `text.dtype` does not change their sum.

    Args:
        text (`torch.Tensor` of shape `(batch, text_len, text_dim)`, *optional*):
            Text tokens, zero padded.
        length (`int`, *optional*):
            What to cut to; at least three more than the longest text. `None`: nothing is cut.

    Returns:
        `tuple`: the text `(batch, length, text_dim)`, and the `encoder_attention_mask` `(batch, length)` of
        [`RVEDiTTransformer3DModel`] in its dtype; or, if `text_len` is not more than `length`, the text itself and
        `None`.
    """
    if text is None or length is None or text.shape[1] <= length:
        return text, None
    rest, shares = text.shape[1] - length + 3, []
    for others in (2, 1, 0):  # that are to count as at least one token each
        share = 0.96 * (rest - others) if others else rest  # below what rounding could raise too far
        shares.append(torch.tensor(share).log().to(text.dtype))
        rest -= float(shares[-1].double().exp())
    mask = text.new_zeros(len(text), length)
    mask[:, -3:] = torch.stack(shares).to(text.device)
    return text[:, :length], mask


def _marks_of(transformer: torch.nn.Module, tensors: dict[str, torch.Tensor | None]) -> list:
    # What contexts depend on and a callback may change: the transformer; which adapters of each layer are active, how
    # strongly, and which are merged into it; and tensors, with the number of their changes in place where it is known.
    layers = (layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer))
    versions = [
        (name, id(value), None if value is None or value.is_inference() else value._version)
        for name, value in sorted(tensors.items())
    ]
    return [id(transformer), *versions] + [
        (
            list(layer.active_adapters),
            layer.disable_adapters,
            list(layer.merged_adapters),
            dict(getattr(layer, "scaling", {})),  # which not all kinds of adapters have
        )
        for layer in layers
    ]


def _repeat(rows: torch.Tensor, num_outputs: int) -> torch.Tensor:
    # Outputs of one sample are neighbours. One row serves all.
    return rows.repeat_interleave(num_outputs // rows.shape[0], dim=0)


def _check_texts(name: str, value) -> None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or any(not isinstance(text, str) for text in texts):
        raise TypeError(f"`{name}` has to be a string or a list of strings, got {value!r}.")
    if len(texts) == 0:
        raise ValueError(f"`{name}` has to hold at least one text, got {value!r}.")


def _check_tensor(name: str, value, shape: tuple[int | str, ...], is_bool: bool = False) -> None:
    if value is None:
        return
    kind = "bool" if is_bool else "floating point"
    if not torch.is_tensor(value):
        raise TypeError(f"`{name}` has to be a {kind} tensor, got {type(value).__name__}.")
    fits = value.ndim == len(shape) and all(
        size == expected or isinstance(expected, str) for size, expected in zip(value.shape, shape)
    )
    if not fits or 0 in value.shape or (value.dtype != torch.bool if is_bool else not value.is_floating_point()):
        raise ValueError(
            f"`{name}` has to be a {kind} tensor of shape ({', '.join(map(str, shape))}), got {value.dtype} of"
            f" {tuple(value.shape)}."
        )
