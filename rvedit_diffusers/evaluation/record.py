"""The folder of an evaluation: with which settings it was begun, and what has been scored."""

import json
import os
import time
from pathlib import Path


def write_json(path: Path, value) -> None:
    """Write a JSON file, as a whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


class ScoreRecord:
    """Settings and scores in a folder, so that an evaluation that was stopped goes on, and never with others.

    The scores are lines of JSON. Each process appends to a file of its own, a batch in one write; a line that is cut
    off, as a killed process leaves, is passed over. Numbers that are not finite become `null`.

    Args:
        folder (`Path`): Made if it is not there.
        rank (`int`, defaults to 0): Of the process; the first one writes the settings.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = Path(folder), rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings_path = self.folder / "settings.json"

    def check(self, settings: dict) -> None:
        """Compare with the settings that the folder was begun with, if it was.

        Args:
            settings (`dict`): All of them, or some.

        Raises:
            ValueError: One is another, which is named with both values.
        """
        if not self.settings_path.is_file():
            return
        begun = json.loads(self.settings_path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if begun.get(name) != value:
                raise ValueError(
                    f"{self.folder} was begun with {name} {begun.get(name)!r}, but now it is {value!r}: name another"
                    " folder, or delete this one"
                )

    def begin(self, settings: dict) -> None:
        """Write the settings down, unless they are; see [`ScoreRecord.check`] for errors."""
        self.check(settings)
        if self.rank == 0:
            write_json(self.settings_path, settings)

    def entries(self) -> dict[str, dict]:
        """What all processes have appended so far, by `id`."""
        found = []
        for path in sorted(self.folder.glob("scores-*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
        # another number of processes may have given an item to another one
        found.sort(key=lambda entry: entry.pop("time", 0))
        return {entry["id"]: entry for entry in found}

    def append(self, entries: list[dict]) -> None:
        """Add what has been scored.

        Args:
            entries (`list[dict]`): Each with an `id`; later ones replace earlier ones of the same `id`.
        """
        timed = (entry | {"time": time.time_ns()} for entry in entries)
        finite = (json.loads(json.dumps(entry), parse_constant=lambda _: None) for entry in timed)
        text = "".join(json.dumps(entry) + "\n" for entry in finite)
        with open(self.folder / f"scores-{self.rank}.jsonl", "a+b", buffering=0) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            is_cut = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * is_cut + text.encode())
