"""Grids of variants: what is run, gone on with and refused, and what the report says."""

import fcntl
import json
import math
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from components import build_pipeline


SCRIPT = Path(__file__).parents[1] / "examples" / "ablation.py"
sys.path.insert(0, str(SCRIPT.parent))

import ablation  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402

from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline, RVEDiTTransformer3DModel  # noqa: E402
from rvedit_diffusers.evaluation import ablation_grid  # noqa: E402
from rvedit_diffusers.evaluation.ablation import (  # noqa: E402
    Ablation,
    Estimate,
    claim_sentence,
    estimate,
    read_outcome,
    verdict,
    with_interval,
)
from rvedit_diffusers.evaluation.ablation_grid import plan_runs, plan_start  # noqa: E402
from rvedit_diffusers.evaluation.ablation_report import tables, write_report  # noqa: E402
from rvedit_diffusers.training.options import as_arguments  # noqa: E402
from rvedit_diffusers.training.sampler import derive_seed  # noqa: E402
from rvedit_diffusers.training.variants import (  # noqa: E402
    build_variant,
    match_parameters,
    num_parameters,
    take_over_weights,
)


LEVELS = ["L2", "L3", "L4", "L5", "L6"]
STREAMS = ["edit", "text", "visual"]
UNIFORM = {"shallow_tokens": STREAMS, "deep_tokens": STREAMS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build_pipeline(num_layers=2, ffn_dim=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grid(base):
    return {
        "base": str(base),
        "transformer": {},
        "train": {
            "levels": ["L2", "L3"],
            "buckets": "5x32x32",
            "num_pairs": 4,
            "num_validation_pairs": 2,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "checkpointing_steps": 1,
            "validation_steps": 2,
            "logging_steps": 1,
            "num_workers": 0,
            "lr_warmup_steps": 1,
            "align_weight": 0.0,
            "mixed_precision": "no",
        },
        "evaluate": {
            "levels": LEVELS,
            "num_samples": 1,
            "no_twins": True,
            "num_frames": 5,
            "height": 32,
            "width": 32,
            "num_inference_steps": 1,
            "guidance_scale": 1.0,
            "device": "cpu",
        },
        "seeds": [0, 1],
        "rows": {
            "uniform": {"says": "all tokens in all blocks", "transformer": UNIFORM},
            "routed": {"says": "routed and aligned", "train": {"align_weight": 0.1, "align_warmup_steps": 1}},
        },
        "baseline": "uniform",
        "claim": ["routed", "uniform"],
    }


@pytest.fixture(autouse=True)
def restored_globals():
    flash = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(flash)


def run(grid, output, *options):
    """Runs the script, which runs its own scripts in this process."""
    config = output.with_name(output.name + ".json")
    config.write_text(json.dumps(grid))
    called = []

    def call(machine, script, options, log, num_threads=1):
        called.append((script, Path(options["output"])))
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.backends.cuda.enable_flash_sdp(True)  # as in a process of its own
        {"train.py": train, "evaluate.py": evaluate}[script].main(as_arguments(options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation.Machine, "call", call)
        patch.setattr(train, "plot_losses", lambda *_: None)  # pictures take half of the time
        patch.setattr(evaluate, "write_strips", lambda *_: None)
        try:
            ablation.main([f"--config={config}", f"--output={output}", *map(str, options)])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    return called


def read_logs(output):
    """What each run has logged and scored, without times."""
    found = {}
    for path in sorted(output.glob("seed-*/*/log.jsonl")):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        entries = [{k: v for k, v in entry.items() if k != "seconds_per_step"} for entry in entries]
        scores = json.loads((path.parent / "scores" / "results.json").read_text())
        found[str(path.parent.relative_to(output))] = (entries, scores)
    return found


@pytest.fixture(scope="module")
def finished(grid, tmp_path_factory):
    """The folder of a finished grid, what was called for it, in order, and its logs."""
    output = tmp_path_factory.mktemp("finished") / "grid"
    called = run(grid, output)
    return output, called, read_logs(output)


# Runs


def test_a_grid_is_run_seed_by_seed_and_the_pairs_are_encoded_once(finished):
    output, called, logs = finished
    folders = [output / f"seed-{seed}" / row for seed in (0, 1) for row in ("uniform", "routed")]
    runs = [
        (script, path)
        for folder in folders
        for script, path in (("train.py", folder), ("evaluate.py", folder / "scores"))
    ]
    assert called == [("train.py", output / "cache"), *runs]
    assert len(logs) == 4
    for entries, scores in logs.values():
        assert [entry["step"] for entry in entries] == [1, 2] and "validation_flow" in entries[1]
        assert list(scores["levels"]) == [*LEVELS, "mean_L2_L6"]


def test_rows_see_the_same_pairs_and_noise_and_seeds_other_ones(finished):
    _, _, logs = finished
    flow = {name: entries[0]["flow"] for name, (entries, _) in logs.items()}
    # the velocity begins as a bias, the same in all rows: the first loss depends on pairs and noise alone
    assert flow["seed-0/uniform"] == pytest.approx(flow["seed-0/routed"], rel=1e-6)
    assert abs(flow["seed-0/uniform"] - flow["seed-1/uniform"]) > 1e-3
    assert "align" in logs["seed-0/routed"][0][0] and "align" not in logs["seed-0/uniform"][0][0]


def test_what_is_not_read_again_is_removed(finished):
    output = finished[0]
    left = {path.name for path in (output / "seed-0" / "routed").iterdir()}
    assert left == {"log.jsonl", "run.json", "scores", "settings.json", "taken.json"}
    assert not (output / "cache").exists() and not list(output.rglob("*.safetensors")) + list(output.rglob("*.mp4"))


def test_the_report_is_of_what_the_runs_logged(finished):
    output, _, logs = finished
    text = (output / "ablation.md").read_text()
    assert (output / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "The claim that `routed` beats `uniform` by >= 5 points on the mean of L2-L6 is not supported" in text
    assert (
        f"python examples/ablation.py --config {output}.json --output {output} --report {output}/ablation.md" in text
    )
    flow = np.mean([logs[f"seed-{seed}/routed"][0][1]["validation_flow"] for seed in (0, 1)])
    assert f"{flow:.4f} [" in text and "torch " + torch.__version__ in text and "Not complete" not in text


def test_all_rows_begin_with_one_training(grid, tmp_path):
    output = tmp_path / "grid"
    start = {"seed": 7, "train": {"drop_instruction": 0.9, "drop_all": 0.1, "max_train_steps": 1}}
    called = run(grid | {"start": start, "seeds": [0]}, output, "--rows", "routed")
    assert called[:2] == [("train.py", output / "start"), ("train.py", output / "cache")] and len(called) == 4
    text = (output / "ablation.md").read_text()
    assert "the first row's transformer, of 1 steps, seed 7, with drop_instruction 0.9, drop_all 0.1, but" in text
    weights = RVEDiTTransformer3DModel.from_pretrained(output / "start" / "pipeline", subfolder="transformer")
    taken, count = json.loads((output / "seed-0" / "routed" / "taken.json").read_text())["transformer"].split(" of ")
    assert taken == count and int(count) < len(list(weights.parameters()))
    run(grid | {"start": start, "seeds": [0]}, output, "--report_only")
    with pytest.raises(SystemExit):
        run(grid | {"start": start | {"seed": 8}, "seeds": [0]}, output)


def test_what_is_finished_is_not_run_again(grid, finished):
    output, _, logs = finished
    for suffix in ("md", "json"):
        (output / f"ablation.{suffix}").unlink()
    assert run(grid, output) == []
    assert (output / "ablation.md").is_file() and read_logs(output) == logs


def test_rows_and_seeds_can_be_chosen_and_a_killed_run_goes_on(grid, finished, tmp_path, capsys):
    save, output = train.save_checkpoint, tmp_path / "grid"

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", stop)
        with pytest.raises(SystemExit) as error:
            run(grid, output, "--rows", "routed", "--seeds", 1)
    assert error.value.code == 1 and "routed, seed 1" in capsys.readouterr().err
    folder = output / "seed-1" / "routed"
    assert [path.name for path in train.checkpoints(folder)] == ["checkpoint-1"]
    seconds = json.loads((folder / "log.jsonl").read_text())["seconds_per_step"]
    called = run(grid, output, "--rows", "routed", "--seeds", 1, "--keep_weights")
    assert called[1:] == [("train.py", folder), ("evaluate.py", folder / "scores")]
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[0])["seconds_per_step"] == seconds
    assert read_logs(output) == {"seed-1/routed": finished[2]["seed-1/routed"]}
    text = (output / "ablation.md").read_text()
    assert "still to be made: 1." in text and "not tested: no seed of both has been run" in text
    assert (folder / "pipeline" / "model_index.json").is_file() and train.checkpoints(folder)


@pytest.mark.parametrize(
    "place, name, value, message",
    [
        ("train", "learning_rate", 0.5, "train.learning_rate: None -> 0.5"),
        ("evaluate", "seed", 3, "evaluate.seed: None -> 3"),
        ("transformer", "num_shallow_blocks", 0, "transformer.num_shallow_blocks: 1 -> 0"),
    ],
)
def test_a_changed_config_is_refused(grid, finished, capsys, place, name, value, message):
    with pytest.raises(SystemExit) as error:
        run(grid | {place: grid[place] | {name: value}}, finished[0])
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and str(finished[0] / "seed-0") in printed


def test_other_weights_of_the_base_are_refused(grid, finished, base, tmp_path, capsys):
    other = shutil.copytree(base, tmp_path / "other")
    (other / "README.md").write_text("what is no weight does not matter")
    run(grid | {"base": str(other)}, finished[0], "--report_only")
    path = next((other / "vae").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(SystemExit):
        run(grid | {"base": str(other)}, finished[0])
    assert "base (hash)" in capsys.readouterr().err


def test_rows_words_and_seeds_may_be_added(grid, finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "grid")
    more = {"uniform": grid["rows"]["uniform"] | {"says": "word for word"}, "routed": grid["rows"]["routed"]}
    more |= {"third": {"says": "another"}}
    run(grid | {"rows": more, "seeds": [0]}, output, "--report_only")
    text = (output / "ablation.md").read_text()
    assert "still to be made: 1." in text and "word for word" in text and "| 0, 1 |" in text


def test_the_file_beside_the_report_stands_for_the_runs(grid, finished, tmp_path, capsys):
    output = tmp_path / "grid"
    (tmp_path / "docs").mkdir()
    page = Path(shutil.copy(finished[0] / "ablation.json", tmp_path / "docs")).with_suffix(".md")
    assert run(grid, output, "--report", page) == []
    figures, first = (
        text[text.index("## Union success") :]
        for text in (page.read_text(), (finished[0] / "ablation.md").read_text())
    )
    assert figures == first
    assert page.with_suffix(".json").read_text() == (finished[0] / "ablation.json").read_text()
    more = grid["rows"] | {"third": {"says": "another"}}
    run(grid | {"rows": more, "seeds": [0]}, output, "--report", page, "--report_only")
    assert "still to be made: 1." in page.read_text()
    with pytest.raises(SystemExit) as error:
        run(grid | {"evaluate": grid["evaluate"] | {"seed": 3}}, output, "--report", page)
    assert error.value.code == 2
    assert (
        f"{page.with_suffix('.json')} was made with other settings: delete it, or name another --report"
        in capsys.readouterr().err
    )
    page.with_suffix(".json").write_text('{"runs": [{}]}')
    with pytest.raises(SystemExit):
        run(grid, output, "--report", page)
    assert "does not hold the runs of an ablation" in capsys.readouterr().err


def test_runs_of_other_items_are_not_compared(grid, finished, tmp_path, monkeypatch, capsys):
    page = Path(shutil.copy(finished[0] / "ablation.json", tmp_path)).with_suffix(".md")
    monkeypatch.setattr(ablation_grid, "DRAWN", ablation_grid.DRAWN + 1)
    with pytest.raises(SystemExit):
        run(grid, tmp_path / "grid", "--report", page)
    assert f"drawn: {ablation_grid.DRAWN - 1} -> {ablation_grid.DRAWN}" in capsys.readouterr().err


def test_runs_of_rows_that_the_config_lacks_stay_in_the_file(grid, finished, tmp_path):
    page = Path(shutil.copy(finished[0] / "ablation.json", tmp_path)).with_suffix(".md")
    rows = {"uniform": grid["rows"]["uniform"], "third": {"says": "another", "train": {"align_weight": 0.5}}}
    run(grid | {"rows": rows, "claim": ["third", "uniform"]}, tmp_path / "grid", "--report", page, "--report_only")
    assert "routed" not in page.read_text()
    names = [entry["row"] for entry in json.loads(page.with_suffix(".json").read_text())["runs"]]
    assert sorted(names) == ["routed", "routed", "uniform", "uniform"]


def test_options_that_a_grid_leaves_out_are_those_of_the_script(grid, tmp_path):
    config = tmp_path / "grid.json"
    few = {name: value for name, value in grid["train"].items() if name not in ("buckets", "max_train_steps")}
    config.write_text(json.dumps(grid | {"train": few}))
    found = ablation.read_grid(config)["train"]
    parsed = train.parse_args(["--model", str(TINY_CHECKPOINT), "--output", str(tmp_path / "out")])
    assert [found["buckets"]] == [str(bucket) for bucket in parsed.buckets]
    assert found["max_train_steps"] == parsed.max_train_steps


def test_a_folder_is_not_run_twice_at_once(grid, finished, capsys):
    with open(finished[0] / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as error:
            run(grid, finished[0])
    assert error.value.code == 2 and "in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": {}}, "`baseline` 'uniform' is no row"),
        ({"seeds": [0, "1"]}, "`seeds` has to hold integers, not '1'"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"steps": 3}, "`steps` is unknown"),
        ({"claim": ["routed"]}, "`claim` has to be two rows"),
        ({"claim": None}, "`claim` has to be a list"),
        ({"claim": ["routed", "other"]}, "`claim` 'other' is no row"),
        ({"base": "nowhere"}, "`base` has to be the folder of a pipeline, but is nowhere"),
        ({"start": {"train": {}}}, "`start` has to hold `seed` and `train`, or be the folder of a pipeline"),
        ({"start": "nowhere"}, "`start` has to be the folder of a pipeline, but is nowhere"),
        ({"transformer": {"num_layer": 3}}, "unknown settings: num_layer"),
        ({"transformer": {"text_dim": 8}}, "`train` has to have train_text_encoder: for text_dim 8"),
        (
            {"transformer": {"attention_head_dim": 16}, "train": {"max_train_steps": 2, "train_distiller": "none"}},
            "`train` has to have train_distiller connectors or all: for width 32",
        ),
        ({"train": {"seed": 3}}, "`train` may not set `seed`"),
        ({"train": {"training_type": "lora"}}, "training_type full"),
        ({"train": {"max_train_steps": 0}}, "--max_train_steps"),
        ({"train": {"max_train_steps": 2, "align_wait": 1}}, "align_wait"),
        ({"evaluate": {"levels": ["L2"]}}, "`evaluate` has to have the levels L3, L4, L5, L6"),
        ({"evaluate": {"levels": LEVELS, "height": 40}}, "--height 40"),
        ({"evaluate": {"levels": LEVELS, "num_frames": 1}}, "`num_frames` has to be at least 2"),
        ({"rows": {"uniform": {}, "routed": {"says": ""}}}, "`rows` 'uniform' has to say what it is"),
        ({"rows": {"uniform": {"says": ""}, "routed": {"says": "", "seed": 1}}}, "`rows` 'routed' has unknown 'seed'"),
        (
            {"rows": {"uniform": {"says": ""}, "routed": {"says": "", "train": {"num_pairs": 8}}}},
            "`rows.routed.train` may not set `num_pairs`",
        ),
        (
            {"rows": {"uniform": {"says": ""}, "routed": {"says": "", "train": {"kinds": ["move"]}}}},
            "`rows.routed.train` may not set `kinds`",
        ),
        (
            {"rows": {"uniform": {"says": ""}, "routed": {"says": "", "transformer": {"ffn_dim": 8}}}},
            "`rows.routed.transformer` may not set `ffn_dim`",
        ),
        (
            {"rows": {"uniform": {"says": ""}, "routed": {"says": "", "transformer": {"num_layers": 9}}}},
            "`rows` 'routed': `config` has",
        ),
        ({"rows": {"uniform": {"says": ""}, "routed": {"says": ""}, "../a": {"says": ""}}}, "no name of a folder"),
        ({"rows": {"uniform": {"says": ""}, "routed": {"says": ""}}}, "`rows` 'routed' is the same as 'uniform'"),
    ],
)
def test_wrong_configs_are_refused_before_anything_is_run(grid, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as error:
        run(grid | change, tmp_path / "grid")
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_rows_that_are_not_there_are_refused(grid, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(grid, tmp_path / "grid", "--rows", "other")
    assert "--rows other: is none of uniform, routed" in capsys.readouterr().err


@pytest.mark.parametrize("config", sorted(SCRIPT.parent.glob("ablation*.json")), ids=lambda path: path.stem)
def test_the_grids_are_sound(tmp_path, monkeypatch, config):
    monkeypatch.chdir(SCRIPT.parents[1])
    args = ablation.parse_args([f"--config={config}", f"--output={tmp_path / 'out'}"])
    grid = args.grid
    grid["base"] = str(TINY_CHECKPOINT)  # in the place of what `make tiny` makes first
    runs = plan_runs(grid, tmp_path, grid["seeds"])
    ablation.check_options(args, [plan_start(grid, tmp_path, runs[0]), *runs])
    counts = [num_parameters(run.settings["transformer"]) for run in runs]
    assert max(abs(count / counts[0] - 1) for count in counts) < 0.01
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


# The scripts are processes


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "SCRIPTS", tmp_path)
    (tmp_path / "good.py").write_text("import os, sys; print(os.environ['OMP_NUM_THREADS'], *sys.argv[1:])")
    (tmp_path / "bad.py").write_text("print('first'); print('what is wrong'); raise SystemExit(3)")
    (tmp_path / "long.py").write_text("import time; time.sleep(60)")
    with open(tmp_path / "lock", "w") as lock:
        yield ablation.Machine(lock.fileno())


def test_a_script_runs_with_one_thread_and_its_options(machine, tmp_path):
    machine.call(
        "good.py", {"steps": 3, "fast": True, "slow": False, "none": None, "both": ["a", "b"]}, tmp_path / "log"
    )
    assert (tmp_path / "log").read_text() == "1 --steps 3 --fast --both a b\n"


def test_a_script_that_fails_is_told_with_its_last_words(machine, tmp_path):
    with pytest.raises(RuntimeError, match=r"bad.py ended with status 3: what is wrong \(see .*log\)"):
        machine.call("bad.py", {}, tmp_path / "log")


def test_scripts_end_with_the_grid(machine, tmp_path):
    failures = []

    def call():
        try:
            machine.call("long.py", {}, tmp_path / "log")
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    while not machine.children:
        time.sleep(0.01)
    machine.stop()
    thread.join(30)
    assert len(failures) == 1 and "ended with status -15" in failures[0]
    with pytest.raises(RuntimeError, match="stopped"):
        machine.call("good.py", {}, tmp_path / "log")


def test_a_lock_is_held_as_long_as_a_script_runs(machine, tmp_path):
    """As it has to be if the process that began it was killed."""
    with open(tmp_path / "lock") as lock, open(tmp_path / "lock") as other:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = ablation.Machine(lock.fileno())
        thread = threading.Thread(
            target=lambda: pytest.raises(RuntimeError, running.call, "long.py", {}, tmp_path / "log")
        )
        thread.start()
        while not running.children:
            time.sleep(0.01)
        lock.close()  # as if this process were gone
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        running.stop()
        thread.join(30)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Variants


ROUTINGS = [
    {},
    {"shallow_tokens": ["edit"], "deep_tokens": ["edit"]},
    {"shallow_tokens": ["text", "visual"], "deep_tokens": ["edit"]},
    {"num_shallow_blocks": 2},
]


@pytest.fixture(scope="module")
def config(base):
    config = RVEDiTTransformer3DModel.load_config(base, subfolder="transformer")
    return {name: value for name, value in config.items() if name[0] != "_"} | {"num_layers": 3}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_variants_have_equally_many_parameters(config, routing):
    target = num_parameters(config | UNIFORM)
    matched = match_parameters(config | routing, target)
    built = sum(parameter.numel() for parameter in RVEDiTTransformer3DModel(**matched).parameters())
    assert built == num_parameters(matched) and abs(built / target - 1) < 0.01
    assert matched["ffn_dim"] % 8 == 0 and matched | {"ffn_dim": 0} == config | routing | {"ffn_dim": 0}


def test_a_size_that_no_width_gives_is_refused(config):
    with pytest.raises(ValueError, match="`config` .* not within 1% of 1000"):
        match_parameters(config, 1000)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_variants_of_a_seed_begin_alike_wherever_their_layers_agree(base, config, routing):
    wide = config | {"attention_head_dim": 16}
    torch.manual_seed(5)
    first = build_variant(base, wide | UNIFORM, seed=3)
    second = build_variant(base, wide | routing | {"ffn_dim": 96}, seed=3)
    for part in ("transformer", "distiller", "text_encoder"):
        tensors, others = (dict(getattr(pipe, part).named_parameters()) for pipe in (first, second))
        both = {name for name in tensors.keys() & others.keys() if "ffn" not in name}
        assert [name for name in both if not torch.equal(tensors[name], others[name])] == []
        assert len(both) > 10


def test_other_seeds_begin_otherwise(base, config):
    first, second = (build_variant(base, config, seed=seed).transformer for seed in (3, 4))
    for name, tensor in first.named_parameters():
        is_drawn = not (tensor == tensor.flatten()[0]).all()
        assert torch.equal(tensor, second.get_parameter(name)) != is_drawn, name


def test_weights_are_drawn_as_the_model_draws_them(base, config):
    drawn = build_variant(base, config, seed=3).transformer
    for name, tensor in RVEDiTTransformer3DModel(**config).named_parameters():
        other = drawn.get_parameter(name)
        if tensor.numel() > 500 and name != "proj_out.weight":
            assert other.std().item() == pytest.approx(tensor.std().item(), rel=0.2, abs=1e-6), name
    assert not drawn.proj_out.weight.any()


@pytest.mark.parametrize(
    "change, fresh", [({}, None), ({"attention_head_dim": 16}, "distiller"), ({"text_dim": 8}, "text_encoder")]
)
def test_connectors_and_text_encoder_fit_and_all_else_is_the_bases(base, config, change, fresh):
    pipe, old = build_variant(base, config | change, seed=0), RVEDiTPipeline.from_pretrained(base)
    assert pipe.distiller.config.dim == 2 * pipe.transformer.config.attention_head_dim
    assert pipe.text_encoder.config.d_model == pipe.transformer.config.text_dim
    assert torch.equal(pipe.distiller.queries, old.distiller.queries)
    for part in {"vae", "mllm", "distiller", "text_encoder"} - {fresh}:
        tensors = getattr(old, part).state_dict()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in getattr(pipe, part).state_dict().items())


def test_a_variant_is_a_pipeline(base, config, clip, tmp_path):
    build_variant(base, config | UNIFORM | {"text_dim": 8}, seed=0).save_pretrained(tmp_path)
    pipe = RVEDiTPipeline.from_pretrained(tmp_path)
    assert pipe(clip, "make it red", num_inference_steps=1).frames.shape == (1, 5, 32, 32, 3)
    assert pipe.config.default_num_inference_steps == 2


def test_weights_are_taken_over_but_for_layers_that_read_tokens(base, config, tmp_path):
    new = config | UNIFORM | {"ffn_dim": 64}
    pipe, fresh = (build_variant(base, new, seed=0).transformer for _ in range(2))
    old = RVEDiTPipeline.from_pretrained(base).transformer
    with torch.no_grad():
        for parameter in old.parameters():
            parameter += 1
    old.save_pretrained(tmp_path / "transformer")
    taken = take_over_weights(pipe, tmp_path)
    tensors, first = (dict(each.named_parameters()) for each in (old, fresh))
    reads = ("attn2", "norm2", "text_embedder", "edit_bias")
    kinds = {True: set(), False: set()}
    for name, tensor in pipe.named_parameters():
        is_taken = name in tensors and tensors[name].shape == tensor.shape and not any(part in name for part in reads)
        assert torch.equal(tensor, tensors[name] if is_taken else first[name]), name
        kinds[is_taken].add(name)
    assert taken == f"{len(kinds[True])} of {len([name for name in first if not any(part in name for part in reads)])}"
    assert "blocks.0.attn1.to_q.weight" in kinds[True] and "blocks.0.attn2.to_q.weight" in kinds[False]


def test_a_wider_feed_forward_layer_takes_over_the_narrower_ones_function(base, config):
    wide, same = (
        build_variant(base, config | {"ffn_dim": config["ffn_dim"] + more}, seed=0).transformer for more in (8, 0)
    )
    taken, first = take_over_weights(wide, base), RVEDiTPipeline.from_pretrained(base).transformer.blocks[0].ffn
    hidden = torch.randn(2, 3, config["num_attention_heads"] * config["attention_head_dim"])
    torch.testing.assert_close(wide.blocks[0].ffn(hidden), first(hidden))
    assert taken == take_over_weights(same, base)
    assert wide.blocks[0].ffn.net[0].proj.weight[-8:].any(), "further units have to be able to learn"


# Figures


def write_run(folder, row, seed, success, flow=1.0, nats=None, seconds=0.5, op_success=None, taken=None):
    """The logs of a run; `success` by level, of each item."""
    folder = folder / f"seed-{seed}" / row
    (folder / "scores").mkdir(parents=True)
    entries = [{"step": step, "seconds_per_step": seconds + (step == 1)} for step in range(1, 21)]
    for entry in entries[9::10]:
        entry["validation_flow"] = flow + (20 - entry["step"]) / 10
    if nats is not None:
        for entry in entries:
            entry["information_nats"] = nats if entry["step"] > 18 else 0.0
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    lines = []
    for level, values in success.items():
        for index, value in enumerate(values):
            scores = {"union_success": float(value), "op_success": 0.5 if op_success is None else op_success}
            lines.append({"id": f"{level}-{index}", "suite": level, "index": index, "scores": scores})
    order = np.random.default_rng(seed).permutation(len(lines))  # as several processes may write them
    (folder / "scores" / "scores-0.jsonl").write_text("".join(json.dumps(lines[i]) + "\n" for i in order))
    machine = {"CPU": "a CPU", "cores": "2"}
    facts = {"parameters": 1234567, "ffn_dim": 64, "machine": machine, "taken": taken or {}}
    (folder / "run.json").write_text(json.dumps(facts))
    settings = {"transformer": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3}}
    settings |= {
        "train": {"max_train_steps": 20, "buckets": "5x32x32", "train_batch_size": 4},
        "evaluate": {"seed": 1, "kinds": ["recolour", "remove"]},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return read_outcome(folder, row, seed)


def draw_success(seed, share, levels=LEVELS, count=8):
    rng = np.random.default_rng(seed)
    return {level: (rng.random(count) < share).astype(float) for level in levels}


def by_hand(values):
    """The two-level bootstrap, one resample at a time."""
    num_seeds = len(next(iter(values.values())))
    rng = np.random.default_rng(derive_seed("bootstrap", "seeds"))
    seeds = [rng.integers(num_seeds, size=(1000, num_seeds))][0]
    items = {}
    for level, each in values.items():
        rng = np.random.default_rng(derive_seed("bootstrap", "items", level))
        items[level] = rng.integers(each.shape[1], size=(1000, each.shape[1]))
    means = []
    for number in range(1000):
        levels = []
        for level, each in values.items():
            total = [each[seed, item] for seed in seeds[number] for item in items[level][number]]
            levels.append(sum(total) / len(total))
        means.append(sum(levels) / len(levels))
    return np.percentile(means, 2.5), np.percentile(means, 97.5)


def test_intervals_are_those_of_a_bootstrap_by_hand():
    rng = np.random.default_rng(0)
    values = {"L2": rng.random((3, 7)), "L3": rng.random((3, 4))}
    found = estimate(values)
    assert found.mean == pytest.approx((values["L2"].mean() + values["L3"].mean()) / 2)
    assert (found.low, found.high) == pytest.approx(by_hand(values))
    assert estimate(values) == found


def test_items_are_not_counted_as_often_as_there_are_seeds():
    values = np.random.default_rng(0).random((1, 40))
    one, four = estimate({"L2": values}), estimate({"L2": np.repeat(values, 4, axis=0)})
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.1)


def test_seeds_that_differ_widen_the_interval():
    items = np.random.default_rng(0).random((1, 40))
    same, other = np.repeat(items, 3, axis=0), items + np.array([[-1.0], [0.0], [1.0]])
    same, other = estimate({"L2": same}), estimate({"L2": other})
    assert same.mean == pytest.approx(other.mean) and other.high - other.low > 3 * (same.high - same.low)


def test_one_value_has_no_interval():
    found = estimate({"flow": np.array([[2.0]])})
    assert found.mean == 2.0 and math.isnan(found.low) and with_interval(found, 1) == "2.0"


@pytest.fixture
def outcomes(tmp_path):
    """Two rows of three seeds, and a third of two."""
    found = [
        write_run(tmp_path, row, seed, draw_success(10 * seed + number, share), flow=1 + number + seed / 10, nats=nats)
        for number, (row, share, nats) in enumerate([("uniform", 0.3, None), ("routed", 0.7, 0.4)])
        for seed in range(3)
    ]
    found += [write_run(tmp_path, "third", seed, draw_success(seed, 0.3), op_success=1.0) for seed in range(2)]
    return found


def test_an_outcome_is_what_was_logged(outcomes):
    outcome = outcomes[3]
    assert (outcome.row, outcome.seed, outcome.facts["parameters"]) == ("routed", 0, 1234567)
    for level, values in draw_success(1, 0.7).items():
        np.testing.assert_array_equal(outcome.scores[level]["union_success"], values)
    assert outcome.curve == [(10, 3.0), (20, 2.0)]
    assert outcome.figures == {"validation_flow": 2.0, "information_nats": 0.4, "seconds_per_step": 0.5}


def test_a_run_that_is_not_finished_has_no_outcome(outcomes, tmp_path):
    (tmp_path / "seed-0" / "routed" / "run.json").unlink()
    assert read_outcome(tmp_path / "seed-0" / "routed", "routed", 0) is None


def test_differences_are_paired_by_seed_and_item(outcomes):
    found = Ablation(outcomes, "uniform")
    values = {
        level: np.stack(
            [draw_success(10 * seed + 1, 0.7)[level] - draw_success(10 * seed, 0.3)[level] for seed in range(3)]
        )
        for level in LEVELS
    }
    difference = found.difference("routed", "uniform", "union_success", LEVELS)
    assert difference.mean == pytest.approx(np.mean([each.mean() for each in values.values()]))
    assert (difference.low, difference.high) == pytest.approx(by_hand(values))
    same = found.difference("third", "uniform", "union_success", ("L2",))
    assert found.common_seeds("third", "uniform") == [0, 1]
    expected = np.mean([draw_success(s, 0.3)["L2"].mean() - draw_success(10 * s, 0.3)["L2"].mean() for s in (0, 1)])
    assert same.mean == pytest.approx(expected)


def test_figures_of_a_run_have_intervals_over_seeds(outcomes):
    found = Ablation(outcomes, "uniform")
    flow = found.figure("uniform", "validation_flow")
    assert (flow.mean, flow.low, flow.high) == pytest.approx((1.1, 1.0, 1.2))
    assert found.difference("routed", "uniform", "validation_flow") == pytest.approx((1.0, 1.0, 1.0))
    assert found.figure("uniform", "information_nats") is None
    assert found.difference("routed", "uniform", "information_nats") is None


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_none_of_some_items_is_not_none_of_all(tmp_path, value):
    """All resamples are the same then; seeds share their items, so that there are 8 of each level, not 24."""
    success = {level: np.full(8, value) for level in LEVELS}
    found = Ablation([write_run(tmp_path, "none", seed, success) for seed in range(3)], "none")
    for levels, count in (("L3",), 8), (("L3", "L4"), 16):
        figure, reach = found.figure("none", "union_success", levels), 1 - 0.025 ** (1 / count)
        expected = (0.0, 0.0, reach) if value == 0 else (1.0, 1 - reach, 1.0)
        assert tuple(figure) == pytest.approx(expected)


def test_runs_of_other_items_are_refused(outcomes, tmp_path):
    other = write_run(tmp_path, "fourth", 0, draw_success(0, 0.5, count=9))
    with pytest.raises(ValueError, match="`outcomes` .*same items"):
        Ablation([*outcomes, other], "uniform")


REACH = 100 * (1 - 0.025 ** (1 / 40))  # of 40 pairs that differ alike, the share that others may be


@pytest.mark.parametrize(
    "shares, verdicts",
    [
        (
            (1.0, 0.0),
            f"is supported: difference +100.0 [{100 - 2 * REACH:+.1f}, +100.0] points, 2 seeds, 40 items each.",
        ),
        (
            (0.0, 1.0),
            f"is not supported: difference -100.0 [-100.0, {2 * REACH - 100:+.1f}] points, 2 seeds, 40 items each; `a`"
            " is worse.",
        ),
        (
            (1.0, 1.0),
            f"not supported: difference +0.0 [{-REACH:+.1f}, {REACH:+.1f}] points, 2 seeds, 40 items each; the"
            " interval includes 0",
        ),
    ],
)
def test_the_claim_is_one_sentence_with_its_numbers(tmp_path, shares, verdicts):
    runs = [
        write_run(tmp_path, row, seed, draw_success(seed, share))
        for row, share in zip("ab", shares)
        for seed in (0, 1)
    ]
    sentence = claim_sentence(Ablation(runs, "b"), "a", "b")
    assert sentence.startswith("The claim that `a` beats `b` by >= 5 points on the mean of L2-L6 is")
    assert verdicts in sentence and sentence.count(". ") == 0 and "\n" not in sentence


@pytest.mark.parametrize(
    "gained, reading",
    [(1, "is better, but by less than 5."), (6, "is better, but the interval reaches below 5.")],
)
def test_a_gain_that_is_not_large_enough_reads_so(tmp_path, gained, reading):
    """Of 100 items, so many more are right."""
    lost = {level: np.zeros(100) for level in LEVELS}
    won = {level: (np.arange(100) < gained).astype(float) for level in LEVELS}
    runs = [write_run(tmp_path, row, 0, scores) for row, scores in (("a", won), ("b", lost))]
    sentence = claim_sentence(Ablation(runs, "b"), "a", "b")
    assert f"not supported: difference +{gained}.0 [" in sentence and sentence.endswith(f"`a` {reading}")


def test_a_claim_without_an_interval_is_not_tested(tmp_path):
    runs = [write_run(tmp_path, row, 0, draw_success(0, 0.5, count=1)) for row in "ab"]
    sentence = claim_sentence(Ablation(runs, "b"), "a", "b")
    assert sentence.endswith("is not tested: one seed and one item of each level have no interval.")


def test_a_claim_without_runs_is_not_tested(outcomes):
    assert claim_sentence(Ablation(outcomes, "uniform"), "routed", "none").endswith(
        "is not tested: no seed of both has been run."
    )


@pytest.mark.parametrize(
    "interval, expected",
    [
        ((0.01, 0.2), "better"),
        ((-0.2, -0.01), "worse"),
        ((-0.1, 0.1), "no difference shown"),
        ((0.0, 0.0), "no difference shown"),
    ],
)
def test_a_difference_reads_as_its_interval_tells(interval, expected):
    assert verdict(Estimate(sum(interval) / 2, *interval)) == expected


def test_the_tables_show_these_figures(outcomes):
    found = Ablation(outcomes, "uniform")
    shown = tables(found, {"uniform": "all", "routed": "some", "third": "else"})

    def cells(title, row):
        line = next(line for line in shown[title].splitlines() if line.startswith(f"| `{row}` |"))
        return [cell.strip() for cell in line.strip("|").split("|")][1:]

    def points(value, sign=""):
        return "{:{sign}.1f} [{:{sign}.1f}, {:{sign}.1f}]".format(*(100 * each for each in value), sign=sign)

    names = [LEVELS, *([level] for level in LEVELS)]
    success = [points(found.figure("routed", "union_success", each)) for each in names]
    assert cells("Union success, per cent", "routed") == success
    gained = [points(found.difference("routed", "uniform", "union_success", each), "+") for each in names]
    assert cells("Difference to `uniform`, points of union success", "routed") == [*gained, "better"]
    assert "| `uniform` |" not in shown["Difference to `uniform`, points of union success"]
    assert cells("Other figures", "routed") == [
        "50.0 [50.0, 50.0]",
        "2.1000 [2.0000, 2.2000]",
        "0.400 [0.400, 0.400]",
        "0.500 [0.500, 0.500]",
    ]
    assert cells("Other figures", "uniform")[2] == "-"
    assert cells("Difference to `uniform`, other figures", "third")[0] == (
        f"+50.0 [{50 - 1.5 * REACH:+.1f}, {50 + 0.5 * REACH:+.1f}]"
    )
    assert cells("Rows", "third") == ["else", "1,234,567", "64", "0, 1"]


def test_the_report_says_what_rows_began_with(tmp_path):
    runs = [
        write_run(tmp_path, row, 0, draw_success(0, 0.5), taken={"transformer": f"{count} of 9"})
        for row, count in (("a", 9), ("b", 7))
    ]
    shown = tables(Ablation(runs, "a"), {"a": "", "b": ""})["Rows"]
    assert "weights of `start` |" in shown and "| 9 of 9 |" in shown and "| 7 of 9 |" in shown


def test_the_report_says_how_far_it_can_be_trusted(outcomes, tmp_path):
    says = dict.fromkeys(("uniform", "routed", "third"), "")
    path = tmp_path / "docs" / "report.md"
    write_report(path, Ablation(outcomes, "uniform"), says, ("routed", "uniform"), "python it.py", 2)
    text = path.read_text()
    assert "**Not complete:** runs that are still to be made: 2." in text and "different numbers of seeds" in text
    assert "With 2 seeds the intervals are rough" in text and "```bash\npython it.py\n```" in text
    assert "width 16 with 3 blocks, trained for 20 steps of 4 pairs" in text and "Run on: CPU a CPU, cores 2." in text
    assert "The items are made of these operations alone: recolour, remove." in text
    assert "(report.png)" in text and path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    ones = [outcome for outcome in outcomes if outcome.seed == 0]
    write_report(path, Ablation(ones, "uniform"), says, ("routed", "uniform"), "python it.py")
    assert (
        "With one seed the intervals tell how the items vary" in path.read_text()
        and "Not complete" not in path.read_text()
    )
    assert sorted(each.name for each in path.parent.iterdir()) == ["report.md", "report.png"]
