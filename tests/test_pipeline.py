import copy
import json
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from components import NUM_EDIT_TOKENS, Calls, build_pipeline, make_clip
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from rvedit_diffusers import RVEDiTPipeline, RVEDiTPipelineOutput, read_video, write_video
from rvedit_diffusers.clips import resize_frames, transfer_edit
from rvedit_diffusers.pipeline_rvedit import merge_padding


PROMPT = "make the red ball blue"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def edit(pipe, video, prompt=PROMPT, **kwargs):
    return pipe(video, prompt, **{"generator": generator(), "output_type": "pt"} | kwargs).frames


def tokens_of(pipe, video, prompt=PROMPT, **kwargs):
    with torch.no_grad():
        edit_embeds, visual_embeds, visual_positions, mask = pipe.encode_tokens(video, prompt, **kwargs)
    return {
        "edit_embeds": edit_embeds,
        "visual_embeds": visual_embeds,
        "visual_positions": visual_positions,
        "visual_attention_mask": mask,
    }


# ---- What comes out ----


@pytest.mark.parametrize(
    "output_type, kind, shape",
    [
        ("np", np.ndarray, (1, 5, 32, 32, 3)),
        ("pt", torch.Tensor, (1, 5, 3, 32, 32)),
        ("latent", torch.Tensor, (1, 16, 2, 4, 4)),
    ],
)
def test_output_type(shared_pipe, clip, output_type, kind, shape):
    frames = edit(shared_pipe, clip, output_type=output_type)
    assert isinstance(frames, kind) and frames.shape == shape
    assert frames.dtype in (torch.float32, np.float32)


@pytest.mark.parametrize("keep_detail", [False, True])
def test_output_types_hold_the_same_frames(shared_pipe, clip, keep_detail):
    tensor, array, images = (
        edit(shared_pipe, clip, keep_detail=keep_detail, output_type=kind) for kind in ("pt", "np", "pil")
    )
    assert 0.0 <= tensor.min() and tensor.max() <= 1.0 and array.flags.c_contiguous
    np.testing.assert_array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert [len(images), len(images[0])] == [1, 5]
    np.testing.assert_array_equal(np.stack(images[0]), (array[0] * 255).round().astype(np.uint8))


def test_positional_call_and_return_dict(shared_pipe, clip):
    output = shared_pipe(clip, PROMPT, generator=generator())
    assert isinstance(output, RVEDiTPipelineOutput)
    as_tuple = shared_pipe(clip, PROMPT, generator=generator(), return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    np.testing.assert_array_equal(as_tuple[0], output.frames)


# ---- What goes in ----


def forms_of_one_clip(clip):
    images = [PIL.Image.fromarray(frame) for frame in clip]
    tensor = torch.from_numpy(clip).permute(0, 3, 1, 2)
    return {
        "images": images,
        "tensor": tensor,
        "list of arrays": list(clip),
        "list of tensors": list(tensor),
        "batch array": clip[None],
        "batch tensor": tensor[None],
        "list of one clip": [clip],
        "list of one list of images": [images],
    }


@pytest.mark.parametrize("form", forms_of_one_clip(make_clip()))
def test_every_form_of_a_clip_gives_the_same_edit(shared_pipe, clip, form):
    assert torch.equal(edit(shared_pipe, forms_of_one_clip(clip)[form]), edit(shared_pipe, clip))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floating_point_clip_gives_the_same_edit(shared_pipe, clip, dtype):
    expected = edit(shared_pipe, clip)
    array = (clip / 255).astype(dtype)
    torch.testing.assert_close(edit(shared_pipe, array), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        edit(shared_pipe, torch.from_numpy(array).permute(0, 3, 1, 2)), expected, atol=1e-4, rtol=0
    )


def test_path_gives_the_edit_of_its_frames(shared_pipe, clip, tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, clip, fps=8)
    video = read_video(path)
    expected = edit(shared_pipe, video.frames, fps=8)
    for form in (path, str(path), video, [path]):
        assert torch.equal(edit(shared_pipe, form), expected)
    assert torch.equal(edit(shared_pipe, path, num_frames=3), edit(shared_pipe, video.frames[:3], fps=8))


def test_rate_of_the_clip_reaches_the_mllm(clip, tmp_path):
    pipe = build_pipeline("qwen3_vl")  # whose time stamps are text
    write_video(tmp_path / "clip.mp4", clip, fps=2)
    frames = read_video(tmp_path / "clip.mp4").frames
    of_file = tokens_of(pipe, tmp_path / "clip.mp4")["edit_embeds"]
    assert torch.equal(of_file, tokens_of(pipe, frames, fps=2)["edit_embeds"])
    assert not torch.equal(of_file, tokens_of(pipe, frames)["edit_embeds"])
    assert torch.equal(tokens_of(pipe, frames)["edit_embeds"], tokens_of(pipe, frames, fps=16)["edit_embeds"])


def test_no_more_of_a_file_is_decoded_than_can_be_edited(shared_pipe, tmp_path, monkeypatch):
    limit = (32 - 1) * 4 + 1  # the transformer's positions in frames
    write_video(tmp_path / "long.mp4", np.zeros((limit + 9, 16, 16, 3), np.uint8), fps=24)
    decoded = []

    def count(*args, **kwargs):
        video = read_video(*args, **kwargs)
        decoded.append(video.num_frames)
        return video

    monkeypatch.setattr("rvedit_diffusers.clips.read_video", count)
    with pytest.raises(ValueError, match=f"`video` has more frames than the {limit}"):
        shared_pipe(tmp_path / "long.mp4", PROMPT)
    assert decoded == [limit + 1]
    with pytest.raises(ValueError, match="`height`"):
        shared_pipe(tmp_path / "long.mp4", PROMPT, height=7)
    assert len(decoded) == 1


def test_floats_may_overshoot_by_rounding(shared_pipe, clip):
    array = clip.astype(np.float32) / 255
    over = array.copy()
    over[0, 0, 0] = [1.0000001, -1e-7, 0.5]
    array[0, 0, 0] = [1.0, 0.0, 0.5]
    assert torch.equal(edit(shared_pipe, over), edit(shared_pipe, array))


def test_other_image_modes_are_read_as_rgb(shared_pipe, clip):
    images = [PIL.Image.fromarray(frame).convert("L") for frame in clip]
    assert torch.equal(
        edit(shared_pipe, images), edit(shared_pipe, [image.convert("RGB").convert("RGBA") for image in images])
    )


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 6, 9])
def test_any_frame_count(shared_pipe, num_frames):
    assert edit(shared_pipe, make_clip(num_frames, 16, 16)).shape == (1, num_frames, 3, 16, 16)


def test_clip_is_padded_with_its_last_frame_and_cut_back(shared_pipe):
    clip = make_clip(6)
    padded = np.concatenate([clip, clip[-1:].repeat(3, axis=0)])
    tokens = tokens_of(shared_pipe, clip)
    torch.testing.assert_close(edit(shared_pipe, clip, **tokens), edit(shared_pipe, padded, **tokens)[:, :6])


def test_num_frames_edits_the_first_frames(shared_pipe):
    clip = make_clip(7)
    assert torch.equal(edit(shared_pipe, clip, num_frames=5), edit(shared_pipe, clip[:5]))


@pytest.mark.parametrize("size", [(32, 48), (30, 45), (7, 9), (33, 64)])
def test_any_size_comes_back_at_its_own(shared_pipe, size):
    assert edit(shared_pipe, make_clip(1, *size)).shape == (1, 1, 3, *size)


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({"height": 48, "width": 16}, (48, 16)),
        ({"height": 48}, (48, 96)),
        ({"width": 32}, (16, 32)),
    ],
)
def test_height_and_width(shared_pipe, asked, expected):
    assert edit(shared_pipe, make_clip(1, 32, 64), **asked).shape[-2:] == expected


def test_source_is_resized_to_the_nearest_legal_size(shared_pipe):
    latents = edit(shared_pipe, make_clip(1, 38, 42), output_type="latent")
    assert latents.shape[-2:] == (4, 6)  # 32 x 48 pixels


def test_larger_clips_are_edited_at_the_default_area(pipe):
    pipe.register_to_config(default_max_area=32 * 32)
    large, small = make_clip(1, 64, 96), make_clip(1, 32, 16)
    assert edit(pipe, large, output_type="latent").shape[-2:] == (4, 4)  # 26 x 39 pixels, rounded
    assert edit(pipe, large).shape[-2:] == (64, 96)
    assert edit(pipe, small, output_type="latent").shape[-2:] == (4, 2)  # not enlarged
    assert edit(pipe, large, height=64, width=96, output_type="latent").shape[-2:] == (8, 12)


def test_a_clip_that_was_scaled_down_keeps_its_detail(pipe):
    pipe.register_to_config(default_max_area=32 * 32)
    clips = np.stack([make_clip(3, 64, 96, seed=seed) for seed in (0, 1)])
    kept, plain = (edit(pipe, clips, keep_detail=keep, num_videos_per_prompt=2) for keep in (None, False))
    small = edit(pipe, clips, output_type="latent", num_videos_per_prompt=2)
    sources = [torch.from_numpy(frames).permute(0, 3, 1, 2) for frames in clips]
    size = pipe._legal_size(64, 96, None, None)
    copies = pipe.encode_video(pipe._prepare_video(sources, size, "cpu"))
    for index in range(4):
        latents = (small[index], copies[index // 2])
        edited, rebuilt = (pipe._decode(each[None], 3)[0].transpose(0, 1) for each in latents)
        wanted = transfer_edit(edited, rebuilt, sources[index // 2] / 127.5 - 1.0) / 2 + 0.5
        torch.testing.assert_close(kept[index], wanted, rtol=0, atol=1e-4)
        assert (kept[index] - plain[index]).abs().max() > 0.1


def test_detail_can_be_kept_at_any_size(shared_pipe, clip):
    usual, plain, kept = (edit(shared_pipe, clip, keep_detail=keep) for keep in (None, False, True))
    assert torch.equal(usual, plain) and not torch.equal(usual, kept)
    assert edit(shared_pipe, clip, keep_detail=True, height=16, width=48).shape[-2:] == (16, 48)


def test_a_clip_can_come_back_at_its_own_size_from_another(shared_pipe):
    clip, size = make_clip(3, 64, 96), {"height": 32, "width": 48}
    own, kept, plain = (
        edit(shared_pipe, clip, keep_size=True, keep_detail=keep, **size) for keep in (None, True, False)
    )
    assert torch.equal(own, kept) and not torch.equal(own, plain)
    small = edit(shared_pipe, clip, **size)[0]
    torch.testing.assert_close(plain[0], resize_frames(small * 2 - 1, (64, 96)) / 2 + 0.5, rtol=0, atol=1e-5)
    large = {"height": 128, "width": 192}  # has all the detail that there is
    own, plain = (edit(shared_pipe, clip, keep_size=True, keep_detail=keep, **large) for keep in (None, False))
    assert torch.equal(own, plain) and own.shape[-2:] == (64, 96)


def test_whether_detail_is_kept_by_default_is_saved_with_the_pipeline(pipe, clip, tmp_path):
    kept, plain = (edit(pipe, clip, keep_detail=keep) for keep in (True, False))
    pipe.register_to_config(default_keep_detail=True)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert torch.equal(edit(loaded, clip), kept) and torch.equal(edit(loaded, clip, keep_detail=False), plain)
    loaded.register_to_config(default_keep_detail="yes")
    with pytest.raises(ValueError, match="`keep_detail` has to be True, False or None, got 'yes'"):
        edit(loaded, clip)


def test_source_is_shown_to_the_transformer_in_normalised_latents(shared_pipe, clip):
    seen = []
    edit(
        shared_pipe,
        clip,
        num_inference_steps=1,
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs["source_latents"]) or {},
        callback_on_step_end_tensor_inputs=["source_latents"],
    )
    vae = shared_pipe.vae
    frames = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1.0
    with torch.no_grad():
        latents = vae.encode(frames).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.testing.assert_close(seen[0], (latents - mean) / std)


def test_visual_positions_are_fractions_of_the_padded_clip(shared_pipe):
    clip = make_clip(6, 16, 16)  # padded to 9 frames
    with torch.no_grad():
        positions = shared_pipe.encode_tokens(clip, PROMPT)[2]
    frames = shared_pipe.processor.sample_frames(6)
    expected = torch.tensor(frames, dtype=torch.float32).view(-1, 2).mean(1) / 8
    assert torch.equal(positions[0, :, 0].unique(), expected)


# ---- Batches ----


def test_batch_of_two_equals_two_of_one(shared_pipe):
    clips = [make_clip(seed=0), make_clip(seed=1)]
    prompts = [PROMPT, "remove the green square, please"]
    batch = edit(shared_pipe, clips, prompts, generator=[generator(0), generator(1)])
    single = [edit(shared_pipe, clips[i], prompts[i], generator=generator(i)) for i in range(2)]
    torch.testing.assert_close(batch, torch.cat(single), atol=1e-5, rtol=0)


def test_one_prompt_serves_all_clips(shared_pipe):
    clips = np.stack([make_clip(seed=0), make_clip(seed=1)])
    assert torch.equal(edit(shared_pipe, clips), edit(shared_pipe, clips, [PROMPT, PROMPT]))


def test_one_clip_serves_all_prompts(shared_pipe, clip):
    prompts = [PROMPT, "remove the green square"]
    torch.testing.assert_close(
        edit(shared_pipe, clip, prompts), edit(shared_pipe, [clip, clip], prompts), atol=1e-5, rtol=0
    )


def test_videos_of_one_prompt_are_neighbours(shared_pipe, clip):
    prompts = [PROMPT, "remove the green square"]
    four = edit(shared_pipe, clip, prompts, num_videos_per_prompt=2, generator=[generator(i) for i in range(4)])
    alone = edit(shared_pipe, clip, prompts[1], generator=generator(2))
    torch.testing.assert_close(four[2:3], alone, atol=1e-5, rtol=0)


# ---- Noise ----


def test_a_tuple_of_generators_is_a_list(shared_pipe, clip):
    assert torch.equal(edit(shared_pipe, clip, generator=(generator(),)), edit(shared_pipe, clip))


def test_same_seed_same_edit(shared_pipe, clip):
    assert torch.equal(edit(shared_pipe, clip), edit(shared_pipe, clip))
    assert not torch.equal(edit(shared_pipe, clip), edit(shared_pipe, clip, generator=generator(1)))


def test_given_latents_replace_the_drawn_ones(shared_pipe, clip):
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator())
    assert torch.equal(edit(shared_pipe, clip, latents=latents, generator=None), edit(shared_pipe, clip))


def test_generator_drives_a_stochastic_scheduler(pipe, clip):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert torch.equal(edit(pipe, clip), edit(pipe, clip))


# ---- Embeddings ----


def test_embeddings_replace_the_encoders(pipe, clip):
    kwargs = {"negative_prompt": "black and white"}
    expected = edit(pipe, clip, **kwargs)
    with torch.no_grad():
        prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(PROMPT, **kwargs)
        negative_edit_embeds, negative_visual_embeds, *_ = pipe.encode_tokens(clip, "black and white")
    tokens = tokens_of(pipe, clip)

    pipe.text_encoder = pipe.tokenizer = pipe.processor = pipe.mllm = pipe.distiller = None
    result = edit(
        pipe,
        clip,
        prompt=None,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        negative_edit_embeds=negative_edit_embeds,
        negative_visual_embeds=negative_visual_embeds,
        **tokens,
    )
    assert torch.equal(result, expected)


def test_prompt_next_to_prompt_embeds_goes_to_the_mllm_alone(shared_pipe, clip):
    with torch.no_grad():
        prompt_embeds, _ = shared_pipe.encode_prompt("remove the green square")
    mixed = edit(shared_pipe, clip, prompt_embeds=prompt_embeds)
    expected = edit(shared_pipe, clip, prompt="remove the green square", **tokens_of(shared_pipe, clip))
    assert torch.equal(mixed, expected)


def test_mllm_does_not_run_when_its_tokens_are_given(pipe, clip):
    tokens = tokens_of(pipe, clip)
    calls = Calls(pipe.mllm.model)
    edit(pipe, clip, negative_prompt="black and white", **tokens)
    assert calls.count == 0


def test_fully_valid_mask_equals_no_mask(shared_pipe, clip):
    tokens = tokens_of(shared_pipe, clip)
    assert tokens["visual_attention_mask"] is None
    tokens["visual_attention_mask"] = torch.ones(tokens["visual_embeds"].shape[:2], dtype=torch.bool)
    assert torch.equal(edit(shared_pipe, clip, **tokens), edit(shared_pipe, clip))


def test_masked_visual_tokens_have_no_effect(shared_pipe, clip):
    tokens = tokens_of(shared_pipe, clip)
    junk = torch.full_like(tokens["visual_embeds"][:, :3], 5.0)
    masked = {
        "edit_embeds": tokens["edit_embeds"],
        "visual_embeds": torch.cat([tokens["visual_embeds"], junk], dim=1),
        "visual_positions": torch.cat([tokens["visual_positions"], tokens["visual_positions"][:, :3]], dim=1),
        "visual_attention_mask": torch.arange(tokens["visual_embeds"].shape[1] + 3)[None]
        < tokens["visual_embeds"].shape[1],
    }
    torch.testing.assert_close(edit(shared_pipe, clip, **masked), edit(shared_pipe, clip, **tokens))


def test_encode_prompt_needs_the_text_encoder_alone(shared_pipe):
    names = ("processor", "mllm", "distiller", "vae", "transformer", "scheduler")
    alone = RVEDiTPipeline(
        tokenizer=shared_pipe.tokenizer, text_encoder=shared_pipe.text_encoder, **dict.fromkeys(names)
    )
    with torch.no_grad():
        prompt_embeds, negative_prompt_embeds = alone.encode_prompt(PROMPT, num_videos_per_prompt=2)
        expected, _ = shared_pipe.encode_prompt(PROMPT)
    assert torch.equal(prompt_embeds, expected.repeat(2, 1, 1))
    assert negative_prompt_embeds.shape == prompt_embeds.shape


def test_given_embeddings_are_returned_as_asked_for(shared_pipe):
    embeds = torch.randn(1, 4, 8)
    found, none = shared_pipe.encode_prompt(
        None, do_classifier_free_guidance=False, prompt_embeds=embeds, dtype=torch.bfloat16
    )
    assert none is None and torch.equal(found, embeds.bfloat16())


def test_what_only_the_text_encoder_can_encode_is_told(shared_pipe):
    names = ("text_encoder", "processor", "mllm", "distiller", "vae", "transformer", "scheduler")
    alone = RVEDiTPipeline(tokenizer=shared_pipe.tokenizer, **dict.fromkeys(names))
    with pytest.raises(ValueError, match="`text_encoder` is None: give `prompt_embeds`"):
        alone.encode_prompt(PROMPT)
    with pytest.raises(ValueError, match="`text_encoder` is None: give `negative_prompt_embeds`"):
        alone.encode_prompt(None, prompt_embeds=torch.zeros(1, 4, 8))


def test_sigmas_for_a_scheduler_that_takes_none_are_refused(pipe, clip):
    pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match="`sigmas` has to be None for the scheduler DPMSolverMultistepScheduler"):
        edit(pipe, clip, sigmas=[1.0, 0.5])


def test_encode_tokens_needs_the_mllm_alone(shared_pipe, clip):
    names = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
    components = {name: getattr(shared_pipe, name) for name in ("processor", "mllm", "distiller")}
    alone = RVEDiTPipeline(**components, **dict.fromkeys(names))
    tokens = tokens_of(alone, clip)
    assert tokens["edit_embeds"].shape == (1, NUM_EDIT_TOKENS, 24)
    for name, value in tokens_of(shared_pipe, clip).items():
        assert value is None or torch.equal(tokens[name], value)


def test_text_is_zero_padded_to_the_tokenizers_length(shared_pipe):
    with torch.no_grad():
        prompt_embeds, _ = shared_pipe.encode_prompt("remove the ball", max_sequence_length=512)
        shorter, _ = shared_pipe.encode_prompt("remove the ball", max_sequence_length=6)
    num_tokens = len(shared_pipe.tokenizer("remove the ball").input_ids)
    assert prompt_embeds.shape[1] == shared_pipe.tokenizer.model_max_length
    assert not prompt_embeds[:, num_tokens:].any() and prompt_embeds[:, :num_tokens].any()
    torch.testing.assert_close(shorter, prompt_embeds[:, :6])


def test_what_the_text_encoder_does_not_read_is_warned_of(shared_pipe):
    words = ["make", "the", "red", "ball", "blue"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared_pipe.encode_prompt(" ".join(words), max_sequence_length=6)  # and the mark of the end
    with pytest.warns(UserWarning, match="reads 4 tokens, and not the end of the text: 'ball blue'") as warned:
        shared_pipe.encode_prompt(["remove the ball", " ".join(words)], max_sequence_length=4)
    assert len(warned) == 1


def test_max_sequence_length_cuts_the_prompt(shared_pipe, clip):
    tokens = tokens_of(shared_pipe, clip)
    cut = edit(shared_pipe, clip, max_sequence_length=4, **tokens)
    assert torch.equal(cut, edit(shared_pipe, clip, "make the red circle", max_sequence_length=4, **tokens))
    assert not torch.equal(cut, edit(shared_pipe, clip, **tokens))


# ---- Guidance ----


@pytest.mark.parametrize("scales, passes", [((1.0, 1.0), 1), ((3.0, 1.0), 2), ((3.0, 1.5), 3), ((1.0, 1.5), 3)])
def test_passes_of_a_step(pipe, clip, scales, passes):
    calls = Calls(pipe.transformer)
    edit(pipe, clip, guidance_scale=scales[0], source_guidance_scale=scales[1], num_inference_steps=2)
    assert calls.count == 2 * passes


def conditions_of(pipe, clip, **kwargs):
    """The tensors that the transformer reads during a call."""
    seen = {}
    edit(
        pipe,
        clip,
        num_inference_steps=1,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.update(tensors) or {},
        callback_on_step_end_tensor_inputs=[name for name in pipe._callback_tensor_inputs if name != "latents"],
        **kwargs,
    )
    return seen | {"visual_positions": tokens_of(pipe, clip)["visual_positions"]}


def velocity(pipe, latents, timestep, conditions, prefix, source_latents):
    with torch.no_grad():
        return pipe.transformer(
            latents,
            timestep.expand(1),
            encoder_hidden_states=conditions[f"{prefix}prompt_embeds"],
            edit_hidden_states=conditions[f"{prefix}edit_embeds"],
            visual_hidden_states=conditions[f"{prefix}visual_embeds"],
            visual_positions=conditions["visual_positions"],
            source_hidden_states=source_latents,
        ).sample


def test_two_scale_guidance_is_the_formula(shared_pipe, clip):
    scale, source_scale = 3.0, 1.5
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator())
    result = edit(
        shared_pipe,
        clip,
        latents=latents,
        output_type="latent",
        num_inference_steps=1,
        guidance_scale=scale,
        source_guidance_scale=source_scale,
    )

    conditions = conditions_of(shared_pipe, clip)
    assert not conditions["negative_edit_embeds"].any() and not conditions["negative_visual_embeds"].any()
    source_latents, timestep = conditions["source_latents"], torch.tensor(1000.0)
    v_src_txt = velocity(shared_pipe, latents, timestep, conditions, "", source_latents)
    v_src = velocity(shared_pipe, latents, timestep, conditions, "negative_", source_latents)
    v_null = velocity(shared_pipe, latents, timestep, conditions, "negative_", torch.zeros_like(source_latents))
    expected = v_null + source_scale * (v_src - v_null) + scale * (v_src_txt - v_src)
    torch.testing.assert_close(result, latents - expected)  # one Euler step from sigma 1 to 0


def test_all_texts_take_one_pass_of_the_text_encoder(pipe, clip):
    calls = Calls(pipe.text_encoder)
    with torch.no_grad():
        both = pipe.encode_prompt([PROMPT, "remove the ball"], ["black and white", "blurred"])
        assert calls.count == 1
        alone = [
            pipe.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in ("remove the ball", "blurred")
        ]
    torch.testing.assert_close(both[0][1:], alone[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(both[1][1:], alone[1], atol=1e-6, rtol=0)


def test_negative_prompt_reaches_text_encoder_and_mllm(pipe, clip):
    plain = edit(pipe, clip)
    calls = Calls(pipe.mllm.model)
    negative = edit(pipe, clip, negative_prompt="black and white")
    assert calls.count == 2 and not torch.equal(negative, plain)

    through_text = edit(pipe, clip, negative_prompt="black and white", **tokens_of(pipe, clip))
    assert not torch.equal(through_text, negative) and not torch.equal(through_text, plain)


def test_negative_prompt_reaches_the_mllm_next_to_given_edit_embeds(shared_pipe, clip):
    given = {"edit_embeds": tokens_of(shared_pipe, clip)["edit_embeds"]}
    negative = tokens_of(shared_pipe, clip, "blue dog")["edit_embeds"]
    result = edit(shared_pipe, clip, negative_prompt="blue dog", **given)
    expected = edit(shared_pipe, clip, negative_prompt="blue dog", negative_edit_embeds=negative, **given)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    nothing = torch.zeros_like(negative)
    assert not torch.equal(
        result, edit(shared_pipe, clip, negative_prompt="blue dog", negative_edit_embeds=nothing, **given)
    )


@pytest.mark.parametrize("blank", ["", None, [""]])
def test_blank_negative_prompt_is_the_null_condition(pipe, clip, blank):
    calls = Calls(pipe.mllm.model)
    result = edit(pipe, clip, negative_prompt=blank)
    assert calls.count == 1 and torch.equal(result, edit(pipe, clip))


def test_blank_among_negative_prompts_is_the_null_condition(shared_pipe, clip):
    generators = [generator(), generator()]
    both = edit(shared_pipe, clip, negative_prompt=["black and white", ""], generator=generators)
    torch.testing.assert_close(both[1:], edit(shared_pipe, clip), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:1], edit(shared_pipe, clip, negative_prompt="black and white"), atol=1e-5, rtol=0)


def test_defaults_come_from_the_pipelines_config(pipe, clip):
    calls = Calls(pipe.transformer)
    expected = edit(pipe, clip, num_inference_steps=3, guidance_scale=4.0, source_guidance_scale=1.5)
    calls.count = 0
    pipe.register_to_config(
        default_num_inference_steps=3, default_guidance_scale=4.0, default_source_guidance_scale=1.5
    )
    assert torch.equal(edit(pipe, clip), expected)
    assert calls.count == 9


# ---- The loop ----


def test_callback_sees_and_replaces_tensors(shared_pipe, clip):
    shapes = []

    def callback(pipe, step, timestep, kwargs):
        shapes.append({name: tuple(value.shape) for name, value in kwargs.items()})
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == pipe.num_timesteps - 1 else kwargs

    latents = edit(
        shared_pipe,
        clip,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=shared_pipe._callback_tensor_inputs,
    )
    assert len(shapes) == 2 and set(shapes[0]) == set(shared_pipe._callback_tensor_inputs)
    assert shapes[0]["edit_embeds"] == (1, NUM_EDIT_TOKENS, 24)
    assert not latents.any()


@pytest.mark.parametrize(
    "name",
    [
        "source_latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "edit_embeds",
        "negative_edit_embeds",
        "visual_embeds",
        "negative_visual_embeds",
    ],
)
def test_tensor_returned_by_the_callback_is_used(shared_pipe, clip, name):
    def callback(pipe, step, timestep, kwargs):
        return {name: kwargs[name] + 1.0}

    changed = edit(shared_pipe, clip, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[name])
    assert not torch.allclose(changed, edit(shared_pipe, clip), atol=1e-5)


@pytest.mark.parametrize("scales, branches", [((1.0, 1.0), 1), ((3.0, 1.0), 2), ((3.0, 1.5), 3)])
def test_context_is_computed_once_for_each_branch(pipe, clip, scales, branches):
    attn = pipe.transformer.blocks[-1].attn2
    calls = [Calls(layer) for layer in (attn.to_k, attn.add_v_proj, pipe.transformer.source_embedding)]
    scales = {"guidance_scale": scales[0], "source_guidance_scale": scales[1]}
    reused = edit(pipe, clip, **scales, num_inference_steps=3)
    assert [each.count for each in calls] == [branches] * 3
    plain = edit(pipe, clip, **scales, num_inference_steps=3, reuse_context=False)
    assert [each.count for each in calls] == [4 * branches] * 3
    torch.testing.assert_close(reused, plain, atol=1e-5, rtol=0)  # tokens of the null condition are merged


def test_what_is_the_same_in_all_branches_is_kept_once(pipe, clip):
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["context"]), with_kwargs=True
    )
    edit(pipe, clip, guidance_scale=3.0, source_guidance_scale=1.5, num_inference_steps=1)
    cond, uncond, uncond_source = seen
    assert cond.source_patches is uncond.source_patches and cond.source_patches.any()
    assert not uncond_source.source_patches.any()
    assert cond.rotary_emb is uncond.rotary_emb is uncond_source.rotary_emb


def long_texts(*lengths, text_len=200):
    """Embeddings of texts that are padded to more tokens than are kept."""
    texts = torch.randn(len(lengths), text_len, 16, generator=generator())
    return texts * (torch.arange(text_len) < torch.tensor(lengths)[:, None])[..., None]


class Keys:
    """The numbers of tokens that a cross-attention reads: of text and edit, and visual ones, in each call."""

    def __init__(self, attn):
        self.counts = []
        attn.register_forward_pre_hook(self)

    def __call__(self, attn, args):
        context = args[1]
        keys = (context.key, context.visual_key)
        self.counts.append(tuple(None if key is None else key.shape[1] for key in keys))


@pytest.mark.parametrize("length, kept", [(5, 64), (61, 64), (62, 128), (150, 192), (190, 200)])
def test_padding_of_the_text_is_merged_where_that_leaves_fewer_tokens(pipe, clip, length, kept):
    keys = Keys(pipe.transformer.blocks[-1].attn2)
    texts = {"prompt_embeds": long_texts(length), "negative_prompt_embeds": long_texts(1)}
    merged = edit(pipe, clip, **texts, num_inference_steps=2)
    assert {text for text, _ in keys.counts} == {kept}  # of both branches: one graph of a compiled model serves both
    keys.counts.clear()
    plain = edit(pipe, clip, **texts, num_inference_steps=2, reuse_context=False)
    assert {text for text, _ in keys.counts} == {200}
    torch.testing.assert_close(merged, plain, atol=1e-5, rtol=0)


def test_padding_counts(pipe, clip):
    short = {"prompt_embeds": long_texts(9)[:, :64], "negative_prompt_embeds": long_texts(1)[:, :64]}
    padded = {"prompt_embeds": long_texts(9), "negative_prompt_embeds": long_texts(1)}
    assert not torch.allclose(edit(pipe, clip, **short), edit(pipe, clip, **padded), atol=1e-4)


def test_padding_is_not_merged_where_the_attention_takes_no_mask(pipe, clip):
    keys = Keys(pipe.transformer.blocks[-1].attn2)
    texts = {"prompt_embeds": long_texts(5), "negative_prompt_embeds": long_texts(1)}
    with attention_backend("_native_flash"):
        edit(pipe, clip, **texts)
    assert {text for text, _ in keys.counts} == {200}
    keys.counts.clear()
    pipe.transformer.set_attention_backend("flex")
    assert pipe._merged_length(texts["prompt_embeds"]) is None
    pipe.transformer.set_attention_backend("native")
    edit(pipe, clip, **texts)
    assert {text for text, _ in keys.counts} == {64}


class OtherText(PipelineCallback):
    tensor_inputs = ["prompt_embeds"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"prompt_embeds": callback_kwargs["prompt_embeds"] + 1.0}


@pytest.mark.parametrize("wrap", [lambda callback: callback, lambda callback: MultiPipelineCallbacks([callback])])
def test_callback_objects_of_diffusers_say_what_they_read(shared_pipe, clip, wrap):
    callback = OtherText(cutoff_step_ratio=None, cutoff_step_index=0)
    found = edit(shared_pipe, clip, callback_on_step_end=wrap(callback))
    names = {"callback_on_step_end_tensor_inputs": OtherText.tensor_inputs}
    assert torch.equal(found, edit(shared_pipe, clip, callback_on_step_end=callback.callback_fn, **names))
    assert not torch.allclose(found, edit(shared_pipe, clip), atol=1e-5)


def test_text_of_the_callback_is_merged_anew(pipe, clip):
    keys = Keys(pipe.transformer.blocks[-1].attn2)
    texts = {"prompt_embeds": long_texts(5), "negative_prompt_embeds": long_texts(1)}

    def callback(pipe, step, timestep, kwargs):
        return {"prompt_embeds": long_texts(100)}

    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "callback_on_step_end": callback}
    changed = edit(pipe, clip, **texts, **names, num_inference_steps=2)
    assert [text for text, _ in keys.counts] == [64, 64, 128, 128]
    plain = edit(pipe, clip, **texts, **names, num_inference_steps=2, reuse_context=False)
    torch.testing.assert_close(changed, plain, atol=1e-5, rtol=0)


def test_tensors_that_the_callback_leaves_alone_are_not_projected_again(pipe, clip):
    calls = Calls(pipe.transformer.blocks[-1].attn2.to_k)
    names = pipe._callback_tensor_inputs
    for callback in (lambda *args: args[-1], lambda *args: None):
        edit(pipe, clip, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert calls.count == 2 * 2  # branches of two edits, of two steps each


@pytest.mark.parametrize("name", ["prompt_embeds", "edit_embeds", "source_latents"])
def test_tensors_that_the_callback_changes_in_place_count(shared_pipe, clip, name):
    def callback(pipe, step, timestep, kwargs):
        kwargs[name] += 1.0
        return {}

    changes = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [name]}
    changed = edit(shared_pipe, clip, **changes)
    torch.testing.assert_close(changed, edit(shared_pipe, clip, **changes, reuse_context=False), atol=1e-5, rtol=0)
    assert not torch.allclose(changed, edit(shared_pipe, clip), atol=1e-5)


@pytest.mark.parametrize("returns", [lambda kwargs: kwargs, lambda kwargs: {}, lambda kwargs: None])
@pytest.mark.parametrize("change", [0.0, 1.0])
def test_an_edit_in_inference_mode_is_the_same(shared_pipe, clip, change, returns):
    def callback(pipe, step, timestep, kwargs):
        kwargs["prompt_embeds"] += change
        return returns(kwargs)

    changes = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with torch.inference_mode():
        found = edit(shared_pipe, clip, **changes)
    assert torch.equal(found, edit(shared_pipe, clip, **changes))


def test_a_transformer_that_the_callback_puts_in_place_is_used_from_then_on(pipe, clip):
    first, other = pipe.transformer, copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        other.blocks[-1].attn2.to_v.weight.mul_(-2.0)

    def callback(pipe, step, timestep, kwargs):
        pipe.transformer = other
        return {}

    edits = []
    for reuse_context in (True, False):
        pipe.transformer = first
        edits.append(edit(pipe, clip, callback_on_step_end=callback, reuse_context=reuse_context))
    torch.testing.assert_close(*edits, atol=1e-5, rtol=0)
    pipe.transformer = first
    assert not torch.allclose(edits[0], edit(pipe, clip), atol=1e-5)


@pytest.mark.parametrize("change", ["disable_lora", "set_adapters"])
def test_adapters_that_the_callback_changes_count_for_what_is_reused(pipe, clip, change):
    config = LoraConfig(r=2, target_modules=["to_k", "to_v", "source_embedding"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(config)

    def callback(pipe, step, timestep, kwargs):
        if step == 0:
            getattr(pipe, change)(*["default", 0.3] * (change == "set_adapters"))
        return {}

    start = copy.deepcopy(pipe.transformer)
    edits = []
    for reuse_context in (True, False):
        pipe.transformer = copy.deepcopy(start)
        edits.append(edit(pipe, clip, callback_on_step_end=callback, reuse_context=reuse_context))
    pipe.transformer = start
    torch.testing.assert_close(*edits, atol=1e-5, rtol=0)
    assert not torch.allclose(edits[0], edit(pipe, clip), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text_len, length", [(512, 64), (513, 512), (226, 128), (70, 64), (4096, 64), (4001, 128)])
def test_merged_padding_stands_for_all_of_it(dtype, text_len, length):
    text, mask = merge_padding(long_texts(9, 40, text_len=text_len).to(dtype), length)
    assert text.shape == (2, length, 16) and mask.shape == (2, length) and mask.dtype == dtype
    weights = mask.double().exp()
    assert (weights[:, :-3] == 1).all()
    torch.testing.assert_close(weights.sum(1), torch.full((2,), float(text_len)).double(), rtol=2e-5, atol=0)


def test_text_without_more_padding_is_left_alone():
    text = long_texts(9, text_len=64)
    assert merge_padding(text, 64) == (text, None) and merge_padding(text, None) == (text, None)
    assert merge_padding(None, 64) == (None, None)


def test_null_tokens_are_merged_unless_the_transformer_is_compiled(pipe, clip):
    shallow, deep = (Keys(pipe.transformer.blocks[index].attn2) for index in (0, -1))
    edit(pipe, clip, num_inference_steps=1)
    num_text, num_visual = deep.counts[0]
    assert shallow.counts == [(NUM_EDIT_TOKENS, None), (1, None)] and num_visual > 1
    assert deep.counts[1] == (num_text, None)  # the one value is added to the text's

    for keys in (shallow, deep):
        keys.counts.clear()
    edit(pipe, clip, num_inference_steps=1, negative_prompt="blurry")
    assert shallow.counts == [(NUM_EDIT_TOKENS, None)] * 2 and deep.counts == [(num_text, num_visual)] * 2

    for keys in (shallow, deep):
        keys.counts.clear()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    edit(pipe, clip, num_inference_steps=1)
    assert shallow.counts == [(NUM_EDIT_TOKENS, None)] * 2 and deep.counts == [(num_text, num_visual)] * 2


def test_null_tokens_are_merged_beside_masked_ones(pipe, clip):
    tokens = tokens_of(pipe, clip)
    tokens["visual_attention_mask"] = torch.arange(tokens["visual_embeds"].shape[1])[None] > 0
    deep = Keys(pipe.transformer.blocks[-1].attn2)
    merged = edit(pipe, clip, **tokens, num_inference_steps=2)
    assert [visual for _, visual in deep.counts] == [tokens["visual_embeds"].shape[1], None] * 2
    plain = edit(pipe, clip, **tokens, num_inference_steps=2, reuse_context=False)
    torch.testing.assert_close(merged, plain, atol=1e-5, rtol=0)


def test_null_editing_tokens_beside_text_keep_their_number(clip):
    pipe = build_pipeline(shallow_tokens=("edit", "text"))
    keys = Keys(pipe.transformer.blocks[0].attn2)
    merged = edit(pipe, clip, num_inference_steps=2)
    assert len(set(keys.counts)) == 1
    torch.testing.assert_close(merged, edit(pipe, clip, num_inference_steps=2, reuse_context=False), atol=1e-5, rtol=0)


def test_interrupt_skips_the_remaining_steps(pipe, clip):
    calls = Calls(pipe.transformer)

    def callback(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 0
        return kwargs

    edit(pipe, clip, num_inference_steps=4, guidance_scale=1.0, callback_on_step_end=callback)
    assert calls.count == 1


def test_guidance_can_change_in_the_callback(pipe, clip):
    calls = Calls(pipe.transformer)

    def callback(pipe, step, timestep, kwargs):
        pipe._guidance_scale = 1.0
        return kwargs

    edit(pipe, clip, num_inference_steps=3, callback_on_step_end=callback)
    assert calls.count == 2 + 1 + 1


def test_progress_bar_counts_the_steps(pipe, clip, capsys):
    pipe.set_progress_bar_config(disable=False)
    edit(pipe, clip, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


class ScalarReads(TorchDispatchMode):
    """Counts reads of tensor values by Python, each of which would wait for the accelerator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reuse_context", [True, False])
def test_loop_reads_no_tensor_values(shared_pipe, clip, reuse_context):
    counts = []
    with ScalarReads() as reads:
        edit(
            shared_pipe,
            clip,
            num_inference_steps=3,
            source_guidance_scale=1.5,
            reuse_context=reuse_context,
            callback_on_step_end=lambda pipe, i, t, kwargs: counts.append(reads.count) or {},
        )
    assert reads.count > 0  # the counter counts: the inputs are checked by value
    assert len(counts) == 3 and counts[0] == counts[2]


@pytest.mark.parametrize("sigmas", [None, [1.0, 0.7, 0.2]])
def test_unipc_scheduler_integrates_the_flow(pipe, clip, sigmas):
    # Of order 1 and without its corrector UniPC takes Euler's steps.
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=1,
        disable_corrector=[0, 1, 2],
    )
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator())
    kwargs = {"guidance_scale": 1.0, "latents": latents, "output_type": "latent"}
    conditions = conditions_of(pipe, clip, guidance_scale=1.0)
    result = edit(pipe, clip, num_inference_steps=3, sigmas=sigmas, **kwargs)

    levels, timesteps = pipe.scheduler.sigmas, pipe.scheduler.timesteps
    if sigmas is not None:
        wanted = torch.tensor([*sigmas, 0.0])
        torch.testing.assert_close(levels, 3 * wanted / (1 + 2 * wanted), atol=2e-6, rtol=0)
    for step in range(3):
        flow = velocity(pipe, latents, timesteps[step], conditions, "", conditions["source_latents"])
        latents = latents + (levels[step + 1] - levels[step]) * flow
    torch.testing.assert_close(result, latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sigmas", [None, [1.0, 0.6, 0.1], np.array([0.9, 0.5]), list(torch.tensor([0.9, 0.5]))])
def test_every_step_has_a_noise_level_to_remove(pipe, clip, sigmas):
    """The scheduler's own last step, from a noise level of 0.003, would be lost."""
    steps = {"num_inference_steps": 4} if sigmas is None else {"sigmas": sigmas}
    calls = Calls(pipe.transformer)
    edit(pipe, clip, guidance_scale=1.0, **steps)
    wanted = torch.tensor([1, 0.75, 0.5, 0.25] if sigmas is None else sigmas).float()
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], 3 * wanted / (1 + 2 * wanted))  # the scheduler's shift is 3
    assert calls.count == len(wanted) and pipe.scheduler.sigmas[-1] == 0


@pytest.mark.parametrize(
    "change, name",
    [
        ({}, "prediction_type"),
        ({"prediction_type": "flow_prediction"}, "use_flow"),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}, "use_dynamic"),
    ],
)
def test_schedulers_that_integrate_no_flow_are_refused(pipe, clip, change, name):
    pipe.scheduler = UniPCMultistepScheduler(**change)
    with pytest.raises(ValueError, match=f"`scheduler` has {name}"):
        edit(pipe, clip)


# ---- Components ----


def test_call_leaves_the_components_as_they_were(pipe, clip):
    names = ("text_encoder", "mllm", "distiller", "vae", "transformer")
    pipe.mllm.train()
    before = {name: copy.deepcopy(getattr(pipe, name).state_dict()) for name in names}
    flags = {
        name: [(module.training, vars(module).get("use_tiling")) for module in getattr(pipe, name).modules()]
        + [parameter.requires_grad for parameter in getattr(pipe, name).parameters()]
        for name in names
    }
    config = dict(pipe.config)
    edit(pipe, clip)
    for name in names:
        component = getattr(pipe, name)
        for key, value in component.state_dict().items():
            assert torch.equal(value, before[name][key])
        modules = [(module.training, vars(module).get("use_tiling")) for module in component.modules()]
        assert modules + [parameter.requires_grad for parameter in component.parameters()] == flags[name]
    assert dict(pipe.config) == config


def test_qwen3_vl(clip):
    frames = edit(build_pipeline("qwen3_vl"), clip)
    assert frames.isfinite().all() and frames.shape == (1, 5, 3, 32, 32)


def test_routing_without_the_mllms_streams_needs_no_mllm(clip):
    pipe = build_pipeline(shallow_tokens=("text",), deep_tokens=("text",))
    expected = edit(pipe, clip)
    pipe.processor = pipe.mllm = pipe.distiller = None
    assert torch.equal(edit(pipe, clip), expected)


def test_routing_without_text_needs_no_text_encoder(clip):
    pipe = build_pipeline(deep_tokens=("edit", "visual"))
    expected = edit(pipe, clip)
    pipe.text_encoder = pipe.tokenizer = None
    assert torch.equal(edit(pipe, clip), expected)


def test_transformer_without_source_channels_does_not_encode(clip):
    pipe = build_pipeline(source_channels=0)
    calls = Calls(pipe.vae.encoder)
    assert edit(pipe, clip).shape == (1, 5, 3, 32, 32)
    assert calls.count == 0


def test_vae_of_wan_2_2():
    pipe = build_pipeline(in_channels=48, source_channels=48, out_channels=48)
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    ).eval()
    pipe = RVEDiTPipeline(**pipe.components | {"vae": vae}, default_num_inference_steps=1)
    pipe.set_progress_bar_config(disable=True)
    assert edit(pipe, make_clip(5, 40, 64), output_type="latent").shape == (1, 48, 2, 2, 4)
    assert edit(pipe, make_clip(5, 40, 64)).shape == (1, 5, 3, 40, 64)


def test_vae_slicing_equals_no_slicing(pipe):
    clips = [make_clip(seed=0), make_clip(seed=1)]
    expected = edit(pipe, clips)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(edit(pipe, clips), expected, atol=1e-5, rtol=0)


def test_vae_tiling_is_the_users_choice(pipe):
    clip = make_clip(1, 64, 64)
    plain = edit(pipe, clip)
    pipe.vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=16,
        tile_sample_stride_width=16,
    )
    tiled = edit(pipe, clip)
    assert tiled.shape == plain.shape and not torch.equal(tiled, plain)


def test_bfloat16_components(pipe, clip, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = RVEDiTPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "mllm", "distiller", "vae", "transformer"):
        assert getattr(half, name).dtype == torch.bfloat16

    latents = edit(half, clip, output_type="latent")
    assert latents.dtype == torch.float32  # the sum over steps is not rounded to bfloat16
    assert not torch.equal(latents, latents.bfloat16().float())
    torch.testing.assert_close(latents, edit(pipe, clip, output_type="latent"), atol=0.06, rtol=0)
    frames = edit(half, clip)
    assert frames.dtype == torch.float32 and frames.isfinite().all()


# ---- Saving, offloading ----


@pytest.mark.parametrize("loader", [RVEDiTPipeline, DiffusionPipeline])
def test_save_and_load(pipe, clip, tmp_path, loader):
    pipe.save_pretrained(tmp_path / "first")
    index = json.loads((tmp_path / "first" / "model_index.json").read_text())
    for name, class_name in (
        ("transformer", "RVEDiTTransformer3DModel"),
        ("distiller", "RVEDiTTokenDistiller"),
        ("processor", "RVEDiTProcessor"),
    ):
        assert index[name] == ["rvedit_diffusers", class_name]
    assert index["_class_name"] == "RVEDiTPipeline"

    loaded = loader.from_pretrained(tmp_path / "first")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is RVEDiTPipeline
    assert loaded.config.default_num_inference_steps == 2
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            state = getattr(loaded, name).state_dict()
            assert all(torch.equal(state[key], value) for key, value in component.state_dict().items())
    # Weights read from a file lie at other addresses, which picks other kernels: equal but for the last bit.
    torch.testing.assert_close(edit(loaded, clip), edit(pipe, clip), atol=1e-6, rtol=0)

    loaded.save_pretrained(tmp_path / "second")
    again = loader.from_pretrained(tmp_path / "second")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(edit(again, clip), edit(loaded, clip))


def test_load_without_the_encoders(pipe, clip, tmp_path):
    pipe.save_pretrained(tmp_path)
    names = ("tokenizer", "text_encoder", "processor", "mllm", "distiller")
    loaded = RVEDiTPipeline.from_pretrained(tmp_path, **dict.fromkeys(names))
    loaded.set_progress_bar_config(disable=True)
    assert all(getattr(loaded, name) is None for name in names)
    with torch.no_grad():
        prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(PROMPT)
    embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    loaded.save_pretrained(tmp_path / "lighter")
    again = RVEDiTPipeline.from_pretrained(tmp_path / "lighter")
    again.set_progress_bar_config(disable=True)
    for each in (loaded, again):
        result = edit(each, clip, prompt=None, **embeds, **tokens_of(pipe, clip))
        torch.testing.assert_close(result, edit(pipe, clip), atol=1e-6, rtol=0)


def test_from_pipe(pipe, clip):
    same = RVEDiTPipeline.from_pipe(pipe)
    same.set_progress_bar_config(disable=True)
    assert same.transformer is pipe.transformer and same.config.default_num_inference_steps == 2
    assert torch.equal(edit(same, clip), edit(pipe, clip))


def test_model_cpu_offload_frees_the_mllm_before_the_transformer_runs(pipe, clip, monkeypatch):
    from accelerate.hooks import CpuOffload

    expected = edit(pipe, clip, negative_prompt="black and white")
    pipe.enable_model_cpu_offload(device="cpu")
    names = {id(component): name for name, component in pipe.components.items()}
    events = []
    pre_forward = CpuOffload.pre_forward

    def record_load(self, module, *args, **kwargs):
        events.append(names[id(module)])
        if self.prev_module_hook is not None:
            events.append(f"no {names[id(self.prev_module_hook.model)]}")
        return pre_forward(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", record_load)
    assert torch.equal(edit(pipe, clip, negative_prompt="black and white"), expected)
    loads = [event for event in events if not event.startswith("no ")]
    assert loads[0] == "text_encoder" and set(loads) == {"text_encoder", "mllm", "distiller", "vae", "transformer"}
    last_mllm = len(events) - 1 - events[::-1].index("mllm")  # which does not come back for the negative prompt
    assert last_mllm < events.index("no mllm") < events.index("transformer")


def test_model_cpu_offload_frees_the_vae_before_the_transformer_runs(pipe, clip, monkeypatch):
    from accelerate.hooks import CpuOffload

    expected = edit(pipe, clip)
    pipe.enable_model_cpu_offload(device="cpu")
    events, init_hook = [], CpuOffload.init_hook
    monkeypatch.setattr(
        CpuOffload, "init_hook", lambda self, module: (events.append(module), init_hook(self, module))[1]
    )
    pipe.transformer.register_forward_pre_hook(lambda module, args: events.append(module))
    assert torch.equal(edit(pipe, clip), expected)
    assert events.index(pipe.vae) < events.index(pipe.transformer)


class Stopped(Exception):
    pass


def test_a_call_that_was_stopped_leaves_nothing_behind(pipe, clip):
    def stop(pipe, step, timestep, kwargs):
        raise Stopped

    larger = make_clip(5, 48, 64)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    expected = edit(pipe, larger, num_inference_steps=3)
    with pytest.raises(Stopped):
        edit(pipe, clip, num_inference_steps=3, callback_on_step_end=stop)
    assert torch.equal(edit(pipe, larger, num_inference_steps=3), expected)


def test_group_offload_without_the_size_of_groups_is_refused_before_anything_has_hooks(pipe, clip):
    with pytest.raises(ValueError, match="`num_blocks_per_group` has to be"):
        pipe.enable_group_offload("cpu")
    assert not any(hasattr(module, "_diffusers_hook") for module in pipe.text_encoder.modules())


def test_model_cpu_offload_frees_the_text_encoder_when_the_mllm_does_not_run(pipe, clip, monkeypatch):
    from accelerate.hooks import CpuOffload

    tokens = tokens_of(pipe, clip)
    expected = edit(pipe, clip, **tokens)
    pipe.enable_model_cpu_offload(device="cpu")
    names = {id(component): name for name, component in pipe.components.items()}
    events = []
    for kind in ("pre_forward", "init_hook"):
        plain = getattr(CpuOffload, kind)

        def record(self, module, *args, kind=kind, plain=plain, **kwargs):
            events.append((kind, names[id(module)]))
            return plain(self, module, *args, **kwargs)

        monkeypatch.setattr(CpuOffload, kind, record)
    assert torch.equal(edit(pipe, clip, **tokens), expected)
    order = [events.index(event) for event in (("pre_forward", "text_encoder"), ("init_hook", "text_encoder"))]
    assert order[0] < order[1] < events.index(("pre_forward", "transformer"))


def test_group_offload_leaves_no_encoder_whole_on_the_device(pipe):
    pipe.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    for model in (pipe.text_encoder, pipe.mllm):
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        hooks = [linear._diffusers_hook.get_hook("group_offloading") for linear in linears]
        assert len(linears) > 5 and all(hook.group.modules == [linear] for hook, linear in zip(hooks, linears))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload_loads_the_mllm(pipe, clip, level, monkeypatch):
    expected = edit(pipe, clip)
    embedding = pipe.mllm.get_input_embeddings()
    pipe.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    loaded, onload = [], ModuleGroup.onload_
    monkeypatch.setattr(ModuleGroup, "onload_", lambda self: (loaded.append(self), onload(self))[1])
    # Null tokens are merged in a context, which group offloading leaves out.
    torch.testing.assert_close(edit(pipe, clip), expected, atol=1e-5, rtol=0)
    modules = [inner for group in loaded for module in group.modules for inner in module.modules()]
    assert any(module is embedding for module in modules)


def test_sequential_cpu_offload(pipe, clip):
    from accelerate import cpu_offload

    expected = edit(pipe, clip)
    models = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    for model in models:
        # What `enable_sequential_cpu_offload` does, but on plain "cpu": accelerate loses parameters on "cpu:0".
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    for _ in range(2):
        assert torch.equal(edit(pipe, clip), expected)
        assert all(model.device.type == "meta" for model in models)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "model", "sequential", "block_level", "leaf_level"])
def test_devices(pipe, clip, mode):
    expected = edit(pipe, clip, negative_prompt="black and white")
    if mode == "none":
        pipe.to("cuda")
    elif mode == "model":
        pipe.enable_model_cpu_offload()
    elif mode == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(torch.device("cuda"), offload_type=mode, num_blocks_per_group=1)
    torch.testing.assert_close(edit(pipe, clip, negative_prompt="black and white").cpu(), expected, atol=1e-3, rtol=0)
