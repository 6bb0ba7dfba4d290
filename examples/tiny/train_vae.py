"""Train the small `AutoencoderKLWan` of the embedded checkpoint on synthetic clips, resumably.

python examples/tiny/train_vae.py --output runs/vae
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from rvedit_diffusers.synthetic import TEST_PHOTOS, TRAIN_PHOTOS, SyntheticEdits
from rvedit_diffusers.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    open_log,
    prune_checkpoints,
    save_checkpoint,
)
from rvedit_diffusers.training.optimizers import warmup_cosine


LATENT_CHANNELS = 32
VAE_CONFIG = {
    "base_dim": 32,
    "decoder_base_dim": 32,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}


def clip_batch(edits: SyntheticEdits, start: int, size: int) -> torch.Tensor:
    clips = []
    for index in range(start, start + size):
        edit = edits[index]
        clips.append(edit.target_frames if index % 2 else edit.source_frames)
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0  # (batch, 3, frames, h, w)


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: torch.Tensor) -> float:
    vae.eval()
    rebuilt = vae.decode(vae.encode(clips).latent_dist.mode()).sample.clamp(-1, 1)
    vae.train()
    error = ((rebuilt - clips) / 2).square().mean(dim=(1, 2, 3, 4))
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, edits: SyntheticEdits, num_clips: int) -> None:
    latents = torch.cat([vae.encode(clip_batch(edits, i, 8)).latent_dist.mode() for i in range(0, num_clips, 8)])
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the VAE, its log and its checkpoint")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--minutes", type=float, help="end the schedule after this long instead of after --steps")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_frames", type=int, default=17)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--kl_weight", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=200)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKLWan.from_config(VAE_CONFIG).to(device)
    # a posterior of unit variance would drown the first gradients in noise: start nearly deterministic
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -6.0)
    learned = torch.nn.ModuleDict({"vae": vae})
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    edits = SyntheticEdits(args.seed, num_frames=args.num_frames, photos=TRAIN_PHOTOS)
    unseen = clip_batch(SyntheticEdits(1_000_000, num_frames=17, photos=TEST_PHOTOS), 0, 16).to(device)

    step, spent = 0, 0.0
    if checkpoints(args.output):
        state = load_checkpoint(checkpoints(args.output)[-1], {}, learned, optimizer)
        step, spent = state["step"], state["seconds"]
    started = time.monotonic() - spent

    def progress() -> float:
        return (time.monotonic() - started) / (60 * args.minutes) if args.minutes else step / args.steps

    bar = tqdm(total=None if args.minutes else args.steps, initial=step, unit="step")
    log = open_log(args.output / "log.jsonl", step)
    while progress() < 1.0:
        rate = args.learning_rate * warmup_cosine(step, 100, progress())
        for group in optimizer.param_groups:
            group["lr"] = rate
        clips = clip_batch(edits, step * args.batch_size, args.batch_size).to(device)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(clips).latent_dist
            rebuilt = vae.decode(posterior.sample()).sample.float()
        l1, mse = F.l1_loss(rebuilt, clips), F.mse_loss(rebuilt, clips)
        kl = posterior.kl().sum() / posterior.mean.numel()
        loss = l1 + mse + args.kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % 20 == 0:
            entry = {
                "step": step,
                "l1": l1.item(),
                "psnr": -10 * math.log10(mse.item() / 4),
                "kl": kl.item(),
                "lr": rate,
            }
            bar.set_postfix(l1=f"{entry['l1']:.4f}", psnr=f"{entry['psnr']:.2f}", kl=f"{entry['kl']:.2f}")
            if step % args.save_every == 0:
                entry["psnr_unseen_photos"] = psnr(vae, unseen)
                state = {"step": step, "seconds": time.monotonic() - started}
                problem = save_checkpoint(args.output / f"checkpoint-{step}", {}, learned, optimizer, state)
                if problem is not None:
                    raise SystemExit(f"checkpoint-{step} cannot be written: {problem}")
                prune_checkpoints(args.output, 1)
            log.write(json.dumps(entry) + "\n")
            log.flush()

    vae.eval()
    set_latent_statistics(vae, SyntheticEdits(args.seed + 1, num_frames=17), 128)
    final = psnr(vae, unseen)
    log.write(json.dumps({"step": step, "psnr_unseen_photos": final, "seconds": time.monotonic() - started}) + "\n")
    vae.save_pretrained(args.output / "vae")
    print(f"{args.output / 'vae'}: {final:.2f} dB on clips over photographs never trained on")


if __name__ == "__main__":
    main()
