"""The levels of the benchmark: which scenes, operations and wordings an item of each is drawn from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from .backgrounds import TEST_PHOTOS, TRAIN_PHOTOS
from .items import BenchmarkItem
from .operations import GLOBAL, LOCAL, VALUES, Operation, apply_operations, follow, wrong_values
from .scenes import Scene
from .stage import HELD_OUT_LOOKS, UNFIT, Stage, allowed, draw_stage, told_apart
from .wording import clause, phrases, sentence, swapped_words


LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5", "L6", "OOD")
TRAIN_LEVELS = LEVELS[:-1]
SPLITS = {"train": TRAIN_PHOTOS, "test": TEST_PHOTOS}
# Operations that only OOD has together; alone and in other company they are in training.
HELD_OUT_PAIRS = (("recolour", "move"), ("remove", "resize"), ("replace", "grade"), ("add", "stylise"))
DRAWN = 4  # version of what a seed draws, to be raised when levels, wordings or their rendering change
CATEGORY_WEIGHTS = (0.4, 0.3, 0.3)  # of phrases by looks, by comparison and by relation, where there are such
NUM_WORDINGS = 6  # a multiple of the number of templates of each operation
# Tries for an item: plans, scenes for each, and drafts of an edit for each. Some plans seldom find room in a scene.
PLANS, SCENES, DRAFTS = 50, 20, 10


def held_out(kinds: Sequence[str]) -> bool:
    """Whether two of the operations are kept for OOD."""
    return any(pair in HELD_OUT_PAIRS or pair[::-1] in HELD_OUT_PAIRS for pair in combinations(kinds, 2))


IN_PLACE = ("recolour", "replace", "resize", "move")  # after these the object is still there
KINDS: dict[str, list[tuple[str, ...]]] = {
    "L0": list(product(GLOBAL)),
    "L1": list(product(LOCAL)),
    "L2": list(product(LOCAL)),
    "L3": list(product(LOCAL, LOCAL)),
    # a new look would make a new colour pointless, and a second one the first
    "L4": [
        pair for pair in product(IN_PLACE, IN_PLACE) if len({"replace" if k == "recolour" else k for k in pair}) == 2
    ],
    # a grade or a style comes last: colours that are named after it would be other ones
    "L5": list(product(LOCAL, GLOBAL)) + list(product(("background",), LOCAL)),
    "three": list(product(LOCAL, LOCAL, LOCAL)),
    "whole": list(product(LOCAL, LOCAL, GLOBAL)),
    "dependent": list(product(LOCAL, ("recolour", "remove", "replace", "resize", "move"))),
}
L6_FORMS = ("three", "whole", "dependent")
KINDS = {level: [kinds for kinds in choices if not held_out(kinds)] for level, choices in KINDS.items()}
KINDS["held out"] = [*HELD_OUT_PAIRS, *(pair[::-1] for pair in HELD_OUT_PAIRS if set(pair) <= set(LOCAL))]


@dataclass(frozen=True)
class Plan:
    """What an item of a level is drawn from.

    Attributes:
        kinds (`tuple[str, ...]`): Of the operations, in order.
        num_objects (`tuple[int, int]`): Least and most objects of the scene.
        dressing (`str`): Of [`draw_stage`].
        same (`bool`): Whether all operations are on one object.
        dependent (`bool`): Whether the last operation names its object by what the others have made of the scene.
        resize (`tuple[str]`): The value of resizes. It is chosen beforehand, as most objects have room to shrink, but
            few to grow.
    """

    kinds: tuple[str, ...]
    num_objects: tuple[int, int] = (3, 5)
    dressing: str = "hard"
    same: bool = False
    dependent: bool = False
    resize: tuple[str, ...] = ("smaller",)


def choices_of(name: str, kinds: Sequence[str] | None) -> list[tuple[str, ...]]:
    """What `KINDS` has under a name, of some kinds alone, a kind that is named twice twice as often; `None` is all."""
    if kinds is None:
        return KINDS[name]
    return [choice for choice in KINDS[name] for _ in range(math.prod(map(kinds.count, choice)))]


def draw_plan(rng: np.random.Generator, level: str, kinds: Sequence[str] | None = None) -> Plan:
    """Draw the kinds of operations of an item, and what scene they need; see [`BenchmarkItems`] for `kinds`."""

    def one_of(choices: Sequence):
        return choices[rng.integers(len(choices))]

    if level == "L0":
        return Plan(one_of(choices_of(level, kinds)), num_objects=(2, 4))
    if level == "L1":
        return Plan(one_of(choices_of(level, kinds)), num_objects=(2, 4), dressing="unique")
    if level == "L4":
        return Plan(one_of(choices_of(level, kinds)), same=True)
    if level == "L6":
        form = one_of([form for form in L6_FORMS if choices_of(form, kinds)])
        return Plan(one_of(choices_of(form, kinds)), dependent=form == "dependent")
    if level == "OOD":
        pairs = choices_of("held out", kinds)
        if rng.random() < 0.5 or not pairs:
            return Plan(one_of(choices_of("L2", kinds)), dressing="held out")
        pair = one_of(pairs)
        return Plan(pair, same=set(pair) == {"recolour", "move"} and rng.random() < 0.5)
    return Plan(one_of(choices_of(level, kinds)))


@dataclass(frozen=True)
class Draft:
    """Operations with the words for them.

    Attributes:
        operations (`tuple[Operation, ...]`): In order.
        names (`tuple[str | None, ...]`): What each one's object is called; `None` where none is named. The video as a
            whole may be called "it" where nothing else is edited.
        wordings (`tuple[int, ...]`): Which template says each one.
        last (`str`): What stands before the last clause.
    """

    operations: tuple[Operation, ...]
    names: tuple[str | None, ...]
    wordings: tuple[int, ...]
    last: str

    @property
    def instruction(self) -> str:
        said = zip(self.operations, self.names, self.wordings, strict=True)
        return sentence([clause(*parts) for parts in said], self.last)


def names_of(scene: Scene, numbers: Sequence[int], target: int) -> list[list[str]]:
    """[`phrases`] for an object by its number; none for one that is not there."""
    return phrases(scene, numbers.index(target)) if target in numbers else [[], [], []]


def draw_draft(rng: np.random.Generator, stage: Stage, plan: Plan) -> Draft | None:
    """Draw objects, values and words for the operations of a plan; `None` if this try found none."""
    operations: list[Operation] = []
    names: list[str | None] = []
    for step, kind in enumerate(plan.kinds):
        scene, numbers = follow(stage.scene, operations)
        target, name, values = None, None, VALUES[kind]
        depends = plan.dependent and step == len(plan.kinds) - 1
        if kind == "resize":
            values = (plan.resize,)
        if kind == "add":
            target = len(stage.scene.objects) + sum(operation.kind == "add" for operation in operations)
            if plan.dressing == "held out":
                values = [value for value in values if value[:2] in HELD_OUT_LOOKS]
        elif kind in ("grade", "stylise") and len(plan.kinds) == 1:
            name = (None, "it")[rng.integers(2)]
        elif plan.same and step:
            target, name = operations[0].target, "it"
        elif kind in LOCAL:
            taken = set() if depends else {operation.target for operation in operations}
            things = [n for n in numbers if n not in taken and (n in stage.visible or n >= len(stage.scene.objects))]
            if kind == "resize" or plan.same and "resize" in plan.kinds:
                things = [n for n in things if scene.objects[numbers.index(n)].size != UNFIT[plan.resize[0]]]
            if plan.dressing == "held out":
                looks = [(thing.colour, thing.shape) for thing in scene.objects]
                things = [n for n in things if looks[numbers.index(n)] in HELD_OUT_LOOKS]
            if not things:
                return None
            target = things[rng.integers(len(things))]
            categories = names_of(scene, numbers, target)
            if plan.dressing == "held out":  # the look that is new has to be read
                thing = scene.objects[numbers.index(target)]
                categories = [[f"the {thing.colour} {thing.shape}"], [], []]
            elif depends:
                before = sum(names_of(stage.scene, range(len(stage.scene.objects)), target), [])
                categories = [[name for name in names if name not in before] for names in categories]
            weights = np.array(CATEGORY_WEIGHTS) * [bool(names) for names in categories]
            if not weights.any():
                return None
            category = categories[rng.choice(len(categories), p=weights / weights.sum())]
            name = category[rng.integers(len(category))]
        for choice in rng.permutation(len(values))[:20]:
            operation = Operation(kind, target, values[choice])
            if allowed(scene, numbers, operation, plan.dressing == "held out"):
                break
        else:
            return None
        operations.append(operation)
        names.append(name)
    wordings = tuple(rng.integers(NUM_WORDINGS, size=len(operations)).tolist())
    last = ", then " if plan.dependent else (" and ", ", and ")[rng.integers(2)] if len(operations) > 2 else " and "
    return Draft(tuple(operations), tuple(names), wordings, last)


def sound(stage: Stage, draft: Draft, plan: Plan) -> bool:
    """Whether each operation is allowed at its turn, names one object then and at first, and is seen in the end."""
    for step, (operation, name) in enumerate(zip(draft.operations, draft.names, strict=True)):
        scene, numbers = follow(stage.scene, draft.operations[:step])
        if not allowed(scene, numbers, operation, plan.dressing == "held out"):
            return False
        if name in (None, "it"):
            continue
        depends = plan.dependent and step == len(draft.operations) - 1
        before = sum(names_of(stage.scene, range(len(stage.scene.objects)), operation.target), [])
        if name not in sum(names_of(scene, numbers, operation.target), []) or (name in before) == depends:
            return False
    final = apply_operations(stage.scene, draft.operations)
    colourless = final.grade == "grey" or final.style == "sketch"
    if not told_apart(final) or colourless and any(operation.kind == "recolour" for operation in draft.operations):
        return False
    without = [draft.operations[:step] + draft.operations[step + 1 :] for step in range(len(draft.operations))]
    return all(
        stage.seen(final, apply_operations(stage.scene, rest), everywhere=operation.kind in GLOBAL)
        for operation, rest in zip(draft.operations, without, strict=True)
    )


def draw_twin(rng: np.random.Generator, stage: Stage, draft: Draft, plan: Plan) -> Draft | None:
    """Draw a draft whose instruction differs in one word: it names another object or, where none can be named so, has
    another value. `None` if there is none."""
    objects, values = [], []
    targets = {operation.target for operation in draft.operations}
    for step, (operation, name) in enumerate(zip(draft.operations, draft.names, strict=True)):
        for value in wrong_values(operation):
            other_value = (*draft.operations[:step], replace(operation, value=value), *draft.operations[step + 1 :])
            values.append(replace(draft, operations=other_value))
        if name in (None, "it"):
            continue
        scene, numbers = follow(stage.scene, draft.operations[:step])
        for other in numbers:
            retargeted = tuple(
                replace(o, target=other) if o.target == operation.target else o for o in draft.operations
            )
            for phrase in sum(names_of(scene, numbers, other), []) if other not in targets else ():
                names = (*draft.names[:step], phrase, *draft.names[step + 1 :])
                objects.append(replace(draft, operations=retargeted, names=names))
    for candidates in (objects, values):
        candidates = [other for other in candidates if swapped_words(other.instruction, draft.instruction) == 1]
        for choice in rng.permutation(len(candidates)):
            twin = candidates[choice]
            results = [apply_operations(stage.scene, either.operations) for either in (draft, twin)]
            if stage.seen(*results) and sound(stage, twin, plan):
                return twin
    return None


def draw_item(
    level: str, split: str, seed: int, index: int, kinds: Sequence[str] | None = None, **arguments
) -> BenchmarkItem:
    """Draw an item as a function of the arguments alone; see [`BenchmarkItems`] for them."""
    rng = np.random.default_rng([seed, LEVELS.index(level), list(SPLITS).index(split), index, DRAWN])
    for attempt in range(PLANS * SCENES):
        if attempt % SCENES == 0:
            resizes = VALUES["resize"]
            plan = replace(draw_plan(rng, level, kinds), resize=resizes[rng.integers(len(resizes))])
        stage = draw_stage(rng, plan.num_objects, plan.dressing, photos=SPLITS[split], **arguments)
        for _ in range(DRAFTS if stage is not None else 0):
            draft = draw_draft(rng, stage, plan)
            if draft is None or not sound(stage, draft, plan):
                continue
            twin = draw_twin(rng, stage, draft, plan)
            if twin is None and level != "L0":  # a grade to grey has none
                continue
            twin_parts = () if twin is None else (twin.operations, twin.instruction)
            name = f"{level}-{split}-{seed}-{index}"
            return BenchmarkItem(
                name, level, seed, index, stage.scene, draft.operations, draft.instruction, *twin_parts
            )
    raise AssertionError(f"no item {index} of {level} with seed {seed} was found")


class BenchmarkItems:
    """An endless, indexable list of items of the benchmark; the same on every machine.

    Item `index` is a function of its level, `split`, `seed`, `index`, `kinds` and the size of the clips alone. The
    levels take turns; one that is named twice comes twice as often.

    Args:
        levels (`str` or `tuple[str, ...]`): Some of `LEVELS`.
        seed (`int`): Names the list, 0 or more; two seeds share no scene.
        split (`str`, defaults to `"test"`): `"train"` shows photographs of `TRAIN_PHOTOS`, and has no level OOD, whose
            looks (`HELD_OUT_LOOKS`) and pairs of operations (`HELD_OUT_PAIRS`) no other level contains. `"test"` shows
            photographs of `TEST_PHOTOS`.
        num_frames, height, width (`int`): The clips, in frames and pixels.
        kinds (`Sequence[str]`, *optional*): Operations that the items are made of, an easier benchmark; one that is
            named twice comes twice as often. All by default.

    Raises:
        ValueError: An argument is none of these, or a level cannot be made of these `kinds`.
    """

    def __init__(
        self,
        levels: str | Sequence[str],
        seed: int,
        split: str = "test",
        num_frames: int = 17,
        height: int = 64,
        width: int = 64,
        kinds: Sequence[str] | None = None,
    ):
        self.levels = (levels,) if isinstance(levels, str) else tuple(levels)
        if not self.levels or set(self.levels) - set(LEVELS):
            raise ValueError(f"`levels` has to name some of {LEVELS}, but is {levels!r}")
        if split not in SPLITS:
            raise ValueError(f"`split` has to be one of {tuple(SPLITS)}, but is {split!r}")
        if split == "train" and "OOD" in self.levels:
            raise ValueError("`levels` of the split `train` cannot contain OOD: that is what the others leave out")
        if seed < 0:
            raise ValueError(f"`seed` has to be at least 0, but is {seed}")
        if num_frames < 2 or min(height, width) < 32:
            raise ValueError(
                "`num_frames` has to be at least 2, `height` and `width` at least 32, but they are "
                f"{num_frames}, {height} and {width}"
            )
        if kinds is not None:
            if not kinds or set(kinds) - set(LOCAL + GLOBAL):
                raise ValueError(f"`kinds` has to name some of {LOCAL + GLOBAL}, but is {kinds!r}")
            kinds = tuple(sorted(kinds))
            for level in self.levels:
                names = {"L6": L6_FORMS, "OOD": ("L2",)}.get(level, (level,))
                if not any(choices_of(name, kinds) for name in names):
                    raise ValueError(f"`kinds` has to be enough for each of `levels`, but {level} has none of {kinds}")
        self.seed, self.split, self.kinds = seed, split, kinds
        self.scene_arguments = {"num_frames": num_frames, "height": height, "width": width}

    def __getitem__(self, index: int) -> BenchmarkItem:
        if index < 0:
            raise IndexError(f"`index` has to be at least 0, but is {index}")
        level = self.levels[index % len(self.levels)]
        return draw_item(level, self.split, self.seed, index, self.kinds, **self.scene_arguments)
