"""What the alignment adds to a training step: seconds, memory and FLOPs.

    python benchmarks/training.py --preset wan-1.3b --gradient_checkpointing --output training.json
    python benchmarks/training.py --preset wan-14b --device meta

Three kinds of step take turns in one process, on the same random weights and random data:

- plain: flow matching alone;
- align: with the reference branch of `EditingBranches`, which has no gradient and stops after the last aligned block;
- naive: the reference branch is a second whole branch, with all blocks and a flow matching loss of its own, and the
  gradient flows through both.

On a CPU, seconds are the process' own, summed over its threads: other programs do not add to them. Encoders and
distiller do not run: their tokens come from the cache. FLOPs are those of matrix products, attention and
convolutions, counted on tensors without data. Memory is the peak of a step with all weights and optimizer states:
measured on CUDA, else what `training.memory` estimates for an accelerator. `--device meta` runs no step. On CUDA a
kind of step that is estimated to need more than there is is not run.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
from models import (
    PRESETS,
    Preset,
    add_arguments,
    build_transformer,
    check_arguments,
    machine,
    measure_in_turns,
    publish,
    spread,
    to_dtype,
    turn_ratios,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rvedit_diffusers.losses import flow_matching_loss
from rvedit_diffusers.training.adapters import add_lora
from rvedit_diffusers.training.branches import EditingBranches
from rvedit_diffusers.training.memory import estimate_memory
from rvedit_diffusers.training.optimizers import build_optimizer
from rvedit_diffusers.training.samples import Draws


STEPS = ("plain", "align", "naive")
ALIGN_WEIGHT = 0.05


class NaiveBranches(EditingBranches):
    """Two whole branches; the velocities of both are returned, `(2 * batch, ...)`."""

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        level = batch["sigmas"].view(-1, 1, 1, 1, 1)
        condition = {
            "hidden_states": (1 - level) * batch["latents"] + level * batch["noise"],
            "timestep": 1000 * batch["sigmas"],
            "encoder_hidden_states": batch["prompt_embeds"],
            "source_hidden_states": batch["source_latents"] * batch["keep_source"].view(-1, 1, 1, 1, 1),
            "return_features": self.align_blocks,
        }
        reference = self.transformer(**condition, **self._tokens(batch, "reference_"))
        editing = self.transformer(**condition, **self._tokens(batch))
        losses = []
        for head, features, targets in zip(self.heads, editing.features, reference.features, strict=True):
            positions = batch["align_positions"].unsqueeze(-1).expand(-1, -1, features.shape[-1])
            losses.append(self._align(head, features.gather(1, positions), targets.gather(1, positions)))
        return torch.cat([editing.sample, reference.sample]), torch.stack(losses).mean(0)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--training_type", choices=("lora", "full"), default="lora")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile the blocks before the steps are timed")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--align_blocks", type=int, nargs="+", help="default: the last shallow and the first deep one")
    parser.add_argument("--align_tokens", type=int, default=2048, help="token positions that are compared in a clip")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind, after one that warms up")
    args = parser.parse_args(argv)

    for name in ("batch_size", "align_tokens", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    last_block = PRESETS[args.preset].num_layers - 1
    if args.align_blocks is not None and not all(0 <= block <= last_block for block in args.align_blocks):
        parser.error(f"--align_blocks has to name blocks in [0, {last_block}], but is {args.align_blocks}")
    check_arguments(parser, args, ("cpu", "cuda", "meta"))
    return args


def build_branches(args: argparse.Namespace, device: torch.device) -> dict[str, EditingBranches]:
    """The module of each kind of step, with weights and heads in common, as examples/train.py trains it."""
    with torch.device(device):
        transformer = build_transformer(PRESETS[args.preset])
        if args.training_type == "lora":
            add_lora(to_dtype(transformer, torch.bfloat16))
        if args.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        align = EditingBranches(transformer, align_blocks=args.align_blocks).train()
        naive = NaiveBranches(transformer, align_blocks=args.align_blocks).train()
        naive.heads = align.heads
    return {"plain": align, "align": align, "naive": naive}


def make_samples(preset: Preset, num_positions: int) -> dict[str, dict[str, torch.Tensor]]:
    """What each kind of step trains on: a random clip and random tokens, with positions of tokens to align."""
    latents = torch.randn(preset.channels, *preset.latent_size)
    sample = {
        "latents": latents,
        "source_latents": torch.randn_like(latents),
        "prompt_embeds": torch.randn(preset.num_text, preset.text_dim),
        "visual_positions": torch.rand(preset.num_visual, 3),
    }
    for prefix in ("", "reference_"):
        sample[f"{prefix}edit_tokens"] = torch.randn(preset.num_edit, preset.dim)
        sample[f"{prefix}visual_tokens"] = torch.randn(preset.num_visual, preset.dim)
    sample |= Draws(seed=0, drop_instruction=0, drop_all=0, num_positions=num_positions)(0, latents.shape)
    plain = {name: value for name, value in sample.items() if name != "align_positions"}
    return {"plain": plain, "align": sample, "naive": sample}


def make_batch(sample: dict[str, torch.Tensor], batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.stack([value] * batch_size).to(device) for name, value in sample.items()}


def step_loss(branches: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    latents, noise = batch["latents"], batch["noise"]
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocities, align_loss = branches(batch)
    loss = sum(flow_matching_loss(velocity, latents, noise).mean() for velocity in velocities.split(len(latents)))
    return loss if align_loss is None else loss + ALIGN_WEIGHT * align_loss.mean()


def count_flops(args: argparse.Namespace) -> dict[str, int]:
    """FLOPs of each kind of step."""
    branches, samples, cpu = (
        build_branches(args, torch.device("meta")),
        make_samples(PRESETS[args.preset], args.align_tokens),
        torch.device("cpu"),
    )
    flops = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        branches["naive"].to_empty(device=cpu)  # on the meta device attention would not be the fused one
        for name in STEPS:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlopCounterMode(display=False) as counter:
                step_loss(branches[name], make_batch(samples[name], args.batch_size, cpu)).backward()
            flops[name] = counter.get_total_flops()
    return flops


def count_memory(args: argparse.Namespace) -> dict[str, int]:
    """Bytes that each kind of step takes of an accelerator's memory."""
    branches, samples = (
        build_branches(args, torch.device("meta")),
        make_samples(PRESETS[args.preset], args.align_tokens),
    )
    return {name: estimate_memory(branches[name], samples[name], args.batch_size)["total"] for name in STEPS}


def steps_that_fit(memory: dict[str, int], free: int) -> list[str]:
    """Kinds of step that do not need more bytes than are free; ends the program if that is not even the plain one."""
    names = [name for name in memory if memory[name] <= free]
    if "plain" not in names:
        raise SystemExit(
            f"training.py: error: a plain step needs {memory['plain'] / 2**30:.1f} GiB, {free / 2**30:.1f} are free:"
            " take --gradient_checkpointing, a smaller --preset, or --device meta, which runs none"
        )
    return names


def time_steps(args: argparse.Namespace, names: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of the steps of these kinds, which take turns, and on CUDA the most memory of a step of each."""
    branches, samples = build_branches(args, args.device), make_samples(PRESETS[args.preset], args.align_tokens)
    batches = {name: make_batch(samples[name], args.batch_size, args.device) for name in STEPS}
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # as in training: plain, aligned and reference blocks differ
        branches["plain"].transformer.compile_repeated_blocks()
    parameters = [parameter for parameter in branches["plain"].parameters() if parameter.requires_grad]
    optimizer = build_optimizer("adamw", parameters, [], 1e-5, 0.01)

    def step(name: str) -> None:
        step_loss(branches[name], batches[name]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    steps = {name: partial(step, name) for name in names}
    return measure_in_turns(steps, args.device, args.steps, with_resident=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)

    # 1. Count and time
    flops, memory, names = count_flops(args), count_memory(args), list(STEPS)
    if args.device.type == "cuda":
        names = steps_that_fit(memory, torch.cuda.mem_get_info(args.device)[0])
    seconds, measured = ({}, {}) if args.device.type == "meta" else time_steps(args, names)
    memory = measured or memory

    # 2. Ratios
    turns = {name: turn_ratios(seconds, name, "plain") for name in seconds}
    ratios = {
        "": {name: statistics.median(values) for name, values in turns.items()},
        "memory_": {name: memory[name] / memory["plain"] for name in memory},
        "flops_": {name: flops[name] / flops["plain"] for name in STEPS},
    }

    # 3. Table
    lines = ["| step | seconds (min-max) | / plain (min-max) | GiB | / plain | TFLOPs | / plain |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in STEPS:
        timed = f"{spread(seconds[name], '.3g')} | {spread(turns[name], '.2f')}" if name in seconds else "- | -"
        used = f"{memory[name] / 2**30:.2f} | {ratios['memory_'][name]:.2f}" if name in memory else "- | -"
        lines.append(f"| {name} | {timed} | {used} | {flops[name] / 1e12:,.2f} | {ratios['flops_'][name]:.2f} |")

    # 4. JSON
    result = {
        "ratios": {
            f"train_{name}_{quantity}vs_plain": ratio
            for quantity, by_step in ratios.items()
            for name, ratio in by_step.items()
            if name != "plain"
        },
        "settings": vars(args) | {"preset": {"name": args.preset} | asdict(PRESETS[args.preset])},
        **machine(args.device),
        "seconds": seconds,
        "memory_bytes": memory,
        "flops": flops,
    }
    publish(args.output, "training.py", argv, "\n".join(lines), result)


if __name__ == "__main__":
    main()
