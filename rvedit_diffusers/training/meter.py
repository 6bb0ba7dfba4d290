"""Means of a training's losses between two lines of its log."""

import math

import torch
from accelerate import Accelerator

from ..losses import mutual_information_bound


SIGMA_BANDS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")


class LossMeter:
    """Sums losses on the device, without waiting for it; values that are not finite are left out.

    Args:
        device (`torch.device`): Of the losses.
        name (`str`, defaults to `"flow"`): Of the loss that is also shown by noise level.
    """

    def __init__(self, device: torch.device, name: str = "flow"):
        self.name = name
        # a column for each band of noise levels, the alignment loss, and the bound's ceiling, which differs by bucket
        self.sums, self.counts = torch.zeros(2, len(SIGMA_BANDS) + 2, device=device)

    def add(self, flow: torch.Tensor, sigmas: torch.Tensor, align: torch.Tensor | None, num_tokens: int) -> None:
        """Count a batch.

        Args:
            flow (`torch.Tensor` of shape `(batch,)`), sigmas (`torch.Tensor` of shape `(batch,)`): Loss and noise
                level, in [0, 1], of each sample.
            align (`torch.Tensor` of shape `(batch,)`, *optional*): Alignment loss.
            num_tokens (`int`): Candidates that a loss with negatives has for each token.
        """
        flow, finite = flow.detach(), flow.detach().isfinite()
        band = (sigmas * len(SIGMA_BANDS)).long().clamp(max=len(SIGMA_BANDS) - 1)
        self.sums.index_add_(0, band, flow.where(finite, 0.0))
        self.counts.index_add_(0, band, finite.float())
        if align is not None:
            align, finite = align.detach(), align.detach().isfinite()
            self.sums[-2] += align.where(finite, 0.0).sum()
            self.sums[-1] += math.log(num_tokens) * finite.sum()
            self.counts[-2:] += finite.sum()

    def read(self, accelerator: Accelerator, has_negatives: bool) -> dict[str, float]:
        """The means over all processes since the last call, of what there was; with negatives the bound too."""
        sums, counts = accelerator.reduce(torch.stack([self.sums, self.counts])).tolist()
        self.sums.zero_()
        self.counts.zero_()
        entry, num_bands = {}, len(SIGMA_BANDS)
        if any(counts[:num_bands]):
            entry[self.name] = sum(sums[:num_bands]) / sum(counts[:num_bands])
        for name, total, count in zip(SIGMA_BANDS, sums, counts):
            if count:
                entry[f"{self.name}_sigma_{name}"] = total / count
        if counts[-1]:
            entry["align"] = sums[-2] / counts[-2]
        if counts[-1] and has_negatives:
            ceiling = sums[-1] / counts[-1]
            bound = mutual_information_bound(torch.tensor(entry["align"]), math.exp(ceiling))
            entry |= {"information_nats": bound.item(), "information_ceiling_nats": ceiling}
        return entry
