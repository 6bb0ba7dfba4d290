"""Read and write clips with the ffmpeg binary that imageio-ffmpeg bundles, and draw contact strips of them."""

import logging
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont


logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # containers that write_video can fill with H.264

# Square pixels: the side on which pixels are longer is enlarged, so that no sample of the source is lost.
_SQUARE_PIXELS = "scale=w=round(iw*max(sar\\,1)):h=round(ih*max(1/sar\\,1)):flags=bicubic+accurate_rnd+full_chroma_int"
# High dynamic range to BT.709: its white, of 203 nits (ITU-R BT.2408), becomes white; what is brighter is compressed.
_TO_SDR = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius,zscale=t=bt709:m=bt709,format=yuv444p10"
)
_HDR = ("smpte2084", "arib-std-b67")
# how the names of the matrices that a file can tell begin
_MATRICES = ("bt", "smpte", "fcc", "ycgco", "gbr", "ictcp", "ipt", "chroma")


@dataclass
class Video:
    """
    A decoded clip.

    Args:
        frames (`np.ndarray`): `(num_frames, height, width, 3)` uint8 RGB, upright, with square pixels.
        fps (`Fraction`): frames per second, exact where the container states it exactly (`Fraction(30000, 1001)`).
        path (`Path`): the file that it was read from.
        has_audio (`bool`): whether the file has a sound track.
        start_time (`Fraction`): when `frames[0]` is shown, in seconds on the file's own clock, which its sound shares.
    """

    frames: np.ndarray
    fps: Fraction
    path: Path
    has_audio: bool
    start_time: Fraction = Fraction(0)

    @property
    def num_frames(self) -> int:
        return self.frames.shape[0]

    @property
    def height(self) -> int:
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        return self.frames.shape[2]


@dataclass(frozen=True)
class VideoInfo:
    """
    What [`read_video`] finds in a file, without the frames.

    Args:
        fps (`Fraction`): frames per second, as in [`Video`].
        height, width (`int`): size of a frame in pixels, upright and with square pixels.
        has_audio (`bool`): whether the file has a sound track.
        times (`tuple[Fraction, ...]`): when each frame is shown, in seconds on the file's own clock.
        damage (`str`, *optional*): what is wrong with a file of which not everything could be decoded; `None` for a
            whole one.
    """

    fps: Fraction
    height: int
    width: int
    has_audio: bool
    times: tuple[Fraction, ...]
    damage: str | None = None

    @property
    def num_frames(self) -> int:
        return len(self.times)

    @property
    def start_time(self) -> Fraction:
        """When the first frame is shown, in seconds on the file's own clock, at least 0."""
        return max(self.times[0], Fraction(0))


@contextmanager
def _ffmpeg(arguments: list[str], stdin: int = subprocess.DEVNULL):
    options = ["-hide_banner", "-nostats", "-loglevel", "level+info", "-y"]
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *options, *arguments]
    except RuntimeError as error:  # a build of imageio-ffmpeg without the program
        raise OSError("there is no ffmpeg: install it, or let IMAGEIO_FFMPEG_EXE name it") from error
    with tempfile.TemporaryFile() as log:  # a file, as a pipe that nobody reads would stall ffmpeg
        with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=log) as process:
            yield process, log


def _read_log(log) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def _run_ffmpeg(arguments: list[str], data: memoryview | None = None) -> tuple[int, bytearray, str]:
    output = bytearray()
    with _ffmpeg(arguments, subprocess.DEVNULL if data is None else subprocess.PIPE) as (process, log):
        if data is not None:
            process.communicate(data)
        while data is None and (chunk := process.stdout.read(1 << 24)):
            output += chunk  # one growing buffer: the frames exist once in memory
        return process.wait(), output, _read_log(log)


def _reason(log: str) -> str:
    if "Input #0" in log and ": Video:" not in log:
        return "it has no video stream"
    errors = re.findall(r"\[(?:error|fatal)\] (.+)", log)
    return errors[0].strip().rstrip(".") if errors else "it has no frames"


def _check_readable(path: str | os.PathLike, name: str) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`{name}`: there is no file {path}")
    if not path.is_file():
        raise ValueError(f"`{name}`: {path} is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"`{name}`: {path} cannot be read as a clip: the file is empty")
    return path


def _frame_rate(nominal: Fraction | None, times: list[Fraction]) -> Fraction:
    duration = times[-1] - times[0]
    if duration <= 0:
        return nominal or Fraction(25)
    steps = [later - earlier for earlier, later in pairwise(times)]
    if nominal is not None:
        regular = sum(abs(step - 1 / nominal) <= 1 / nominal / 2 for step in steps)
        if regular >= 0.9 * len(steps) and abs(duration - len(steps) / nominal) <= Fraction(1, 5):
            return nominal
    return max((len(steps) / duration).limit_denominator(1001), Fraction(1, 1001))


def _to_rgb(path: Path) -> str:
    # Filters to RGB, by what the file's header says of its colours. Of a large frame that says nothing it is that of
    # high definition, as players take it; ffmpeg itself would take that of the television before it.
    _, _, log = _run_ffmpeg(["-i", f"file:{path.resolve()}"])
    streams = re.findall(r"Stream #0:\d+.*: Video: .*?, (\w+)(?:\(([^)]*)\))?, (\d+)x(\d+)(?!.*attached pic)", log)
    pixels, said, width, height = streams[0] if streams else ("", "", 0, 0)
    if any(transfer in said for transfer in _HDR):
        return f"{_TO_SDR},{_SQUARE_PIXELS},format=rgb24"
    is_high = pixels.startswith("yuv") and (int(width) >= 1280 or int(height) > 576)
    if is_high and not any(name.startswith(_MATRICES) for name in said.split(", ")):
        return f"{_SQUARE_PIXELS}:in_color_matrix=bt709,format=rgb24"
    return f"{_SQUARE_PIXELS},format=rgb24"


def _decode(path: Path, start: int, max_frames: int | None, output: list[str]) -> tuple[VideoInfo, bytearray]:
    # `V` leaves out cover pictures; showinfo logs the exact time base, rate, time stamps and size of what comes out.
    trim = f"trim=start_frame={start}" + (f":end_frame={start + max_frames}" if max_frames is not None else "")
    filters = f"{trim},{_to_rgb(path)},showinfo=checksum=0"
    source = ["-i", f"file:{path.resolve()}", "-map", "0:V:0"]
    code, data, log = _run_ffmpeg([*source, "-vf", filters, "-fps_mode", "passthrough", *output])
    if code < 0 or "received signal" in log:  # Ctrl-C, or out of memory: ffmpeg ends as if the clip did
        raise InterruptedError(f"`path`: {path} was not decoded to its end: ffmpeg was stopped")

    if "Input #0, tty" in log:  # ffmpeg draws text files as terminal output
        raise ValueError(f"`path`: {path} cannot be read as a clip: it is a text file")
    stamps = re.findall(r"\bpts: *(\S+) .*? s:(\d+)x(\d+)", log)
    if not stamps:
        if start and not re.search(r"\[(?:error|fatal)\]", log):
            raise ValueError(f"`start`: {path} has no frame {start}, it ends before")
        raise ValueError(f"`path`: {path} cannot be read as a clip: {_reason(log)}")
    if len({stamp[1:] for stamp in stamps}) > 1:
        raise ValueError(f"`path`: {path} changes its frame size within the clip")

    unit, rate = re.search(r"config in time_base: (\d+/\d+), frame_rate: (\d+/\d+)", log).groups()
    nominal = None if rate.startswith("0/") or rate.endswith("/0") or rate == "1/0" else Fraction(rate)
    if all(stamp[0].lstrip("-").isdigit() for stamp in stamps):
        times = [int(stamp[0]) * Fraction(unit) for stamp in stamps]
        fps = _frame_rate(nominal, times)
    else:  # a bare stream without time stamps
        fps = nominal or Fraction(25)
        times = [(start + number) / fps for number in range(len(stamps))]
    has_audio = re.search(r"Stream #0:\d+.*: Audio:", log) is not None
    damage = _reason(log) if "[error]" in log else None
    width, height = map(int, stamps[0][1:])
    return VideoInfo(fps, height, width, has_audio, tuple(times), damage), data


def read_video(path: str | os.PathLike, max_frames: int | None = None, start: int = 0) -> Video:
    """
    Decode a clip, an animation or a still image (a clip of one frame).

    Every coded frame is returned exactly once, in the order of display. The rotation flag is applied, pixels that are
    not square are made so by enlarging the side on which they are longer, 10 bit and grey become 8 bit RGB, an alpha
    channel is dropped, and high dynamic range (PQ and HLG) is brought down to BT.709, whose white is at its 203 nits.
    A clip that does not say by which matrix its colours are coded is read as players do: by BT.709 if it has 1280
    columns or 577 rows, or more, else by BT.601.

    The rate is the one that the container declares, if nine in ten of the frames follow each other at it, to half a
    frame, and all of them at it last as long as the clip does, to 0.2 seconds. Otherwise (a variable frame rate) it is
    their mean rate. No frame is dropped or repeated, so a clip of variable rate keeps its frame count and its
    duration, and its sound meets its frames at both ends.

    Args:
        path (`str` or `os.PathLike`): the file.
        max_frames (`int`, *optional*): read at most this many frames; at least 1. All by default.
        start (`int`, defaults to 0): number of the first frame to read.

    Returns:
        [`Video`]: `frames` is `(num_frames, height, width, 3)` uint8. A file whose end is damaged or missing gives the
        frames that can be decoded, with a logged warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as a clip, has no frames, or has none from `start` on; or `max_frames` or
            `start` is out of range.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"`max_frames` must be at least 1, got {max_frames}")
    if start < 0:
        raise ValueError(f"`start` must be 0 or more, got {start}")
    path = _check_readable(path, "path")

    info, data = _decode(path, start, max_frames, ["-f", "rawvideo", "pipe:1"])
    if info.damage is not None:
        logger.warning("%s is damaged, %d frames could be decoded: %s", path, info.num_frames, info.damage)
    frames = np.frombuffer(data, np.uint8).reshape(-1, info.height, info.width, 3)
    return Video(frames, info.fps, path, info.has_audio, info.start_time)


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """
    Decode a clip to its end and say what [`read_video`] would find in it, without keeping its frames.

    Args:
        path (`str` or `os.PathLike`): the file.

    Returns:
        [`VideoInfo`]: a file whose end is damaged or missing gives what can be decoded, and says so in `damage`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as a clip, or has no frames.
    """
    info, _ = _decode(_check_readable(path, "path"), 0, None, ["-f", "null", "-"])
    return info


def read_frames(path: str | os.PathLike, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """
    Decode some frames of a clip one after another, with one of them in memory at a time.

    Args:
        path (`str` or `os.PathLike`): the file.
        indices (`Sequence[int]`): numbers of the frames, not descending; one may come several times.

    Yields:
        `np.ndarray`: for each index, the frame of that number of [`read_video`], `(height, width, 3)` uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `indices` is empty, descends or starts below 0; or the file cannot be read that far.
    """
    indices = list(indices)
    if not indices or indices[0] < 0 or indices != sorted(indices):
        raise ValueError(f"`indices` must be one or more ascending numbers from 0 on, got {indices}")
    path = _check_readable(path, "path")

    filters = f"trim=start_frame={indices[0]}:end_frame={indices[-1] + 1},{_to_rgb(path)}"
    source = ["-i", f"file:{path.resolve()}", "-map", "0:V:0"]
    output = ["-vf", filters, "-fps_mode", "passthrough", "-c:v", "ppm", "-f", "image2pipe", "pipe:1"]
    repeats = Counter(indices)
    with _ffmpeg([*source, *output]) as (process, log):
        for index in range(indices[0], indices[-1] + 1):
            header = [process.stdout.readline() for _ in range(3)]  # b"P6", b"width height", b"255"
            if not header[-1]:
                process.wait()
                raise ValueError(f"`path`: {path} cannot be read up to frame {index}: {_reason(_read_log(log))}")
            width, height = map(int, header[1].split())
            frame = np.frombuffer(process.stdout.read(height * width * 3), np.uint8).reshape(height, width, 3)
            yield from [frame] * repeats[index]


def _as_uint8(frames: np.ndarray | Sequence, name: str = "frames") -> np.ndarray:
    if not isinstance(frames, np.ndarray):
        sizes = {np.shape(frame) for frame in frames}
        if len(sizes) != 1:
            raise ValueError(f"`{name}` must be one or more frames of one size, got the shapes {sorted(sizes)}")
        frames = np.stack([np.asarray(frame) for frame in frames])
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"`{name}` must have the shape (num_frames, height, width, 3), got {frames.shape}")
    if np.issubdtype(frames.dtype, np.floating):
        whole = np.empty(frames.shape, np.uint8)
        for index, frame in enumerate(frames):  # one at a time: a long clip as floats takes gigabytes
            if not (np.isfinite(frame).all() and frame.min() >= 0 and frame.max() <= 1):
                raise ValueError(f"`{name}`: float frames must be finite and in [0, 1]")
            whole[index] = np.round(frame * 255)
        frames = whole
    if frames.dtype != np.uint8:
        raise ValueError(f"`{name}` must be uint8, or float in [0, 1], got {frames.dtype}")
    return np.ascontiguousarray(frames)


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray | Sequence,
    fps: float | Fraction,
    audio_from: str | os.PathLike | None = None,
    audio_start: float | Fraction = 0,
    crf: int = 16,
) -> None:
    """
    Write frames as an H.264 clip of exactly their count, rate and size, optionally with the sound of another clip.

    Even sizes are stored as yuv420p, which every player reads. H.264 cannot hold an odd width or height in yuv420p, so
    such clips are stored as yuv444p, which keeps the size but which some browsers do not play. The file appears under
    its name only when it is complete; a failure leaves nothing behind, nor touches an earlier file of that name.

    Args:
        path (`str` or `os.PathLike`): the file to write, one of `.mp4`, `.m4v`, `.mov`, `.mkv`; its folder must exist.
        frames (`np.ndarray` or a sequence of frames): `(num_frames, height, width, 3)` RGB, uint8 or float in [0, 1];
            or a list of such frames, PIL images included.
        fps (`float` or `Fraction`): frames per second. A float is taken as the nearest fraction with a denominator of
            at most 1001, so `29.97002997` is exactly 30000/1001.
        audio_from (`str` or `os.PathLike`, *optional*): a clip whose first sound track is taken over, cut to the
            duration of the frames: copied if the container can hold its codec, otherwise encoded as AAC. A clip
            without sound gives a silent one.
        audio_start (`float` or `Fraction`, defaults to 0): the time in `audio_from`, in seconds, that belongs to the
            first frame; [`Video.start_time`] of the clip that the frames were made from.
        crf (`int`, defaults to 16): H.264 quality, 0 (nearly lossless, large) to 51 (worst).

    Raises:
        FileNotFoundError: the folder of `path`, or `audio_from`, does not exist.
        ValueError: an argument has a wrong shape, type or range; `audio_from` cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(f"`path` must end in one of {', '.join(VIDEO_SUFFIXES)}, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path`: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"`path`: {path} is a folder")
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise ValueError(f"`fps` must be in (0, 1000], got {fps}")
    if not (math.isfinite(audio_start) and audio_start >= 0):
        raise ValueError(f"`audio_start` must be 0 or more seconds, got {audio_start}")
    if not 0 <= crf <= 51:
        raise ValueError(f"`crf` must be in [0, 51], got {crf}")
    frames = _as_uint8(frames)
    num_frames, height, width, _ = frames.shape
    fps = fps if isinstance(fps, Fraction) else max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
    if audio_from is not None:
        audio_from = _check_readable(audio_from, "audio_from")

    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    pixel_format = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
    to_yuv = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
    tags = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709,setsar=1"
    encode = ["-vf", f"{to_yuv},format={pixel_format},{tags}", "-c:v", "libx264", "-crf", str(crf)]
    finish = ["-movflags", "+faststart"] if path.suffix.lower() != ".mkv" else []

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        silent, complete = Path(folder) / f"silent{path.suffix}", Path(folder) / f"complete{path.suffix}"
        code, _, log = _run_ffmpeg([*raw, *encode, *finish, f"file:{silent}"], frames.reshape(-1).data)
        if code != 0:
            raise ValueError(f"`frames` of {width}x{height} cannot be encoded: {_reason(log)}")
        if audio_from is None:
            os.replace(silent, path)
            return
        # The sound is shifted, not sought (a seek lands on a key frame of the picture), and cut before 0.
        sound = ["-itsoffset", f"{-float(audio_start):.6f}", "-i", f"file:{audio_from.resolve()}"]
        streams = ["-map", "0:v:0", "-map", "1:a:0?", "-c:v", "copy", "-t", f"{float(num_frames / fps):.6f}"]
        streams += ["-copypriorss:a", "0"] if audio_start > 0 else []
        for codec in ("copy", "aac"):
            arguments = ["-i", f"file:{silent}", *sound, *streams, "-c:a", codec, *finish, f"file:{complete}"]
            code, _, log = _run_ffmpeg(arguments)
            if code == 0:
                os.replace(complete, path)
                return
        raise ValueError(f"`audio_from`: the sound of {audio_from} cannot be read: {_reason(log)}")


def write_strip(path: str | os.PathLike, rows: dict[str, np.ndarray | Sequence], num_columns: int = 6) -> None:
    """
    Draw clips of equal length below each other, over time, as one PNG.

    Each row is one clip with its label; the columns are frames spread evenly from the first to the last, under the
    number of the frame.

    Args:
        path (`str` or `os.PathLike`): the `.png` file to write, as a whole or not at all; its folder must exist.
        rows (`dict[str, np.ndarray]`): label -> `(num_frames, height, width, 3)`, uint8 or float in [0, 1], or a list
            of frames. All have the same number of frames.
        num_columns (`int`, defaults to 6): at most so many frames are shown; at least 1.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        ValueError: `path` is not a `.png`, `rows` is empty or its clips differ in length, or `num_columns` is below 1.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"`path` must end in .png, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path`: there is no folder {path.parent}")
    if num_columns < 1:
        raise ValueError(f"`num_columns` must be at least 1, got {num_columns}")
    clips = {label: _as_uint8(frames, f"rows[{label!r}]") for label, frames in rows.items()}
    lengths = {label: len(frames) for label, frames in clips.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"`rows` must hold clips of one length, got {lengths}")

    num_frames = next(iter(lengths.values()))
    numbers = np.unique(np.linspace(0, num_frames - 1, num_columns).round().astype(int))
    _, height, width, _ = next(iter(clips.values())).shape
    scale = 176 / max(height, width)
    cell_width, cell_height = max(1, round(width * scale)), max(1, round(height * scale))
    font, gap = ImageFont.load_default(size=15), 6
    left = max(math.ceil(font.getlength(label)) for label in clips) + 2 * gap
    top = 24

    size = (left + len(numbers) * (cell_width + gap), top + len(clips) * (cell_height + gap))
    strip = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(strip)
    for column, number in enumerate(numbers):
        x = left + column * (cell_width + gap)
        draw.text((x + cell_width / 2, top / 2), f"frame {number}", fill="black", font=font, anchor="mm")
        for row, (label, frames) in enumerate(clips.items()):
            y = top + row * (cell_height + gap)
            draw.text((gap, y + cell_height / 2), label, fill="black", font=font, anchor="lm")
            cell = Image.fromarray(frames[number]).resize((cell_width, cell_height), Image.Resampling.BICUBIC)
            strip.paste(cell, (x, y))

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        strip.save(Path(folder) / "strip.png")
        os.replace(Path(folder) / "strip.png", path)
