r"""Fine-tune an RVEDiT pipeline on pairs of clips: flow matching plus reference-anchored attention alignment.

    python examples/train.py --model MODEL --train_data PAIRS --buckets 81x480x832 --output runs/lora
    python examples/train.py --model CONVERTED --stage connect --train_data CAPTIONED --buckets 81x480x832 \
        --output runs/connect
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train.py ...
    python examples/train.py --plot runs/lora

What is frozen encodes every pair once, into a cache on disk, and leaves memory. `--resume_from_checkpoint latest` goes
on from the last checkpoint, or begins if there is none.
"""

import argparse
import gc
import hashlib
import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, send_to_device
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import snapshot_download
from tqdm import tqdm

from rvedit_diffusers import RVEDiTPipeline, RVEDiTProcessor, RVEDiTTokenDistiller, RVEDiTTransformer3DModel
from rvedit_diffusers.conversion import record_stage
from rvedit_diffusers.hub import open_repository, upload, write_card
from rvedit_diffusers.losses import edit_region_weight, flow_matching_loss, velocity_loss
from rvedit_diffusers.model_card import write_model_card
from rvedit_diffusers.synthetic import NEW_OPERATIONS, OPERATIONS, TRAIN_LEVELS, BenchmarkItems, SyntheticEdits
from rvedit_diffusers.synthetic.operations import GLOBAL, LOCAL
from rvedit_diffusers.training.adapters import (
    LORA_TARGETS,
    SOURCE_TARGET,
    add_lora,
    lora_targets,
    offload_frozen_weights,
    store_in_fp8,
)
from rvedit_diffusers.training.branches import (
    ALIGNMENT_LOSSES,
    CONTRASTIVE_LOSSES,
    NEGATIVES,
    REFERENCE_TOKENS,
    ConnectingBranches,
    EditingBranches,
    needs_next_sample,
)
from rvedit_diffusers.training.cache import CachedPairs, cached_null_text, fill_cache, fingerprint, text_length
from rvedit_diffusers.training.checkpoint import (
    averaged,
    checkpoints,
    differences,
    export,
    load_checkpoint,
    open_log,
    prune_checkpoints,
    read_log,
    read_state,
    save_checkpoint,
)
from rvedit_diffusers.training.data import (
    PRESETS,
    describe_plans,
    parse_buckets,
    plan_pairs,
    read_pairs,
)
from rvedit_diffusers.training.distillation import FewStepTeacher
from rvedit_diffusers.training.memory import describe_needs
from rvedit_diffusers.training.meter import LossMeter
from rvedit_diffusers.training.optimizers import block_matrices, build_optimizer
from rvedit_diffusers.training.options import default_precision, with_config
from rvedit_diffusers.training.pairs import BenchmarkPairs, EditPairs, FilePairs, SyntheticPairs
from rvedit_diffusers.training.plots import plot_losses
from rvedit_diffusers.training.record import ScanRecord
from rvedit_diffusers.training.sampler import BatchSampler, derive_seed
from rvedit_diffusers.training.samples import Draws, MLLMCollator, Samples, numbered_batches
from rvedit_diffusers.training.validation import FixedDraws, edit_held_out, gradient_norms, held_out_loss, log_edits


PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "rvedit_diffusers")
# Without effect where the distiller alone learns to take the text's place.
OF_STAGE_EDIT = (
    "training_type train_text_encoder lora_rank lora_alpha lora_dropout lora_targets layerwise_casting group_offload"
    " edit_weight drop_instruction drop_all align_weight align_blocks align_loss align_temperature"
    " align_reference_latents align_reference_tokens align_negatives align_ignore_radius align_every"
    " align_warmup_steps align_stop_step"
    " operations edits_per_scene levels kinds distill_steps distill_substeps distill_guidance_scale"
).split()
CARD_FILES = ("README.md", "*LICENSE*", "*NOTICE*")  # of a base: its licence goes along with what is made of it
SYNTHETIC_BUCKET = "17x64x64"
LR_SCHEDULERS = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]  # which needs rules
# What EditingBranches is told of it.
ALIGNMENT = (
    "align_blocks align_loss align_temperature align_reference_latents align_reference_tokens align_negatives"
    " align_ignore_radius".split()
)
# What may differ when a run goes on: where things are and how often they are shown, not what is computed. Of the data
# and the weights, the content counts; of the batch size, that of all processes, unless its samples meet each other.
FREE_TO_CHANGE = set(
    "config model output train_data validation_data data_root strict dry_run encode_only plot cache_dir"
    " encode_batch_size num_workers train_batch_size gradient_accumulation_steps gradient_checkpointing compile"
    " group_offload resume_from_checkpoint allow_config_change checkpointing_steps checkpoints_total_limit"
    " logging_steps validation_steps num_validation_edits report_to max_nonfinite push_to_hub hub_model_id"
    " hub_private_repo".split()
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        says_it = action.default is None or action.default is False or "default: " in action.help
        return action.help if says_it else super()._get_help_string(action)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", type=Path, help="JSON file with values for any of the options below")
    parser.add_argument("--model", help="folder or Hub id of the pipeline to train")
    parser.add_argument("--output", type=Path, help="folder for weights, checkpoints, log, curves and clips")
    parser.add_argument(
        "--stage",
        choices=("edit", "connect"),
        default="edit",
        help="edit: learn from pairs; connect: first of all after a base was converted, the distiller learns from"
        " captioned clips to take the text's place in the shallow blocks",
    )
    parser.add_argument("--plot", type=Path, metavar="RUN", help="only draw RUN/losses.png from what RUN has logged")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--train_data",
        default="synthetic",
        help="`synthetic`, a .csv, .jsonl or .json file, a folder with metadata.csv or metadata.jsonl, or a Hugging"
        " Face dataset",
    )
    group.add_argument("--data_root", type=Path, help="folder that relative paths start from; default: the table's")
    group.add_argument("--columns", choices=PRESETS, help="layout of the table; default: default, or captions")
    for name in ("source", "edited", "instruction"):
        group.add_argument(f"--{name}_column", help="name of this column; default: that of --columns")
    group.add_argument(
        "--buckets",
        help="frames x height x width, such as 81x480x832, several with commas: a pair goes to its best; default for"
        f" `synthetic`: {SYNTHETIC_BUCKET}",
    )
    group.add_argument("--fps", type=Fraction, help="frames per second of all clips; default: the lower of a pair's")
    group.add_argument("--strict", action="store_true", help="end if a pair has to be dropped")
    group.add_argument("--dry_run", action="store_true", help="end after the scan of all files, with an estimate")
    group.add_argument("--encode_only", action="store_true", help="end when all pairs are encoded")
    group.add_argument("--cache_dir", type=Path, help="folder for encoded pairs; default: OUTPUT/cache")
    group.add_argument("--encode_batch_size", type=int, default=1, help="pairs that are encoded together")
    group.add_argument("--num_workers", type=int, default=2, help="processes that read the cache")
    group.add_argument("--num_pairs", type=int, default=8192, help="pairs of `synthetic`")
    group.add_argument(
        "--data_seed", type=int, help="names the pairs of `synthetic` and those that are held out; default: --seed"
    )
    operations = (*OPERATIONS, *NEW_OPERATIONS)
    group.add_argument(
        "--levels",
        nargs="+",
        choices=TRAIN_LEVELS,
        help="of the benchmark, for `synthetic`: its items and their twins; one that is named twice comes twice as"
        " often; default: the single edits of --operations",
    )
    group.add_argument(
        "--kinds",
        nargs="+",
        choices=LOCAL + GLOBAL,
        help="operations of --levels; one that is named twice comes twice as often; default: all",
    )
    group.add_argument("--operations", nargs="+", choices=operations, default=OPERATIONS, help="of `synthetic`")
    group.add_argument("--edits_per_scene", type=int, default=4, help="pairs of `synthetic` that share a source clip")

    group = parser.add_argument_group("what learns, and how")
    group.add_argument(
        "--training_type", choices=("lora", "full"), default="lora", help="what of the transformer learns"
    )
    group.add_argument("--lora_rank", type=int, default=32, help="of the LoRA layers")
    group.add_argument("--lora_alpha", type=float, help="their scale times the rank; default: the rank")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="share of their inputs that is left out")
    group.add_argument(
        "--lora_targets",
        nargs="+",
        help=f"names of layers; default: {' '.join(LORA_TARGETS)}, and {SOURCE_TARGET} of a converted model, where it"
        " is zero",
    )
    group.add_argument(
        "--train_distiller",
        nargs="?",
        choices=("all", "connectors", "none"),
        const="all",
        help="`all`: queries and connectors, the MLLM runs in every step; `connectors`: its states are cached;"
        " default: all in full training and to connect, none with LoRA",
    )
    group.add_argument("--train_text_encoder", action="store_true", help="the text encoder learns, too")
    group.add_argument("--max_train_steps", type=int, default=1000, help="steps of the optimizer")
    group.add_argument("--train_batch_size", type=int, default=1, help="pairs a process and micro-batch")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches a step")
    group.add_argument(
        "--optimizer", default="adamw", help="adamw, adamw8bit, muon (for matrices of blocks), or one of torch.optim"
    )
    group.add_argument("--optimizer_args", type=json.loads, default={}, help="further arguments of it, as JSON")
    group.add_argument("--learning_rate", type=float, help="default: 1e-4; 1e-5 in full training")
    group.add_argument("--weight_decay", type=float, default=0.01, help="decoupled, as in AdamW")
    group.add_argument(
        "--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup", help="of the learning rate"
    )
    group.add_argument("--lr_warmup_steps", type=int, default=100, help="steps in which the learning rate rises")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="0 does not clip")
    group.add_argument("--max_nonfinite", type=int, default=10, help="skipped steps in a row after which to end")
    group.add_argument("--ema_decay", type=float, default=0.0, help="of the weights' moving average; 0: none is kept")
    group.add_argument(
        "--mixed_precision", choices=("no", "bf16"), help="default: bf16, but no on CPUs that do not compute in it"
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--layerwise_casting", action="store_true", help="LoRA: the frozen weights rest in fp8")
    group.add_argument("--group_offload", action="store_true", help="LoRA: the frozen weights rest in host memory")
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks; on a CPU torch 2.14 gives no finite gradient where clips have as many"
        " tokens as the transformer is wide",
    )
    group.add_argument("--seed", type=int, default=0, help="of new weights, noise, order and dropout")

    group = parser.add_argument_group("losses", "Of these, `--stage connect` has the noise levels and --align_tokens.")
    group.add_argument("--sigma_shift", type=float, default=3.0, help="shift of noise levels: 3 at 480p, 5 at 720p")
    group.add_argument("--edit_weight", type=float, default=0.0, help="extra weight of latent cells that change")
    group.add_argument("--drop_instruction", type=float, default=0.1, help="share trained without instruction")
    group.add_argument("--drop_all", type=float, default=0.1, help="share trained without instruction and source")
    group.add_argument("--align_weight", type=float, default=0.05, help="0 trains without the reference branch")
    group.add_argument(
        "--align_blocks", type=int, nargs="+", help="aligned blocks; default: the last shallow and the first deep one"
    )
    group.add_argument("--align_tokens", type=int, default=2048, help="token positions that are compared in a clip")
    group.add_argument("--align_loss", choices=ALIGNMENT_LOSSES, default="infonce", help="see losses.py")
    group.add_argument("--align_temperature", type=float, default=0.07, help="of infonce and contrast")
    group.add_argument(
        "--align_reference_latents", choices=("source", "reference"), default="source", help="of the reference branch"
    )
    group.add_argument(
        "--align_reference_tokens",
        choices=REFERENCE_TOKENS,
        default="own",
        help="own: of the same sample; shuffled, a control: the reference branch reads those of the next sample of the"
        " micro-batch",
    )
    group.add_argument(
        "--align_negatives",
        choices=NEGATIVES,
        default="next",
        help="whose reference tokens contrast tells the own from: the next sample's of the micro-batch, or, with"
        " --levels, the twin's, which differs in one word",
    )
    group.add_argument(
        "--align_ignore_radius",
        type=int,
        default=0,
        help="tokens at most so many patches away are no negatives of infonce",
    )
    group.add_argument("--align_every", type=int, default=1, help="align in every so many steps")
    group.add_argument("--align_warmup_steps", type=int, default=500, help="the weight rises over these steps")
    group.add_argument("--align_stop_step", type=int, help="align in the steps before this one alone")

    group = parser.add_argument_group(
        "distillation", "LoRA: learn from the model without it, in place of the edited clips, to edit in a few steps."
    )
    group.add_argument(
        "--distill_steps", type=int, help="that the LoRA takes, without guidance; default: none is made"
    )
    group.add_argument("--distill_substeps", type=int, default=4, help="guided steps of the model for each of them")
    group.add_argument("--distill_guidance_scale", type=float, help="of the model; default: its own")

    group = parser.add_argument_group("checkpoints, validation and log")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="steps between two of them")
    group.add_argument("--checkpoints_total_limit", type=int, help="older ones are removed; default: all are kept")
    group.add_argument("--resume_from_checkpoint", metavar="CHECKPOINT", help="folder, or `latest`")
    group.add_argument("--allow_config_change", action="store_true", help="go on though settings or data differ")
    group.add_argument(
        "--validation_data", help="pairs to validate on, like --train_data; of a dataset on the Hub its `validation`"
    )
    group.add_argument(
        "--num_validation_pairs",
        type=int,
        help="held out of --train_data, all edits of a clip or none; default: a tenth, at most 16",
    )
    group.add_argument("--validation_steps", type=int, default=500, help="steps between two validations; 0: none")
    group.add_argument("--num_validation_edits", type=int, default=4, help="clips that are edited at each validation")
    group.add_argument("--logging_steps", type=int, default=20, help="steps between two lines of the log")
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, trackio, ... or none")
    group.add_argument("--push_to_hub", action="store_true", help="upload the result")
    group.add_argument("--hub_model_id", help="name of the repository; needs --push_to_hub")
    group.add_argument("--hub_private_repo", action="store_true", help="make a new repository a private one")

    args = parser.parse_args(with_config(parser, sys.argv[1:] if argv is None else argv))
    if args.plot is not None:
        return args
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work, and fill in what follows from other options."""
    for name in ("model", "output"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is required")
    least = dict.fromkeys(("num_pairs", "edits_per_scene", "max_train_steps", "train_batch_size", "lora_rank"), 1)
    least |= dict.fromkeys(("gradient_accumulation_steps", "encode_batch_size", "align_tokens", "align_every"), 1)
    least |= dict.fromkeys(("checkpointing_steps", "logging_steps", "max_nonfinite", "checkpoints_total_limit"), 1)
    least |= dict.fromkeys(("validation_steps", "num_validation_pairs", "num_validation_edits", "num_workers"), 0)
    least |= dict.fromkeys(("distill_steps", "distill_substeps"), 1)
    least |= dict.fromkeys(("lr_warmup_steps", "max_grad_norm", "weight_decay", "edit_weight", "align_weight"), 0)
    least |= dict.fromkeys(["align_ignore_radius"], 0)
    for name, bound in least.items():
        if getattr(args, name) is not None and not getattr(args, name) >= bound:
            parser.error(f"--{name} has to be at least {bound}, but is {getattr(args, name)}")
    for name in ("fps", "learning_rate", "sigma_shift", "align_temperature", "lora_alpha"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} has to be above 0, but is {getattr(args, name)}")
    for name in ("ema_decay", "lora_dropout", "drop_instruction", "drop_all"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} has to be in [0, 1], but is {getattr(args, name)}")
    if args.drop_instruction + args.drop_all > 1:
        parser.error("--drop_instruction and --drop_all have to be at most 1 together")
    if not isinstance(args.optimizer_args, dict):
        parser.error(f"--optimizer_args has to be a JSON object, but is {args.optimizer_args}")
    if not (Path(args.model) / "model_index.json").is_file():
        if Path(args.model).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", args.model):
            parser.error(f"--model has to be a pipeline, but {args.model} is no folder with a model_index.json")
    if args.levels is not None:
        for name in ("operations", "edits_per_scene"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--levels and --{name} are two ways to say what `synthetic` shows: give one")
        if args.train_data != "synthetic":
            parser.error(f"--levels is for --train_data synthetic, but that is {args.train_data}")
    is_shown = "synthetic" in (args.train_data, args.validation_data)
    for name, is_used in (
        ("num_pairs", args.train_data == "synthetic"),
        ("operations", is_shown),
        ("edits_per_scene", is_shown),
    ):
        if not is_used and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --train_data synthetic, but that is {args.train_data}")
    if {args.train_data, args.validation_data} <= {"synthetic", None}:
        for name in ("data_root", "columns", "source_column", "edited_column", "instruction_column", "strict"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} is for tables of pairs, but --train_data is {args.train_data}")
    if args.kinds is not None:
        if args.levels is None:
            parser.error("--kinds is for --levels; single edits have --operations")
        try:
            BenchmarkItems(args.levels, 0, split="train", kinds=args.kinds)
        except ValueError as error:
            parser.error(f"--kinds: {error}")
    if args.buckets is None and args.train_data != "synthetic":
        parser.error("--buckets is required for --train_data of one's own: the size to train at, such as 81x480x832")
    try:
        args.buckets = parse_buckets(args.buckets or SYNTHETIC_BUCKET)
    except ValueError as error:
        parser.error(str(error))
    if args.train_data == args.validation_data == "synthetic":
        parser.error("--validation_data synthetic would be what is trained on: without it pairs are held out")
    if "synthetic" in (args.train_data, args.validation_data) and len(args.buckets) > 1:
        parser.error(f"--buckets has to be one for synthetic data, but has {len(args.buckets)}")
    if args.distill_steps is not None and args.stage == "edit":
        check_distillation(parser, args)
    elif args.distill_steps is None:
        for name in ("distill_substeps", "distill_guidance_scale"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} needs --distill_steps")
    check_alignment(parser, args)
    if args.training_type == "full" and (args.layerwise_casting or args.group_offload):
        parser.error("--layerwise_casting and --group_offload are for frozen weights: --training_type lora has them")
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets") if args.training_type == "full" else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --training_type lora, but that is full")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps not in (0, parser.get_default("lr_warmup_steps")):
        parser.error("--lr_warmup_steps is for schedulers with a warmup: --lr_scheduler constant_with_warmup is one")
    if args.validation_data not in (None, "synthetic") and args.num_validation_pairs is not None:
        parser.error(
            "--num_validation_pairs is of pairs that are held out or synthetic; of --validation_data all count"
        )
    for name in ("layerwise_casting", "group_offload"):
        if getattr(args, name) and not args.gradient_checkpointing:
            parser.error(f"--{name} needs --gradient_checkpointing: else every weight is kept for the backward pass")
    try:  # a parameter as small as can be tells whether there is such an optimizer
        weight = torch.nn.Parameter(torch.zeros(1, 1))
        build_optimizer(args.optimizer, [weight], [weight], args.learning_rate or 1.0, 0.0, **args.optimizer_args)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    if args.report_to != "none" and args.report_to not in (known := [t.value for t in get_available_trackers()]):
        parser.error(f"--report_to has to be none or what is installed of trackers, {known}, but is {args.report_to}")
    if args.push_to_hub != (args.hub_model_id is not None):
        parser.error("--push_to_hub and --hub_model_id need each other")

    is_edit = args.stage == "edit"
    args.columns = args.columns or ("default" if is_edit else "captions")
    if not is_edit:
        args.edited_column = args.edited_column or args.source_column  # one clip a row
    for name, column in zip(("source", "edited", "instruction"), PRESETS[args.columns], strict=True):
        if getattr(args, f"{name}_column") is None:
            setattr(args, f"{name}_column", column)
    if not is_edit:
        unused = [name for name in OF_STAGE_EDIT if getattr(args, name) != parser.get_default(name)]
        if unused or args.train_distiller == "none" or args.columns != "captions":
            parser.error(
                "--stage connect trains the distiller, all of it or its connectors, on captioned clips, and nothing"
                " else: "
                + ", ".join(f"--{name}" for name in unused or ["train_distiller none", f"columns {args.columns}"])
                + " is for --stage edit"
            )
        args.training_type, args.drop_instruction, args.drop_all = "none", 0.0, 0.0
    is_lora = args.training_type == "lora"
    args.train_distiller = args.train_distiller or ("none" if is_lora else "all")
    args.learning_rate = args.learning_rate or (1e-5 if args.training_type == "full" else 1e-4)
    args.lora_alpha = args.lora_alpha or args.lora_rank
    args.cache_dir = args.cache_dir or args.output / "cache"
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    args.mixed_precision = args.mixed_precision or default_precision()
    if args.resume_from_checkpoint is None:
        if checkpoints(args.output):
            parser.error(
                f"--output {args.output} holds {checkpoints(args.output)[-1].name} of an earlier run:"
                " --resume_from_checkpoint latest goes on with it, another --output begins anew"
            )
    elif args.resume_from_checkpoint == "latest":
        args.resume_from_checkpoint = next(iter(checkpoints(args.output)[::-1]), None)
    else:
        try:
            step = read_state(args.resume_from_checkpoint)["step"]
        except FileNotFoundError as error:
            parser.error(f"--resume_from_checkpoint: {error}")
        if later := [path for path in checkpoints(args.output) if read_state(path)["step"] > step]:
            parser.error(
                f"--output {args.output} holds {later[-1].name}, which is later than --resume_from_checkpoint"
                f" {args.resume_from_checkpoint}: delete it, or name another --output"
            )


def check_alignment(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse alignments that have nothing to read."""
    if args.align_loss == "contrast" and args.align_reference_tokens != "own":
        parser.error("--align_loss contrast tells the own tokens from others: it needs --align_reference_tokens own")
    if args.align_weight > 0 and args.train_batch_size < 2 and aligns_with_next(args):
        parser.error(
            f"--train_batch_size has to be at least 2, but is {args.train_batch_size}: --align_reference_tokens"
            " shuffled and --align_loss contrast read the tokens of the micro-batch's next sample"
        )
    if args.align_ignore_radius and args.align_loss != "infonce":
        parser.error(f"--align_ignore_radius is for --align_loss infonce, but that is {args.align_loss}")
    if args.align_negatives == "twin":
        if args.align_loss != "contrast":
            parser.error(f"--align_negatives twin is for --align_loss contrast, but that is {args.align_loss}")
        if args.levels is None or args.validation_data is not None:
            parser.error("--align_negatives twin is for --levels without --validation_data: other pairs have no twins")
        if args.train_distiller == "all" or (args.train_distiller is None and args.training_type == "full"):
            parser.error(
                "--align_negatives twin reads tokens or states from the cache: it needs --train_distiller connectors"
                " or none"
            )


def check_distillation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what has no place beside a teacher, and leave out what the edited clips are for."""
    if args.training_type != "lora" or args.train_distiller not in (None, "none") or args.train_text_encoder:
        parser.error("--distill_steps is for a LoRA alone: the model without it is the teacher")
    for name in ("drop_instruction", "drop_all", "align_weight"):
        if getattr(args, name) not in (0, parser.get_default(name)):
            parser.error(f"--distill_steps and --{name} do not go together: the teacher sees all, and is not aligned")
        setattr(args, name, 0.0)


def check_teacher(pipe: RVEDiTPipeline) -> None:
    """Refuse a pipeline of which a teacher would be another editor than it is."""
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        name = type(pipe.scheduler).__name__
        raise ValueError(
            f"--distill_steps learns the steps of a FlowMatchEulerDiscreteScheduler, but the pipeline has a {name}:"
            " save it with one of the same shift"
        )
    scale = pipe.config.default_source_guidance_scale
    if scale != 1:
        raise ValueError(
            "--distill_steps has a teacher without guidance by the source, but the pipeline has the"
            f" default_source_guidance_scale {scale:g}: save it with 1.0"
        )


def aligns_with_next(args: argparse.Namespace) -> bool:
    return needs_next_sample(args.align_loss, args.align_reference_tokens, args.align_negatives)


def columns_of(args: argparse.Namespace) -> tuple[str, str, str]:
    return args.source_column, args.edited_column, args.instruction_column


def check_table(args: argparse.Namespace, option: str) -> None:
    read_pairs(getattr(args, option), *columns_of(args), data_root=args.data_root, option=option)


def load_pairs(
    args: argparse.Namespace, option: str, processor: RVEDiTProcessor, pixels: tuple[int, int]
) -> EditPairs:
    """The pairs that `--train_data` or `--validation_data` names; prints what was kept, trimmed and dropped."""
    fps = processor.default_fps
    data = getattr(args, option)
    for bucket in args.buckets:
        bucket.check(*pixels)
    if data == "synthetic":
        bucket = args.buckets[0]
        size = {"num_frames": bucket.num_frames, "height": bucket.height, "width": bucket.width}
        count = args.num_pairs
        if option == "validation_data":
            count = 16 if args.num_validation_pairs is None else args.num_validation_pairs
        if args.levels is not None:
            items = BenchmarkItems(args.levels, args.data_seed + 20, split="train", kinds=args.kinds, **size)
            return BenchmarkPairs(items, count, float(args.fps or fps))
        edits = SyntheticEdits(
            args.data_seed + 20, **size, operations=args.operations, edits_per_scene=args.edits_per_scene
        )
        return SyntheticPairs(edits, count, float(args.fps or fps), captioned=args.stage == "connect")
    pairs = read_pairs(data, *columns_of(args), data_root=args.data_root, option=option)
    record = args.cache_dir / "files.jsonl"
    plans, dropped = plan_pairs(
        pairs, args.buckets, args.fps, record=record, find_control_token=processor.find_control_token
    )
    print(describe_plans(plans, dropped))
    if not plans:
        raise ValueError(f"--{option} {data} has no pair that can be used")
    if dropped and args.strict:
        raise ValueError(f"--strict, but {len(dropped)} of {len(pairs)} pairs were dropped")
    return FilePairs(plans, record)


def split_pairs(
    args: argparse.Namespace, pairs: EditPairs, processor: RVEDiTProcessor, pixels: tuple[int, int]
) -> list[EditPairs]:
    """Pairs to train on and pairs to validate on, of which there may be none."""
    if args.validation_data is not None:
        held_out = load_pairs(args, "validation_data", processor, pixels)
        trained_on = {pairs.key(index) for index in range(len(pairs))}
        if common := sum(held_out.key(index) in trained_on for index in range(len(held_out))):
            raise ValueError(
                f"--validation_data has to hold other pairs than --train_data, but {common} of its {len(held_out)}"
                " are among them"
            )
        return [pairs, held_out]
    count = min(len(pairs) // 10, 16) if args.num_validation_pairs is None else args.num_validation_pairs
    kept, held_out = pairs.hold_out(count, args.data_seed)
    if args.num_validation_pairs and not len(held_out):
        raise ValueError(
            f"--num_validation_pairs {count} holds out clips with all of their edits, but each clip of the"
            f" {len(pairs)} pairs has more: --validation_data takes pairs of other clips"
        )
    print(f"{len(kept)} pairs to train on, {len(held_out)} to validate on")
    return [kept, held_out]


def describe_run(args: argparse.Namespace, batch_size: int, model_key: str, base: Path, pairs: EditPairs) -> dict:
    """Everything that the weights at the end of a run depend on, as a checkpoint records it."""
    record = ScanRecord(args.cache_dir / "files.jsonl")
    files = [record.sha256(path) for path in sorted((base / "transformer").glob("*.safetensors"))]
    keys = [pairs.key(index) for index in range(len(pairs))]
    free = FREE_TO_CHANGE - {"train_batch_size"} if aligns_with_next(args) else FREE_TO_CHANGE
    config = {name: value for name, value in vars(args).items() if name not in free} | {
        "buckets": [str(bucket) for bucket in args.buckets],
        "batch size of all processes": batch_size,
        "encoders (hash)": model_key,
        "transformer (hash)": hashlib.sha256("".join(files).encode()).hexdigest(),
        "pairs": len(pairs),
        "pairs (hash)": hashlib.sha256("".join(keys).encode()).hexdigest(),
    }
    return json.loads(json.dumps(config, default=str))


def make_repository(args: argparse.Namespace) -> None:
    is_lora = args.training_type == "lora" and args.train_distiller == "none" and not args.train_text_encoder
    if is_lora and Path(args.model).is_dir():
        print(f"note: the LoRA needs {args.model}, which is not uploaded with it: examples/push_to_hub.py does that")
    try:
        open_repository(args.hub_model_id, "lora" if is_lora else "pipeline", args.hub_private_repo or None)
    except (OSError, ValueError) as error:
        raise ValueError(f"--hub_model_id {args.hub_model_id}: {error}") from error


def publish(
    args: argparse.Namespace, base: Path, results: list[Path], facts: dict[str, str], losses: dict[str, float]
) -> None:
    """Write the model cards, and upload if asked for: a pipeline as the repository, a LoRA beside it in a folder."""
    strips = sorted(args.output.glob("validation/*/*.png"))
    for result in sorted(results, key=lambda result: result.name == "lora"):  # a repository is that of its pipeline
        sample = strips[-1] if strips else None
        place = result.name if len(results) > 1 and result.name == "lora" else None
        beside = "lora" if len(results) > 1 else None
        write_model_card(result, result.name, args.model, args.hub_model_id, facts, losses, sample, base, beside)
        if args.push_to_hub:
            try:
                kind = None if place else result.name
                repository = open_repository(args.hub_model_id, kind, args.hub_private_repo or None)
                write_card(result, card=None if place else repository.card)
                upload(result, repository, place)
            except (OSError, ValueError) as error:
                fail(f"{result} is complete, but could not be uploaded to {args.hub_model_id}: {error}")


def unsupported(args: argparse.Namespace, accelerator: Accelerator) -> str | None:
    """Why these options do not go together with several processes, or `None`."""
    if args.group_offload and accelerator.num_processes > 1:
        return "--group_offload is for one process: several share out the weights with FSDP2"
    if accelerator.distributed_type == DistributedType.FSDP:
        if args.layerwise_casting or args.optimizer in ("muon", "adamw8bit"):
            return "--layerwise_casting and --optimizer muon or adamw8bit need whole weights, which FSDP2 shares out"
    if is_deepspeed(accelerator) and (args.layerwise_casting or args.distill_steps is not None):
        return (
            "--layerwise_casting and --distill_steps run the model outside of DeepSpeed, which casts inside: use DDP"
        )
    if is_deepspeed(accelerator) and args.optimizer == "muon":
        return "--optimizer muon needs matrices, which DeepSpeed flattens"
    if accelerator.distributed_type == DistributedType.FSDP and args.distill_steps is not None:
        return "--distill_steps needs the model without its LoRA, which FSDP2 shares out with it: use DDP"
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        return "FSDP has to be of version 2: see examples/accelerate/fsdp2.yaml"
    if is_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage not in (1, 2):
        return "DeepSpeed has to be of ZeRO stage 1 or 2: DDP shares out nothing, and FSDP2 weights, too"
    return None


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def fail(message: str, status: int = 1) -> None:
    print(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.plot is not None:
        try:
            plot_losses(args.plot / "log.jsonl", args.plot / "losses.png")
        except (OSError, ValueError) as error:
            fail(f"--plot {args.plot}: {error}", 2)
        return
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # several processes on CPUs are only found when told
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output,
        kwargs_handlers=[
            # the alignment heads rest in steps without the reference branch; no second copy of the gradients
            DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
            # all wait while the main process scans the files
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),
        ],
    )
    if problem := unsupported(args, accelerator):
        fail(problem, 2)
    steps = accelerator.gradient_accumulation_steps
    if is_deepspeed(accelerator):
        steps = accelerator.state.deepspeed_plugin.get_value("gradient_accumulation_steps")
    if steps not in (args.gradient_accumulation_steps, "auto"):
        fail(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, but accelerate's config file or the"
            f" variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS says {steps}: give both the same, or the option alone",
            2,
        )
    if is_deepspeed(accelerator):
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": args.train_batch_size,
            "gradient_clipping": args.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": False},  # what learns stays in float32, as everywhere
            "torch_autocast": {"enabled": args.mixed_precision == "bf16", "dtype": "bfloat16"},
        }
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if is_fsdp:
        # else every process accumulates the gradients of all parameters
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        if args.mixed_precision == "bf16":
            # autocast casts what is to be: no noise level, no loss, no gradient of what learns
            plugin = accelerator.state.fsdp_plugin
            casts = {"cast_forward_inputs": False, "output_dtype": None, "reduce_dtype": torch.float32}
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **casts)
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    main_process = accelerator.is_main_process
    torch.manual_seed(args.seed)  # of what begins at random

    def of_main_process(function, *arguments):
        """What `function` returns on the main process, on all of them; its failure ends all."""
        result, problem = None, None
        if main_process:
            try:
                result = function(*arguments)
            except (ImportError, OSError, ValueError) as error:
                problem = str(error)
        if num_processes > 1:
            result, problem = broadcast_object_list([result, problem])
        if problem is not None:
            fail(problem, 2) if main_process else sys.exit(2)
        return result

    # 1. Pairs, encoded once by the frozen parts
    for option in ("train_data", "validation_data"):
        if getattr(args, option) not in (None, "synthetic"):
            of_main_process(check_table, args, option)  # before any model is downloaded or read
    is_edit, is_lora, is_live = args.stage == "edit", args.training_type == "lora", args.train_distiller == "all"
    half = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    text_dtype = torch.float32 if args.train_text_encoder else half
    dtypes = {"default": torch.float32, "mllm": half, "text_encoder": text_dtype}
    try:
        if Path(args.model).is_dir():
            base = Path(args.model)
        else:
            base = Path(RVEDiTPipeline.download(args.model))
            snapshot_download(args.model, revision=base.name, allow_patterns=CARD_FILES)
        transformer_config = RVEDiTTransformer3DModel.load_config(base, subfolder="transformer")
        with torch.device("meta"):  # what cannot be built is found out before anything is loaded or encoded
            skeleton = RVEDiTTransformer3DModel.from_config(transformer_config)
            transformer_config = skeleton.config  # with the defaults
            if args.training_type != "full":
                for parameter in skeleton.parameters():
                    parameter.data = parameter.data.to(half)
            if is_lora:
                args.lora_targets = lora_targets(base / "transformer", args.lora_targets)
                add_lora(skeleton, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
            if is_edit:
                alignment = {name: getattr(args, name) for name in ALIGNMENT}
                skeleton = EditingBranches(skeleton, **alignment)
            else:
                config = RVEDiTTokenDistiller.load_config(base, subfolder="distiller")
                skeleton = ConnectingBranches(skeleton, RVEDiTTokenDistiller.from_config(config))
        pipe = RVEDiTPipeline.from_pretrained(base, transformer=None, torch_dtype=dtypes)
        channels = pipe.vae.config.z_dim
        for name in ("in_channels", *["source_channels"] * is_edit):
            if transformer_config[name] != channels:
                raise ValueError(
                    f"`transformer` has to have the {name} {channels}, as many as the latents of clips, but has"
                    f" {transformer_config[name]}"
                )
        if args.distill_steps is not None:
            check_teacher(pipe)
    except Exception as error:  # files, the network and the Hub's client fail in many ways
        fail(f"--model {args.model}: {error}", 2)
    pipe.set_progress_bar_config(disable=True)
    patch_size = transformer_config["patch_size"]
    pixels = (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial * patch_size[1])
    pairs = of_main_process(load_pairs, args, "train_data", pipe.processor, pixels)
    pairs, held_out = of_main_process(split_pairs, args, pairs, pipe.processor, pixels)
    tokens = {"all": "none", "connectors": "states", "none": "tokens"}[args.train_distiller]
    text = "ids" if args.train_text_encoder else "embeds"
    draws = Draws(
        args.seed, args.sigma_shift, args.drop_instruction, args.drop_all, args.align_tokens, math.prod(patch_size)
    )
    if args.dry_run:
        if main_process:
            print(describe_needs(args, base, pipe, skeleton, pairs, draws, tokens, text))
        return
    if args.push_to_hub:
        of_main_process(make_repository, args)
    args.output.mkdir(parents=True, exist_ok=True)
    model_key = of_main_process(fingerprint, pipe, tokens, text)
    global_batch_size = args.train_batch_size * num_processes * args.gradient_accumulation_steps
    run = of_main_process(describe_run, args, global_batch_size, model_key, base, pairs)
    if args.resume_from_checkpoint is not None:
        before = read_state(args.resume_from_checkpoint)["config"]
        changed = differences(before, run)
        if before["optimizer"] != args.optimizer:
            fail(
                f"--optimizer has to be {before['optimizer']}, whose state {args.resume_from_checkpoint} holds, but is"
                f" {args.optimizer}",
                2,
            )
        if changed and not args.allow_config_change:
            what = "\n  ".join(changed)
            fail(f"{args.resume_from_checkpoint} is of another run (--allow_config_change goes on):\n  {what}", 2)
    cached = []
    with accelerator.autocast():
        for part in (pairs, held_out):
            turn = {"rank": rank, "num_processes": num_processes, "model_key": model_key, "device": device}
            paths = fill_cache(pipe, part, args.cache_dir, tokens, text, args.encode_batch_size, **turn)
            cached.append(CachedPairs(paths, text_length(pipe)))
        accelerator.wait_for_everyone()
        with accelerator.main_process_first():
            null_text = cached_null_text(pipe, args.cache_dir, text, model_key, device)
    if args.encode_only:
        return
    pipe.remove_all_hooks()
    trained = ["distiller"] * (args.train_distiller != "none") + ["text_encoder"] * args.train_text_encoder
    for name in {"vae", "mllm", "distiller", "text_encoder"}.difference(trained, ["mllm"] * is_live):
        setattr(pipe, name, None)
    gc.collect()
    torch.cuda.empty_cache()

    # 2. What learns
    if device.type == "cpu" and max(b.num_tokens(*pixels) for b in args.buckets) <= 1024:
        # the backward pass of the CPU's fused attention costs twice that of plain matrix products; compiled code
        # goes by these switches, not by the attention backend
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    pipe.transformer = RVEDiTTransformer3DModel.from_pretrained(
        base, subfolder="transformer", torch_dtype=torch.float32 if args.training_type == "full" else half
    )
    if is_lora:
        add_lora(pipe.transformer, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    if args.layerwise_casting:
        store_in_fp8(pipe.transformer)
    if args.group_offload:
        offload_frozen_weights(pipe.transformer, device)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if is_live:
        pipe.mllm.to(device).requires_grad_(False)  # no part of the branches
        if args.gradient_checkpointing:
            pipe.mllm.train()
            pipe.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    if is_edit:
        branches = EditingBranches(
            pipe.transformer,
            pipe.distiller,
            pipe.text_encoder,
            pipe.mllm,
            **alignment,
        )
    else:
        branches = ConnectingBranches(pipe.transformer, pipe.distiller, pipe.mllm)
    for part in branches.children():
        # FSDP2 moves each process's share, which may be all that fits
        if not is_fsdp and not (args.group_offload and part is pipe.transformer):
            part.to(device)
    if args.train_distiller == "connectors":
        pipe.distiller.queries.requires_grad_(False)
    branches.train()
    if args.compile:
        # blocks of two kinds, with and without gradients, for each bucket and for validation
        torch._dynamo.config.recompile_limit = 64
        pipe.transformer.compile_repeated_blocks()
    modules = {name: getattr(pipe, name) for name in ["transformer"] * is_edit + trained}

    parameters = [p for p in branches.parameters() if p.requires_grad]
    inner = [pipe.transformer.blocks] * is_edit + [getattr(pipe, name) for name in trained]
    optimizer = build_optimizer(
        args.optimizer,
        parameters,
        block_matrices(*inner),
        args.learning_rate,
        args.weight_decay,
        **args.optimizer_args,
    )
    del parameters  # FSDP2 frees those that nothing else holds
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer = accelerator.prepare(
        branches, optimizer, device_placement=[False, True] if args.group_offload else None
    )
    parameters = [p for p in branches.parameters() if p.requires_grad]  # FSDP2 puts its own in their place
    averages = [p for name, module in modules.items() for p in module.parameters() if p.requires_grad]
    ema = EMAModel(averages, args.ema_decay) if args.ema_decay else None
    engine = model if is_deepspeed(accelerator) else None
    if engine is not None:
        engine.optimizer.check_grad_overflow = True  # or it steps with any gradient, and gives -1 as 1 for its norm
    step, spent, nonfinite, nonfinite_in_a_row = 0, 0.0, 0, 0
    if args.resume_from_checkpoint is not None:
        learned = (modules, branches.heads, optimizer, ema, averages, engine)
        try:
            state = load_checkpoint(args.resume_from_checkpoint, *learned)
        except ValueError as error:
            fail(f"{args.resume_from_checkpoint} cannot be gone on from: {error}", 2)
        rates = scheduler.base_lrs  # of this run: a checkpoint's go with the settings that it was begun with
        scheduler.load_state_dict(state["lr_scheduler"])
        scheduler.base_lrs = rates
        scheduler._last_lr = [
            rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        step, spent, nonfinite = state["step"], state["seconds"], state["nonfinite"]
    started = time.monotonic() - spent
    teacher = None
    if args.distill_steps is not None:
        scale = pipe.config.default_guidance_scale
        scale = scale if args.distill_guidance_scale is None else args.distill_guidance_scale
        teacher = FewStepTeacher(
            pipe.transformer,
            pipe.scheduler,
            args.distill_steps,
            args.distill_substeps,
            scale,
            null_text["prompt_embeds"].to(device),
        )
        pipe.register_to_config(  # of the clips that are edited for validation
            default_num_inference_steps=args.distill_steps,
            default_guidance_scale=1.0,
            default_source_guidance_scale=1.0,
        )

    # 3. Batches
    collate = MLLMCollator(pipe.processor) if is_live else torch.utils.data.default_collate
    live_pairs = (pairs, held_out) if is_live else (None, None)
    twins = [part.twin if args.align_negatives == "twin" else None for part in (pairs, held_out)]
    samples = Samples(cached[0], draws, null_text, live_pairs[0], twins[0])
    fixed = [Samples(cached[1], FixedDraws(p), null_text, live_pairs[1], twins[1]) for p in (None, draws)]
    buckets = [str(pairs.bucket(index)) for index in range(len(pairs))]
    for bucket, count in Counter(buckets).items():
        if main_process and count < global_batch_size:
            print(
                f"note: bucket {bucket} has {count} pairs, which are repeated to fill a batch of {global_batch_size}"
            )
    sampler = BatchSampler(buckets, global_batch_size, args.seed)
    batches = torch.utils.data.DataLoader(
        samples,
        batch_sampler=numbered_batches(sampler, step, rank, num_processes, args.gradient_accumulation_steps),
        num_workers=args.num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )

    def validate() -> dict[str, float]:
        """Losses of held-out pairs and edits of them, or of training pairs if there are none, to the trackers."""
        metrics = {}
        with averaged(ema, averages):
            if len(held_out) and teacher is None:
                metrics = held_out_loss(accelerator, model, fixed[0], collate, args.train_batch_size)
                # DeepSpeed makes a step of every backward pass
                if args.align_weight > 0 and is_edit and engine is None:
                    num_pairs = 2 if aligns_with_next(args) else 1
                    metrics |= gradient_norms(accelerator, model, averages, fixed[1], collate, num_pairs)
            if args.num_validation_edits:
                pipe.vae = AutoencoderKLWan.from_pretrained(base, subfolder="vae", torch_dtype=half).to(device)
                pipe.vae.enable_tiling()  # the memory is the training's
                shown = (held_out, cached[1]) if len(held_out) else (pairs, cached[0])
                folder = args.output / "validation" / f"step-{step:06d}"
                wanted = (null_text, args.num_validation_edits, folder)
                strips = edit_held_out(accelerator, model, pipe, *shown, *wanted, reuse_context=not args.group_offload)
                log_edits(accelerator, strips, step)
                pipe.vae = None
        return metrics

    def save(folder: Path) -> None:
        """Write a checkpoint on all processes together, or end with the reason why it cannot be written."""
        state = {
            "step": step,
            "epoch": step // sampler.batches_per_epoch,
            "cursor": step % sampler.batches_per_epoch,
            "seconds": time.monotonic() - started,
            "nonfinite": nonfinite,
            "config": run,
            "lr_scheduler": scheduler.state_dict(),
            "versions": {
                name: version(name)
                for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "rvedit_diffusers")
            },
        }
        problem = save_checkpoint(
            folder, modules, branches.heads, optimizer, state, ema, averages, main_process, engine
        )
        problem = broadcast_object_list([problem])[0] if num_processes > 1 else problem
        if problem is not None:
            free = shutil.disk_usage(args.output).free / 2**30
            last = next((f"{path} is intact" for path in checkpoints(args.output)[::-1]), "there is no earlier one")
            fail(f"{folder} cannot be written, {free:.2f} GiB are free: {problem}; {last}")
        if main_process:
            prune_checkpoints(args.output, args.checkpoints_total_limit)

    def write_entry(step: int, entry: dict[str, float]) -> None:
        accelerator.log(entry, step)
        if main_process:
            log.write(json.dumps({"step": step} | entry) + "\n")
            log.flush()

    # 4. The loop
    if main_process:
        prune_checkpoints(args.output, None)  # what a killed process has left
    hyperparameters = {name: str(value) for name, value in run.items()}
    accelerator.init_trackers("rvedit", hyperparameters, {"tensorboard": {"purge_step": step + 1}} if step else {})
    log = open_log(args.output / "log.jsonl", step) if main_process else None
    bar = tqdm(total=args.max_train_steps, initial=step, unit="step", disable=not main_process)
    meter = LossMeter(device, "flow" if is_edit else "connect")
    last = {}
    for entry in read_log(args.output / "log.jsonl") if main_process else ():  # of a run that is gone on with
        last |= {name: value for name, value in entry.items() if name != "step"}
    if not is_edit and args.validation_steps and len(held_out):  # what the converted base has lost, and can have back
        for is_base in (True, False):
            last |= held_out_loss(accelerator, model, fixed[0], collate, args.train_batch_size, is_base)
        if step == 0:
            write_entry(0, last)
    ticks = (time.monotonic(), step)
    for batch in batches:
        if step >= args.max_train_steps:
            break
        is_aligned = step % args.align_every == 0 and (args.align_stop_step is None or step < args.align_stop_step)
        if is_edit and not (args.align_weight > 0 and is_aligned):
            del batch["align_positions"]
        batch = send_to_device(batch, device, non_blocking=True)
        torch.manual_seed(
            derive_seed(args.seed, step, rank, accelerator.step % accelerator.gradient_accumulation_steps, "dropout")
        )
        with accelerator.accumulate(model):
            with accelerator.autocast():
                if teacher is not None:
                    batch = teacher(batch)
                velocity, align_loss = model(batch)
            if not is_edit:
                loss = align_loss.mean()
                meter.add(align_loss, batch["sigmas"], None, 1)
            else:
                weight = None
                if args.edit_weight:
                    weight = edit_region_weight(batch["latents"], batch["source_latents"], args.edit_weight)
                if teacher is None:
                    flow_loss = flow_matching_loss(velocity, batch["latents"], batch["noise"], weight)
                else:
                    flow_loss = velocity_loss(velocity, batch["velocity"], weight)
                loss = flow_loss.mean()
                if align_loss is not None:
                    ramp = min(1.0, (step + 1) / max(args.align_warmup_steps, 1))
                    told = batch["keep_instruction"]  # without an instruction both branches read the same
                    loss = loss + args.align_weight * ramp * (align_loss * told).mean()
                    align_loss = align_loss.where(told > 0, math.nan)
                num_candidates = 2
                if args.align_loss == "infonce" and align_loss is not None:
                    num_candidates = batch["align_positions"].shape[1]
                meter.add(flow_loss, batch["sigmas"], align_loss, num_candidates)
            accelerator.backward(loss)
            if not accelerator.sync_gradients:
                continue
            # The norm is that of all processes, so they agree on whether it is finite. To know it costs one wait for
            # the device a step.
            norm = float(accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf))
            if engine is not None and engine.optimizer.overflow:  # DeepSpeed has left out the step
                norm = math.nan
            if math.isfinite(norm):
                optimizer.step()
                nonfinite_in_a_row = 0
                if ema is not None:
                    ema.step(averages)
            else:
                nonfinite, nonfinite_in_a_row = nonfinite + 1, nonfinite_in_a_row + 1
            scheduler.step()
            optimizer.zero_grad()
        step += 1
        bar.update()

        entry = {}
        if nonfinite_in_a_row >= args.max_nonfinite:
            save(args.output / f"checkpoint-{step}")
            fail(f"{nonfinite_in_a_row} steps in a row had no finite gradient; see {args.output}/checkpoint-{step}")
        if step % args.logging_steps == 0:
            entry = meter.read(accelerator, args.align_loss in CONTRASTIVE_LOSSES)
            seconds = (time.monotonic() - ticks[0]) / (step - ticks[1])
            ticks = (time.monotonic(), step)
            entry |= {"gradient_norm": norm, "nonfinite": nonfinite, "lr": scheduler.get_last_lr()[0]}
            entry |= {"epoch": step / sampler.batches_per_epoch, "seconds_per_step": seconds}
            entry = {name: value for name, value in entry.items() if math.isfinite(value)}
        paused = time.monotonic()
        if args.validation_steps and (step % args.validation_steps == 0 or step == args.max_train_steps):
            try:
                entry |= validate()
            except Exception:
                if num_processes == 1:  # what has been learned does not end with it; of several, others may not fail
                    save(args.output / f"checkpoint-{step}")
                raise
        if entry:
            last |= entry
            write_entry(step, entry)
            shown = ("flow", "align", "information_nats", "connect", "validation_flow", "nonfinite")
            bar.set_postfix({name: f"{last[name]:.4g}" for name in shown if last.get(name)})
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save(args.output / f"checkpoint-{step}")
        ticks = (ticks[0] + time.monotonic() - paused, ticks[1])

    # 5. The result is what the pipeline loads; the alignment heads stay behind
    branches.eval()
    with averaged(ema, averages):
        results, problem = export(args.output, base, modules, main_process)
    if main_process:
        log.close()
        if problem is not None:
            fail(f"the result cannot be written: {problem}; go on from {checkpoints(args.output)[-1]}")
        if read_log(args.output / "log.jsonl"):
            plot_losses(args.output / "log.jsonl", args.output / "losses.png")
        facts = {
            "data": f"{len(pairs)} pairs of {args.train_data}, buckets {', '.join(map(str, args.buckets))}",
            "steps": f"{step} of {global_batch_size} pairs",
            "learned": ", ".join(modules) + (f", LoRA of rank {args.lora_rank}" if is_lora else ""),
            "optimizer": f"{args.optimizer}, learning rate {args.learning_rate:g}, {args.lr_scheduler}",
            "weights": f"moving average, {args.ema_decay}" if ema is not None else "the last",
        }
        if teacher is not None:
            facts["distilled"] = (
                f"to {args.distill_steps} steps without guidance: `pipe(..., num_inference_steps={args.distill_steps},"
                f" guidance_scale=1.0)`; from {args.distill_substeps} times as many, guidance {scale:g}"
            )
        elif is_edit:
            facts["alignment"] = f"{args.align_loss}, weight {args.align_weight:g}, blocks {branches.align_blocks}"
            if args.align_reference_tokens == "shuffled":
                facts["alignment"] += ", with the reference tokens of other pairs: a control"
        else:
            facts["connected"] = f"blocks {branches.align_blocks}"
        losses = ("flow", "align", "connect", "validation_flow", "validation_flow_base")
        for result in results:
            record_stage(result, args.stage)
        publish(args, base, results, facts, {name: last[name] for name in losses if name in last})
    accelerator.end_training()


if __name__ == "__main__":
    main()
