"""Wrong calls raise ValueError or TypeError that name argument, value and remedy, and run no model."""

import re

import numpy as np
import PIL.Image
import pytest
import torch
from components import DIM, NUM_EDIT_TOKENS, TEXT_DIM, build_pipeline, make_clip
from torch.nn.modules.module import register_module_forward_pre_hook


PROMPT = "make the red ball blue"
NUM_VISUAL = 6


@pytest.fixture
def forward_passes():
    """Names of the classes of all modules that ran."""
    names = []
    handle = register_module_forward_pre_hook(lambda module, args: names.append(type(module).__name__))
    yield names
    handle.remove()


def images(*sizes):
    return [PIL.Image.new("RGB", size) for size in sizes]


def with_value(value):
    clip = (make_clip() / 255).astype(np.float32)
    clip[1, 2, 3, 0] = value
    return clip


def embeds(**changes):
    """All embeddings of a call without models, with guidance; `None` removes one."""
    kwargs = {
        "prompt": None,
        "prompt_embeds": torch.zeros(1, 5, TEXT_DIM),
        "negative_prompt_embeds": torch.zeros(1, 5, TEXT_DIM),
        "edit_embeds": torch.zeros(1, NUM_EDIT_TOKENS, DIM),
        "visual_embeds": torch.zeros(1, NUM_VISUAL, DIM),
        "visual_positions": torch.zeros(1, NUM_VISUAL, 3),
    } | changes
    return {name: value for name, value in kwargs.items() if value is not None or name == "prompt"}


CLIP = make_clip()
LONG = make_clip(num_frames=1, height=16, width=16 * 33)

# name: (arguments that differ from a right call, the error, what its message has to hold)
WRONG_CALLS = {
    "video of another type": ({"video": 3}, TypeError, ["`video`", "int"]),
    "video None": ({"video": None}, TypeError, ["`video`", "NoneType"]),
    "no frames": ({"video": []}, ValueError, ["`video`", "empty list"]),
    "array of 0 frames": ({"video": CLIP[:0]}, ValueError, ["`video`", "at least one frame", "(0, 32, 32, 3)"]),
    "batch of 0 clips": ({"video": CLIP[None][:0]}, ValueError, ["`video`", "(0, 5, 32, 32, 3)"]),
    "clip of 0 frames in a batch": ({"video": [CLIP, []]}, ValueError, ["`video[1]`", "empty list"]),
    "frames of no width": ({"video": CLIP[:, :, :0]}, ValueError, ["`video`", "one pixel", "(5, 32, 0, 3)"]),
    "no such file": ({"video": "no/such/file.mp4"}, ValueError, ["`video`", "no/such/file.mp4"]),
    "file that is no video": ({"video": __file__}, ValueError, ["`video`", "test_pipeline_inputs.py"]),
    "one frame": ({"video": CLIP[0]}, ValueError, ["`video`", "(32, 32, 3)", "(frames, height, width, 3)"]),
    "array channels first": (
        {"video": CLIP.transpose(0, 3, 1, 2)},
        ValueError,
        ["`video`", "(5, 3, 32, 32)", "(frames, height, width, 3)"],
    ),
    "tensor channels last": (
        {"video": torch.from_numpy(CLIP)},
        ValueError,
        ["`video`", "(5, 32, 32, 3)", "(frames, 3, height, width)"],
    ),
    "integers": ({"video": CLIP.astype(np.int64)}, TypeError, ["`video`", "int64", "uint8"]),
    "integer tensor": (
        {"video": torch.from_numpy(CLIP).permute(0, 3, 1, 2).int()},
        TypeError,
        ["`video`", "torch.int32", "uint8"],
    ),
    "NaN": ({"video": with_value(np.nan)}, ValueError, ["`video`", "NaN", "[0, 1]"]),
    "infinity": ({"video": with_value(np.inf)}, ValueError, ["`video`", "inf", "[0, 1]"]),
    "floats up to 255": ({"video": CLIP.astype(np.float32)}, ValueError, ["`video`", "[0, 1]", "got [0, "]),
    "floats from -1": ({"video": with_value(-1.0)}, ValueError, ["`video`", "[0, 1]", "got [-1, "]),
    "frames and clips mixed": ({"video": [CLIP[0], CLIP]}, TypeError, ["`video`", "mixed"]),
    "images and text mixed": (
        {"video": [images((32, 32)), [PIL.Image.new("RGB", (32, 32)), "x"]]},
        TypeError,
        ["`video[1]`", "Image", "str"],
    ),
    "frames of different sizes": (
        {"video": images((32, 32), (32, 48))},
        ValueError,
        ["`video`", "one size", "(32, 32)", "(32, 48)"],
    ),
    "clips of different lengths": (
        {"video": [CLIP, CLIP[:3]]},
        ValueError,
        ["`video[1]`", "(3, 32, 32)", "(5, 32, 32)", "agree"],
    ),
    "clips of different sizes": (
        {"video": [CLIP, make_clip(height=48)]},
        ValueError,
        ["`video[1]`", "(5, 48, 32)", "agree"],
    ),
    "clip beyond the positions": ({"video": LONG}, ValueError, ["`video`", "33", "at most 32"]),
    "no prompt": ({"prompt": None}, ValueError, ["`prompt`", "None", "`prompt_embeds`"]),
    "prompt of another type": ({"prompt": 5}, TypeError, ["`prompt`", "5", "list of strings"]),
    "prompt with a number": ({"prompt": ["a", 5]}, TypeError, ["`prompt`", "['a', 5]"]),
    "empty prompt list": ({"prompt": []}, ValueError, ["`prompt`", "[]", "at least one"]),
    "prompt with a token of the MLLM": (
        {"prompt": "make <|video_pad|> red"},
        ValueError,
        ["`prompt`", "<|video_pad|>", "plain text"],
    ),
    "negative prompt with a token of the MLLM": (
        {"negative_prompt": "<|im_end|>"},
        ValueError,
        ["`negative_prompt`", "<|im_end|>"],
    ),
    "negative prompt of another type": ({"negative_prompt": 1.5}, TypeError, ["`negative_prompt`", "1.5"]),
    "empty negative prompt list": ({"negative_prompt": []}, ValueError, ["`negative_prompt`", "[]"]),
    "3 prompts for 2 clips": (
        {"video": [CLIP, CLIP], "prompt": ["a", "b", "c"]},
        ValueError,
        ["`video` has 2", "`prompt` has 3"],
    ),
    "3 negative prompts for 2 prompts": (
        {"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]},
        ValueError,
        ["`prompt` has 2", "`negative_prompt` has 3"],
    ),
    "odd height": ({"height": 33, "width": 32}, ValueError, ["`height`", "33", "multiple of 16"]),
    "odd width": ({"height": 32, "width": 40}, ValueError, ["`width`", "40", "multiple of 16"]),
    "height 0": ({"height": 0}, ValueError, ["`height`", "0", "positive"]),
    "negative width": ({"width": -16}, ValueError, ["`width`", "-16", "positive"]),
    "fractional height": ({"height": 32.5}, ValueError, ["`height`", "32.5"]),
    "num_frames 0": ({"num_frames": 0}, ValueError, ["`num_frames`", "0", "at least 1"]),
    "fractional num_frames": ({"num_frames": 2.5}, ValueError, ["`num_frames`", "2.5", "integer"]),
    "more frames than there are": ({"num_frames": 6}, ValueError, ["`num_frames`", "6", "at most", "5"]),
    "no steps": ({"num_inference_steps": 0}, ValueError, ["`num_inference_steps`", "0", "at least 1"]),
    "sigmas that rise": ({"sigmas": [0.5, 1.0]}, ValueError, ["`sigmas`", "[0.5, 1.0]", "falling"]),
    "a sigma of 0": ({"sigmas": [1.0, 0.0]}, ValueError, ["`sigmas`", "[1.0, 0.0]", "in (0, 1]"]),
    "a sigma above 1": ({"sigmas": [2.0, 1.0]}, ValueError, ["`sigmas`", "[2.0, 1.0]", "in (0, 1]"]),
    "sigmas of two axes": ({"sigmas": torch.ones(2, 2) / 2}, ValueError, ["`sigmas`", "0.5", "a list"]),
    "sigmas as text": ({"sigmas": ["1.0", "0.5"]}, ValueError, ["`sigmas`", "['1.0', '0.5']", "a list"]),
    "empty sigmas": ({"sigmas": []}, ValueError, ["`sigmas`", "[]", "a list"]),
    "one sigma as a tensor": ({"sigmas": torch.tensor(0.5)}, ValueError, ["`sigmas`", "0.5", "a list"]),
    "no sigmas": ({"sigmas": 0.5}, ValueError, ["`sigmas`", "0.5", "a list"]),
    "other sigmas than steps": (
        {"sigmas": [1.0], "num_inference_steps": 2},
        ValueError,
        ["`sigmas`", "[1.0]", "a list of 2"],
    ),
    "fractional steps": ({"num_inference_steps": 2.0}, ValueError, ["`num_inference_steps`", "2.0", "integer"]),
    "guidance as text": ({"guidance_scale": "5"}, ValueError, ["`guidance_scale`", "'5'", "finite number"]),
    "guidance NaN": ({"guidance_scale": float("nan")}, ValueError, ["`guidance_scale`", "nan"]),
    "source guidance infinite": (
        {"source_guidance_scale": float("inf")},
        ValueError,
        ["`source_guidance_scale`", "inf"],
    ),
    "no videos": ({"num_videos_per_prompt": 0}, ValueError, ["`num_videos_per_prompt`", "0", "at least 1"]),
    "seed instead of a generator": ({"generator": 42}, TypeError, ["`generator`", "int", "torch.Generator"]),
    "too few generators": (
        {"generator": [torch.Generator()], "num_videos_per_prompt": 2},
        ValueError,
        ["`generator`", "list of 2", "got 1"],
    ),
    "latents of another shape": (
        {"latents": torch.zeros(1, 16, 2, 4, 5)},
        ValueError,
        ["`latents`", "(1, 16, 2, 4, 4)", "(1, 16, 2, 4, 5)"],
    ),
    "integer latents": ({"latents": torch.zeros(1, 16, 2, 4, 4).int()}, ValueError, ["`latents`", "torch.int32"]),
    "latents as an array": ({"latents": np.zeros((1, 16, 2, 4, 4))}, TypeError, ["`latents`", "ndarray"]),
    "prompt_embeds of another width": (
        embeds(prompt_embeds=torch.zeros(1, 5, TEXT_DIM + 1)),
        ValueError,
        ["`prompt_embeds`", f"text_len, {TEXT_DIM})", f"(1, 5, {TEXT_DIM + 1})"],
    ),
    "prompt_embeds without a batch axis": (
        embeds(prompt_embeds=torch.zeros(5, TEXT_DIM)),
        ValueError,
        ["`prompt_embeds`", f"(5, {TEXT_DIM})"],
    ),
    "prompt_embeds as a list": (embeds(prompt_embeds=[0.0]), TypeError, ["`prompt_embeds`", "list"]),
    "prompt_embeds of another batch": (
        embeds(video=[CLIP, CLIP], prompt_embeds=torch.zeros(3, 5, TEXT_DIM)),
        ValueError,
        ["`video` has 2", "`prompt_embeds` has 3"],
    ),
    "negative_prompt_embeds of another width": (
        embeds(negative_prompt_embeds=torch.zeros(1, 5, 2)),
        ValueError,
        ["`negative_prompt_embeds`", "(1, 5, 2)"],
    ),
    "edit_embeds of another width": (
        embeds(edit_embeds=torch.zeros(1, NUM_EDIT_TOKENS, DIM - 1)),
        ValueError,
        ["`edit_embeds`", f"num_edit_tokens, {DIM})", f"(1, {NUM_EDIT_TOKENS}, {DIM - 1})"],
    ),
    "no edit_embeds": (embeds(edit_embeds=None), ValueError, ["`prompt`", "None", "edit_embeds"]),
    "visual_embeds without positions": (
        embeds(visual_positions=None),
        ValueError,
        ["`visual_positions`", "None", "`visual_embeds`"],
    ),
    "positions without visual_embeds": (
        embeds(visual_embeds=None),
        ValueError,
        ["`visual_positions`", "`visual_embeds`", "None"],
    ),
    "positions of another number": (
        embeds(visual_positions=torch.zeros(1, NUM_VISUAL + 1, 3)),
        ValueError,
        ["`visual_positions`", f"(batch, {NUM_VISUAL}, 3)", f"(1, {NUM_VISUAL + 1}, 3)"],
    ),
    "mask that is not bool": (
        embeds(visual_attention_mask=torch.ones(1, NUM_VISUAL)),
        ValueError,
        ["`visual_attention_mask`", "bool", "torch.float32"],
    ),
    "negative_visual_embeds of another number": (
        embeds(negative_visual_embeds=torch.zeros(1, 2, DIM)),
        ValueError,
        ["`negative_visual_embeds`", f"(batch, {NUM_VISUAL}, {DIM})", f"(1, 2, {DIM})"],
    ),
    "prompt without a use": (embeds(prompt=PROMPT), ValueError, ["`prompt`", PROMPT, "no use"]),
    "negative prompt without a use": (
        embeds(negative_prompt="bad"),
        ValueError,
        ["`negative_prompt`", "bad", "no use"],
    ),
    "keep_detail of another type": ({"keep_detail": "yes"}, ValueError, ["`keep_detail`", "'yes'", "None"]),
    "keep_size of another type": ({"keep_size": 2}, ValueError, ["`keep_size`", "2", "True or False"]),
    "reuse_context of another type": (
        {"reuse_context": "yes"},
        ValueError,
        ["`reuse_context`", "'yes'", "True or False"],
    ),
    "unknown output_type": ({"output_type": "mp4"}, ValueError, ["`output_type`", "'mp4'", "'pil'"]),
    "callback that is none": ({"callback_on_step_end": 1}, TypeError, ["`callback_on_step_end`", "int"]),
    "unknown callback tensor": (
        {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
        ValueError,
        ["`callback_on_step_end_tensor_inputs`", "['noise']", "'latents'"],
    ),
    "callback tensors as text": (
        {"callback_on_step_end_tensor_inputs": "latents"},
        TypeError,
        ["`callback_on_step_end_tensor_inputs`", "'latents'", "list"],
    ),
    "attention_kwargs of another type": ({"attention_kwargs": 0.5}, TypeError, ["`attention_kwargs`", "float"]),
    "unknown attention_kwargs": (
        {"attention_kwargs": {"sacle": 0.5}},
        ValueError,
        ["`attention_kwargs`", "sacle", "'scale'"],
    ),
    "generators with a gap": ({"generator": [None]}, TypeError, ["`generator`", "NoneType"]),
    "fps 0": ({"fps": 0}, ValueError, ["`fps`", "0"]),
    "fps as text": ({"fps": "24"}, ValueError, ["`fps`", "24"]),
    "fps of another batch": ({"fps": [24, 25]}, ValueError, ["`fps`", "1 clips", "[24, 25]"]),
    "max_sequence_length 0": ({"max_sequence_length": 0}, ValueError, ["`max_sequence_length`", "0"]),
}


def check(pipe, forward_passes, kwargs, error, words):
    kwargs = {"video": CLIP, "prompt": PROMPT} | kwargs
    with pytest.raises(error) as raised:
        pipe(**kwargs)
    assert type(raised.value) in (ValueError, TypeError)
    for word in words:
        assert word in str(raised.value)
    assert forward_passes == []


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call(shared_pipe, forward_passes, name):
    check(shared_pipe, forward_passes, *WRONG_CALLS[name])


@pytest.mark.parametrize(
    "component, kwargs, remedy",
    [
        ("vae", {}, "no call works without it"),
        ("transformer", {}, "no call works without it"),
        ("scheduler", {}, "no call works without it"),
        ("text_encoder", {}, "`prompt_embeds`"),
        ("tokenizer", {}, "`prompt_embeds`"),
        ("text_encoder", embeds(negative_prompt_embeds=None), "`negative_prompt_embeds`"),
        ("processor", {}, "['edit_embeds', 'visual_embeds']"),
        ("mllm", {}, "['edit_embeds', 'visual_embeds']"),
        ("distiller", {}, "['edit_embeds', 'visual_embeds']"),
    ],
)
def test_missing_component(pipe, forward_passes, component, kwargs, remedy):
    setattr(pipe, component, None)
    check(pipe, forward_passes, kwargs, ValueError, [f"`{component}`", "None", remedy])


def test_text_encoder_is_not_missed_without_guidance(pipe):
    pipe.text_encoder = pipe.tokenizer = None
    pipe(CLIP, **embeds(negative_prompt_embeds=None), guidance_scale=1.0)


def test_distiller_made_for_another_transformer(forward_passes):
    pipe = build_pipeline(num_attention_heads=4)
    forward_passes.clear()
    check(pipe, forward_passes, {}, ValueError, ["`distiller`", f"width {DIM}", f"reads {2 * DIM}"])


def test_embeddings_of_a_stream_that_is_not_read(forward_passes):
    pipe = build_pipeline(shallow_tokens=("text",), deep_tokens=("text",))
    tokens = {"edit_embeds": torch.zeros(1, NUM_EDIT_TOKENS, DIM)}
    check(pipe, forward_passes, tokens, ValueError, ["`edit_embeds`", "None", "edit tokens"])


def test_source_guidance_without_source_channels(forward_passes):
    pipe = build_pipeline(source_channels=0)
    check(
        pipe,
        forward_passes,
        {"source_guidance_scale": 2.0},
        ValueError,
        ["`source_guidance_scale`", "has to be 1", "2.0"],
    )


def test_no_model_runs_is_a_real_check(shared_pipe, forward_passes):
    shared_pipe(CLIP, PROMPT)
    assert {"UMT5EncoderModel", "RVEDiTTransformer3DModel"} <= set(forward_passes)


def test_encode_tokens_checks_batch_and_components(pipe, forward_passes):
    for clips, prompts in ((2, 4), (4, 2)):
        with pytest.raises(ValueError, match=f"`prompt` has {prompts} entries, but `video` has {clips}"):
            pipe.encode_tokens([CLIP] * clips, [PROMPT] * prompts)
    pipe.processor = None
    with pytest.raises(ValueError, match="`processor` is None"):
        pipe.encode_tokens(CLIP, PROMPT)
    assert forward_passes == []


@pytest.mark.parametrize("prompt, error", [(None, TypeError), ([], ValueError), ([1], TypeError)])
def test_encode_methods_check_their_prompt(shared_pipe, forward_passes, prompt, error):
    for call in (lambda: shared_pipe.encode_prompt(prompt), lambda: shared_pipe.encode_tokens(CLIP, prompt)):
        with pytest.raises(error, match=re.escape("`prompt`")):
            call()
    assert forward_passes == []
