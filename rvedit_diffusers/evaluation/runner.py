"""Runs an editor over the procedural benchmark: draws, edits and scores items in batches, and records the scores."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKLWan

from ..synthetic import BenchmarkItem, BenchmarkItems, Edit, SyntheticEdits, judge, outside_psnr, score
from ..synthetic.items import TWIN
from ..synthetic.scoring import union_success
from ..video import write_video
from .editors import Task, reconstruct
from .record import ScoreRecord


FPS = 8
CRF = 10  # of H.264, for clips to look at


@dataclass(frozen=True)
class Level:
    """The items of a level, to be scored with [`score`].

    Attributes:
        items ([`BenchmarkItems`]): Of one level.
        twins (`bool`, defaults to `True`): Whether each item's twin is edited and scored as well.
    """

    items: BenchmarkItems
    twins: bool = True

    @property
    def name(self) -> str:
        return self.items.levels[0]

    def id(self, index: int) -> str:
        return f"{self.name}-{self.items.split}-{self.items.seed}-{index}"

    def draw(self, index: int) -> list[BenchmarkItem]:
        """The item, and its twin if it has one and that is wanted."""
        item = self.items[index]
        return [item, item.twin] if self.twins and item.twin is not None else [item]

    def kinds(self, item: BenchmarkItem) -> list[str]:
        return [operation.kind for operation in item.operations]

    def score(self, frames: np.ndarray, item: BenchmarkItem, reconstruction: np.ndarray) -> dict[str, float | str]:
        return score(frames, item, reconstruction)


@dataclass(frozen=True)
class SingleEdits:
    """The edits of one operation by themselves, scored with [`judge`]; they have no twins.

    Attributes:
        edits ([`SyntheticEdits`]): Of one operation.
    """

    edits: SyntheticEdits
    twins = False

    @property
    def name(self) -> str:
        return self.edits.operations[0]

    def id(self, index: int) -> str:
        return f"{self.name}-{self.edits.seed}-{index}"

    def draw(self, index: int) -> list[Edit]:
        return [self.edits[index]]

    def kinds(self, edit: Edit) -> list[str]:
        return [edit.operation]

    def score(self, frames: np.ndarray, edit: Edit, reconstruction: np.ndarray) -> dict[str, float | str]:
        """The verdict of [`judge`] as `op_1` and `op_success`, and `outside_psnr`, `vae_psnr` and `union_success`."""
        verdict = judge(frames, edit)
        outside, ceiling = outside_psnr(frames, edit), outside_psnr(reconstruction, edit)
        return {
            "op_1": verdict,
            "op_success": float(verdict == "success"),
            "union_success": float(union_success([verdict], outside, ceiling)),
            "outside_psnr": outside,
            "vae_psnr": ceiling,
        }


Suite = Level | SingleEdits
Round = tuple[Suite, range]


class InlineExecutor(Executor):
    """Runs what is submitted at once, in the process and thread that submits it."""

    def submit(self, function: Callable, /, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


def _draw(suite: Suite, index: int) -> list[BenchmarkItem] | list[Edit]:
    drawn = suite.draw(index)
    for item in drawn:
        item.source_frames, item.target_frames  # noqa: B018 - rendered and kept here, beside the model's process
    return drawn


def _score(
    suite: Suite, index: int, drawn: list, clips: list[np.ndarray], reconstructions: list[np.ndarray], folder: Path
) -> dict:
    item, name = drawn[0], suite.id(index)
    write_video(folder / f"{name}.mp4", clips[0], FPS, crf=CRF)
    scores = [suite.score(*parts) for parts in zip(clips, drawn, reconstructions, strict=True)]
    entry = {
        "id": name,
        "suite": suite.name,
        "index": index,
        "instruction": item.instruction,
        "kinds": suite.kinds(item),
        "scores": scores[0],
    }
    return entry | ({"twin": scores[1] if len(scores) > 1 else None} if suite.twins else {})


def is_scored(entries: dict[str, dict], suite: Suite, index: int) -> bool:
    """Whether a record has the scores of an item, and those of its twin if they are wanted."""
    entry = entries.get(suite.id(index))
    return entry is not None and (not suite.twins or "twin" in entry)


def pending_rounds(
    suites: Sequence[Suite], num_samples: int, batch_size: int, entries: dict[str, dict]
) -> list[Round]:
    """The batches that are not scored yet, each of one suite, in order.

    Which items go together depends on `num_samples` and `batch_size` alone, so that several processes that share the
    batches, or a run that was stopped, compute what one run of one process does.

    Args:
        suites (`Sequence[Suite]`): [`Level`]s or [`SingleEdits`].
        num_samples (`int`): Items of each, at least 1.
        batch_size (`int`): Clips that are edited together; an item and its twin are never apart.
        entries (`dict[str, dict]`): Of the record.
    """
    rounds = []
    for suite in suites:
        size = max(1, batch_size // 2) if suite.twins else batch_size
        starts = range(0, num_samples, size)
        rounds += [(suite, range(start, min(start + size, num_samples))) for start in starts]
    return [(suite, span) for suite, span in rounds if not all(is_scored(entries, suite, index) for index in span)]


def score_rounds(
    editor: Callable[[list[Task]], list[np.ndarray]],
    vae: AutoencoderKLWan,
    rounds: Sequence[Round],
    record: ScoreRecord,
    executor: Executor | None = None,
) -> Iterator[None]:
    """Edit and score batches of items, and record each batch when it is done.

    The edited clips (not those of twins) are kept as `clips/ID.mp4` in the record's folder.

    Args:
        editor (`Callable`): [`PipelineEditor`], [`CopySource`] or [`VaeCeiling`].
        vae (`AutoencoderKLWan`): Whose reconstruction of the true edits is the ceiling.
        rounds (`Sequence[Round]`): See [`pending_rounds`].
        record ([`ScoreRecord`]): Where scores go.
        executor (`Executor`, *optional*): Draws and scores. With a pool of processes the next batch is drawn, and the
            one before scored, while the editor works. By default all is done one after the other.

    Yields:
        After each batch that was recorded.
    """
    executor = InlineExecutor() if executor is None else executor
    folder = record.folder / "clips"
    folder.mkdir(exist_ok=True)
    scoring: list[list[Future]] = []
    drawing = [executor.submit(_draw, rounds[0][0], index) for index in rounds[0][1]] if rounds else []
    for number, (suite, span) in enumerate(rounds):
        drawn = [future.result() for future in drawing]
        if number + 1 < len(rounds):
            drawing = [executor.submit(_draw, rounds[number + 1][0], index) for index in rounds[number + 1][1]]
        tasks = [
            Task(suite.id(index) + suffix, item.source_frames, item.instruction, item.target_frames)
            for index, pair in zip(span, drawn, strict=True)
            for item, suffix in zip(pair, ("", TWIN))
        ]
        clips = iter(editor(tasks))
        rebuilt = iter(reconstruct(vae, [task.target for task in tasks]))
        scoring.append(
            [
                executor.submit(
                    _score, suite, index, pair, [next(clips) for _ in pair], [next(rebuilt) for _ in pair], folder
                )
                for index, pair in zip(span, drawn, strict=True)
            ]
        )
        while scoring and (len(scoring) > 1 or all(future.done() for future in scoring[0])):
            record.append([future.result() for future in scoring.pop(0)])
            yield
    for futures in scoring:
        record.append([future.result() for future in futures])
        yield
