import json

import numpy as np
import pytest
from PIL import Image

from rvedit_diffusers.synthetic import BenchmarkItems, read_manifest, write_sheet
from rvedit_diffusers.synthetic import __main__ as command
from rvedit_diffusers.synthetic.manifest import scene_from_json, scene_to_json
from rvedit_diffusers.video import read_video


ARGUMENTS = ["render", "--level", "L3", "--num", "2", "--seed", "7", "--frames", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("files") / "new" / "L3"
    command.main([*ARGUMENTS, "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def items():
    drawn = [BenchmarkItems("L3", 7, num_frames=5)[index] for index in range(2)]
    return [either for item in drawn for either in (item, item.twin)]


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_the_manifest_says_what_is_there(folder, items):
    entries = lines(folder)
    assert [entry["id"] for entry in entries] == [item.id for item in items]
    for entry, item in zip(entries, items, strict=True):
        assert list(entry)[:4] == ["id", "edited_type", "prompt", "original_video"]  # OpenVE-Bench's
        assert entry["prompt"] == item.instruction and entry["edited_type"] == item.kind
        assert entry["twin_id"] == item.twin.id and entry["level"] == "L3" and entry["seed"] == 7
        for operation, drawn in zip(entry["ops"], item.operations, strict=True):
            assert list(operation) == ["op", "target_id", "from", "to", "mask"]
            assert operation["to"] == list(drawn.value) and operation["from"] != operation["to"]
        listed = [entry["original_video"], entry["target_video"], *(o["mask"] for o in entry["ops"])]
        assert all((folder / name).is_file() for name in listed)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.*") if p.name != "manifest.jsonl"} == {
        name
        for entry in entries
        for name in (entry["original_video"], entry["target_video"], *(o["mask"] for o in entry["ops"]))
    }


def test_items_come_back_from_the_manifest(folder, items):
    assert read_manifest(folder / "manifest.jsonl") == items


def test_masks_are_exact_and_clips_nearly(folder, items):
    for entry, item in zip(lines(folder), items, strict=True):
        for operation, mask in zip(entry["ops"], item.masks, strict=True):
            picture = Image.open(folder / operation["mask"])
            assert picture.mode == "1" and np.array_equal(np.array(picture).reshape(mask.shape), mask)
        for name, frames in (("original_video", item.source_frames), ("target_video", item.target_frames)):
            written = read_video(folder / entry[name]).frames
            assert written.shape == frames.shape and np.abs(written.astype(int) - frames).mean() < 6


@pytest.mark.parametrize("level", ["L0", "L4", "L6", "OOD"])
def test_scenes_come_back_from_text(level):
    item = BenchmarkItems(level, 3, num_frames=5)[0]
    for scene in (item.scene, item.edited):
        assert scene_from_json(json.loads(json.dumps(scene_to_json(scene)))) == scene


def test_the_sheet_is_large_enough_to_look_at(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    command.main([*ARGUMENTS, "--sheet", str(path)])
    width, height = Image.open(path).size
    assert width >= 1200 and height >= 300
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num", "0", "--output", "new"], "--num"),
        ([], "--output, --sheet"),
        (["--output", "full"], "--output full is there already"),
        (["--sheet", "sheet.jpg"], "--sheet"),
        (["--seed", "-1", "--output", "new"], "`seed`"),
        (["--level", "OOD", "--split", "train", "--output", "new"], "`levels`"),
        (["--level", "L9", "--output", "new"], "--level"),
    ],
)
def test_wrong_commands_are_refused_before_anything_is_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    with pytest.raises(SystemExit):
        command.main([*ARGUMENTS, *arguments])
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "kept"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    calls = []

    def fail_later(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("disk full")

    monkeypatch.setattr(command, "write_video", fail_later)
    with pytest.raises(OSError, match="disk full"):
        command.main([*ARGUMENTS, "--output", str(tmp_path / "new")])
    assert not any(tmp_path.iterdir())


def test_a_link_to_an_empty_folder_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    command.main([*ARGUMENTS, "--output", str(tmp_path / "link")])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "manifest.jsonl").is_file()


def test_sheets_of_nothing_and_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`items`"):
        write_sheet(tmp_path / "sheet.png", [])
    with pytest.raises(ValueError, match="`path`"):
        write_sheet(tmp_path / "sheet.jpg", [])
    with pytest.raises(FileNotFoundError, match="`path`"):
        write_sheet(tmp_path / "none" / "sheet.png", [])
