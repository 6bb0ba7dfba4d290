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

from rvedit_diffusers.synthetic import TRAIN_LEVELS, BenchmarkItems
from rvedit_diffusers.training.checkpoint import checkpoints, keep_latest, load_checkpoint, open_log
from rvedit_diffusers.training.optimizers import MuonAdamW, block_matrices, warmup_cosine
from rvedit_diffusers.training.options import default_precision


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


class Batches(torch.utils.data.Dataset):
    """Batch number `index`: sources and true edits of items in turns, `(batch, 3, frames, height, width)` in [-1, 1],
    and where the two differ, `(batch, 1, frames, height, width)` bool."""

    def __init__(self, items: BenchmarkItems, batch_size: int):
        self.items, self.batch_size = items, batch_size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = index * self.batch_size // 2
        chosen = [self.items[first + number] for number in range(self.batch_size // 2)]
        clips = np.stack([clip for item in chosen for clip in (item.source_frames, item.target_frames)])
        edited = torch.from_numpy(np.stack([item.mask for item in chosen])).repeat_interleave(2, 0)
        return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0, edited.unsqueeze(1)


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, clips: torch.Tensor) -> float:
    vae.eval()
    rebuilt = vae.decode(vae.encode(clips).latent_dist.mode()).sample.clamp(-1, 1)
    vae.train()
    error = ((rebuilt - clips) / 2).square().mean(dim=(1, 2, 3, 4))
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, batches: Batches, count: int) -> None:
    clips = (batches[index][0].to(vae.device) for index in range(count))
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in clips])
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the VAE, its log and its checkpoint")
    parser.add_argument("--start", type=Path, help="folder of a VAE to begin with")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--minutes", type=float, help="end the schedule after this long instead of after --steps")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_frames", type=int, default=17)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--kl_weight", type=float, default=3e-5)
    parser.add_argument("--edit_weight", type=float, default=2.0, help="extra weight of pixels that an edit changes")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that render clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=200)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.start is not None:
        vae = AutoencoderKLWan.from_pretrained(args.start, torch_dtype=torch.float32).to(device)
    else:
        vae = AutoencoderKLWan.from_config(VAE_CONFIG).to(device)
        # a posterior of unit variance would drown the first gradients in noise: start nearly deterministic
        torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -6.0)
    learned = torch.nn.ModuleDict({"vae": vae})
    kernels = block_matrices(vae, kinds=(torch.nn.Conv2d, torch.nn.Conv3d))
    optimizer = MuonAdamW(kernels, vae.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    batches = Batches(BenchmarkItems(TRAIN_LEVELS, args.seed, "train", args.num_frames), args.batch_size)
    unseen = Batches(BenchmarkItems(TRAIN_LEVELS, 1_000_000), 16)[0][0].to(device)

    step, spent = 0, 0.0
    if checkpoints(args.output):
        state = load_checkpoint(checkpoints(args.output)[-1], {}, learned, optimizer)
        step, spent = state["step"], state["seconds"]
    started = time.monotonic() - spent

    def progress() -> float:
        return (time.monotonic() - started) / (60 * args.minutes) if args.minutes else step / args.steps

    bar = tqdm(total=None if args.minutes else args.steps, initial=step, unit="step")
    log = open_log(args.output / "log.jsonl", step)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(step, 10_000_000), num_workers=args.num_workers
    )
    loaded = iter(loader)
    while progress() < 1.0:
        rate = args.learning_rate * warmup_cosine(step, 100, progress())
        for group in optimizer.param_groups:
            group["lr"] = rate
        clips, edited = (part.to(device) for part in next(loaded))
        weight = 1 + args.edit_weight * edited
        weight = weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True)
        with torch.autocast(device, torch.bfloat16, enabled=default_precision() == "bf16"):
            posterior = vae.encode(clips).latent_dist
            rebuilt = vae.decode(posterior.sample()).sample.float()
        error = rebuilt - clips
        l1, mse = (error.abs() * weight).mean(), (error.square() * weight).mean()
        kl = posterior.kl().sum() / posterior.mean.numel()
        loss = l1 + mse + args.kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % 20 == 0 or step % args.save_every == 0:
            entry = {
                "step": step,
                "l1": l1.item(),
                "psnr": -10 * math.log10(F.mse_loss(rebuilt, clips).item() / 4),
                "kl": kl.item(),
                "lr": rate,
            }
            bar.set_postfix(l1=f"{entry['l1']:.4f}", psnr=f"{entry['psnr']:.2f}", kl=f"{entry['kl']:.2f}")
            if step % args.save_every == 0:
                entry["psnr_unseen_photos"] = psnr(vae, unseen)
                state = {"step": step, "seconds": time.monotonic() - started}
                keep_latest(args.output, learned, optimizer, state)
            log.write(json.dumps(entry) + "\n")
            log.flush()

    vae.eval()
    set_latent_statistics(vae, Batches(BenchmarkItems(TRAIN_LEVELS, args.seed + 1, "train"), 8), 16)
    final = psnr(vae, unseen)
    log.write(json.dumps({"step": step, "psnr_unseen_photos": final, "seconds": time.monotonic() - started}) + "\n")
    vae.save_pretrained(args.output / "vae")
    print(f"{args.output / 'vae'}: {final:.2f} dB on clips over photographs never trained on")


if __name__ == "__main__":
    main()
