"""The benchmark runner: what it records, goes on with, refuses and reports."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from components import build_pipeline, build_vae, make_clip


SCRIPT = Path(__file__).parents[1] / "examples" / "evaluate.py"
sys.path.insert(0, str(SCRIPT.parent))

import evaluate  # noqa: E402

from rvedit_diffusers import RVEDiTPipeline  # noqa: E402
from rvedit_diffusers.evaluation import (  # noqa: E402
    Level,
    PipelineEditor,
    ScoreRecord,
    SingleEdits,
    Task,
    configs_hash,
    format_table,
    model_name,
    pending_rounds,
    reconstruct,
    score_rounds,
    summarize,
    values_of,
    weights_hash,
)
from rvedit_diffusers.evaluation.report import resampled_means  # noqa: E402
from rvedit_diffusers.synthetic import (  # noqa: E402
    TEST_PHOTOS,
    TRAIN_PHOTOS,
    BenchmarkItems,
    SyntheticEdits,
)
from rvedit_diffusers.training.sampler import generator  # noqa: E402


SMALL = {"num_frames": 5, "height": 32, "width": 32}
SIZE = tuple(f"--{name}={value}" for name, value in SMALL.items())
LEVELS = ("--levels=L0,L2", "--num_samples=3", "--batch_size=4", *SIZE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run" / "pipeline"
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    """Runs the script; gives what it printed."""

    def run(*options):
        evaluate.main(["--device=cpu", *map(str, options)])
        return capsys.readouterr().out

    yield run
    PartialState._reset_state()


def results(folder):
    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, model):
    """A folder of scores of the tiny pipeline on L0 and L2."""
    folder = tmp_path_factory.mktemp("scores")
    evaluate.main(["--device=cpu", f"--model={model}", f"--output={folder}", *LEVELS])
    PartialState._reset_state()
    return folder


@pytest.fixture
def copied(scored, tmp_path):
    return Path(shutil.copytree(scored, tmp_path / "scores"))


# Editors


def test_the_last_frame_is_repeated_for_the_autoencoder():
    vae, clip = build_vae(), make_clip(5)
    clip[4] = clip[3]
    (whole,), (part,) = reconstruct(vae, [clip]), reconstruct(vae, [clip[:4]])
    assert part.shape == (4, 32, 32, 3) and part.dtype == np.uint8
    np.testing.assert_array_equal(part, whole[:4])


def test_a_batch_is_reconstructed_as_its_clips_are():
    vae, clips = build_vae(), [make_clip(seed=seed) for seed in range(2)]
    for one, other in zip(reconstruct(vae, clips), [reconstruct(vae, [clip])[0] for clip in clips], strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_a_size_that_the_autoencoder_does_not_take_is_refused():
    with pytest.raises(ValueError, match="`clips`.*divisible by 8.*36 x 32"):
        reconstruct(build_vae(), [make_clip(5, 36, 32)])


def test_an_edit_depends_on_its_name_and_not_on_its_batch(shared_pipe):
    editor = PipelineEditor(shared_pipe, num_inference_steps=2)
    tasks = [Task(name, make_clip(seed=number), "make it red") for number, name in enumerate("ab")]
    batch = editor(tasks)
    for task, edited in zip(tasks, batch, strict=True):
        (alone,) = editor([task])
        assert edited.shape == task.source.shape and edited.dtype == np.uint8
        assert np.abs(edited.astype(int) - alone).max() <= 1
    (other,) = editor([replace(tasks[0], id="c")])
    assert np.abs(other.astype(int) - batch[0]).max() > 1


def test_an_edit_at_another_size_comes_back_at_the_sources(shared_pipe):
    editor = PipelineEditor(shared_pipe, num_inference_steps=1, height=32, width=32)
    clip = make_clip(5, 40, 50)
    (edited,) = editor([Task("a", clip, "make it red", fps=12.0)])
    assert edited.shape == (5, 40, 50, 3)
    options = {"num_inference_steps": 1, "height": 32, "width": 32, "keep_size": True, "fps": 12.0}
    expected = shared_pipe(clip, "make it red", generator=generator("evaluation", "a"), **options).frames[0]
    np.testing.assert_allclose(edited / 255, expected, atol=0.01)


def test_the_hash_is_that_of_the_weights():
    one, other = build_vae(), build_vae()
    other.load_state_dict(one.state_dict())
    assert weights_hash({"vae": one}) == weights_hash({"vae": other})
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert weights_hash({"vae": one}) != weights_hash({"vae": other})


def test_folders_of_models_are_named_without_what_is_above_them(tmp_path):
    folder = tmp_path / "run" / "pipeline"
    folder.mkdir(parents=True)
    assert model_name(str(folder)) == "run/pipeline" and model_name("me/model") == "me/model"


# The record


def test_cut_lines_are_passed_over_and_later_ones_count(tmp_path):
    record = ScoreRecord(tmp_path)
    record.append([{"id": "a", "value": 1}, {"id": "b", "value": float("nan")}])
    path = tmp_path / "scores-0.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    ScoreRecord(tmp_path, rank=3).append([{"id": "c", "value": float("inf")}])
    record.append([{"id": "a", "value": 2}])
    assert record.entries() == {"a": {"id": "a", "value": 2}, "c": {"id": "c", "value": None}}


def test_what_another_process_scores_later_counts(tmp_path):
    first, second = ScoreRecord(tmp_path), ScoreRecord(tmp_path, rank=1)
    second.append([{"id": "a", "value": 1}])
    first.append([{"id": "a", "value": 2}])
    assert first.entries() == {"a": {"id": "a", "value": 2}}


def test_other_settings_are_named(tmp_path):
    record = ScoreRecord(tmp_path)
    record.check({"seed": 1})
    record.begin({"seed": 1, "model": "a"})
    record.begin({"seed": 1, "model": "a"})
    with pytest.raises(ValueError, match="begun with seed 1, but now it is 2"):
        record.check({"seed": 2})


def test_batches_do_not_depend_on_what_is_scored():
    suites = [Level(BenchmarkItems("L1", 0)), SingleEdits(SyntheticEdits(0, operations=("grade",)))]
    rounds = pending_rounds(suites, 5, 4, {})
    assert [(suite.name, list(span)) for suite, span in rounds] == [
        ("L1", [0, 1]),
        ("L1", [2, 3]),
        ("L1", [4]),
        ("grade", [0, 1, 2, 3]),
        ("grade", [4]),
    ]
    entries = {suites[0].id(index): {"twin": None} for index in (0, 1, 2)} | {suites[1].id(4): {}}
    assert pending_rounds(suites, 5, 4, entries) == rounds[1:4]
    without = {name: {} for name in entries}  # scored without twins, which are wanted now
    assert pending_rounds(suites, 5, 4, without) == rounds[:4]


# The report


def entry(success, kinds=("recolour",), verdicts=("success",), twin=None, **scores):
    ops = {f"op_{number}": verdict for number, verdict in enumerate(verdicts, 1)}
    scores = {"union_success": float(success), "preserved_psnr": 20.0 if success else None} | scores | ops
    return {"kinds": list(kinds), "scores": scores, "twin": None if twin is None else {"union_success": float(twin)}}


def test_intervals_are_the_same_in_every_run_and_hold_the_mean():
    values = np.random.default_rng(0).normal(10, 2, 400)
    means = resampled_means(values, "L1 psnr")
    np.testing.assert_array_equal(means, resampled_means(values, "L1 psnr"))
    assert not np.array_equal(means, resampled_means(values, "L2 psnr"))
    low, high = np.percentile(means, (2.5, 97.5))
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)


def test_twins_count_for_consistency_alone():
    row = summarize({"L1": [entry(1, twin=1), entry(1, twin=0), entry(0, twin=1), entry(1)]})["L1"]
    assert row["union_success"] == 0.75 and row["n"] == 4
    assert row["twin_consistency"] == pytest.approx(1 / 3) and row["n_pairs"] == 3
    assert row["union_success_low"] <= 0.75 <= row["union_success_high"]


def test_none_of_few_leaves_more_open_than_none_of_many():
    """0 of `n` has the upper bound at which that happens once in 40; all of `n` is its mirror image."""
    for n in (4, 100):
        none, every = (summarize({"L1": [entry(value)] * n})["L1"] for value in (0, 1))
        assert none["union_success_low"] == 0 and (1 - none["union_success_high"]) ** n == pytest.approx(0.025)
        assert every["union_success_high"] == 1 and every["union_success_low"] ** n == pytest.approx(0.025)
    levels = summarize({level: [entry(0)] * 4 for level in ("L2", "L3", "L4", "L5", "L6")})
    assert (1 - levels["mean_L2_L6"]["union_success_high"]) ** 20 == pytest.approx(0.025)
    assert levels["mean_L2_L6"]["union_success_low"] == 0


def test_a_level_without_a_success_leaves_the_mean_open():
    """That none of 4 succeeded is not certain to go on: of 4000 it nearly is."""
    widths = []
    for n in (4, 4000):
        groups = {level: [entry(level != "L6")] * n for level in ("L2", "L3", "L4", "L5", "L6")}
        row = summarize(groups)["mean_L2_L6"]
        assert row["union_success"] == pytest.approx(0.8)
        assert row["union_success_low"] < 0.8
        widths.append(row["union_success_high"] - row["union_success_low"])
    assert widths[0] > 0.1 > 0.001 > widths[1] > 0


def test_what_has_no_value_is_null():
    row = summarize({"L0": [entry(0), entry(0)]})["L0"]
    assert row["twin_consistency"] is None and row["twin_consistency_low"] is None and row["n_pairs"] == 0
    assert row["preserved_psnr"] is None
    row = summarize({"L0": [entry(1), entry(0)]})["L0"]
    assert row["preserved_psnr"] == row["preserved_psnr_low"] == 20


def test_clips_may_lack_a_figure():
    values = values_of([{"a": 1.0, "op_1": "success"}, {"a": None, "b": 2.0}])
    assert {name: each.tolist() for name, each in values.items()} == {"a": [1.0], "b": [2.0]}


def test_failures_are_counted_by_label_and_successes_by_kind():
    kinds = ("recolour", "move")
    rows = summarize(
        {
            "L3": [
                entry(1, kinds, ("success", "success")),
                entry(0, kinds, ("wrong object: 2", "success")),
                entry(0, kinds[::-1], ("wrong value: red", "wrong object: 1")),
            ]
        }
    )
    assert rows["L3"]["failures"] == {"wrong object": 2, "wrong value": 1}
    assert rows["L3"]["op_success_by_kind"] == {"recolour": {"success": 1, "n": 3}, "move": {"success": 2, "n": 3}}


def test_the_mean_counts_each_level_the_same():
    groups = {f"L{number}": [entry(number == 2)] * number for number in range(2, 7)}
    rows = summarize(groups | {"L1": [entry(1)]})
    assert rows["mean_L2_L6"]["union_success"] == pytest.approx(0.2) and rows["mean_L2_L6"]["n"] == 20
    assert "preserved_psnr" not in rows["mean_L2_L6"]  # L3 has no value
    assert "mean_L2_L6" not in summarize({name: groups[name] for name in ("L2", "L3")})


def test_the_table_has_a_column_for_each_figure():
    rows = {"L1": {"a": 0.5, "a_low": 0.25, "a_high": 1.0, "n": 4}, "L10": {"a": None}}
    columns = {"a": ("success []", 2), "n": ("n", 0)}
    assert format_table(rows, columns).splitlines() == [
        "               success  n",
        "L1   0.50 [0.25, 1.00]  4",
        "L10           - [-, -]  -",
    ]


# The script


def test_scores_of_levels(scored):
    found = results(scored)
    assert found["settings"].items() >= {"model": "run/pipeline", "seed": 0, "num_inference_steps": 2}.items()
    assert found["settings"].items() >= {"guidance_scale": 3.0, "split": "test"}.items()
    assert found["settings"]["version"] == version("rvedit_diffusers")
    assert list(found["levels"]) == ["L0", "L2"]
    for row in found["levels"].values():
        assert row["n"] == 3 and sum(kind["n"] for kind in row["op_success_by_kind"].values()) == 3
        for name in ("union_success", "op_success", "outside_psnr", "vae_psnr", "inside_psnr", "edit_iou", "flicker"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
    assert found["levels"]["L2"]["n_pairs"] == 3
    assert {path.name for path in scored.glob("*.png")} == {"L0.png", "L2.png"}
    assert len(list((scored / "clips").glob("*.mp4"))) == 6


def test_a_table_is_printed(run, copied, model):
    lines = run(f"--model={model}", f"--output={copied}", *LEVELS).splitlines()
    assert lines[0].split()[:2] == ["union", "success"] and [line.split()[0] for line in lines[1:3]] == ["L0", "L2"]


def test_what_is_scored_is_not_scored_again(run, copied, model, monkeypatch):
    def refuse(*_):
        raise AssertionError("edited again")

    monkeypatch.setattr(PipelineEditor, "__call__", refuse)
    before = (copied / "scores-0.jsonl").read_bytes()
    run(f"--model={model}", f"--output={copied}", *LEVELS, "--num_samples=2")
    assert (copied / "scores-0.jsonl").read_bytes() == before
    assert [row["n"] for row in results(copied)["levels"].values()] == [2, 2]


@pytest.mark.parametrize("share", [0.4, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.0, 0.8))])
def test_killed_at_any_moment_it_goes_on_to_the_same_end(run, copied, scored, model, share):
    path = copied / "scores-0.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[: round(len(text) * share)])
    run(f"--model={model}", f"--output={copied}", *LEVELS)
    assert results(copied) == results(scored)


def test_two_processes_with_workers_score_what_one_does(scored, model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    options = ["--device=cpu", f"--model={model}", f"--output={tmp_path}", *LEVELS, "--num_workers=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-9000:]
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"scores-0.jsonl", "scores-1.jsonl"}
    assert results(tmp_path) == results(scored)


@pytest.mark.parametrize(
    "options, name",
    [
        (("--seed=7",), "seed 0, but now it is 7"),
        (("--num_inference_steps=1",), "num_inference_steps 2, but now it is 1"),
        (("--num_frames=6",), "num_frames 5, but now it is 6"),
        (("--model=copy-source",), "model 'run/pipeline'"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(run, copied, model, capsys, options, name):
    before = (copied / "scores-0.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        run(f"--model={model}", f"--output={copied}", *LEVELS, *options)
    assert name in capsys.readouterr().err and (copied / "scores-0.jsonl").read_bytes() == before


def test_items_of_some_kinds_are_not_taken_for_all(run, model, tmp_path, capsys):
    options = (f"--model={model}", f"--output={tmp_path / 'scores'}", "--levels=L1", "--num_samples=1", *SIZE)
    run(*options, "--kinds", "remove")
    with pytest.raises(SystemExit):
        run(*options)
    assert "begun with kinds ['remove']" in capsys.readouterr().err


def test_another_processor_is_another_configuration():
    pipe = build_pipeline()
    before = configs_hash(pipe)
    pipe.processor.max_frames -= 1
    assert configs_hash(pipe) != before
    assert configs_hash(build_pipeline()) == before


def test_other_weights_under_the_same_name_are_refused(run, copied, model, tmp_path, capsys):
    pipe = build_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 1
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    with pytest.raises(SystemExit):
        run(f"--model={tmp_path / 'run' / 'pipeline'}", f"--output={copied}", *LEVELS)
    assert "begun with weights" in capsys.readouterr().err


def test_another_configuration_of_the_same_weights_is_refused(run, copied, tmp_path, capsys):
    pipe = build_pipeline()
    pipe.register_modules(scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config, shift=7.0))
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    with pytest.raises(SystemExit):
        run(f"--model={tmp_path / 'run' / 'pipeline'}", f"--output={copied}", *LEVELS)
    assert "begun with configs" in capsys.readouterr().err


def test_a_full_gpu_is_told_with_what_helps(run, model, tmp_path, monkeypatch, capsys):
    def fill(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate.PipelineEditor, "__call__", fill)
    with pytest.raises(SystemExit):
        run(f"--model={model}", f"--output={tmp_path / 'new'}", *LEVELS)
    assert "CUDA out of memory; --offload" in capsys.readouterr().err


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloaded_parts_score_the_same(run, copied, model, tmp_path, offload):
    run(f"--model={model}", f"--output={tmp_path / 'new'}", *LEVELS, f"--offload={offload}")
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "new", copied))
    assert found["settings"] == expected["settings"] and list(found["levels"]) == list(expected["levels"])
    for name, row in found["levels"].items():
        for key, value in row.items():
            wanted = expected["levels"][name][key]
            if offload == "group" and isinstance(value, float):
                wanted = pytest.approx(wanted, rel=1e-3)  # copied weights may lie where a CPU sums in another order
            assert value == wanted, (name, key)


@pytest.fixture(scope="module")
def guard_rows(tmp_path_factory):
    """Results of the guard rows, with the embedded checkpoint's autoencoder."""
    found = {}
    for name in evaluate.GUARD_ROWS:
        folder = tmp_path_factory.mktemp(name)
        options = ["--levels=L1,L2", "--num_samples=10"]
        evaluate.main(["--device=cpu", f"--model={name}", f"--output={folder}", *options])
        found[name] = results(folder)
    PartialState._reset_state()
    return found


def test_a_copy_of_the_source_never_succeeds(guard_rows):
    for row in guard_rows["copy-source"]["levels"].values():
        assert row["union_success"] == row["op_success"] == row["twin_consistency"] == 0
        assert set(row["failures"]) == {"no edit"} and row["preserved_psnr"] is None


@pytest.mark.parametrize("suite", [Level(BenchmarkItems("L2", 3, **SMALL)), SingleEdits(SyntheticEdits(3, **SMALL))])
def test_every_edit_gets_its_own_clip_and_instruction(suite, tmp_path):
    record, seen = ScoreRecord(tmp_path), []

    def edit(tasks):
        seen.extend(tasks)
        return [task.target for task in tasks]

    for _ in score_rounds(edit, build_vae(), pending_rounds([suite], 3, 4, {}), record):
        pass
    wanted = [item for index in range(3) for item in suite.draw(index)]
    assert [task.instruction for task in seen] == [item.instruction for item in wanted]
    for task, item in zip(seen, wanted, strict=True):
        assert np.array_equal(task.source, item.source_frames) and np.array_equal(task.target, item.target_frames)
    for entry in record.entries().values():
        assert entry["scores"]["op_success"] == 1 and (not suite.twins or entry["twin"]["op_success"] == 1)


def test_the_autoencoded_target_is_its_own_ceiling(guard_rows):
    assert guard_rows["vae-ceiling"]["settings"]["vae"] == "checkpoints/tiny"
    for row in guard_rows["vae-ceiling"]["levels"].values():
        assert row["op_success"] >= 0.75 and row["union_success"] >= 0.75
        assert row["outside_psnr"] == row["vae_psnr"] and row["outside_ssim"] == row["vae_ssim"]


def test_twins_can_be_left_out_and_added_later(run, model, tmp_path):
    options = (f"--model={model}", f"--output={tmp_path}", "--levels=L1", "--num_samples=2", *SIZE)
    run(*options, "--no_twins")
    without = results(tmp_path)["levels"]["L1"]
    assert "twin_consistency" not in without and "n_pairs" not in without
    run(*options)
    assert results(tmp_path)["levels"]["L1"]["n_pairs"] == 2


def test_single_edits_are_scored_by_operation(run, model, tmp_path):
    options = ("--operations", "outline", "grade", "--num_samples=2", *SIZE)
    run(f"--model={model}", f"--output={tmp_path / 'seen'}", *options)
    found = results(tmp_path / "seen")
    assert found["settings"]["split"] == "train" and list(found["levels"]) == ["outline", "grade"]
    for name, row in found["levels"].items():
        assert row["op_success_by_kind"][name]["n"] == row["n"] == 2 and "twin_consistency" not in row
        assert sum(row["failures"].values()) == 2 - row["op_success_by_kind"][name]["success"]
        assert {"union_success", "outside_psnr", "vae_psnr"} <= row.keys()
    run(f"--model={model}", f"--output={tmp_path / 'unseen'}", *options, "--unseen_photos")
    assert results(tmp_path / "unseen")["settings"]["split"] == "test"


def test_items_are_drawn_as_the_options_say():
    def suites(*options):
        args = evaluate.build_parser().parse_args([*options, "--output=none", *SIZE])
        return evaluate.synthetic_suites(args)

    for option, photos in (((), TRAIN_PHOTOS), (("--unseen_photos",), TEST_PHOTOS)):
        assert suites("--operations", "grade", *option)[0].edits.scene_arguments["photos"] == photos
    (level,) = suites("--levels=L1", "--kinds", "remove", "grade")
    assert {operation.kind for index in range(6) for operation in level.draw(index)[0].operations} == {"remove"}


def test_options_of_the_edit_reach_the_pipeline(run, model, tmp_path, monkeypatch):
    calls, call = [], RVEDiTPipeline.__call__
    monkeypatch.setattr(RVEDiTPipeline, "__call__", lambda *a, **k: calls.append(k) or call(*a, **k))
    options = ("--num_inference_steps=1", "--guidance_scale=1.5", "--levels=L1", "--num_samples=1", *SIZE)
    run(f"--model={model}", f"--output={tmp_path}", *options)
    assert {(call["num_inference_steps"], call["guidance_scale"]) for call in calls} == {(1, 1.5)}


def test_lora_weights_are_added(run, model, tmp_path):
    from peft import LoraConfig

    pipe = build_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "run" / "lora", pipe.transformer)
    options = (f"--model={model}", "--operations", "grade", "--num_samples=1", *SIZE)
    run(*options, f"--output={tmp_path / 'plain'}")
    run(*options, f"--output={tmp_path / 'with'}", f"--lora={tmp_path / 'run' / 'lora'}")
    plain, other = results(tmp_path / "plain"), results(tmp_path / "with")
    assert other["settings"]["lora"] == "run/lora" and other["settings"]["weights"] != plain["settings"]["weights"]
    assert other["levels"]["grade"]["outside_psnr"] != plain["levels"]["grade"]["outside_psnr"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--levels=L1,L9"], "--levels: 'L1,L9'"),
        (["--levels=L1,L1"], "--levels"),
        (["--levels=L1", "--operations", "grade"], "--operations: not allowed with argument --levels"),
        (["--num_samples=0"], "--num_samples: '0'"),
        (["--batch_size=-1"], "--batch_size: '-1'"),
        (["--seed=-1"], "--seed: '-1'"),
        (["--guidance_scale=nan"], "--guidance_scale: 'nan'"),
        (["--height=40"], "--height 40 --width 64: both have to be divisible by 16"),
        (["--height=16"], "`height` and `width` at least 32"),
        (["--num_frames=1"], "`num_frames` has to be at least 2"),
        (["--model=nowhere"], "--model nowhere: there is no such file or folder"),
        (["--model=empty"], "--model empty: is not a pipeline"),
        (["--lora=nowhere"], "--lora nowhere"),
        (["--vae=me/vae"], "--vae is for --model copy-source and vae-ceiling"),
        (["--model=copy-source", "--num_inference_steps=3"], "--num_inference_steps is for pipelines"),
        (["--model=copy-source", "--offload=model"], "--offload is for pipelines"),
        (["--unseen_photos"], "--unseen_photos is for --operations"),
        (["--kinds", "remove", "--operations", "remove"], "--kinds is for levels"),
        (["--kinds", "remove", "--levels=L4"], "L4 has none of ('remove',)"),
        (["--kinds", "remove", "--benchmark=five", "--data=empty"], "--kinds is not for --benchmark five"),
        (["--limit=3"], "--limit is not for --benchmark synthetic"),
        (["--data=empty"], "--data is not for --benchmark synthetic"),
        (["--benchmark=five"], "--data: the folder of the benchmark five is missing"),
        (["--benchmark=five", "--data=empty", "--num_frames=1"], "--num_frames has to be at least 2"),
        (["--benchmark=five", "--data=empty", "--levels=L1"], "--levels is not for --benchmark five"),
        (["--benchmark=five", "--data=empty"], "there is no file empty/edit_prompt/edit1_FiVE.json"),
        (["--benchmark=five", "--data=empty", "--model=vae-ceiling"], "--model vae-ceiling needs true edits"),
        (["--benchmark=five", "--data=empty", "--seed=3"], "--seed is not for --benchmark five"),
        (["--benchmark=five", "--data=empty", "--batch_size=2"], "--batch_size is not for --benchmark five"),
        (
            ["--benchmark=five", "--data=empty", "--model=copy-source", "--height=32"],
            "--height: --model copy-source gives back the clips of five as they are",
        ),
        (["--no_twins", "--operations", "remove"], "--no_twins is for levels"),
        (["--benchmark=ivebench", "--data=.", "--output=out"], "--output out: has to lie outside of --data ."),
        (["--device=nodevice"], "--device nodevice"),
        (["--output=file"], "--output file: is not a folder"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "load_editor", None)
    with pytest.raises(SystemExit) as ended:
        run("--output=new", *options)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}
