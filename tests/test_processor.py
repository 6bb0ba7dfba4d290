import json
import re

import numpy as np
import PIL.Image
import pytest
import torch

from rvedit_diffusers.processing_rvedit import RVEDiTProcessor
from rvedit_diffusers.tiny import FAMILIES, build_tiny_tokenizer, save_tiny_mllm


SETTINGS = {"num_edit_tokens": 4, "max_frames": 6, "max_pixels": 64 * 64, "min_pixels": 16 * 16}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_mllm(folder, request.param)
    return folder


@pytest.fixture
def processor(folder):
    return RVEDiTProcessor.from_mllm(folder, **SETTINGS)


def make_clip(num_frames=4, height=32, width=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, 3, height, width), dtype=torch.uint8, generator=generator)


def decode(processor, inputs, row=0):
    return processor.tokenizer.decode(inputs["input_ids"][row][inputs["attention_mask"][row].bool()])


def test_slots_are_the_last_tokens_after_the_assistant_header(processor):
    inputs = processor(make_clip(), "make the ball blue")
    assert inputs["edit_mask"].dtype == torch.bool
    assert inputs["edit_mask"][0].nonzero().flatten().tolist() == list(range(inputs["input_ids"].shape[1]))[-4:]
    text = decode(processor, inputs)
    assert text.endswith("<|im_start|>assistant\n" + 4 * "<|vision_pad|>")
    assert text.count("<|vision_pad|>") == 4


def test_visual_mask_marks_one_token_per_merged_patch(processor):
    inputs = processor([make_clip(4), make_clip(6, 64, 32)], ["make it red", "remove the ball"])
    expected = inputs["video_grid_thw"].prod(1) // processor.video_processor.merge_size**2
    assert inputs["visual_mask"].sum(1).tolist() == expected.tolist() == [2 * 2 * 3, 3 * 4 * 2]
    assert torch.equal(inputs["visual_mask"], inputs["mm_token_type_ids"] == 2)


@pytest.mark.parametrize("instruction_first", [True, False])
def test_instruction_first_decides_the_order(folder, instruction_first):
    processor = RVEDiTProcessor.from_mllm(folder, instruction_first=instruction_first, **SETTINGS)
    text = decode(processor, processor(make_clip(), "make the ball blue"))
    assert (text.index("make the ball blue") < text.index("<|video_pad|>")) == instruction_first


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_equals_its_samples(processor, padding_side):
    processor.tokenizer.padding_side = padding_side
    clips = [make_clip(3, 32, 32, seed=1), make_clip(6, 48, 64, seed=2)]
    texts = ["make it red", "remove the large green object on the left"]
    batch = processor(clips, texts, fps=[8, 24])
    pixels = []
    for row, (clip, text, fps) in enumerate(zip(clips, texts, [8, 24])):
        single = processor(clip, text, fps=fps)
        real = batch["attention_mask"][row].bool()
        for name in ("input_ids", "mm_token_type_ids", "edit_mask", "visual_mask"):
            assert torch.equal(batch[name][row][real], single[name][0]), name
            assert not batch[name][row][~real].any() or name == "input_ids"
        num_visual = int(single["visual_mask"].sum())
        assert torch.equal(batch["visual_positions"][row, :num_visual], single["visual_positions"][0])
        assert not batch["visual_positions"][row, num_visual:].any()
        pixels.append(single["pixel_values_videos"])
    torch.testing.assert_close(batch["pixel_values_videos"], torch.cat(pixels))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 6, 7, 16, 101])
def test_frames_are_uniform_with_first_and_last(processor, num_frames):
    indices = processor.sample_frames(num_frames)
    assert len(indices) <= 6 and len(indices) % 2 == 0
    assert (indices[0], indices[-1]) == (0, num_frames - 1)
    if num_frames <= 6:
        assert indices == (list(range(num_frames)) + [num_frames - 1])[: len(indices)]
    else:
        uniform = torch.linspace(0, num_frames - 1, 6)
        assert (torch.tensor(indices) - uniform).abs().max() <= 0.5


def test_odd_max_frames_is_rounded_down_to_whole_temporal_patches(folder):
    processor = RVEDiTProcessor.from_mllm(folder, **SETTINGS | {"max_frames": 5})
    assert processor.sample_frames(9) == [0, 3, 5, 8]


def test_visual_positions_are_fractions_of_the_clip(processor):
    inputs = processor(make_clip(3, 32, 48), "make it red")
    assert inputs["visual_positions"].dtype == torch.float32
    times = [(0 + 0.5) / 2, 1.0]  # frames (0, 1) and (2, repeated 2)
    expected = [(t, (y + 0.5) / 2, (x + 0.5) / 3) for t in times for y in range(2) for x in range(3)]
    torch.testing.assert_close(inputs["visual_positions"][0], torch.tensor(expected))


def test_visual_positions_of_a_long_clip_count_its_own_frames(processor):
    inputs = processor(make_clip(11, 16, 16), "make it red")
    assert processor.sample_frames(11) == [0, 2, 4, 6, 8, 10]
    torch.testing.assert_close(inputs["visual_positions"][0, :, 0], torch.tensor([0.1, 0.5, 0.9]))


def test_visual_positions_of_one_frame_are_at_time_zero(processor):
    assert not processor(make_clip(1), "make it red")["visual_positions"][..., 0].any()


def test_visual_positions_find_a_planted_cell(processor):
    clip = torch.zeros(6, 3, 64, 48, dtype=torch.uint8)
    clip[2:4, :, 32:48, 16:32] = 255  # temporal patch 1 of 3, row 2 of 4, column 1 of 3
    inputs = processor(clip, "make it red")
    tokens = inputs["pixel_values_videos"].view(int(inputs["visual_mask"].sum()), -1)
    planted = tokens.sum(1).argmax()
    torch.testing.assert_close(inputs["visual_positions"][0, planted], torch.tensor([2.5 / 5, 2.5 / 4, 1.5 / 3]))


@pytest.mark.parametrize(
    "convert",
    [
        lambda clip: clip.permute(0, 2, 3, 1),
        lambda clip: clip.numpy(),
        lambda clip: clip.permute(0, 2, 3, 1).numpy(),
        lambda clip: clip / 255,
        lambda clip: (clip.double() / 255).permute(0, 2, 3, 1).numpy(),
        lambda clip: clip[None],
        lambda clip: [PIL.Image.fromarray(frame) for frame in clip.permute(0, 2, 3, 1).numpy()],
        lambda clip: [[PIL.Image.fromarray(frame) for frame in clip.permute(0, 2, 3, 1).numpy()]],
    ],
    ids=["thwc", "numpy", "numpy_thwc", "float", "numpy_double", "5d", "pil", "list_of_pil"],
)
def test_every_kind_of_clip_gives_the_same_inputs(processor, convert):
    clip = make_clip(5)
    expected, inputs = processor(clip, "make it red"), processor(convert(clip), "make it red")
    for name in expected:
        torch.testing.assert_close(inputs[name], expected[name], msg=name)


def test_float_and_uint8_clips_resize_alike(processor):
    clip = torch.full((4, 3, 100, 120), 60, dtype=torch.uint8)
    clip[..., 30:70, 40:90] = 190
    expected = processor(clip, "make it red")["pixel_values_videos"]
    level = 1 / 255 / min(processor.video_processor.image_std)
    torch.testing.assert_close(
        processor(clip / 255, "make it red")["pixel_values_videos"], expected, rtol=0, atol=1.01 * level
    )


def test_resized_float_clips_stay_in_range(processor):
    clip = torch.zeros(4, 3, 100, 120)
    clip[..., 30:70, 40:90] = 1  # bicubic overshoots at the edges
    pixels = processor(clip, "make it red")["pixel_values_videos"]
    video_processor = processor.video_processor
    white, black = (
        [(level - mean) / std for mean, std in zip(video_processor.image_mean, video_processor.image_std)]
        for level in (1, 0)
    )
    assert min(black) - 1e-5 <= pixels.min() and pixels.max() <= max(white) + 1e-5


def test_dtypes_may_differ_within_a_batch(processor):
    clips = [make_clip(seed=1), make_clip(seed=2) / 255]
    pixels = [processor(clip, "make it red")["pixel_values_videos"] for clip in clips]
    batch = processor(clips, ["make it red", "make it red"])
    torch.testing.assert_close(batch["pixel_values_videos"], torch.cat(pixels))


@pytest.mark.parametrize("size", [(200, 100), (64, 64), (300, 40), (8, 8)])
def test_frames_keep_within_the_pixel_bounds(processor, size):
    grid = processor(make_clip(7, *size), "make it red")["video_grid_thw"][0]
    pixels = int(grid[1] * grid[2]) * processor.video_processor.patch_size**2
    assert processor.min_pixels <= pixels <= processor.max_pixels


def test_pixels_equal_those_of_the_mllms_own_video_processor(tmp_path):
    save_tiny_mllm(tmp_path, "qwen2_5_vl")
    processor = RVEDiTProcessor.from_mllm(tmp_path, **SETTINGS)
    clip = make_clip(6, 100, 80)
    size = {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
    expected = processor.video_processor([clip], size=size, do_sample_frames=False, return_tensors="pt")
    inputs = processor(clip, "make it red")
    assert torch.equal(inputs["video_grid_thw"], expected["video_grid_thw"])
    torch.testing.assert_close(inputs["pixel_values_videos"], expected["pixel_values_videos"])


def test_fps_changes_time_stamps_only(processor):
    slow, fast = (processor(make_clip(), "make it red", fps=fps) for fps in (4, 16))
    assert torch.equal(slow["pixel_values_videos"], fast["pixel_values_videos"])
    assert torch.equal(slow["visual_positions"], fast["visual_positions"])
    assert torch.equal(fast["input_ids"], processor(make_clip(), "make it red")["input_ids"])  # 16 is the default
    if "second_per_grid_ts" in slow:  # Qwen2.5-VL
        assert slow["second_per_grid_ts"].tolist() == [2 / 4]
        assert fast["second_per_grid_ts"].tolist() == [2 / 16]
    else:
        assert "<0.1 seconds>" in decode(processor, slow) and "<0.6 seconds>" in decode(processor, slow)
        assert "<0.0 seconds>" in decode(processor, fast) and "<0.2 seconds>" in decode(processor, fast)


def test_repeated_last_frame_keeps_the_time_scale(processor):
    odd, even = (processor(make_clip(num_frames), "make it red", fps=4) for num_frames in (3, 4))
    assert torch.equal(odd.get("second_per_grid_ts", torch.zeros(1)), even.get("second_per_grid_ts", torch.zeros(1)))


def test_ambiguous_layout_is_channels_first_for_tensors_and_last_for_arrays(processor):
    clip = torch.zeros(4, 3, 32, 3, dtype=torch.uint8)
    tall, wide = (processor(each, "make it red")["video_grid_thw"][0] for each in (clip, clip.numpy()))
    assert tall[1] > tall[2] and wide[1] < wide[2]


def test_save_and_load_keep_every_setting(folder, tmp_path):
    settings = SETTINGS | {"instruction_first": False, "edit_token": "<|box_start|>", "default_fps": 7.5}
    processor = RVEDiTProcessor.from_mllm(folder, **settings)
    processor.tokenizer.padding_side = "left"
    processor.save_pretrained(tmp_path)
    loaded = RVEDiTProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.mllm_processor_class == processor.mllm_processor_class
    clips, texts = [make_clip(3), make_clip(9, 90, 70)], ["make it red", "remove the large green object"]
    expected, inputs = processor(clips, texts), loaded(clips, texts)
    assert list(inputs) == list(expected)
    for name in expected:
        assert torch.equal(inputs[name], expected[name]), name


@pytest.mark.parametrize("instruction_first", [True, False])
@pytest.mark.parametrize("token", ["<|vision_pad|>", "<|video_pad|>", "<|image_pad|>", "<|im_end|>", "<|endoftext|>"])
def test_control_tokens_in_an_instruction_are_refused(folder, token, instruction_first):
    processor = RVEDiTProcessor.from_mllm(folder, instruction_first=instruction_first, **SETTINGS)
    with pytest.raises(ValueError, match=r"`text\[1\]` contains '<\|"):
        processor([make_clip(), make_clip()], ["make it red", f"make{token}it red"])


def test_pieces_of_control_tokens_stay_text(processor):
    inputs = processor(make_clip(), "write <|video_pad| > and |> and <|")
    assert inputs["edit_mask"].sum() == 4
    assert "write <|video_pad| > and |> and <|" in decode(processor, inputs)


def test_absent_edit_token_needs_a_free_row_of_the_embedding(folder, tmp_path):
    with pytest.raises(ValueError, match=re.escape("`edit_token` '<|edit|>' is not in the tokenizer")):
        RVEDiTProcessor.from_mllm(folder, edit_token="<|edit|>")

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = RVEDiTProcessor.from_mllm(tmp_path, edit_token="<|edit|>", **SETTINGS)
    inputs = processor(make_clip(), "make it red")
    assert inputs["input_ids"][inputs["edit_mask"]].tolist() == 4 * [config["text_config"]["vocab_size"] - 1]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_edit_tokens", 0),
        ("num_edit_tokens", 2.5),
        ("max_frames", 1),
        ("max_pixels", 100),
        ("min_pixels", 64 * 64 + 1),
        ("instruction_first", "yes"),
        ("edit_token", ""),
        ("edit_token", "<|endoftext|>"),
        ("edit_token", "<|im_start|>"),
        ("edit_token", "<|video_pad|>"),
        ("default_fps", 0),
        ("default_fps", float("nan")),
    ],
)
def test_wrong_settings_are_named(folder, setting, value):
    with pytest.raises((ValueError, TypeError), match=f"`{setting}`"):
        RVEDiTProcessor.from_mllm(folder, **SETTINGS | {setting: value})


CLIP = np.zeros((4, 3, 32, 32), np.uint8)
NAN_CLIP = np.full((4, 3, 32, 32), 0.5, np.float32)
NAN_CLIP[3, 2, 1, 0] = np.nan


@pytest.mark.parametrize(
    ("videos", "text", "fps", "error", "message"),
    [
        ([CLIP, CLIP], ["make it red"], None, ValueError, "`videos` and `text` must have the same length, got 2"),
        (CLIP, ["make it red", "blue"], None, ValueError, "`videos` and `text` must have the same length, got 1"),
        ([], [], None, ValueError, "`text` must hold at least one"),
        ([], ["make it red"], None, ValueError, "`videos` must hold at least one clip"),
        (CLIP, None, None, TypeError, "`text` must be a string"),
        (CLIP, [7], None, TypeError, r"`text\[0\]` must be a string, got int"),
        ("clip.mp4", "make it red", None, TypeError, "`videos` must be a tensor"),
        (["clip.mp4"], "make it red", None, TypeError, r"`videos\[0\]` must be a tensor"),
        (CLIP[0], "make it red", None, ValueError, "`videos` must have shape"),
        (CLIP[:, :2], "make it red", None, ValueError, r"`videos\[0\]` must have shape"),
        (CLIP[:0], "make it red", None, ValueError, r"`videos\[0\]` must have at least one frame"),
        ([[]], "make it red", None, ValueError, r"`videos\[0\]` must have at least one frame"),
        (CLIP[..., :0], "make it red", None, ValueError, r"`videos\[0\]` must have at least one frame"),
        (CLIP.astype(np.int32), "make it red", None, TypeError, r"`videos\[0\]` must be uint8"),
        (torch.from_numpy(CLIP).bool(), "make it red", None, TypeError, r"`videos\[0\]` must be uint8"),
        (NAN_CLIP, "make it red", None, ValueError, r"`videos\[0\]` must be in \[0, 1\].*NaN"),
        ([CLIP, CLIP + 7.0], ["red", "blue"], None, ValueError, r"`videos\[1\]` must be in \[0, 1\].*\[7, 7\]"),
        (CLIP - 0.5, "make it red", None, ValueError, r"`videos\[0\]` must be in \[0, 1\]"),
        (np.zeros((2, 3, 2, 500), np.uint8), "make it red", None, ValueError, r"`videos\[0\]` has frames of 2 x 500"),
        (
            [PIL.Image.new("RGB", (32, 32)), PIL.Image.new("RGB", (32, 40))],
            "make it red",
            None,
            ValueError,
            r"`videos\[0\]` must have frames of one size",
        ),
        ([PIL.Image.new("RGB", (32, 32)), CLIP], "make it red", None, TypeError, r"`videos\[0\]\[1\]` must be a PIL"),
        (CLIP, "make it red", 0, ValueError, "`fps`"),
        (CLIP, "make it red", [16, 16], ValueError, "`fps` must have one value per clip"),
        (CLIP, "make it red", "16", TypeError, "`fps`"),
        (CLIP, "make it red", float("inf"), ValueError, "`fps`"),
    ],
)
def test_wrong_arguments_are_named(processor, videos, text, fps, error, message):
    with pytest.raises(error, match=message):
        processor(videos, text, fps=fps)


def test_return_tensors_is_pt_only(processor):
    with pytest.raises(ValueError, match="`return_tensors`"):
        processor(CLIP, "make it red", return_tensors="np")


def test_a_checkpoint_without_video_is_named(tmp_path):
    build_tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path`"):
        RVEDiTProcessor.from_mllm(tmp_path)
