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


def edit(pipe, frames, prompt):
    result = pipe(frames, prompt, generator=torch.Generator().manual_seed(0)).frames[0]
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


def test_a_photograph_turns_black_and_white(tiny):
    clip = render_photo(np.random.default_rng(0), 17, 64, 64, TEST_PHOTOS)
    source = (clip * 255).round().astype(np.uint8)

    def colour(frames):
        return np.ptp(frames.astype(int), axis=-1).mean()

    assert colour(edit(tiny, source, "make the video black and white")) < 0.4 * colour(source)


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
