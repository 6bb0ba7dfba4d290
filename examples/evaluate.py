r"""
Score a pipeline.

    python examples/evaluate.py --model runs/edit/pipeline --lora runs/edit/lora --num_samples 100 --output out/scores

scores it on the levels of the procedural benchmark, whose true edits are known: --output gets results.json, a strip of
the best, median and worst clips of each level, and all clips. --operations scores single edits instead.

    python examples/evaluate.py --model runs/edit/pipeline --lora runs/edit/lora \
        --benchmark openve --data OpenVE-Bench --output out/openve

edits the clips of a public benchmark and writes the results as its own scorer expects them, with the figures that need
no model.

The same command goes on with what was stopped. `accelerate launch examples/evaluate.py` shares the work among GPUs.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState
from diffusers import AutoencoderKLWan
from edit_video import (
    DTYPES,
    MEMORY_HINT,
    Parser,
    add_offload_option,
    check_weights,
    count,
    natural,
    place,
    scale,
)
from tqdm import tqdm

from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline
from rvedit_diffusers.evaluation import (
    CopySource,
    Level,
    PipelineEditor,
    PublicEdit,
    ScoreRecord,
    SingleEdits,
    Task,
    VaeCeiling,
    check_sources,
    configs_hash,
    figures_of,
    format_table,
    is_scored,
    model_name,
    pending_rounds,
    read_benchmark,
    read_clip,
    score_result,
    score_rounds,
    summarize,
    values_of,
    weights_hash,
    write_json,
    write_manifest,
    write_result,
    write_strips,
)
from rvedit_diffusers.evaluation.public import READERS
from rvedit_diffusers.files import told_in_a_line
from rvedit_diffusers.synthetic import (
    LEVELS,
    NEW_OPERATIONS,
    OPERATIONS,
    TEST_PHOTOS,
    TRAIN_PHOTOS,
    BenchmarkItems,
    SyntheticEdits,
)
from rvedit_diffusers.synthetic.edits import DRAWN as EDITS_DRAWN
from rvedit_diffusers.synthetic.levels import DRAWN as LEVELS_DRAWN
from rvedit_diffusers.synthetic.operations import GLOBAL, LOCAL


# To score three operations takes the memory of so many clips; all workers share it, in bytes.
RENDERINGS, SCORING_MEMORY = 100, 16 * 2**30
GUARD_ROWS = ("copy-source", "vae-ceiling")
EDITS_SEED = 5_000_000  # of single edits: training and its validation use seeds far below
SYNTHETIC_COLUMNS = {
    "union_success": ("union success []", 2),
    "op_success": ("operations", 2),
    "twin_consistency": ("twins", 2),
    "outside_psnr": ("outside PSNR", 1),
    "vae_psnr": ("autoencoder", 1),
    "n": ("n", 0),
}
PUBLIC_COLUMNS = {
    "source_psnr": ("PSNR to source", 1),
    "edit_area": ("edited area", 2),
    "outside_psnr": ("outside PSNR", 1),
    "outside_ssim": ("outside SSIM", 3),
    "flicker": ("flicker", 2),
    "warping_error": ("warping error", 4),
    "source_warping_error": ("of the source", 4),
    "n": ("n", 0),
}


def levels(text: str) -> list[str]:
    names = text.split(",")
    if set(names) - set(LEVELS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of some of {', '.join(LEVELS)}, with commas")
    return names


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=TINY_CHECKPOINT,
        help="folder or Hub id of a pipeline; or copy-source, the source itself, or vae-ceiling, the true edit through"
        " the autoencoder, between which every editor is; default: the embedded checkpoint",
    )
    parser.add_argument("--lora", help="folder or Hub id of LoRA weights to add")
    parser.add_argument("--vae", help="pipeline whose autoencoder copy-source and vae-ceiling are measured with")
    parser.add_argument("--output", type=Path, required=True, help="folder for all results; the same one goes on")
    parser.add_argument("--benchmark", choices=("synthetic", *READERS), default="synthetic")
    parser.add_argument("--num_inference_steps", type=count, help="default: the model's own")
    parser.add_argument("--guidance_scale", type=scale, help="default: the model's own")
    parser.add_argument("--num_frames", type=count, help="frames of a clip, from the first; default: 17, public: all")
    parser.add_argument("--height", type=count, help="to edit at, in pixels; default: 64, public: the model's choice")
    parser.add_argument("--width", type=count, help="likewise")
    parser.add_argument("--device", help="default: a GPU, if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, otherwise float32")
    add_offload_option(parser)
    synthetic = parser.add_argument_group("--benchmark synthetic")
    kinds = synthetic.add_mutually_exclusive_group()
    kinds.add_argument("--levels", type=levels, help="some of L0,...,L6,OOD, with commas; default: all")
    kinds.add_argument("--operations", nargs="+", choices=(*OPERATIONS, *NEW_OPERATIONS), help="single edits instead")
    synthetic.add_argument(
        "--kinds", nargs="+", choices=LOCAL + GLOBAL, help="operations that the levels are made of; default: all"
    )
    synthetic.add_argument("--num_samples", type=count, default=64, help="items of each level; default: 64")
    synthetic.add_argument("--seed", type=natural, default=0, help="names the items; default: 0")
    synthetic.add_argument("--no_twins", action="store_true", help="leave the twins of the items out")
    synthetic.add_argument(
        "--unseen_photos", action="store_true", help="--operations over photographs never trained on"
    )
    synthetic.add_argument("--batch_size", type=count, default=16, help="clips edited together; default: 16")
    synthetic.add_argument(
        "--num_workers",
        type=natural,
        help="processes that draw and score while the model works; default: 8 on a GPU, 0 on a CPU",
    )
    public = parser.add_argument_group("public benchmarks")
    public.add_argument("--data", type=Path, help="folder of the benchmark")
    public.add_argument("--limit", type=count, help="the first so many edits")
    return parser


def fill_in(args: argparse.Namespace) -> None:
    """The size of the procedural benchmark's clips; those of others are as they are."""
    if args.benchmark == "synthetic":
        args.num_frames, args.height, args.width = args.num_frames or 17, args.height or 64, args.width or 64


def check_arguments(parser: Parser, args: argparse.Namespace) -> None:
    is_guard, is_public = args.model in GUARD_ROWS, args.benchmark != "synthetic"
    if is_guard:
        for option in ("lora", "num_inference_steps", "guidance_scale"):
            if getattr(args, option) is not None:
                parser.error(f"--{option} is for pipelines, but --model is {args.model}")
        if args.offload != parser.get_default("offload"):
            parser.error(f"--offload is for pipelines, but --model is {args.model}")
    else:
        check_weights(parser, "--model", args.model)
        if args.vae is not None:
            parser.error(f"--vae is for --model {' and '.join(GUARD_ROWS)}: a pipeline has its own")
    if args.lora is not None:
        check_weights(parser, "--lora", args.lora)
    if args.vae is not None:
        check_weights(parser, "--vae", args.vae)
    if is_public and args.data is None:
        parser.error(f"--data: the folder of the benchmark {args.benchmark} is missing")
    if is_public and args.model == "vae-ceiling":
        parser.error("--model vae-ceiling needs true edits, which public benchmarks do not have")
    for_levels = ("levels", "operations", "kinds", "no_twins", "unseen_photos")
    for_synthetic = (*for_levels, "num_samples", "seed", "batch_size", "num_workers")
    for option in for_synthetic if is_public else ("data", "limit"):
        if getattr(args, option) != parser.get_default(option):
            parser.error(f"--{option} is not for --benchmark {args.benchmark}")
    if is_public and args.model == "copy-source":
        for option in ("vae", "height", "width"):
            if getattr(args, option) is not None:
                parser.error(f"--{option}: --model copy-source gives back the clips of {args.benchmark} as they are")
    if args.no_twins and args.operations is not None:
        parser.error("--no_twins is for levels: single edits have no twins")
    if args.benchmark == "ivebench" and args.output.resolve().is_relative_to(args.data.resolve()):
        parser.error(f"--output {args.output}: has to lie outside of --data {args.data}, all of which is searched")
    if args.unseen_photos and args.operations is None:
        parser.error("--unseen_photos is for --operations: the levels always show photographs never trained on")
    if is_public and args.num_frames == 1:
        parser.error("--num_frames has to be at least 2: what is scored is a clip")
    if not is_public and (args.height % 16 or args.width % 16):
        parser.error(f"--height {args.height} --width {args.width}: both have to be divisible by 16")
    if args.kinds is not None:
        if args.operations is not None:
            parser.error("--kinds is for levels: --operations shows single edits")
        try:
            BenchmarkItems(args.levels or LEVELS, args.seed, kinds=args.kinds)
        except ValueError as error:
            parser.error(f"--kinds: {error}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output}: is not a folder")


def synthetic_suites(args: argparse.Namespace) -> list[Level] | list[SingleEdits]:
    size = {"num_frames": args.num_frames, "height": args.height, "width": args.width}
    if args.operations is None:
        names = args.levels or LEVELS
        lists = [BenchmarkItems(name, args.seed, kinds=args.kinds, **size) for name in names]
        return [Level(items, twins=not args.no_twins) for items in lists]
    photos = TEST_PHOTOS if args.unseen_photos else TRAIN_PHOTOS
    lists = [SyntheticEdits(EDITS_SEED + args.seed, **size, operations=(n,), photos=photos) for n in args.operations]
    return [SingleEdits(edits) for edits in lists]


def settings_before_loading(args: argparse.Namespace, dtype: str) -> dict:
    """What scores depend on, as far as the arguments tell."""
    settings = {
        "benchmark": args.benchmark,
        "model": model_name(args.model),
        "lora": args.lora and model_name(args.lora),
        "dtype": dtype,
        "num_frames": args.num_frames,
        "height": args.height,
        "width": args.width,
        "version": version("rvedit_diffusers"),
    }
    if args.benchmark == "synthetic":
        is_levels = args.operations is None
        settings |= {
            "seed": args.seed,
            "split": "test" if is_levels or args.unseen_photos else "train",
            "drawn": f"levels {LEVELS_DRAWN}" if is_levels else f"edits {EDITS_DRAWN}",
            "kinds": sorted(args.kinds) if args.kinds else None,
        }
    return settings


def load_editor(args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
    """The editor, its autoencoder, and what scores depend on besides the arguments."""
    if args.model in GUARD_ROWS:
        name = args.vae or TINY_CHECKPOINT
        vae = AutoencoderKLWan.from_pretrained(name, subfolder="vae", torch_dtype=dtype).to(device)
        settings = {"vae": model_name(name), "weights": weights_hash({"vae": vae})}
        return CopySource() if args.model == "copy-source" else VaeCeiling(vae), vae, settings
    pipe = RVEDiTPipeline.from_pretrained(args.model, dtype=dtype)
    settings = {"configs": configs_hash(pipe)}
    if args.lora is not None:
        pipe.load_lora_weights(args.lora)
    pipe.set_progress_bar_config(disable=True)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    options = {
        "num_inference_steps": args.num_inference_steps or pipe.config.default_num_inference_steps,
        "guidance_scale": pipe.config.default_guidance_scale if args.guidance_scale is None else args.guidance_scale,
    }
    settings |= {"weights": weights_hash(modules), "keep_detail": pipe.config.default_keep_detail} | options
    place(pipe, device, args.offload)
    return PipelineEditor(pipe, **options, height=args.height, width=args.width), pipe.vae, settings


def run_synthetic(args, suites, editor, vae, record: ScoreRecord, state: PartialState) -> None:
    rounds = pending_rounds(suites, args.num_samples, args.batch_size, record.entries())
    state.wait_for_everyone()  # all share out the same rounds
    num_workers = args.num_workers
    if num_workers is None:
        fit = SCORING_MEMORY // (RENDERINGS * args.num_frames * args.height * args.width * 3)
        most = min(8, max(fit, 1) // state.num_processes, os.cpu_count() // state.num_processes)
        num_workers = most if state.device.type == "cuda" and args.device != "cpu" else 0
    pool = ProcessPoolExecutor(num_workers, get_context("spawn")) if num_workers else nullcontext()
    wanted = [(suite, index) for suite in suites for index in range(args.num_samples)]

    def show() -> None:
        entries = record.entries()
        done = [suite.id(index) for suite, index in wanted if is_scored(entries, suite, index)]
        if done:
            success = sum(entries[name]["scores"]["union_success"] for name in done) / len(done)
            bar.set_postfix_str(f"union success {success:.2f}", refresh=False)
        bar.update(len(done) - bar.n)

    initial = len(wanted) - sum(len(span) for _, span in rounds)
    with (
        pool as executor,
        tqdm(total=len(wanted), initial=initial, unit="item", disable=state.process_index > 0) as bar,
    ):
        for _ in score_rounds(editor, vae, rounds[state.process_index :: state.num_processes], record, executor):
            if state.is_main_process:
                show()


def report_synthetic(args, suites, record: ScoreRecord, settings: dict) -> None:
    entries = record.entries()
    groups = {suite.name: [entries[suite.id(index)] for index in range(args.num_samples)] for suite in suites}
    rows = summarize(groups)
    write_json(args.output / "results.json", {"settings": settings, "levels": rows})
    print(format_table(rows, SYNTHETIC_COLUMNS))
    for suite in suites:
        write_strips(args.output, suite, groups[suite.name])
    print(f"wrote {args.output / 'results.json'}, and a strip of clips for each line")


def check_instructions(edits: Sequence[PublicEdit], record: ScoreRecord) -> None:
    """Refuse results of other instructions, as of another copy of the benchmark.

    Raises:
        ValueError: There is one.
    """
    entries = record.entries()
    for edit in edits:
        made = entries.get(edit.result, {}).get("instruction", edit.instruction)
        if made != edit.instruction:
            raise ValueError(
                f"{edit.where}: {edit.result} was made with the instruction {made!r}, but it is {edit.instruction!r}:"
                " delete the folder, or name another --output"
            )


def run_public(args, edits: Sequence[PublicEdit], editor, record: ScoreRecord, state: PartialState) -> None:
    root, scored = args.output / "results", record.entries().keys()
    root.mkdir(exist_ok=True)
    pending = [edit for edit in edits if edit.result not in scored or not (root / edit.result).exists()]
    state.wait_for_everyone()  # all share out the same edits
    mine = pending[state.process_index :: state.num_processes]
    for edit in tqdm(mine, unit="edit", disable=state.process_index > 0):
        if not (root / edit.result).exists():
            source, fps = read_clip(edit.source, args.num_frames)
            try:
                (frames,) = editor([Task(edit.result, source, edit.instruction, fps=float(fps))])
            except ValueError as error:  # too long for the model, say
                raise ValueError(f"{edit.where}: {error}") from error
            write_result(root, edit, source, frames, fps)
        entry = {"id": edit.result, "category": edit.category, "instruction": edit.instruction}
        record.append([entry | {"scores": score_result(root, edit)}])


def report_public(args, edits: Sequence[PublicEdit], record: ScoreRecord, settings: dict) -> None:
    entries, groups = record.entries(), {}
    for edit in edits:
        groups.setdefault(edit.category, []).append(entries[edit.result]["scores"])
    groups["all"] = [scores for group in groups.values() for scores in group]
    rows = {name: figures_of(values_of(group), name) | {"n": len(group)} for name, group in groups.items()}
    everything = rows.pop("all")
    write_json(args.output / "results.json", {"settings": settings, "categories": rows, "all": everything})
    columns = {name: column for name, column in PUBLIC_COLUMNS.items() if name in everything}
    print(format_table(rows | {"all": everything}, columns))
    manifest = write_manifest(args.benchmark, args.output, edits)
    print(f"for the benchmark's own scorer: {args.output / 'results'}" + (f" and {manifest}" if manifest else ""))


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()

    # 1. All that can be wrong before a model is loaded
    is_public = args.benchmark != "synthetic"
    fill_in(args)
    check_arguments(parser, args)
    is_on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=is_on_cpu, timeout=timedelta(hours=12))
    try:
        device = state.device if args.device is None or state.num_processes > 1 else torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's answer to a device that this build or machine lacks
        parser.error(f"--device {args.device}: {error}")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    settings = settings_before_loading(args, dtype)
    try:
        if is_public:
            edits = read_benchmark(args.benchmark, args.data, args.limit)
            mine = edits[state.process_index :: state.num_processes]
            check_sources(tqdm(mine, desc="checking clips", unit="clip", disable=state.process_index > 0))
        else:
            suites = synthetic_suites(args)
        record = ScoreRecord(args.output, state.process_index)
        record.check(settings)
        if is_public:
            check_instructions(edits, record)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    # 2. The model, which may be another one under the same name
    try:
        editor, vae, found = load_editor(args, device, DTYPES[dtype])
        settings |= found
        record.begin(settings)
    except (OSError, RuntimeError, ValueError) as error:  # of the files, of the device's memory or of the settings
        parser.error(f"--model {args.model}: {error}")

    # 3. Edits and scores, then what they amount to
    try:
        if is_public:
            run_public(args, edits, editor, record, state)
        else:
            run_synthetic(args, suites, editor, vae, record, state)
    except torch.OutOfMemoryError as error:
        parser.error(f"an edit failed: {told_in_a_line(error)}{MEMORY_HINT}")
    except ValueError as error:
        if not is_public:
            raise
        parser.error(str(error))
    state.wait_for_everyone()
    if state.is_main_process:
        if is_public:
            report_public(args, edits, record, settings)
        else:
            report_synthetic(args, suites, record, settings)
    state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
