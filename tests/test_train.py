import csv
import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from components import build_pipeline, build_transformer, make_clip
from diffusers import AutoencoderKLWan
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.backends import cuda
from transformers import PreTrainedModel


SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"
sys.path.insert(0, str(SCRIPT.parent))

import train  # noqa: E402

from rvedit_diffusers import (  # noqa: E402
    RVEDiTPipeline,
    RVEDiTTokenDistiller,
    RVEDiTTransformer3DModel,
    read_video,
    write_video,
)
from rvedit_diffusers.training import adapters  # noqa: E402
from rvedit_diffusers.training.branches import EditingBranches  # noqa: E402


BUCKET = "5x32x32"
LORA = ("--lora_rank=2",)
FULL = ("--training_type=full", "--train_distiller=none")
ALL = ("--training_type=full",)
CONNECT = ("--stage=connect",)
QUIET = ("--validation_steps=0", "--report_to=none")


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
    """Three pairs of files that differ in rate, length and size, and one that is broken."""
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


def arguments(model, cache, output, *options):
    values = {"model": model, "cache_dir": cache, "output": output, "train_batch_size": 4}
    if not any(option.startswith("--train_data=") for option in options):
        values["num_pairs"] = 16
    values |= {"buckets": BUCKET, "learning_rate": 1e-2, "lr_warmup_steps": 1}
    if "--stage=connect" not in options:
        values["align_warmup_steps"] = 1
    values |= {
        "num_workers": 0,
        "logging_steps": 1,
        "checkpointing_steps": 3,
        "num_validation_edits": 1,
    }
    if not any(
        option.startswith("--validation_data=") and option != "--validation_data=synthetic" for option in options
    ):
        values["num_validation_pairs"] = 2
    return [*(f"--{name}={value}" for name, value in values.items()), *options]


def run(model, cache, output, *options):
    train.main(arguments(model, cache, output, *options))
    return read_log(output)


def read_log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def tensors(folder):
    """All tensors of all files below a folder, by file and name."""
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(Path(folder).rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_equal(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys() and first
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []


def run_until_checkpoint(model, cache, output, *options):
    """Die right after the first checkpoint was written."""
    save = train.save_checkpoint

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, cache, output, *options)


@pytest.mark.parametrize(
    "options",
    [
        (*LORA, "--lora_dropout=0.3", "--ema_decay=0.9"),
        (*FULL, "--lr_scheduler=cosine", "--gradient_accumulation_steps=2", "--train_batch_size=2"),
        (*FULL, "--optimizer=muon", "--train_distiller=connectors", "--train_text_encoder"),
        (*ALL, "--optimizer=NAdam", "--ema_decay=0.9"),
        (*CONNECT, "--ema_decay=0.9"),
        (*CONNECT, "--train_distiller=connectors", "--gradient_checkpointing", "--optimizer=muon"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(model, cache, tmp_path, options):
    options = ("--max_train_steps=6", *QUIET, *options)  # an epoch has 4, checkpoints are at 3 and 6
    run(model, cache, tmp_path / "whole", *options)
    run_until_checkpoint(model, cache, tmp_path / "parts", *options)
    assert [path.name for path in train.checkpoints(tmp_path / "parts")] == ["checkpoint-3"]
    run(model, cache, tmp_path / "parts", *options, "--resume_from_checkpoint=latest")
    assert_equal(tmp_path / "whole" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6")
    for kind in ("lora", "pipeline"):
        assert (tmp_path / "whole" / kind).exists() == (tmp_path / "parts" / kind).exists()
        if (tmp_path / "whole" / kind).exists():
            assert_equal(tmp_path / "whole" / kind, tmp_path / "parts" / kind)
    without_time = [
        [{k: v for k, v in entry.items() if k != "seconds_per_step"} for entry in read_log(tmp_path / part)]
        for part in ("whole", "parts")
    ]
    assert without_time[0] == without_time[1]


def test_it_trains_on_levels_of_the_benchmark(model, tmp_path):
    options = ("--max_train_steps=2", "--levels", "L3", "L5", *QUIET, *LORA)
    log = run(model, tmp_path / "cache", tmp_path / "out", *options)
    assert len(log) == 2 and all(math.isfinite(entry["flow"]) for entry in log)
    state = train.read_state(tmp_path / "out" / "checkpoint-2")
    assert state["config"]["levels"] == ["L3", "L5"]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(model, cache, tmp_path):
    options = ("--max_train_steps=40", "--checkpointing_steps=1", "--checkpoints_total_limit=2", *QUIET, *LORA)
    run(model, cache, tmp_path / "whole", *options)
    argv = arguments(model, cache, tmp_path / "parts", *options, "--resume_from_checkpoint=latest")
    rng, kills, in_writing = random.Random(0), 0, 0
    while kills < 20:
        process = subprocess.Popen([sys.executable, SCRIPT, *argv], stderr=subprocess.PIPE, text=True)
        begun = len(train.checkpoints(tmp_path / "parts"))
        while process.poll() is None and len(train.checkpoints(tmp_path / "parts")) == begun == 0:
            time.sleep(0.01)  # the first run writes one, so that all others have to go on
        wanted = rng.random() < 0.5  # half of the time, a checkpoint is being written when it dies
        deadline = time.monotonic() + rng.uniform(5, 12)
        while process.poll() is None and time.monotonic() < deadline:
            if wanted and list((tmp_path / "parts").glob("checkpoint-*.partial")) and rng.random() < 0.2:
                break
            time.sleep(0.002)
        in_writing += bool(list((tmp_path / "parts").glob("checkpoint-*.partial")))
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL), process.stderr.read()
        process.stderr.close()
        kills += 1
        if (
            tmp_path / "parts" / "lora"
        ).exists():  # it was faster: what it has done since its checkpoint is taken back
            for name in ("lora", "checkpoint-40"):
                subprocess.run(["rm", "-r", tmp_path / "parts" / name], check=True)
    subprocess.run([sys.executable, SCRIPT, *argv], check=True)
    assert in_writing > 0
    assert_equal(tmp_path / "whole" / "checkpoint-40", tmp_path / "parts" / "checkpoint-40")
    assert not list((tmp_path / "parts").glob("*.partial")) and len(train.checkpoints(tmp_path / "parts")) == 2


def test_accumulated_micro_batches_are_one_large_batch(model, cache, tmp_path):
    options = ("--max_train_steps=3", "--mixed_precision=no", *QUIET, *FULL)
    whole = run(model, cache, tmp_path / "whole", *options)
    options += ("--train_batch_size=2", "--gradient_accumulation_steps=2")
    parts = run(model, cache, tmp_path / "parts", *options)
    for first, second in zip(whole, parts, strict=True):
        for name in ("flow", "align", "gradient_norm"):
            assert first[name] == pytest.approx(second[name], rel=1e-3), name


def test_checkpoints_hold_what_the_pipeline_loads(model, cache, tmp_path):
    run(model, cache, tmp_path, "--max_train_steps=3", *QUIET, *ALL)
    pipe = RVEDiTPipeline.from_pretrained(tmp_path / "pipeline")
    for kind, name in ((RVEDiTTransformer3DModel, "transformer"), (RVEDiTTokenDistiller, "distiller")):
        loaded = kind.from_pretrained(tmp_path / "checkpoint-3" / name).state_dict()
        for key, tensor in getattr(pipe, name).state_dict().items():
            assert torch.equal(tensor, loaded[key]), f"{name}: {key}"


def test_a_checkpoint_of_lora_loads_with_its_alpha(model, cache, tmp_path):
    run(model, cache, tmp_path, "--max_train_steps=3", *QUIET, *LORA, "--lora_alpha=6")
    for folder in (tmp_path / "lora", tmp_path / "checkpoint-3" / "lora"):
        pipe = RVEDiTPipeline.from_pretrained(model)
        pipe.load_lora_weights(folder)
        assert pipe.transformer.peft_config["default_0"].lora_alpha == 6
        adapted = pipe.transformer.state_dict()
        for name, tensor in load_file(folder / "pytorch_lora_weights.safetensors").items():
            layer, _, kind = name.removeprefix("transformer.").rpartition(".")
            assert torch.equal(adapted[f"{layer}.default_0.{kind}"], tensor)


def test_checkpoint_records_where_the_run_stands(model, cache, tmp_path):
    run(model, cache, tmp_path, "--max_train_steps=6", *QUIET, *LORA)
    state = train.read_state(tmp_path / "checkpoint-6")
    assert (state["step"], state["epoch"], state["cursor"]) == (6, 1, 2)
    assert state["config"]["lora_rank"] == 2 and state["config"]["pairs"] == 16
    assert state["versions"]["torch"] in torch.__version__


def test_only_the_last_checkpoints_are_kept(model, cache, tmp_path):
    options = ("--max_train_steps=4", "--checkpointing_steps=1", "--checkpoints_total_limit=2")
    run(model, cache, tmp_path, *options, *QUIET, *LORA)
    assert [path.name for path in train.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_the_result_is_the_moving_average(model, cache, tmp_path):
    run(model, cache, tmp_path, "--max_train_steps=3", "--ema_decay=0.9", *QUIET, *LORA)
    assert_equal(tmp_path / "lora", tmp_path / "checkpoint-3" / "ema" / "lora")
    last, mean = tensors(tmp_path / "checkpoint-3" / "lora"), tensors(tmp_path / "lora")
    assert all(not torch.equal(last[name], mean[name]) for name in last)


@pytest.mark.parametrize(
    "before, after, message",
    [
        ((), ("--learning_rate=0.5",), "learning_rate: 0.01 -> 0.5"),
        ((), ("--num_pairs=12",), "pairs: 16 -> 12"),
        ((), ("--train_batch_size=2",), "batch size of all processes: 4 -> 2"),
        (("--lora_rank=3",), (), "lora_rank: 3 -> 2"),
        ((), ("--optimizer=muon", "--allow_config_change"), "--optimizer has to be adamw, whose state"),
    ],
)
def test_another_run_is_not_gone_on_with(model, cache, tmp_path, capsys, before, after, message):
    options = ("--max_train_steps=1", *QUIET, *LORA)
    run(model, cache, tmp_path, *options, *before)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as error:
        run(model, cache, tmp_path, *options, *after, "--resume_from_checkpoint=latest")
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_other_weights_are_not_gone_on_with(model, cache, tmp_path, capsys):
    options = ("--max_train_steps=1", *QUIET, *LORA)
    run(model, cache, tmp_path / "out", *options)
    AcceleratorState._reset_state(reset_partial_state=True)
    pipe = RVEDiTPipeline.from_pretrained(model)
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1.0)
        next(pipe.vae.parameters()).add_(1.0)
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        run(tmp_path / "other", cache, tmp_path / "out", *options, "--resume_from_checkpoint=latest")
    message = capsys.readouterr().err
    assert "transformer (hash)" in message and "encoders (hash)" in message


def test_a_change_can_be_allowed(model, cache, tmp_path):
    run(model, cache, tmp_path, "--max_train_steps=2", *QUIET, *LORA)
    AcceleratorState._reset_state(reset_partial_state=True)
    options = ("--max_train_steps=4", "--resume_from_checkpoint=latest", "--allow_config_change", *QUIET, *LORA)
    assert [entry["step"] for entry in run(model, cache, tmp_path, *options)] == [1, 2, 3, 4]


def test_an_earlier_run_is_not_written_over(model, cache, tmp_path, capsys):
    run(model, cache, tmp_path, "--max_train_steps=1", *QUIET, *LORA)
    with pytest.raises(SystemExit) as error:
        run(model, cache, tmp_path, "--max_train_steps=1", *QUIET, *LORA)
    assert error.value.code == 2 and "--resume_from_checkpoint" in capsys.readouterr().err


def test_going_back_to_an_earlier_checkpoint_does_not_mix_with_later_ones(model, cache, tmp_path, capsys):
    options = ("--checkpointing_steps=1", *QUIET, *LORA)
    run(model, cache, tmp_path, "--max_train_steps=10", *options)
    AcceleratorState._reset_state(reset_partial_state=True)
    back = ("--max_train_steps=10", f"--resume_from_checkpoint={tmp_path / 'checkpoint-9'}", *options)
    with pytest.raises(SystemExit) as error:
        run(model, cache, tmp_path, *back)
    assert error.value.code == 2 and "holds checkpoint-10, which is later than" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert run(model, cache, tmp_path, *back)[-1]["step"] == 10


@pytest.mark.parametrize(
    "options, words",
    [
        (("--lora_rank=3",), "holds other parameters than transformer"),
        (("--ema_decay=0.9",), "holds no moving average"),
        (("--align_loss=cosine",), "the alignment heads have the shapes"),
        (("--align_blocks", "0"), "the alignment heads have the shapes"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_a_line(model, cache, tmp_path, capsys, options, words):
    run(model, cache, tmp_path, "--max_train_steps=1", *QUIET, *LORA)
    AcceleratorState._reset_state(reset_partial_state=True)
    again = ("--max_train_steps=2", "--resume_from_checkpoint=latest", "--allow_config_change", *QUIET, *LORA)
    with pytest.raises(SystemExit) as error:
        run(model, cache, tmp_path, *again, *options)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_a_complete_run_that_is_started_again_keeps_its_card(model, cache, tmp_path):
    options = ("--max_train_steps=2", *QUIET, *LORA)
    run(model, cache, tmp_path, *options)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "| flow, last |" in card
    AcceleratorState._reset_state(reset_partial_state=True)
    run(model, cache, tmp_path, *options, "--resume_from_checkpoint=latest")
    assert (tmp_path / "lora" / "README.md").read_text() == card


def test_what_has_no_instruction_is_not_aligned(model, cache, tmp_path):
    """Both branches are the same there, and their agreement is no information about the edit."""
    options = ("--max_train_steps=2", "--align_weight=1", *QUIET, *LORA)
    entries = run(model, cache, tmp_path, "--drop_all=0", "--drop_instruction=1", *options)
    assert all("align" not in entry and "information_nats" not in entry for entry in entries)
    assert all(entry["flow"] > 0 for entry in entries)


def test_what_learns_and_what_is_frozen(model, cache, tmp_path):
    options = ("--training_type=full", "--train_distiller=connectors", "--train_text_encoder")
    run(model, cache, tmp_path, "--max_train_steps=2", *QUIET, *options)
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


def test_full_training_learns_the_queries_through_the_mllm(model, cache, tmp_path):
    run(model, cache, tmp_path, "--max_train_steps=2", *QUIET, *ALL)
    before, after = RVEDiTPipeline.from_pretrained(model), RVEDiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert not torch.equal(before.distiller.queries, after.distiller.queries)
    for key, tensor in before.mllm.state_dict().items():
        assert torch.equal(tensor, after.mllm.state_dict()[key]), key


def test_connecting_brings_the_loss_of_a_converted_model_to_that_of_its_base(model, cache, tmp_path):
    options = ("--max_train_steps=40", "--validation_steps=20", "--num_validation_edits=0", "--report_to=none")
    log = run(model, cache, tmp_path, *options, *CONNECT, "--mixed_precision=no")
    assert log[0]["step"] == 0 and log[-1]["connect"] < 0.5 * log[1]["connect"]
    base = log[0]["validation_flow_base"]
    distances = [abs(entry["validation_flow"] - base) for entry in log if "validation_flow" in entry]
    assert len(distances) == 3 and distances[-1] < 0.5 * distances[0]


def test_connecting_changes_the_queries_and_the_editing_tokens_connector_alone(model, cache, tmp_path):
    run(model, cache, tmp_path, "--max_train_steps=2", *QUIET, *CONNECT)
    before, after = (tensors(path / "distiller") for path in (model, tmp_path / "pipeline"))
    changed = {name.split(": ")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name.split(": ")[1] for name in before if "visual_connector" not in name}
    for name in ("transformer", "mllm", "vae", "text_encoder"):
        assert_equal(model / name, tmp_path / "pipeline" / name)


@pytest.mark.parametrize("names, given", [("video,caption", ()), ("file_name,text", ("file_name", "text"))])
def test_captioned_clips_are_read_from_a_table_of_clips(model, tmp_path, capsys, names, given):
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", make_clip(12, seed=number), fps=8)
    (tmp_path / "metadata.csv").write_text(f"{names}\n0.mp4,a red square\n1.mp4,a square\n")
    options = ("--max_train_steps=1", f"--train_data={tmp_path}", "--num_validation_pairs=1", "--train_batch_size=1")
    options += tuple(f"--{name}_column={column}" for name, column in zip(("source", "instruction"), given))
    run(model, tmp_path / "cache", tmp_path / "out", *options, *QUIET, *CONNECT)
    assert "1 pairs to train on, 1 to validate on" in capsys.readouterr().out


def test_the_estimate_of_connecting_counts_the_distiller(model, tmp_path, capsys):
    run_dry = ("--dry_run", "--gradient_checkpointing", *QUIET, *CONNECT)
    train.main(arguments(model, tmp_path / "cache", tmp_path / "out", *run_dry))
    output = capsys.readouterr().out
    assert "besides: the MLLM, which runs in every step\n" in output and "distiller" not in output
    size = sum(
        tensor.nbytes for name, tensor in tensors(model / "distiller").items() if "visual_connector" not in name
    )
    line = next(line for line in output.splitlines() if line.startswith("optimizer"))
    assert float(line.split()[1]) == pytest.approx(2 * size / 2**20, abs=0.01)
    size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    line = next(line for line in output.splitlines() if line.startswith("pipeline"))
    assert float(line.split()[1]) == pytest.approx(size / 2**20, abs=0.01)


def test_what_does_not_learn_is_counted_at_half_size_when_connecting(model, tmp_path, capsys):
    sizes = []
    for precision in ("no", "bf16"):
        options = ("--dry_run", f"--mixed_precision={precision}", *QUIET, *CONNECT)
        train.main(arguments(model, tmp_path / "cache", tmp_path / "out", *options))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("weights"))
        sizes.append(float(line.split()[1]))
        AcceleratorState._reset_state(reset_partial_state=True)
    size = sum(tensor.nbytes for name, tensor in tensors(model / "transformer").items())
    assert sizes[0] - sizes[1] == pytest.approx(size / 2 / 2**20, abs=0.011)


@pytest.mark.parametrize("extension, precision", [("amx_tile", "bf16"), ("avx512_bf16", "bf16"), (None, "no")])
def test_precision_is_what_the_processor_computes_in(model, tmp_path, monkeypatch, extension, precision):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(f"torch.cpu._is_{name}_supported", lambda has=name == extension: has)
    argv = arguments(model, tmp_path, tmp_path / "out")
    assert train.parse_args(argv).mixed_precision == precision
    assert train.parse_args([*argv, "--mixed_precision=bf16"]).mixed_precision == "bf16"


def test_encoders_are_not_in_memory_while_training(model, cache, tmp_path, monkeypatch):
    kinds = (AutoencoderKLWan, PreTrainedModel, RVEDiTTokenDistiller)

    def encoders():
        gc.collect()
        return {id(item): type(item).__name__ for item in gc.get_objects() if isinstance(item, kinds)}

    class Meter(train.LossMeter):  # made right before the loop
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.update({key: name for key, name in encoders().items() if key not in before})

    before, alive = encoders(), {}
    monkeypatch.setattr(train, "LossMeter", Meter)
    run(model, cache, tmp_path / "live", "--max_train_steps=1", *QUIET, *ALL)
    assert {"RVEDiTTokenDistiller", "Qwen2_5_VLForConditionalGeneration"} <= set(alive.values())
    alive.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    before = encoders()
    run(model, cache, tmp_path / "cached", "--max_train_steps=1", *QUIET, *LORA)
    assert set(alive.values()) == set()


@pytest.mark.parametrize(
    "kind, options, says",
    [
        ("FSDP", ["--optimizer=muon"], "--layerwise_casting and --optimizer muon or adamw8bit need whole weights"),
        (
            "FSDP",
            ["--optimizer=adamw8bit"],
            "--layerwise_casting and --optimizer muon or adamw8bit need whole weights",
        ),
        ("FSDP", ["--optimizer=adamw"], None),
        ("DEEPSPEED", ["--optimizer=muon"], "--optimizer muon needs matrices, which DeepSpeed flattens"),
        ("DEEPSPEED", ["--optimizer=adamw8bit"], None),
        ("MULTI_GPU", ["--optimizer=muon"], None),
    ],
)
def test_optimizers_that_do_not_go_with_a_strategy_are_refused(model, cache, tmp_path, kind, options, says):
    args = train.parse_args(arguments(model, cache, tmp_path, *FULL, *options))
    plugin = SimpleNamespace(zero_stage=2)
    accelerator = SimpleNamespace(
        distributed_type=train.DistributedType[kind],
        num_processes=2,
        is_fsdp2=True,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    found = train.unsupported(args, accelerator)
    assert found is None if says is None else found.startswith(says)


@pytest.mark.parametrize("option", ["--layerwise_casting", "--distill_steps=2"])
def test_what_runs_the_model_outside_of_deepspeed_is_refused_there(model, cache, tmp_path, option):
    args = train.parse_args(arguments(model, cache, tmp_path, *LORA, "--gradient_checkpointing", option))
    accelerator = SimpleNamespace(distributed_type=train.DistributedType.DEEPSPEED, num_processes=2)
    assert "run the model outside of DeepSpeed" in train.unsupported(args, accelerator)


def test_a_tracker_keeps_all_of_the_checkpointed_step(model, cache, tmp_path, monkeypatch):
    given, options = [], ("--max_train_steps=2", *QUIET, *LORA)
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *arguments: given.append(arguments[-1]))
    run(model, cache, tmp_path, *options)
    AcceleratorState._reset_state(reset_partial_state=True)
    run(
        model,
        cache,
        tmp_path,
        *options,
        "--max_train_steps=3",
        "--resume_from_checkpoint=latest",
        "--allow_config_change",
    )
    assert given == [{}, {"tensorboard": {"purge_step": 3}}]


def test_a_run_goes_on_with_the_learning_rate_it_is_given(model, cache, tmp_path):
    options = ("--lr_scheduler=cosine", "--lr_warmup_steps=0", *QUIET, *LORA)
    rates = [entry["lr"] for entry in run(model, cache, tmp_path, *options, "--max_train_steps=3")]
    AcceleratorState._reset_state(reset_partial_state=True)
    again = (
        "--max_train_steps=6",
        "--learning_rate=0.001",
        "--resume_from_checkpoint=latest",
        "--allow_config_change",
    )
    rates = [entry["lr"] for entry in run(model, cache, tmp_path, *options, *again)][3:]
    assert rates == pytest.approx([0.001 * (1 + math.cos(math.pi * step / 6)) / 2 for step in (4, 5, 6)])


def test_alignment_that_stops_at_once_never_runs(model, cache, tmp_path):
    options = ("--max_train_steps=2", "--align_weight=0.1", "--align_stop_step=0", *QUIET, *LORA)
    assert all("align" not in entry for entry in run(model, cache, tmp_path, *options))


def test_what_was_learned_outlives_a_validation_that_fails(model, cache, tmp_path, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train, "held_out_loss", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run(model, cache, tmp_path, "--max_train_steps=3", "--validation_steps=2", "--num_validation_pairs=1", *LORA)
    assert [path.name for path in train.checkpoints(tmp_path)] == ["checkpoint-2"]


def test_training_lowers_the_loss(model, cache, tmp_path):
    options = ("--max_train_steps=30", "--align_weight=0", "--mixed_precision=no", "--drop_all=0", "--sigma_shift=1")
    flow = [entry["flow"] for entry in run(model, cache, tmp_path, *options, *QUIET, *FULL)]
    assert sum(flow[-8:]) < 0.9 * sum(flow[:8])


def test_adapters_are_float32_over_a_bfloat16_base():
    transformer = build_transformer().to(torch.bfloat16)
    train.add_lora(transformer)
    kinds = {p.requires_grad: p.dtype for n, p in transformer.named_parameters() if "attn" in n and "norm" not in n}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert all("lora_" in name for name, p in transformer.named_parameters() if p.requires_grad)


def test_offloaded_weights_train_the_same_adapter(model, cache, tmp_path, monkeypatch):
    moved, put = Counter(), adapters._put
    monkeypatch.setattr(adapters, "_put", lambda *given: moved.update([given[1]]) or put(*given))
    options = ("--max_train_steps=2", "--gradient_checkpointing", *QUIET, *LORA)
    run(model, cache, tmp_path / "plain", *options)
    AcceleratorState._reset_state(reset_partial_state=True)
    run(model, cache, tmp_path / "offloaded", *options, "--group_offload")
    assert_equal(tmp_path / "plain" / "lora", tmp_path / "offloaded" / "lora")
    count = sum("lora_A" in name for name in tensors(tmp_path / "plain" / "lora"))
    # of each layer, in two steps: passes of the editing branch, again for its gradients, and of the reference branch
    # as far as it goes; and back as often
    there, back = moved[torch.device("cpu")], moved[None]
    assert 2 * 2 * count < there <= 2 * 3 * count and back == there


def test_weights_are_pinned_many_in_a_block():
    torch.manual_seed(0)
    sizes = [(3, 5), (7,), (40, 2), (1,), (4, 4)]
    dtypes = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.bfloat16, torch.float32]
    values = [torch.randn(size).to(dtype) for size, dtype in zip(sizes, dtypes)]
    parameters = [torch.nn.Parameter(value.clone(), requires_grad=False) for value in values]
    adapters.pin_memory(parameters, block_bytes=192, pinned=False)
    for parameter, value in zip(parameters, values):
        assert parameter.dtype == value.dtype and torch.equal(parameter.float(), value.float())
    blocks = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in parameters}
    assert list(blocks.values()) == [192, 192, 64]  # 30 and 28 bytes, 80 and 2, 64; all from multiples of 64


def test_offloaded_weights_edit_without_a_context(model, cache, tmp_path, monkeypatch):
    def project_context(*given, **named):
        raise AssertionError("the weights are elsewhere")

    monkeypatch.setattr(RVEDiTTransformer3DModel, "project_context", project_context)
    options = ("--max_train_steps=1", "--validation_steps=1", "--num_validation_edits=1", "--report_to=none")
    run(model, cache, tmp_path, *LORA, *options, "--gradient_checkpointing", "--group_offload")
    assert len(list((tmp_path / "validation").rglob("*.png"))) == 1


@pytest.mark.parametrize("stage", [0, 3])
def test_stages_of_deepspeed_that_share_out_nothing_or_weights_are_refused(model, cache, tmp_path, stage):
    args = train.parse_args(arguments(model, cache, tmp_path, *FULL))
    accelerator = SimpleNamespace(
        distributed_type=train.DistributedType.DEEPSPEED,
        num_processes=2,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
    )
    assert train.unsupported(args, accelerator).startswith("DeepSpeed has to be of ZeRO stage 1 or 2")


def test_weights_in_fp8_train_nearly_the_same_adapter(model, cache, tmp_path):
    options = ("--max_train_steps=3", "--align_weight=0", "--gradient_checkpointing", *QUIET, *LORA)
    plain = run(model, cache, tmp_path / "plain", *options)
    AcceleratorState._reset_state(reset_partial_state=True)
    rounded = run(model, cache, tmp_path / "rounded", *options, "--layerwise_casting")
    assert [entry["flow"] for entry in rounded] != [entry["flow"] for entry in plain]
    assert [entry["flow"] for entry in rounded] == pytest.approx([entry["flow"] for entry in plain], rel=0.1)
    learned = [
        torch.cat(
            [value.flatten() for name, value in sorted(tensors(tmp_path / each / "lora").items()) if "lora_B" in name]
        )
        for each in ("plain", "rounded")
    ]  # what begins at zero: other weights would lead elsewhere
    assert torch.cosine_similarity(*learned, dim=0) > 0.97


@pytest.mark.parametrize("optimizer", ["Adafactor", "muon"])
def test_trains_with_other_optimizers(model, cache, tmp_path, optimizer):
    run(model, cache, tmp_path, "--max_train_steps=2", f"--optimizer={optimizer}", *QUIET, *LORA)
    layers = tensors(tmp_path / "lora")
    assert all(tensor.any() for name, tensor in layers.items() if "lora_B" in name)


@pytest.mark.parametrize("loss", ["infonce", "contrast", "cosine", "relational"])
def test_every_way_to_align_trains(model, cache, tmp_path, loss):
    found = set()
    for latents in ("source", "reference"):
        options = (f"--align_loss={loss}", f"--align_reference_latents={latents}", "--align_blocks", "0", "2")
        log = run(model, cache, tmp_path / latents, "--max_train_steps=1", *options, *QUIET, *LORA)
        assert (log[0]["align"] > 0) == (loss != "relational")  # the relations are alike at first, up to the margin
        assert ("information_nats" in log[0]) == (loss in ("infonce", "contrast"))
        found.add(log[0]["align"])
    assert len(found) == (1 if loss == "relational" else 2)


def test_the_alignment_is_learned_with_its_weight_which_rises(model, cache, tmp_path):
    ways = {
        "none": ("--align_weight=0",),
        "little": ("--align_weight=1", "--align_warmup_steps=1000000"),
        "whole": ("--align_weight=1",),
        "warmer": ("--align_weight=1", "--align_temperature=1"),
    }
    found = {}
    for name, options in ways.items():
        run(model, cache, tmp_path / name, "--max_train_steps=2", "--optimizer=SGD", *options, *QUIET, *LORA)
        layers = tensors(tmp_path / name / "lora")
        found[name] = torch.cat([layers[key].flatten() for key in sorted(layers) if "lora_B" in key])
    size = found["none"].norm()
    assert (found["little"] - found["none"]).norm() < 1e-3 * size
    assert (found["whole"] - found["none"]).norm() > 0.01 * size
    assert (found["warmer"] - found["whole"]).norm() > 0.01 * size


def test_what_changes_weighs_more(model, cache, tmp_path):
    options = ("--max_train_steps=1", "--align_weight=0", *QUIET, *LORA)
    flow = [run(model, cache, tmp_path / w, *options, f"--edit_weight={w}")[0]["flow"] for w in ("0", "10")]
    assert flow[0] != flow[1]


def test_gradients_are_clipped_unless_told_otherwise(model, cache, tmp_path):
    sizes = {}
    for most in ("0.001", "0"):
        options = ("--optimizer=SGD", "--weight_decay=0", "--learning_rate=1", f"--max_grad_norm={most}")
        run(model, cache, tmp_path / most, "--max_train_steps=1", "--lr_warmup_steps=0", *options, *QUIET, *LORA)
        layers = tensors(tmp_path / most / "lora")
        sizes[most] = torch.cat([layers[key].flatten() for key in layers if "lora_B" in key]).norm()
    assert 5e-4 < sizes["0.001"] <= 1.001e-3 < 0.1 * sizes["0"]  # the heads have their part of the norm


def test_samples_are_drawn_as_the_options_say(model, cache, tmp_path, monkeypatch):
    given, draw = [], train.Draws
    monkeypatch.setattr(train, "Draws", lambda *values: given.append(draw(*values)) or given[-1])
    options = ("--sigma_shift=2", "--drop_instruction=0.3", "--drop_all=0.2", "--align_tokens=7", "--seed=5")
    run(model, cache, tmp_path, "--max_train_steps=1", *options, *QUIET, *LORA)
    (draws,) = given
    assert (draws.seed, draws.sigma_shift, draws.drop_instruction, draws.drop_all) == (5, 2.0, 0.3, 0.2)
    assert draws.num_positions == 7


def test_a_compiled_and_a_checkpointed_training_are_the_plain_one(model, cache, tmp_path, monkeypatch):
    seen, forward = [], EditingBranches.forward

    def see(branches, batch):
        seen.append((branches.transformer.gradient_checkpointing, branches.transformer.blocks[0]._compiled_call_impl))
        return forward(branches, batch)

    monkeypatch.setattr(EditingBranches, "forward", see)
    compile_blocks = RVEDiTTransformer3DModel.compile_repeated_blocks
    monkeypatch.setattr(
        RVEDiTTransformer3DModel,
        "compile_repeated_blocks",
        lambda model: compile_blocks(model, backend="eager", fullgraph=True),
    )
    logs = {}
    for option in (None, "--gradient_checkpointing", "--compile"):
        options = ("--max_train_steps=2", "--mixed_precision=no", *[option] * (option is not None))
        logs[option] = run(model, cache, tmp_path / str(option), *options, *QUIET, *LORA)
    checkpointing, compiled = zip(*seen)
    assert checkpointing == (False, False, True, True, False, False)
    assert [each is not None for each in compiled] == [False] * 4 + [True] * 2
    for log in logs.values():
        assert [entry["flow"] for entry in log] == pytest.approx([entry["flow"] for entry in logs[None]], rel=1e-4)


def test_other_pairs_validate(model, table, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_video(other / "clip.mp4", make_clip(12, seed=9), fps=8)
    (other / "metadata.csv").write_text("source,edited,instruction\nclip.mp4,clip.mp4,leave it\n")
    options = (f"--train_data={table}", f"--validation_data={other}", "--train_batch_size=2", "--validation_steps=1")
    log = run(model, tmp_path / "cache", tmp_path / "out", "--max_train_steps=1", *options, "--report_to=none", *LORA)
    assert log[0]["validation_flow"] > 0
    assert [path.name for path in (tmp_path / "out" / "validation" / "step-000001").glob("*.png")] == [
        "0-leave-it.png"
    ]


def test_aligned_with_a_twin_or_with_another_pair_it_trains(model, tmp_path):
    options = ("--max_train_steps=2", "--levels", "L2", "--num_validation_edits=0", "--validation_steps=2", *LORA)
    losses = {
        "next": ("--align_loss=contrast",),
        "twin": ("--align_loss=contrast", "--align_negatives=twin"),
        "shuffled": ("--align_reference_tokens=shuffled",),
    }
    logs = {
        name: run(model, tmp_path / "cache", tmp_path / name, *options, "--report_to=none", *loss)
        for name, loss in losses.items()
    }
    for log in logs.values():
        assert len(log) == 2 and log[1]["gradient_norm_align"] > 0
    for name in ("next", "twin"):
        assert logs[name][0]["information_ceiling_nats"] == pytest.approx(math.log(2))
        assert logs[name][0]["information_nats"] == pytest.approx(math.log(2) - logs[name][0]["align"], abs=1e-6)
    assert logs["twin"][0]["align"] != logs["next"][0]["align"]
    card = ModelCard.load(tmp_path / "shuffled" / "lora" / "README.md")
    assert "with the reference tokens of other pairs: a control" in card.text


def test_a_micro_batch_whose_samples_meet_keeps_its_size(model, cache, tmp_path, capsys):
    options = ("--max_train_steps=1", "--align_reference_tokens=shuffled", *QUIET, *LORA)
    run(model, cache, tmp_path, *options)
    AcceleratorState._reset_state(reset_partial_state=True)
    again = ("--train_batch_size=2", "--gradient_accumulation_steps=2", "--resume_from_checkpoint=latest")
    with pytest.raises(SystemExit):
        run(model, cache, tmp_path, *options, *again)
    assert "train_batch_size: 4 -> 2" in capsys.readouterr().err


def test_pairs_are_named_by_a_seed_of_their_own(model, tmp_path):
    options = ("--encode_only", "--num_pairs=4", *LORA)
    found = []
    for seed, data_seed in ((0, 0), (1, 0), (1, None)):
        data = () if data_seed is None else (f"--data_seed={data_seed}",)
        train.main(arguments(model, tmp_path / "cache", tmp_path / "out", *options, f"--seed={seed}", *data))
        found.append({path.name for path in (tmp_path / "cache").glob("*.safetensors")})
    assert len(found[0]) == 4 + 2 + 1  # and the empty instruction
    assert found[1] == found[0] and len(found[2]) == 2 * 6 + 1
    assert not list((tmp_path / "out").iterdir())


def test_alignment_runs_in_its_steps_alone(model, cache, tmp_path):
    options = ("--max_train_steps=6", "--align_every=2", "--align_stop_step=4")
    log = run(model, cache, tmp_path, *options, *QUIET, *LORA)
    assert [entry["step"] for entry in log if "align" in entry] == [1, 3]
    assert "align" not in run(model, cache, tmp_path / "none", "--align_weight=0", "--max_train_steps=1", *QUIET)[0]


def test_steps_without_a_finite_gradient_are_skipped_and_counted(model, tmp_path):
    options = ("--num_pairs=8", "--max_train_steps=4", "--num_validation_pairs=0", *QUIET, *LORA)
    run(model, tmp_path / "cache", tmp_path / "first", *options, "--max_train_steps=1")
    spoilt = next(path for path in (tmp_path / "cache").glob("*.safetensors") if "latents" in load_file(path))
    save_file({k: v * math.nan if k == "latents" else v for k, v in load_file(spoilt).items()}, spoilt)
    AcceleratorState._reset_state(reset_partial_state=True)
    log = run(model, tmp_path / "cache", tmp_path / "second", *options)  # two batches an epoch, one has the pair
    assert [entry["nonfinite"] for entry in log][-1] == 2
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "second" / "lora").values())


def test_too_many_steps_without_a_finite_gradient_end_the_run_with_a_checkpoint(model, tmp_path, capsys):
    options = ("--num_pairs=4", "--max_train_steps=9", "--max_nonfinite=2", *QUIET, *LORA)
    run(model, tmp_path / "cache", tmp_path / "first", *options, "--max_train_steps=1")
    for path in (tmp_path / "cache").glob("*.safetensors"):
        save_file({k: v * math.nan if "latents" in k else v for k, v in load_file(path).items()}, path)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as error:
        run(model, tmp_path / "cache", tmp_path / "second", *options)
    assert error.value.code == 1 and "2 steps in a row" in capsys.readouterr().err
    assert [path.name for path in train.checkpoints(tmp_path / "second")] == ["checkpoint-2"]


def test_a_full_disk_leaves_the_checkpoint_before(model, cache, tmp_path, capsys):
    options = ("--checkpointing_steps=1", *QUIET, *FULL)
    run(model, cache, tmp_path, "--max_train_steps=1", *options)
    before = tensors(tmp_path / "checkpoint-1")
    AcceleratorState._reset_state(reset_partial_state=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # no file may be larger, as if the disk were full
    try:
        with pytest.raises(SystemExit) as error:
            options += ("--resume_from_checkpoint=latest", "--allow_config_change")
            run(model, cache, tmp_path, "--max_train_steps=2", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err
    assert (
        error.value.code == 1 and "checkpoint-2 cannot be written" in message and "checkpoint-1 is intact" in message
    )
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(tmp_path / "checkpoint-1").items())


def test_validation_logs_losses_and_shows_edits(model, cache, tmp_path):
    options = ("--max_train_steps=4", "--validation_steps=2", "--num_validation_edits=2", *LORA)
    log = run(model, cache, tmp_path, *options)
    validated = [entry for entry in log if "validation_flow" in entry]
    assert [entry["step"] for entry in validated] == [2, 4]
    assert {"validation_flow_sigma_0.1", "gradient_norm_flow", "gradient_norm_align"} <= validated[0].keys()
    assert validated[0]["gradient_norm_align"] > 0 and validated[0]["validation_flow"] != log[3]["validation_flow"]
    for step in ("step-000002", "step-000004"):
        clips = sorted((tmp_path / "validation" / step).glob("*.mp4"))
        assert [read_video(clip).frames.shape for clip in clips] == [(5, 32, 32, 3)] * 2
        assert len(list((tmp_path / "validation" / step).glob("*.png"))) == 2
    events = EventAccumulator(str(tmp_path / "rvedit"), {"images": 0}).Reload()
    assert {"flow", "align", "validation_flow"} <= set(events.Tags()["scalars"])
    shown = {tag.partition(" ")[0]: event for tag in events.Tags()["images"] for event in events.Images(tag)}
    assert shown["clip"].encoded_image_string.startswith(b"GIF") and len(events.Tags()["images"]) == 4


def test_validation_does_not_change_what_is_learned(model, cache, tmp_path):
    options = ("--max_train_steps=3", "--report_to=none", *LORA)
    run(model, cache, tmp_path / "with", *options, "--validation_steps=1")
    AcceleratorState._reset_state(reset_partial_state=True)
    run(model, cache, tmp_path / "without", *options, "--validation_steps=0")
    assert_equal(tmp_path / "with" / "lora", tmp_path / "without" / "lora")


def test_the_log_is_drawn_again(model, cache, tmp_path):
    run(model, cache, tmp_path, "--max_train_steps=2", *QUIET, *LORA)
    picture = (tmp_path / "losses.png").read_bytes()
    (tmp_path / "losses.png").unlink()
    train.main([f"--plot={tmp_path}"])
    assert (tmp_path / "losses.png").read_bytes() == picture


def test_nothing_to_draw_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train.main([f"--plot={tmp_path}"])
    assert error.value.code == 2 and str(tmp_path) in capsys.readouterr().err


def test_the_card_tells_what_was_trained(model, cache, tmp_path):
    run(model, cache, tmp_path, "--max_train_steps=2", "--validation_steps=2", "--report_to=none", *LORA)
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.pipeline_tag == "video-to-video" and "lora" in card.data.tags
    assert "| steps | 2 of 4 pairs |" in card.text and "validation flow, last" in card.text
    assert (tmp_path / "lora" / "sample.png").is_file()


def test_the_cards_tell_what_a_converted_base_was_made_from(model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    wan, mllm = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Qwen/Qwen2.5-VL-3B-Instruct"
    record = {"wan": {"source": wan, "revision": None}, "mllm": {"source": mllm, "revision": None}}
    record |= {"parameters": {"mapped": 3, "new": 2, "dropped": 1}}
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"conversion": record}))
    options = ("--max_train_steps=1", "--train_distiller=connectors", *QUIET, *LORA)
    run(base, tmp_path / "cache", tmp_path / "out", *options)
    lora, pipeline = (ModelCard.load(tmp_path / "out" / kind / "README.md") for kind in ("lora", "pipeline"))
    index = json.loads((tmp_path / "out" / "pipeline" / "model_index.json").read_text())
    assert index["conversion"] == record | {"stages": ["edit"]}
    for card, relation in ((lora, "adapter"), (pipeline, "finetune")):
        assert card.data.base_model == [wan, mllm] and card.data["base_model_relation"] == relation
        assert card.data["license_name"] == "qwen-research" and "UNTRAINED" not in card.text
    assert 'from_pretrained("pipeline")' in lora.text and 'load_lora_weights("lora")' in lora.text


def test_a_hub_that_cannot_be_reached_ends_the_run_before_it_begins(model, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    options = ("--push_to_hub", "--hub_model_id=me/edits", *QUIET, *LORA)
    with pytest.raises(SystemExit) as error:
        run(model, cache, tmp_path / "out", *options)
    assert error.value.code == 2 and not (tmp_path / "out").exists()


def test_trains_on_files(model, table, tmp_path, capsys):
    options = ("--max_train_steps=2", f"--train_data={table}", "--train_batch_size=2", "--num_validation_pairs=1")
    log = run(model, tmp_path / "cache", tmp_path / "out", *options, "--validation_steps=2", *LORA)
    assert len(log) == 2 and all(entry["flow"] > 0 for entry in log) and log[1]["validation_flow"] > 0
    for entry in log:
        assert entry["information_nats"] == pytest.approx(math.log(2 * 2 * 2) - entry["align"], abs=1e-4)
    assert (tmp_path / "out" / "lora").is_dir()
    printed = capsys.readouterr().out
    assert "dropped: 1 of 4 pairs" in printed and "broken.mp4" in printed
    assert "2 pairs to train on, 1 to validate on" in printed


def test_an_instruction_with_a_control_token_is_dropped_by_the_scan(model, table, tmp_path, capsys):
    metadata = table / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("make the square blue", "make the square blue<|im_end|>", 1))
    options = (f"--train_data={table}", "--num_validation_pairs=0", "--dry_run")
    train.main(arguments(model, tmp_path / "cache", tmp_path / "out", *options))
    assert "contains '<|im_end|>', a control token" in capsys.readouterr().out


def test_a_dry_run_scans_and_estimates(model, table, tmp_path, capsys):
    options = (f"--train_data={table}", "--dry_run")
    train.main([f"--model={model}", f"--output={tmp_path / 'out'}", "--buckets=5x32x32", *options])
    printed = capsys.readouterr().out
    assert BUCKET in printed and "activations and gradients" in printed and "cache" in printed
    assert "\npipeline" not in printed
    assert [path.name for path in (tmp_path / "out" / "cache").iterdir()] == ["files.jsonl"]


def test_a_dry_run_counts_what_learns_in_float32(model, tmp_path, capsys):
    def size(*folders):
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    half = tmp_path / "half"
    RVEDiTPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).save_pretrained(half)
    train.main([f"--model={half}", f"--output={tmp_path / 'out'}", "--dry_run", "--training_type=full", *QUIET])
    found = re.search(r"\npipeline +([\d.]+) MiB", capsys.readouterr().out)
    learned = [[folder / name for name in ("transformer", "distiller")] for folder in (half, model)]
    expected = size(half) - size(*learned[0]) + size(*learned[1])
    assert float(found[1]) * 2**20 == pytest.approx(expected, abs=0.03 * 2**20)
    assert size(*learned[1]) - size(*learned[0]) > 0.06 * 2**20  # what else would be counted


@pytest.mark.parametrize(
    "options, message",
    [
        (["--strict"], "--strict, but 1 of 4 pairs were dropped"),
        (["--buckets=81x32x32"], "no pair that can be used"),
        (["--buckets=6x32x32"], "4k + 1"),
        (["--columns=openve"], "original_video"),
        (["--train_data=absent"], "absent"),
        (["--num_validation_pairs=3"], "--num_validation_pairs"),
        (["--validation_data=absent"], "--validation_data"),
        (["--validation_data", "{table}"], "other pairs than --train_data, but 3 of its 3 are among them"),
    ],
)
def test_data_that_cannot_be_trained_on_ends_the_run(model, table, tmp_path, capsys, options, message):
    argv = [f"--model={model}", f"--output={tmp_path / 'out'}", f"--train_data={table}", f"--buckets={BUCKET}"]
    with pytest.raises(SystemExit) as error:
        train.main([*argv, *(option.format(table=table) for option in options)])
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_clips_that_all_have_more_edits_than_are_to_be_held_out_are_told(model, table, tmp_path, capsys):
    rows = "".join(f"0_source.mp4,{number}_edited.mp4,edit {number}\n" for number in range(3))
    (table / "metadata.csv").write_text("source,edited,instruction\n" + rows)
    argv = [f"--model={model}", f"--output={tmp_path / 'out'}", f"--train_data={table}", f"--buckets={BUCKET}"]
    with pytest.raises(SystemExit):
        train.main([*argv, "--num_validation_pairs=1"])
    assert "--num_validation_pairs 1 holds out clips with all of their edits" in capsys.readouterr().err
    train.main([*argv, "--dry_run"])
    assert "3 pairs to train on, 0 to validate on" in capsys.readouterr().out


def test_as_many_scenes_validate_as_are_asked_for(model, table, tmp_path, capsys):
    train.main(arguments(model, tmp_path / "cache", tmp_path / "out", "--num_validation_pairs=16", "--dry_run"))
    assert "16 pairs to train on, 16 to validate on" in capsys.readouterr().out  # scenes are drawn anew
    args = train.parse_args(
        arguments(model, tmp_path, tmp_path, f"--train_data={table}", "--validation_data=synthetic")
    )
    assert len(train.load_pairs(args, "validation_data", SimpleNamespace(default_fps=8.0), (4, 16))) == 2


def test_gradients_that_the_launcher_accumulates_otherwise_end_the_run(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(SystemExit) as error:
        run(model, tmp_path / "cache", tmp_path / "out", "--gradient_accumulation_steps=2", *LORA)
    assert error.value.code == 2 and not (tmp_path / "out").exists()
    message = "--gradient_accumulation_steps is 2, but accelerate's config file or the variable"
    assert message in capsys.readouterr().err


def test_a_table_is_read_before_any_model(model, table, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "vae" / "config.json").unlink()
    argv = [f"--model={base}", f"--output={tmp_path / 'out'}", f"--buckets={BUCKET}", f"--train_data={table}"]
    for options, message in ((["--columns=openve"], "original_video"), ([], "--model")):
        with pytest.raises(SystemExit):
            train.main([*argv, *options])
        assert message in capsys.readouterr().err


def test_options_of_the_command_line_go_before_those_of_the_file(model, tmp_path):
    config = tmp_path / "config.json"
    values = {"model": str(model), "align_blocks": [0, 1], "max_train_steps": 3, "optimizer_args": {"eps": 1e-6}}
    config.write_text(json.dumps(values | {"compile": True, "push_to_hub": False}))
    args = train.parse_args([f"--config={config}", "--output=out", "--max_train_steps=7"])
    assert (args.model, args.align_blocks, args.max_train_steps) == (str(model), [0, 1], 7)
    assert args.compile and args.optimizer_args == {"eps": 1e-6}


@pytest.mark.parametrize(
    "values, word",
    [
        ('{"setps": 3}', "setps"),
        ('{"max_train_steps": 0}', "--max_train_steps"),
        ('{"optimizer": "Lion"}', "--optimizer"),
        ('{"lr_scheduler": "piecewise_constant"}', "--lr_scheduler"),
        ('{"optimizer_args": {"speed": 3}}', "speed"),
        ('{"num_pairs": 0}', "--num_pairs"),
        ('{"buckets": "17x64"}', "--buckets"),
        ('{"train_data": "pairs.csv"}', "--buckets is required"),
        ('{"train_batch_size": 0}', "--train_batch_size"),
        ('{"drop_all": 0.6, "drop_instruction": 0.6}', "--drop_all"),
        ('{"ema_decay": 1.5}', "--ema_decay"),
        ('{"lora_targets": ["to_x"]}', "to_x"),
        ('{"align_blocks": [7]}', "align_blocks"),
        (
            '{"training_type": "full", "layerwise_casting": true, "gradient_checkpointing": true}',
            "are for frozen weights",
        ),
        ('{"training_type": "full", "lora_targets": "to_q"}', "--lora_targets is for --training_type lora"),
        ('{"lr_scheduler": "constant", "lr_warmup_steps": 5}', "--lr_warmup_steps is for schedulers with a warmup"),
        ('{"validation_data": "pairs.csv", "num_validation_pairs": 4}', "--num_validation_pairs is of pairs that are"),
        ('{"group_offload": true}', "--group_offload needs --gradient_checkpointing"),
        ('{"layerwise_casting": true}', "--layerwise_casting needs --gradient_checkpointing"),
        ('{"push_to_hub": true}', "--hub_model_id"),
        ('{"align_loss": "contrast"}', "--train_batch_size"),
        ('{"align_reference_tokens": "shuffled"}', "--train_batch_size"),
        ('{"align_loss": "contrast", "align_reference_tokens": "shuffled"}', "--align_reference_tokens"),
        ('{"align_negatives": "twin"}', "--align_loss contrast"),
        ('{"align_ignore_radius": 1, "align_loss": "cosine"}', "--align_ignore_radius is for --align_loss infonce"),
        ('{"align_negatives": "twin", "align_loss": "contrast"}', "--levels"),
        (
            '{"align_negatives": "twin", "align_loss": "contrast", "levels": ["L1"], "training_type": "full"}',
            "--train_distiller connectors",
        ),
        ('{"stage": "connect", "lora_rank": 8, "align_loss": "cosine"}', "--lora_rank, --align_loss"),
        ('{"stage": "connect", "training_type": "full"}', "--training_type"),
        (
            '{"stage": "connect", "columns": "kiwi-edit", "train_data": "clips.csv", "buckets": "5x32x32"}',
            "--columns kiwi-edit",
        ),
        ('{"train_data": "pairs.csv", "num_pairs": 4}', "--num_pairs is for --train_data synthetic"),
        ('{"train_data": "pairs.csv", "operations": ["remove"]}', "--operations is for --train_data synthetic"),
        ('{"train_data": "pairs.csv", "edits_per_scene": 2}', "--edits_per_scene is for --train_data synthetic"),
        (
            '{"train_data": "pairs.csv", "validation_data": "synthetic", "num_pairs": 4}',
            "--num_pairs is for --train_data synthetic",
        ),
        ('{"strict": true}', "--strict is for tables of pairs"),
        ('{"columns": "ditto"}', "--columns is for tables of pairs"),
        ('{"source_column": "clip"}', "--source_column is for tables of pairs"),
        ('{"stage": "connect", "levels": ["L1"]}', "--levels"),
        ('{"levels": ["L1"], "operations": ["remove"]}', "--operations"),
        (
            '{"levels": ["L1"], "train_data": "pairs.csv", "buckets": "5x32x32"}',
            "--levels is for --train_data synthetic",
        ),
        ('{"kinds": ["grade"]}', "--kinds is for --levels"),
        ('{"levels": ["L1", "L4"], "kinds": ["remove", "grade"]}', "L4 has none of"),
        ('{"levels": ["OOD"]}', "--levels"),
        ('{"validation_data": "synthetic"}', "--validation_data synthetic would be what is trained on"),
        ('{"stage": "connect", "train_distiller": "none"}', "--train_distiller none"),
        ('{"resume_from_checkpoint": "absent"}', "absent"),
        ("[]", "--config"),
        ("{", "--config"),
    ],
)
def test_wrong_options_end_before_anything_is_encoded(model, tmp_path, capsys, values, word):
    config = tmp_path / "config.json"
    config.write_text(values)
    with pytest.raises(SystemExit) as error:
        train.main([f"--model={model}", f"--output={tmp_path / 'out'}", f"--config={config}"])
    said = capsys.readouterr().err.rpartition("error:")[2]  # behind the usage, which names every option
    assert error.value.code == 2 and word in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, value, given",
    [("source_channels", None, ()), ("source_channels", 4, ()), ("in_channels", 4, ()), ("in_channels", 4, CONNECT)],
)
def test_a_transformer_that_does_not_read_the_latents_is_refused(model, cache, tmp_path, capsys, name, value, given):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    config = base / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(SystemExit) as error:
        run(base, cache, tmp_path / "out", *QUIET, *given)
    said = capsys.readouterr().err
    assert error.value.code == 2 and f"`transformer` has to have the {name} 16" in said and f"but has {value}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["no-such-folder", "."])
def test_a_model_that_is_no_pipeline_is_refused(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as error:
        train.main([f"--model={tmp_path / name}", f"--output={tmp_path / 'out'}"])
    assert error.value.code == 2 and "--model" in capsys.readouterr().err


# The same script on two processes, which talk through gloo.
TWO_PROCESSES = ("--max_train_steps=6", "--mixed_precision=no", "--report_to=none", "--validation_steps=3")
TWO_PROCESSES += ("--ema_decay=0.9",)
KINDS = {
    "lora": LORA,
    "full": (*FULL, "--train_distiller=connectors"),
    "connect": (*CONNECT, "--train_distiller=connectors"),
}


@pytest.fixture(scope="module")
def runs_of_two(tmp_path_factory, model):
    """`single` of one process; `ddp`, `parts` (3 steps, then 3 more) and `fsdp2` of two."""
    folder = tmp_path_factory.mktemp("runs")
    cache, launches = folder / "cache", {"ddp": [], "fsdp2": []}
    for kind, options in KINDS.items():
        run(model, cache, folder / kind / "single", *TWO_PROCESSES, *options)
        AcceleratorState._reset_state(reset_partial_state=True)
        ddp, parts, fsdp2 = (
            arguments(model, cache, folder / kind / name, *TWO_PROCESSES, *options, "--train_batch_size=2")
            for name in ("ddp", "parts", "fsdp2")
        )
        again = [*parts, "--resume_from_checkpoint=latest", "--allow_config_change"]
        launches["ddp"] += [ddp, [*parts, "--max_train_steps=3"], again]
        launches["fsdp2"].append(fsdp2)
    # each process orthogonalises a share of the matrices
    muon = (*TWO_PROCESSES, *FULL, "--optimizer=muon", "--max_train_steps=3")
    run(model, cache, folder / "muon" / "single", *muon)
    AcceleratorState._reset_state(reset_partial_state=True)
    launches["ddp"].append(arguments(model, cache, folder / "muon" / "ddp", *muon, "--train_batch_size=2"))
    # with an MLLM in every step, at the precision that GPUs have
    live = (*TWO_PROCESSES, *CONNECT, "--mixed_precision=bf16", "--max_train_steps=2")
    run(model, cache, folder / "live" / "single", *live)
    AcceleratorState._reset_state(reset_partial_state=True)
    launches["fsdp2"].append(arguments(model, cache, folder / "live" / "fsdp2", *live, "--train_batch_size=2"))
    for wrapper, runs in launches.items():
        launch(wrapper, runs)
    return folder


def launch(wrapper, runs):
    worker = Path(__file__).with_name("train_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker]
    done = subprocess.run(
        [*command, wrapper, json.dumps([list(map(str, argv)) for argv in runs])],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-9000:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_losses_of_two_processes_are_those_of_one_process(runs_of_two, kind, wrapper):
    single, double = read_log(runs_of_two / kind / "single"), read_log(runs_of_two / kind / wrapper)
    for first, second in zip(single, double, strict=True):
        names = {"flow", "align", "connect", "gradient_norm", "validation_flow", "validation_flow_base"}
        for name in names & first.keys():
            assert first[name] == pytest.approx(second[name], rel=1e-3), (first["step"], name)


def test_muon_of_two_processes_is_that_of_one(runs_of_two, model):
    begun, single, double = (
        tensors(folder / "transformer")
        for folder in (model, *(runs_of_two / "muon" / name / "checkpoint-3" for name in ("single", "ddp")))
    )
    matrices = [name for name in begun if ".attn1.to_" in name and name.endswith("weight")]
    assert len(matrices) > 4
    for name in matrices:
        moved = (single[name] - begun[name]).abs().mean()
        assert moved > 1e-3 and (double[name] - single[name]).abs().mean() < 0.02 * moved, name


def test_noise_levels_and_positions_are_not_rounded_by_the_wrapper(runs_of_two):
    single, double = read_log(runs_of_two / "live" / "single"), read_log(runs_of_two / "live" / "fsdp2")
    for first, second in zip(single, double, strict=True):
        for name in {"connect", "validation_flow", "validation_flow_base"} & first.keys():
            assert first[name] == pytest.approx(second[name], rel=0.02), (first["step"], name)
        bands = {name for name in first if "_sigma_" in name}
        assert bands == {name for name in second if "_sigma_" in name}


@pytest.mark.parametrize("wrapper", ["single", "ddp", "fsdp2"])
def test_a_model_is_saved_under_its_own_name(runs_of_two, wrapper):
    configs = list((runs_of_two / "full" / wrapper).rglob("transformer/config.json"))
    assert configs
    assert {json.loads(path.read_text())["_class_name"] for path in configs} == {"RVEDiTTransformer3DModel"}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resumed_equal_uninterrupted_bit_for_bit(runs_of_two, kind):
    assert_equal(runs_of_two / kind / "ddp" / "checkpoint-6", runs_of_two / kind / "parts" / "checkpoint-6")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_one_process_goes_on_from_a_checkpoint_of_two(runs_of_two, model, tmp_path, kind, wrapper):
    checkpoint = f"--resume_from_checkpoint={runs_of_two / kind / wrapper / 'checkpoint-3'}"
    run(model, runs_of_two / "cache", tmp_path, *TWO_PROCESSES, *KINDS[kind], checkpoint)
    single, gone_on = tensors(runs_of_two / kind / "single" / "checkpoint-6"), tensors(tmp_path / "checkpoint-6")
    assert single.keys() == gone_on.keys()
    for name, tensor in single.items():
        torch.testing.assert_close(gone_on[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_show_every_edit_once(runs_of_two, wrapper):
    names = [path.name for path in sorted((runs_of_two / "lora" / wrapper / "validation").rglob("*.mp4"))]
    assert names == [path.name for path in sorted((runs_of_two / "lora" / "single" / "validation").rglob("*.mp4"))]


@pytest.mark.slow
def test_deepspeed_trains_as_one_process_does_and_goes_on_bit_for_bit(model, tmp_path):
    pytest.importorskip("deepspeed")
    options = (*TWO_PROCESSES, *LORA)
    run(model, tmp_path / "cache", tmp_path / "single", *options)
    whole, parts = (
        arguments(model, tmp_path / "cache", tmp_path / name, *options, "--train_batch_size=2")
        for name in ("whole", "parts")
    )
    launch("deepspeed", [whole])
    launch("deepspeed", [[*parts, "--max_train_steps=3"]])
    launch("deepspeed", [[*parts, "--resume_from_checkpoint=latest", "--allow_config_change"]])
    for first, second in zip(read_log(tmp_path / "single"), read_log(tmp_path / "whole"), strict=True):
        names = {"flow", "align", "connect", "gradient_norm", "validation_flow", "validation_flow_base"}
        for name in names & first.keys():
            assert first[name] == pytest.approx(second[name], rel=1e-3), (first["step"], name)
    assert_equal(tmp_path / "whole" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6")
    assert_equal(tmp_path / "whole" / "lora", tmp_path / "parts" / "lora")
