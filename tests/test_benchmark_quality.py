"""The benchmark of quality against speed: what it compares, and that its figures are those of the edits."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality  # noqa: E402
import report  # noqa: E402

from rvedit_diffusers import TINY_CHECKPOINT  # noqa: E402
from rvedit_diffusers.evaluation import PipelineEditor  # noqa: E402
from rvedit_diffusers.synthetic import BenchmarkItems, score  # noqa: E402


SIZE = {"num_frames": 5, "height": 32, "width": 32}
OPTIONS = ["--levels", "L0", "--num_samples", "2", "--batch_size", "2", "--device", "cpu"]
OPTIONS += [option for name, value in SIZE.items() for option in (f"--{name}", str(value))]
KEPT = {"2 steps", "TaylorSeer, every 3"}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "quality.json"
    with pytest.MonkeyPatch.context() as patch:
        every = quality.settings_of

        def few(*arguments):
            return {name: s for name, s in every(*arguments).items() if name in {quality.FULL, *KEPT}}

        patch.setattr(quality, "settings_of", few)
        quality.main([*OPTIONS, "--output", str(path)])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def pipe():
    return quality.load(TINY_CHECKPOINT, None, quality.parse_args(OPTIONS))


@pytest.fixture(scope="module")
def items():
    return [BenchmarkItems("L0", 0, **SIZE)[index] for index in range(2)]


def test_success_is_what_the_benchmark_scores(result, pipe, items):
    clips = PipelineEditor(pipe, num_inference_steps=2)(quality.tasks_of(items))
    rebuilt = quality.reconstruct(pipe.vae, [item.target_frames for item in items])
    scores = [score(*each) for each in zip(clips, items, rebuilt, strict=True)]
    assert result["scores"]["2 steps"] == [[each["union_success"], each["op_success"]] for each in scores]
    row = result["quality"]["2 steps"]
    assert row["union_success"] == np.mean([each["union_success"] for each in scores])
    assert row["difference"] == row["union_success"] - result["quality"]["full"]["union_success"]
    assert result["ratios"]["2 steps_vs_full"] == result["seconds"]["2 steps"][0] / result["seconds"]["full"][0]


def test_every_setting_edits_in_its_own_way_and_leaves_nothing_behind(pipe, items):
    tasks = quality.tasks_of(items[:1])
    full = PipelineEditor(pipe)(tasks)
    ratios = quality.calibrate(pipe, tasks, 12)
    assert len(ratios) == 12 and ratios[0] == 1.0 and all(ratio > 0 for ratio in ratios)
    settings = quality.settings_of(12, 4, ratios)
    strongest = {name.split(",")[0]: setting for name, setting in settings.items() if name != quality.FULL}
    assert len(strongest) == 10
    for name, setting in strongest.items():
        clips = []
        quality.edit(setting, {False: pipe, True: pipe}, tasks, clips)
        assert not np.array_equal(clips, full), name
    assert np.array_equal(PipelineEditor(pipe)(tasks), full)


def test_the_page_has_the_picture(result, tmp_path):
    path = tmp_path / "quality-tiny.json"
    path.write_text(json.dumps(result))
    report.main([str(path), "--output", str(tmp_path / "page.md")])
    assert "## Quality, checkpoints/tiny" in (tmp_path / "page.md").read_text()
    assert "![Union success over time](page_quality-tiny.png)" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "page_quality-tiny.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num_samples", "0"], "--num_samples has to be at least 1, but is 0"),
        (["--lora", "nowhere"], "--lora and --lora_steps need each other"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_wrong_options_end_with_a_message(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        quality.main(options)
    assert error.value.code == 2 and message in capsys.readouterr().err
