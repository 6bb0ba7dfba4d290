import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rvedit_diffusers.training.checkpoint import load_training_state, save_training_state
from rvedit_diffusers.training.optimizers import MuonAdamW, block_matrices


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    return model, MuonAdamW(block_matrices(model[1]), model.parameters(), lr=1e-2)


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 16, (32,), generator=generator)
        loss = F.cross_entropy(model(tokens), tokens % 4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_every_parameter_is_in_one_part():
    model, optimizer = build()
    muon, adamw = (part.param_groups[0]["params"] for part in optimizer.parts)
    assert muon == [model[1].weight]
    assert {id(p) for p in adamw} == {id(p) for p in model.parameters()} - {id(model[1].weight)}


def test_it_does_what_its_parts_do_alone():
    model, optimizer = build()
    twin, _ = build()
    muon = torch.optim.Muon([twin[1].weight], lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    others = [p for p in twin.parameters() if p is not twin[1].weight]
    adamw = torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01)
    train(model, optimizer, 3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        tokens = torch.randint(0, 16, (32,), generator=generator)
        F.cross_entropy(twin(tokens), tokens % 4).backward()
        for part in (muon, adamw):
            part.step()
            part.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["matrices", "others"])
def test_an_empty_part_is_left_out(part, tmp_path):
    def build_one_part(seed):
        torch.manual_seed(seed)
        layer = nn.Linear(8, 4, bias=False)
        parameters = {"matrices": [], "others": [], part: [layer.weight]}
        return layer, MuonAdamW(**parameters, lr=1e-2, weight_decay=0.1)

    layer, optimizer = build_one_part(seed=0)
    twin, _ = build_one_part(seed=0)
    if part == "matrices":
        alone = torch.optim.Muon(twin.parameters(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    else:
        alone = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    assert len(optimizer.param_groups) == 1
    for step in range(4):
        if step == 2:
            save_training_state(tmp_path / "checkpoint", {"layer": layer}, optimizer, {"step": step})
            layer, optimizer = build_one_part(seed=7)
            load_training_state(tmp_path / "checkpoint", {"layer": layer}, optimizer)
        for module, each in ((layer, optimizer), (twin, alone)):
            module(torch.ones(2, 8)).square().sum().backward()
            each.param_groups[0]["lr"] = 1e-2 / (step + 1)
            each.step()
            each.zero_grad()
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=0)


def test_block_matrices_names_each_weight_once_and_in_order():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), nn.Linear(8, 4))
    model[2].requires_grad_(False)
    weights = block_matrices(model[1], model, model[1][0])
    assert [id(weight) for weight in weights] == [id(model[1][0].weight), id(model[0].weight)]


def test_the_groups_set_the_rate_of_both_parts():
    model, optimizer = build()
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 2)
    for old, parameter in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, parameter.detach(), rtol=0, atol=0)


def test_resumes_exactly(tmp_path):
    whole, optimizer = build()
    train(whole, optimizer, 4)
    expected = train(whole, optimizer, 4)

    first, optimizer = build()
    train(first, optimizer, 4)
    save_training_state(tmp_path / "checkpoint", {"model": first}, optimizer, {"step": 4})
    resumed, optimizer = build(seed=7)
    assert load_training_state(tmp_path / "checkpoint", {"model": resumed}, optimizer) == {"step": 4}
    assert train(resumed, optimizer, 4) == expected
    for group in optimizer.param_groups:  # the rate still reaches both parts
        group["lr"] = 0.0
    before = resumed[1].weight.detach().clone()
    train(resumed, optimizer, 1)
    torch.testing.assert_close(before, resumed[1].weight.detach(), rtol=0, atol=0)


def test_learns():
    losses = train(*build(), steps=60)
    assert losses[-1] < 0.5 * losses[0]


def test_refuses_vectors_for_muon():
    with pytest.raises(ValueError, match="2D"):
        MuonAdamW([nn.Parameter(torch.zeros(3))], [])


def test_refuses_to_train_nothing():
    with pytest.raises(ValueError, match="`matrices` and `others`"):
        MuonAdamW([], [])
