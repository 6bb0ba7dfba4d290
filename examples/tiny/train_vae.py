"""Train the small `AutoencoderKLWan` of the embedded checkpoint on synthetic clips, resumably.

Encoder and decoder first learn apart, with the principal components of the clips as the code between them: the encoder
to give the components of a clip, the decoder to give a clip from its components. Then they learn together. Together
from nothing they need hours to get as good as the components alone.

python examples/tiny/train_vae.py --output runs/vae
python -m torch.distributed.run --nproc_per_node 2 examples/tiny/train_vae.py --output runs/vae
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import AutoencoderKLWan
from torch import nn
from tqdm import tqdm

from rvedit_diffusers.synthetic import TRAIN_LEVELS, BenchmarkItems
from rvedit_diffusers.training.checkpoint import checkpoints, keep_latest, load_checkpoint, open_log
from rvedit_diffusers.training.optimizers import MuonAdamW, block_matrices, warmup_cosine
from rvedit_diffusers.training.options import default_precision


LATENT_CHANNELS = 32
NUM_FITTED_CLIPS = 400  # that the axes of components and latents are computed from
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
    """Batch number `index`: sources and true edits of items in turns, `(batch, 3, frames, height, width)` uint8, and
    where the two differ, `(batch, 1, frames, height, width)` bool. After `num_items` the items come again, flipped
    another way; they are kept, so that they are rendered once."""

    def __init__(self, items: BenchmarkItems, batch_size: int, num_items: int = 2**62):
        self.items, self.batch_size, self.num_items, self.kept = items, batch_size, num_items, {}

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = index * self.batch_size // 2
        chosen = [self._item((first + number) % self.num_items) for number in range(self.batch_size // 2)]
        flips = [axis for bit, axis in enumerate((-2, -1)) if first // self.num_items >> bit & 1]
        clips, edited = (torch.cat(parts).flip(flips) for parts in zip(*chosen, strict=True))
        return clips, edited

    def _item(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if number in self.kept:
            return self.kept[number]
        item = self.items[number]
        clips = torch.from_numpy(np.stack([item.source_frames, item.target_frames])).permute(0, 4, 1, 2, 3)
        both = clips.contiguous(), torch.from_numpy(item.mask)[None, None].repeat(2, 1, 1, 1, 1)
        if self.num_items < 2**62:
            self.kept[number] = both
        return both


def to_range(clips: torch.Tensor) -> torch.Tensor:
    return clips.float() / 127.5 - 1.0


def split_cells(clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What one latent sees at least: `(batch, frames, rows, columns, numbers)` of the first frame, 8x8 pixels each,
    and of the others, 8x8 pixels of 4 frames."""
    batch, channels, _, height, width = clips.shape
    parts = []
    for part, frames in ((clips[:, :, :1], 1), (clips[:, :, 1:], 4)):
        part = part.reshape(batch, channels, -1, frames, height // 8, 8, width // 8, 8)
        parts.append(part.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4))
    return tuple(parts)


def join_cells(first: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    parts = []
    for part, frames in ((first, 1), (others, 4)):
        batch, length, rows, columns, _ = part.shape
        part = part.reshape(batch, length, rows, columns, -1, frames, 8, 8).permute(0, 4, 1, 5, 2, 6, 3, 7)
        parts.append(part.reshape(batch, -1, length * frames, rows * 8, columns * 8))
    return torch.cat(parts, dim=2)


class PrincipalComponents(nn.Module):
    """The linear code of clips that loses least: as many numbers for each cell of [`split_cells`] as the autoencoder
    has channels, all of unit variance."""

    def __init__(self, num_components: int):
        super().__init__()
        for name, size in (("first", 3 * 64), ("others", 3 * 256)):
            self.register_parameter(f"{name}_mean", nn.Parameter(torch.zeros(size), requires_grad=False))
            self.register_parameter(
                f"{name}_basis", nn.Parameter(torch.zeros(size, num_components), requires_grad=False)
            )
            self.register_parameter(f"{name}_std", nn.Parameter(torch.ones(num_components), requires_grad=False))

    def parts(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        return [
            (self.first_mean, self.first_basis, self.first_std),
            (self.others_mean, self.others_basis, self.others_std),
        ]

    @torch.no_grad()
    def fit(self, clips: torch.Tensor) -> None:
        for cells, (mean, basis, std) in zip(split_cells(clips), self.parts(), strict=True):
            cells = cells.flatten(0, -2).double()
            mean.copy_(cells.mean(0))
            values, vectors = torch.linalg.eigh(cells.T.cov())  # ascending
            basis.copy_(vectors[:, -len(std) :].flip(1))
            std.copy_(values[-len(std) :].flip(0).sqrt())
        # a channel has one meaning in all frames: as the code of a first frame, one inside a clip correlates with its
        first = [self.encode(torch.stack([frame] * 5, dim=2))[:, :, 0] for frame in clips[:, :, 1:5].unbind(2)]
        likeness = torch.einsum("bchw,bdhw->cd", sum(first), self.encode(clips)[:, :, 1])
        order, left = torch.empty(len(likeness), dtype=torch.long), likeness.abs()
        for _ in order:
            own, other = divmod(int(left.argmax()), len(left))
            order[other] = own
            left[own], left[:, other] = -1.0, -1.0
        signs = likeness[order, torch.arange(len(order))].sign()
        self.first_basis.copy_(self.first_basis[:, order] * signs)
        self.first_std.copy_(self.first_std[order])

    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """`(batch, components, frames, rows, columns)`, as of the autoencoder's latents."""
        codes = [
            (cells - mean) @ basis / std
            for cells, (mean, basis, std) in zip(split_cells(clips), self.parts(), strict=True)
        ]
        return torch.cat(codes, dim=1).permute(0, 4, 1, 2, 3)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        codes = codes.permute(0, 2, 3, 4, 1)
        cells = [
            (code * std) @ basis.T + mean
            for code, (mean, basis, std) in zip((codes[:, :1], codes[:, 1:]), self.parts(), strict=True)
        ]
        return join_cells(*cells)

    def weights(self, num_latent_frames: int) -> torch.Tensor:
        """What an error of each component costs, `(components, frames, 1, 1)`: in proportion to its deviation."""
        first, others = (std / std.mean() for _, _, std in self.parts())
        return torch.stack([first] + [others] * (num_latent_frames - 1), dim=1)[:, :, None, None]


class Reconstruction(nn.Module):
    """The losses of a batch, of encoder and decoder apart or together.

    Args:
        vae (`AutoencoderKLWan`): Learns.
        components ([`PrincipalComponents`]): The code while they learn apart.
        edit_weight (`float`): Extra weight of pixels that an edit changes.
        kl_weight (`float`): Of the divergence of the posterior, when they learn together.
        noise (`float`): Deviation of what is added to the components that the decoder learns from.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        components: PrincipalComponents,
        edit_weight: float,
        kl_weight: float,
        noise: float = 0.1,
    ):
        super().__init__()
        self.vae, self.components = vae, components
        self.edit_weight, self.kl_weight, self.noise = edit_weight, kl_weight, noise

    def forward(self, clips: torch.Tensor, edited: torch.Tensor, is_apart: bool) -> dict[str, torch.Tensor]:
        posterior = self.vae.encode(clips).latent_dist
        kl = posterior.kl().sum() / posterior.mean.numel()
        if is_apart:
            codes = self.components.encode(clips)
            error = (posterior.mean.float() - codes).square()
            prior = (error * self.components.weights(codes.shape[2])).mean()
            latents = codes + self.noise * torch.randn_like(codes)
        else:
            prior = self.kl_weight * kl
            latents = posterior.sample()
        error = self.vae.decode(latents).sample.float() - clips
        weight = 1 + self.edit_weight * edited
        weight = weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True)
        l1, mse = (error.abs() * weight).mean(), (error.square() * weight).mean()
        return {
            "loss": l1 + mse + prior,
            "l1": l1.detach(),
            "mse": error.detach().square().mean(),
            "code" if is_apart else "kl": (prior if is_apart else kl).detach(),
        }


def psnr(rebuilt: torch.Tensor, clips: torch.Tensor) -> float:
    error = ((rebuilt.clamp(-1, 1) - clips) / 2).square().mean(dim=(1, 2, 3, 4))
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def measure(
    vae: AutoencoderKLWan, clips: torch.Tensor, components: PrincipalComponents | None = None
) -> dict[str, float]:
    """PSNR in dB of clips through the autoencoder, and through either half of it with the components as the other."""
    latents = vae.encode(clips).latent_dist.mode()
    values = {"psnr_unseen_photos": psnr(vae.decode(latents).sample, clips)}
    if components is not None:
        values["psnr_encoder"] = psnr(components.decode(latents), clips)
        values["psnr_decoder"] = psnr(vae.decode(components.encode(clips)).sample, clips)
    return values


@torch.no_grad()
def order_latents(vae: AutoencoderKLWan, clips: torch.Tensor, exponent: float = 0.75) -> None:
    """Turn the latents so that channels do not correlate, the first changes the pixels most and the last least, and
    their deviations are the deviations in pixels that they stand for, to the power of `exponent`.

    What is decoded stays. A diffusion model draws channels of equal deviation at one time, fine detail with the
    largest forms; like this it draws coarse before fine, and errors cost what they look like. The decoder is taken
    for linear; the posterior's variance gets the same for all clips.
    """
    latents = torch.cat([vae.encode(some).latent_dist.mode() for some in clips.split(8)])
    pixels = split_cells(clips)[1].flatten(0, -2).double()
    own = latents.movedim(1, -1).flatten(0, -2).double()
    mean, (values, vectors) = own.mean(0), torch.linalg.eigh(own.T.cov())
    root, inverse_root = (vectors * values.pow(power) @ vectors.T for power in (0.5, -0.5))
    moved = latents[:, :, 1:].movedim(1, -1).flatten(0, -2).double() - mean
    white = torch.cat([moved @ inverse_root, torch.ones_like(moved[:, :1])], dim=1)
    turned, std, _ = torch.linalg.svd(torch.linalg.lstsq(white, pixels).solution[:-1], full_matrices=False)
    std = std.pow(exponent)
    std = std / std.square().mean().sqrt()
    there, back = (inverse_root @ turned * std).T, root @ turned / std  # of columns

    channels, kernel = vae.config.z_dim, (..., None, None, None)
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    weight, post_weight = quant.weight[:channels, :, 0, 0, 0].double(), post_quant.weight[:, :, 0, 0, 0].double()
    quant.weight[:channels] = (there @ weight)[kernel].to(quant.weight)
    quant.bias[:channels] = (there @ (quant.bias[:channels].double() - mean)).to(quant.bias)
    quant.weight[channels:] = 0.0
    quant.bias[channels:] = -6.0
    post_quant.bias += (post_weight @ mean).to(post_quant.bias)
    post_quant.weight.copy_((post_weight @ back)[kernel])
    vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the VAE, its log and its checkpoint")
    parser.add_argument("--start", type=Path, help="folder of a VAE to begin with: its halves learn together only")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="end the schedule after this long instead of after --steps")
    parser.add_argument("--apart", type=float, default=0.35, help="share of the schedule in which they learn apart")
    parser.add_argument("--batch_size", type=int, default=4, help="clips of a process in a step; even")
    parser.add_argument("--num_frames", type=int, default=9)
    parser.add_argument("--num_items", type=int, default=4000, help="sources with their edits that a process renders")
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--kl_weight", type=float, default=3e-5)
    parser.add_argument("--edit_weight", type=float, default=4.0, help="extra weight of pixels that an edit changes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=200)
    args = parser.parse_args()
    if args.batch_size < 2 or args.batch_size % 2:
        parser.error(f"--batch_size {args.batch_size} has to be even, for each source comes with its edit")
    if args.num_frames < 5 or args.num_frames % 4 != 1:
        parser.error(f"--num_frames {args.num_frames} has to be 4 k + 1 and more than 1, such as 9")
    if not 0.0 <= args.apart <= 1.0:
        parser.error(f"--apart {args.apart} has to be a share between 0 and 1")
    apart = 0.0 if args.start is not None else args.apart

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=default_precision())
    device, rank, is_main = accelerator.device, accelerator.process_index, accelerator.is_main_process
    torch.manual_seed(args.seed)
    if args.start is not None:
        vae = AutoencoderKLWan.from_pretrained(args.start, torch_dtype=torch.float32)
    else:
        vae = AutoencoderKLWan.from_config(VAE_CONFIG)
        # a posterior of unit variance would drown the first gradients in noise: start nearly deterministic
        torch.nn.init.constant_(vae.quant_conv.bias[vae.config.z_dim :], -6.0)
    components = PrincipalComponents(vae.config.z_dim)
    learned = Reconstruction(vae, components, args.edit_weight, args.kl_weight).to(device)
    kernels = block_matrices(vae, kinds=(nn.Conv2d, nn.Conv3d))
    optimizer = MuonAdamW(kernels, vae.parameters(), args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    items = BenchmarkItems(TRAIN_LEVELS, args.seed, "train", args.num_frames)
    batches = Batches(items, args.batch_size, args.num_items * accelerator.num_processes)
    unseen = to_range(Batches(BenchmarkItems(TRAIN_LEVELS, 1_000_000), 16)[0][0].to(device))

    def some_clips() -> torch.Tensor:
        items = BenchmarkItems(TRAIN_LEVELS, args.seed + 2, "train", args.num_frames)
        return to_range(Batches(items, NUM_FITTED_CLIPS)[0][0].to(device))

    step, spent = 0, 0.0
    if checkpoints(args.output):
        state = load_checkpoint(checkpoints(args.output)[-1], {}, learned, optimizer)
        step, spent = state["step"], state["seconds"]
    else:
        components.fit(some_clips())
        if is_main:
            print(f"principal components alone: {psnr(components.decode(components.encode(unseen)), unseen):.2f} dB")
    model = accelerator.prepare_model(learned)
    started = time.monotonic() - spent

    def progress() -> float:
        if not args.minutes:
            return step / args.steps
        elapsed = torch.tensor([(time.monotonic() - started) / (60 * args.minutes)], device=device)
        return float(broadcast(elapsed))  # all processes have to stop together

    bar = tqdm(total=None if args.minutes else args.steps, initial=step, unit="step", disable=not is_main)
    log = open_log(args.output / "log.jsonl", step) if is_main else None
    while (done := progress()) < 1.0:
        rate = args.learning_rate * warmup_cosine(step, 20, done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = step * accelerator.num_processes + rank
        torch.manual_seed(args.seed + index)  # noise is the same whether a training was stopped or not
        clips, edited = (part.to(device) for part in batches[index])
        losses = model(to_range(clips), edited, is_apart=done < apart)
        accelerator.backward(losses["loss"])
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        is_saved = step % args.save_every == 0
        if is_main and (step % 20 == 0 or is_saved):
            entry = {name: value.item() for name, value in losses.items()}
            entry = {"step": step, "psnr": -10 * math.log10(entry.pop("mse") / 4), **entry, "lr": rate}
            bar.set_postfix({name: f"{value:.3f}" for name, value in entry.items() if name not in ("step", "lr")})
            if is_saved:
                entry |= measure(vae, unseen, components if done < apart else None)
                keep_latest(args.output, learned, optimizer, {"step": step, "seconds": time.monotonic() - started})
            log.write(json.dumps(entry) + "\n")
            log.flush()

    if is_main:
        order_latents(vae, some_clips())
        final = measure(vae, unseen)
        log.write(json.dumps({"step": step, **final, "seconds": time.monotonic() - started}) + "\n")
        vae.save_pretrained(args.output / "vae")
        print(
            f"{args.output / 'vae'}: {final['psnr_unseen_photos']:.2f} dB on clips over photographs never trained on"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
