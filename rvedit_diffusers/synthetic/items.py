"""An item of the benchmark: a scene, operations in order, an instruction, and its twin."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .metrics import differs
from .operations import LOCAL, Operation, apply_operations
from .scenes import Scene, render, scene_background


TWIN = "-twin"


@dataclass(frozen=True)
class BenchmarkItem:
    """What to do to one scene, with everything that follows from it.

    Attributes:
        id (`str`): `level-split-seed-index`, with `-twin` for a twin.
        level (`str`): One of `LEVELS`.
        seed, index (`int`): The list that the item is of, and its place there.
        scene ([`Scene`]): The scene graph before.
        operations (`tuple[Operation, ...]`): In the order of the instruction, which is the order of their effect.
        instruction (`str`): What a user would type.
        twin_operations, twin_instruction (*optional*): Of the twin; `None` where there is none.
    """

    id: str
    level: str
    seed: int
    index: int
    scene: Scene
    operations: tuple[Operation, ...]
    instruction: str
    twin_operations: tuple[Operation, ...] | None = None
    twin_instruction: str | None = None

    @property
    def kind(self) -> str:
        """The kinds of the operations, `recolour+grade`."""
        return "+".join(operation.kind for operation in self.operations)

    @cached_property
    def twin(self) -> "BenchmarkItem | None":
        """The item of the same scene whose instruction differs in one word; the item is the twin of its twin."""
        if self.twin_operations is None:
            return None
        return replace(
            self,
            id=self.id.removesuffix(TWIN) if self.id.endswith(TWIN) else self.id + TWIN,
            operations=self.twin_operations,
            instruction=self.twin_instruction,
            twin_operations=self.operations,
            twin_instruction=self.instruction,
        )

    @cached_property
    def edited(self) -> Scene:
        """The scene graph after all operations."""
        return apply_operations(self.scene, self.operations)

    @cached_property
    def background(self) -> np.ndarray:
        """What is behind the objects of the source, `(frames, height, width, 3)` float32 in [0, 1]."""
        return scene_background(self.scene)

    @cached_property
    def source_frames(self) -> np.ndarray:
        """`(frames, height, width, 3)` uint8."""
        return self.render(())

    @cached_property
    def target_frames(self) -> np.ndarray:
        """`(frames, height, width, 3)` uint8."""
        return self.render(self.operations)

    def render(self, operations: tuple[Operation, ...]) -> np.ndarray:
        """The source scene after other operations: `(frames, height, width, 3)` uint8."""
        scene = apply_operations(self.scene, operations)
        same = scene.background == self.scene.background
        return render(scene, self.background if same else None)

    @cached_property
    def masks(self) -> np.ndarray:
        """What each operation changes at its turn by more than 2 of 255: `(operations, frames, height, width)` bool.

        Of a grade or a style, which are about the whole picture, everything.
        """
        steps = [self.render(self.operations[:count]) for count in range(len(self.operations) + 1)]
        return np.stack(
            [
                np.ones(before.shape[:3], bool) if operation.kind in ("grade", "stylise") else differs(before, after)
                for operation, before, after in zip(self.operations, steps, steps[1:])
            ]
        )

    @cached_property
    def mask(self) -> np.ndarray:
        """What any operation changes: `(frames, height, width)` bool, the union of `masks`."""
        return self.masks.any(0)

    @cached_property
    def outside(self) -> np.ndarray:
        """What has to stay as it is, but for a grade or a style of the whole: `(frames, height, width)` bool.

        The complement of the masks of all other operations.
        """
        placed = [operation.kind in (*LOCAL, "background") for operation in self.operations]
        return ~self.masks[np.array(placed)].any(0)
