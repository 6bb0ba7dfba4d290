import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from components import build_pipeline
from safetensors.torch import load_file
from torch.backends import cuda


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train  # noqa: E402

from rvedit_diffusers import RVEDiTPipeline  # noqa: E402
from rvedit_diffusers.synthetic import SyntheticEdits  # noqa: E402
from rvedit_diffusers.training.cache import fill_cache, load_cache  # noqa: E402
from rvedit_diffusers.training.checkpoint import (  # noqa: E402
    has_training_state,
    load_training_state,
    open_log,
    save_training_state,
)


SIZE = {"num_frames": 5, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_pipeline(num_layers=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    pipe = RVEDiTPipeline.from_pretrained(model)
    fill_cache(pipe, SyntheticEdits(20, **SIZE, edits_per_scene=4), 32, folder)
    return folder


@pytest.fixture(autouse=True)
def restored_globals():
    flash, reduction = cuda.flash_sdp_enabled(), cuda.fp16_bf16_reduction_math_sdp_allowed()
    yield
    cuda.enable_flash_sdp(flash)
    cuda.allow_fp16_bf16_reduction_math_sdp(reduction)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several trainings of different precision


def run(model, cache, output, *options):
    values = {"model": model, "cache_dir": cache, "output": output, "num_pairs": 32, "batch_size": 4} | SIZE
    values |= {"learning_rate": 1e-2, "warmup_steps": 1, "log_every": 1, "save_every": 2, "align_warmup_steps": 1}
    argv = [f"--{name}={value}" for name, value in values.items()]
    train.main([*argv, *options])
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return {path.parent.name: load_file(path) for path in (folder / "pipeline").glob("*/*.safetensors")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(model, cache, tmp_path, optimizer):
    options = ("--steps=4", f"--optimizer={optimizer}")
    run(model, cache, tmp_path / "whole", *options)
    # the schedule is that of four steps in both
    with pytest.MonkeyPatch.context() as patch:

        def stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        save = train.save_training_state
        patch.setattr(train, "save_training_state", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, cache, tmp_path / "parts", *options)
    assert not (tmp_path / "parts" / "pipeline").exists()
    run(model, cache, tmp_path / "parts", *options)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for component, tensors in whole.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts[component][name]), f"{component}: {name}"


def test_what_learns_and_what_is_frozen(model, cache, tmp_path):
    log = run(model, cache, tmp_path, "--steps=2")
    assert {"flow", "align", "information_nats", "information_ceiling_nats"} <= log[0].keys()
    assert (tmp_path / "losses.png").stat().st_size > 0
    before, after = RVEDiTPipeline.from_pretrained(model), RVEDiTPipeline.from_pretrained(tmp_path / "pipeline")
    for name in ("vae", "mllm"):
        for key, tensor in getattr(before, name).state_dict().items():
            assert torch.equal(tensor, getattr(after, name).state_dict()[key]), f"{name}: {key}"
    for name in ("transformer", "text_encoder", "distiller"):
        old, new = getattr(before, name).state_dict(), getattr(after, name).state_dict()
        assert old.keys() == new.keys()
        same = {key for key in old if torch.equal(old[key], new[key])}
        frozen = {"queries"} & old.keys()
        assert frozen <= same <= frozen | {key for key in old if not old[key].is_floating_point()}, f"{name}: {same}"


def test_without_alignment_there_is_no_reference_branch(model, cache, tmp_path):
    log = run(model, cache, tmp_path, "--steps=1", "--align_weight=0")
    assert "align" not in log[0] and log[0]["flow"] > 0


def test_training_lowers_the_loss(model, cache, tmp_path):
    log = run(model, cache, tmp_path, "--steps=30", "--align_weight=0", "--mixed_precision=no", "--drop_all=0")
    flow = [entry["flow"] for entry in log]
    assert sum(flow[-8:]) < 0.9 * sum(flow[:8])


def test_reference_gets_no_gradient_and_the_editing_branch_does(model, cache):
    pipe = RVEDiTPipeline.from_pretrained(model)
    branches = train.EditingBranches(pipe, [1], 0.07)
    data = load_cache(sorted(cache.iterdir()))
    batch = {name: value[:2].float() if value.is_floating_point() else value[:2] for name, value in data.items()}
    batch |= {"keep_instruction": torch.ones(2), "keep_source": torch.ones(2)}
    for name in ("edit_states", "visual_states", "reference_edit_states", "reference_visual_states"):
        batch[name].requires_grad_()
    noise, sigmas = torch.randn_like(batch["latents"]), torch.full((2,), 0.5)
    _, loss = branches(batch, noise, sigmas, torch.arange(8))
    loss.sum().backward()
    assert batch["edit_states"].grad.abs().sum() > 0
    assert batch["reference_edit_states"].grad is None and batch["reference_visual_states"].grad is None


def test_cache_is_the_frozen_parts_output_and_is_not_made_twice(model, cache, tmp_path):
    pipe = RVEDiTPipeline.from_pretrained(model)
    edits = SyntheticEdits(20, **SIZE, edits_per_scene=4)
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    paths = fill_cache(pipe, edits, 32, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    rows = load_cache(paths)
    inputs = pipe.processor([edits[5].target_frames], [edits[5].instruction])
    with torch.no_grad():
        edit_states, *_ = pipe.distiller.harvest(pipe.mllm, inputs)
    torch.testing.assert_close(rows["reference_edit_states"][5].float(), edit_states[0], atol=0.03, rtol=0.02)
    assert torch.equal(rows["source_latents"][4], rows["source_latents"][7])
    assert not torch.equal(rows["latents"][4], rows["latents"][7])


def test_a_cache_of_other_edits_or_weights_is_refused(model, cache):
    edits = SyntheticEdits(20, **SIZE, edits_per_scene=4)
    pipe = RVEDiTPipeline.from_pretrained(model)
    with pytest.raises(ValueError, match="made of other edits or by other weights"):
        fill_cache(pipe, SyntheticEdits(21, **SIZE, edits_per_scene=4), 32, cache)
    with torch.no_grad():
        next(pipe.mllm.parameters()).flatten()[0] += 1.0
    with pytest.raises(ValueError, match="made of other edits or by other weights"):
        fill_cache(pipe, edits, 32, cache)


def test_clips_that_the_vae_cannot_encode_whole_are_refused(model, tmp_path):
    pipe = RVEDiTPipeline.from_pretrained(model)
    with pytest.raises(ValueError, match=r"clips of 6 frames, but the VAE encodes 4k \+ 1"):
        fill_cache(pipe, SyntheticEdits(20, num_frames=6, height=32, width=32), 32, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_log_goes_on_without_the_steps_that_are_trained_again(tmp_path):
    with open_log(tmp_path / "runs" / "log.jsonl", 0) as log:
        log.writelines(json.dumps({"step": step}) + "\n" for step in (20, 40, 60))
    with open_log(tmp_path / "runs" / "log.jsonl", 40) as log:
        log.write(json.dumps({"step": 60, "again": True}) + "\n")
    entries = [json.loads(line) for line in (tmp_path / "runs" / "log.jsonl").read_text().splitlines()]
    assert entries == [{"step": 20}, {"step": 40}, {"step": 60, "again": True}]


def test_a_checkpoint_survives_a_death_between_its_renames(tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    save_training_state(tmp_path / "checkpoint", {"module": module}, optimizer, {"step": 1})
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert has_training_state(tmp_path / "checkpoint")
    assert load_training_state(tmp_path / "checkpoint", {"module": module}, optimizer) == {"step": 1}
    save_training_state(tmp_path / "checkpoint", {"module": module}, optimizer, {"step": 2})
    assert load_training_state(tmp_path / "checkpoint", {"module": module}, optimizer) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_options_of_the_command_line_go_before_those_of_the_file(model, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": str(model), "align_blocks": [0, 1], "steps": 3, "compile": True}))
    args = train.parse_args([f"--config={config}", "--output=out", "--steps=7"])
    assert (args.model, args.align_blocks, args.steps, args.compile) == (model, [0, 1], 7, True)


@pytest.mark.parametrize(
    "text, word",
    [
        ('{"setps": 3}', "setps"),
        ('{"steps": 0}', "--steps"),
        ('{"optimizer": "Muon"}', "--optimizer"),
        ('{"num_pairs": 33}', "--num_pairs"),
        ('{"batch_size": 0}', "--batch_size"),
        ("[]", "--config"),
        ("{", "--config"),
    ],
)
def test_wrong_options_end_before_anything_is_loaded(model, tmp_path, capsys, text, word):
    config = tmp_path / "config.json"
    config.write_text(text)
    with pytest.raises(SystemExit) as error:
        train.main([f"--model={model}", f"--output={tmp_path / 'out'}", f"--config={config}"])
    assert error.value.code == 2 and word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_folder_without_pipeline_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([f"--model={tmp_path}", f"--output={tmp_path / 'out'}"])
    assert "--model" in capsys.readouterr().err
