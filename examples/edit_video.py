"""
Edit a clip by an instruction:

    python examples/edit_video.py clip.mp4 "make the video black and white" --output edited.mp4

The result has the clip's frame count, rate, size and sound. Without VIDEO and PROMPT the demo clip, whose true edit is
known, is edited with the embedded checkpoint into out/demo/.
"""

import argparse
import gc
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan

from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline, RVEDiTTransformer3DModel
from rvedit_diffusers.clips import longest_clip
from rvedit_diffusers.files import told_in_a_line
from rvedit_diffusers.synthetic import demo_edit
from rvedit_diffusers.video import VIDEO_SUFFIXES, Video, read_video, write_strip, write_video


DEMO_FOLDER = Path("out/demo")
DEMO_FPS = 16
MEMORY_HINT = "; --offload, fewer --num_frames or a smaller --height take less memory"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def count(text: str) -> int:
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return value


def natural(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 0 or more, of at most 18 digits")
    return int(text)


def scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def add_clip_arguments(parser: Parser) -> None:
    """What is edited, how, and by what."""
    parser.add_argument("video", nargs="?", metavar="VIDEO", help="clip or image to edit")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to change")
    parser.add_argument(
        "--model", default=TINY_CHECKPOINT, help="folder or Hub id of a pipeline; default: the embedded checkpoint"
    )
    parser.add_argument("--lora", help="folder, file or Hub id of LoRA weights to add to --model")


def add_edit_options(parser: Parser) -> None:
    """The options that [`edit`] and [`choose_device`] read."""
    parser.add_argument("--seed", type=natural, default=0, help="seed of the initial noise; default: 0")
    parser.add_argument("--num_inference_steps", type=count, help="denoising steps; default: the model's own")
    parser.add_argument("--guidance_scale", type=scale, help="strength of the instruction; default: the model's own")
    parser.add_argument(
        "--source_guidance_scale", type=scale, help="strength of the source clip; default: the model's own"
    )
    parser.add_argument("--negative_prompt", help="what to be guided away from")
    parser.add_argument(
        "--num_frames",
        type=count,
        help="edit at most so many frames, from the first; sound is cut with them; default: all",
    )
    parser.add_argument("--height", type=count, help="height to edit at, in pixels; the result has the source's size")
    parser.add_argument("--width", type=count, help="width to edit at, likewise")
    parser.add_argument(
        "--keep_detail",
        action=argparse.BooleanOptionalAction,
        help="the clip itself with the change that the edit makes, in place of the edited copy; default: the"
        " model's own, or where it scales the clip down",
    )
    parser.add_argument("--device", help="default: cuda if there is one, otherwise cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, otherwise float32")


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_clip_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        help=f"file to write ({', '.join(VIDEO_SUFFIXES)}); default: ./<VIDEO's name>_edited.mp4",
    )
    parser.add_argument("--compare", type=Path, help="also write a .png with frames of source and result over time")
    add_edit_options(parser)
    add_offload_option(parser)
    return parser


def add_offload_option(parser: Parser) -> None:
    """The option that [`place`] is given."""
    parser.add_argument(
        "--offload",
        choices=("auto", "none", "model", "group"),
        default="auto",
        help="what rests in host memory: model, the parts that are not running; group, all but the layers that are;"
        " auto, model on GPUs that the weights would fill by more than 70 %%, group where the largest part would",
    )


def check_file(parser: Parser, option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix.lower() not in suffixes:
        parser.error(f"{option} {path}: must end in {' or '.join(suffixes)}")
    try:
        if not path.parent.is_dir():
            parser.error(f"{option} {path}: there is no folder {path.parent}")
        if path.is_dir():
            parser.error(f"{option} {path}: is a folder")
    except OSError as error:  # a name that is too long, say
        parser.error(f"{option} {path}: {error.strerror}")


def check_weights(parser: Parser, option: str, name: str) -> None:
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not os.path.isdir(name.split("/")[0])
    if not os.path.exists(name) and not is_hub_id:
        parser.error(f"{option} {name}: there is no such file or folder")
    if option != "--lora" and os.path.exists(name) and not os.path.isfile(os.path.join(name, "model_index.json")):
        parser.error(f"{option} {name}: is not a pipeline, it has no model_index.json")


def choose_device(parser: Parser, name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's answer to a device that this build or machine lacks
        parser.error(f"--device {name}: {told_in_a_line(error)}")
    return device


@contextmanager
def loading(parser: Parser, option: str, name: str) -> Iterator[None]:
    is_local = os.path.exists(name)
    if not is_local:
        logging.disable(logging.WARNING)  # each library has its own words, and many, for a Hub that cannot be reached
    # A folder or a download that is not what it should be fails in as many ways as there are file formats in it.
    try:
        yield
    except Exception as error:
        while not is_local and error.__cause__ is not None:
            error = error.__cause__
        parser.error(
            f"{option} {name}: cannot be loaded{'' if is_local else ' from the Hub'}: {told_in_a_line(error)}"
        )
    finally:
        logging.disable(logging.NOTSET)


def read_clip(parser: Parser, args: argparse.Namespace) -> Video:
    """The clip, of which no more is decoded than the model has positions for; a longer one is refused."""
    limit = args.num_frames
    if limit is None:
        with loading(parser, "--model", args.model):
            folder = args.model if os.path.isdir(args.model) else RVEDiTPipeline.download(args.model)
            with torch.device("meta"):
                models = [
                    kind.from_config(kind.load_config(folder, subfolder=name))
                    for kind, name in ((RVEDiTTransformer3DModel, "transformer"), (AutoencoderKLWan, "vae"))
                ]
            limit = longest_clip(models[0].config, models[1].config.scale_factor_temporal)
    try:
        clip = read_video(args.video, max_frames=limit if args.num_frames else limit + 1)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error).replace("`path`", "VIDEO"))
    except (OSError, MemoryError) as error:
        parser.error(f"VIDEO: {told_in_a_line(error)}")
    if clip.num_frames > limit:
        parser.error(
            f"VIDEO {args.video}: has more than the {limit} frames that --model has positions for: --num_frames edits"
            " its beginning"
        )
    return clip


def load_pipeline(
    parser: Parser, args: argparse.Namespace, option: str = "--model", name: str | None = None
) -> RVEDiTPipeline:
    """Load `name`, that of `--model` by default, and place it. To `--model` belongs the LoRA."""
    name = name or args.model
    device = choose_device(parser, args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with loading(parser, option, name):
        pipe = RVEDiTPipeline.from_pretrained(name, dtype=dtype)
    if option == "--model" and args.lora is not None:
        with loading(parser, "--lora", args.lora):
            pipe.load_lora_weights(args.lora)
    try:
        place(pipe, device, args.offload)
    except RuntimeError as error:  # the device's memory, or the host's that is pinned for it
        parser.error(f"--offload {args.offload}: {told_in_a_line(error)}")
    return pipe


def place(pipe: RVEDiTPipeline, device: torch.device, offload: str) -> None:
    """Put a pipeline on a device, or where its parts rest until they run."""
    if offload == "auto":
        gc.collect()  # what another pipeline has left counts as taken
        torch.cuda.empty_cache()
        models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        sizes = [sum(parameter.nbytes for parameter in model.parameters()) for model in models]
        limit = 0.7 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        offload = "group" if max(sizes) > limit else "model" if sum(sizes) > limit else "none"
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipe.to(device)


def edit(parser: Parser, args: argparse.Namespace, pipe: RVEDiTPipeline, frames, prompt: str, fps: float):
    try:
        output = pipe(
            frames,
            prompt,
            negative_prompt=args.negative_prompt,
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            source_guidance_scale=args.source_guidance_scale,
            generator=torch.Generator("cpu").manual_seed(args.seed),
            fps=fps,
            keep_size=True,
            keep_detail=args.keep_detail,
        )
        return output.frames[0]  # (frames, height, width, 3)
    except ValueError as error:  # a size that the model cannot take, say; raised before any model runs
        parser.error(str(error))
    except (RuntimeError, MemoryError) as error:  # torch's errors of memory are RuntimeErrors
        is_full = isinstance(error, torch.OutOfMemoryError)
        parser.error(f"the edit failed: {told_in_a_line(error)}{MEMORY_HINT if is_full else ''}")


@contextmanager
def staged(paths: list[Path]) -> Iterator[list[Path]]:
    """Gives a file to write for each of `paths`; all are moved there at the end, or none if anything fails."""
    with ExitStack() as stack:
        files = []
        for path in paths:
            # next to its destination: a move between file systems could fail halfway
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".edit_video.", dir=path.parent))
            files.append(Path(folder) / path.name)
        yield files
        for path in paths:
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
        for file, path in zip(files, paths):
            os.replace(file, path)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.video is None) != (args.prompt is None):
        parser.error("PROMPT is missing")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("PROMPT is empty")

    # 1. The clip, and all that can be wrong before a model is loaded
    check_weights(parser, "--model", args.model)
    if args.lora is not None:
        check_weights(parser, "--lora", args.lora)
    if args.video is None:
        if args.output is not None or args.compare is not None:
            parser.error(f"--output and --compare need VIDEO and PROMPT; the demo writes to {DEMO_FOLDER}")
        demo = demo_edit()
        prompt, fps, frames = demo.instruction, DEMO_FPS, demo.source_frames[: args.num_frames]
        print(f'demo clip: "{prompt}"')
    else:
        if args.output is not None:
            check_file(parser, "--output", args.output, VIDEO_SUFFIXES)
        if args.compare is not None:
            check_file(parser, "--compare", args.compare, (".png",))
        clip = read_clip(parser, args)
        if args.output is None:
            args.output = Path(f"{clip.path.stem}_edited.mp4")
            check_file(parser, "--output", args.output, VIDEO_SUFFIXES)
        prompt, fps, frames = args.prompt, clip.fps, clip.frames[: args.num_frames]
    pipe = load_pipeline(parser, args)

    # 2. The edit
    started = time.perf_counter()
    edited = edit(parser, args, pipe, frames, prompt, float(fps))
    seconds = time.perf_counter() - started

    # 3. The files
    rows = {"source": frames, "edited": edited}
    try:
        if args.video is None:
            DEMO_FOLDER.mkdir(parents=True, exist_ok=True)
            written = [DEMO_FOLDER / name for name in ("source.mp4", "edited.mp4", "compare.png")]
            with staged(written) as files:
                write_video(files[0], frames, fps)
                write_video(files[1], edited, fps)
                write_strip(files[2], rows | {"true edit": demo.target_frames[: args.num_frames]})
        else:
            written = [args.output] + ([args.compare] if args.compare is not None else [])
            with staged(written) as files:
                write_video(files[0], edited, fps, audio_from=clip.path, audio_start=clip.start_time)
                if args.compare is not None:
                    write_strip(files[1], rows)
    except (OSError, ValueError) as error:
        parser.error(f"the result cannot be written: {told_in_a_line(error)}")
    for path in written:
        print(f"wrote {path}")
    height, width = frames.shape[1:3]
    print(f"edited {len(frames)} frames of {width}x{height} in {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
