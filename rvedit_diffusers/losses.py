"""Training losses as pure functions that return one value per clip, and the head that the alignment trains through."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def sample_sigmas(
    batch_size: int, shift: float = 3.0, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Draw noise levels from a shifted logit-normal distribution (SD3, arXiv 2403.03206, section 3.1 and eq. 23).

    Args:
        batch_size (`int`): How many to draw.
        shift (`float`, defaults to `3.0`): At least 1 moves the mass towards noise, as larger frames need.
        generator (`torch.Generator`, *optional*): On the CPU, so that a draw does not depend on the device.
        device: Where the result goes.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32 in (0, 1); 1 is pure noise.
    """
    if shift <= 0:
        raise ValueError(f"`shift` has to be positive, but is {shift}")
    sigmas = torch.sigmoid(torch.randn(batch_size, generator=generator))
    return (shift * sigmas / (1 + (shift - 1) * sigmas)).to(device)


def flow_matching_loss(
    prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """[`velocity_loss`] against the velocity `noise - latents` of `(1 - sigma) * latents + sigma * noise`.

    Args:
        prediction, latents, noise (`torch.Tensor` of shape `(batch, channels, frames, height, width)`): Any float
            dtype.
        weight (`torch.Tensor`, *optional*): See [`velocity_loss`].

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    return velocity_loss(prediction, noise.float() - latents.float(), weight)


def velocity_loss(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error.

    Args:
        prediction, target (`torch.Tensor` of shape `(batch, channels, frames, height, width)`): Any float dtype; the
            error is taken in float32.
        weight (`torch.Tensor`, *optional*): Broadcastable to `prediction`; each clip's is scaled to a mean of 1.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    error = (prediction.float() - target.float()).square()
    if weight is not None:
        weight = weight.float().expand_as(error)
        error = error * weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True)
    return error.mean(dim=(1, 2, 3, 4))


def edit_region_weight(latents: torch.Tensor, source_latents: torch.Tensor, strength: float) -> torch.Tensor:
    """Weight the latent cells that an edit changes: from 1 where it changes nothing to `1 + strength`.

    The weight rises with the squared change, its mean over the channels, and is full from 0.25 on: where the latents
    moved by half their standard deviation.

    Args:
        latents, source_latents (`torch.Tensor` of shape `(batch, channels, frames, height, width)`): The edited and
            the source clip, normalised to about unit variance.
        strength (`float`): At least 0.

    Returns:
        `torch.Tensor` of shape `(batch, 1, frames, height, width)`, float32.
    """
    change = (latents.float() - source_latents.float()).square().mean(dim=1, keepdim=True)
    full_change = 0.25
    return 1 + strength * (change / full_change).clamp(max=1)


def feature_matching_loss(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error of features as a share of the targets' mean square.

    Args:
        features, targets (`torch.Tensor` of shape `(batch, tokens, dim)`): Any float dtype; the error is taken in
            float32. `targets` is a constant.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32; 1 is what features of zero would give.
    """
    targets = targets.detach().float()
    return (features.float() - targets).square().mean(dim=(1, 2)) / targets.square().mean(dim=(1, 2)).clamp(min=1e-12)


class AlignmentHead(nn.Module):
    """Projects attention features of both branches before they are compared; used in training alone.

    Args:
        dim (`int`): Width of the features.
        hidden_dim (`int`, defaults to `512`): Width of the hidden layer.
        out_dim (`int`, defaults to `128`): Width in which features are compared.
    """

    def __init__(self, dim: int, hidden_dim: int = 512, out_dim: int = 128):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear_1 = nn.Linear(dim, hidden_dim)
        self.act_fn = nn.SiLU()
        self.linear_2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, dim)` to `(batch, tokens, out_dim)`."""
        return self.linear_2(self.act_fn(self.linear_1(self.norm(features))))


def sample_token_positions(
    num_tokens: int, num_samples: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Draw `min(num_samples, num_tokens)` distinct, sorted token positions, `(positions,)` int64."""
    return torch.randperm(num_tokens, generator=generator)[:num_samples].sort().values.to(device)


def _infonce_rows(
    queries: torch.Tensor, keys: torch.Tensor, ignored: torch.Tensor | None, start: int, temperature: float
) -> torch.Tensor:
    logits = queries @ keys.transpose(1, 2) / temperature  # (batch, rows, tokens)
    if ignored is not None:
        logits = logits.masked_fill(ignored, -torch.inf)
    positives = torch.arange(start, start + queries.shape[1], device=queries.device).expand(queries.shape[0], -1)
    return F.cross_entropy(logits.transpose(1, 2), positives, reduction="none")  # (batch, rows)


def infonce_loss(
    queries: torch.Tensor,
    keys: torch.Tensor,
    temperature: float = 0.07,
    ignored: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """InfoNCE (arXiv 1807.03748, eq. 4): token `i` of one branch has to find token `i` of the other in its clip.

    Args:
        queries, keys (`torch.Tensor` of shape `(batch, tokens, dim)`): Projected features of the editing and of the
            reference branch at the same positions. Normalised here; logits are float32.
        temperature (`float`, defaults to `0.07`): Divides the cosine similarities.
        ignored (`torch.Tensor` of shape `(tokens, tokens)` or `(batch, tokens, tokens)`, *optional*): Boolean; `True`
            takes a pair out of the negatives, for example neighbours. Its diagonal has to be `False`.
        chunk_size (`int`, *optional*): Compute that many rows at a time and again in the backward pass, so that the
            `(tokens, tokens)` logits never exist at once.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32, in nats. The log of the number of candidates minus it bounds the
        mutual information from below, see [`mutual_information_bound`]. Each row of `ignored` leaves as many
        candidates as it has `False` entries, the positive among them. With `ignored` the bound is the mean over the
        rows of the log of that number, minus the loss; `log(tokens)` minus the loss would overstate it.
    """
    if queries.shape != keys.shape:
        raise ValueError(
            f"`keys` has to have the shape of `queries`, {tuple(queries.shape)}, but has {tuple(keys.shape)}"
        )
    queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)
    with torch.autocast(queries.device.type, enabled=False):
        if chunk_size is None:
            return _infonce_rows(queries, keys, ignored, 0, temperature).mean(dim=1)
        total = queries.new_zeros(queries.shape[0])
        for start in range(0, queries.shape[1], chunk_size):
            rows = slice(start, start + chunk_size)
            chunk_ignored = None if ignored is None else ignored[..., rows, :]
            total = total + checkpoint(
                _infonce_rows, queries[:, rows], keys, chunk_ignored, start, temperature, use_reentrant=False
            ).sum(dim=1)
        return total / queries.shape[1]


def mutual_information_bound(loss: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """The lower bound `log(num_tokens) - loss` on the mutual information, in nats (arXiv 1807.03748, section 2.3).

    It cannot exceed `log(num_tokens)`, which is its ceiling whatever the true information is.

    Args:
        loss (`torch.Tensor`): Of [`infonce_loss`] or [`token_contrast_loss`], of any shape.
        num_tokens (`float`): Candidates of each token: the tokens of a clip if the loss was taken without `ignored`,
            else the `False` entries in a row of `ignored`, and their geometric mean where rows differ. All tokens
            of the clip would overstate the bound then. Two of [`token_contrast_loss`].

    Returns:
        `torch.Tensor` of the shape of `loss`.
    """
    return math.log(num_tokens) - loss


def token_contrast_loss(
    queries: torch.Tensor, keys: torch.Tensor, wrong_keys: torch.Tensor, temperature: float = 0.07
) -> torch.Tensor:
    """Each token has to tell the reference feature at its own position from the one that other tokens give there.

    InfoNCE with two candidates. Both come of the same noisy latents, noise level, source and position, so that unlike
    in [`infonce_loss`] these tell nothing about which is right: only what the reference branch has read does. Where
    that makes no difference the loss is log 2, and teaches nothing.

    Args:
        queries, keys (`torch.Tensor` of shape `(batch, tokens, dim)`): As in [`infonce_loss`].
        wrong_keys (`torch.Tensor` of shape `(batch, tokens, dim)`): Projected features of the reference branch that
            has read the tokens of another pair, at the same positions. The more the pairs have in common, the more is
            to be learned: the tokens of another scene are told by the scene, those of a twin by the instruction.
        temperature (`float`, defaults to `0.07`): Divides the cosine similarities.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32, in nats. [`mutual_information_bound`] with two candidates, log 2
        minus it, bounds from below what a token tells about which of the two is right: at most log 2, 0.69 nats.
    """
    for name, other in (("keys", keys), ("wrong_keys", wrong_keys)):
        if other.shape != queries.shape:
            raise ValueError(
                f"`{name}` has to have the shape of `queries`, {tuple(queries.shape)}, but has {tuple(other.shape)}"
            )
    queries, keys, wrong_keys = (F.normalize(each.float(), dim=-1) for each in (queries, keys, wrong_keys))
    margin = (queries * (keys - wrong_keys)).sum(-1) / temperature  # (batch, tokens)
    return F.softplus(-margin).mean(dim=1)


def cosine_alignment_loss(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`1 - cosine` of matching tokens, mean over a clip (REPA, arXiv 2410.06940, eq. 8).

    Args:
        queries, keys (`torch.Tensor` of shape `(batch, tokens, dim)`): As in [`infonce_loss`]. `keys` is a constant
            here: with no negatives, a head that learned from both would collapse.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32 in [0, 2].
    """
    return 1 - F.cosine_similarity(queries.float(), keys.detach().float(), dim=-1).mean(dim=1)


def relational_alignment_loss(queries: torch.Tensor, keys: torch.Tensor, margin: float = 0.1) -> torch.Tensor:
    """Distance between the token-to-token similarities of the branches, beyond a margin (VideoREPA, arXiv 2505.23656).

    Args:
        queries, keys (`torch.Tensor` of shape `(batch, tokens, dim)`): As in [`infonce_loss`]; `keys` is a constant.
        margin (`float`, defaults to `0.1`): Differences of similarity up to it cost nothing.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32 in [0, 2].
    """
    queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(keys.detach().float(), dim=-1)
    with torch.autocast(queries.device.type, enabled=False):
        difference = queries @ queries.transpose(1, 2) - keys @ keys.transpose(1, 2)  # (batch, tokens, tokens)
    return F.relu(difference.abs() - margin).mean(dim=(1, 2))
