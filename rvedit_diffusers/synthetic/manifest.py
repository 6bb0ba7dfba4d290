"""Items as lines of JSON, and back."""

import json
from dataclasses import asdict, replace

from .items import BenchmarkItem
from .operations import Operation, follow
from .scenes import Scene, SceneObject


def scene_to_json(scene: Scene) -> dict:
    """A scene graph as what `json` can write."""
    return asdict(scene)


def scene_from_json(graph: dict) -> Scene:
    """The scene of [`scene_to_json`], equal to the one that it was made of, also after a way through text."""
    things = [replace(SceneObject(**thing), path=tuple(map(tuple, thing["path"]))) for thing in graph["objects"]]
    return Scene(**graph | {"objects": tuple(things), "photos": tuple(graph["photos"])})


def value_before(scene: Scene, operations: tuple[Operation, ...], step: int) -> list:
    """What `operations[step]` changes, at its turn, as far as its value says it: the "from" to the value's "to"."""
    operation = operations[step]
    scene, numbers = follow(scene, operations[:step])
    whole = {"background": scene.background, "grade": scene.grade, "stylise": scene.style}
    if operation.kind in whole:
        return [whole[operation.kind]]
    if operation.kind == "add":
        return []
    thing = scene.objects[numbers.index(operation.target)]
    return {
        "recolour": [thing.colour],
        "remove": [thing.colour, thing.shape],
        "replace": [thing.colour, thing.shape],
        "resize": [thing.size],
        "move": list(thing.path[0]),
    }[operation.kind]


def manifest_entry(item: BenchmarkItem, original_video: str, target_video: str, masks: list[str]) -> dict:
    """One line of a manifest.

    The first four fields are those of OpenVE-Bench, so that its readers find what to edit, and how.

    Args:
        item ([`BenchmarkItem`]): What the line is about.
        original_video, target_video (`str`): Source and target clip, as paths from the manifest.
        masks (`list[str]`): The mask of each operation, as paths from the manifest.
    """
    operations = [
        {
            "op": operation.kind,
            "target_id": operation.target,
            "from": value_before(item.scene, item.operations, step),
            "to": list(operation.value),
            "mask": mask,
        }
        for step, (operation, mask) in enumerate(zip(item.operations, masks, strict=True))
    ]
    return {
        "id": item.id,
        "edited_type": item.kind,
        "prompt": item.instruction,
        "original_video": original_video,
        "target_video": target_video,
        "level": item.level,
        "ops": operations,
        "scene_src": scene_to_json(item.scene),
        "scene_tgt": scene_to_json(item.edited),
        "twin_id": None if item.twin is None else item.twin.id,
        "seed": item.seed,
    }


def item_from_entry(entry: dict, twin: dict | None = None) -> BenchmarkItem:
    """The item that a line of a manifest is about.

    Args:
        entry (`dict`): The line, parsed.
        twin (`dict`, *optional*): The line of its twin; without it the item has none.

    Returns:
        [`BenchmarkItem`]: Equal to the item that was written, so that an edited clip can be scored without drawing it
        again.
    """
    operations, twin_operations = (
        None if e is None else tuple(Operation(o["op"], o["target_id"], tuple(o["to"])) for o in e["ops"])
        for e in (entry, twin)
    )
    return BenchmarkItem(
        entry["id"],
        entry["level"],
        entry["seed"],
        int(entry["id"].split("-")[3]),
        scene_from_json(entry["scene_src"]),
        operations,
        entry["prompt"],
        twin_operations,
        None if twin is None else twin["prompt"],
    )


def read_manifest(path) -> list[BenchmarkItem]:
    """The items of a `manifest.jsonl`, in its order.

    Args:
        path (`str` or `os.PathLike`): The file.
    """
    with open(path) as file:
        entries = {entry["id"]: entry for entry in map(json.loads, file)}
    return [item_from_entry(entry, entries.get(entry["twin_id"])) for entry in entries.values()]
