import numpy as np
import pytest

from rvedit_diffusers.synthetic import TEST_PHOTOS, TRAIN_LEVELS, TRAIN_PHOTOS, BenchmarkItems, SyntheticEdits
from rvedit_diffusers.synthetic.wording import swapped_words
from rvedit_diffusers.training.data import Bucket, Pair, Plan
from rvedit_diffusers.training.pairs import BenchmarkPairs, FilePairs, SyntheticPairs


SIZE = {"num_frames": 5, "height": 32, "width": 32}
BUCKET = Bucket(*SIZE.values())


@pytest.fixture(scope="module")
def pairs():
    return BenchmarkPairs(BenchmarkItems(TRAIN_LEVELS, 3, split="train", **SIZE), 28, 8.0)


def test_an_item_is_followed_by_its_twin(pairs):
    assert len(pairs) == 28 and pairs.bucket(0) == Bucket(5, 32, 32) and pairs.fps(0) == 8.0
    for index in range(2, 14, 2):  # of L1 to L6, which all have twins
        (source, target), (twin_source, twin_target) = pairs.load(index), pairs.load(index + 1)
        np.testing.assert_array_equal(source, twin_source)
        assert (target != twin_target).any() and (source != target).any()
        assert swapped_words(pairs.instruction(index), pairs.instruction(index + 1)) == 1


def test_a_pair_knows_its_twin():
    pairs = BenchmarkPairs(BenchmarkItems("L1", 3, split="train", **SIZE), 5, 8.0)
    assert [pairs.twin(index) for index in range(5)] == [1, 0, 3, 2, 4]


def test_an_item_without_a_twin_comes_twice():
    items = BenchmarkItems("L0", 3, split="train", **SIZE)
    index = next(index for index in range(100) if items[index].twin is None)
    pairs = BenchmarkPairs(items, 200, 8.0)
    assert pairs.instruction(2 * index) == pairs.instruction(2 * index + 1) == items[index].instruction


def test_keys_tell_apart_all_that_is_drawn(pairs):
    items = [
        BenchmarkItems(TRAIN_LEVELS, 4, split="train", **SIZE),
        BenchmarkItems(TRAIN_LEVELS, 3, split="test", **SIZE),
        BenchmarkItems(TRAIN_LEVELS[::-1], 3, split="train", **SIZE),
        BenchmarkItems(TRAIN_LEVELS, 3, split="train", **SIZE | {"num_frames": 9}),
        BenchmarkItems(TRAIN_LEVELS, 3, split="train", **SIZE, kinds=("recolour", "resize", "grade")),
        BenchmarkItems(TRAIN_LEVELS, 3, split="train", **SIZE, kinds=("recolour", "resize", "stylise")),
    ]
    others = [BenchmarkPairs(each, 28, 8.0).key(0) for each in items] + [BenchmarkPairs(pairs.items, 28, 9.0).key(0)]
    keys = {pairs.key(index) for index in range(len(pairs))}
    assert len(keys) == len(pairs) and len(set(others)) == len(others) and keys.isdisjoint(others)


def test_a_key_is_that_of_the_same_item_in_another_list(pairs):
    """Pairs that were encoded for one choice of levels serve another one."""
    other = BenchmarkPairs(BenchmarkItems(("L0", "L1"), 3, split="train", **SIZE), 4, 8.0)
    assert [other.key(index) for index in range(4)] == [pairs.key(index) for index in range(4)]
    assert [other.instruction(index) for index in range(4)] == [pairs.instruction(index) for index in range(4)]


def test_held_out_pairs_are_of_the_same_kinds():
    items = BenchmarkItems("L2", 3, split="train", **SIZE, kinds=("remove",))
    held_out = BenchmarkPairs(items, 4, 8.0).hold_out(4, seed=0)[1]
    assert held_out.items.kinds == ("remove",) and held_out.items.seed != items.seed


def test_held_out_pairs_are_of_other_scenes_over_the_same_photographs(pairs):
    kept, held_out = pairs.hold_out(14, seed=0)
    assert kept is pairs and len(held_out) == 14
    assert held_out.items.seed != pairs.items.seed and held_out.items.levels == pairs.items.levels
    assert {held_out.key(i) for i in range(14)}.isdisjoint(pairs.key(i) for i in range(28))
    scene = held_out.items[0].scene
    assert scene.photos == TRAIN_PHOTOS and not set(scene.photos) & set(TEST_PHOTOS)


def file_pairs(folder, names):
    """A pair for each name of a source, of which those that begin with the same letter hold the same bytes."""
    plans = []
    for row, name in enumerate(names):
        (folder / name).write_text(name[0])
        plans.append(Plan(Pair(folder / name, folder / "edited", f"edit {row}", row), BUCKET, 8, (0,), (0,), "kept"))
    return FilePairs(plans)


def sources(pairs):
    return [plan.pair.source.name for plan in pairs.plans]


def test_held_out_files_are_not_trained_on(tmp_path):
    pairs = file_pairs(tmp_path, "abcdefghijklmnopqrst")
    kept, held_out = pairs.hold_out(4, seed=1)
    assert len(held_out) == 4 and sorted(sources(kept) + sources(held_out)) == sources(pairs)
    assert sources(pairs.hold_out(4, seed=1)[1]) == sources(held_out) != sources(pairs.hold_out(4, seed=2)[1])


def test_all_edits_of_a_clip_are_held_out_or_none(tmp_path):
    pairs = file_pairs(tmp_path, ["a", "b", "a", "c", "b", "a copy", "d", "b", "e", "c", "c"])
    for seed in range(8):
        kept, held_out = pairs.hold_out(4, seed)
        assert 0 < len(held_out) <= 4 and len(kept) + len(held_out) == 11
        assert {name[0] for name in sources(kept)}.isdisjoint(name[0] for name in sources(held_out))
    assert not len(file_pairs(tmp_path, "aab").hold_out(0, 0)[1])
    with pytest.raises(ValueError, match="--num_validation_pairs has to leave pairs to train on, but is 2 of 2"):
        file_pairs(tmp_path, "ab").hold_out(2, 0)


def test_a_pair_more_changes_little_of_what_is_held_out(tmp_path):
    before = set(sources(file_pairs(tmp_path, "abcdefghijklmnopqrst").hold_out(6, seed=3)[1]))
    after = set(sources(file_pairs(tmp_path, "zabcdefghijklmnopqrst").hold_out(6, seed=3)[1]))
    assert len(before) == len(after) == 6 and len(before & after) >= 5


@pytest.mark.parametrize("captioned", [False, True])
def test_held_out_edits_are_of_other_scenes(captioned):
    pairs = SyntheticPairs(SyntheticEdits(3, **SIZE), 8, 8.0, captioned)
    kept, held_out = pairs.hold_out(4, seed=1)
    assert len(held_out) == 4 and held_out.captioned == captioned
    assert {held_out.key(index) for index in range(4)}.isdisjoint(kept.key(index) for index in range(len(kept)))
