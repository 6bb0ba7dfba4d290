import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rvedit_diffusers.training import optimizers
from rvedit_diffusers.training.checkpoint import load_checkpoint, save_checkpoint
from rvedit_diffusers.training.optimizers import (
    NEED_OTHERS,
    Muon,
    MuonAdamW,
    block_matrices,
    build_optimizer,
    orthogonalized,
    warmup_cosine,
)


NAMES = sorted(
    name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name not in NEED_OTHERS
)  # all of torch.optim that need no closure, no matrices alone and no sparse gradients


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


def save(folder, module, optimizer, step):
    assert save_checkpoint(folder, {}, module, optimizer, state={"step": step}) is None


def load(folder, module, optimizer):
    return load_checkpoint(folder, {}, module, optimizer)["step"]


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
        # torch.optim.Muon rounds to bfloat16: a hundredth of three updates of 0.01 at most
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4 if ours is model[1].weight else 1e-4)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (2, 8, 24)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    together = orthogonalized(matrices)
    values = torch.linalg.svdvals(together)
    assert values.min() > 0.3 and values.max() < 1.3  # the iteration ends in that range, not at 1
    for one, result in zip(matrices, together, strict=True):
        left, _, right = torch.linalg.svd(one, full_matrices=False)
        assert F.cosine_similarity((left @ right).flatten(), result.flatten(), dim=0) > 0.95
        torch.testing.assert_close(orthogonalized(one[None])[0], result)


def test_a_kernel_is_a_matrix_with_a_row_for_each_output_channel():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2, 2))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    optimizer = Muon([kernel, matrix], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1)
        optimizer.step()
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=0)


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
            save(tmp_path / "checkpoint-2", layer, optimizer, step)
            layer, optimizer = build_one_part(seed=7)
            load(tmp_path / "checkpoint-2", layer, optimizer)
        for module, each in ((layer, optimizer), (twin, alone)):
            module(torch.ones(2, 8)).square().sum().backward()
            each.param_groups[0]["lr"] = 1e-2 / (step + 1)
            each.step()
            each.zero_grad()
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=3e-4 if part == "matrices" else 0)


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
    save(tmp_path / "checkpoint-4", first, optimizer, 4)
    resumed, optimizer = build(seed=7)
    assert load(tmp_path / "checkpoint-4", resumed, optimizer) == 4
    assert train(resumed, optimizer, 4) == expected


def test_the_groups_of_a_resumed_one_set_the_rate_of_both_parts(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 1)
    save(tmp_path / "checkpoint-1", model, optimizer, 1)
    load(tmp_path / "checkpoint-1", model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    for old, parameter in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, parameter.detach(), rtol=0, atol=0)


def test_learns():
    losses = train(*build(), steps=60)
    assert losses[-1] < 0.5 * losses[0]


def test_refuses_vectors_for_muon():
    with pytest.raises(ValueError, match="two dimensions"):
        MuonAdamW([nn.Parameter(torch.zeros(3))], [])


def test_refuses_to_train_nothing():
    with pytest.raises(ValueError, match="`matrices` and `others`"):
        MuonAdamW([], [])


def named(name, weight_decay=0.1, seed=0, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    matrices = block_matrices(model[1])
    return model, build_optimizer(name, model.parameters(), matrices, 1e-2, weight_decay, **settings)


@pytest.mark.parametrize(
    "name, kind",
    [("adamw", torch.optim.AdamW), ("muon", MuonAdamW), *((name, getattr(torch.optim, name)) for name in NAMES)],
)
def test_a_name_gives_its_class(name, kind):
    assert type(named(name)[1]) is kind


def test_a_name_does_what_its_class_does():
    (model, optimizer), (twin, _) = named("adamw"), named("adamw")
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    assert train(model, optimizer, 3) == train(twin, theirs, 3)


@pytest.mark.parametrize("settings, fused", [({}, True), ({"fused": False}, False)])
def test_adamw_is_fused_unless_told(settings, fused):
    assert named("adamw", **settings)[1].defaults["fused"] is fused


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("settings, betas", [({}, (0.9, 0.98)), ({"betas": (0.8, 0.95)}, (0.8, 0.95))])
def test_betas_are_ours_unless_told(name, settings, betas):
    groups = named(name, **settings)[1].param_groups
    assert [tuple(group["betas"]) for group in groups if "betas" in group] == [betas]


def test_a_class_of_torch_keeps_its_own_betas():
    assert named("Adam")[1].defaults["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", ["adamw", "muon", "SGD", "Adafactor"])
def test_weight_decay_reaches_every_group(name):
    assert [group["weight_decay"] for group in named(name, weight_decay=0.3)[1].param_groups] == [0.3] * (
        2 if name == "muon" else 1
    )


@pytest.mark.parametrize("name", ["adamw", "SGD"])
def test_settings_go_before_the_weight_decay(name):
    parameters = nn.Linear(2, 2).parameters()
    optimizer = build_optimizer(name, parameters, [], 1e-2, 0.1, weight_decay=0.3)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", *NAMES])
def test_each_lowers_a_loss(name):
    parameter = nn.Parameter(torch.full((4, 4), 3.0))
    optimizer = build_optimizer(name, [parameter], [parameter], 1e-2, 0.1)
    losses = []
    for _ in range(3):
        loss = parameter.square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon", *NAMES])
def test_each_resumes_exactly(name, tmp_path):
    whole, optimizer = named(name)
    train(whole, optimizer, 2)
    save(tmp_path / "checkpoint-2", whole, optimizer, 2)
    resumed, other = named(name, seed=7)
    load(tmp_path / "checkpoint-2", resumed, other)
    assert train(resumed, other, 3) == train(whole, optimizer, 3)


@pytest.mark.parametrize("name", ["Muon2", "adam", "lr_scheduler", "Adam.", *NEED_OTHERS])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"`--optimizer` has to be one of adamw, .*Adafactor.*'{name}'"):
        named(name)


@pytest.mark.parametrize("name", ["adamw", "muon", "SGD"])
@pytest.mark.parametrize("setting", ["momentun", "lr", "learning_rate"])
def test_unknown_settings_are_refused(name, setting):
    with pytest.raises(ValueError, match=f"`--optimizer_args`: {name}.*{setting}"):
        build_optimizer(name, nn.Linear(2, 2).parameters(), [], 1e-2, 0.1, **{setting: 0.9})


def test_states_in_8_bits_are_resumed_from(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))  # smaller ones have their state in float32
        return model, build_optimizer("adamw8bit", model.parameters(), [], 1e-2, 0.1)

    def learn(model, optimizer, seed):
        model(torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    learn(model, optimizer, 0)
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.uint8
    save(tmp_path / "checkpoint-1", model, optimizer, 1)
    resumed, other = make()
    load(tmp_path / "checkpoint-1", resumed, other)
    for each in ((model, optimizer), (resumed, other)):
        learn(*each, 1)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


@pytest.mark.parametrize("at_once", [1, 128, 10**6])
def test_how_many_matrices_muon_takes_at_once_changes_nothing(at_once, monkeypatch):
    monkeypatch.setattr(optimizers, "AT_ONCE", at_once)
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(8, 8)) for _ in range(5)]
    before = [matrix.detach().clone() for matrix in matrices]
    for matrix in matrices:
        matrix.grad = torch.randn(8, 8)
    Muon(matrices, lr=1e-2, weight_decay=0.0).step()
    for matrix, start in zip(matrices, before, strict=True):
        momentum = 0.05 * matrix.grad
        wanted = orthogonalized(matrix.grad.lerp(momentum, 0.95)[None])[0]
        torch.testing.assert_close(matrix, start - 0.2 * 8**0.5 * 1e-2 * wanted, rtol=0, atol=2e-4)


def test_adamw8bit_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="`--optimizer adamw8bit`.*pip install bitsandbytes"):
        named("adamw8bit")


@pytest.mark.parametrize("step, factor", [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)])
def test_the_rate_rises_in_the_warmup(step, factor):
    assert warmup_cosine(step, 4, 0.0) == pytest.approx(factor)


@pytest.mark.parametrize("progress, factor", [(0.0, 1.0), (0.5, 0.51), (1.0, 0.02)])
def test_the_rate_falls_with_the_progress(progress, factor):
    assert warmup_cosine(9, 0, progress) == pytest.approx(factor)
