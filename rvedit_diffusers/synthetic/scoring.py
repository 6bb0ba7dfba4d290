"""Score an edited clip of the benchmark: each operation against wrong edits, which can be rendered; and the rest."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from itertools import combinations

import numpy as np

from .items import BenchmarkItem
from .metrics import differs, edit_overlap, flicker, optical_flow, psnr, ssim, warping_error
from .operations import LOCAL, Operation, apply_operations, follow, wrong_values
from .scenes import Scene


CEILING_MARGIN = 3.0  # dB that an edit may lose against the autoencoder, outside of what it has to change
# Where a right and a wrong edit differ by no more, or in fewer pixels of a frame, an autoencoder's noise would decide.
# The tiles of a brown wall differ by 32.
DISTINCT_DIFFERENCE, DISTINCT_PIXELS = 30, 6

Operations = tuple[Operation, ...]


class Place:
    """Some pixels of a clip, in which clips are compared frame by frame.

    Args:
        indices (`np.ndarray`): Of the pixels in all frames together, ascending.
        shape (`tuple[int, int, int]`): Frames, height and width of the clip.
    """

    def __init__(self, indices: np.ndarray, shape: tuple[int, int, int]):
        self.indices, self.shape = indices, shape
        bounds = np.searchsorted(indices, np.arange(shape[0] + 1) * (shape[1] * shape[2]))
        self.filled, self.starts = np.diff(bounds) > 0, bounds[:-1]

    @classmethod
    def where(cls, region: np.ndarray) -> "Place":
        """Where `region`, `(frames, height, width)` bool, is true."""
        return cls(np.flatnonzero(region).astype(np.int32 if region.size < 2**31 else np.int64), region.shape)

    def pixels(self, frames: np.ndarray) -> np.ndarray:
        """Those of a clip, `(pixels, 3)`."""
        return frames.reshape(-1, 3)[self.indices]

    def inside(self, other: "Place") -> np.ndarray:
        """Which pixels of a place that holds all of this one are those of this one."""
        return np.searchsorted(other.indices, self.indices)

    def errors(self, own: np.ndarray, others: Iterable[np.ndarray]) -> np.ndarray:
        """Summed squared differences of the pixels from those of each of several clips, `(others, frames)`."""
        own, found = own.astype(np.float32), []
        for other in others:
            difference = own - other
            squares = np.einsum("pc, pc -> p", difference, difference)  # faster than a sum over channels
            found.append(np.zeros(self.shape[0]))
            if self.filled.any():
                found[-1][self.filled] = np.add.reduceat(squares, self.starts[self.filled], dtype=np.float64)
        return np.stack(found)


class Contest:
    """Renderings with the right operation and with one wrong one, in step with each other, and where they differ.

    Of the wrong ones the pixels are kept that count: whole clips of all wrong edits would be tens of gigabytes.

    Args:
        right, wrong (`list[np.ndarray]`): Clips, the first ones with all other operations, the others with parts.
        region (`np.ndarray`): Where the right operation belongs, `(frames, height, width)` bool.
        inside ([`Place`]): The same.
        difference (`int`): Of 255, from which on a pixel counts as different.
    """

    def __init__(
        self, right: list[np.ndarray], wrong: list[np.ndarray], region: np.ndarray, inside: Place, difference: int
    ):
        self.right, self.inside = right, inside
        apart = [differs(*pair, difference) for pair in zip(right, wrong, strict=True)]
        self.counts = (apart[0] & region).sum((1, 2)) >= DISTINCT_PIXELS
        beside = [each & ~region for each in apart]
        self.counts_elsewhere = [each.sum((1, 2)) >= DISTINCT_PIXELS for each in beside]
        self.places = [Place.where(each) for each in beside]
        self.whole = Place.where(np.logical_or.reduce([region, *beside]))
        self.wrong = [self.whole.pixels(each) for each in wrong]

    def won(self, frames: np.ndarray, right_errors: np.ndarray, share: float) -> bool:
        """Whether a clip shows the right operation, and not the wrong one as well, in `share` of the frames.

        `right_errors` are those of `right` inside, `(versions, frames)`; several contests have the same.
        """
        own, at = self.whole.pixels(frames), self.inside.inside(self.whole)
        nearer = right_errors.min(0) < self.inside.errors(own[at], (each[at] for each in self.wrong)).min(0)
        if self.counts.any() and nearer[self.counts].mean() < share:
            return False
        if not any(len(place.indices) for place in self.places):
            return True
        # what the wrong one changes elsewhere has to be as the other operations, so far as they were done, left it
        done = self.whole.errors(own, map(self.whole.pixels, self.right)).sum(1).argmin()
        counts, place = self.counts_elsewhere[done], self.places[done]
        at = place.inside(self.whole)
        right, wrong = place.errors(own[at], (place.pixels(self.right[done]), self.wrong[done][at]))
        return not counts.any() or (right < wrong)[counts].mean() >= share

    def wrong_errors(self, frames: np.ndarray, place: Place) -> np.ndarray:
        """Of the nearest wrong version, in a place that holds all that differs: `(frames,)`."""
        at, versions = self.whole.inside(place), []
        for right, wrong in zip(self.right, self.wrong, strict=True):
            versions.append(place.pixels(right))
            versions[-1][at] = wrong
        return place.errors(place.pixels(frames), versions).min(0)


def box(scene: Scene, index: int) -> np.ndarray:
    """A box around object `index` that holds every shape of its size: `(frames, height, width)` bool."""
    thing, shorter = scene.objects[index], min(scene.height, scene.width)
    centre = np.array(thing.path) * (scene.width, scene.height)
    reach = 1.35 * thing.radius * shorter + 1.0
    columns = np.abs(np.arange(scene.width) + 0.5 - centre[:, :1]) <= reach
    rows = np.abs(np.arange(scene.height) + 0.5 - centre[:, 1:]) <= reach
    return rows[:, :, None] & columns[:, None, :]


class Judge:
    """Says of each operation of one item whether an edited clip shows it; renders the wrong edits once.

    An operation is right if in most frames the clip is nearer to a rendering with the operation than to each rendering
    with a wrong one: in the boxes around its object before and after, and where the wrong one would change the picture
    elsewhere. Whether the *other* operations are done is left open: both sides are rendered with every part of them,
    and the nearest one counts, frame by frame.

    Args:
        item ([`BenchmarkItem`]): Whose edits are judged.
        share (`float`, defaults to 0.8): Of the frames that has to be right, in (0, 1].
    """

    def __init__(self, item: BenchmarkItem, share: float = 0.8):
        if not 0 < share <= 1:
            raise ValueError(f"`share` has to be in (0, 1], but is {share}")
        self.item, self.share = item, share
        self.renderings: dict = {}

    def render(self, operations: Operations) -> np.ndarray:
        if not set(operations) <= set(self.item.operations):
            return self.item.render(operations)  # a wrong one, which is needed once
        scene = apply_operations(self.item.scene, operations)
        if scene not in self.renderings:
            self.renderings[scene] = self.item.render(operations)
        return self.renderings[scene]

    def versions(self, step: int, operation: Operation | None) -> list[Operations]:
        """All operations with `operation` in place of number `step`; then, instead of all others, parts of them."""
        operations, size = self.item.operations, len(self.item.operations)
        rest = [number for number in range(size) if number != step]
        parts = [part for count in range(len(rest), -1, -1) for part in combinations(rest, count)]
        chosen = {step: operation} if operation is not None else {}
        return [
            tuple(chosen.get(n, operations[n]) for n in range(size) if n in part or n == step and chosen)
            for part in parts
        ]

    def wrong_operations(self, step: int) -> dict[str, Operation | None]:
        """What could have been done instead of operation `step`, by failure label; `None` is nothing."""
        operation, targets = self.item.operations[step], {o.target for o in self.item.operations}
        wrong: dict[str, Operation | None] = {"no edit": None}
        if operation.kind in LOCAL and operation.kind != "add":
            others = [number for number in range(len(self.item.scene.objects)) if number not in targets]
            wrong |= {f"wrong object: {number}": replace(operation, target=number) for number in others}
        return wrong | {
            f"wrong value: {' '.join(value)}": replace(operation, value=value) for value in wrong_values(operation)
        }

    def boxes(self, step: int) -> np.ndarray:
        """Boxes around the object of operation `step`, before and after it: `(frames, height, width)` bool."""
        target, found = self.item.operations[step].target, np.zeros(self.item.source_frames.shape[:3], bool)
        for operation in (None, self.item.operations[step]):
            for operations in self.versions(step, operation):
                scene, numbers = follow(self.item.scene, operations)
                if target in numbers:
                    found |= box(scene, numbers.index(target))
        return found

    @cached_property
    def contests(self) -> list[dict[str, Contest]]:
        """For each operation its contest with each wrong one, by failure label."""
        found = []
        for step, operation in enumerate(self.item.operations):
            right, without = ([self.render(o) for o in self.versions(step, each)] for each in (operation, None))
            changes = np.logical_or.reduce([differs(*pair) for pair in zip(right, without, strict=True)])
            # another value is looked for in the boxes as a whole: an autoencoder blurs the rims, where shapes differ;
            # another object is none of what the operation changes, but may reach into the boxes
            regions = [changes, changes | self.boxes(step)]
            places = list(map(Place.where, regions))
            found.append({})
            for label, other in self.wrong_operations(step).items():
                is_boxes = not label.startswith("wrong object")
                wrong = [self.render(operations) for operations in self.versions(step, other)]
                least = 2 if label == "no edit" else DISTINCT_DIFFERENCE  # a style may change all pixels by little
                found[-1][label] = Contest(right, wrong, regions[is_boxes], places[is_boxes], least)
        return found

    def __call__(self, frames: np.ndarray) -> list[str]:
        """Judge an edited clip.

        Args:
            frames (`np.ndarray` of shape `(frames, height, width, 3)`): uint8, of the size of the source.

        Returns:
            `list[str]`: For each operation `"success"`, `"no edit"`, `"wrong object: 2"` or `"wrong value: red"`: the
            wrong edit that the clip is nearest to.
        """
        check_frames(frames, self.item, "frames")
        verdicts = []
        for contests in self.contests:
            right = contests["no edit"].right
            places = {contest.inside for contest in contests.values()}
            right_errors = {place: place.errors(place.pixels(frames), map(place.pixels, right)) for place in places}
            lost = {
                label: contest
                for label, contest in contests.items()
                if not contest.won(frames, right_errors[contest.inside], self.share)
            }
            if not lost:
                verdicts.append("success")
                continue
            indices = np.unique(np.concatenate([contest.whole.indices for contest in lost.values()]))
            place = Place(indices, frames.shape[:3])
            wrong = np.stack([contest.wrong_errors(frames, place) for contest in lost.values()])
            # frames that are right say nothing about what went wrong
            failed = wrong.min(0) <= place.errors(place.pixels(frames), map(place.pixels, right)).min(0)
            nearest = wrong[:, failed if failed.any() else slice(None)].sum(1).argmin()
            verdicts.append(list(lost)[nearest])
        return verdicts


def check_frames(frames: np.ndarray, item: BenchmarkItem, name: str) -> None:
    wanted = item.source_frames.shape
    if frames.shape != wanted or frames.dtype != np.uint8:
        raise ValueError(f"`{name}` has to be uint8 of shape {wanted}, but is {frames.dtype} of {frames.shape}")


def union_success(verdicts: list[str], outside_psnr: float, vae_psnr: float) -> bool:
    """Whether a clip is right as a whole: every operation, and nothing else spoiled.

    Args:
        verdicts (`list[str]`): Of the [`Judge`].
        outside_psnr, vae_psnr (`float`): Of the clip and of the reconstructed target, in dB, outside of the edit.
    """
    return set(verdicts) == {"success"} and outside_psnr >= vae_psnr - CEILING_MARGIN


def score(
    frames: np.ndarray, item: BenchmarkItem, reconstruction: np.ndarray, judge: Judge | None = None
) -> dict[str, float | str]:
    """All that the benchmark measures of one edited clip.

    Args:
        frames (`np.ndarray` of shape `(frames, height, width, 3)`): The edited clip, uint8.
        item ([`BenchmarkItem`]): What was asked for.
        reconstruction (`np.ndarray` of the same shape): The true target as the editor's autoencoder gives it back,
            uint8: the ceiling of what an edit can reach.
        judge ([`Judge`], *optional*): That of the item, where several clips are scored for it.

    Returns:
        `dict[str, float | str]`: A flat dictionary of

        - `op_1`, `op_2`, ...: the verdict on each operation, see [`Judge`]; `op_success`: the share that succeeded.
        - `union_success`: 1 if every operation succeeded and `outside_psnr` is at most 3 dB below `vae_psnr`; else 0.
        - `outside_psnr`, `outside_ssim`: against the target, where it has to be like the source but for a grade or a
          style of the whole (`item.outside`); `vae_psnr`, `vae_ssim`: the same of the reconstruction. dB; [-1, 1].
        - `preserved_psnr`: `outside_psnr` where every operation succeeded, else `nan`: doing nothing preserves all.
        - `inside_psnr`, `vae_inside_psnr`: against the target inside of the masks. dB.
        - `edit_iou`, `edit_precision`, `edit_recall`: see [`edit_overlap`].
        - `flicker`: see [`flicker`].
        - `warping_error`: see [`warping_error`], outside of what changes its place; `target_warping_error`: the same
          of the target, which is not 0. Both `nan` without OpenCV.
    """
    check_frames(frames, item, "frames")
    check_frames(reconstruction, item, "reconstruction")
    verdicts = (judge or Judge(item))(frames)
    target, outside = item.target_frames, item.outside
    scores: dict[str, float | str] = {f"op_{number}": verdict for number, verdict in enumerate(verdicts, 1)}
    scores["op_success"] = verdicts.count("success") / len(verdicts)
    for name, clip in (("outside", frames), ("vae", reconstruction)):
        scores |= {f"{name}_psnr": psnr(clip, target, outside), f"{name}_ssim": ssim(clip, target, outside)}
    scores["union_success"] = float(union_success(verdicts, scores["outside_psnr"], scores["vae_psnr"]))
    scores["preserved_psnr"] = scores["outside_psnr"] if scores["op_success"] == 1 else float("nan")
    scores["inside_psnr"] = psnr(frames, target, item.mask)
    scores["vae_inside_psnr"] = psnr(reconstruction, target, item.mask)
    scores |= edit_overlap(frames, item.source_frames, target) | {"flicker": flicker(frames, target)}
    try:
        motion = optical_flow(item.source_frames)
    except ModuleNotFoundError:
        motion = None
    for name, clip in (("warping_error", frames), ("target_warping_error", target)):
        scores[name] = float("nan") if motion is None else warping_error(clip, motion, outside)
    return scores


def twin_consistency(pairs: Iterable[tuple[dict, dict]]) -> float:
    """The share of pairs of twins of which both have union success, in [0, 1]; `nan` without pairs.

    Args:
        pairs (`Iterable[tuple[dict, dict]]`): The [`score`] of an item and of its twin.
    """
    both = [bool(one["union_success"] and other["union_success"]) for one, other in pairs]
    return float(np.mean(both)) if both else float("nan")
