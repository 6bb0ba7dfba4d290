"""What a conversion takes from a text-to-video model, and what `--stage connect` gives back, in the small.

    python benchmarks/connect.py --output runs/connect

Trains a small Wan transformer on captioned synthetic clips, with the embedded checkpoint's VAE and text encoder;
converts it, with the embedded checkpoint's MLLM; runs the stage; and measures the flow matching loss of all three on
clips and captions that none has seen. Each step is skipped where its result lies in the output folder.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline
from rvedit_diffusers.conversion import convert, plan_conversion
from rvedit_diffusers.evaluation.record import write_json
from rvedit_diffusers.losses import flow_matching_loss, sample_sigmas
from rvedit_diffusers.synthetic import SyntheticEdits
from rvedit_diffusers.training.cache import CachedPairs, fill_cache, text_length
from rvedit_diffusers.training.optimizers import build_optimizer
from rvedit_diffusers.training.options import computes_in_bfloat16
from rvedit_diffusers.training.pairs import SyntheticPairs
from rvedit_diffusers.training.sampler import generator


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train  # noqa: E402


SIGMAS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
BUCKET = {"num_frames": 5, "height": 64, "width": 64}


def load_batch(cached: CachedPairs, indices: list[int]) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([cached[index] for index in indices])


def train_base(args: argparse.Namespace, pipe: RVEDiTPipeline, folder: Path) -> None:
    """Train a Wan transformer on captions and save it as the pipeline that `init_from_wan.py` expects."""
    pairs = SyntheticPairs(SyntheticEdits(20, **BUCKET), args.num_clips, 16.0, captioned=True)
    cached = CachedPairs(fill_cache(pipe, pairs, args.output / "cache", "none", batch_size=16), text_length(pipe))
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=pipe.vae.config.z_dim,
        out_channels=pipe.vae.config.z_dim,
        text_dim=pipe.text_encoder.config.d_model,
        freq_dim=128,
        ffn_dim=384,
        num_layers=6,
        rope_max_seq_len=256,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    parameters = list(transformer.parameters())
    optimizer = build_optimizer("adamw", parameters, [], 2e-3, 0.01)
    settings = {"num_warmup_steps": 50, "num_training_steps": args.base_steps}
    scheduler = get_scheduler("cosine", optimizer, **settings)
    in_bfloat16 = computes_in_bfloat16(torch.device("cpu"))
    bar = tqdm(range(args.base_steps), desc="base", unit="step")
    for step in bar:
        draw = generator("base", step)
        batch = load_batch(cached, torch.randint(len(pairs), (args.batch_size,), generator=draw).tolist())
        noise = torch.randn(batch["latents"].shape, generator=draw)
        sigmas = sample_sigmas(args.batch_size, 3.0, draw)
        level = sigmas.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            velocity = transformer(
                (1 - level) * batch["latents"] + level * noise, 1000 * sigmas, batch["prompt_embeds"]
            ).sample
        loss = flow_matching_loss(velocity, batch["latents"], noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(flow=f"{loss.item():.4f}")
    WanPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        transformer=transformer.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder)


@torch.no_grad()
def velocities(
    transformer: torch.nn.Module, batch: dict[str, torch.Tensor], noise: torch.Tensor, sigma: float, **tokens
) -> torch.Tensor:
    timestep = torch.full((len(noise),), 1000 * sigma)
    return transformer((1 - sigma) * batch["latents"] + sigma * noise, timestep, **tokens).sample


def measure(args: argparse.Namespace, base: WanTransformer3DModel, folders: dict[str, Path]) -> dict:
    """Losses at fixed noise levels, and distances of the velocities from the base's as shares of their square."""
    pipes = {name: RVEDiTPipeline.from_pretrained(folder) for name, folder in folders.items()}
    any_pipe = next(iter(pipes.values()))
    pairs = SyntheticPairs(SyntheticEdits(7_000_000, **BUCKET), args.num_held_out, 16.0, captioned=True)
    cached = CachedPairs(
        fill_cache(any_pipe, pairs, args.output / "cache", "none", batch_size=16), text_length(any_pipe)
    )
    clips = [pairs.load(index)[0] for index in range(len(pairs))]
    captions = [pairs.instruction(index) for index in range(len(pairs))]
    others = [*range(1, len(pairs)), 0]
    rows: dict[str, dict[str, list[float]]] = {}

    def add(row: str, sigma: float, velocity, batch, noise, reference) -> None:
        entry = rows.setdefault(row, {f"{sigma:g}": [] for sigma in SIGMAS} | {"distance": []})
        entry[f"{sigma:g}"] += flow_matching_loss(velocity, batch["latents"], noise).tolist()
        error = (velocity - reference).square().mean((1, 2, 3, 4)) / reference.square().mean((1, 2, 3, 4))
        entry["distance"] += error.tolist()

    for start in tqdm(range(0, len(pairs), args.batch_size), desc="measuring", unit="batch"):
        indices = list(range(start, min(start + args.batch_size, len(pairs))))
        batch, wrong = load_batch(cached, indices), load_batch(cached, [others[i] for i in indices])
        noise = torch.randn(batch["latents"].shape, generator=generator("measure", start))
        tokens = {}
        for name, pipe in pipes.items():
            for kind, clip, text in (
                ("", indices, indices),
                (", another clip shown", [others[i] for i in indices], indices),
                (", wrong caption", indices, [others[i] for i in indices]),
            ):
                with torch.no_grad():
                    made = pipe.encode_tokens([clips[i] for i in clip], [captions[i] for i in text])
                tokens[name, kind] = made[0]
        for sigma in SIGMAS:
            texts = {"": batch["prompt_embeds"], ", wrong caption": wrong["prompt_embeds"]}
            reference = velocities(base, batch, noise, sigma, encoder_hidden_states=texts[""])
            add("base", sigma, reference, batch, noise, reference)
            other = velocities(base, batch, noise, sigma, encoder_hidden_states=texts[", wrong caption"])
            add("base, wrong caption", sigma, other, batch, noise, reference)
            for (name, kind), edit in tokens.items():
                text = texts[", wrong caption" if kind == ", wrong caption" else ""]
                read = {"encoder_hidden_states": text, "edit_hidden_states": edit}
                velocity = velocities(pipes[name].transformer, batch, noise, sigma, **read)
                add(name + kind, sigma, velocity, batch, noise, reference)
    means = {row: {name: sum(values) / len(values) for name, values in entry.items()} for row, entry in rows.items()}
    for entry in means.values():
        entry["loss"] = sum(entry[f"{sigma:g}"] for sigma in SIGMAS) / len(SIGMAS)
    return means


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the models, the logs and results.json")
    parser.add_argument("--base_steps", type=int, default=800)
    parser.add_argument("--connect_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of the stage")
    parser.add_argument("--num_clips", type=int, default=1024, help="captioned clips to train on")
    parser.add_argument("--num_held_out", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args(argv)
    for name in ("base_steps", "connect_steps", "num_clips", "num_held_out", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}")
    args.output.mkdir(parents=True, exist_ok=True)
    record, settings = args.output / "settings.json", {k: v for k, v in vars(args).items() if k != "output"}
    if record.is_file() and (begun := json.loads(record.read_text())) != settings:
        parser.error(f"--output {args.output} was begun with {begun}, but now it is {settings}: name another folder")
    write_json(record, settings)
    if not torch.cuda.is_available():  # plain attention is faster on CPUs at this size, see examples/train.py
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)

    pipe = RVEDiTPipeline.from_pretrained(TINY_CHECKPOINT)
    wan, mllm, converted, stage = (args.output / name for name in ("wan", "mllm", "converted", "stage"))
    started = time.monotonic()
    if not (wan / "model_index.json").is_file():
        train_base(args, pipe, wan)
        print(f"base: {time.monotonic() - started:.0f} s")
    if not converted.is_dir():
        pipe.mllm.save_pretrained(mllm)
        pipe.processor.mllm_processor.save_pretrained(mllm)
        convert(plan_conversion(wan, mllm, pipe.processor.num_edit_tokens), converted)
    if not (stage / "pipeline").is_dir():
        options = {
            "model": converted,
            "output": stage,
            "cache_dir": args.output / "cache",
            "stage": "connect",
            "buckets": "x".join(str(BUCKET[name]) for name in ("num_frames", "height", "width")),
            "num_pairs": args.num_clips,
            "encode_batch_size": 16,
            "train_batch_size": args.batch_size,
            "max_train_steps": args.connect_steps,
            "learning_rate": args.learning_rate,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 20,
            "num_validation_pairs": 16,
            "validation_steps": math.ceil(args.connect_steps / 4),
            "num_validation_edits": 0,
            "report_to": "none",
            "resume_from_checkpoint": "latest",
        }
        train.main([f"--{name}={value}" for name, value in options.items()])

    base = WanTransformer3DModel.from_pretrained(wan, subfolder="transformer").eval()
    means = measure(args, base, {"converted": converted, "connected": stage / "pipeline"})
    print("| | loss | " + " | ".join(f"at {sigma:g}" for sigma in SIGMAS) + " | distance from the base |")
    print("|---" * (len(SIGMAS) + 3) + "|")
    for row, entry in means.items():
        print(f"| {row} | {entry['loss']:.4f} | ", end="")
        print(" | ".join(f"{entry[f'{sigma:g}']:.4f}" for sigma in SIGMAS) + f" | {entry['distance']:.5f} |")
    partial = args.output / "results.json.partial"
    partial.write_text(json.dumps({"rows": means, "settings": vars(args)}, indent=2, default=str) + "\n")
    partial.replace(args.output / "results.json")


if __name__ == "__main__":
    main()
