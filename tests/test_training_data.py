import csv
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from rvedit_diffusers.training import record as training_record
from rvedit_diffusers.training.data import (
    PRESETS,
    Bucket,
    Dropped,
    Pair,
    Plan,
    ScanRecord,
    content_key,
    describe_plans,
    load_pair,
    parse_buckets,
    plan_pairs,
    read_pairs,
)
from rvedit_diffusers.video import probe_video, read_video, write_video


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y", *arguments]
    subprocess.run([str(argument) for argument in command], check=True)


def moving_bar(moments, height=16, width=32):
    """A white bar that moves 8 pixels in a second: `(frames, height, width, 3)` uint8, one frame for each moment."""
    x = np.arange(width) + 0.5
    left = 8.0 * np.asarray(moments, float)[:, None]
    coverage = np.clip(np.minimum(x + 0.5, left + 4) - np.maximum(x - 0.5, left), 0, 1)
    return np.repeat(np.repeat(coverage[:, None, :, None], height, 1), 3, 3)


def make_clip(path, num_frames=9, fps=8, height=16, width=32):
    write_video(path, moving_bar(np.arange(num_frames) / float(fps), height, width), fps, crf=4)
    return path


def make_pair(folder, source=(), edited=(), instruction="do it", row=0):
    return Pair(
        make_clip(folder / f"source{row}.mp4", *source),
        make_clip(folder / f"edited{row}.mp4", *edited),
        instruction,
        row,
    )


def plan_one(pair, buckets, fps=None):
    plans, dropped = plan_pairs([pair], parse_buckets(buckets), fps, num_workers=1)
    return (plans + dropped)[0]


def bar_positions(clip):
    """Centre of the bar in each frame, in pixels."""
    light = clip.mean(axis=(1, 3), dtype=float)
    return (light * (np.arange(clip.shape[2]) + 0.5)).sum(1) / light.sum(1)


# Buckets


def test_buckets_are_read_and_written():
    assert parse_buckets("81x480x832, 1x1024x1024,81x480x832") == [Bucket(81, 480, 832), Bucket(1, 1024, 1024)]
    assert str(Bucket(81, 480, 832)) == "81x480x832"


@pytest.mark.parametrize("text", ["", "81x480", "81x480x832x3", "0x480x832", "81x480x832,", "81*480*832", "-1x16x16"])
def test_wrong_buckets(text):
    with pytest.raises(ValueError, match="`--buckets`.*FRAMESxHEIGHTxWIDTH"):
        parse_buckets(text)


@pytest.mark.parametrize(
    ("bucket", "right"), [((80, 480, 832), "77 or 81"), ((81, 470, 832), "464 or 480"), ((81, 480, 8), "width.*as 16")]
)
def test_buckets_that_the_model_does_not_take(bucket, right):
    with pytest.raises(ValueError, match=f"`--buckets`.*{right}"):
        Bucket(*bucket).check(temporal_factor=4, spatial_factor=16)


@pytest.mark.parametrize("bucket", [(81, 480, 832), (1, 16, 16), (5, 32, 48)])
def test_buckets_that_the_model_takes(bucket):
    Bucket(*bucket).check(temporal_factor=4, spatial_factor=16)


# Tables


ROWS = [["a.mp4", "b.mp4", "make it red, then blue"], ["sub/c.mp4", "d.mp4", " remove the dog "]]


def write_table(path, columns=PRESETS["default"], rows=ROWS):
    objects = [dict(zip(columns, row, strict=True)) for row in rows]
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in objects))
    else:
        path.write_text(json.dumps(objects))
    return path


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "pairs.csv", "pairs.jsonl", "pairs.json"])
def test_every_kind_of_table_gives_the_same_pairs(tmp_path, name):
    path = write_table(tmp_path / name)
    assert read_pairs(path.parent if name.startswith("metadata") else path) == [
        Pair(tmp_path / "a.mp4", tmp_path / "b.mp4", "make it red, then blue", 0),
        Pair(tmp_path / "sub" / "c.mp4", tmp_path / "d.mp4", "remove the dog", 1),
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_the_columns(tmp_path, preset):
    path = write_table(tmp_path / "table.json", PRESETS[preset])
    assert [pair.instruction for pair in read_pairs(path, *PRESETS[preset])] == [ROWS[0][2], ROWS[1][2].strip()]


def test_paths_start_from_the_root_unless_they_are_absolute(tmp_path):
    path = write_table(tmp_path / "table.csv", rows=[["a.mp4", "/elsewhere/b.mp4", "do it"]])
    pair = read_pairs(path, data_root=tmp_path / "root")[0]
    assert (pair.source, pair.edited) == (tmp_path / "root" / "a.mp4", Path("/elsewhere/b.mp4"))


def test_table_of_a_spreadsheet(tmp_path):
    (tmp_path / "table.csv").write_text("source,edited,instruction\r\na.mp4,b.mp4,färbe es\r\n", encoding="utf-8-sig")
    assert read_pairs(tmp_path / "table.csv")[0].instruction == "färbe es"


def test_missing_values_stay_in_their_rows(tmp_path):
    (tmp_path / "table.jsonl").write_text(
        '{"source": "a.mp4", "edited": "b.mp4", "instruction": "do it"}\n\n{"source": 1}'
    )
    pair = read_pairs(tmp_path / "table.jsonl")[1]
    assert (pair.instruction, pair.row) == ("", 1)
    assert not pair.edited.is_file()


@pytest.mark.parametrize("position", range(3))
def test_missing_columns(tmp_path, position):
    columns = list(PRESETS["default"])
    columns[position] = "other"
    flag = ("source_column", "edited_column", "instruction_column")[position]
    with pytest.raises(ValueError, match=f"`--{flag}`.*no column '{PRESETS['default'][position]}'.*other"):
        read_pairs(write_table(tmp_path / "table.csv", columns))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("table.csv", "source,edited,instruction\n", "no rows"),
        ("table.csv", "source,edited,instruction\na,b,red, then blue\n", "row 0 has more fields.*quotes"),
        ("table.jsonl", "{", "cannot be read"),
        ("table.json", '{"source": "a"}', "list of objects"),
        ("table.txt", "a b c", ".csv, .jsonl or .json"),
        ("table.csv", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"`--train_data`.*{reason}"):
        read_pairs(tmp_path / name)


def test_places_without_a_table(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`--train_data`.*neither metadata.csv"):
        read_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="`--train_data`.*absent.csv"):
        read_pairs(tmp_path / "absent.csv")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="`--train_data`.*owner/name.*`datasets`"):
        read_pairs("owner/name")


def test_dataset_with_paths(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = dict(zip(PRESETS["kiwi-edit"], zip(*ROWS, strict=True), strict=True))
    split = datasets.Dataset.from_dict(columns | {"unused": [1, 2]})
    split.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": split, "test": split.select([0])}).save_to_disk(tmp_path / "splits")
    other = datasets.DatasetDict({"train": split, "validation": split.select([1])})
    other.save_to_disk(tmp_path / "validation")
    for option, rows in (("train_data", [0, 1]), ("validation_data", [1])):
        pairs = read_pairs(tmp_path / "validation", *PRESETS["kiwi-edit"], option=option)
        assert [pair.instruction for pair in pairs] == [ROWS[row][2].strip() for row in rows]
    for name in ("one", "splits"):
        pairs = read_pairs(tmp_path / name, *PRESETS["kiwi-edit"])
        assert [(pair.source, pair.instruction) for pair in pairs] == [
            (tmp_path / name / "a.mp4", "make it red, then blue"),
            (tmp_path / name / "sub" / "c.mp4", "remove the dog"),
        ]
    with pytest.raises(ValueError, match="`--source_column`.*src_video"):
        read_pairs(tmp_path / "one")


def test_dataset_with_embedded_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    clip = make_clip(tmp_path / "clip.mp4", 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    columns = {
        "source": [{"bytes": clip.read_bytes(), "path": "clip.mp4"}],
        "edited": [{"bytes": (tmp_path / "image.png").read_bytes(), "path": None}],
        "instruction": ["do it"],
    }
    features = {"source": datasets.Video(), "edited": datasets.Image(), "instruction": datasets.Value("string")}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.save_to_disk(tmp_path / "dataset")
    pair = read_pairs(tmp_path / "dataset")[0]
    assert pair.source.read_bytes() == clip.read_bytes()
    assert pair.edited.read_bytes() == (tmp_path / "image.png").read_bytes()
    assert read_video(pair.edited).num_frames == 1
    assert read_pairs(tmp_path / "dataset") == [pair]


# The common clock


def test_equal_clips_are_taken_frame_by_frame(tmp_path):
    plan = plan_one(make_pair(tmp_path), "9x16x32")
    assert plan.source_indices == plan.edited_indices == tuple(range(9))
    assert (plan.fps, plan.note) == (8, "kept")


@pytest.mark.parametrize("rates", [(24, 30), (Fraction(60000, 1001), 24), (Fraction(24000, 1001), 24), (10, 25)])
def test_clips_of_two_rates_show_the_same_moments(tmp_path, rates):
    pair = make_pair(tmp_path, (round(2 * rates[0]), rates[0]), (round(2 * rates[1]), rates[1]))
    plan = plan_one(pair, "17x16x32")
    assert plan.fps == min(rates)
    source, edited = load_pair(plan)
    moments = np.arange(17) / float(min(rates))
    for clip in (source, edited):  # to half a frame of the common clock, at 8 pixels in a second
        assert np.abs(bar_positions(clip) - (2 + 8 * moments)).max() < 8 / float(min(rates)) / 2 + 0.1


def test_the_given_rate_skips_and_repeats_frames(tmp_path):
    pair = make_pair(tmp_path, (16, 8), (16, 8))
    assert plan_one(pair, "5x16x32", fps=4).source_indices == (0, 2, 4, 6, 8)
    assert plan_one(pair, "5x16x32", fps=16).source_indices == (0, 0, 1, 1, 2)
    assert plan_one(pair, "5x16x32", fps=29.97002997).fps == Fraction(30000, 1001)


def test_time_stamps_in_milliseconds_keep_every_frame(tmp_path):
    pair = Pair(make_clip(tmp_path / "a.mkv", 25, 24), make_clip(tmp_path / "b.mp4", 25, 24), "do it", 0)
    plan = plan_one(pair, "25x16x32")
    assert plan.source_indices == plan.edited_indices == tuple(range(25))


def test_a_late_start_does_not_shift_the_clip(tmp_path):
    pair = make_pair(tmp_path)
    late = tmp_path / "late.mkv"
    ffmpeg("-itsoffset", "0.5", "-i", pair.source, "-c", "copy", "-copyts", late)
    plan = plan_one(Pair(late, pair.edited, "do it", 0), "9x16x32")
    assert plan.source_indices == plan.edited_indices


def test_a_frame_of_variable_rate_lasts_until_the_next(tmp_path):
    pair = make_pair(tmp_path, (17, 8), (17, 8))
    variable = tmp_path / "variable.mkv"  # frames at 0, 1, 4, 5, 8, 9, ... eighths of a second
    ffmpeg("-i", pair.source, "-vf", "select='lt(mod(n\\,4)\\,2)'", "-fps_mode", "vfr", variable)
    plan = plan_one(Pair(variable, pair.edited, "do it", 0), "9x16x32", fps=8)
    assert plan.source_indices == (0, 1, 1, 1, 2, 3, 3, 3, 4)
    assert plan.edited_indices == tuple(range(9))


def test_the_shorter_clip_sets_the_length(tmp_path):
    pair = make_pair(tmp_path, (25, 8), (10, 8))
    plan = plan_one(pair, "17x16x32,9x16x32")
    assert plan.bucket == Bucket(9, 16, 32)
    assert plan.note == "trimmed by 2.00 s"


def test_plans_do_not_depend_on_the_workers(tmp_path):
    pairs = [make_pair(tmp_path, (9 + row, 8), row=row) for row in range(4)]
    buckets = parse_buckets("9x16x32,5x16x32")
    assert plan_pairs(pairs, buckets, num_workers=1) == plan_pairs(pairs, buckets, num_workers=4)


# The record of scanned files


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded, one for each time."""
    names = []

    def probe(path):
        names.append(path.name)
        return probe_video(path)

    monkeypatch.setattr(training_record, "probe_video", probe)
    return names


def overwrite_unseen(path):
    """Other bytes, with the same size and time of change."""
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_recorded_files_are_not_decoded_again(tmp_path, decoded):
    pairs = [make_pair(tmp_path, (9, Fraction(30000, 1001)), row=row) for row in range(4)]
    record, buckets = tmp_path / "sub" / "folder" / "files.jsonl", [Bucket(5, 16, 32)]
    plain = plan_pairs(pairs, buckets)
    decoded.clear()
    assert plan_pairs(pairs, buckets, record=record) == plain
    assert len(decoded) == len(record.read_text().splitlines()) == 8
    assert plan_pairs(pairs, buckets, record=record) == plain
    assert len(decoded) == 8


@pytest.mark.parametrize("name", ["clip.mp4", "milliseconds.mkv", "variable.mkv", "late.mkv", "image.png", "cut.mp4"])
def test_a_record_gives_back_what_was_found(tmp_path, name):
    path, clip = tmp_path / name, make_clip(tmp_path / "whole.mp4", 17, 24)
    if name == "variable.mkv":
        ffmpeg("-i", clip, "-vf", "select='lt(mod(n\\,4)\\,2)'", "-fps_mode", "vfr", path)
    elif name == "late.mkv":
        ffmpeg("-itsoffset", "0.5", "-i", clip, "-c", "copy", "-copyts", path)
    elif name == "image.png":
        Image.new("RGB", (32, 16)).save(path)
    elif name == "cut.mp4":
        ffmpeg("-i", clip, "-g", "1", "-movflags", "+faststart", path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    else:
        make_clip(path, 17, 24)
    info = probe_video(path)
    assert (info.damage is not None) == (name == "cut.mp4")
    assert ScanRecord(tmp_path / "files.jsonl").probe(path) == info
    assert ScanRecord(tmp_path / "files.jsonl").probe(path) == info


def test_a_changed_file_is_decoded_again(tmp_path, decoded):
    pair, record, buckets = make_pair(tmp_path), tmp_path / "files.jsonl", parse_buckets("9x16x32,5x16x32")
    plan_pairs([pair], buckets, record=record)
    make_clip(pair.edited, 6)
    decoded.clear()
    for _ in range(2):
        plans, _ = plan_pairs([pair], buckets, record=record)
        assert plans[0].bucket.num_frames == 5
    assert decoded == [pair.edited.name]


def test_a_file_is_known_by_all_of_its_names(tmp_path, decoded, monkeypatch):
    pair, record = make_pair(tmp_path), ScanRecord(tmp_path / "files.jsonl")
    info = record.probe(pair.source)
    (tmp_path / "link.mp4").symlink_to(pair.source)
    monkeypatch.chdir(tmp_path)
    assert record.probe(Path("link.mp4")) == record.probe(Path(pair.source.name)) == info
    assert decoded == [pair.source.name]


@pytest.mark.parametrize("kept", [-1, -20, 1])  # without its end, half, or next to nothing of it
def test_a_line_that_was_cut_off_costs_one_file(tmp_path, decoded, kept):
    pair, record, buckets = make_pair(tmp_path), tmp_path / "files.jsonl", [Bucket(9, 16, 32)]
    plain = plan_pairs([pair], buckets, num_workers=1, record=record)
    first, second = record.read_bytes().splitlines()
    record.write_bytes(first + b"\n" + second[:kept])
    decoded.clear()
    for _ in range(2):
        assert plan_pairs([pair], buckets, num_workers=1, record=record) == plain
    assert decoded == [pair.edited.name]
    assert record.read_bytes().splitlines() == [first, second[:kept], second]


def test_a_whole_line_without_its_line_break_counts(tmp_path, decoded):
    pair, record = make_pair(tmp_path), tmp_path / "files.jsonl"
    ScanRecord(record).probe(pair.source)
    record.write_bytes(record.read_bytes().rstrip())
    for _ in range(2):
        for path in (pair.source, pair.edited):
            ScanRecord(record).probe(path)
    assert decoded == [pair.source.name, pair.edited.name]


def test_lines_of_several_threads_do_not_mix(tmp_path):
    files = [tmp_path / f"{number}.bin" for number in range(200)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]))
    records = [ScanRecord(tmp_path / "files.jsonl") for _ in range(2)]  # as of two processes
    with ThreadPoolExecutor(8) as executor:
        hashes = list(executor.map(lambda number: records[number % 2].sha256(files[number]), range(200)))
    lines = [json.loads(line) for line in (tmp_path / "files.jsonl").read_text().splitlines() if line]
    assert sorted((line["path"], line["sha256"]) for line in lines) == sorted(zip(map(str, files), hashes))


def test_unreadable_files_are_remembered_and_missing_ones_are_not(tmp_path, decoded):
    good, record, buckets = make_pair(tmp_path), tmp_path / "files.jsonl", [Bucket(9, 16, 32)]
    (tmp_path / "text.mp4").write_text("not a clip")
    pairs = [Pair(good.source, tmp_path / name, "do it", 0) for name in ("text.mp4", "absent.mp4")]
    plain = plan_pairs(pairs, buckets)
    assert [item.kind for item in plain[1]] == ["unreadable file", "missing file"]
    assert plan_pairs(pairs, buckets, num_workers=1, record=record) == plain
    decoded.clear()
    assert plan_pairs(pairs, buckets, num_workers=1, record=record) == plain
    assert decoded == ["absent.mp4"]
    make_clip(tmp_path / "absent.mp4")
    assert len(plan_pairs(pairs, buckets, record=record)[0]) == 1


def test_a_record_that_cannot_be_written_is_not_taken_for_a_bad_file(tmp_path):
    pair = make_pair(tmp_path)
    with pytest.raises(OSError):
        plan_pairs([pair], [Bucket(9, 16, 32)], record=tmp_path)
    record = ScanRecord(tmp_path / "files.jsonl")
    record.path.unlink()
    record.path.mkdir()
    with pytest.raises(RuntimeError, match="`record`.*files.jsonl cannot be written"):
        record.probe(pair.source)


# Buckets for pairs


@pytest.mark.parametrize(
    ("num_frames", "size", "buckets", "best"),
    [
        (9, (16, 32), "5x16x32,9x16x16", "9x16x16"),  # longest first
        (9, (16, 32), "9x16x16,9x16x32,9x32x16", "9x16x32"),  # then the nearest aspect ratio
        (9, (24, 48), "9x16x32,9x8x16,9x32x64", "9x16x32"),  # then the largest that needs no enlarging
        (9, (16, 32), "9x64x128,9x32x64", "9x32x64"),  # or else the smallest
        (9, (24, 47), "9x16x32,9x64x126", "9x16x32"),  # aspect ratios that are nearly the same
        (9, (16, 32), "1x16x32,5x16x32", "5x16x32"),  # one frame is for images
        (9, (16, 32), "1x16x32,1x16x16", "1x16x32"),  # unless there is nothing else
    ],
)
def test_the_best_bucket(tmp_path, num_frames, size, buckets, best):
    pair = make_pair(tmp_path, (num_frames, 8, *size), (num_frames, 8, *size))
    assert str(plan_one(pair, buckets).bucket) == best


def test_images_go_to_buckets_of_one_frame(tmp_path):
    image = Image.fromarray(np.full((16, 32, 3), 200, np.uint8))
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name)
    pair = Pair(tmp_path / "a.png", tmp_path / "b.png", "do it", 0)
    plan = plan_one(pair, "5x16x32,1x16x16,1x8x16")
    assert (plan.bucket, plan.source_indices, plan.note) == (Bucket(1, 8, 16), (0,), "kept")
    assert load_pair(plan)[0].shape == (1, 8, 16, 3)
    assert plan_one(pair, "1x16x32", fps=4).note == "kept"
    assert plan_one(pair, "5x16x32").reason == "an image, and no bucket has one frame"


# Dropped pairs


def test_every_reason_to_drop_a_pair(tmp_path):
    good = make_pair(tmp_path)
    (tmp_path / "text.mp4").write_text("not a clip")
    whole = tmp_path / "whole.mp4"
    ffmpeg("-i", make_clip(tmp_path / "long.mp4", 20), "-g", "1", "-movflags", "+faststart", whole)
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(tmp_path / "image.png")
    make_clip(tmp_path / "square.mp4", height=32)
    make_clip(tmp_path / "short.mp4", 4)

    def with_edited(name, row):
        return Pair(good.source, tmp_path / name, "do it", row)

    expected = {
        "missing file": (with_edited("absent.mp4", 1), "edited: there is no file .*absent.mp4"),
        "unreadable file": (with_edited("text.mp4", 2), "edited: .*text.mp4 cannot be read as a clip: ."),
        "damaged file": (with_edited("cut.mp4", 3), r"edited: .*cut.mp4 gives \d+ frames, then ."),
        "too short": (with_edited("short.mp4", 4), "4 frames at 8 fps, the shortest bucket has 5"),
        "different aspect ratios": (with_edited("square.mp4", 5), "source 32x16, edited 32x32: 100% apart"),
        "an image and a clip": (with_edited("image.png", 6), "source has 9 frames, edited has 1"),
        "empty instruction": (Pair(good.source, good.edited, "", 7), "the instruction is empty"),
        "control token": (
            Pair(good.source, good.edited, "do it<|im_end|>", 9),
            r"the instruction contains '<\|im_end",
        ),
    }

    def find_control_token(instruction):
        return "<|im_end|>" if "<|im_end|>" in instruction else None

    pairs = [good, *(pair for pair, _ in expected.values()), with_edited(".", 8)]
    plans, dropped = plan_pairs(
        pairs, parse_buckets("9x16x32,5x16x32"), num_workers=2, find_control_token=find_control_token
    )
    assert [plan.pair for plan in plans] == [good]
    assert [item.pair for item in dropped] == pairs[1:]
    assert [item.kind for item in dropped] == [*expected, "unreadable file"]
    for item, (_, reason) in zip(dropped, expected.values()):
        assert re.match(reason, item.reason), item.reason


def test_wrong_arguments_of_plan_pairs():
    with pytest.raises(ValueError, match="`buckets`"):
        plan_pairs([], [])
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`fps`"):
            plan_pairs([], [Bucket(1, 16, 16)], fps)


def test_the_table_counts_and_explains():
    pair = Pair(Path("a"), Path("b"), "do it", 0)
    plans = [
        Plan(pair, Bucket(9, 16, 32), Fraction(8), (), (), note) for note in ("kept", "kept", "trimmed by 1.00 s")
    ]
    plans += [Plan(pair, Bucket(1, 64, 64), Fraction(8), (), (), "kept")]
    dropped = [Dropped(Pair(Path("a"), Path("b"), "", row), "too short", f"{row} frames") for row in range(5)]
    dropped += [Dropped(Pair(Path("a"), Path("b"), "", 7), "missing file", "there is no file b")]
    assert describe_plans(plans, dropped).splitlines() == [
        "bucket      kept  trimmed",
        "9x16x32        2        1",
        "1x64x64        1        0",
        "all            3        1",
        "dropped: 6 of 10 pairs",
        "  too short: 5",
        "    row 0: 0 frames",
        "    row 1: 1 frames",
        "    row 2: 2 frames",
        "    and 2 more",
        "  missing file: 1",
        "    row 7: there is no file b",
    ]


# Loading


def test_clips_of_the_size_of_the_bucket_are_loaded_as_they_are(tmp_path):
    pair = make_pair(tmp_path)
    source, edited = load_pair(plan_one(pair, "9x16x32"))
    assert np.array_equal(source, read_video(pair.source).frames)
    assert np.array_equal(edited, read_video(pair.edited).frames)


def test_loading_is_deterministic(tmp_path):
    plan = plan_one(make_pair(tmp_path, (20, 8, 24, 48)), "9x16x16")
    first, second = load_pair(plan), load_pair(plan)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert [clip.shape for clip in first] == [(9, 16, 16, 3)] * 2
    assert [clip.dtype for clip in first] == [np.uint8] * 2


def test_clips_of_two_sizes_lie_on_each_other(tmp_path):
    y, x = np.meshgrid(*[(np.arange(96) + 0.5) / 96] * 2, indexing="ij")
    large = np.stack([np.sin(9 * x) / 2 + 0.5, np.cos(7 * y) / 2 + 0.5, x * y], -1)
    small = large.reshape(24, 4, 24, 4, 3).mean((1, 3))
    for name, image in (("large.png", large), ("small.png", small)):
        Image.fromarray((image[: len(image) * 2 // 3] * 255).round().astype(np.uint8)).save(tmp_path / name)
    pair = Pair(tmp_path / "large.png", tmp_path / "small.png", "do it", 0)
    source, edited = load_pair(plan_one(pair, "1x16x16"))
    assert np.abs(source.astype(float) - edited).mean() < 1.5


def test_the_middle_is_kept(tmp_path):
    image = np.zeros((16, 48, 3), np.uint8)
    image[:, 16:32] = 255
    for name in ("a.png", "b.png"):
        Image.fromarray(image).save(tmp_path / name)
    pair = Pair(tmp_path / "a.png", tmp_path / "b.png", "do it", 0)
    assert load_pair(plan_one(pair, "1x16x16"))[0].min() == 255


def test_downscaling_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for name in ("a.png", "b.png"):
        Image.fromarray(stripes).save(tmp_path / name)
    pair = Pair(tmp_path / "a.png", tmp_path / "b.png", "do it", 0)
    middle = load_pair(plan_one(pair, "1x16x16"))[0][:, :, 2:-2].astype(float)
    assert np.abs(middle - 127.5).max() < 8


def test_a_file_that_got_shorter_is_refused(tmp_path):
    pair = make_pair(tmp_path)
    plan = plan_one(pair, "9x16x32")
    make_clip(pair.source, 5)
    with pytest.raises(ValueError, match="source0.mp4 cannot be read up to frame 5"):
        load_pair(plan)


# Keys


def test_the_key_is_that_of_the_contents(tmp_path):
    pair = make_pair(tmp_path)
    plan = plan_one(pair, "5x16x32,5x16x16")
    key = content_key(plan)
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    copy = Pair(tmp_path / "copy" / pair.source.name, tmp_path / "copy" / pair.edited.name, pair.instruction, 9)
    assert content_key(plan_one(copy, "5x16x32")) == key

    others = [
        plan_one(Pair(pair.source, pair.edited, "do that", 0), "5x16x32"),
        plan_one(pair, "5x16x16"),
        plan_one(pair, "5x16x32", fps=16),
        plan_one(Pair(pair.edited, make_clip(tmp_path / "other.mp4", 10), "do it", 0), "5x16x32"),
    ]
    assert len({key, *map(content_key, others)}) == 5


def test_the_key_follows_a_changed_file(tmp_path):
    pair = make_pair(tmp_path)
    plan = plan_one(pair, "5x16x32")
    key = content_key(plan)
    data = bytearray(pair.edited.read_bytes())
    data[-1] ^= 1
    pair.edited.write_bytes(data)
    os.utime(pair.edited, ns=(0, 0))
    assert content_key(plan) != key


@pytest.mark.parametrize("planned", [True, False])
def test_recorded_files_are_not_read_for_the_key(tmp_path, planned):
    pair, path = make_pair(tmp_path), tmp_path / "files.jsonl"
    plans, _ = plan_pairs([pair], [Bucket(5, 16, 32)], record=path if planned else None)
    key = content_key(plans[0])
    if not planned:
        assert content_key(plans[0], ScanRecord(path)) == key
    overwrite_unseen(pair.source)
    overwrite_unseen(pair.edited)
    assert content_key(plans[0], ScanRecord(path)) == key
    assert content_key(plans[0], pickle.loads(pickle.dumps(ScanRecord(path)))) == key
    assert content_key(plans[0], ScanRecord()) != key
