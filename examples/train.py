"""Train an RVEDiT pipeline on synthetic edits: flow matching plus reference-anchored attention alignment.

    python examples/train.py --model runs/init --output runs/editor --config examples/tiny/editor.json
    accelerate launch --num_processes 2 examples/train.py ...

The VAE, the MLLM and the queries are frozen, and what they make of every pair is computed once; the transformer, the
connectors and the text encoder learn. The run goes on from `OUTPUT/checkpoint` if it is there.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
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
from rvedit_diffusers.training.cache import CHUNK_SIZE, fill_cache, load_cache
from rvedit_diffusers.training.checkpoint import (
    has_training_state,
    load_training_state,
    open_log,
    save_training_state,
)
from rvedit_diffusers.training.optimizers import MuonAdamW, block_matrices, warmup_cosine
from rvedit_diffusers.training.plots import plot_losses


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
    parser.add_argument("--output", type=Path, required=True, help="folder for pipeline, checkpoint, log and curves")
    parser.add_argument("--cache_dir", type=Path, help="folder for encoded pairs; OUTPUT/cache by default")
    parser.add_argument("--num_pairs", type=int, default=8192, help="synthetic pairs to train on, a multiple of 32")
    parser.add_argument("--num_frames", type=int, default=17, help="frames of a clip")
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--edits_per_scene", type=int, default=4, help="pairs that share a source clip")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--minutes", type=float, help="end the schedule after this long instead of after --steps")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs a step and process")
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for the matrices of the blocks"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--sigma_shift", type=float, default=1.0, help="shift of the noise levels")
    parser.add_argument(
        "--edit_weight", type=float, default=0.0, help="extra weight of latent cells that an edit changes"
    )
    parser.add_argument("--drop_instruction", type=float, default=0.1, help="share trained without instruction")
    parser.add_argument("--drop_all", type=float, default=0.1, help="share trained without instruction and source")
    parser.add_argument("--align_weight", type=float, default=0.05, help="0 trains without the reference branch")
    parser.add_argument("--align_blocks", type=int, nargs="+", help="aligned blocks; one near a third of the depth")
    parser.add_argument("--align_tokens", type=int, default=2048, help="token positions that are compared")
    parser.add_argument("--align_temperature", type=float, default=0.07)
    parser.add_argument("--align_every", type=int, default=1, help="align in every so many steps")
    parser.add_argument("--align_warmup_steps", type=int, default=500, help="the weight rises over these steps")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--save_every", type=int, default=500)
    parser.add_argument("--log_every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)

    args = parser.parse_args(with_config(parser, sys.argv[1:] if argv is None else argv))
    sizes = ("num_pairs", "num_frames", "height", "width", "batch_size")
    for name in (*sizes, "align_tokens", "align_every", "log_every", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    if args.minutes is None and args.steps < 1:
        parser.error(f"--steps has to be at least 1, but is {args.steps}")
    if args.num_pairs % CHUNK_SIZE:
        parser.error(f"--num_pairs has to be a multiple of {CHUNK_SIZE}, but is {args.num_pairs}")
    if not (args.model / "model_index.json").is_file():
        parser.error(f"--model has to be the folder of a pipeline, but {args.model} holds no model_index.json")
    return args


class EditingBranches(nn.Module):
    """Everything that learns, so that one wrapped module runs both branches of a step."""

    def __init__(self, pipe: RVEDiTPipeline, align_blocks: list[int], align_temperature: float):
        super().__init__()
        self.transformer, self.distiller, self.text_encoder = pipe.transformer, pipe.distiller, pipe.text_encoder
        self.align_blocks, self.align_temperature = align_blocks, align_temperature
        dim = self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim
        self.heads = nn.ModuleList(AlignmentHead(dim) for _ in align_blocks)

    def tokens(self, edit_states: torch.Tensor, visual_states: torch.Tensor, keep: torch.Tensor) -> dict:
        edit, visual = self.distiller.connect(edit_states, visual_states)
        return {"edit_hidden_states": edit * keep, "visual_hidden_states": visual * keep}

    def forward(self, batch: dict, noise: torch.Tensor, sigmas: torch.Tensor, positions: torch.Tensor | None):
        """Returns the velocity `(batch, channels, frames, height, width)` and the alignment loss `(batch,)` or `None`.

        `batch["keep_instruction"]` and `batch["keep_source"]` are `(batch,)` of 0 and 1; `positions` are the tokens to
        align, `None` for a step without the reference branch.
        """
        keep = batch["keep_instruction"].view(-1, 1, 1)
        text = self.text_encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        level = sigmas.view(-1, 1, 1, 1, 1)
        condition = {
            "hidden_states": (1 - level) * batch["latents"] + level * noise,
            "timestep": 1000 * sigmas,
            "encoder_hidden_states": text * batch["attention_mask"].unsqueeze(-1),
            "visual_positions": batch["visual_positions"],
            "source_hidden_states": batch["source_latents"] * batch["keep_source"].view(-1, 1, 1, 1, 1),
        }
        tokens = self.tokens(batch["edit_states"], batch["visual_states"], keep)
        if positions is None:
            return self.transformer(**condition, **tokens).sample, None

        # 1. The reference branch: same weights, noise and dropped conditions; its MLLM saw the edited clip
        with torch.no_grad():
            reference = self.transformer(
                **condition,
                **self.tokens(batch["reference_edit_states"], batch["reference_visual_states"], keep),
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


def sample_batch(data: dict, empty: dict, args, step: int, rank: int, num_processes: int, patch_volume: int):
    """Rows, dropped conditions, noise, noise levels and aligned positions: a function of seed, step and rank alone."""
    num_pairs, batch_size = len(data["latents"]), args.batch_size
    per_epoch = num_pairs // (batch_size * num_processes)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(hash((args.seed, epoch)) % 2**63))
    start = (position * num_processes + rank) * batch_size
    rows = order[start : start + batch_size]
    batch = {name: value[rows] for name, value in data.items()}
    batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}

    generator = torch.Generator().manual_seed(hash((args.seed, step, rank, 1)) % 2**63)
    chance = torch.rand(batch_size, generator=generator)
    drop_all = chance < args.drop_all
    drop_instruction = drop_all | (chance > 1 - args.drop_instruction)
    batch["keep_source"], batch["keep_instruction"] = (~drop_all).float(), (~drop_instruction).float()
    for name, value in empty.items():
        batch[name] = torch.where(drop_instruction[:, None], value, batch[name])
    noise = torch.randn(batch["latents"].shape, generator=generator)
    sigmas = sample_sigmas(batch_size, args.sigma_shift, generator)
    positions = sample_token_positions(math.prod(noise.shape[2:]) // patch_volume, args.align_tokens, generator)
    return batch, noise, sigmas, positions


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # several processes on CPUs are only found when told
        mixed_precision=args.mixed_precision,
        # the alignment heads rest in steps without the reference branch
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if args.num_pairs < args.batch_size * accelerator.num_processes:
        raise SystemExit(
            f"--num_pairs {args.num_pairs} does not fill one step of {accelerator.num_processes} processes with"
            f" --batch_size {args.batch_size}"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    torch.manual_seed(args.seed)
    pipe = RVEDiTPipeline.from_pretrained(args.model).to(device)
    patch_volume = math.prod(pipe.transformer.config.patch_size)

    # 1. Data, encoded once by the frozen parts
    size = {"num_frames": args.num_frames, "height": args.height, "width": args.width}
    edits = SyntheticEdits(args.seed + 20, **size, edits_per_scene=args.edits_per_scene)
    cache_dir = args.cache_dir or args.output / "cache"
    with accelerator.autocast():
        paths = fill_cache(pipe, edits, args.num_pairs, cache_dir, rank=rank, num_processes=num_processes)
    accelerator.wait_for_everyone()
    data = load_cache(paths)
    length = pipe.tokenizer.model_max_length
    empty = pipe.tokenizer([""], padding="max_length", max_length=length, return_tensors="pt")
    empty = {name: empty[name] for name in ("input_ids", "attention_mask")}

    # 2. What learns
    if device.type == "cpu":
        # the backward pass of the CPU's fused attention costs twice that of plain matrix products; compiled code
        # goes by these switches, not by the attention backend
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    num_layers = pipe.transformer.config.num_layers
    align_blocks = args.align_blocks or [num_layers // 3]
    branches = EditingBranches(pipe, align_blocks, args.align_temperature).to(device)
    pipe.distiller.queries.requires_grad_(False)
    for module in (pipe.vae, pipe.mllm):
        module.requires_grad_(False)
    branches.train()
    if args.compile:
        pipe.transformer.compile_repeated_blocks()
    parameters = [p for p in branches.parameters() if p.requires_grad]
    settings = {"lr": args.learning_rate, "betas": (0.9, 0.98), "weight_decay": args.weight_decay}
    if args.optimizer == "muon":
        matrices = block_matrices(pipe.transformer.blocks, pipe.distiller, pipe.text_encoder)
        optimizer = MuonAdamW(matrices, parameters, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, **settings, fused=True)
    modules = {"transformer": pipe.transformer, "distiller": pipe.distiller, "text_encoder": pipe.text_encoder}
    modules["heads"] = branches.heads
    step, spent, checkpoint = 0, 0.0, args.output / "checkpoint"
    if has_training_state(checkpoint):
        state = load_training_state(checkpoint, modules, optimizer)
        step, spent = state["step"], state["seconds"]
    model, optimizer = accelerator.prepare(branches, optimizer)
    started = time.monotonic() - spent

    # 3. The loop
    main_process = accelerator.is_main_process
    bar = tqdm(total=None if args.minutes else args.steps, initial=step, unit="step", disable=not main_process)
    log = open_log(args.output / "log.jsonl", step) if main_process else None
    sums, progress = torch.zeros(4, device=device), 0.0  # flow and alignment losses, steps with each
    while True:
        # every process has to follow the clock of the first
        progress = (time.monotonic() - started) / (60 * args.minutes) if args.minutes else step / args.steps
        if args.minutes and num_processes > 1:
            progress = accelerator.reduce(torch.tensor(progress if main_process else 0.0, device=device)).item()
        if progress >= 1.0:
            break
        rate = args.learning_rate * warmup_cosine(step, args.warmup_steps, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate

        batch, noise, sigmas, positions = sample_batch(data, empty, args, step, rank, num_processes, patch_volume)
        batch = {name: value.to(device) for name, value in batch.items()}
        noise, sigmas = noise.to(device), sigmas.to(device)
        align = args.align_weight > 0 and step % args.align_every == 0
        with accelerator.autocast():
            velocity, align_loss = model(batch, noise, sigmas, positions.to(device) if align else None)
        weight = edit_region_weight(batch["latents"], batch["source_latents"], args.edit_weight)
        flow_loss = flow_matching_loss(velocity, batch["latents"], noise, weight).mean()
        loss = flow_loss
        sums[0] += flow_loss.detach()
        sums[2] += 1
        if align:
            align_loss = align_loss.mean()
            ramp = min(1.0, (step + 1) / max(args.align_warmup_steps, 1))
            loss = loss + args.align_weight * ramp * align_loss
            sums[1] += align_loss.detach()
            sums[3] += 1
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()

        if step % args.log_every == 0 and main_process:
            flow, align_total, flow_count, align_count = sums.tolist()
            sums.zero_()
            entry = {
                "step": step,
                "progress": progress,
                "lr": rate,
                "flow": flow / flow_count,
            }
            if align_count:
                entry["align"] = align_total / align_count
                entry["information_nats"] = mutual_information_bound(
                    torch.tensor(entry["align"]), len(positions)
                ).item()
                entry["information_ceiling_nats"] = math.log(len(positions))
            log.write(json.dumps(entry) + "\n")
            log.flush()
            bar.set_postfix({k: f"{entry[k]:.4f}" for k in ("flow", "align", "information_nats") if k in entry})
        if step % args.save_every == 0 and main_process:
            state = {"step": step, "seconds": time.monotonic() - started}
            save_training_state(checkpoint, modules, optimizer, state)

    # 4. The result is a pipeline like the one it began with; the alignment heads stay behind
    if main_process:
        save_training_state(checkpoint, modules, optimizer, {"step": step, "seconds": time.monotonic() - started})
        branches.eval()
        pipe.save_pretrained(args.output / "pipeline")
        log.close()
        if step >= args.log_every:
            plot_losses(args.output / "log.jsonl", args.output / "losses.png")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
