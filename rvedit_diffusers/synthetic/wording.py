"""Instructions: phrases that name one object of a scene, clauses for operations, and sentences of clauses."""

from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np

from .edits import MARGIN, referring_expressions
from .edits import TEMPLATES as EDIT_TEMPLATES
from .operations import VALUES, Operation
from .scenes import COLOURS, SHAPES, Scene


TEMPLATES = {
    "recolour": EDIT_TEMPLATES["recolour"],
    "remove": EDIT_TEMPLATES["remove"],
    "add": ("add {new} in {place}", "put {new} in {place}", "place {new} in {place}"),
    "replace": ("replace {ref} with {new}", "turn {ref} into {new}", "swap {ref} for {new}"),
    "resize": ("make {ref} {value}", "{verb} {ref}"),
    "move": ("move {ref} to {place}", "shift {ref} to {place}", "bring {ref} to {place}"),
    "background": ("replace the background with {new}", "change the background to {new}"),
    "stylise": ("turn the video into a {value}", "make the video look like a {value}"),
}
RESIZE_VERBS = {"bigger": "enlarge", "smaller": "shrink"}
LARGER = 1.5  # how many times the area of any other object the largest one has
SIDES = (("left of", "right of"), ("above", "below"))
COMPARISONS = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest", "moving")


def with_article(noun: str) -> str:
    """`noun` after "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def phrases(scene: Scene, index: int) -> list[list[str]]:
    """Every phrase that names object `index` of a scene, and no other object.

    Args:
        scene ([`Scene`]): The scene in which the object is looked for.
        index (`int`): Into `scene.objects`.

    Returns:
        `list[list[str]]`: Phrases by looks ("the red circle"); by comparison with all others ("the leftmost object",
        which leads by `MARGIN` of the frame in every frame of the clip, "the largest object", which has `LARGER` times
        the area of each other one, "the moving object"); and by relation to one other ("the circle left of the red
        square").
    """
    thing = scene.objects[index]
    others = [other for number, other in enumerate(scene.objects) if number != index]
    looks, comparisons = referring_expressions(scene, index)
    if any((other.colour, other.shape) == (thing.colour, thing.shape) for other in others):
        looks = []
    if not others:
        comparisons = []
    for phrase, clear in (
        ("the largest object", all(thing.area >= LARGER * other.area for other in others)),
        ("the smallest object", all(LARGER * thing.area <= other.area for other in others)),
    ):
        if phrase in comparisons and not clear:
            comparisons.remove(phrase)
    relations = []
    rivals = [other for other in others if other.shape == thing.shape]
    for anchor in others:
        twins = [o for o in scene.objects if (o.colour, o.shape) == (anchor.colour, anchor.shape)]
        if len(twins) > 1 or not rivals or anchor.shape == thing.shape:
            continue
        for axis, sides in enumerate(SIDES):
            at = np.array(anchor.path)[:, axis]
            own, rest = np.array(thing.path)[:, axis] - at, [np.array(o.path)[:, axis] - at for o in rivals]
            for side, sign in zip(sides, (-1, 1), strict=True):
                if (sign * own >= MARGIN).all() and all((sign * gap <= -MARGIN).all() for gap in rest):
                    relations.append(f"the {thing.shape} {side} the {anchor.colour} {anchor.shape}")
    return [looks, comparisons, relations]


def clause(operation: Operation, phrase: str | None, template: int) -> str:
    """Say one operation.

    Args:
        operation ([`Operation`]): What to say.
        phrase (`str`, *optional*): What its object is called; `None` where no object is named. A grade or a style
            called "it" is said without "the video": "make it darker".
        template (`int`): Which wording, modulo their number.
    """
    kind, value = operation.kind, operation.value
    wordings = EDIT_TEMPLATES[value[0]] if kind == "grade" else TEMPLATES[kind]
    words = {"ref": phrase}
    if kind in ("recolour", "resize", "move", "stylise"):
        words |= {"value": value[0], "colour": value[0], "place": value[0], "verb": RESIZE_VERBS.get(value[0])}
    elif kind == "replace":
        words["new"] = with_article(f"{value[0]} {value[1]}")
    elif kind == "add":
        words |= {"new": with_article(f"{value[2]} {value[0]} {value[1]}"), "place": value[3]}
    elif kind == "background":
        words["new"] = with_article(f"{value[0]} {value[1]} wall")
    said = wordings[template % len(wordings)].format(**words)
    if kind in ("grade", "stylise") and phrase == "it":
        said = said.replace("the whole video", "it").replace("the video", "it")
    return said.replace("the colors of it", "its colors").replace("the color of it", "its color")


def sentence(clauses: Sequence[str], last: str = " and ") -> str:
    """Join clauses: "a, b and c"; `last` stands before the last one."""
    *first, end = clauses
    return (", ".join(first) + last if first else "") + end


def swapped_words(one: str, other: str) -> int:
    """In how many places two sentences of equally many words differ; -1 if their numbers of words differ."""
    one, other = one.split(), other.split()
    return sum(a != b for a, b in zip(one, other)) if len(one) == len(other) else -1


def clauses() -> Iterator[str]:
    """Clauses that have all words of the benchmark's instructions, to make tokenizers of: each wording of each
    operation with each of its values."""
    looks = [f"the {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    comparisons = [*(f"the {word} object" for word in (*COMPARISONS, *COLOURS)), "it"]
    sides = [side for pair in SIDES for side in pair]
    relations = [f"the {shape} {side} {look}" for look, shape, side in zip(looks, cycle(SHAPES), cycle(sides))]
    phrases = cycle(looks + comparisons + relations)
    for kind, values in VALUES.items():
        for value in values:
            wordings = EDIT_TEMPLATES[value[0]] if kind == "grade" else TEMPLATES[kind]
            for template in range(len(wordings)):
                yield sentence([clause(Operation(kind, 0, value), next(phrases), template), "and then its"], ", ")
