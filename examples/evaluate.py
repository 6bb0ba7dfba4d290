"""Score a pipeline on synthetic edits that it has never seen: one line for each kind of edit.

python examples/evaluate.py --seed 1234
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline
from rvedit_diffusers.synthetic import (
    NEW_OPERATIONS,
    OPERATIONS,
    TEST_PHOTOS,
    TRAIN_PHOTOS,
    SyntheticEdits,
    judge,
    outside_psnr,
)
from rvedit_diffusers.video import write_strip


EVALUATION_SEED = 5_000_000  # training and its validation use seeds far below


@torch.no_grad()
def reconstruct(pipe: RVEDiTPipeline, clip: np.ndarray) -> np.ndarray:
    """The clip as the VAE alone gives it back: the ceiling of what an edit can reach."""
    video = torch.from_numpy(clip)[None].permute(0, 4, 1, 2, 3).to(pipe.vae.device, pipe.vae.dtype) / 127.5 - 1.0
    rebuilt = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode()).sample[0].float().clamp(-1, 1)
    return ((rebuilt + 1.0) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY_CHECKPOINT, help="folder or Hub id of a pipeline")
    parser.add_argument("--lora", help="folder or Hub id of LoRA weights to add")
    parser.add_argument("--seed", type=int, default=0, help="names the scenes")
    parser.add_argument("--num_samples", type=int, default=64, help="scenes of each kind")
    parser.add_argument("--kinds", nargs="+", choices=(*OPERATIONS, *NEW_OPERATIONS), default=OPERATIONS)
    parser.add_argument("--unseen_photos", action="store_true", help="backgrounds over photographs never trained on")
    parser.add_argument("--num_inference_steps", type=int, help="the checkpoint's own by default")
    parser.add_argument("--guidance_scale", type=float, help="the checkpoint's own by default")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for results.json and a strip of clips for each kind")
    args = parser.parse_args()
    if args.num_samples < 1 or args.batch_size < 1:
        parser.error("--num_samples and --batch_size have to be at least 1")

    pipe = RVEDiTPipeline.from_pretrained(args.model).to(args.device)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    pipe.set_progress_bar_config(disable=True)
    photos = TEST_PHOTOS if args.unseen_photos else TRAIN_PHOTOS
    results = {}
    print(f"{'kind':10s} {'success':>8s} {'outside_psnr':>13s} {'vae_psnr':>9s} {'n':>4s}")
    for kind in args.kinds:
        edits = SyntheticEdits(EVALUATION_SEED + args.seed, operations=(kind,), photos=photos)
        verdicts, outside, ceiling, strips = [], [], [], []
        with tqdm(total=args.num_samples, desc=kind, leave=False) as bar:
            for start in range(0, args.num_samples, args.batch_size):
                batch = [edits[index] for index in range(start, min(start + args.batch_size, args.num_samples))]
                clips = pipe(
                    [edit.source_frames for edit in batch],
                    [edit.instruction for edit in batch],
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
                    output_type="np",
                ).frames
                for edit, clip in zip(batch, (clips * 255).round().astype(np.uint8), strict=True):
                    verdicts.append(judge(clip, edit))
                    outside.append(outside_psnr(clip, edit))
                    ceiling.append(outside_psnr(reconstruct(pipe, edit.target_frames), edit))
                    strips.append((edit, clip))
                bar.update(len(batch))
        labels = [verdict.partition(":")[0] for verdict in verdicts]
        results[kind] = {
            "success": labels.count("success") / len(labels),
            "outside_psnr": float(np.mean(outside)),
            "vae_psnr": float(np.mean(ceiling)),
            "n": len(labels),
            "failures": {label: labels.count(label) for label in sorted(set(labels) - {"success"})},
        }
        row = results[kind]
        print(f"{kind:10s} {row['success']:8.2f} {row['outside_psnr']:13.2f} {row['vae_psnr']:9.2f} {row['n']:4d}")
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            for number, (edit, clip) in enumerate(strips[:8]):
                rows = {"source": edit.source_frames, edit.instruction: clip, "target": edit.target_frames}
                write_strip(args.output / f"{kind}-{number}.png", rows)
    if args.output:
        (args.output / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
