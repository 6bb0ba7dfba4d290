"""What the files of a data set hold, remembered on disk: so that a training decodes and hashes each only once."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, chain, groupby, pairwise, repeat
from pathlib import Path
from threading import Lock

from ..video import VideoInfo, probe_video


class ScanRecord:
    """
    What files hold, remembered in memory and on disk for as long as their size and time of change stay the same.

    On disk it is a file of JSON lines, each with the `path` (absolute, links followed), `size` in bytes and `mtime_ns`
    of a file, and some of `video` (the fields of [`VideoInfo`]), `error` (why it is no clip) and `sha256`. Lines are
    only appended, by any number of threads; those that cannot be parsed, as a killed process leaves, are passed over.
    Pickled, it is its path, and is read from disk again.

    Args:
        path (`str` or `os.PathLike`, *optional*): the file, made with its folders if there is none. By default nothing
            is written.

    Raises:
        OSError: the file cannot be made, read or written.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else Path(path)
        self._lock = Lock()
        self._known = defaultdict(dict)  # what the lines say, by path, size and time of change
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:  # writable: better found out before hours of decoding
                file.seek(0)
                for line in file:
                    try:
                        entry = json.loads(line)
                    except ValueError:
                        continue
                    self._known[entry.pop("path"), entry.pop("size"), entry.pop("mtime_ns")] |= entry

    def __reduce__(self):
        return ScanRecord, (self.path,)

    def probe(self, path: Path) -> VideoInfo:
        """
        What [`probe_video`] says of a file. One that it has to decode is hashed too, while its bytes are in memory.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file cannot be read as a clip, or has no frames.
            RuntimeError: the record cannot be written.
        """
        if not (path.is_file() and os.access(path, os.R_OK)):
            return probe_video(path)  # an error that has nothing to do with the contents is not remembered
        key = _file_key(path)
        known = self._known.get(key, {})
        if "error" in known:
            raise ValueError(known["error"])
        if "video" in known:
            video = known["video"]
            return VideoInfo(**video | {"fps": Fraction(video["fps"]), "times": _unpack_times(video["times"])})
        try:
            info = probe_video(path)
        except ValueError as error:
            self._add(key, {"error": str(error)})
            raise
        video = vars(info) | {"fps": str(info.fps), "times": _pack_times(info.times)}
        self._add(key, {"video": video, "sha256": _hash_file(path)})
        return info

    def sha256(self, path: Path) -> str:
        """
        The SHA-256 of a file in hexadecimal.

        Raises:
            FileNotFoundError: there is no such file.
            RuntimeError: the record cannot be written.
        """
        key = _file_key(path)
        if "sha256" not in self._known.get(key, {}):
            self._add(key, {"sha256": _hash_file(path)})
        return self._known[key]["sha256"]

    def _add(self, key: tuple[str, int, int], entry: dict) -> None:
        with self._lock:
            self._known[key] |= entry
            if self.path is None:
                return
            line = json.dumps(dict(zip(("path", "size", "mtime_ns"), key)) | entry) + "\n"
            try:
                with open(self.path, "a+b", buffering=0) as file:  # one write, so that processes do not mix lines
                    file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
                    is_cut = file.read(1) not in (b"", b"\n")
                    file.write(b"\n" * is_cut + line.encode())
            except OSError as error:  # not to be taken for one of the file that was scanned
                raise RuntimeError(f"`record`: {self.path} cannot be written: {error}") from error


def _file_key(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _pack_times(times: Sequence[Fraction]) -> str:
    """The first time and the runs of equal steps: `"0 1/24x80"` is 81 frames at 24 fps."""
    steps = groupby(later - earlier for earlier, later in pairwise(times))
    return " ".join([str(times[0]), *(f"{step}x{len(list(run))}" for step, run in steps)])


def _unpack_times(text: str) -> tuple[Fraction, ...]:
    first, *runs = text.split()
    steps = (repeat(Fraction(step), int(count)) for step, count in (run.split("x") for run in runs))
    return tuple(accumulate(chain.from_iterable(steps), initial=Fraction(first)))
