import collections

import pytest
import torch

from rvedit_diffusers.training.sampler import BatchSampler, derive_seed, epoch_batches, generator, share


BUCKETS = ["17x64x64"] * 7 + ["17x64x96"] * 5 + ["1x64x64"]


def test_every_sample_is_in_every_epoch():
    for epoch in range(3):
        counts = collections.Counter(index for batch in epoch_batches(BUCKETS, 4, 0, epoch) for index in batch)
        assert set(counts) == set(range(len(BUCKETS)))
        # only the filling repeats: 1 of bucket 0, 3 of bucket 1, 3 of bucket 2
        assert sum(counts.values()) == 8 + 8 + 4 and counts[12] == 4
        assert max(counts[index] for index in range(12)) <= 2


def test_a_batch_is_full_and_of_one_bucket():
    for batch in epoch_batches(BUCKETS, 4, 0, 0):
        assert len(batch) == 4 and len({BUCKETS[index] for index in batch}) == 1


def test_order_is_a_function_of_seed_and_epoch():
    order = epoch_batches(BUCKETS, 4, 0, 0)
    assert epoch_batches(BUCKETS, 4, 0, 0) == order
    assert epoch_batches(BUCKETS, 4, 0, 1) != order
    assert epoch_batches(BUCKETS, 4, 1, 0) != order


def test_batches_by_number_go_over_epoch_borders_in_any_order():
    sampler = BatchSampler(BUCKETS, 4, 3)
    assert sampler.batches_per_epoch == 5
    straight = [sampler[number] for number in range(12)]
    assert straight == [batch for epoch in range(3) for batch in epoch_batches(BUCKETS, 4, 3, epoch)][:12]
    assert [sampler[number] for number in (11, 2, 7)] == [straight[number] for number in (11, 2, 7)]


def test_processes_share_a_batch_without_overlap():
    batch = [5, 3, 8, 1]
    assert share(batch, 0, 2) + share(batch, 1, 2) == batch
    assert share(batch, 0, 1) == batch


def test_seeds_are_the_same_on_every_machine_and_differ_by_every_name():
    assert derive_seed(0, 1, "noise") == 3_024_559_134_355_199_819
    assert len({derive_seed(0, 1, "noise"), derive_seed(1, 0, "noise"), derive_seed(0, 1, "time")}) == 3
    first, second = (torch.randn(4, generator=generator(0, 1, "noise")) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("arguments, name", [(([], 4, 0), "buckets"), ((["1x8x8"], 0, 0), "batch_size")])
def test_wrong_arguments(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        BatchSampler(*arguments)
