"""Public benchmarks in the layouts of their data sets: what is read, refused, edited, written and measured."""

import csv
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from components import build_pipeline, make_clip
from PIL import Image


SCRIPT = Path(__file__).parents[1] / "examples" / "evaluate.py"
sys.path.insert(0, str(SCRIPT.parent))

import evaluate  # noqa: E402

from rvedit_diffusers.evaluation import (  # noqa: E402
    PipelineEditor,
    check_sources,
    read_benchmark,
    read_clip,
    score_result,
    write_result,
)
from rvedit_diffusers.synthetic import psnr  # noqa: E402
from rvedit_diffusers.video import read_video, write_video  # noqa: E402


def save_clip(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, make_clip(6, seed=seed), 12, crf=4)


def save_frames(folder, frames):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / f"{number:05d}.jpg", quality=95)


def make_openve(data):
    rows = []
    for number, category in enumerate(("global_style", "local_remove", "global_style")):
        rows.append([category, f"do this, or {number}", f"videos/{number:04d}_{category}.mp4"])
        save_clip(data / rows[-1][2], number)
    with open(data / "benchmark_videos.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["edited_type", "prompt", "original_video"], *rows])


def make_editverse(data):
    texts = ["<video1> Add a crown.", "Turn <video1> into a sketch.", "<video1> Put <image1> on the table."]
    entries = {
        str(number): {
            "<text>": text,
            "<video1>": f"videos/{number}.mp4",
            "direction": "horizontal",
            "target_prompt": "A crown.",
            "type": "add object",
            "source_prompt": "A head.",
        }
        for number, text in enumerate(texts)
    }
    for number, entry in enumerate(entries.values()):
        save_clip(data / entry["<video1>"], number)
    (data / "test.json").write_text(json.dumps(entries))


def make_ivebench(data):
    names, fields = ["a_street.mp4", "b_dog.mp4"], ("subcategory", "source_prompt", "target_prompt", "target_phrase")
    entries = [
        {"id": number, "src_video_name": name, "category": "style", "edit_prompt": "Make it a sketch."}
        | dict.fromkeys(fields, "words")
        for number, name in enumerate(names)
    ]
    save_clip(data / "videos" / names[0], 0)
    save_frames(data / "frames" / "b_dog", make_clip(6, seed=1))
    (data / "short.json").write_text(json.dumps(entries))


def make_five(data):
    (data / "edit_prompt").mkdir(parents=True)
    for number in range(1, 7):
        prompt = f"A [{number} legged] horse that runs over a bridge"
        entry = {
            "video_name": "0001_bus",
            "editing_type_id": str(number),
            "source_prompt": "A bus on a bridge",
            "target_prompt": prompt,
            "save_dir": f"{number}_" + "x" * 20,
        }
        if number == 6:
            entry["instruction"] = "Remove the bus"
        (data / "edit_prompt" / f"edit{number}_FiVE.json").write_text(json.dumps([entry]))
    save_frames(data / "images" / "0001_bus", make_clip(6))
    mask = np.zeros((6, 32, 32), np.uint8)
    mask[:, :, :16] = 255
    save_frames(data / "bmasks" / "0001_bus", mask)


MAKERS = {"openve": make_openve, "editverse": make_editverse, "ivebench": make_ivebench, "five": make_five}


@pytest.fixture
def data(tmp_path):
    """Makes the folder of a benchmark."""

    def data(name):
        folder = tmp_path / name
        folder.mkdir()
        MAKERS[name](folder)
        return folder

    return data


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path, capsys):
    """Runs the script; gives its folder, what it wrote to results.json, and what it printed."""

    def run(name, folder, *options):
        output = tmp_path / "output"
        arguments = [
            "--device=cpu",
            f"--model={model}",
            f"--benchmark={name}",
            f"--data={folder}",
            f"--output={output}",
        ]
        evaluate.main([*arguments, *options])
        return output, json.loads((output / "results.json").read_text()), capsys.readouterr().out

    yield run
    PartialState._reset_state()


# What is read


def test_openve_is_read(data):
    folder = data("openve")
    edits = read_benchmark("openve", folder)
    assert [edit.category for edit in edits] == ["global_style", "local_remove", "global_style"]
    assert edits[1].instruction == "do this, or 1" and edits[1].result == "0001_local_remove_edited.mp4"
    assert edits[1].source == folder / "videos" / "0001_local_remove.mp4"


def test_editverse_is_read_without_its_tags(data, caplog):
    edits = read_benchmark("editverse", data("editverse"))
    assert [edit.instruction for edit in edits] == ["Add a crown.", "Turn the video into a sketch."]
    assert [edit.result for edit in edits] == ["0/generate.mp4", "1/generate.mp4"]
    assert "1 edits are left out" in caplog.text


def test_ivebench_is_read_with_clips_and_with_frames(data):
    folder = data("ivebench")
    edits = read_benchmark("ivebench", folder)
    assert [edit.source for edit in edits] == [folder / "videos" / "a_street.mp4", folder / "frames" / "b_dog"]
    assert [edit.result for edit in edits] == ["a_street", "b_dog"]
    assert read_benchmark("ivebench", folder / "short.json") == edits


def test_clips_that_lie_in_two_places_are_refused(data, run, capsys):
    folder = data("ivebench")
    save_frames(folder / "out" / "results" / "b_dog", make_clip(6))  # what another model made
    with pytest.raises(SystemExit):
        run("ivebench", folder)
    message = capsys.readouterr().err
    assert "short.json row 2" in message
    assert all(str(folder / place / "b_dog") in message for place in ("frames", "out/results"))


def test_openves_paths_may_begin_beside_its_folder(data):
    folder = data("openve")
    expected = [edit.source for edit in read_benchmark("openve", folder)]
    table = folder / "benchmark_videos.csv"
    table.write_text(table.read_text(encoding="utf-8-sig").replace("videos/", f"{folder.name}/videos/"))
    assert [edit.source for edit in read_benchmark("openve", folder)] == expected


def test_five_is_read_with_its_masks(data):
    folder = data("five")
    edits = read_benchmark("five", folder)
    assert [edit.category for edit in edits] == list("123456")
    assert edits[0].result == "0001_bus/1_A [1 legged] horse t.mp4"
    assert edits[0].instruction == "A 1 legged horse that runs over a bridge"
    assert edits[5].instruction == "Remove the bus"
    assert edits[0].masks == folder / "bmasks" / "0001_bus"
    shutil.rmtree(folder / "bmasks")
    assert read_benchmark("five", folder)[0].masks is None


def test_the_limit_takes_the_first(data):
    folder = data("openve")
    assert read_benchmark("openve", folder, limit=2) == read_benchmark("openve", folder)[:2]


def test_of_two_results_of_one_name_the_first_stays(data, caplog):
    folder = data("five")
    for path in sorted((folder / "edit_prompt").iterdir()):
        (entry,) = json.loads(path.read_text())
        path.write_text(json.dumps([entry, entry]))
    with caplog.at_level(logging.WARNING):
        assert len(read_benchmark("five", folder)) == 6
    assert "edit1_FiVE.json row 2 is left out" in caplog.text


def test_frames_in_a_folder_are_in_the_order_of_their_names(tmp_path):
    clip = make_clip(4)
    save_frames(tmp_path / "frames", clip)
    frames, fps = read_clip(tmp_path / "frames", 3)
    assert frames.shape == (3, 32, 32, 3) and fps == 24
    assert np.abs(frames.astype(int) - clip[:3]).mean() < 3


# What is refused


@pytest.mark.parametrize(
    "name, file, text, message",
    [
        ("openve", "benchmark_videos.csv", None, "there is no file"),
        ("openve", "benchmark_videos.csv", b"\xff\xfe\xfa", "benchmark_videos.csv is no text"),
        ("openve", "benchmark_videos.csv", b"prompt,original_video\na,b.mp4\n", "row 1 has no `edited_type`"),
        ("openve", "benchmark_videos.csv", b"edited_type,prompt,original_video\n", "has no edit"),
        ("editverse", "test.json", b"{", "test.json is no JSON"),
        ("editverse", "test.json", b"[]", "has to hold a dict, but holds a list"),
        ("editverse", "test.json", b'{"7": {"<text>": "a", "type": "b"}}', "row '7' has no `<video1>`"),
        (
            "editverse",
            "test.json",
            b'{"../a": {"<text>": "a", "type": "b", "<video1>": "c"}}',
            "names a result outside",
        ),
        ("ivebench", "other.json", b"[]", "has to hold one .json, but holds 2"),
        ("ivebench", "short.json", b'[{"src_video_name": "a"}]', "row 1 has no `category`"),
        ("five", "edit_prompt/edit3_FiVE.json", None, "edit3_FiVE.json"),
        ("five", "edit_prompt/edit3_FiVE.json", b"[1]", "edit3_FiVE.json row 1 has no `video_name`"),
    ],
)
def test_bad_manifests_are_refused(data, name, file, text, message):
    folder = data(name)
    path = folder / file
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(ValueError) as error:
        read_benchmark(name, folder)
    assert message in str(error.value)


def test_another_benchmark_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`name`.*'vbench'"):
        read_benchmark("vbench", tmp_path)


@pytest.mark.parametrize(
    "name, file, text, row",
    [
        ("openve", "videos/0001_local_remove.mp4", None, "benchmark_videos.csv row 2"),
        ("openve", "videos/0001_local_remove.mp4", b"no clip", "benchmark_videos.csv row 2"),
        ("editverse", "videos/0.mp4", b"", "test.json row '0'"),
        ("ivebench", "videos/a_street.mp4", None, "short.json row 1"),
        ("ivebench", "frames/b_dog/00001.jpg", b"no picture", "short.json row 2"),
        ("five", "bmasks/0001_bus/00005.jpg", None, "edit1_FiVE.json row 1"),
        ("five", "bmasks/0001_bus/00002.jpg", b"no picture", "edit1_FiVE.json row 1"),
    ],
)
def test_bad_clips_are_refused_before_a_model_is_loaded(data, run, monkeypatch, capsys, name, file, text, row):
    folder = data(name)
    path = folder / file
    path.unlink() if text is None else path.write_bytes(text)
    monkeypatch.setattr(evaluate, "load_editor", None)
    with pytest.raises(SystemExit) as ended:
        run(name, folder)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and row in message and path.name in message


def test_single_frames_are_refused(data):
    folder = data("ivebench")
    for number in range(2, 7):
        (folder / "frames" / "b_dog" / f"{number:05d}.jpg").unlink()
    with pytest.raises(ValueError, match="row 2.*at least two frames, but has 1"):
        check_sources(read_benchmark("ivebench", folder))


# What is written


def test_openves_scorer_gets_a_table_with_paths(data, run):
    output, _, printed = run("openve", data("openve"))
    with open(output / "new_result.csv", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["edited_type", "prompt", "original_video", "edited_result_path"] and len(rows) == 3
    for row in rows:
        edited = read_video(row["edited_result_path"])
        assert edited.frames.shape == (6, 32, 32, 3) and edited.fps == 12
        assert Path(row["edited_result_path"]).name == f"{Path(row['original_video']).stem}_edited.mp4"
    assert "new_result.csv" in printed


def test_editverses_scorer_gets_sources_beside_results(data, run):
    folder = data("editverse")
    output, _, _ = run("editverse", folder)
    for key, entry in json.loads((output / "test.json").read_text()).items():
        assert {path.name for path in (output / "results" / key).iterdir()} == {"generate.mp4", "video1.mp4"}
        source, copy = read_video(folder / entry["<video1>"]), read_video(output / "results" / key / "video1.mp4")
        assert copy.frames.shape == source.frames.shape and psnr(copy.frames, source.frames) > 30


def test_ivebenchs_scorer_gets_folders_of_frames(data, run):
    output, _, _ = run("ivebench", data("ivebench"))
    names = [f"{number:05d}.png" for number in range(6)]
    for stem in ("a_street", "b_dog"):
        assert sorted(path.name for path in (output / "results" / stem).iterdir()) == names
    assert [entry["id"] for entry in json.loads((output / "prompts.json").read_text())] == [0, 1]


def test_fives_scorer_gets_clips_by_the_prompts_beginning(data, run):
    output, found, printed = run("five", data("five"))
    clips = {str(path.relative_to(output / "results")) for path in (output / "results").rglob("*.mp4")}
    assert clips == {f"0001_bus/{number}_A [{number} legged] horse t.mp4" for number in range(1, 7)}
    assert list(found["categories"]) == list("123456") and found["all"]["n"] == 6
    assert {"outside_psnr", "outside_ssim", "warping_error", "source_psnr_low"} <= found["all"].keys()
    assert "outside SSIM" in printed


def test_only_so_many_frames_are_edited(data, run):
    output, found, _ = run("openve", data("openve"), "--num_frames=4", "--limit=1")
    assert found["settings"]["num_frames"] == 4 and found["all"]["n"] == 1
    assert read_video(output / "results" / "0000_global_style_edited.mp4").num_frames == 4


def test_results_that_are_there_are_not_made_again(data, run, monkeypatch):
    folder = data("ivebench")
    output, first, _ = run("ivebench", folder)
    shutil.rmtree(output / "results" / "b_dog")
    before = {path: path.stat().st_mtime_ns for path in (output / "results" / "a_street").iterdir()}
    edited, plain = [], PipelineEditor.__call__

    def watched(self, tasks):
        edited.extend(task.id for task in tasks)
        return plain(self, tasks)

    monkeypatch.setattr(PipelineEditor, "__call__", watched)
    _, second, _ = run("ivebench", folder)
    assert edited == ["b_dog"] and second == first
    assert {path: path.stat().st_mtime_ns for path in (output / "results" / "a_street").iterdir()} == before


def test_other_settings_in_the_same_folder_are_refused(data, run, capsys):
    folder = data("openve")
    run("openve", folder, "--limit=1")
    with pytest.raises(SystemExit):
        run("openve", folder, "--guidance_scale=1.5")
    assert "guidance_scale 3.0, but now it is 1.5" in capsys.readouterr().err


def test_results_of_another_instruction_are_refused(data, run, capsys):
    folder = data("openve")
    run("openve", folder, "--limit=1")
    table = folder / "benchmark_videos.csv"
    edit = read_benchmark("openve", folder)[0]
    table.write_text(table.read_text(encoding="utf-8-sig").replace(edit.instruction, "Make it snow"))
    with pytest.raises(SystemExit):
        run("openve", folder, "--limit=1")
    message = capsys.readouterr().err
    assert f"was made with the instruction {edit.instruction!r}, but it is 'Make it snow'" in message


def test_clips_that_the_model_does_not_take_are_named(data, run, capsys):
    with pytest.raises(SystemExit):
        run("openve", data("openve"), "--height=20")
    message = capsys.readouterr().err
    assert "benchmark_videos.csv row 1" in message and "`height`" in message


# What is measured


def test_a_copy_of_the_source_changes_nothing(data, run):
    _, found, _ = run("ivebench", data("ivebench"), "--model=copy-source")
    row = found["all"]
    assert row["source_psnr"] > 40 and row["edit_area"] == 0 and row["flicker"] < 1
    assert row["warping_error"] == pytest.approx(row["source_warping_error"], rel=0.2)


def test_only_what_the_mask_leaves_out_counts_outside(data, tmp_path):
    edit = read_benchmark("five", data("five"))[0]
    source, fps = read_clip(edit.source)
    inside, outside = source.copy(), source.copy()
    inside[:, :, :12] = 255
    outside[:, :, 20:] = 255
    scores = []
    for number, frames in enumerate((inside, outside)):
        write_result(tmp_path / str(number), edit, source, frames, fps)
        scores.append(score_result(tmp_path / str(number), edit))
    assert scores[0]["outside_psnr"] > 30 > 15 > scores[1]["outside_psnr"]
    assert scores[0]["outside_ssim"] > scores[1]["outside_ssim"]
    assert scores[0]["edit_area"] > 0.3 and scores[0]["source_psnr"] < 15


def test_results_of_another_size_are_refused(data, tmp_path):
    edit = read_benchmark("openve", data("openve"))[0]
    write_video(tmp_path / edit.result, make_clip(6, 32, 48), 12)
    with pytest.raises(ValueError, match=r"_edited.mp4 is \(6, 32, 48, 3\)"):
        score_result(tmp_path, edit)
