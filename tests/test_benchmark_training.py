"""The benchmark of the training step: what it counts, and on which steps."""

import json
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import training  # noqa: E402


CPU = torch.device("cpu")
TINY = ["--preset", "tiny", "--align_tokens", "32"]


def run(folder, *options):
    path = folder / "results" / "training.json"
    training.main([*TINY, "--steps", "2", "--output", str(path), *options])
    assert [file.name for file in path.parent.iterdir()] == ["training.json"]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tmp_path_factory.mktemp("benchmark"), "--device", "cpu")


def test_the_result_has_ratios_and_what_they_are_made_of(result):
    assert list(result["ratios"]) == [
        "train_align_vs_plain",
        "train_naive_vs_plain",
        "train_align_memory_vs_plain",
        "train_naive_memory_vs_plain",
        "train_align_flops_vs_plain",
        "train_naive_flops_vs_plain",
    ]
    for name in ("align", "naive"):
        for quantity in ("memory", "flops"):
            values = result["memory_bytes" if quantity == "memory" else "flops"]
            assert result["ratios"][f"train_{name}_{quantity}_vs_plain"] == values[name] / values["plain"]
    assert {name: len(times) for name, times in result["seconds"].items()} == dict.fromkeys(training.STEPS, 2)
    assert result["settings"]["preset"]["name"] == "tiny"
    assert result["settings"]["align_tokens"] == 32
    assert result["torch"] == torch.__version__
    assert result["device"].endswith("CPU cores")


def test_the_reference_branch_costs_less_than_a_second_branch(result):
    assert 1 < result["ratios"]["train_align_flops_vs_plain"] < 1.5
    assert 2 < result["ratios"]["train_naive_flops_vs_plain"] < 2.05


@pytest.mark.slow
def test_on_meta_no_step_runs(tmp_path, result, capsys):
    counted = run(tmp_path, "--device", "meta")
    assert "device" in result and not {"device", "cpu", "threads"} & counted.keys()  # no machine is part of it
    assert counted["seconds"] == {}
    assert counted["flops"] == result["flops"]
    assert counted["memory_bytes"] == result["memory_bytes"]
    assert set(counted["ratios"]) == {name for name in result["ratios"] if "memory" in name or "flops" in name}
    assert capsys.readouterr().out.count("| - | -") == 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--training_type", "full"], ["--gradient_checkpointing"]])
def test_flops_without_data_are_those_of_a_step(options):
    args = training.parse_args([*TINY, "--device", "cpu", *options])
    branches, samples = training.build_branches(args, CPU), training.make_samples(training.PRESETS["tiny"], 32)
    flops = {}
    for name in training.STEPS:
        with training.FlopCounterMode(display=False) as counter:
            training.step_loss(branches[name], training.make_batch(samples[name], 1, CPU)).backward()
        flops[name] = counter.get_total_flops()
    assert training.count_flops(args) == flops


@torch.no_grad()
def test_both_kinds_of_alignment_compute_the_same():
    args = training.parse_args([*TINY, "--device", "cpu", "--batch_size", "2"])
    branches = training.build_branches(args, CPU)
    batch = training.make_batch(training.make_samples(training.PRESETS["tiny"], 32)["align"], 2, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        velocity, align_loss = branches["align"](batch)
        velocities, naive_align_loss = branches["naive"](batch)
    assert torch.equal(velocities[:2], velocity)
    assert torch.equal(naive_align_loss, align_loss)


def test_naive_gradients_flow_through_both_branches():
    args = training.parse_args([*TINY, "--device", "cpu"])
    batch = training.make_batch(training.make_samples(training.PRESETS["tiny"], 32)["align"], 1, CPU)
    for name in ("edit_tokens", "reference_edit_tokens"):
        batch[name].requires_grad_()
    branches = training.build_branches(args, CPU)
    training.step_loss(branches["align"], batch).backward()
    assert batch["edit_tokens"].grad is not None and batch["reference_edit_tokens"].grad is None
    training.step_loss(branches["naive"], batch).backward()
    assert batch["reference_edit_tokens"].grad is not None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "0"], "--steps has to be at least 1, but is 0"),
        (["--batch_size", "0"], "--batch_size has to be at least 1, but is 0"),
        (["--align_tokens", "-1"], "--align_tokens has to be at least 1, but is -1"),
        (["--align_blocks", "1", "3"], "--align_blocks has to name blocks in [0, 2], but is [1, 3]"),
        (["--align_blocks", "-1"], "--align_blocks has to name blocks in [0, 2], but is [-1]"),
        (["--device", "toaster"], "--device: "),
        (["--device", "xpu"], "--device has to be a CPU, a CUDA device or meta, but is xpu"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--output", str(ROOT)], "--output has to be a file"),
        (["--output", str(ROOT / "LICENSE" / "training.json")], "--output: "),
        (["--preset", "wan-1.3b"], "--preset wan-1.3b needs a GPU"),
    ],
)
def test_wrong_options_end_before_a_model_is_built(options, message, monkeypatch, capsys):
    monkeypatch.setattr(training, "build_transformer", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        training.main(["--preset", "tiny", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_steps_that_do_not_fit_are_not_run():
    memory = {"plain": 3 * 2**30, "align": 4 * 2**30, "naive": 9 * 2**30}
    assert training.steps_that_fit(memory, 4 * 2**30) == ["plain", "align"]
    with pytest.raises(SystemExit, match="a plain step needs 3.0 GiB, 2.0 are free: take --gradient_checkpointing"):
        training.steps_that_fit(memory, 2 * 2**30)


@pytest.mark.slow
@pytest.mark.parametrize("training_type", ["lora", "full"])
@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-5b", "wan-14b"])
def test_alignment_adds_at_most_a_fifth_to_a_step_of_wan(preset, training_type):
    args = training.parse_args(["--preset", preset, "--device", "meta", "--training_type", training_type])
    flops, memory = training.count_flops(args), training.count_memory(args)
    assert flops["align"] <= 1.2 * flops["plain"]
    assert memory["align"] <= 1.2 * memory["plain"]
