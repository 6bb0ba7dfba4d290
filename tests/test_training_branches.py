import copy
import math

import numpy as np
import pytest
import torch
from components import DIM, TEXT_DIM, build_transformer, make_clip

from rvedit_diffusers import RVEDiTTransformer3DModel
from rvedit_diffusers.losses import (
    cosine_alignment_loss,
    infonce_loss,
    relational_alignment_loss,
    token_contrast_loss,
)
from rvedit_diffusers.training import branches as branches_module
from rvedit_diffusers.training.branches import (
    ALIGNMENT_LOSSES,
    ConnectingBranches,
    EditingBranches,
    default_align_blocks,
)


SHAPE = (16, 2, 4, 4)  # of the latents of a clip: 8 tokens
POSITIONS = [[0, 2, 3, 5, 7], [1, 2, 4, 5, 6]]
TOKENS = ("edit_tokens", "visual_tokens")
REFERENCE_TOKENS = ("reference_edit_tokens", "reference_visual_tokens")
KINDS = ("own", "shuffled")  # of reference tokens


def build_branches(seed=0, num_layers=4, num_shallow_blocks=2, **settings):
    torch.manual_seed(seed)
    transformer = build_transformer(num_layers=num_layers, num_shallow_blocks=num_shallow_blocks)
    return EditingBranches(transformer, **settings).train()


def build_batch(keep=(1.0, 1.0), width=DIM):
    """Two samples; `keep` says of each whether it has its instruction and its source."""
    generator = torch.Generator().manual_seed(1)
    shapes = dict.fromkeys(("latents", "source_latents", "noise"), SHAPE) | {"prompt_embeds": (6, TEXT_DIM)}
    shapes |= dict.fromkeys(("edit_tokens", "reference_edit_tokens"), (4, width))
    shapes |= dict.fromkeys(("visual_tokens", "reference_visual_tokens"), (8, width))
    batch = {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}
    return batch | {
        "visual_positions": torch.rand(2, 8, 3, generator=generator),
        "sigmas": torch.tensor([0.3, 0.8]),
        "keep_instruction": torch.tensor(keep),
        "keep_source": torch.tensor(keep),
        "align_positions": torch.tensor(POSITIONS),
    }


def by_hand(branches, batch, prefix="", source="source_latents"):
    """A pass of the whole transformer on what a branch gets, with the aligned features at the aligned positions."""
    sigmas, keep = (batch[name].view(-1, 1, 1, 1, 1) for name in ("sigmas", "keep_source"))
    keep_instruction = batch["keep_instruction"].view(-1, 1, 1)
    output = branches.transformer(
        (1 - sigmas) * batch["latents"] + sigmas * batch["noise"],
        1000 * batch["sigmas"],
        batch["prompt_embeds"],
        edit_hidden_states=batch[f"{prefix}edit_tokens"] * keep_instruction,
        visual_hidden_states=batch[f"{prefix}visual_tokens"] * keep_instruction,
        visual_positions=batch["visual_positions"],
        source_hidden_states=batch[source] * keep,
        return_features=branches.align_blocks,
    )
    features = [
        torch.stack([row[at] for row, at in zip(rows, batch.get("align_positions", POSITIONS))])
        for rows in output.features
    ]
    return output.sample, features


def with_next_tokens(batch):
    """The batch with the reference tokens of the next of its two samples, and where the visual ones are."""
    return batch | {name: batch[name].flip(0) for name in (*REFERENCE_TOKENS, "visual_positions")}


def head_inputs(branches, batch):
    """What each alignment head is called on."""
    calls = []
    handles = [
        head.register_forward_pre_hook(lambda head, args, calls=calls, index=index: calls.append((index, args[0])))
        for index, head in enumerate(branches.heads)
    ]
    branches(batch)
    for handle in handles:
        handle.remove()
    return calls


def backward(branches, batch):
    """Gradients of both losses together by the parameter's name."""
    velocity, align = branches(batch)
    (velocity.square().mean() + align.mean()).backward()
    return {name: p.grad for name, p in branches.named_parameters() if p.grad is not None}


def count_blocks(branches, batch):
    """How often each block runs."""
    counts = [0] * len(branches.transformer.blocks)

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    handles = [block.register_forward_hook(count(index)) for index, block in enumerate(branches.transformer.blocks)]
    branches(batch)
    for handle in handles:
        handle.remove()
    return counts


# The editing branch


@pytest.mark.parametrize("keep", [(1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_the_velocity_is_that_of_the_transformer_on_the_conditions_that_are_kept(keep, is_aligned):
    branches, batch = build_branches(), build_batch(keep)
    expected, _ = by_hand(branches, batch)
    if not is_aligned:
        del batch["align_positions"]
    torch.testing.assert_close(branches(batch)[0], expected)


def test_the_instruction_and_the_source_are_dropped_apart():
    branches, batch = build_branches(), build_batch()
    batch["keep_instruction"] = torch.tensor([0.0, 1.0])
    expected, _ = by_hand(branches, batch)
    torch.testing.assert_close(branches(batch)[0], expected)


# The reference branch


@pytest.mark.parametrize("keep", [(1.0, 1.0), (1.0, 0.0)])
def test_reference_features_are_those_of_a_whole_pass(keep):
    branches, batch = build_branches(), build_batch(keep)
    _, expected = by_hand(branches, batch, "reference_")
    targets = [value for _, value in head_inputs(branches, batch)[1::2]]
    torch.testing.assert_close(targets, expected)


def test_features_of_both_branches_go_to_the_head_of_their_block():
    branches, batch = build_branches(align_blocks=[0, 1, 3]), build_batch()
    _, features = by_hand(branches, batch)
    _, targets = by_hand(branches, batch, "reference_")
    expected = [(index, rows[index]) for index in range(3) for rows in (features, targets)]
    torch.testing.assert_close(head_inputs(branches, batch), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_reaches_the_reference_tokens(checkpointing):
    branches, batch = build_branches(), build_batch()
    if checkpointing:
        branches.transformer.enable_gradient_checkpointing()
    for name in REFERENCE_TOKENS:
        batch[name].requires_grad_()
    branches(batch)[1].sum().backward()
    assert all(batch[name].grad is None for name in REFERENCE_TOKENS)


@pytest.mark.parametrize("align_loss", ALIGNMENT_LOSSES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_alignment_teaches_the_editing_branch(checkpointing, align_loss):
    branches, batch = build_branches(align_loss=align_loss), build_batch()
    if checkpointing:
        branches.transformer.enable_gradient_checkpointing()
    for name in TOKENS:
        batch[name].requires_grad_()
    branches(batch)[1].sum().backward()
    assert all(batch[name].grad.any() for name in TOKENS)


def test_gradients_with_checkpointing_are_those_without():
    branches, batch = build_branches(), build_batch()
    plain = backward(branches, batch)
    checkpointed = copy.deepcopy(branches)
    checkpointed.zero_grad()
    checkpointed.transformer.enable_gradient_checkpointing()
    torch.testing.assert_close(backward(checkpointed, batch), plain)


def test_gradients_under_autocast_do_not_depend_on_the_reference_pass_that_came_first():
    # autocast keeps the weights that it has cast: those of a pass without gradient must not serve one with it
    branches, batch = build_branches(), build_batch()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = backward(copy.deepcopy(branches), batch)
    with torch.autocast("cpu", torch.bfloat16):
        actual = backward(branches, batch)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=2e-4)  # bfloat16 sums of a head's two uses


# The blocks that run


def test_the_reference_branch_stops_after_the_last_aligned_block():
    assert count_blocks(build_branches(align_blocks=[1, 0]), build_batch()) == [2, 2, 1, 1]


def test_without_positions_the_reference_branch_does_not_run():
    batch = build_batch()
    del batch["align_positions"]
    assert count_blocks(build_branches(), batch) == [1, 1, 1, 1]


def test_without_positions_there_is_no_alignment_loss():
    batch = build_batch()
    for name in ("align_positions", *REFERENCE_TOKENS):
        del batch[name]
    assert build_branches()(batch)[1] is None


@pytest.mark.parametrize(
    "num_layers, num_shallow_blocks, blocks",
    [(6, None, [1, 2]), (2, None, [0]), (6, 0, [0]), (6, 1, [0, 1]), (6, 4, [3, 4]), (6, 6, [5]), (1, 1, [0])],
)
def test_the_last_shallow_and_the_first_deep_block_are_aligned(num_layers, num_shallow_blocks, blocks):
    transformer = build_transformer(num_layers=num_layers, num_shallow_blocks=num_shallow_blocks)
    assert default_align_blocks(transformer.config) == blocks


# The alignment loss


LOSSES = {
    "infonce": lambda head, features, targets, _: infonce_loss(head(features), head(targets), 0.2),
    "contrast": lambda head, *features: token_contrast_loss(*map(head, features), 0.2),
    "cosine": lambda head, features, targets, _: cosine_alignment_loss(head(features), targets),
    "relational": lambda head, features, targets, _: relational_alignment_loss(head(features), targets),
}


@pytest.mark.parametrize("align_loss", ALIGNMENT_LOSSES)
def test_the_loss_is_the_mean_over_the_blocks(align_loss):
    branches, batch = build_branches(align_loss=align_loss, align_temperature=0.2), build_batch((1.0, 0.0))
    _, features = by_hand(branches, batch)
    targets = [by_hand(branches, each, "reference_")[1] for each in (batch, with_next_tokens(batch))]
    losses = [LOSSES[align_loss](*arguments) for arguments in zip(branches.heads, features, *targets, strict=True)]
    torch.testing.assert_close(branches(batch)[1], sum(losses) / 2)


@pytest.mark.parametrize("align_loss", ALIGNMENT_LOSSES)
def test_the_reference_branch_teaches_no_weight_but_the_heads(align_loss):
    branches, batch = build_branches(align_loss=align_loss, align_temperature=0.2), build_batch()
    _, features = by_hand(branches, batch)
    with torch.no_grad():
        targets = [by_hand(branches, each, "reference_")[1] for each in (batch, with_next_tokens(batch))]
    losses = [LOSSES[align_loss](*arguments) for arguments in zip(branches.heads, features, *targets, strict=True)]
    parameters = list(branches.parameters())
    expected = torch.autograd.grad(sum(losses).mean() / 2, parameters, allow_unused=True)
    actual = torch.autograd.grad(branches(batch)[1].mean(), parameters, allow_unused=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rows_at_once", [2, 64])
@pytest.mark.parametrize("radius", [1, 2])
def test_neighbours_can_be_no_negatives_of_infonce(monkeypatch, radius, rows_at_once):
    monkeypatch.setattr(branches_module, "ROWS_AT_ONCE", rows_at_once)
    branches, batch = build_branches(align_ignore_radius=radius), build_batch()
    generator = torch.Generator().manual_seed(2)
    for name in ("latents", "source_latents", "noise"):
        batch[name] = torch.randn(2, 16, 2, 4, 12, generator=generator)
    grid, expected = (2, 2, 6), []
    batch["align_positions"] = torch.tensor([[0, 1, 3, 9, 20], [2, 5, 11, 12, 23]])
    features, targets = (by_hand(branches, batch, prefix)[1] for prefix in ("", "reference_"))
    for sample, positions in enumerate(batch["align_positions"].tolist()):
        places = np.array(np.unravel_index(positions, grid)).T
        losses = []
        for head, feature, target in zip(branches.heads, features, targets, strict=True):
            rows, columns = (torch.nn.functional.normalize(head(each[sample]), dim=-1) for each in (feature, target))
            logits = rows @ columns.T / 0.07
            for i, place in enumerate(places):
                kept = [j for j in range(5) if j == i or np.abs(places[j] - place).max() > radius]
                # the bound is the log of the candidates minus the loss, as it is the log of all minus what is given
                loss = logits[i, kept].logsumexp(0) - logits[i, i]
                losses.append(math.log(5) - (math.log(len(kept)) - loss))
        expected.append(torch.stack(losses).mean())
    found = branches(batch)[1]
    torch.testing.assert_close(found, torch.stack(expected))
    branches.align_ignore_radius = 0
    assert not torch.allclose(found, branches(batch)[1])


@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
def test_infonce_in_chunks_is_infonce(monkeypatch, rows_at_once):
    branches, batch = build_branches(), build_batch()
    dense = branches(batch)[1]
    monkeypatch.setattr(branches_module, "ROWS_AT_ONCE", rows_at_once)
    torch.testing.assert_close(branches(batch)[1], dense)


def test_gradients_of_infonce_in_chunks_are_those_of_infonce(monkeypatch):
    branches, batch = build_branches(), build_batch()
    dense = backward(copy.deepcopy(branches), batch)
    monkeypatch.setattr(branches_module, "ROWS_AT_ONCE", 2)
    torch.testing.assert_close(backward(branches, batch), dense)


@pytest.mark.parametrize("align_loss", ["cosine", "relational"])
def test_without_negatives_the_heads_see_the_editing_branch_alone(align_loss):
    branches, batch = build_branches(align_loss=align_loss), build_batch()
    _, features = by_hand(branches, batch)
    torch.testing.assert_close(head_inputs(branches, batch), list(enumerate(features)))


@pytest.mark.parametrize("align_reference_latents, source", [("source", "source_latents"), ("reference", "latents")])
def test_the_reference_branch_has_the_latents_that_it_is_told(align_reference_latents, source):
    branches = build_branches(align_reference_latents=align_reference_latents)
    batch = build_batch((1.0, 0.0))
    _, expected = by_hand(branches, batch, "reference_", source)
    targets = [value for _, value in head_inputs(branches, batch)[1::2]]
    torch.testing.assert_close(targets, expected)


def test_the_latents_of_the_reference_branch_matter_to_the_loss():
    batch = build_batch()
    losses = [build_branches(align_reference_latents=kind)(batch)[1] for kind in ("source", "reference")]
    assert (losses[0] - losses[1]).abs().min() > 1e-3


# Whose tokens the reference branch reads


@pytest.mark.parametrize("keep", [(1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("tokens", KINDS)
def test_the_reference_branch_reads_the_tokens_that_it_is_told(keep, tokens):
    branches, batch = build_branches(align_reference_tokens=tokens), build_batch(keep)
    read = with_next_tokens(batch) if tokens == "shuffled" else batch
    _, expected = by_hand(branches, read, "reference_")  # dropped or not as the editing branch is
    targets = [value for _, value in head_inputs(branches, batch)[1::2]]
    torch.testing.assert_close(targets, expected)


def test_shuffled_tokens_are_those_of_the_next_sample():
    batch = build_batch()
    three = {name: torch.cat([value, value[:1] + 1]) for name, value in batch.items()}
    three["align_positions"] = torch.tensor([POSITIONS[0]] * 3)
    rolled = three | {name: three[name][[1, 2, 0]] for name in (*REFERENCE_TOKENS, "visual_positions")}
    three["sigmas"] = rolled["sigmas"] = torch.tensor([0.3, 0.8, 0.5])
    targets = head_inputs(build_branches(align_reference_tokens="shuffled"), three)[1::2]
    # positions are those of the tokens in the reference branch alone, which the targets are of
    torch.testing.assert_close(targets, head_inputs(build_branches(), rolled)[1::2])


def test_the_editing_branch_does_not_change_with_the_tokens_of_the_reference_branch():
    batch = build_batch()
    own, shuffled = (build_branches(align_reference_tokens=tokens)(batch) for tokens in KINDS)
    assert torch.equal(own[0], shuffled[0]) and (own[1] - shuffled[1]).abs().min() > 1e-3


def test_connectors_come_before_tokens_are_shuffled(pipe):
    branches, batch = (
        build_branches(distiller=pipe.distiller, align_reference_tokens="shuffled"),
        build_batch(width=32),
    )
    _, align = branches(batch)
    for prefix in ("", "reference_"):
        made = pipe.distiller.connect(batch[f"{prefix}edit_tokens"], batch[f"{prefix}visual_tokens"])
        batch |= dict(zip((f"{prefix}edit_tokens", f"{prefix}visual_tokens"), made))
    branches.distiller = None
    torch.testing.assert_close(branches(batch)[1], align)


def test_wrong_tokens_may_be_those_of_a_twin():
    branches, batch = build_branches(align_loss="contrast", align_negatives="twin"), build_batch((1.0, 0.0))
    generator = torch.Generator().manual_seed(2)
    wrong = {f"wrong_{name}": torch.randn(batch[name].shape, generator=generator) for name in TOKENS}
    _, expected = by_hand(branches, batch | wrong, "wrong_")
    seen = [value for _, value in head_inputs(branches, batch | wrong)[2::3]]
    torch.testing.assert_close(seen, expected)


def test_a_contrast_with_the_same_tokens_is_log_2():
    branches, batch = build_branches(align_loss="contrast", align_negatives="twin"), build_batch()
    wrong = {f"wrong_{name}": batch[f"reference_{name}"] for name in TOKENS}
    torch.testing.assert_close(branches(batch | wrong)[1], torch.full((2,), math.log(2)))


def test_the_contrast_takes_one_more_pass_up_to_the_last_aligned_block():
    branches = build_branches(align_loss="contrast", align_blocks=[1, 0])
    assert count_blocks(branches, build_batch()) == [3, 3, 1, 1]


@pytest.mark.parametrize("settings", [{"align_loss": "contrast"}, {"align_reference_tokens": "shuffled"}])
def test_a_sample_alone_has_no_next_one(settings):
    batch = {name: value[:1] for name, value in build_batch().items()}
    with pytest.raises(ValueError, match="`batch` .*at least 2 samples.*holds 1"):
        build_branches(**settings)(batch)
    assert build_branches()(batch)[1].shape == (1,)


def test_branches_that_see_the_same_have_nothing_to_align():
    branches, batch = build_branches(align_loss="relational"), build_batch()
    branches.heads = torch.nn.ModuleList(torch.nn.Identity() for _ in branches.heads)
    for name in TOKENS:
        batch[f"reference_{name}"] = batch[name]
    assert branches(batch)[1].tolist() == [0.0, 0.0]


# What else learns


def test_connectors_learn_from_the_states_of_the_mllm(pipe):
    branches, batch = build_branches(distiller=pipe.distiller), build_batch(width=32)
    gradients = backward(branches, batch)
    connectors = {name for name, _ in branches.named_parameters() if "_connector." in name}
    assert len(connectors) == 12 and all(gradients[name].any() for name in connectors)


def test_connectors_make_the_tokens_that_would_be_cached(pipe):
    branches, batch = build_branches(distiller=pipe.distiller), build_batch((1.0, 0.0), width=32)
    velocity, align = branches(batch)
    for prefix in ("", "reference_"):
        names = [f"{prefix}{name}" for name in TOKENS]
        batch |= dict(zip(names, pipe.distiller.connect(*(batch[name] for name in names))))
    branches.distiller = None
    torch.testing.assert_close((velocity, align), branches(batch))


def test_the_text_encoder_reads_as_in_the_pipeline(pipe):
    branches, batch = build_branches(text_encoder=pipe.text_encoder).eval(), build_batch()
    prompts = ["make the ball blue", ""]
    batch["prompt_embeds"], _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    expected, _ = by_hand(branches, batch)
    del batch["prompt_embeds"]
    inputs = pipe.tokenizer(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    torch.testing.assert_close(branches(batch | inputs)[0], expected)


def test_the_text_encoder_learns(pipe):
    branches, batch = build_branches(text_encoder=pipe.text_encoder), build_batch()
    inputs = pipe.tokenizer(["red", "blue"], padding="max_length", max_length=16, return_tensors="pt")
    gradients = backward(branches, batch | inputs)
    assert all(gradients[f"text_encoder.{name}"].any() for name, _ in pipe.text_encoder.named_parameters())


@pytest.fixture
def live(pipe):
    """Branches with an MLLM, and a batch with its inputs."""
    pipe.mllm.requires_grad_(False)
    branches, batch = build_branches(distiller=pipe.distiller, mllm=pipe.mllm), build_batch((1.0, 0.0), width=32)
    for prefix, seed in (("", 1), ("reference_", 2)):
        inputs = pipe.processor([make_clip(seed=seed), make_clip(seed=seed + 2)], ["make it red", "remove the ball"])
        batch[f"{prefix}mllm_inputs"] = dict(inputs)
    for name in (*TOKENS, *REFERENCE_TOKENS, "visual_positions"):
        del batch[name]
    return pipe, branches, batch


def test_what_runs_with_the_mllm_is_what_runs_with_its_cached_states(live):
    pipe, branches, batch = live
    outputs = branches(batch)
    for prefix in ("", "reference_"):
        states = pipe.distiller.harvest(pipe.mllm, batch.pop(f"{prefix}mllm_inputs"))
        batch |= {f"{prefix}edit_tokens": states[0], f"{prefix}visual_tokens": states[1]}
        batch["visual_positions"] = states[2]
    torch.testing.assert_close(outputs, branches(batch))


def test_queries_learn_through_the_mllm(live):
    _, branches, batch = live
    assert backward(branches, batch)["distiller.queries"].any()


def test_gradients_with_a_checkpointed_mllm_are_those_without(live):
    pipe, branches, batch = live
    plain = backward(branches, batch)
    branches.zero_grad()
    pipe.mllm.train()
    pipe.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(backward(branches, batch), plain)


def test_no_gradient_reaches_the_mllm(live):
    pipe, branches, batch = live
    backward(branches, batch)
    assert all(parameter.grad is None for parameter in pipe.mllm.parameters())


def test_the_mllm_is_neither_trained_nor_saved(live):
    pipe, branches, _ = live
    own = {id(tensor) for tensor in (*branches.parameters(), *branches.buffers())}
    assert not own & {id(tensor) for tensor in (*pipe.mllm.parameters(), *pipe.mllm.buffers())}
    assert not any("mllm" in name for name in branches.state_dict())


# Connecting


@pytest.fixture
def connecting(pipe):
    torch.manual_seed(0)
    transformer = build_transformer(num_layers=4, num_shallow_blocks=2)
    with torch.no_grad():
        transformer.edit_bias.normal_()
    return ConnectingBranches(transformer, pipe.distiller).train(), build_batch(width=32)


def of_base(branches, batch, **arguments):
    """What the same weights compute with the text in all blocks."""
    routing = {"shallow_tokens": ("text",), "deep_tokens": ("text",)}
    base = RVEDiTTransformer3DModel.from_config(branches.transformer.config, **routing).eval()
    base.load_state_dict(branches.transformer.state_dict(), strict=False)
    sigmas = batch["sigmas"].view(-1, 1, 1, 1, 1)
    noisy = (1 - sigmas) * batch["latents"] + sigmas * batch["noise"]
    with torch.no_grad():
        return base(noisy, 1000 * batch["sigmas"], batch["prompt_embeds"], **arguments)


def test_the_text_branch_is_the_base(connecting):
    branches, batch = connecting
    del batch["align_positions"]
    velocity, loss = branches(batch | {"is_base": True})
    assert loss is None
    torch.testing.assert_close(velocity, of_base(branches, batch).sample, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_distance_of_the_shallow_features_from_the_bases(connecting):
    branches, batch = connecting
    velocity, loss = branches(batch)
    assert velocity is None
    targets = of_base(branches, batch, return_features=[0, 1]).features
    sigmas = batch["sigmas"].view(-1, 1, 1, 1, 1)
    features = branches.transformer(
        (1 - sigmas) * batch["latents"] + sigmas * batch["noise"],
        1000 * batch["sigmas"],
        batch["prompt_embeds"],
        edit_hidden_states=branches.distiller.connect(batch["edit_tokens"], batch["visual_tokens"])[0],
        return_features=[0, 1],
    ).features
    expected = []
    for feature, target in zip(features, targets):
        for row, (at, of) in enumerate(zip(feature, target)):
            at, of = at[POSITIONS[row]], of[POSITIONS[row]]
            expected.append((at - of).square().mean() / of.square().mean())
    torch.testing.assert_close(loss, torch.stack(expected).view(2, 2).mean(0), atol=1e-5, rtol=1e-4)


def test_the_transformer_does_not_learn(connecting):
    branches, batch = connecting
    branches(batch)[1].mean().backward()
    learned = {name for name, parameter in branches.named_parameters() if parameter.grad is not None}
    assert learned == {
        f"distiller.edit_connector.{name}" for name, _ in branches.distiller.edit_connector.named_parameters()
    }
    assert len(branches.heads) == 0


def test_both_branches_stop_after_the_last_shallow_block(connecting):
    branches, batch = connecting
    calls = []
    for index, block in enumerate(branches.transformer.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    branches(batch)
    assert calls == [0, 1, 0, 1]


def test_queries_learn_to_connect_through_the_mllm(live):
    pipe, editing, batch = live
    branches = ConnectingBranches(editing.transformer, pipe.distiller, pipe.mllm).train()
    branches(batch)[1].mean().backward()
    assert pipe.distiller.queries.grad.any()


def test_gradients_of_connecting_with_checkpointing_are_those_without(connecting):
    branches, batch = connecting
    plain = torch.autograd.grad(branches(batch)[1].mean(), list(branches.distiller.edit_connector.parameters()))
    branches.transformer.enable_gradient_checkpointing()
    again = torch.autograd.grad(branches(batch)[1].mean(), list(branches.distiller.edit_connector.parameters()))
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize(
    "routing",
    [
        {"num_shallow_blocks": 0},
        {"num_shallow_blocks": 4},
        {"shallow_tokens": ("edit", "text")},
        {"shallow_tokens": ("text",)},
        {"deep_tokens": ("edit", "text", "visual")},
    ],
)
def test_a_routing_without_anything_to_connect_is_refused(pipe, routing):
    transformer = build_transformer(**{"num_layers": 4, "num_shallow_blocks": 2} | routing)
    with pytest.raises(ValueError, match="`transformer` has to read editing tokens without text in its shallow"):
        ConnectingBranches(transformer, pipe.distiller)


# Wrong arguments


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"align_blocks": [0, 4]}, r"`align_blocks` .*\[0, 3\].*\[0, 4\]"),
        ({"align_blocks": [-1]}, r"`align_blocks` .*\[0, 3\].*\[-1\]"),
        ({"align_loss": "mse"}, "`align_loss` .*infonce.*'mse'"),
        ({"align_reference_latents": "edited"}, "`align_reference_latents` .*'source'.*'edited'"),
        ({"align_reference_tokens": "mine"}, "`align_reference_tokens` .*'own'.*'mine'"),
        ({"align_negatives": "all"}, "`align_negatives` .*'next'.*'all'"),
        ({"align_ignore_radius": -1}, "`align_ignore_radius` .*at least 0.*-1"),
        ({"align_loss": "cosine", "align_ignore_radius": 1}, "`align_ignore_radius` .*0.*1"),
        ({"align_loss": "contrast", "align_reference_tokens": "shuffled"}, "`align_reference_tokens` .*'shuffled'"),
    ],
)
def test_wrong_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_branches(**settings)
