import math

import pytest
import torch
import torch.nn.functional as F

from rvedit_diffusers.losses import (
    AlignmentHead,
    cosine_alignment_loss,
    edit_region_weight,
    feature_matching_loss,
    flow_matching_loss,
    infonce_loss,
    mutual_information_bound,
    relational_alignment_loss,
    sample_sigmas,
    sample_token_positions,
    token_contrast_loss,
)


def features(seed: int = 0, batch: int = 2, tokens: int = 12, dim: int = 8) -> torch.Tensor:
    return torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(seed))


def test_flow_matching_loss_is_zero_at_the_velocity():
    latents, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    assert torch.equal(flow_matching_loss(noise - latents, latents, noise), torch.zeros(2))


def test_feature_matching_is_a_share_of_the_targets_mean_square():
    targets = features()
    offsets = torch.tensor([0.0, 0.5]).view(-1, 1, 1)
    torch.testing.assert_close(feature_matching_loss(targets * (1 + offsets), targets), torch.tensor([0.0, 0.25]))
    assert torch.equal(feature_matching_loss(0 * targets, targets), torch.ones(2))
    assert torch.equal(feature_matching_loss(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)), torch.zeros(1))


def test_feature_matching_teaches_the_features_alone():
    first, second = features(1).requires_grad_(), features(2).requires_grad_()
    feature_matching_loss(first, second).sum().backward()
    assert first.grad.any() and second.grad is None


def test_flow_matching_loss_is_taken_per_clip():
    latents, noise = torch.zeros(2, 4, 3, 2, 2), torch.zeros(2, 4, 3, 2, 2)
    prediction = torch.stack([torch.ones(4, 3, 2, 2), torch.full((4, 3, 2, 2), 3.0)])
    torch.testing.assert_close(flow_matching_loss(prediction, latents, noise), torch.tensor([1.0, 9.0]))


def test_flow_matching_weight_moves_the_loss_but_not_its_scale():
    latents, noise = torch.zeros(1, 2, 1, 1, 2), torch.zeros(1, 2, 1, 1, 2)
    prediction = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 1, 2)
    weight = torch.tensor([3.0, 1.0]).view(1, 1, 1, 1, 2)
    torch.testing.assert_close(flow_matching_loss(prediction, latents, noise, weight), torch.tensor([0.75]))
    ones = torch.ones_like(prediction)
    torch.testing.assert_close(flow_matching_loss(ones, latents, noise, weight), torch.tensor([1.0]))


def test_edit_region_weight_is_one_where_nothing_changes():
    source = torch.randn(1, 4, 2, 3, 3)
    latents = source.clone()
    latents[:, :, 1, 0, 0] += 2.0
    weight = edit_region_weight(latents, source, strength=5.0)
    assert weight[0, 0, 1, 0, 0] == 6.0
    weight[0, 0, 1, 0, 0] = 1.0
    assert torch.equal(weight, torch.ones(1, 1, 2, 3, 3))


def test_edit_region_weight_rises_with_the_squared_change_up_to_a_quarter():
    change = torch.tensor([0.0, 0.25, 0.5, 2.0])  # in standard deviations of the latents
    weight = edit_region_weight(change.expand(1, 4, 1, 1, 4), torch.zeros(1, 4, 1, 1, 4), strength=4.0)
    torch.testing.assert_close(weight.flatten(), torch.tensor([1.0, 2.0, 5.0, 5.0]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_are_a_shifted_logit_normal(shift):
    sigmas = sample_sigmas(20000, shift, torch.Generator().manual_seed(0))
    assert sigmas.min() > 0 and sigmas.max() < 1
    # the shift acts on the odds
    logits = torch.logit(sigmas.double()) - math.log(shift)
    assert abs(logits.mean()) < 0.03 and abs(logits.std() - 1) < 0.03


def test_sigmas_refuse_a_shift_that_is_not_positive():
    with pytest.raises(ValueError, match="`shift`.*0"):
        sample_sigmas(2, shift=0.0)


def test_infonce_equals_cross_entropy_over_the_clip():
    queries, keys = features(0), features(1)
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).transpose(1, 2) / 0.1
    expected = torch.stack([F.cross_entropy(clip, torch.arange(12)) for clip in logits])
    torch.testing.assert_close(infonce_loss(queries, keys, temperature=0.1), expected)


@pytest.mark.parametrize("with_ignored", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_chunked_infonce_equals_dense(chunk_size, with_ignored):
    distance = (torch.arange(12)[:, None] - torch.arange(12)).abs()
    ignored = distance == 1 if with_ignored else None
    results = []
    for size in (None, chunk_size):
        queries, keys = features(0).requires_grad_(), features(1).requires_grad_()
        loss = infonce_loss(queries, keys, ignored=ignored, chunk_size=size)
        loss.sum().backward()
        results.append((loss.detach(), queries.grad, keys.grad))
    for dense, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, dense, atol=1e-6, rtol=1e-5)


def test_ignored_pairs_do_not_count_as_negatives():
    queries, keys = features(0), features(1)
    ignored = torch.rand(12, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    ignored.fill_diagonal_(False)
    loss = infonce_loss(queries, keys, temperature=0.1, ignored=ignored)
    similarity = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).transpose(1, 2) / 0.1
    for row, logits in enumerate(similarity):
        terms = [logits[i, i] - logits[i, ~ignored[i]].logsumexp(0) for i in range(12)]
        torch.testing.assert_close(loss[row], -torch.stack(terms).mean())
    assert not torch.allclose(loss, infonce_loss(queries, keys, temperature=0.1))


def test_information_bound_reaches_its_ceiling_for_identical_features():
    same = torch.eye(16).unsqueeze(0)
    bound = mutual_information_bound(infonce_loss(same, same, temperature=0.01), 16)
    torch.testing.assert_close(bound, torch.tensor([math.log(16)]))


def test_information_bound_counts_the_candidates_that_are_left():
    ignored = torch.ones(12, 12).triu(1).bool()  # row i keeps i + 1 candidates
    geometric_mean = math.exp(math.lgamma(13) / 12)  # the 12th root of 12!
    same = features(0)[:, :1].expand(-1, 12, -1)  # tokens that tell nothing about each other
    loss = infonce_loss(same, same, ignored=ignored)
    torch.testing.assert_close(mutual_information_bound(loss, geometric_mean), torch.zeros(2), atol=1e-5, rtol=0)
    assert (mutual_information_bound(loss, 12) > 0.8).all()


def test_information_bound_of_unrelated_features_is_not_positive():
    queries, keys = features(0, 64, 32, 64), features(1, 64, 32, 64)
    assert mutual_information_bound(infonce_loss(queries, keys), 32).mean() < 0.05


def test_infonce_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        loss = infonce_loss(features(0).bfloat16(), features(1).bfloat16())
    exact = infonce_loss(features(0).bfloat16(), features(1).bfloat16())
    assert loss.dtype == torch.float32 and torch.equal(loss, exact)


def test_contrast_by_hand():
    queries = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    keys = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])  # cosines 1 and 0.8
    wrong_keys = torch.tensor([[[0.0, 1.0], [0.0, 5.0]]])  # cosines 0 and 1
    margins = (1.0 - 0.0) / 0.5, (0.8 - 1.0) / 0.5
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 2
    torch.testing.assert_close(token_contrast_loss(queries, keys, wrong_keys, 0.5), torch.tensor([expected]))


def test_contrast_is_infonce_with_two_candidates():
    queries, keys, wrong_keys = (features(seed) for seed in range(3))
    candidates = F.normalize(torch.stack([keys, wrong_keys], dim=2), dim=-1)  # (batch, tokens, 2, dim)
    logits = torch.einsum("btd,btcd->bct", F.normalize(queries, dim=-1), candidates) / 0.1
    expected = F.cross_entropy(logits, torch.zeros(2, 12, dtype=torch.int64), reduction="none").mean(1)
    torch.testing.assert_close(token_contrast_loss(queries, keys, wrong_keys, 0.1), expected)


def test_contrast_stays_at_log_2_and_teaches_nothing_where_the_tokens_do_not_matter():
    queries, keys = features(0).requires_grad_(), features(1)
    loss = token_contrast_loss(queries, keys, keys.clone())
    torch.testing.assert_close(loss, torch.full((2,), math.log(2)))
    torch.testing.assert_close(mutual_information_bound(loss, 2), torch.zeros(2), atol=1e-6, rtol=0)
    loss.sum().backward()
    assert not queries.grad.any()


def test_contrast_bounds_the_information_by_log_2():
    queries = features(0)
    bound = mutual_information_bound(token_contrast_loss(queries, queries, -queries, 0.01), 2)
    torch.testing.assert_close(bound, torch.full((2,), math.log(2)))


def test_contrast_pulls_towards_the_right_key_and_away_from_the_wrong_one():
    tensors = [features(seed, dim=2).requires_grad_() for seed in range(3)]
    loss = token_contrast_loss(*tensors, temperature=0.5)
    loss.sum().backward()
    queries, keys, wrong_keys = (tensor.detach() for tensor in tensors)
    moved = queries - 1e-3 * tensors[0].grad
    before, after = (
        [F.cosine_similarity(each, key, dim=-1) for key in (keys, wrong_keys)] for each in (queries, moved)
    )
    assert ((after[0] - after[1]) > (before[0] - before[1]) - 1e-7).all()
    assert all(tensor.grad.abs().sum() > 0 for tensor in tensors)


@pytest.mark.parametrize("name", ["keys", "wrong_keys"])
def test_contrast_refuses_features_of_another_shape(name):
    arguments = {"keys": features(1), "wrong_keys": features(2)} | {name: features(1, tokens=5)}
    with pytest.raises(ValueError, match=f"`{name}`"):
        token_contrast_loss(features(0), **arguments)


def test_infonce_refuses_features_of_another_shape():
    with pytest.raises(ValueError, match="`keys`"):
        infonce_loss(features(0), features(1, tokens=5))


@pytest.mark.parametrize("loss", [cosine_alignment_loss, relational_alignment_loss])
def test_losses_without_negatives_vanish_for_equal_features_and_leave_the_reference_alone(loss):
    queries, keys = features(0).requires_grad_(), features(1).requires_grad_()
    torch.testing.assert_close(loss(queries, queries), torch.zeros(2), atol=1e-6, rtol=0)
    loss(queries, keys).sum().backward()
    assert queries.grad.abs().sum() > 0 and keys.grad is None


def test_relational_loss_ignores_a_common_rotation():
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    queries = features(0)
    torch.testing.assert_close(relational_alignment_loss(queries, queries @ rotation), torch.zeros(2))
    assert cosine_alignment_loss(queries, queries @ rotation).mean() > 0.3


def test_training_the_head_raises_the_information_between_noisy_views():
    torch.manual_seed(0)
    content, head = torch.randn(4, 24, 16), AlignmentHead(16, 32, 8)
    views = [torch.cat([content, torch.randn(4, 24, 16)], -1) @ torch.randn(32, 16) for _ in range(2)]
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    bounds = []
    for _ in range(60):
        loss = infonce_loss(head(views[0]), head(views[1])).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bounds.append(mutual_information_bound(loss.detach(), 24).item())
    assert bounds[-1] > bounds[0] + 0.3


def test_token_positions_are_distinct_and_repeatable():
    draws = [sample_token_positions(50, 20, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws) and len(draws[0].unique()) == 20
    assert torch.equal(sample_token_positions(5, 20), torch.arange(5))
