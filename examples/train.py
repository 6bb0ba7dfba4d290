"""Fine-tune an RVEDiT pipeline on pairs of clips: flow matching plus reference-anchored attention alignment.

    python examples/train.py --model MODEL --train_data DATA --output runs/lora --training_type lora
    accelerate launch --num_processes 2 examples/train.py ...

What is frozen encodes every pair once, into a cache on disk, and leaves memory. The run goes on from
`OUTPUT/checkpoint` if it is there.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from torch import nn
from tqdm import tqdm

from rvedit_diffusers import RVEDiTPipeline
from rvedit_diffusers.losses import (
    AlignmentHead,
    edit_region_weight,
    flow_matching_loss,
    infonce_loss,
    mutual_information_bound,
    sample_sigmas,
    sample_token_positions,
)
from rvedit_diffusers.synthetic import SyntheticEdits
from rvedit_diffusers.training.cache import CachedPairs, fill_cache
from rvedit_diffusers.training.checkpoint import (
    has_training_state,
    load_training_state,
    open_log,
    save_training_state,
)
from rvedit_diffusers.training.data import PRESETS, describe_plans, parse_buckets, plan_pairs, read_pairs
from rvedit_diffusers.training.optimizers import MuonAdamW, block_matrices, warmup_cosine
from rvedit_diffusers.training.pairs import EditPairs, FilePairs, SyntheticPairs
from rvedit_diffusers.training.plots import plot_losses
from rvedit_diffusers.training.sampler import BatchSampler, derive_seed, generator, share


LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2")


def with_config(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """The options of the `--config` file as command line options, and `argv` after them, which so goes first."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    path = first.parse_known_args(argv)[0].config
    if path is None:
        return argv
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} has to hold one JSON object")
    unknown = set(values) - {action.dest for action in parser._actions}
    if unknown:
        parser.error(f"--config {path} sets unknown options: {', '.join(sorted(unknown))}")
    options = []
    for name, value in values.items():
        if value is True:
            options.append(f"--{name}")
        elif value is not False and value is not None:
            options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return options + argv


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="JSON file with values for any of the options below")
    parser.add_argument("--model", type=Path, required=True, help="folder of the pipeline to train")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, checkpoint, log and curves")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--train_data",
        default="synthetic",
        help="`synthetic`, a .csv, .jsonl or .json file, a folder with metadata.csv or metadata.jsonl, or a Hugging"
        " Face dataset",
    )
    data.add_argument("--data_root", type=Path, help="folder that relative paths start from; default: the table's own")
    data.add_argument("--columns", choices=PRESETS, default="default", help="layout of the table")
    for name in ("source", "edited", "instruction"):
        data.add_argument(f"--{name}_column", help="name of this column; default: that of --columns")
    data.add_argument(
        "--buckets", default="17x64x64", help="frames x height x width, several with commas; a pair goes to its best"
    )
    data.add_argument(
        "--fps", type=Fraction, help="frames per second of all clips; default: the lower of a pair's two"
    )
    data.add_argument("--strict", action="store_true", help="end if a pair has to be dropped")
    data.add_argument("--dry_run", action="store_true", help="end after the scan of all files")
    data.add_argument("--cache_dir", type=Path, help="folder for encoded pairs; default: OUTPUT/cache")
    data.add_argument("--encode_batch_size", type=int, default=1, help="pairs that are encoded together")
    data.add_argument("--num_workers", type=int, default=0, help="processes that read the cache")
    data.add_argument("--num_pairs", type=int, default=8192, help="pairs of `synthetic`")
    data.add_argument("--edits_per_scene", type=int, default=4, help="pairs of `synthetic` that share a source clip")

    learning = parser.add_argument_group("what learns, and how")
    learning.add_argument("--training_type", choices=("lora", "full"), default="full")
    learning.add_argument("--lora_rank", type=int, default=32)
    learning.add_argument("--lora_alpha", type=float, help="default: the rank")
    learning.add_argument("--lora_dropout", type=float, default=0.0)
    learning.add_argument("--lora_targets", nargs="+", default=list(LORA_TARGETS), help="names of linear layers")
    learning.add_argument("--train_connectors", action="store_true", help="the distiller's connectors learn, too")
    learning.add_argument("--train_text_encoder", action="store_true", help="the text encoder learns, too")
    learning.add_argument("--steps", type=int, default=10000)
    learning.add_argument("--minutes", type=float, help="end the schedule after this long instead of after --steps")
    learning.add_argument("--batch_size", type=int, default=16, help="pairs a step and process")
    learning.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for the matrices of the blocks"
    )
    learning.add_argument("--learning_rate", type=float, default=1e-3)
    learning.add_argument("--warmup_steps", type=int, default=200)
    learning.add_argument("--weight_decay", type=float, default=0.01)
    learning.add_argument(
        "--gradient_checkpointing", action="store_true", help="less memory for about a third more time"
    )
    learning.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    learning.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    learning.add_argument("--seed", type=int, default=0)

    losses = parser.add_argument_group("losses")
    losses.add_argument("--sigma_shift", type=float, default=1.0, help="shift of the noise levels")
    losses.add_argument(
        "--edit_weight", type=float, default=0.0, help="extra weight of latent cells that an edit changes"
    )
    losses.add_argument("--drop_instruction", type=float, default=0.1, help="share trained without instruction")
    losses.add_argument("--drop_all", type=float, default=0.1, help="share trained without instruction and source")
    losses.add_argument("--align_weight", type=float, default=0.05, help="0 trains without the reference branch")
    losses.add_argument("--align_blocks", type=int, nargs="+", help="aligned blocks; one near a third of the depth")
    losses.add_argument("--align_tokens", type=int, default=2048, help="token positions that are compared")
    losses.add_argument("--align_temperature", type=float, default=0.07)
    losses.add_argument("--align_every", type=int, default=1, help="align in every so many steps")
    losses.add_argument("--align_warmup_steps", type=int, default=500, help="the weight rises over these steps")

    watching = parser.add_argument_group("checkpoints and log")
    watching.add_argument("--save_every", type=int, default=500)
    watching.add_argument("--log_every", type=int, default=20)

    args = parser.parse_args(with_config(parser, sys.argv[1:] if argv is None else argv))
    counts = ("num_pairs", "edits_per_scene", "batch_size", "encode_batch_size", "lora_rank")
    for name in (*counts, "align_tokens", "align_every", "log_every", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    if args.minutes is None and args.steps < 1:
        parser.error(f"--steps has to be at least 1, but is {args.steps}")
    if args.fps is not None and args.fps <= 0:
        parser.error(f"--fps has to be above 0, but is {args.fps}")
    if not (args.model / "model_index.json").is_file():
        parser.error(f"--model has to be the folder of a pipeline, but {args.model} holds no model_index.json")
    try:
        args.buckets = parse_buckets(args.buckets)
    except ValueError as error:
        parser.error(str(error))
    if args.train_data == "synthetic" and len(args.buckets) > 1:
        parser.error(f"--buckets has to be one for synthetic data, but has {len(args.buckets)}")
    for name, column in zip(("source", "edited", "instruction"), PRESETS[args.columns], strict=True):
        if getattr(args, f"{name}_column") is None:
            setattr(args, f"{name}_column", column)
    return args


def load_pairs(args: argparse.Namespace, pipe: RVEDiTPipeline) -> tuple[EditPairs | None, str | None]:
    """The pairs to train on, or why there are none; prints what was kept, trimmed and dropped."""
    try:
        for bucket in args.buckets:
            patch = pipe.transformer.config.patch_size[1]
            bucket.check(pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial * patch)
        if args.train_data == "synthetic":
            bucket = args.buckets[0]
            size = {"num_frames": bucket.num_frames, "height": bucket.height, "width": bucket.width}
            edits = SyntheticEdits(args.seed + 20, **size, edits_per_scene=args.edits_per_scene)
            return SyntheticPairs(edits, args.num_pairs, float(args.fps or pipe.processor.default_fps)), None
        columns = (args.source_column, args.edited_column, args.instruction_column)
        pairs = read_pairs(args.train_data, *columns, data_root=args.data_root)
        plans, dropped = plan_pairs(pairs, args.buckets, args.fps)
    except (ImportError, OSError, ValueError) as error:
        return None, str(error)
    print(describe_plans(plans, dropped))
    if not plans:
        return None, f"--train_data {args.train_data} has no pair to train on"
    if dropped and args.strict:
        return None, f"--strict, but {len(dropped)} of {len(pairs)} pairs were dropped"
    return FilePairs(plans), None


class EditingBranches(nn.Module):
    """Everything that learns, so that one wrapped module runs both branches of a step."""

    def __init__(self, pipe: RVEDiTPipeline, args: argparse.Namespace):
        super().__init__()
        self.transformer = pipe.transformer
        self.distiller = pipe.distiller if args.train_connectors else None
        self.text_encoder = pipe.text_encoder if args.train_text_encoder else None
        config = self.transformer.config
        self.align_blocks = args.align_blocks or [config.num_layers // 3]
        self.align_temperature = args.align_temperature
        dim = config.num_attention_heads * config.attention_head_dim
        self.heads = nn.ModuleList(AlignmentHead(dim) for _ in self.align_blocks)

    def tokens(self, batch: dict, prefix: str = "") -> dict:
        edit, visual = batch[f"{prefix}edit_tokens"], batch[f"{prefix}visual_tokens"]
        if self.distiller is not None:
            edit, visual = self.distiller.connect(edit, visual)
        keep = batch["keep_instruction"].view(-1, 1, 1)
        return {"edit_hidden_states": edit * keep, "visual_hidden_states": visual * keep}

    def forward(self, batch: dict, positions: torch.Tensor | None):
        """Returns the velocity `(batch, channels, frames, height, width)` and the alignment loss `(batch,)` or `None`.

        `batch` is what [`draw`] returns; `positions` are the tokens to align, `None` for a step without the reference
        branch.
        """
        text = batch.get("prompt_embeds")
        if self.text_encoder is not None:
            mask = batch["attention_mask"]
            text = self.text_encoder(batch["input_ids"], mask).last_hidden_state * mask.unsqueeze(-1)
        level = batch["sigmas"].view(-1, 1, 1, 1, 1)
        condition = {
            "hidden_states": (1 - level) * batch["latents"] + level * batch["noise"],
            "timestep": 1000 * batch["sigmas"],
            "encoder_hidden_states": text,
            "visual_positions": batch["visual_positions"],
            "source_hidden_states": batch["source_latents"] * batch["keep_source"].view(-1, 1, 1, 1, 1),
        }
        tokens = self.tokens(batch)
        if positions is None:
            return self.transformer(**condition, **tokens).sample, None

        # 1. The reference branch: same weights, noise and dropped conditions; its MLLM saw the edited clip
        with torch.no_grad():
            reference = self.transformer(
                **condition,
                **self.tokens(batch, "reference_"),
                return_features=self.align_blocks,
                stop_after_block=max(self.align_blocks),
            ).features

        # 2. The editing branch
        output = self.transformer(**condition, **tokens, return_features=self.align_blocks)
        losses = [
            infonce_loss(head(feature[:, positions]), head(target[:, positions]), self.align_temperature)
            for head, feature, target in zip(self.heads, output.features, reference, strict=True)
        ]
        return output.sample, torch.stack(losses).mean(0)


def encode_null_text(pipe: RVEDiTPipeline, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The empty instruction, as the cache holds instructions, in rows of full length."""
    length = pipe.tokenizer.model_max_length
    if args.train_text_encoder:
        inputs = pipe.tokenizer([""], padding="max_length", max_length=length, return_tensors="pt")
        return {"input_ids": inputs.input_ids[0], "attention_mask": inputs.attention_mask[0]}
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt([""], do_classifier_free_guidance=False, max_sequence_length=length)
    return {"prompt_embeds": embeds[0].cpu()}


def draw(batch: dict, first: int, null_text: dict, args: argparse.Namespace) -> dict:
    """Add noise, noise levels and dropped conditions to the samples numbered from `first` of the whole run.

    Each is a function of the seed and the sample's number, whichever process trains on it. `noise` has the shape of
    `latents`; `sigmas`, `keep_instruction` and `keep_source` have the shape `(batch,)`, the last two hold 0 and 1.
    """
    numbers = range(first, first + len(batch["latents"]))
    chance = torch.cat([torch.rand(1, generator=generator(args.seed, number, "drop")) for number in numbers])
    drop_all = chance < args.drop_all
    drop_instruction = drop_all | (chance > 1 - args.drop_instruction)
    shape = batch["latents"].shape[1:]
    drawn = {
        "noise": torch.stack([torch.randn(shape, generator=generator(args.seed, n, "noise")) for n in numbers]),
        "sigmas": torch.cat([sample_sigmas(1, args.sigma_shift, generator(args.seed, n, "sigma")) for n in numbers]),
        "keep_instruction": (~drop_instruction).float(),
        "keep_source": (~drop_all).float(),
    }
    for name, value in null_text.items():
        rows = batch[name]
        drawn[name] = torch.where(drop_instruction.view(-1, *[1] * value.ndim), value.to(rows), rows)
    return batch | drawn


def shares_of_batches(sampler: BatchSampler, start: int, rank: int, num_processes: int) -> Iterator[list[int]]:
    number = start
    while True:
        yield share(sampler[number], rank, num_processes)
        number += 1


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # several processes on CPUs are only found when told
        mixed_precision=args.mixed_precision,
        # the alignment heads rest in steps without the reference branch
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    main_process = accelerator.is_main_process
    torch.manual_seed(args.seed)  # of what begins at random
    pipe = RVEDiTPipeline.from_pretrained(args.model)

    # 1. Pairs, encoded once by the frozen parts
    found = [load_pairs(args, pipe) if main_process else None]
    pairs, problem = broadcast_object_list(found)[0] if num_processes > 1 else found[0]
    if problem:
        raise SystemExit(f"train.py: error: {problem}")
    if args.dry_run:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    pipe.to(device)
    with accelerator.autocast():
        paths = fill_cache(
            pipe,
            pairs,
            args.cache_dir or args.output / "cache",
            tokens="states" if args.train_connectors else "tokens",
            text="ids" if args.train_text_encoder else "embeds",
            batch_size=args.encode_batch_size,
            rank=rank,
            num_processes=num_processes,
        )
    accelerator.wait_for_everyone()
    null_text = encode_null_text(pipe, args)
    trained = ["transformer"] + ["distiller"] * args.train_connectors + ["text_encoder"] * args.train_text_encoder
    for name in {"vae", "mllm", "distiller", "text_encoder"}.difference(trained):
        setattr(pipe, name, None)
    gc.collect()

    # 2. What learns
    if device.type == "cpu":
        # the backward pass of the CPU's fused attention costs twice that of plain matrix products; compiled code
        # goes by these switches, not by the attention backend
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if args.training_type == "lora":
        pipe.transformer.requires_grad_(False)
        pipe.transformer.add_adapter(
            LoraConfig(
                r=args.lora_rank,
                lora_alpha=args.lora_alpha or args.lora_rank,
                lora_dropout=args.lora_dropout,
                target_modules=args.lora_targets,
            )
        )
    branches = EditingBranches(pipe, args).to(device)
    if args.train_connectors:
        pipe.distiller.queries.requires_grad_(False)
    branches.train()
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if args.compile:
        pipe.transformer.compile_repeated_blocks()
    parameters = [p for p in branches.parameters() if p.requires_grad]
    settings = {"lr": args.learning_rate, "betas": (0.9, 0.98), "weight_decay": args.weight_decay}
    if args.optimizer == "muon":
        inner = [pipe.transformer.blocks, *(getattr(pipe, name) for name in trained[1:])]
        optimizer = MuonAdamW(block_matrices(*inner), parameters, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, **settings, fused=True)
    modules = {name: getattr(pipe, name) for name in trained} | {"heads": branches.heads}
    step, spent, checkpoint = 0, 0.0, args.output / "checkpoint"
    if has_training_state(checkpoint):
        state = load_training_state(checkpoint, modules, optimizer)
        step, spent = state["step"], state["seconds"]
    model, optimizer = accelerator.prepare(branches, optimizer)
    started = time.monotonic() - spent

    # 3. The loop
    global_batch_size = args.batch_size * num_processes
    sampler = BatchSampler([str(pairs.bucket(index)) for index in range(len(pairs))], global_batch_size, args.seed)
    batches = torch.utils.data.DataLoader(
        CachedPairs(paths, pipe.tokenizer.model_max_length),
        batch_sampler=shares_of_batches(sampler, step, rank, num_processes),
        num_workers=args.num_workers,
    )
    patch_volume = math.prod(pipe.transformer.config.patch_size)
    bar = tqdm(total=None if args.minutes else args.steps, initial=step, unit="step", disable=not main_process)
    log = open_log(args.output / "log.jsonl", step) if main_process else None
    # flow and alignment losses, steps with each, and the bound's ceiling, which differs between buckets
    sums, progress = torch.zeros(5, device=device), 0.0
    for batch in batches:
        # every process has to follow the clock of the first
        progress = (time.monotonic() - started) / (60 * args.minutes) if args.minutes else step / args.steps
        if args.minutes and num_processes > 1:
            progress = accelerator.reduce(torch.tensor(progress if main_process else 0.0, device=device)).item()
        if progress >= 1.0:
            break
        rate = args.learning_rate * warmup_cosine(step, args.warmup_steps, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate

        batch = draw(batch, step * global_batch_size + rank * args.batch_size, null_text, args)
        batch = {name: value.to(device) for name, value in batch.items()}
        batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
        positions = None
        if args.align_weight > 0 and step % args.align_every == 0:
            num_tokens = math.prod(batch["latents"].shape[2:]) // patch_volume
            chosen = sample_token_positions(num_tokens, args.align_tokens, generator(args.seed, step, "positions"))
            positions = chosen.to(device)
        torch.manual_seed(derive_seed(args.seed, step, rank, "dropout"))
        with accelerator.autocast():
            velocity, align_loss = model(batch, positions)
        weight = edit_region_weight(batch["latents"], batch["source_latents"], args.edit_weight)
        flow_loss = flow_matching_loss(velocity, batch["latents"], batch["noise"], weight).mean()
        loss = flow_loss
        sums[0] += flow_loss.detach()
        sums[2] += 1
        if positions is not None:
            align_loss = align_loss.mean()
            ramp = min(1.0, (step + 1) / max(args.align_warmup_steps, 1))
            loss = loss + args.align_weight * ramp * align_loss
            sums[1] += align_loss.detach()
            sums[3] += 1
            sums[4] += math.log(len(positions))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()

        if step % args.log_every == 0 and main_process:
            flow, align_total, flow_count, align_count, ceiling_total = sums.tolist()
            sums.zero_()
            entry = {
                "step": step,
                "progress": progress,
                "lr": rate,
                "flow": flow / flow_count,
            }
            if align_count:
                entry["align"] = align_total / align_count
                ceiling = ceiling_total / align_count
                bound = mutual_information_bound(torch.tensor(entry["align"]), math.exp(ceiling))
                entry |= {"information_nats": bound.item(), "information_ceiling_nats": ceiling}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            bar.set_postfix({k: f"{entry[k]:.4f}" for k in ("flow", "align", "information_nats") if k in entry})
        if step % args.save_every == 0 and main_process:
            state = {"step": step, "seconds": time.monotonic() - started}
            save_training_state(checkpoint, modules, optimizer, state)

    # 4. The result is what the pipeline loads; the alignment heads stay behind
    if main_process:
        save_training_state(checkpoint, modules, optimizer, {"step": step, "seconds": time.monotonic() - started})
        branches.eval()
        if args.training_type == "lora":
            RVEDiTPipeline.save_lora_weights(args.output / "lora", pipe.transformer)
        if args.training_type == "full" or len(trained) > 1:
            whole = trained if args.training_type == "full" else trained[1:]
            parts = {name: getattr(pipe, name) for name in whole}
            RVEDiTPipeline.from_pretrained(args.model, **parts).save_pretrained(args.output / "pipeline")
        log.close()
        if step >= args.log_every:
            plot_losses(args.output / "log.jsonl", args.output / "losses.png")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
