import hashlib
import json
import re
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from rvedit_diffusers.synthetic import (
    LEVELS,
    TEST_PHOTOS,
    TRAIN_LEVELS,
    TRAIN_PHOTOS,
    BenchmarkItem,
    BenchmarkItems,
    Operation,
    Scene,
    SceneObject,
    render,
)
from rvedit_diffusers.synthetic.backgrounds import WALLS
from rvedit_diffusers.synthetic.levels import HELD_OUT_PAIRS, choices_of
from rvedit_diffusers.synthetic.manifest import scene_to_json
from rvedit_diffusers.synthetic.operations import GLOBAL, LOCAL, PLACES, apply_operations, follow
from rvedit_diffusers.synthetic.scenes import GRADES, SHAPES, STYLES, coverage, grade_frames, stylise_frames
from rvedit_diffusers.synthetic.stage import HELD_OUT_LOOKS
from rvedit_diffusers.synthetic.wording import clause, phrases, sentence, swapped_words, with_article


NUM_ITEMS = 12


@cache
def drawn(level: str, split: str = "test") -> list[BenchmarkItem]:
    items = BenchmarkItems(level, 77, split, num_frames=9)
    return [items[index] for index in range(NUM_ITEMS)]


def thing(x: float, y: float, shape="circle", colour="red", size="medium") -> SceneObject:
    return SceneObject(shape, colour, size, "static", ((x, y), (x, y)))


def scene(*objects: SceneObject) -> Scene:
    return Scene(2, 64, 64, "plain grey wall", 0, objects)


def looks(graph: Scene) -> set[tuple[str, str]]:
    return {(thing.colour, thing.shape) for thing in graph.objects}


@pytest.mark.parametrize(
    "level, expected",
    [
        ("L0", "5a17314979768a26"),
        ("L1", "e1a2adce5cabe831"),
        ("L2", "b22e6840193940fc"),
        ("L3", "c1b7b97bfe66b9cb"),
        ("L4", "10fe0e05d019a276"),
        ("L5", "ae81bbc75065ae26"),
        ("L6", "b1680e51a703b835"),
        ("OOD", "70f0b3074b267055"),
    ],
)
def test_an_item_is_the_same_on_every_machine(level, expected):
    items = BenchmarkItems(level, 7)
    graphs = [
        [scene_to_json(i.scene), scene_to_json(i.edited), i.instruction, i.twin_instruction] for i in items_of(items)
    ]
    assert hashlib.sha256(json.dumps(graphs).encode()).hexdigest()[:16] == expected


def items_of(items: BenchmarkItems) -> list[BenchmarkItem]:
    return [items[index] for index in (2, 0)]


def test_frames_are_the_same_on_every_machine():
    frames = BenchmarkItems(LEVELS, 7, num_frames=9)[2].target_frames
    pixels = frames[-1, 4::16, 4::16].astype(int)
    assert (
        np.abs(
            pixels
            - np.array(
                [
                    [[177, 193, 166], [143, 198, 155], [139, 199, 154], [192, 191, 171]],
                    [[183, 193, 168], [132, 200, 152], [219, 31, 31], [132, 200, 152]],
                    [[132, 200, 152], [171, 194, 164], [137, 199, 154], [132, 200, 152]],
                    [[132, 200, 152], [132, 200, 152], [132, 200, 152], [177, 193, 166]],
                ]
            )
        ).max()
        <= 1
    )


def test_an_item_depends_on_its_place_alone():
    items, again = (BenchmarkItems(LEVELS, 7, num_frames=5) for _ in range(2))
    later = items[11]
    assert again[3] == items[3] and again[11] == later
    assert items[3].level == "L3" and items[11].level == "L3" and items[3] != later
    assert BenchmarkItems(LEVELS, 8, num_frames=5)[3].scene != items[3].scene
    assert BenchmarkItems("L3", 7, num_frames=5)[3] == items[3]


@pytest.mark.parametrize("split, photos", [("train", TRAIN_PHOTOS), ("test", TEST_PHOTOS)])
def test_each_split_has_its_photographs(split, photos):
    assert all(item.scene.photos == photos for item in drawn("L1", split))


@pytest.mark.parametrize(
    "split, level", [*[("train", level) for level in TRAIN_LEVELS], ("test", "L2"), ("test", "L6")]
)
def test_what_is_held_out_is_in_no_other_level(split, level):
    for item in drawn(level, split):
        scenes = [item.scene, item.edited] + ([item.twin.edited] if item.twin else [])
        scenes += [apply_operations(item.scene, item.operations[:step]) for step in range(len(item.operations))]
        assert not any(looks(graph) & set(HELD_OUT_LOOKS) for graph in scenes)
        kinds = {frozenset(pair) for pair in combinations([o.kind for o in item.operations], 2)}
        assert not kinds & {frozenset(pair) for pair in HELD_OUT_PAIRS}


def test_ood_items_have_something_held_out():
    found = set()
    for item in drawn("OOD"):
        pairs = {frozenset(pair) for pair in combinations([o.kind for o in item.operations], 2)}
        pair = bool(pairs & {frozenset(pair) for pair in HELD_OUT_PAIRS})
        new_looks = (looks(item.scene) ^ looks(item.edited) | looks(item.scene)) & set(HELD_OUT_LOOKS)
        assert pair != bool(new_looks)
        found.add(pair)
    assert found == {True, False}


SHAPES_OF_LEVELS = {
    "L0": lambda kinds, targets: len(kinds) == 1 and kinds[0] in GLOBAL,
    "L1": lambda kinds, targets: len(kinds) == 1 and kinds[0] in LOCAL,
    "L2": lambda kinds, targets: len(kinds) == 1 and kinds[0] in LOCAL,
    "L3": lambda kinds, targets: len(kinds) == 2 and set(kinds) <= set(LOCAL) and len(set(targets)) == 2,
    "L4": lambda kinds, targets: len(set(kinds)) == 2 and set(kinds) <= set(LOCAL) and len(set(targets)) == 1,
    "L5": lambda kinds, targets: len(kinds) == 2 and sum(kind in GLOBAL for kind in kinds) == 1,
    "L6": lambda kinds, targets: len(kinds) in (2, 3),
}


@pytest.mark.parametrize("level", TRAIN_LEVELS)
def test_levels_have_their_operations(level):
    for item in drawn(level):
        kinds = [operation.kind for operation in item.operations]
        assert SHAPES_OF_LEVELS[level](kinds, [operation.target for operation in item.operations]), item.instruction


def test_objects_are_unique_in_l1_and_have_distractors_from_l2_on():
    def shared(item):
        things = item.scene.objects
        return [any((a.colour == b.colour) + (a.shape == b.shape) for b in things if b is not a) for a in things]

    assert not any(any(shared(item)) for item in drawn("L1"))
    for level in ("L2", "L3", "L4", "L5", "L6", "OOD"):
        assert all(all(shared(item)) for item in drawn(level))


def test_it_is_the_video_where_nothing_else_is_edited():
    said = [item.instruction for item in drawn("L0") if item.operations[0].kind != "background"]
    named = ["the video" in text or "the whole video" in text for text in said]
    assert set(named) == {True, False}
    assert all(name != bool({"it", "its"} & set(text.split())) for name, text in zip(named, said, strict=True))
    for item in drawn("L5"):
        (kind,) = {operation.kind for operation in item.operations} & set(GLOBAL)
        assert kind == "background" or "video" in item.instruction


@pytest.mark.parametrize("level", LEVELS)
def test_twins_differ_in_one_word_and_in_what_is_right(level):
    with_twin = [item for item in drawn(level) if item.twin is not None]
    assert len(with_twin) == NUM_ITEMS or level == "L0"
    for item in with_twin:
        assert swapped_words(item.instruction, item.twin.instruction) == 1
        assert item.twin.scene == item.scene and item.twin.twin == item and item.twin.id == item.id + "-twin"
        assert item.twin.edited != item.edited


@pytest.mark.parametrize("level", LEVELS)
def test_every_operation_shows_in_every_frame(level):
    for item in drawn(level):
        for step in range(len(item.operations)):
            without = item.render(item.operations[:step] + item.operations[step + 1 :])
            difference = np.abs(item.target_frames.astype(int) - without).max(-1)
            assert ((difference > 12).sum((1, 2)) >= 10).all(), (item.id, item.instruction)
        for one in item.edited.objects:
            assert 0 < np.min(one.path) and np.max(one.path) < 1


@pytest.mark.parametrize("level", ["L1", "L2", "L3", "L4"])
def test_masks_are_the_objects_before_and_after(level):
    for item in drawn(level):
        assert item.masks.shape == (len(item.operations), 9, 64, 64)
        assert np.array_equal(item.mask, item.masks.any(0)) and np.array_equal(item.outside, ~item.mask)
        for step, (operation, mask) in enumerate(zip(item.operations, item.masks)):
            around = np.zeros(mask.shape)
            for count in (step, step + 1):
                graph, numbers = follow(item.scene, item.operations[:count])
                if operation.target in numbers:
                    around = np.maximum(around, coverage(graph, numbers.index(operation.target)))
            assert mask.any((1, 2)).all() and not mask[around == 0].any()


@pytest.mark.parametrize("level", ["L1", "L2", "L3", "L4", "L6"])
def test_nothing_changes_outside_of_the_masks(level):
    for item in drawn(level):
        difference = np.abs(item.source_frames.astype(int) - item.target_frames).max(-1)
        assert difference[~item.mask].max(initial=0) <= 2 * len(item.operations)


@pytest.mark.parametrize("level", LEVELS)
def test_instructions_are_grammatical(level):
    for item in drawn(level):
        said = item.instruction
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |of it\b|None|[{}]", said), said
        if len(item.operations) > 1:
            assert " and " in said or ", then " in said


def test_dependent_items_name_what_only_the_first_operation_makes_so():
    dependent = [item for item in drawn("L6") if ", then " in item.instruction]
    assert dependent
    for item in dependent:
        last, target = item.instruction.split(", then ")[1], item.operations[-1].target
        graph, numbers = follow(item.scene, item.operations[:-1])
        named = {phrase for phrase in sum(phrases(graph, numbers.index(target)), []) if phrase in last}
        at_first = sum(phrases(item.scene, target), []) if target < len(item.scene.objects) else []
        assert named and max(named, key=len) not in at_first


def test_a_scene_may_be_wide():
    item = BenchmarkItems("L3", 7, num_frames=5, height=48, width=80)[0]
    assert item.target_frames.shape == (5, 48, 80, 3) and item.masks.any((1, 2, 3)).all()


@pytest.mark.parametrize("level", LEVELS)
def test_levels_of_some_kinds_have_no_others(level):
    kinds = ("recolour", "remove", "resize", "grade")
    items = BenchmarkItems(level, 7, num_frames=5, kinds=kinds)
    drawn = [operation.kind for index in range(8) for operation in items[index].operations]
    assert set(drawn) <= set(kinds) and (level == "L0" or len(set(drawn)) > 1)
    assert items[0] == BenchmarkItems(level, 7, num_frames=5, kinds=kinds[::-1])[0]


def test_a_kind_that_is_named_twice_comes_twice_as_often():
    kinds = ("add", "move", "move", "recolour", "grade", "stylise")
    choices = choices_of("L5", kinds)
    assert choices.count(("move", "grade")) == 2 * choices.count(("recolour", "grade")) == 2
    assert set(choices) == set(choices_of("L5", sorted(set(kinds))))
    assert choices_of("L5", kinds[::-1]) == choices
    once, twice = (
        BenchmarkItems("L1", 7, num_frames=5, kinds=k) for k in (("move", "recolour"), ("move", "move", "recolour"))
    )
    moves = [sum(items[index].operations[0].kind == "move" for index in range(30)) for items in (once, twice)]
    assert moves[1] > moves[0]


def test_out_of_distribution_items_of_kinds_without_held_out_pairs_have_looks_that_are_held_out():
    items = [BenchmarkItems("OOD", 7, num_frames=5, kinds=("recolour", "remove"))[index] for index in range(4)]
    for item in items:
        assert len(item.operations) == 1 and (looks(item.scene) | looks(item.edited)) & set(HELD_OUT_LOOKS)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"levels": "L7"}, "levels"),
        ({"levels": ()}, "levels"),
        ({"levels": "OOD", "split": "train"}, "levels"),
        ({"split": "validation"}, "split"),
        ({"seed": -1}, "seed"),
        ({"num_frames": 1}, "num_frames"),
        ({"height": 16}, "height"),
        ({"kinds": ()}, "kinds"),
        ({"kinds": ("recolour", "repaint")}, "kinds"),
        ({"levels": ("L1", "L4"), "kinds": ("remove", "grade")}, "kinds"),
        ({"levels": "OOD", "kinds": ("grade",)}, "kinds"),
    ],
)
def test_wrong_lists_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        BenchmarkItems(**{"levels": "L1", "seed": 0} | arguments)


# Operations and words by themselves.


def test_numbers_of_objects_stay_when_others_go():
    three = scene(thing(0.2, 0.2), thing(0.5, 0.5, "square"), thing(0.8, 0.8, "star"))
    steps = [Operation("remove", 0), Operation("add", 3, ("blue", "cross", "small", "the center"))]
    steps += [Operation("recolour", 2, ("green",)), Operation("resize", 3, ("bigger",))]
    graph, numbers = follow(three, steps)
    assert numbers == [1, 2, 3]
    assert [o.colour for o in graph.objects] == ["red", "green", "blue"] and graph.objects[2].scale == 1.6
    assert apply_operations(three, [Operation("resize", 3, ("bigger",))]) == three


@pytest.mark.parametrize("place", PLACES)
def test_moved_objects_touch_their_edge_and_keep_their_motion(place):
    path = ((0.5, 0.4), (0.6, 0.5), (0.55, 0.45))
    before = replace(scene(replace(thing(0, 0), path=path)), num_frames=3, width=128)
    after = apply_operations(before, [Operation("move", 0, (place,))]).objects[0].path
    assert np.allclose(np.diff(after, axis=0), np.diff(path, axis=0), atol=2e-5)
    for axis, (wanted, radius) in enumerate(zip(PLACES[place], (0.075, 0.15))):
        low, high = np.min(after, 0)[axis], np.max(after, 0)[axis]
        expected = {
            0.0: (1.1 * radius, low),
            1.0: (1 - 1.1 * radius, high),
            0.5: (0.5, (low + high) / 2),
            None: (path[0][axis], after[0][axis]),
        }[wanted]
        assert expected[0] == pytest.approx(expected[1], abs=2e-5)


def test_a_swapped_background_is_what_its_name_says():
    plain = [render(replace(scene(), background=f"plain {colour} wall")) for colour in ("grey", "orange")]
    assert np.ptp(plain[0]) <= 1 and plain[1][0, 0, 0].tolist() == [242, 133, 31]
    striped = render(replace(scene(), background="striped grey wall"))
    assert np.ptp(striped, axis=1).max() == 0 and len(np.unique(striped)) == 2
    assert len({render(replace(scene(), background=wall)).tobytes() for wall in WALLS}) == len(WALLS)


def test_styles_are_continuous_in_the_picture():
    frames = np.random.default_rng(0).random((2, 37, 50, 3)).astype(np.float32)
    for style in STYLES:
        change = np.abs(stylise_frames(frames + np.float32(1e-5), style) - stylise_frames(frames, style))
        assert 0 <= stylise_frames(frames, style).min() and stylise_frames(frames, style).max() <= 1
        assert change.max() < 1e-3
    assert np.array_equal(stylise_frames(frames, None), grade_frames(frames, None))


def test_styles_are_what_they_are_called():
    frames = np.random.default_rng(0).random((2, 32, 64, 3)).astype(np.float32)
    assert np.array_equal(stylise_frames(frames, "negative"), 1 - frames)
    tiles = stylise_frames(frames, "mosaic").reshape(2, 16, 2, 32, 2, 3)  # a sixteenth of the shorter side: 2 pixels
    means = frames.reshape(2, 16, 2, 32, 2, 3).mean((2, 4), keepdims=True)
    np.testing.assert_allclose(tiles, np.broadcast_to(means, tiles.shape), atol=1e-6)
    ramp = np.repeat(np.linspace(0, 1, 10001, dtype=np.float32)[None, None, :, None], 3, -1)
    levels = np.array([0, 1 / 3, 2 / 3, 1])
    off = np.abs(stylise_frames(ramp, "poster")[..., None] - levels).min(-1)
    assert (off < 0.02).mean() > 0.8  # but for what lies between two levels, where the filter is steep
    step = np.zeros((1, 8, 8, 3), np.float32)
    step[:, :, 4:] = 1
    lines = stylise_frames(step, "sketch")[0, 0, :, 0]
    assert lines.tolist() == [1, 1, 1, 0, 0, 1, 1, 1]


def test_grades_are_what_they_are_called():
    frames = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    mean = frames.mean((0, 1, 2))
    graded = {grade: grade_frames(frames, grade).mean((0, 1, 2)) for grade in GRADES}
    assert np.ptp(grade_frames(frames, "grey"), axis=-1).max() == 0
    assert graded["warm"][0] - graded["warm"][2] > 0.2 + mean[0] - mean[2]
    assert graded["cold"][2] - graded["cold"][0] > 0.2 + mean[2] - mean[0]
    assert (graded["bright"] > mean + 0.1).all() and (graded["dark"] < 0.5 * mean).all()


def test_relations_name_one_of_several():
    graph = scene(thing(0.2, 0.5), thing(0.5, 0.5, "square"), thing(0.8, 0.5, colour="blue"))
    assert phrases(graph, 0)[2] == ["the circle left of the red square"]
    assert phrases(graph, 2)[2] == ["the circle right of the red square"]
    assert phrases(graph, 1)[2] == []
    near = scene(thing(0.45, 0.5), thing(0.5, 0.5, "square"), thing(0.8, 0.5, colour="blue"))
    assert phrases(near, 0)[2] == []


def test_a_little_larger_is_not_the_largest():
    one = thing(0.2, 0.2, size="large")
    graph = scene(one, thing(0.8, 0.8, "square", size="small"))
    assert "the largest object" in phrases(graph, 0)[1]
    graph = scene(one, replace(thing(0.8, 0.8, "square", size="small"), scale=1.6))
    assert "the largest object" not in phrases(graph, 0)[1]


def test_a_wide_shape_is_larger_than_a_pointed_one():
    """By what is seen: a large triangle has less area than a medium circle."""
    graph = scene(thing(0.2, 0.2, "triangle", size="large"), thing(0.8, 0.8, size="medium"))
    for index in (0, 1):
        assert not {"the largest object", "the smallest object"} & set(phrases(graph, index)[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_are_those_of_the_shapes(shape):
    one = replace(thing(0.5, 0.5, shape), size="large")
    pixels = coverage(replace(scene(one), height=256, width=256), 0)[0]
    assert pixels.sum() / 256**2 == pytest.approx(one.area, rel=0.01)


@pytest.mark.parametrize("level, split", [("L5", "train"), ("L5", "test"), ("L6", "test"), ("OOD", "test")])
def test_grades_and_styles_come_last(level, split):
    for item in drawn(level, split):
        assert not {"grade", "stylise"} & {operation.kind for operation in item.operations[:-1]}


def test_looks_that_two_objects_have_name_none():
    assert phrases(scene(thing(0.2, 0.2), thing(0.5, 0.8)), 0)[0] == []


@pytest.mark.parametrize(
    "operation, phrase, template, expected",
    [
        (Operation("recolour", 0, ("blue",)), "it", 1, "change its color to blue"),
        (Operation("recolour", 0, ("blue",)), "the star", 1, "change the color of the star to blue"),
        (Operation("resize", 0, ("smaller",)), "the star", 1, "shrink the star"),
        (Operation("move", 0, ("the left edge",)), "it", 0, "move it to the left edge"),
        (
            Operation("add", 3, ("red", "star", "large", "the center")),
            None,
            0,
            "add a large red star in the center",
        ),
        (
            Operation("background", None, ("plain", "orange")),
            None,
            1,
            "change the background to a plain orange wall",
        ),
        (Operation("grade", None, ("warm",)), None, 0, "make the video warmer"),
        (Operation("grade", None, ("dark",)), "it", 0, "make it darker"),
        (Operation("grade", None, ("dark",)), "it", 1, "darken it"),
        (Operation("grade", None, ("grey",)), "it", 2, "turn it grey"),
        (Operation("grade", None, ("cold",)), "it", 2, "make its colors cold"),
        (Operation("stylise", None, ("sketch",)), None, 0, "turn the video into a sketch"),
        (Operation("stylise", None, ("sketch",)), "it", 1, "make it look like a sketch"),
    ],
)
def test_clauses(operation, phrase, template, expected):
    assert clause(operation, phrase, template) == expected


def test_sentences():
    assert sentence(["a"]) == "a"
    assert sentence(["a", "b"]) == "a and b"
    assert sentence(["a", "b", "c"], ", and ") == "a, b, and c"
    assert with_article("orange wall") == "an orange wall" and with_article("red star") == "a red star"
    assert swapped_words("a b c", "a x c") == 1 and swapped_words("a b", "a b c") == -1
