import re
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from components import build_pipeline, make_clip
from PIL import Image

from rvedit_diffusers import TINY_CHECKPOINT
from rvedit_diffusers.video import read_video, write_video


ROOT = Path(__file__).parent.parent
EDIT = ("clip.mp4", "make the red ball blue")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """A pipeline whose blocks read every stream."""
    folder = tmp_path_factory.mktemp("everywhere")
    streams = ("edit", "text", "visual")
    build_pipeline(num_layers=3, shallow_tokens=streams, deep_tokens=streams).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script in an empty folder with a clip next to it; gives exit status, stdout, stderr and new files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as python does for a script
    write_video("clip.mp4", make_clip(6, 32, 32), Fraction(30000, 1001))

    def run_script(*arguments):
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["visualize_attention.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / "visualize_attention.py"), run_name="__main__")
        output = capsys.readouterr()
        files = sorted(str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - before if path.is_file())
        return ended.value.code or 0, output.out, output.err, files

    return run_script


def test_draws_aligned_blocks(run, model):
    status, out, _, files = run(*EDIT, "--model", model)
    assert status == 0
    assert files == ["out/attention/attention.mp4", "out/attention/block_0.png", "out/attention/block_1.png"]
    assert all(f"wrote {file}" in out for file in files)
    video, source = read_video("out/attention/attention.mp4"), read_video("clip.mp4")
    assert (video.num_frames, video.fps) == (source.num_frames, source.fps)
    assert Image.open("out/attention/block_0.png").size != Image.open("out/attention/block_1.png").size


def test_tables_name_streams_and_words(run, model):
    _, out, _, _ = run(*EDIT, "--model", model, "--num_edit_tokens", 2)
    streams = re.findall(r"^ +(\d) (edit|text|visual) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) ", out, re.MULTILINE)
    assert [row[:4] for row in streams] == [
        ("0", "edit", "4", "1.00"),
        ("1", "text", "16", "1.00"),
        ("1", "visual", "8", "1.00"),
    ]
    for *_, num_tokens, _, entropy, ceiling in streams:
        assert 0 < float(entropy) <= float(ceiling) == pytest.approx(np.log(int(num_tokens)), abs=1e-3)
    labels = re.findall(
        r'^ +(\d) (editing token|"\w+"|end of the text|padding|visual tokens where)', out, re.MULTILINE
    )
    words = [f'"{word}"' for word in EDIT[1].split()]
    expected = ["editing token"] * 2 + words + ["end of the text", "padding", "visual tokens where"]
    assert [label for _, label in labels] == expected


def test_pipelines_side_by_side(run, model, everywhere):
    options = ["--blocks", 1, 0, "--words", "BLUE", "--step", 0, "--num_columns", 2]
    run(*EDIT, "--model", model, *options, "--output", "one")
    status, out, _, files = run(*EDIT, "--model", model, "--compare", everywhere, *options, "--output", "two")
    assert status == 0
    assert files == ["two/attention.mp4", "two/block_0.png", "two/block_1.png"]
    assert len(re.findall("mean of denoising step 0", out)) == 2
    assert '"red"' not in out
    for name in ("block_0.png", "block_1.png"):
        one, two = Image.open(f"one/{name}").size, Image.open(f"two/{name}").size
        assert two[0] > one[0]
        assert two[1] > one[1]  # the other one's blocks read more streams
    shares = {match[0]: float(match[1]) for match in re.findall(r"^ +0 (\S+) +\d+ +([\d.]+) ", out, re.MULTILINE)}
    assert shares["edit"] + shares["text"] == pytest.approx(1, abs=0.01)
    assert "0 all editing tokens" in out


def test_options_change_the_maps(run, model):
    pictures, tables = {}, {}
    options = {"--step": 1, "--seed": 1, "--num_inference_steps": 3, "--guidance_scale": 1, "--num_frames": 3}
    for option, value in ({"--device": "cpu"} | options).items():
        status, out, _, _ = run(*EDIT, "--model", model, "--output", option[2:], option, value)
        assert status == 0
        pictures[option] = Path(option[2:], "block_1.png").read_bytes()
        tables[option] = tuple(re.findall(r"^ +\d.*$", out, re.MULTILINE))  # the picture names its step as well
    assert len(set(pictures.values())) == len(pictures)
    assert len(set(tables.values())) == len(tables)


def test_lora_and_offload(run, model, tmp_path):
    from peft import LoraConfig

    pipe = build_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", pipe.transformer)
    _, plain, _, _ = run(*EDIT, "--model", model)
    _, lora, _, _ = run(*EDIT, "--model", model, "--lora", "lora")
    assert plain != lora
    for offload in ("model", "group"):
        _, offloaded, _, _ = run(*EDIT, "--model", model, "--device", "cpu", "--offload", offload)
        assert plain == offloaded


def test_one_image(run, model):
    write_video("still.mp4", make_clip(1, 32, 32), 25)
    assert run("still.mp4", EDIT[1], "--model", model)[0] == 0
    assert read_video("out/attention/attention.mp4").num_frames == 1


def test_embedded_checkpoint_looks_at_what_it_edits(run):
    status, out, _, files = run("--num_inference_steps", 6, "--num_columns", 2)
    assert status == 0
    assert files == ["out/attention/attention.mp4", "out/attention/block_1.png", "out/attention/block_2.png"]
    assert TINY_CHECKPOINT[-41:] in out
    assert "make the red circle blue" in out
    # of the first deep block, which is the last that is shown
    inside, outside = re.findall(r"visual tokens where it changed .*\) +\S+ +(\S+) +(\S+)", out)[-1]
    assert float(inside) > 1.5 * float(outside)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.mp4", "make it red"], "absent.mp4"),
        (["text.mp4", "make it red"], "text.mp4 cannot be read as a clip"),
        (["clip.mp4"], "PROMPT is missing"),
        (["clip.mp4", " "], "PROMPT is empty"),
        ([*EDIT, "--model", "absent"], "--model absent: there is no such file or folder"),
        ([*EDIT, "--compare", "absent"], "--compare absent: there is no such file or folder"),
        ([*EDIT, "--compare", "broken"], "--compare broken: cannot be loaded: .*config"),
        ([*EDIT, "--lora", "absent"], "--lora absent: there is no such file or folder"),
        ([*EDIT, "--blocks", "1", "6"], "--blocks 6: --model .* has the blocks 0 to 5"),
        ([*EDIT, "--blocks", "x"], "--blocks: 'x' is not an integer of 0 or more"),
        ([*EDIT, "--step", "12"], "--step 12: the edit takes 12 steps, 0 to 11"),
        ([*EDIT, "--step", "2", "--num_inference_steps", "2"], "--step 2: the edit takes 2 steps, 0 to 1"),
        ([*EDIT, "--words", "green"], "--words green: is no word of 'make the red ball blue'"),
        ([*EDIT, "--num_columns", "0"], "--num_columns: '0' is not an integer of at least 1"),
        ([*EDIT, "--output", "clip.mp4"], "--output clip.mp4: clip.mp4 is no folder"),
        ([*EDIT, "--output", "clip.mp4/maps"], "--output clip.mp4/maps: clip.mp4 is no folder"),
        ([*EDIT, "--output", "x" * 300], "--output x+: File name too long"),
        ([*EDIT, "--device", "toaster"], "--device toaster"),
        ([*EDIT, "--bogus"], "--bogus"),
    ],
)
def test_mistakes_give_one_line_and_status_2_and_write_nothing(run, monkeypatch, arguments, message):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("rvedit_diffusers.RVEDiTPipeline.from_pretrained", load)
    Path("text.mp4").write_text("not a clip")
    Path("broken").mkdir()
    Path("broken/model_index.json").write_text("{}")
    status, out, err, files = run(*arguments)
    assert status == 2
    assert re.fullmatch(rf"visualize_attention.py: error: .*{message}.*\n", err)
    assert (out, files) == ("", [])


def test_words_of_blocks_that_read_no_text(run, model):
    status, _, err, files = run(*EDIT, "--model", model, "--words", "red", "--blocks", "0")
    assert (status, files) == (2, [])
    assert err.endswith(f"--words: none of the blocks [0] of --model {model} reads text\n")


def test_block_that_the_second_pipeline_lacks(run, model):
    status, _, err, files = run(*EDIT, "--compare", model)
    assert status == 2
    assert err.endswith(f"--blocks 2: --compare {model} has the blocks 0 to 1\n")
    assert files == []


def test_results_are_written_all_or_none(run, model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    Path("out/attention").mkdir(parents=True)
    Path("out/attention/block_0.png").write_text("earlier")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("rvedit_diffusers.video.write_video", fail)
    status, _, err, _ = run(*EDIT, "--model", model)
    assert status == 2
    assert err.endswith("error: the result cannot be written: [Errno 28] No space left on device\n")
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("out/attention/block_0.png").read_text() == "earlier"
