"""The checkpoint that ships with the package does what the documents say of it."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline, RVEDiTTransformer3DModel
from rvedit_diffusers.synthetic import LEVELS, TEST_PHOTOS, demo_edit, judge
from rvedit_diffusers.synthetic.backgrounds import render_photo


ROOT = Path(__file__).parent.parent
WEIGHTS = sorted(Path(TINY_CHECKPOINT).rglob("*.safetensors"))


@pytest.fixture(scope="module")
def tiny():
    pipe = RVEDiTPipeline.from_pretrained(TINY_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, frames, prompt, **options):
    result = pipe(frames, prompt, generator=torch.Generator().manual_seed(0), **options).frames[0]
    return (result * 255).round().astype(np.uint8)


def test_weights_are_small_and_in_16_bit():
    assert {path.parent.name for path in WEIGHTS} == {"distiller", "mllm", "text_encoder", "transformer", "vae"}
    assert sum(path.stat().st_size for path in WEIGHTS) <= 25e6
    for path in WEIGHTS:
        with safe_open(path, framework="pt") as file:
            full = {name for name in file.keys() if file.get_slice(name).get_dtype() != "BF16"}
        # like Wan's
        kept = RVEDiTTransformer3DModel._keep_in_fp32_modules if path.parent.name == "transformer" else ()
        assert {name for name in full if not any(part in name for part in kept)} == set(), path


def test_the_demo_edit_succeeds(tiny):
    demo = demo_edit()
    assert judge(edit(tiny, demo.source_frames, demo.instruction), demo) == "success"


def test_four_steps_without_guidance_do_the_demo_edit_in_a_sixth_of_the_passes(tiny):
    demo, passes = demo_edit(), []
    hook = tiny.transformer.register_forward_hook(lambda *_: passes.append(1))
    try:
        edit(tiny, demo.source_frames, demo.instruction)
        full = len(passes)
        edited = edit(tiny, demo.source_frames, demo.instruction, num_inference_steps=4, guidance_scale=1.0)
    finally:
        hook.remove()
    assert len(passes) - full == 4 == full / 6
    assert judge(edited, demo) == "success"


def saturation(frames):
    return np.ptp(frames.astype(float), axis=-1).mean()


def warmth(frames):
    return (frames[..., 0].astype(float) - frames[..., 2]).mean()


def edges(frames):
    down, across = np.gradient(frames.astype(float).mean(-1), axis=(1, 2))
    return np.hypot(down, across).ravel()


@pytest.mark.parametrize(
    "prompt, is_done",
    [
        ("make the video black and white", lambda source, edited: saturation(edited) < 0.4 * saturation(source)),
        ("make the video warmer", lambda source, edited: warmth(edited) > warmth(source) + 20),
        ("make the video darker", lambda source, edited: edited.mean() < 0.6 * source.mean()),
    ],
)
@pytest.mark.parametrize("photo", TEST_PHOTOS)
def test_a_large_photograph_is_graded_and_keeps_its_structure(tiny, photo, prompt, is_done):
    clip = render_photo(np.random.default_rng(0), 5, 180, 240, (photo,), pace=1.0)
    source = (clip * 255).round().astype(np.uint8)
    edited = edit(tiny, source, prompt)
    assert edited.shape == source.shape and is_done(source, edited)
    assert np.corrcoef(edges(source), edges(edited))[0, 1] >= 0.8


def test_the_card_says_what_weights_logs_and_scores_say():
    card = runpy.run_path(str(ROOT / "examples" / "tiny" / "export.py"))["model_card"](Path(TINY_CHECKPOINT))
    assert (Path(TINY_CHECKPOINT) / "README.md").read_text() == card
    assert (ROOT / "MODEL_CARD.md").read_text() == card


def test_links_of_the_card_work_in_both_places():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "MODEL_CARD.md").read_text())
    assert links and all(link.startswith("https://") for link in links)


def test_the_scores_are_of_all_levels_and_agree_with_the_counted_failures():
    scores = json.loads((Path(TINY_CHECKPOINT) / "training" / "scores.json").read_text())
    assert list(scores["levels"]) == [*LEVELS, "mean_L2_L6"]
    for level in LEVELS:
        row = scores["levels"][level]
        kinds = row["op_success_by_kind"].values()
        assert sum(k["success"] for k in kinds) + sum(row["failures"].values()) == sum(k["n"] for k in kinds)
        assert row["union_success"] <= row["op_success"] and row["n"] >= 8
