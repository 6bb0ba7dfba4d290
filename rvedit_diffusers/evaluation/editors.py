"""What is scored: a pipeline, or edits of which is known how good they are."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import ProcessorMixin

from ..pipeline_rvedit import RVEDiTPipeline
from ..training.cache import hash_tensor
from ..training.sampler import generator


@dataclass(frozen=True)
class Task:
    """One clip to edit.

    Attributes:
        id (`str`): Names the task; the noise of its edit is a function of it alone.
        source (`np.ndarray` of shape `(frames, height, width, 3)`): uint8.
        instruction (`str`): What to change.
        target (`np.ndarray` of that shape, *optional*): The true edit, uint8, where there is one.
        fps (`float`, *optional*): Frames per second; by default what the pipeline takes arrays to have.
    """

    id: str
    source: np.ndarray
    instruction: str
    target: np.ndarray | None = None
    fps: float | None = None


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, clips: list[np.ndarray]) -> list[np.ndarray]:
    """Clips as an autoencoder alone gives them back: the ceiling of what an edit can reach.

    Args:
        vae (`AutoencoderKLWan`): The autoencoder of the editor.
        clips (`list[np.ndarray]`): At least one, all of one shape `(frames, height, width, 3)`, uint8. They are
            encoded as one batch, the last frame repeated up to a length that the autoencoder takes.

    Returns:
        `list[np.ndarray]`: Of the same shapes, uint8.

    Raises:
        ValueError: The height or width is not one that the autoencoder takes.
    """
    num_frames, *size, _ = clips[0].shape
    factor = vae.config.scale_factor_spatial
    if any(side % factor for side in size):
        raise ValueError(f"`clips` has to have a height and width divisible by {factor}, got {size[0]} x {size[1]}")
    video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)  # (batch, 3, frames, height, width)
    padding = -(num_frames - 1) % vae.config.scale_factor_temporal
    video = torch.cat([video, video[:, :, -1:].expand(-1, -1, padding, -1, -1)], dim=2)
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None) or vae.device  # it may rest elsewhere
    video = (video.to(device).float() / 127.5 - 1.0).to(vae.dtype)
    rebuilt = vae.decode(vae.encode(video).latent_dist.mode()).sample[:, :, :num_frames].float().clamp(-1, 1)
    return list(((rebuilt + 1.0) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy())


class CopySource:
    """Gives the sources back: no edit succeeds, and nothing is spoiled."""

    def __call__(self, tasks: list[Task]) -> list[np.ndarray]:
        return [task.source for task in tasks]


class VaeCeiling:
    """Gives the true edits back as an autoencoder does: what an editor that returns decoded clips cannot
    exceed. One that applies the change to the clip itself (`keep_detail`) can, outside of what it edits.

    Args:
        vae (`AutoencoderKLWan`): See [`reconstruct`].
    """

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = vae

    def __call__(self, tasks: list[Task]) -> list[np.ndarray]:
        return reconstruct(self.vae, [task.target for task in tasks])


class PipelineEditor:
    """Edits clips with a pipeline.

    Args:
        pipe ([`RVEDiTPipeline`]): On its device.
        **options: Of its call, `num_inference_steps`, `guidance_scale`, `height` and `width` say; `None` are the
            pipeline's own.
    """

    def __init__(self, pipe: RVEDiTPipeline, **options):
        self.pipe, self.options = pipe, options

    def __call__(self, tasks: list[Task]) -> list[np.ndarray]:
        """Edit a batch of clips.

        Args:
            tasks (`list[Task]`): Of one length and size; all with `fps`, or none.

        Returns:
            `list[np.ndarray]`: Clips of the sources' shapes, uint8.

        Raises:
            ValueError: The pipeline does not take such clips.
        """
        rates = [task.fps for task in tasks]
        output = self.pipe(
            [task.source for task in tasks],
            [task.instruction for task in tasks],
            generator=[generator("evaluation", task.id) for task in tasks],
            fps=None if None in rates else rates,
            output_type="pt",
            keep_size=True,
            **self.options,
        )
        return [(clip.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for clip in output.frames]


def weights_hash(modules: Mapping[str, nn.Module]) -> str:
    """What tells models from each other, wherever they were loaded from: 16 digits of a hash of all weights.

    Args:
        modules (`Mapping[str, nn.Module]`): By name.
    """
    tensors = [item for name, module in modules.items() for item in module.state_dict(prefix=f"{name}.").items()]
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as executor:  # hashing releases the interpreter's lock
        for part in executor.map(hash_tensor, *zip(*tensors, strict=True)):
            digest.update(part)
    return digest.hexdigest()[:16]


def configs_hash(pipe: RVEDiTPipeline) -> str:
    """What tells pipelines with the same weights from each other: 16 digits of a hash of their configurations.

    Args:
        pipe ([`RVEDiTPipeline`]): What it and its components are configured with, but for folders and versions.
    """
    configs = {}
    for name, part in {"pipeline": pipe, **pipe.components}.items():
        config = part.to_dict() if isinstance(part, ProcessorMixin) else getattr(part, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        configs[name] = {k: value for k, value in config.items() if k[0] != "_" and k != "transformers_version"}
    tokenizers = [pipe.tokenizer, getattr(pipe.processor, "tokenizer", None)]
    configs["vocabularies"] = [tokenizer and tokenizer.get_vocab() for tokenizer in tokenizers]
    configs["chat_template"] = getattr(pipe.processor, "chat_template", None)
    return hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_name(model: str) -> str:
    """How a model is called in what is written: its Hub id, or the last two names of its folder's path."""
    return "/".join(Path(model).resolve().parts[-2:]) if Path(model).exists() else model
