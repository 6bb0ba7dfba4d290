import json
import re
import runpy
import shutil
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from components import build_pipeline, make_clip
from test_video import ffmpeg, sound

from rvedit_diffusers import RVEDiTPipeline
from rvedit_diffusers.synthetic import demo_edit
from rvedit_diffusers.video import read_video, write_video


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import edit_video  # noqa: E402


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


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A Hub that cannot be reached, or only its listings if `listings` is set; `requests` is what was asked of it."""
    hub = SimpleNamespace(listings=False, requests=[])
    client = type(huggingface_hub.get_session())
    httpx = sys.modules[client.__module__]

    def send(client, request, **_):
        hub.requests.append(request.url)
        if hub.listings and request.url.path.startswith("/api/models/"):
            files = [{"rfilename": name} for name in ("model_index.json", "pytorch_lora_weights.safetensors")]
            listing = {"id": "some/weights", "sha": "0" * 40, "siblings": files}
            return httpx.Response(200, json=listing, request=request)
        raise httpx.ConnectError("no connection")

    monkeypatch.setattr(client, "send", send)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    return hub


def fail_with(error):
    def fail(*args, **kwargs):
        raise error

    return fail


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


@pytest.mark.parametrize("offload", ["auto", "model", "group"])
def test_offloaded_weights_give_the_same_edit(run, model, offload):
    for name in ("none", offload):
        options = ["--device", "cpu", "--offload", name, "--output", f"{name}.mp4"]
        assert run("clip.mp4", "make it red", "--model", model, *options)[0] == 0
    assert np.array_equal(*(read_video(f"{name}.mp4").frames for name in ("none", offload)))


class Placed:
    """Stands for a pipeline of weights of some sizes, in bytes; `called` is where it was put."""

    def __init__(self, *sizes):
        names = map(str, range(len(sizes)))
        self.components = {
            n: torch.nn.Linear(size // 4, 1, bias=False, device="meta") for n, size in zip(names, sizes)
        }

    def to(self, device):
        self.called = "none"

    def enable_model_cpu_offload(self, device):
        self.called = "model"

    def enable_group_offload(self, device, offload_type, use_stream):
        self.called = "group"


@pytest.mark.parametrize(
    "sizes, wanted", [((300, 400), "none"), ((300, 404), "model"), ((700, 300), "model"), ((704, 4), "group")]
)
def test_what_rests_elsewhere_is_chosen_by_what_fits(monkeypatch, sizes, wanted):
    """On a GPU with 1,000 bytes free, 70 % of which weights may fill."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    pipe = Placed(*sizes)
    edit_video.place(pipe, torch.device("cuda"), "auto")
    assert pipe.called == wanted
    edit_video.place(pipe, torch.device("cpu"), "auto")
    assert pipe.called == "none"
    for name in ("none", "model", "group"):
        edit_video.place(pipe, torch.device("cuda"), name)
        assert pipe.called == name


def test_the_clips_rate_reaches_the_pipeline(run, model, monkeypatch):
    rates, call = [], RVEDiTPipeline.__call__
    monkeypatch.setattr(RVEDiTPipeline, "__call__", lambda *a, **k: rates.append(k["fps"]) or call(*a, **k))
    assert run("clip.mp4", "make it red", "--model", model)[0] == 0
    assert rates == [pytest.approx(30000 / 1001)]


def test_device_and_dtype(run, model):
    for dtype in ("float32", "bfloat16"):
        options = ["--device", "cpu", "--dtype", dtype, "--output", f"{dtype}.mp4"]
        assert run("clip.mp4", "make it red", "--model", model, *options)[0] == 0
    source, full, half = (read_video(f"{name}.mp4").frames for name in ("clip", "float32", "bfloat16"))
    assert half.shape == source.shape
    assert not np.array_equal(half, source)
    assert not np.array_equal(half, full)


def test_sound_stays_with_its_frames(run, model):
    click = "aevalsrc='between(t\\,0.6\\,0.7)*sin(2000*PI*t)':d=1:s=48000"
    picture = ["-itsoffset", "0.4", "-f", "lavfi", "-i", "testsrc=size=32x32:rate=25:duration=0.6"]
    ffmpeg(*picture, "-f", "lavfi", "-i", click, "-c:a", "aac", "late.mkv")
    assert float(read_video("late.mkv").start_time) == pytest.approx(0.4, abs=0.03)
    run("late.mkv", "make it red", "--model", model)
    heard = np.flatnonzero(np.abs(sound("late_edited.mp4")) > 0.1)[0] / 48000
    assert heard == pytest.approx(0.2, abs=0.03)


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


def test_the_demo_keeps_the_detail_of_what_is_not_edited(run):
    """With the embedded checkpoint, what the edit leaves alone has under half of the edited copy's squared error."""
    demo, errors = demo_edit(), {}
    for option in ((), ("--no-keep_detail",)):
        assert run(*option)[0] == 0
        edited = read_video("out/demo/edited.mp4").frames.astype(float)
        errors[option] = np.square(edited - demo.target_frames)[~demo.mask].mean()
    assert errors[()] < 0.5 * errors[("--no-keep_detail",)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.mp4", "make it red"], "absent.mp4"),
        (["make it red " * 30, "clip.mp4"], "VIDEO: .*make it red"),
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
        (["clip.mp4", "make it red", "--output", "x" * 300 + ".mp4"], "File name too long"),
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


@pytest.mark.parametrize("option", ["--model", "--lora"])
@pytest.mark.parametrize("name", ["typo", "./typo", "../typo", "/typo/typo", "~/typo", ".runs/edit", "runs/editr"])
def test_mistyped_folder_is_no_hub_id(run, hub, option, name):
    Path("runs/edit").mkdir(parents=True)
    status, out, err, files = run("absent.mp4", "make it red", option, name)
    assert status == 2
    assert err == f"edit_video.py: error: {option} {name}: there is no such file or folder\n"
    assert (out, files, hub.requests) == ("", [], [])


@pytest.mark.parametrize("listings", [False, True])
@pytest.mark.parametrize("option", ["--model", "--lora"])
def test_unreachable_hub(run, hub, model, option, listings):
    hub.listings = listings
    options = {"--model": model} | {option: "some/weights"}
    status, out, err, files = run("clip.mp4", "make it red", *(text for pair in options.items() for text in pair))
    assert hub.requests
    assert status == 2
    assert err == f"edit_video.py: error: {option} some/weights: cannot be loaded from the Hub: no connection\n"
    assert (out, files) == ("", [])


def test_video_that_may_not_be_read(run, monkeypatch):
    error = PermissionError(13, "Permission denied", "clip.mp4")
    monkeypatch.setattr("rvedit_diffusers.video.read_video", fail_with(error))
    status, _, err, _ = run("clip.mp4", "make it red")
    assert status == 2
    assert err == "edit_video.py: error: VIDEO: [Errno 13] Permission denied: 'clip.mp4'\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore about it."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_for_the_edit(run, model, monkeypatch, error):
    monkeypatch.setattr(RVEDiTPipeline, "__call__", fail_with(error))
    status, out, err, files = run("clip.mp4", "make it red", "--model", model)
    assert status == 2
    assert re.fullmatch(r"edit_video.py: error: the edit failed: .*memory.*\n", err, re.IGNORECASE)
    assert (out, files) == ("", [])


@pytest.mark.parametrize("arguments", [["clip.mp4", "make it red", "--compare", "compare.png"], []])
def test_results_are_written_all_or_none(run, model, tmp_path, monkeypatch, arguments):
    Path("out/demo").mkdir(parents=True)
    Path("clip_edited.mp4").write_text("earlier")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("rvedit_diffusers.video.write_strip", fail_with(OSError(28, "No space left on device")))
    status, _, err, _ = run(*arguments, "--model", model)
    assert status == 2
    assert err.endswith("\nedit_video.py: error: the result cannot be written: [Errno 28] No space left on device\n")
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("clip_edited.mp4").read_text() == "earlier"


def test_folder_in_the_way_of_a_demo_file(run, model):
    Path("out/demo/compare.png").mkdir(parents=True)
    status, _, err, files = run("--model", model)
    assert status == 2
    assert err.endswith("\nedit_video.py: error: the result cannot be written: out/demo/compare.png is a folder\n")
    assert files == []


def test_a_clip_that_is_too_long_is_refused_before_all_of_it_is_decoded(run, model, tmp_path, monkeypatch):
    own = shutil.copytree(model, tmp_path / "model")
    path = own / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_max_seq_len": 1}))
    decoded = []

    def read(path, max_frames=None):
        decoded.append(max_frames)
        return read_video(path, max_frames)

    monkeypatch.setattr("rvedit_diffusers.video.read_video", read)
    status, _, err, _ = run("clip.mp4", "make it red", "--model", own)
    assert status == 2 and "VIDEO clip.mp4: has more than the 1 frames" in err
    assert decoded == [2]
