"""Which samples a step trains on, and every random number of it, as pure functions of seed and position.

Nothing here has state: to resume at a step is to ask for that step. The numbers of a sample depend on the seed and on
how many samples the run has drawn before it, not on the process that trains on it.
"""

import hashlib
from collections.abc import Sequence

import torch


def derive_seed(*names: int | str) -> int:
    """A seed in [0, 2**63) from any names, the same on every machine: `derive_seed(seed, index, "noise")`."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator seeded by [`derive_seed`]."""
    return torch.Generator().manual_seed(derive_seed(*names))


def epoch_batches(buckets: Sequence[str], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch: every sample once, in random order, each batch from one bucket.

    Args:
        buckets (`Sequence[str]`): The bucket of each sample; samples of one bucket have one shape.
        batch_size (`int`): Of all processes together. What is left of a bucket after its whole batches is filled up
            with other samples of that bucket, so that no sample is left out and every batch has this size.
        seed, epoch (`int`): Name the order.

    Returns:
        `list[list[int]]`: Sample indices, `batch_size` in each batch.
    """
    order = torch.randperm(len(buckets), generator=generator(seed, epoch, "order")).tolist()
    members: dict[str, list[int]] = {}
    for index in order:
        members.setdefault(buckets[index], []).append(index)
    batches = []
    for bucket in sorted(members):
        rows = members[bucket]
        missing = -len(rows) % batch_size
        rows = rows + [rows[i % len(rows)] for i in range(missing)]
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator(seed, epoch, "batches")).tolist()
    return [batches[index] for index in shuffled]


class BatchSampler:
    """The batches of a whole run by number.

    Args:
        buckets, batch_size, seed: See [`epoch_batches`].
    """

    def __init__(self, buckets: Sequence[str], batch_size: int, seed: int):
        if len(buckets) == 0:
            raise ValueError("`buckets` has to hold at least one sample, but is empty")
        if batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1, but is {batch_size}")
        self.buckets, self.batch_size, self.seed = list(buckets), batch_size, seed
        self.batches_per_epoch = len(epoch_batches(self.buckets, batch_size, seed, 0))
        self._epoch, self._batches = -1, []

    def __getitem__(self, number: int) -> list[int]:
        """Sample indices of batch `number`, from 0, over all epochs."""
        epoch, position = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, epoch_batches(self.buckets, self.batch_size, self.seed, epoch)
        return self._batches[position]


def share(batch: Sequence[int], rank: int, num_processes: int) -> list[int]:
    """The part of a batch that process `rank` trains on: positions `rank * n` to `(rank + 1) * n - 1`."""
    size = len(batch) // num_processes
    return list(batch[rank * size : (rank + 1) * size])
