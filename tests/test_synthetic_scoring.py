"""The metrics, guarded by edits of which is known what is right about them."""

import builtins
import tracemalloc
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from rvedit_diffusers.synthetic import LEVELS, BenchmarkItems, Judge, Operation, psnr, score, twin_consistency
from rvedit_diffusers.synthetic.backgrounds import WALLS
from rvedit_diffusers.synthetic.metrics import edit_overlap, flicker, optical_flow, ssim, warping_error
from rvedit_diffusers.synthetic.operations import LOCAL
from rvedit_diffusers.synthetic.scoring import union_success


NUM_ITEMS, NUM_FRAMES, SIDE = 24, 5, 48
NOISE = 14  # of 255: an autoencoder of 25 dB


def noisy(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, NOISE, frames.shape)
    return np.clip(np.round(frames + noise), 0, 255).astype(np.uint8)


@cache
def guard_rows(level: str) -> dict[str, list]:
    """Verdicts on clips that are known to be right or wrong, for `NUM_ITEMS` items of a level.

    A row of `copy source`, `target`, `ceiling` or `also another object` is `(verdicts, union success)`; one of `wrong
    object` or `wrong value` is the verdict on one operation; one of `any object` whether it is right, by object.
    """
    rows = {
        name: []
        for name in ("copy source", "target", "ceiling", "wrong object", "also another", "wrong value", "any object")
    }
    items = BenchmarkItems(level, 31, num_frames=NUM_FRAMES, height=SIDE, width=SIDE)
    for item in (items[index] for index in range(NUM_ITEMS)):
        judge, operations, rng = Judge(item), item.operations, np.random.default_rng(item.index)
        ceiling = psnr(noisy(item.target_frames, item.index), item.target_frames, item.outside)

        def whole(frames, item=item, judge=judge, ceiling=ceiling):
            verdicts = judge(frames)
            return verdicts, union_success(verdicts, psnr(frames, item.target_frames, item.outside), ceiling)

        rows["copy source"].append(whole(item.source_frames))
        rows["target"].append(whole(item.target_frames))
        rows["ceiling"].append(whole(noisy(item.target_frames, item.index)))
        step = int(rng.integers(len(operations)))
        operation, targets = operations[step], {o.target for o in operations}
        before, after = operations[:step], operations[step + 1 :]

        def instead(*others, item=item, before=before, after=after):
            return item.render((*before, *others, *after))

        labels = judge.wrong_operations(step)
        wrong_values = [label for label in labels if label.startswith("wrong value")]
        # what is white already is not edited by turning white; a colour that a later operation changes is none
        same = (instead(), item.target_frames)
        wrong_values = [
            name for name in wrong_values if not any(np.array_equal(instead(labels[name]), c) for c in same)
        ]
        label = wrong_values[rng.integers(len(wrong_values))] if wrong_values else None
        if label:
            rows["wrong value"].append((label, judge(instead(labels[label]))[step]))
        free = [number for number in range(len(item.scene.objects)) if number not in targets]
        if operation.kind not in LOCAL or operation.kind == "add" or not free:
            continue
        other = replace(operation, target=free[rng.integers(len(free))])
        if len(operations) == 1:
            objects = [replace(operation, target=number) for number in range(len(item.scene.objects))]
            rows["any object"].append([judge(instead(each)) == ["success"] for each in objects])
        rows["wrong object"].append(judge(noisy(instead(other)))[step])
        if not np.array_equal(instead(operation, other), item.target_frames):
            rows["also another"].append(whole(instead(operation, other)))
    return rows


@pytest.mark.parametrize("level", LEVELS)
def test_copying_the_source_never_succeeds(level):
    for verdicts, union in guard_rows(level)["copy source"]:
        assert set(verdicts) == {"no edit"} and not union


@pytest.mark.parametrize("level", LEVELS)
def test_the_target_always_succeeds(level):
    assert all(union for _, union in guard_rows(level)["target"])


@pytest.mark.parametrize("level", LEVELS)
def test_the_ceiling_of_an_autoencoder_succeeds(level):
    assert np.mean([union for _, union in guard_rows(level)["ceiling"]]) >= 0.95


LOCAL_LEVELS = [level for level in LEVELS if level != "L0"]


@pytest.mark.parametrize("level", LOCAL_LEVELS)
def test_editing_the_wrong_object_fails(level):
    verdicts = guard_rows(level)["wrong object"]
    assert len(verdicts) >= 5 and "success" not in verdicts


@pytest.mark.parametrize("level", ["L1", "L2"])
def test_the_wrong_object_is_called_so(level):
    verdicts = [verdict for verdict in guard_rows(level)["wrong object"] if verdict != "no edit"]
    assert len(verdicts) >= 10 and all(verdict.startswith("wrong object") for verdict in verdicts)


@pytest.mark.parametrize("level", LOCAL_LEVELS)
def test_editing_another_object_as_well_fails(level):
    rows = guard_rows(level)["also another"]
    assert len(rows) >= 5 and not any(union for _, union in rows)


@pytest.mark.parametrize("level", ["L1", "L2"])
def test_one_of_k_objects_is_right(level):
    rows = guard_rows(level)["any object"]
    chance = np.mean([1 / len(row) for row in rows])
    assert len(rows) >= 10 and np.mean([np.mean(row) for row in rows]) == pytest.approx(chance)


@pytest.mark.parametrize("level", LEVELS)
def test_a_wrong_value_is_called_so(level):
    rows = guard_rows(level)["wrong value"]
    assert len(rows) >= 10 and "success" not in [verdict for _, verdict in rows]
    assert np.mean([verdict == label for label, verdict in rows]) >= 0.9


def first(level: str, kind: str):
    items = BenchmarkItems(level, 31, num_frames=NUM_FRAMES, height=SIDE, width=SIDE)
    return next(item for item in map(items.__getitem__, range(200)) if item.kind == kind)


@pytest.mark.parametrize("wall", WALLS)
def test_each_wall_is_told_from_the_others(wall):
    item = replace(first("L0", "background"), operations=(Operation("background", None, tuple(wall.split()[:2])),))
    (contests,) = Judge(item).contests
    assert len(contests) == 1 + 2 + 3 and all(contest.counts.all() for contest in contests.values())


def test_each_operation_is_judged_by_itself():
    item = first("L3", "recolour+remove")
    judge, (recolour, remove) = Judge(item), item.operations
    assert judge(item.render((recolour,))) == ["success", "no edit"]
    assert judge(item.render((remove,))) == ["no edit", "success"]
    item = first("L4", "replace+move")
    judge, (replaced, moved) = Judge(item), item.operations
    assert judge(item.render((replaced,))) == ["success", "no edit"]
    assert judge(item.render((moved,))) == ["no edit", "success"]


def test_a_local_operation_is_right_without_the_grade():
    item = first("L5", "remove+grade")
    assert Judge(item)(item.render(item.operations[:1])) == ["success", "no edit"]


@pytest.mark.parametrize("right, verdict", [(5, "success"), (4, "success"), (3, "no edit")])
def test_four_frames_of_five_have_to_be_right(right, verdict):
    item = first("L1", "recolour")
    frames = np.concatenate([item.target_frames[:right], item.source_frames[right:]])
    assert Judge(item)(frames) == [verdict]


def test_a_spoiled_background_fails_the_union_alone():
    item = first("L2", "recolour")
    ceiling = noisy(item.target_frames)
    spoiled = item.target_frames.copy()
    spoiled[item.outside] = np.clip(spoiled[item.outside].astype(int) + 40, 0, 255)
    scores = score(spoiled, item, ceiling)
    assert scores["op_1"] == "success" and scores["op_success"] == 1 and scores["union_success"] == 0
    assert scores["outside_psnr"] < scores["vae_psnr"] - 3 and scores["inside_psnr"] > 100
    assert score(ceiling, item, ceiling)["union_success"] == 1


def test_preservation_counts_only_where_the_edit_succeeded():
    item = first("L1", "remove")
    copied = score(item.source_frames, item, noisy(item.target_frames))
    assert copied["outside_psnr"] > 40 and np.isnan(copied["preserved_psnr"])
    done = score(item.target_frames, item, noisy(item.target_frames))
    assert done["preserved_psnr"] == done["outside_psnr"]


def test_each_score_is_of_its_own_clip():
    item = first("L2", "remove")
    ceiling = noisy(item.target_frames)
    scores = score(item.source_frames, item, ceiling)
    assert scores["edit_recall"] == 0 and scores["flicker"] == flicker(item.source_frames, item.target_frames) > 0
    assert scores["outside_ssim"] == ssim(item.source_frames, item.target_frames, item.outside)
    assert scores["vae_ssim"] == ssim(ceiling, item.target_frames, item.outside) != scores["outside_ssim"]
    assert scores["inside_psnr"] == psnr(item.source_frames, item.target_frames, item.mask)
    assert scores["vae_inside_psnr"] == psnr(ceiling, item.target_frames, item.mask)


def test_scores_are_flat_numbers_and_verdicts():
    item = first("L3", "recolour+remove")
    scores = score(item.target_frames, item, item.target_frames)
    assert {"op_1", "op_2", "vae_ssim", "edit_iou", "flicker", "warping_error"} <= set(scores)
    assert all(type(value) is (str if name in ("op_1", "op_2") else float) for name, value in scores.items())
    assert scores["edit_iou"] == 1 and scores["flicker"] == 0 and scores["outside_ssim"] == pytest.approx(1)


def clip(*values: int) -> np.ndarray:
    return np.stack([np.full((16, 16, 3), value, np.uint8) for value in values])


def test_edit_overlap_of_a_known_case():
    source, target, frames = clip(100, 100), clip(100, 100), clip(100, 100)
    target[:, :, 4:8] = 200
    frames[:, :, 4:12] = 200
    found = edit_overlap(frames, source, target)
    # an edit of 4 columns shows in 6 of them after averaging, one of 8 columns in 10
    assert found == {"edit_iou": 6 / 10, "edit_precision": 6 / 10, "edit_recall": 1.0}
    nothing = edit_overlap(source, source, target)
    assert nothing["edit_iou"] == nothing["edit_recall"] == 0 and np.isnan(nothing["edit_precision"])
    assert edit_overlap(noisy(target), source, target)["edit_iou"] > 0.9


def test_flicker_is_change_that_the_target_does_not_have():
    assert flicker(clip(10, 30, 50), clip(10, 30, 50)) == 0
    assert flicker(clip(15, 35, 55), clip(10, 30, 50)) == 0
    assert flicker(clip(10, 40, 50), clip(10, 30, 50)) == 10


def test_ssim_looks_inside_of_the_region():
    frames = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    spoiled, region = frames.copy(), np.zeros(frames.shape[:3], bool)
    spoiled[:, :, 16:] = 0
    region[:, :, :12] = True
    assert ssim(spoiled, frames, region) == pytest.approx(1)
    assert ssim(spoiled, frames) < 0.7


def moving(speed: int) -> np.ndarray:
    y, x = np.mgrid[:64, :120]
    wide = 127 + 60 * np.sin(x / 5.0) + 60 * np.sin(y / 7.0 + x / 11.0)
    frames = [wide[:, start : start + 64] for start in range(0, 5 * speed, speed)]
    return np.repeat(np.stack(frames)[..., None], 3, -1).astype(np.uint8)


def test_warping_follows_the_source():
    source = moving(3)
    motion = optical_flow(source)
    assert np.median(motion[0][..., 0]) == pytest.approx(-3, abs=0.3)
    followed, still = warping_error(source, motion), warping_error(np.repeat(source[:1], 5, 0), motion)
    assert followed < 0.001 and still > 10 * followed
    flickering = source.copy()
    flickering[1::2] = flickering[1::2] // 2
    assert warping_error(flickering, motion) > 10 * followed
    left_out = np.ones(source.shape[:3], bool)
    left_out[:] = False
    assert np.isnan(warping_error(source, motion, left_out))


def test_without_opencv_only_the_warping_error_is_missing(monkeypatch):
    def refuse(name, *args, plain=builtins.__import__, **kwargs):
        if name == "cv2":
            raise ModuleNotFoundError("No module named 'cv2'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    item = first("L1", "remove")
    with pytest.raises(ModuleNotFoundError, match="pip install opencv-python-headless"):
        optical_flow(item.source_frames)
    scores = score(item.target_frames, item, item.target_frames)
    assert np.isnan(scores["warping_error"]) and scores["union_success"] == 1


def test_twins_are_consistent_when_both_are_right():
    right, wrong = {"union_success": 1.0}, {"union_success": 0.0}
    assert twin_consistency([(right, right), (right, wrong), (wrong, right), (wrong, wrong)]) == 0.25
    assert np.isnan(twin_consistency([]))


def test_a_twin_asks_for_something_else():
    item = first("L2", "recolour")
    assert Judge(item)(item.twin.target_frames) != ["success"]
    assert Judge(item.twin)(item.twin.target_frames) == ["success"]


def test_clips_of_another_size_and_bad_shares_are_refused():
    item = first("L1", "remove")
    with pytest.raises(ValueError, match="`frames`"):
        Judge(item)(item.source_frames[:2])
    with pytest.raises(ValueError, match="`reconstruction`"):
        score(item.source_frames, item, item.source_frames.astype(np.float32))
    with pytest.raises(ValueError, match="`share`"):
        Judge(item, share=0)


def test_an_operation_on_nothing_is_no_edit():
    item = first("L1", "remove")
    assert np.array_equal(item.render((Operation("remove", 99),)), item.source_frames)


def test_a_judge_keeps_no_clips_of_wrong_edits():
    """Of three operations there are hundreds; examples/evaluate.py counts on the memory of 100 clips at most."""
    items = BenchmarkItems("L6", 31, num_frames=9, height=96, width=160)
    item = next(item for item in map(items.__getitem__, range(9)) if len(item.operations) == 3)
    one, judge = item.source_frames.nbytes, Judge(item)
    tracemalloc.start()
    judge(item.source_frames)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 20 * one < peak < 100 * one
