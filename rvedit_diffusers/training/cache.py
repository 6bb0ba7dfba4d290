"""What the frozen parts of a pipeline make of edit pairs, computed once and kept on disk."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..pipeline_rvedit import RVEDiTPipeline
from ..synthetic import SyntheticEdits


CHUNK_SIZE = 32  # edits in a file


def encode_latents(pipe: RVEDiTPipeline, clips: list[np.ndarray]) -> torch.Tensor:
    """Normalised latents of uint8 clips `(frames, height, width, 3)`; see [`RVEDiTPipeline.encode_video`]."""
    video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).to(pipe.vae.device)
    return pipe.encode_video(video.float() / 127.5 - 1.0)


@torch.no_grad()
def encode_edits(pipe: RVEDiTPipeline, edits: SyntheticEdits, indices: range) -> dict[str, torch.Tensor]:
    """Encode consecutive edits with the frozen VAE, MLLM and queries.

    Returns:
        `dict`: One row an edit: `latents` and `source_latents` `(batch, channels, frames, height, width)`; the MLLM's
        states in the editing branch, `edit_states` and `visual_states` (it has seen the source), and in the reference
        branch, `reference_edit_states` and `reference_visual_states` (it has seen the edited clip);
        `visual_positions`; `input_ids` and `attention_mask` of the instruction.
    """
    items = [edits[index] for index in indices]
    texts = [item.instruction for item in items]
    rows = {"latents": encode_latents(pipe, [item.target_frames for item in items])}

    # consecutive edits share their source clip: encode it once
    scenes = list(dict.fromkeys(item.scene for item in items))
    firsts = [next(item for item in items if item.scene == scene) for scene in scenes]
    source_latents = encode_latents(pipe, [item.source_frames for item in firsts])
    rows["source_latents"] = source_latents[[scenes.index(item.scene) for item in items]]

    for prefix, clips in (
        ("", [item.source_frames for item in items]),
        ("reference_", [item.target_frames for item in items]),
    ):
        inputs = pipe.processor(clips, texts).to(pipe.mllm.device)
        edit_states, visual_states, visual_positions, _ = pipe.distiller.harvest(pipe.mllm, inputs)
        rows |= {f"{prefix}edit_states": edit_states, f"{prefix}visual_states": visual_states}

    tokens = pipe.tokenizer(
        texts, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return {name: value.to("cpu", torch.bfloat16) for name, value in rows.items()} | {
        "visual_positions": visual_positions.cpu(),
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
    }


@torch.no_grad()
def fingerprint(pipe: RVEDiTPipeline, edits: SyntheticEdits) -> str:
    """A hash of all that [`encode_edits`] depends on: the edits' settings, the frozen weights, the processor."""
    settings = [vars(edits), pipe.processor.to_dict(), pipe.processor.chat_template]
    settings += [pipe.tokenizer.get_vocab(), pipe.tokenizer.model_max_length, pipe.processor.tokenizer.get_vocab()]
    settings += [dict(pipe.vae.config), pipe.mllm.config.to_dict(), dict(pipe.distiller.config)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    tensors = {"queries": pipe.distiller.queries} | pipe.vae.state_dict(prefix="vae.")
    for name, tensor in (tensors | pipe.mllm.state_dict(prefix="mllm.")).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def fill_cache(
    pipe: RVEDiTPipeline,
    edits: SyntheticEdits,
    num_edits: int,
    folder: str | Path,
    chunk_size: int = CHUNK_SIZE,
    rank: int = 0,
    num_processes: int = 1,
) -> list[Path]:
    """Encode the first `num_edits` edits into files of `chunk_size`, leaving out the files that exist.

    Args:
        pipe ([`RVEDiTPipeline`]): Its VAE, MLLM, queries, processor and tokenizer are used.
        edits ([`SyntheticEdits`]): What to encode.
        num_edits (`int`): A multiple of `chunk_size`.
        folder (`str` or `Path`): Where the files go.
        chunk_size (`int`, defaults to 32): Edits in a file.
        rank, num_processes (`int`): Processes that fill one folder together take turns.

    Returns:
        `list[Path]`: All files, in the order of the edits.

    Raises:
        ValueError: `num_edits` is no multiple of `chunk_size`; the VAE cannot encode the clips' length whole; or a
            file in `folder` is of other edits, or of a pipeline whose frozen parts differ.
    """
    step = pipe.vae_scale_factor_temporal
    if edits[0].scene.num_frames % step != 1:
        raise ValueError(f"`edits` has clips of {edits[0].scene.num_frames} frames, but the VAE encodes {step}k + 1")
    if num_edits < 1 or num_edits % chunk_size:
        raise ValueError(f"`num_edits` has to be a multiple of {chunk_size}, but is {num_edits}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"edits-{start:07d}.safetensors" for start in range(0, num_edits, chunk_size)]
    key = fingerprint(pipe, edits)
    for path in filter(Path.exists, paths):
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != key:
                raise ValueError(
                    f"`folder` has {path}, made of other edits or by other weights: remove it or take another folder"
                )
    for index in tqdm(range(rank, len(paths), num_processes), desc="encoding", unit="file", disable=rank > 0):
        if not paths[index].exists():
            rows = encode_edits(pipe, edits, range(index * chunk_size, (index + 1) * chunk_size))
            temporary = paths[index].with_suffix(f".partial{rank}")
            rows = {name: value.contiguous() for name, value in rows.items()}
            save_file(rows, temporary, metadata={"fingerprint": key})
            os.replace(temporary, paths[index])
    return paths


def load_cache(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Read the files of [`fill_cache`] into memory, one tensor a name."""
    chunks = [load_file(path) for path in paths]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
