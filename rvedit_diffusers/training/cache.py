"""What the frozen parts of a pipeline make of edit pairs, computed once and kept on disk, a file for each pair."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils.torch_utils import get_module_execution_device
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..pipeline_rvedit import RVEDiTPipeline
from .data import Bucket
from .pairs import EditPairs


TOKENS = ("tokens", "states", "none")
TEXTS = ("embeds", "ids")
SAME_IN_CAPTIONED = {  # what a captioned clip, a pair of one clip, has no second time on disk
    "latents": "source_latents",
    "reference_edit_tokens": "edit_tokens",
    "reference_visual_tokens": "visual_tokens",
}
VERSION = 3  # to be raised when `encode_pairs` makes something else of the same pair
IN_TURNS = 16  # pairs that one model encodes before the next, where they take turns on a device
MAX_TEXT_LENGTH = 512  # as the pipeline's `max_sequence_length`


def text_length(pipe: RVEDiTPipeline) -> int:
    """Tokens that every instruction is padded or cut to."""
    return min(MAX_TEXT_LENGTH, pipe.tokenizer.model_max_length)


def fingerprint(pipe: RVEDiTPipeline, tokens: str, text: str) -> str:
    """A hash of all that [`encode_pairs`] depends on besides the pairs: weights and settings of the frozen parts."""
    configs = (dict(pipe.vae.config), pipe.mllm.config.to_dict(), dict(pipe.distiller.config))
    # not the folder that they were loaded from
    configs = [{name: value for name, value in each.items() if name != "_name_or_path"} for each in configs]
    if tokens != "tokens":
        del configs[-1]["dim"]  # of the connectors, that of the transformer
    settings = [VERSION, tokens, text, *configs]
    settings += [pipe.processor.to_dict(), pipe.processor.chat_template, pipe.processor.tokenizer.get_vocab()]
    settings += [pipe.tokenizer.get_vocab(), text_length(pipe)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    modules = {"vae": pipe.vae, "mllm": pipe.mllm}
    if tokens == "tokens":
        modules["distiller"] = pipe.distiller
    else:
        digest.update(hash_tensor("queries", pipe.distiller.queries))
    if text == "embeds":
        modules["text_encoder"] = pipe.text_encoder
    tensors = [item for prefix, module in modules.items() for item in module.state_dict(prefix=f"{prefix}.").items()]
    with ThreadPoolExecutor() as executor:  # hashing releases the interpreter's lock
        for part in executor.map(hash_tensor, *zip(*tensors, strict=True)):
            digest.update(part)
    return digest.hexdigest()


def hash_tensor(name: str, tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def cache_paths(folder: str | Path, pairs: EditPairs, model_key: str) -> list[Path]:
    """The file of each pair. Its name is a hash of all that it was made of, so that no other file is ever taken."""
    names = (hashlib.sha256(f"{model_key}{pairs.key(index)}".encode()).hexdigest() for index in range(len(pairs)))
    return [Path(folder) / f"{name}.safetensors" for name in names]


def to_video(clips: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 clips `(num_frames, height, width, 3)` as `(batch, 3, num_frames, height, width)` float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


@torch.no_grad()
def encode_pairs(
    pipe: RVEDiTPipeline,
    pairs: EditPairs,
    batches: Sequence[Sequence[int]],
    tokens: str = "tokens",
    text: str = "embeds",
) -> list[list[dict[str, torch.Tensor]]]:
    """Encode batches of pairs, model by model: with model offload each is moved to the device once.

    Args:
        pipe ([`RVEDiTPipeline`]): Its VAE, MLLM, distiller, processor, tokenizer and text encoder are used.
        pairs ([`EditPairs`]): What to encode.
        batches (`Sequence[Sequence[int]]`): Indices of pairs that are encoded together, each time of one bucket.
        tokens (`str`): `"tokens"`: what the whole distiller makes; `"states"`: the MLLM's states, for connectors that
            learn; `"none"`: nothing, for queries that learn.
        text (`str`): `"embeds"`: what the text encoder makes; `"ids"`: its inputs, for a text encoder that learns.

    Returns:
        `list[list[dict]]`: For each pair of each batch `latents` and `source_latents` `(channels, latent_frames,
        latent_height, latent_width)`; `edit_tokens` and `visual_tokens` `(num, dim)` of the editing branch, whose MLLM
        has seen the source, and `reference_edit_tokens` and `reference_visual_tokens` of the reference branch, whose
        MLLM has seen the edited clip; `visual_positions` `(num, 3)`, float32; `prompt_embeds` `(length, text_dim)`
        without padding, or `input_ids` and `attention_mask` `(model_max_length,)`. What is not said otherwise is
        bfloat16. Where all pairs are captioned clips, whose `load` gives one array twice, there is only what comes of
        the source.
    """
    loaded = [[*zip(*(pairs.load(index) for index in indices), strict=True)] for indices in batches]
    texts = [[pairs.instruction(index) for index in indices] for indices in batches]

    # 1. Latents
    encoded = [_encode_latents(pipe, *clips) for clips in loaded]
    pipe.maybe_free_model_hooks()

    # 2. Tokens of both branches
    if tokens != "none":
        for indices, rows, (sources, edited), said in zip(batches, encoded, loaded, texts, strict=True):
            read = {"": sources, "reference_": edited} if "latents" in rows else {"": sources}
            for prefix, clips in read.items():
                rates = [pairs.fps(index) for index in indices]
                inputs = pipe.processor(list(clips), said, fps=rates).to(get_module_execution_device(pipe.mllm))
                states = pipe.distiller.harvest(pipe.mllm, inputs)
                assert states[3] is None  # clips of one size have equally many visual tokens
                rows |= dict(zip((f"{prefix}edit_tokens", f"{prefix}visual_tokens"), states))
                rows["visual_positions"] = states[2]
        for rows in encoded if tokens == "tokens" else ():
            for prefix in ("", "reference_"):
                names = (f"{prefix}edit_tokens", f"{prefix}visual_tokens")
                if names[0] in rows:
                    rows |= dict(zip(names, pipe.distiller.connect(*(rows[name] for name in names)), strict=True))
        pipe.maybe_free_model_hooks()

    # 3. Texts
    found = []
    for rows, said in zip(encoded, texts, strict=True):
        dtypes = {name: torch.float32 if name == "visual_positions" else torch.bfloat16 for name in rows}
        samples = [{name: value[i].to("cpu", dtypes[name]) for name, value in rows.items()} for i in range(len(said))]
        rows.clear()
        found.append([sample | row for sample, row in zip(samples, encode_texts(pipe, said, text), strict=True)])
    pipe.maybe_free_model_hooks()
    return found


def _encode_latents(
    pipe: RVEDiTPipeline, sources: Sequence[np.ndarray], edited: Sequence[np.ndarray]
) -> dict[str, torch.Tensor]:
    # Several edits of one clip stand next to each other in some data: the clip is encoded once
    keys = [clip.tobytes() for clip in sources]
    unique = dict(zip(keys, sources, strict=True))
    source_latents = pipe.encode_video(to_video(list(unique.values())))
    rows = {"source_latents": source_latents[[list(unique).index(key) for key in keys]]}
    if any(source is not clip for source, clip in zip(sources, edited, strict=True)):  # else captioned clips
        rows["latents"] = pipe.encode_video(to_video(edited))
    return rows


@torch.no_grad()
def encode_texts(pipe: RVEDiTPipeline, texts: Sequence[str], text: str = "embeds") -> list[dict[str, torch.Tensor]]:
    """The part of [`encode_pairs`] that depends on the instructions alone."""
    length = text_length(pipe)
    texts = [prompt_clean(text) for text in texts]  # as `encode_prompt` does
    inputs = pipe.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    if text == "ids":
        rows = zip(inputs.input_ids, inputs.attention_mask, strict=True)
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in rows]
    embeds, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
    counts = inputs.attention_mask.sum(1).tolist()
    return [
        {"prompt_embeds": row[:count].to("cpu", torch.bfloat16)} for row, count in zip(embeds, counts, strict=True)
    ]


def fill_cache(
    pipe: RVEDiTPipeline,
    pairs: EditPairs,
    folder: str | Path,
    tokens: str = "tokens",
    text: str = "embeds",
    batch_size: int = 1,
    rank: int = 0,
    num_processes: int = 1,
    model_key: str | None = None,
    device: torch.device | None = None,
) -> list[Path]:
    """Encode the pairs whose files do not exist.

    A file is written whole or not at all, so filling may be stopped anywhere, and several processes and runs may share
    a folder.

    Args:
        pipe, pairs, tokens, text: See [`encode_pairs`].
        folder (`str` or `Path`): Where the files go.
        batch_size (`int`, defaults to 1): Pairs that are encoded together.
        rank, num_processes (`int`): Processes that fill one folder together take turns.
        model_key (`str`, *optional*): What [`fingerprint`] returns for these arguments, where it is known already.
        device (`torch.device`, *optional*): The pipeline is moved there if there is something to encode, or its parts
            are in turns if a GPU cannot hold them all.

    Returns:
        `list[Path]`: The file of each pair.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if rank == 0:
        for path in Path(folder).glob("*.partial*"):
            with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                if time.time() - path.stat().st_mtime > 3600:  # of a process that was killed
                    path.unlink()
    paths = cache_paths(folder, pairs, model_key or fingerprint(pipe, tokens, text))
    members: dict[Bucket, list[int]] = {}
    for index in range(len(pairs)):
        members.setdefault(pairs.bucket(index), []).append(index)
    # shared out whatever exists already: processes that start at different times would not agree on that
    batches = [
        indices[start : start + batch_size]
        for indices in members.values()
        for start in range(0, len(indices), batch_size)
    ][rank::num_processes]
    missing = [batch for batch in ([i for i in batch if not paths[i].exists()] for batch in batches) if batch]
    if missing and device is not None:
        _move_encoders(pipe, device)
    # models that take turns on the device take them seldom
    at_once = max(IN_TURNS // batch_size, 1) if getattr(pipe, "_all_hooks", ()) else 1
    with tqdm(total=len(missing), desc="encoding", unit="batch", disable=rank > 0 or not missing) as bar:
        for some in (missing[start : start + at_once] for start in range(0, len(missing), at_once)):
            for indices, samples in zip(some, encode_pairs(pipe, pairs, some, tokens, text), strict=True):
                for index, sample in zip(indices, samples, strict=True):
                    _write(paths[index], sample)
            bar.update(len(some))
    return paths


def _move_encoders(pipe: RVEDiTPipeline, device: torch.device) -> None:
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    size = sum(parameter.nbytes for parameter in parameters if parameter.device.type != device.type)
    if device.type == "cuda" and size > 0.7 * torch.cuda.mem_get_info(device)[0]:
        pipe.enable_model_cpu_offload(device=device)  # one after the other
    else:
        pipe.to(device)


def cached_null_text(
    pipe: RVEDiTPipeline, folder: str | Path, text: str, model_key: str, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """The empty instruction as the cache holds instructions, in rows of full length; encoded once, like the pairs.

    Args:
        pipe, folder, text, model_key, device: See [`fill_cache`].
    """
    path = Path(folder) / f"{hashlib.sha256(f'{model_key}no instruction'.encode()).hexdigest()}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        runs_on = get_module_execution_device(pipe.text_encoder)
        if text != "ids" and device is not None and runs_on.type != device.type:
            pipe.text_encoder.to(device)
        _write(path, encode_texts(pipe, [""], text)[0])
    return _read(path, text_length(pipe))


def _write(path: Path, sample: dict[str, torch.Tensor]) -> None:
    temporary = path.with_suffix(f".partial{os.getpid()}")
    save_file({name: value.contiguous() for name, value in sample.items()}, temporary)
    os.replace(temporary, path)


def _read(path: Path, text_length: int) -> dict[str, torch.Tensor]:
    sample = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    for name, source in SAME_IN_CAPTIONED.items():
        if source in sample:
            sample.setdefault(name, sample[source])
    if "prompt_embeds" in sample:
        padding = (0, 0, 0, text_length - len(sample["prompt_embeds"]))
        sample["prompt_embeds"] = torch.nn.functional.pad(sample["prompt_embeds"], padding)
    return sample


class CachedPairs(torch.utils.data.Dataset):
    """Samples of [`fill_cache`] by index: tensors by name, floating point in float32.

    Args:
        paths (`Sequence[Path]`): What [`fill_cache`] returned.
        text_length (`int`): `prompt_embeds` are padded with zeros to this many rows, as in the pipeline.
    """

    def __init__(self, paths: Sequence[Path], text_length: int):
        self.paths, self.text_length = list(paths), text_length

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _read(self.paths[index], self.text_length)
