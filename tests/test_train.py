import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from components import build_pipeline, make_clip
from safetensors.torch import load_file
from torch.backends import cuda


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train  # noqa: E402

from rvedit_diffusers import RVEDiTPipeline, write_video  # noqa: E402
from rvedit_diffusers.synthetic import SyntheticEdits  # noqa: E402
from rvedit_diffusers.training.cache import CachedPairs, cache_paths, fill_cache, fingerprint  # noqa: E402
from rvedit_diffusers.training.checkpoint import (  # noqa: E402
    has_training_state,
    load_training_state,
    open_log,
    save_training_state,
)
from rvedit_diffusers.training.pairs import SyntheticPairs  # noqa: E402


BUCKET = "5x32x32"
LEARNS_MORE = ("--train_connectors", "--train_text_encoder")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_pipeline(num_layers=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")  # filled by the first run of each kind


@pytest.fixture
def table(tmp_path):
    """Three pairs of files that differ in rate, length and size, one that is broken, and an image pair."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number, (size, fps) in enumerate([((32, 32), 8), ((48, 48), 16), ((32, 32), 12)]):
        write_video(folder / f"{number}_source.mp4", make_clip(12 * fps // 8, 32, 32, seed=number), fps=fps)
        write_video(folder / f"{number}_edited.mp4", make_clip(12, *size, seed=number + 9), fps=8)
        rows.append([f"{number}_source.mp4", f"{number}_edited.mp4", "make the square blue"])
    (folder / "broken.mp4").write_text("not a clip")
    rows.append(["broken.mp4", "0_edited.mp4", "make it red"])
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["source", "edited", "instruction"], *rows])
    return folder


@pytest.fixture(autouse=True)
def restored_globals():
    flash, reduction = cuda.flash_sdp_enabled(), cuda.fp16_bf16_reduction_math_sdp_allowed()
    yield
    cuda.enable_flash_sdp(flash)
    cuda.allow_fp16_bf16_reduction_math_sdp(reduction)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several trainings of different precision


def run(model, cache, output, *options):
    values = {
        "model": model,
        "cache_dir": cache,
        "output": output,
        "num_pairs": 16,
        "batch_size": 4,
        "buckets": BUCKET,
    }
    values |= {"learning_rate": 1e-2, "warmup_steps": 1, "log_every": 1, "save_every": 2, "align_warmup_steps": 1}
    argv = [f"--{name}={value}" for name, value in values.items()]
    train.main([*argv, *options])
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights(folder):
    files = [*(folder / "pipeline").glob("*/*.safetensors"), *(folder / "lora").glob("*.safetensors")]
    return {path.parent.name: load_file(path) for path in files}


@pytest.mark.parametrize(
    "kind", [("--optimizer=adamw",), ("--optimizer=muon", *LEARNS_MORE), ("--training_type=lora", "--lora_rank=2")]
)
def test_a_resumed_run_equals_an_uninterrupted_one(model, cache, tmp_path, kind):
    options = ("--steps=6", *kind)  # an epoch has 4
    run(model, cache, tmp_path / "whole", *options)
    # the schedule is that of six steps in both
    with pytest.MonkeyPatch.context() as patch:

        def stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        save = train.save_training_state
        patch.setattr(train, "save_training_state", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, cache, tmp_path / "parts", *options)
    assert not any((tmp_path / "parts" / name).exists() for name in ("pipeline", "lora"))
    run(model, cache, tmp_path / "parts", *options)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for component, tensors in whole.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts[component][name]), f"{component}: {name}"


def test_what_learns_and_what_is_frozen(model, cache, tmp_path):
    log = run(model, cache, tmp_path, "--steps=2", *LEARNS_MORE)
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


def test_lora_trains_the_adapter_alone_and_loads_into_the_pipeline(model, cache, tmp_path):
    run(model, cache, tmp_path, "--steps=2", "--training_type=lora", "--lora_rank=2", "--lora_alpha=6")
    assert not (tmp_path / "pipeline").exists()
    pipe = RVEDiTPipeline.from_pretrained(model)
    base = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(tmp_path / "lora")
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 6
    adapted = pipe.transformer.state_dict()
    for name, tensor in base.items():
        assert torch.equal(tensor, adapted[name if name in adapted else with_base_layer(name)]), name
    assert all(tensor.any() for name, tensor in adapted.items() if "lora_B" in name and "norm" not in name)


def with_base_layer(name):
    layer, _, kind = name.rpartition(".")
    return f"{layer}.base_layer.{kind}"


def batch_of(model, cache, count=2):
    pipe = RVEDiTPipeline.from_pretrained(model)
    pairs = SyntheticPairs(SyntheticEdits(20, 5, 32, 32, edits_per_scene=4), 16, 16.0)
    samples = CachedPairs(fill_cache(pipe, pairs, cache, batch_size=4), pipe.tokenizer.model_max_length)
    batch = torch.utils.data.default_collate([samples[index] for index in range(count)])
    return pipe, {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


def arguments(model, *options):
    return train.parse_args([f"--model={model}", "--output=unused", *options])


def test_reference_gets_no_gradient_and_the_editing_branch_does(model, cache):
    pipe, batch = batch_of(model, cache)
    args = arguments(model, "--align_blocks=1", "--drop_all=0", "--drop_instruction=0")
    branches = train.EditingBranches(pipe, args)
    batch = train.draw(batch, 0, {}, args)
    for name in ("edit_tokens", "visual_tokens", "reference_edit_tokens", "reference_visual_tokens"):
        batch[name].requires_grad_()
    _, loss = branches(batch, torch.arange(8))
    loss.sum().backward()
    assert batch["edit_tokens"].grad.abs().sum() > 0
    assert batch["reference_edit_tokens"].grad is None and batch["reference_visual_tokens"].grad is None


def test_what_a_sample_draws_depends_on_its_number_alone(model, cache):
    _, batch = batch_of(model, cache, count=4)
    args = arguments(model, "--drop_all=0.3", "--drop_instruction=0.1")
    null_text = {"prompt_embeds": torch.zeros(batch["prompt_embeds"].shape[1:])}
    whole = train.draw(batch, 100, null_text, args)
    halves = [
        train.draw({name: value[rows] for name, value in batch.items()}, first, null_text, args)
        for first, rows in ((100, slice(0, 2)), (102, slice(2, 4)))
    ]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([half[name] for half in halves])), name
    assert len({float(row) for row in whole["noise"].flatten(1)[:, 0]}) == 4
    dropped = whole["keep_instruction"] == 0
    assert dropped.any() and not whole["prompt_embeds"][dropped].any() and whole["prompt_embeds"][~dropped].any()


@pytest.mark.parametrize("tokens, text", [("tokens", "embeds"), ("states", "ids")])
def test_cache_is_what_the_pipeline_computes_and_is_made_once(model, cache, tmp_path, tokens, text):
    pipe = RVEDiTPipeline.from_pretrained(model)
    edits = SyntheticEdits(20, 5, 32, 32, edits_per_scene=4)
    pairs = SyntheticPairs(edits, 8, 16.0)
    paths = fill_cache(pipe, pairs, tmp_path, tokens, text, batch_size=3)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(paths) == set(times) and len(times) == 8
    assert fill_cache(pipe, pairs, tmp_path, tokens, text) == paths
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times

    sample, edit = CachedPairs(paths, pipe.tokenizer.model_max_length)[5], edits[5]
    near = {"atol": 0.03, "rtol": 0.02}  # bfloat16
    with torch.no_grad():
        if tokens == "tokens":
            edit_tokens, visual_tokens, positions, _ = pipe.encode_tokens(edit.target_frames, edit.instruction)
        else:
            inputs = pipe.processor([edit.target_frames], [edit.instruction])
            edit_tokens, visual_tokens, positions, _ = pipe.distiller.harvest(pipe.mllm, inputs)
        torch.testing.assert_close(sample["reference_edit_tokens"].float(), edit_tokens[0], **near)
        torch.testing.assert_close(sample["reference_visual_tokens"].float(), visual_tokens[0], **near)
        torch.testing.assert_close(sample["visual_positions"], positions[0])
        embeds, _ = pipe.encode_prompt(edit.instruction)
        if text == "ids":
            mask = sample["attention_mask"][None]
            embeds_of_ids = pipe.text_encoder(sample["input_ids"][None], mask).last_hidden_state * mask.unsqueeze(-1)
            torch.testing.assert_close(embeds_of_ids, embeds)
        else:
            torch.testing.assert_close(sample["prompt_embeds"].float(), embeds[0], **near)
        frames = torch.from_numpy(edit.source_frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
        torch.testing.assert_close(sample["source_latents"].float(), pipe.encode_video(frames)[0], **near)


def test_other_weights_pairs_or_settings_have_other_files(model, tmp_path):
    pipe = RVEDiTPipeline.from_pretrained(model)
    pairs = SyntheticPairs(SyntheticEdits(20, 5, 32, 32), 2, 16.0)
    key = fingerprint(pipe, "tokens", "embeds")
    paths = set(cache_paths(tmp_path, pairs, key))
    for other in (SyntheticPairs(SyntheticEdits(21, 5, 32, 32), 2, 16.0), SyntheticPairs(pairs.edits, 2, 8.0)):
        assert not paths & set(cache_paths(tmp_path, other, key))
    keys = {key, fingerprint(pipe, "states", "embeds"), fingerprint(pipe, "tokens", "ids")}
    for module in (pipe.vae, pipe.mllm, pipe.distiller, pipe.text_encoder):
        with torch.no_grad():
            next(module.parameters()).flatten()[0] += 1.0
        keys.add(fingerprint(pipe, "tokens", "embeds"))
    pipe.processor.default_fps = 5.0
    assert len(keys | {fingerprint(pipe, "tokens", "embeds")}) == 8


def test_nothing_half_written_is_left_when_encoding_stops(model, tmp_path, monkeypatch):
    pipe = RVEDiTPipeline.from_pretrained(model)
    pairs = SyntheticPairs(SyntheticEdits(20, 5, 32, 32), 4, 16.0)
    encode, calls = pipe.encode_video, []

    def stop(video):
        calls.append(video)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(video)

    monkeypatch.setattr(pipe, "encode_video", stop)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(pipe, pairs, tmp_path)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(finished) == 1 and len(list(tmp_path.iterdir())) == 1
    paths = fill_cache(pipe, pairs, tmp_path)
    assert len(paths) == 4 and all(path.exists() for path in paths)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


def test_two_processes_fill_one_folder_together(model, tmp_path):
    pipe = RVEDiTPipeline.from_pretrained(model)
    pairs = SyntheticPairs(SyntheticEdits(20, 5, 32, 32), 4, 16.0)
    fill_cache(pipe, pairs, tmp_path, rank=0, num_processes=2)
    assert len(list(tmp_path.iterdir())) == 2
    paths = fill_cache(pipe, pairs, tmp_path, rank=1, num_processes=2)
    assert set(paths) == set(tmp_path.iterdir())


def test_trains_on_files(model, table, tmp_path, capsys):
    options = ("--steps=2", f"--train_data={table}", "--training_type=lora", "--lora_rank=2", "--batch_size=2")
    log = run(model, tmp_path / "cache", tmp_path / "out", *options)
    assert len(log) == 2 and all(entry["flow"] > 0 for entry in log)
    for entry in log:
        assert entry["information_nats"] == pytest.approx(math.log(2 * 2 * 2) - entry["align"], abs=1e-4)
    assert (tmp_path / "out" / "lora").is_dir()
    table_of_pairs = capsys.readouterr().out
    assert "dropped: 1 of 4 pairs" in table_of_pairs and "broken.mp4" in table_of_pairs


def test_a_dry_run_only_scans(model, table, tmp_path, capsys):
    train.main(
        [f"--model={model}", f"--output={tmp_path / 'out'}", f"--train_data={table}", "--buckets=5x32x32", "--dry_run"]
    )
    assert BUCKET in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--strict"], "--strict, but 1 of 4 pairs were dropped"),
        (["--buckets=81x32x32"], "no pair to train on"),
        (["--buckets=6x32x32"], "4k \\+ 1"),
        (["--columns=openve"], "original_video"),
        (["--train_data=absent"], "absent"),
    ],
)
def test_data_that_cannot_be_trained_on_ends_the_run(model, table, tmp_path, options, message):
    argv = [f"--model={model}", f"--output={tmp_path / 'out'}", f"--train_data={table}", f"--buckets={BUCKET}"]
    with pytest.raises(SystemExit, match=message):
        train.main([*argv, *options])
    assert not (tmp_path / "out").exists()


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
        ('{"num_pairs": 0}', "--num_pairs"),
        ('{"buckets": "17x64"}', "--buckets"),
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
