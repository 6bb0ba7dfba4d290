import re
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from components import build_pipeline, make_clip

from rvedit_diffusers.synthetic import demo_edit
from rvedit_diffusers.video import read_video, write_video


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script in an empty folder with a clip next to it; gives exit status, stdout, stderr and new files."""
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", make_clip(6, 32, 32), Fraction(30000, 1001))

    def run_script(*arguments):
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["edit_video.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / "edit_video.py"), run_name="__main__")
        output = capsys.readouterr()
        files = sorted(str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before if path.is_file())
        return ended.value.code or 0, output.out, output.err, files

    return run_script


def test_edits_a_clip(run, model):
    status, out, _, files = run("clip.mp4", "make it red", "--model", model, "--compare", "compare.png")
    assert status == 0
    assert files == ["clip_edited.mp4", "compare.png"]
    assert re.search(r"edited 6 frames of 32x32 in \d+\.\d s", out)
    source, edited = read_video("clip.mp4"), read_video("clip_edited.mp4")
    assert edited.frames.shape == source.frames.shape
    assert edited.fps == source.fps
    assert not np.array_equal(edited.frames, source.frames)


def test_options_reach_the_pipeline(run, model):
    run("clip.mp4", "make it red", "--model", model, "--output", "plain.mp4")
    plain = read_video("plain.mp4").frames
    options = {
        "--seed": 1,
        "--num_inference_steps": 3,
        "--guidance_scale": 1,
        "--source_guidance_scale": 2,
        "--negative_prompt": "green",
        "--height": 16,
    }
    for option, value in options.items():
        status, *_ = run("clip.mp4", "make it red", "--model", model, "--output", "other.mp4", option, value)
        other = read_video("other.mp4").frames
        assert status == 0
        assert other.shape == plain.shape
        assert not np.array_equal(other, plain), option


def test_same_seed_gives_the_same_file(run, model):
    for name in ("a.mp4", "b.mp4"):
        run("clip.mp4", "make it red", "--model", model, "--output", name)
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_num_frames_cuts_the_clip(run, model):
    run("clip.mp4", "make it red", "--model", model, "--num_frames", 3)
    assert read_video("clip_edited.mp4").num_frames == 3


def test_lora_changes_the_result(run, model, tmp_path):
    from peft import LoraConfig

    pipe = build_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", pipe.transformer)
    run("clip.mp4", "make it red", "--model", model, "--output", "plain.mp4")
    run("clip.mp4", "make it red", "--model", model, "--output", "lora.mp4", "--lora", "lora")
    assert not np.array_equal(read_video("plain.mp4").frames, read_video("lora.mp4").frames)


def test_demo_writes_source_edit_and_comparison(run, model):
    status, out, _, files = run("--model", model)
    demo = demo_edit()
    assert status == 0
    assert files == ["out/demo/compare.png", "out/demo/edited.mp4", "out/demo/source.mp4"]
    assert all(file in out for file in files)
    assert demo.instruction in out
    assert re.search(r"in \d+\.\d s", out)
    assert read_video("out/demo/edited.mp4").frames.shape == demo.source_frames.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.mp4", "make it red"], "absent.mp4"),
        (["empty.mp4", "make it red"], "empty.mp4.*the file is empty"),
        (["text.mp4", "make it red"], "text.mp4 cannot be read as a clip"),
        (["."], "PROMPT is missing"),
        (["clip.mp4"], "PROMPT is missing"),
        (["clip.mp4", " "], "PROMPT is empty"),
        (["clip.mp4", "make it red", "--model", "absent"], "--model absent: there is no such file or folder"),
        (["clip.mp4", "make it red", "--model", "."], "--model .: is not a pipeline"),
        (["clip.mp4", "make it red", "--model", "broken"], "--model broken: cannot be loaded"),
        (["clip.mp4", "make it red", "--output", "edited.gif"], "--output edited.gif: must end in"),
        (
            ["clip.mp4", "make it red", "--output", "absent/edited.mp4"],
            "--output absent/.*: there is no folder",
        ),
        (["clip.mp4", "make it red", "--compare", "compare.jpg"], "--compare compare.jpg: must end in .png"),
        (["clip.mp4", "make it red", "--device", "toaster"], "--device toaster"),
        (["clip.mp4", "make it red", "--dtype", "int8"], "--dtype"),
        (["clip.mp4", "make it red", "--num_inference_steps", "0"], "--num_inference_steps"),
        (["clip.mp4", "make it red", "--num_frames", "-1"], "--num_frames"),
        (["clip.mp4", "make it red", "--guidance_scale", "nan"], "--guidance_scale"),
        (["clip.mp4", "make it red", "--seed", "x"], "--seed"),
        (["clip.mp4", "make it red", "--bogus"], "--bogus"),
        (["--output", "edited.mp4"], "--output and --compare need VIDEO"),
    ],
)
def test_mistakes_give_one_line_and_status_2_and_write_nothing(run, arguments, message):
    Path("empty.mp4").touch()
    Path("text.mp4").write_text("not a clip")
    Path("broken").mkdir()
    Path("broken/model_index.json").write_text("{")
    status, out, err, files = run(*arguments)
    assert status == 2
    assert re.fullmatch(rf"edit_video.py: error: .*{message}.*\n", err)
    assert out == ""
    assert files == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--height", "13", "`height`.*13"),
        ("--lora", "absent", "--lora absent: there is no such file or folder"),
        ("--lora", "clip.mp4", "--lora clip.mp4: cannot be loaded"),
    ],
)
def test_mistakes_that_need_the_model(run, model, option, value, message):
    status, out, err, files = run("clip.mp4", "make it red", "--model", model, option, value)
    assert status == 2
    assert re.search(rf"^edit_video.py: error: .*{message}.*\n\Z", err, re.MULTILINE)
    assert (out, files) == ("", [])
