import json
import resource

import pytest
import torch
from components import build_transformer
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from rvedit_diffusers import RVEDiTTokenDistiller, RVEDiTTransformer3DModel
from rvedit_diffusers.files import replace_folder
from rvedit_diffusers.training.adapters import add_lora
from rvedit_diffusers.training.checkpoint import (
    averaged,
    checkpoints,
    differences,
    export,
    keep_latest,
    load_checkpoint,
    load_weights,
    open_log,
    prune_checkpoints,
    read_log,
    read_state,
    save_checkpoint,
)


def build(optimizer=torch.optim.AdamW, seed=0, **settings):
    """A distiller and an alignment head that have learned for two steps."""
    torch.manual_seed(seed)
    modules, heads = {"distiller": RVEDiTTokenDistiller(8, 8, 2)}, nn.Linear(8, 3)
    parameters = [*modules["distiller"].parameters(), *heads.parameters()]
    optimizer = optimizer(parameters, lr=1e-2, **settings)
    learn(modules, heads, optimizer)
    return modules, heads, optimizer


def learn(modules, heads, optimizer, steps=2):
    for _ in range(steps):
        for parameter in [*modules["distiller"].parameters(), *heads.parameters()]:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        optimizer.step()


def values(modules, heads):
    return {**modules["distiller"].state_dict(), **heads.state_dict()}


@pytest.mark.parametrize(
    "optimizer, settings",
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.Rprop, {}),
    ],
)
def test_learning_goes_on_bit_for_bit(tmp_path, optimizer, settings):
    whole = build(optimizer, **settings)
    assert save_checkpoint(tmp_path / "checkpoint-2", *whole, {"step": 2}) is None
    learn(*whole)
    parts = build(optimizer, seed=1, **settings)
    assert load_checkpoint(tmp_path / "checkpoint-2", *parts)["step"] == 2
    learn(*parts)
    for name, value in values(*whole[:2]).items():
        assert torch.equal(value, values(*parts[:2])[name]), name


def test_a_state_of_numbers_is_kept(tmp_path):
    modules, heads, optimizer = build()
    optimizer.state[heads.weight]["seen"] = 7
    save_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer, {})
    modules, heads, optimizer = build(seed=1)
    load_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer)
    assert optimizer.state[heads.weight]["seen"] == 7


def test_the_moving_average_goes_on(tmp_path):
    modules, heads, optimizer = build()
    parameters = list(modules["distiller"].parameters())
    ema = EMAModel(parameters, 0.5)
    for _ in range(3):
        learn(modules, heads, optimizer)
        ema.step(parameters)
    save_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer, {}, ema, parameters)
    again, heads, optimizer = build(seed=1)
    copies = list(again["distiller"].parameters())
    other = EMAModel(copies, 0.5)
    load_checkpoint(tmp_path / "checkpoint-2", again, heads, optimizer, other, copies)
    for first, second, parameter, copy in zip(ema.shadow_params, other.shadow_params, parameters, copies, strict=True):
        assert torch.equal(first, second) and torch.equal(parameter, copy) and not torch.equal(first, parameter)
    assert other.optimization_step == 3


def test_a_checkpoint_without_average_has_none_to_go_on_with(tmp_path):
    modules, heads, optimizer = build()
    save_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer, {})
    parameters = list(modules["distiller"].parameters())
    with pytest.raises(ValueError, match="no moving average"):
        load_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer, EMAModel(parameters), parameters)


def test_the_state_of_deepspeed_is_for_deepspeed_alone(tmp_path):
    modules, heads, optimizer = build()
    save_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer, {})
    with pytest.raises(ValueError, match="in another format"):
        load_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer, engine=object())
    (tmp_path / "checkpoint-2" / "deepspeed").mkdir()
    with pytest.raises(ValueError, match="in DeepSpeed's format"):
        load_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer)


def test_averages_are_there_inside_the_context_alone():
    weight = nn.Parameter(torch.zeros(2))
    ema = EMAModel([weight], 0.5)
    with torch.no_grad():
        weight.fill_(4.0)
    with averaged(ema, [weight]):
        assert weight.tolist() == [0.0, 0.0]
    assert weight.tolist() == [4.0, 4.0]
    with averaged(None, [weight]):
        assert weight.tolist() == [4.0, 4.0]


def test_other_parameters_are_refused(tmp_path):
    modules, heads, optimizer = build()
    save_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer, {})
    with pytest.raises(ValueError, match="queries"):
        load_weights(tmp_path / "checkpoint-2", {"distiller": RVEDiTTokenDistiller(8, 8, 3)})
    with pytest.raises(ValueError, match="lacks parameters of distiller"):
        smaller = load_file(tmp_path / "checkpoint-2" / "distiller" / "diffusion_pytorch_model.safetensors")
        modules["distiller"].register_parameter("more", nn.Parameter(torch.zeros(1)))
        assert "more" not in smaller
        load_weights(tmp_path / "checkpoint-2", modules)


def test_layers_of_another_rank_are_refused(tmp_path):
    first, second = build_transformer(), build_transformer()
    add_lora(first, rank=2)
    add_lora(second, rank=3)
    optimizer = torch.optim.AdamW([p for p in first.parameters() if p.requires_grad])
    save_checkpoint(tmp_path / "checkpoint-1", {"transformer": first}, nn.Linear(1, 1), optimizer, {})
    with pytest.raises(ValueError, match="lora_A"):
        load_weights(tmp_path / "checkpoint-1", {"transformer": second})


def test_large_weights_are_written_in_parts_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr("rvedit_diffusers.training.checkpoint.MAX_SHARD_SIZE", "20KB")
    transformer = build_transformer()
    optimizer = torch.optim.AdamW(transformer.parameters())
    save_checkpoint(tmp_path / "checkpoint-1", {"transformer": transformer}, nn.Linear(1, 1), optimizer, {})
    folder = tmp_path / "checkpoint-1" / "transformer"
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = RVEDiTTransformer3DModel.from_pretrained(folder).state_dict()
    other = build_transformer(num_layers=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_weights(tmp_path / "checkpoint-1", {"transformer": other})
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(tensor, loaded[name]) and torch.equal(tensor, other.state_dict()[name]), name


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    modules, heads, optimizer = build()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        problem = save_checkpoint(tmp_path / "checkpoint-2", modules, heads, optimizer, {})
        _, of_export = export(tmp_path, tmp_path, modules)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in problem and "File too large" in of_export
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path):
    assert save_checkpoint(tmp_path / "checkpoint-2", *build(), {}, is_main_process=False) is None
    assert list(tmp_path.iterdir()) == []


def test_only_whole_checkpoints_count_and_the_oldest_is_first(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-12.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    with pytest.raises(FileNotFoundError, match="checkpoint-11"):
        read_state(tmp_path / "checkpoint-11")


def test_pruning_removes_the_oldest_and_what_was_left_half_done(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4.partial", "checkpoint-0.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    prune_checkpoints(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_the_latest_is_kept_alone_and_stays_if_the_next_cannot_be_written(tmp_path):
    _, heads, optimizer = build()
    for step in (1, 2):
        keep_latest(tmp_path, heads, optimizer, {"step": step})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    (tmp_path / "checkpoint-3.partial").write_text("in the way")
    with pytest.raises(SystemExit, match="checkpoint-3 cannot be written"):
        keep_latest(tmp_path, heads, optimizer, {"step": 3})
    assert read_state(tmp_path / "checkpoint-2")["step"] == 2


def test_a_folder_is_replaced_whole(tmp_path):
    for name, text in (("new", "b"), ("folder", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / text).write_text(text)
    replace_folder(tmp_path / "new", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]


def test_a_log_goes_on_without_the_steps_that_are_trained_again(tmp_path):
    path = tmp_path / "runs" / "log.jsonl"
    with open_log(path, 0) as log:
        log.writelines(json.dumps({"step": step}) + "\n" for step in (20, 40, 60))
        log.write('{"step": 80, "fl')  # killed
    with open_log(path, 40) as log:
        log.write(json.dumps({"step": 60, "again": True}) + "\n")
    assert read_log(path) == [{"step": 20}, {"step": 40}, {"step": 60, "again": True}]


def test_differences_are_named():
    assert differences({"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": 4}) == ["b: 2 -> 3", "d: None -> 4"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("before")
    (tmp_path / "folder.old").mkdir()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "absent", tmp_path / "folder")
    assert (tmp_path / "folder" / "kept").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder.old"]
