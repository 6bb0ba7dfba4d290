"""
Draw what cross-attention reads while a clip is edited:

    python examples/visualize_attention.py clip.mp4 "make the red circle blue" --output out/attention

For each chosen block block_N.png shows, over time and laid over the source, how much of its attention each latent
token gives to the editing tokens, words and visual tokens that the block reads. In attention.mp4 source, edit and the
blocks' maps run side by side. Tables say how attention where the clip changed differs from the rest. --compare draws a
second pipeline beside the first one. Without VIDEO and PROMPT the demo clip is edited.
"""

import argparse
import math
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from edit_video import (
    DEMO_FPS,
    Parser,
    add_clip_arguments,
    add_edit_options,
    add_offload_option,
    check_weights,
    count,
    edit,
    load_pipeline,
    loading,
    natural,
    read_clip,
    staged,
)

from rvedit_diffusers import RVEDiTPipeline, RVEDiTTransformer3DModel
from rvedit_diffusers.attention_maps import (
    BlockAttention,
    changed_places,
    latent_frames,
    place_information,
    record_attention,
    text_words,
    visual_grid,
)
from rvedit_diffusers.attention_pictures import (
    Column,
    HeatMap,
    draw_attention_clip,
    number,
    write_attention_picture,
)
from rvedit_diffusers.files import told_in_a_line
from rvedit_diffusers.synthetic import demo_edit
from rvedit_diffusers.synthetic.metrics import edit_map
from rvedit_diffusers.training.branches import default_align_blocks
from rvedit_diffusers.video import write_video


NUM_WORDS = 8  # of a longer instruction the most selective ones are drawn
DEPARTURE, SHARE, CHANGED = "departure from mean", "share of attention", "read by what changed"
FOOTNOTES = (
    "Each square is a token of the latents; colours go from 0 to the number beside the row's bar. Outlined, changed:"
    " latent tokens where the edit differs from the source.",
    f"{SHARE}: of what a latent token reads in one softmax, the part that goes to this token; mean of {{steps}} and"
    " all heads.",
    f"{DEPARTURE}: Kullback-Leibler divergence of what a latent token reads from what all read on average.",
    "read by ...: how often these latent tokens read each visual token, drawn where the visual token lies in the clip;"
    " 1: as often as the average one.",
)


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_clip_arguments(parser)
    parser.add_argument("--compare", help="folder or Hub id of a second pipeline, to be drawn beside the first one")
    parser.add_argument("--output", type=Path, default=Path("out/attention"), help="folder; default: out/attention")
    parser.add_argument(
        "--blocks", type=natural, nargs="+", help="numbers of blocks, from 0; default: those that training aligns"
    )
    parser.add_argument("--words", nargs="+", help=f"words of PROMPT to draw; default: all, or {NUM_WORDS} of more")
    parser.add_argument("--num_edit_tokens", type=count, default=4, help="editing tokens to draw; default: 4")
    parser.add_argument("--num_columns", type=count, default=5, help="frames in the pictures; default: 5")
    parser.add_argument(
        "--step", type=natural, nargs="+", help="denoising steps, from 0, the noisiest, to average; default: all"
    )
    add_edit_options(parser)
    add_offload_option(parser)
    return parser


def bare(word: str) -> str:
    return word.lower().strip(string.punctuation)


def check_choices(parser: Parser, args: argparse.Namespace, prompt: str, models: dict[str, str]) -> None:
    """Fills in `args.blocks`. Of the models only the configurations are read."""
    for option, name in models.items():
        with loading(parser, option, name):
            config = RVEDiTTransformer3DModel.load_config(name, subfolder="transformer")
            transformer = argparse.Namespace(**{"num_shallow_blocks": None} | config)
            num_layers, steps = transformer.num_layers, RVEDiTPipeline.load_config(name)
            default_blocks = default_align_blocks(transformer)
        if args.blocks is None:
            args.blocks = default_blocks
        args.blocks = list(dict.fromkeys(args.blocks))
        if wrong := [block for block in args.blocks if block >= num_layers]:
            parser.error(f"--blocks {wrong[0]}: {option} {name} has the blocks 0 to {num_layers - 1}")
        num_steps = args.num_inference_steps or steps.get("default_num_inference_steps", 50)
        if wrong := [step for step in args.step or () if step >= num_steps]:
            parser.error(f"--step {wrong[0]}: the edit takes {num_steps} steps, 0 to {num_steps - 1}")
        if args.words:
            shallow = num_layers // 3 if transformer.num_shallow_blocks is None else transformer.num_shallow_blocks
            streams = [transformer.shallow_tokens if b < shallow else transformer.deep_tokens for b in args.blocks]
            if not any("text" in tokens for tokens in streams):
                parser.error(f"--words: none of the blocks {args.blocks} of {option} {name} reads text")
    known = {bare(word) for word in prompt.split()}
    if wrong := [word for word in args.words or () if bare(word) not in known]:
        parser.error(f"--words {wrong[0]}: is no word of {prompt!r}")


@dataclass
class Reading:
    """What one pipeline did, and what its blocks read meanwhile."""

    name: str
    edited: np.ndarray  # (frames, height, width, 3) uint8
    region: torch.Tensor  # (frames, height, width) bool
    attention: dict[int, BlockAttention]
    streams: dict[int, tuple[str, ...]]
    words: list[tuple[str, list[int]]]
    marks: list[int]
    padding: list[int]
    frames: list[int]  # of the maps, for each of the clip
    last_frame: int  # of the clip as it is padded, from 0

    def changed(self, block: int) -> torch.Tensor:
        """Where the edit differs from the source, `(frames, height, width)` bool of the block's maps."""
        grid = next(iter(self.attention[block].maps.values())).shape[2:]
        return changed_places(self.region, tuple(grid), self.frames)

    def visual(self, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps `(num_visual, frames, height, width)` of the visual tokens that exist, and their [`visual_grid`]."""
        attention = self.attention[block]
        maps, positions = attention.maps["visual"][0], attention.visual_positions[0]
        if attention.visual_attention_mask is not None:
            maps, positions = (rows[attention.visual_attention_mask[0]] for rows in (maps, positions))
        return maps, *visual_grid(positions)


def read(parser: Parser, args: argparse.Namespace, option: str, name: str, frames, prompt: str, fps: float) -> Reading:
    pipe = load_pipeline(parser, args, option, name)
    with record_attention(pipe.transformer, args.blocks, args.step) as attention:
        edited = edit(parser, args, pipe, frames, prompt, fps)
    edited = (edited * 255).round().astype(np.uint8)
    words, marks, padding = [], [], []
    if texts := [block.maps["text"] for block in attention.values() if "text" in block.maps]:
        words, marks, padding = text_words(pipe.tokenizer, prompt, texts[0].shape[1])
    times = latent_frames(pipe, len(frames))
    num_latent_frames = (times[-1] + 1) * pipe.transformer.config.patch_size[0]
    return Reading(
        name=name if len(name) <= 44 else f"...{name[-41:]}",
        edited=edited,
        region=torch.from_numpy(edit_map(edited, frames)),
        attention=attention,
        streams={block: pipe.transformer.blocks[block].tokens for block in args.blocks},
        words=words,
        marks=marks,
        padding=padding,
        frames=times,
        last_frame=(num_latent_frames - 1) * pipe.vae_scale_factor_temporal,
    )


def means(values: torch.Tensor, changed: torch.Tensor) -> list[float]:
    return [float(values.mean()), float(values[changed].mean()), float(values[~changed].mean())]


def token_maps(
    reading: Reading, block: int, stream: str, args: argparse.Namespace
) -> dict[str, tuple[torch.Tensor, str]]:
    """By label, the share of attention that tokens of a stream get at each place, in percent, and which tokens."""
    maps = reading.attention[block].maps[stream][0]  # (num_tokens, frames, height, width)
    information = place_information(maps)
    groups = {}
    if stream == "edit":
        if "text" in reading.attention[block].maps:
            groups["all editing tokens"] = (range(len(maps)), "beside the text")
        selective = information.mean((1, 2, 3)).argsort(descending=True)[: args.num_edit_tokens]
        for rank, token in enumerate(selective.tolist(), 1):
            groups[f"editing token, selective no. {rank}"] = ([token], f"token {token}")
    else:
        words = reading.words
        if args.words:
            chosen = {bare(word) for word in args.words}
            words = [word for word in words if bare(word[0]) in chosen]
        elif len(words) > NUM_WORDS:
            words = sorted(words, key=lambda word: -information[word[1]].sum(0).mean())[:NUM_WORDS]
            words = sorted(words, key=lambda word: word[1])
        labels = [label for label, _ in words]
        for place, (label, tokens) in enumerate(words):
            repeat = f" ({labels[:place].count(label) + 1})" if labels.count(label) > 1 else ""
            groups[f'"{label}"{repeat}'] = (tokens, "")
        groups["end of the text"] = (reading.marks, "")
        if reading.padding:
            groups["padding of the text"] = (reading.padding, "")
    return {label: (100 * maps[list(tokens)].sum(0), note) for label, (tokens, note) in groups.items()}


def block_maps(reading: Reading, block: int, args: argparse.Namespace) -> dict[tuple[str, str], HeatMap]:
    """The rows of a block's picture by the lines of their labels."""
    attention, rows, changed = reading.attention[block], {}, reading.changed(block)

    def heat(values: torch.Tensor, unit: str, note: str = "") -> HeatMap:
        notes = [note, f"{number(float(values.min()))} to {number(float(values.max()))}"]
        _, inside, outside = means(values, changed)
        notes += [f"{name}: {number(mean)}" for name, mean in (("changed", inside), ("rest", outside)) if mean == mean]
        return HeatMap(values[reading.frames].numpy(), unit, [line for line in notes if line])

    for stream, label in (("edit", "editing tokens"), ("text", "text")):
        if stream in attention.maps:
            rows[label, DEPARTURE] = heat(place_information(attention.maps[stream][0]).sum(0), "nats")
            for name, (share, note) in token_maps(reading, block, stream, args).items():
                rows[name, SHARE] = heat(share, "%", note)
    if "visual" in attention.maps:
        maps, tokens, times = reading.visual(block)
        clip_times = torch.arange(len(reading.frames)) / max(reading.last_frame, 1)
        nearest = (clip_times[:, None] - times).abs().argmin(1)  # (clip's frames,)
        for measure, places in ((CHANGED, changed), ("read by the rest", ~changed)):
            if places.any():
                received = len(maps) * maps[:, places].mean(1)[tokens]  # (times, rows, columns)
                extremes = f"{number(float(received.min()))} to {number(float(received.max()))}"
                rows["visual tokens", measure] = HeatMap(received[nearest].numpy(), "times", [extremes])
        rows["visual tokens", DEPARTURE] = heat(place_information(maps).sum(0), "nats")
    return rows


def is_in_clip(label: tuple[str, str], args: argparse.Namespace) -> bool:
    """A map of each stream is, and of each word that was asked for."""
    what, measure = label
    if what.startswith('"'):
        return args.words is not None
    return measure == CHANGED if what == "visual tokens" else measure == DEPARTURE


def steps_text(args: argparse.Namespace) -> str:
    if args.step is None:
        return "all denoising steps"
    return f"denoising step{'s' * (len(args.step) > 1)} {', '.join(map(str, args.step))}"


def print_tables(reading: Reading, args: argparse.Namespace) -> None:
    share = 100 * float(reading.region.float().mean())
    print(f"{reading.name}: mean of {steps_text(args)}; {share:.1f} % of the pixels changed")

    # 1. Streams
    print("block stream  tokens  mass  entropy, at most  departure from mean  changed     rest   in nats")
    for block in args.blocks:
        attention, changed = reading.attention[block], reading.changed(block)
        for stream, entropy in attention.entropy.items():
            maps = reading.visual(block)[0] if stream == "visual" else attention.maps[stream][0]
            mass, mean_entropy = float(maps.sum(0).mean()), float(entropy[0].mean())
            departure = [number(value) for value in means(place_information(maps).sum(0), changed)]
            print(
                f"{block:5d} {stream:7s} {len(maps):6d} {mass:5.2f}  {mean_entropy:7.3f}  {math.log(len(maps)):7.3f}"
                f"  {departure[0]:>19s} {departure[1]:>8s} {departure[2]:>8s}"
            )

    # 2. Tokens
    print(f"block {'share of attention, %':50s}     mean  changed     rest    ratio")
    for block in args.blocks:
        changed, shares, streams = reading.changed(block), {}, reading.attention[block].maps
        for stream in [stream for stream in ("edit", "text") if stream in streams]:
            for label, (values, note) in token_maps(reading, block, stream, args).items():
                shares[f"{label} ({note})" if note else label] = values
        if "visual" in streams:
            maps, tokens, times = reading.visual(block)
            frames = (times * reading.last_frame).round().long().clamp(max=len(reading.region) - 1)
            there = changed_places(reading.region[frames], tuple(tokens.shape), range(len(times)))
            label = f"visual tokens where it changed ({100 * float(there.float().mean()):.0f} % of them)"
            shares[label] = 100 * maps[tokens[there]].sum(0)
        for label, values in shares.items():
            mean, inside, outside = means(values, changed)
            numbers = (number(value) for value in (mean, inside, outside, inside / outside if outside else math.nan))
            print(f"{block:5d} {label:50s} " + " ".join(f"{value:>8s}" for value in numbers))


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.video is None) != (args.prompt is None):
        parser.error("PROMPT is missing")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("PROMPT is empty")

    # 1. The clip, and all that can be wrong before a model is loaded
    models = {"--model": args.model} | ({} if args.compare is None else {"--compare": args.compare})
    for option, name in models.items():
        check_weights(parser, option, name)
    if args.lora is not None:
        check_weights(parser, "--lora", args.lora)
    try:
        for folder in (args.output, *args.output.parents):
            if folder.exists() and not folder.is_dir():
                parser.error(f"--output {args.output}: {folder} is no folder")
    except OSError as error:  # a name that is too long, say
        parser.error(f"--output {args.output}: {error.strerror}")
    if args.video is None:
        demo = demo_edit()
        prompt, fps, frames = demo.instruction, DEMO_FPS, demo.source_frames[: args.num_frames]
        print(f'demo clip: "{prompt}"')
    else:
        clip = read_clip(parser, args)
        prompt, fps, frames = args.prompt, clip.fps, clip.frames
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    check_choices(parser, args, prompt, models)

    # 2. The edits, one pipeline in memory at a time
    readings = [read(parser, args, option, name, frames, prompt, float(fps)) for option, name in models.items()]
    for reading in readings:
        print_tables(reading, args)

    # 3. The files
    maps = {block: [block_maps(reading, block, args) for reading in readings] for block in args.blocks}
    written = [args.output / f"block_{block}.png" for block in args.blocks] + [args.output / "attention.mp4"]
    footnotes = [note.format(steps=steps_text(args)) for note in FOOTNOTES]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with staged(written) as files:
            for block, file in zip(args.blocks, files):
                columns = []
                for reading, rows in zip(readings, maps[block]):
                    name = f"{reading.name}: " if len(readings) > 1 else ""
                    streams = " and ".join(stream.replace("edit", "editing") for stream in reading.streams[block])
                    outline = reading.changed(block)[reading.frames].numpy()
                    columns.append(Column(f"{name}reads {streams} tokens", reading.edited, outline, rows))
                title = f'Block {block}: "{prompt}"'
                write_attention_picture(file, title, frames, columns, footnotes, args.num_columns)
            columns = []
            for place, reading in enumerate(readings):
                outline = reading.changed(args.blocks[0])[reading.frames].numpy()
                rows = {
                    (f"block {block}", *label): heat
                    for block in args.blocks
                    for label, heat in maps[block][place].items()
                    if is_in_clip(label, args)
                }
                columns.append(Column(reading.name if len(readings) > 1 else "", reading.edited, outline, rows))
            write_video(files[-1], draw_attention_clip(frames, columns), fps)
    except (OSError, ValueError) as error:
        parser.error(f"the result cannot be written: {told_in_a_line(error)}")
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
