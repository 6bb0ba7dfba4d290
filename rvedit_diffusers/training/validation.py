"""Whether a training learns: losses on pairs it never trains on, the pull of each loss, and edits to look at."""

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..losses import flow_matching_loss
from ..pipeline_rvedit import RVEDiTPipeline
from ..video import write_strip, write_video
from .cache import CachedPairs
from .pairs import EditPairs
from .sampler import generator
from .samples import Samples


VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


class FixedDraws:
    """What [`Draws`] is for training, the same at every validation of every run: nothing is dropped.

    The number of a sample is `pair * len(VALIDATION_SIGMAS) + level`: a pair has the same noise at every level.

    Args:
        positions (`Callable`, *optional*): A [`Draws`] whose `align_positions` are taken; by default there are none.
    """

    def __init__(self, positions: Callable[[int, torch.Size], dict[str, torch.Tensor]] | None = None):
        self.positions = positions

    def __call__(self, number: int, shape: torch.Size) -> dict[str, torch.Tensor]:
        pair, level = divmod(number, len(VALIDATION_SIGMAS))
        drawn = {
            "noise": torch.randn(shape, generator=generator("validation", pair)),
            "sigmas": torch.tensor(VALIDATION_SIGMAS[level]),
            "keep_instruction": torch.tensor(1.0),
            "keep_source": torch.tensor(1.0),
        }
        if self.positions is not None:
            drawn["align_positions"] = self.positions(number, shape)["align_positions"]
        return drawn


def turns(num_items: int, rank: int, num_processes: int) -> list[tuple[int, bool]]:
    """The items of process `rank`, and whether each counts: all processes get equally many, some a second time.

    Sharded models need all processes in every call.
    """
    rounds = math.ceil(num_items / num_processes)
    numbers = (turn * num_processes + rank for turn in range(rounds))
    return [(number % num_items, number < num_items) for number in numbers]


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator,
    model: nn.Module,
    samples: Samples,
    collate: Callable,
    batch_size: int,
    is_base: bool = False,
) -> dict[str, float]:
    """Flow matching loss at fixed noise levels and noise.

    Args:
        accelerator (`Accelerator`): All of its processes share the pairs, and get the result.
        model (`nn.Module`): The wrapped [`EditingBranches`]; it is put back into training mode.
        samples ([`Samples`]): Made with [`FixedDraws`], without positions.
        collate (`Callable`): Makes a batch of samples.
        batch_size (`int`): Noise levels of one pair that run together.
        is_base (`bool`, defaults to `False`): For [`ConnectingBranches`]: the loss of the base that it starts from.

    Returns:
        `dict[str, float]`: `validation_flow`, the mean, and `validation_flow_sigma_0.1` and so on; of the base
        `validation_flow_base` alone.
    """
    model.eval()
    count = len(VALIDATION_SIGMAS)
    sums = torch.zeros(count, device=accelerator.device)
    for pair, counts in turns(len(samples), accelerator.process_index, accelerator.num_processes):
        for start in range(0, count, batch_size):
            levels = range(start, min(start + batch_size, count))
            batch = collate([samples[pair, pair * count + level] for level in levels])
            batch = send_to_device(batch, accelerator.device) | ({"is_base": True} if is_base else {})
            with accelerator.autocast():
                velocity, _ = model(batch)
            if counts:
                sums[levels.start : levels.stop] += flow_matching_loss(velocity, batch["latents"], batch["noise"])
    if isinstance(model, FSDPModule):
        model.reshard()  # its root keeps what it has gathered, and would be saved and learn on with that
    model.train()
    means = (accelerator.reduce(sums) / len(samples)).tolist()
    if is_base:
        return {"validation_flow_base": sum(means) / count}
    named = {f"validation_flow_sigma_{s}": mean for s, mean in zip(VALIDATION_SIGMAS, means, strict=True)}
    return {"validation_flow": sum(means) / count, **named}


def gradient_norms(
    accelerator: Accelerator,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    samples: Samples,
    collate: Callable,
    num_pairs: int = 1,
) -> dict[str, float]:
    """Norm of the gradient of each loss alone, without weights, at the middle noise level of the first pairs.

    Args:
        accelerator, model, collate: See [`held_out_loss`].
        parameters (`Sequence[nn.Parameter]`): Those whose gradients count: not the alignment heads'.
        samples ([`Samples`]): Made with [`FixedDraws`], with positions.
        num_pairs (`int`, defaults to 1): That each process takes; two where one is aligned with the next.

    Returns:
        `dict[str, float]`: `gradient_norm_flow` and `gradient_norm_align`.
    """
    count, first = len(VALIDATION_SIGMAS), accelerator.process_index * num_pairs % len(samples)
    chosen = [samples[first, first * count + count // 2]]
    others = ((first + step) % len(samples) for step in range(1, len(samples) + 1))  # at last itself, if it is alone
    while len(chosen) < num_pairs:
        pair = next(others)
        sample = samples[pair, pair * count + count // 2]
        if sample["latents"].shape == chosen[0]["latents"].shape:  # of one bucket
            chosen.append(sample)
    batch = collate(chosen)
    batch = send_to_device(batch, accelerator.device)
    norms = {}
    for name in ("flow", "align"):
        with accelerator.autocast():
            velocity, align = model(batch)
        # both terms are in both passes: distributed wrappers wait for a gradient of all that was computed
        flow = flow_matching_loss(velocity, batch["latents"], batch["noise"]).mean()
        loss = flow + 0 * align.mean() if name == "flow" else align.mean() + 0 * flow
        accelerator.backward(loss * accelerator.gradient_accumulation_steps)
        norms[f"gradient_norm_{name}"] = float(accelerator.clip_grad_norm_(parameters, math.inf))
        model.zero_grad()
    return norms


def log_edits(accelerator: Accelerator, strips: Sequence[Path], step: int) -> None:
    """Hand edits to the trackers that take pictures: strips, and to TensorBoard the clips, too.

    Args:
        accelerator (`Accelerator`): Whose trackers were begun.
        strips (`Sequence[Path]`): What [`edit_held_out`] returned.
        step (`int`): Of the training.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            from tensorboard.compat.proto.summary_pb2 import Summary

            images = {path.stem: np.asarray(Image.open(path).convert("RGB"))[None] for path in strips}
            tracker.log_images(images, step, dataformats="NHWC")
            for path in strips:
                clip = path.with_suffix(".gif")
                width, height = Image.open(clip).size
                image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=clip.read_bytes())
                summary = Summary(value=[Summary.Value(tag=f"clip {path.stem}", image=image)])
                tracker.writer.file_writer.add_summary(summary, step)
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [Image.open(path) for path in strips]}, step)


@torch.no_grad()
def edit_held_out(
    accelerator: Accelerator,
    model: nn.Module,
    pipe: RVEDiTPipeline,
    pairs: EditPairs,
    cached: CachedPairs,
    null_text: dict[str, torch.Tensor],
    num_edits: int,
    folder: str | Path,
    reuse_context: bool = True,
) -> list[Path]:
    """Edit clips with the weights as they are, from what the cache holds: of the encoders, only the VAE runs.

    Args:
        accelerator (`Accelerator`): Its processes share the clips.
        model (`nn.Module`): The wrapped [`EditingBranches`]; it is put back into training mode.
        pipe ([`RVEDiTPipeline`]): Whose transformer, VAE and scheduler are used, and whose distiller, MLLM and text
            encoder are if they learn.
        pairs ([`EditPairs`]), cached ([`CachedPairs`]): The clips, instructions and true edits.
        null_text (`dict[str, torch.Tensor]`): See [`Samples`].
        num_edits (`int`): Of the first pairs.
        folder (`str` or `Path`): Gets `0-make-it-blue.mp4`, the edit; `0-make-it-blue.png`, frames of the source, the
            edit and the true edit below each other; and `0-make-it-blue.gif`, the three side by side.
        reuse_context (`bool`, defaults to `True`): See [`RVEDiTPipeline.__call__`]; not where weights of the
            transformer are on its device in `forward` alone.

    Returns:
        `list[Path]`: all strips, on every process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = accelerator.device
    model.eval()
    if isinstance(model, FSDPModule):
        model.unshard()  # the pipeline calls parts of it; those that are no units of their own have to be whole
    count = min(num_edits, len(pairs))
    for index, counts in turns(count, accelerator.process_index, accelerator.num_processes):
        source, target = pairs.load(index)
        sample, arguments = cached[index], {}
        if "prompt_embeds" in sample and "text" in pipe.token_streams:
            arguments["prompt_embeds"] = sample["prompt_embeds"][None].to(device)
            arguments["negative_prompt_embeds"] = null_text["prompt_embeds"][None].to(device)
        if "edit_tokens" in sample:
            tokens = [sample[name][None].to(device) for name in ("edit_tokens", "visual_tokens", "visual_positions")]
            if pipe.distiller is not None:
                tokens[:2] = pipe.distiller.connect(*tokens[:2])
            edit, visual, positions = tokens
            if "edit" in pipe.token_streams:
                arguments["edit_embeds"] = edit
            if "visual" in pipe.token_streams:
                arguments |= {"visual_embeds": visual, "visual_positions": positions}
        # an encoder that learns reads the instruction itself
        given = {"text": "prompt_embeds", "edit": "edit_embeds", "visual": "visual_embeds"}
        needed = not {given[stream] for stream in pipe.token_streams} <= arguments.keys()
        with accelerator.autocast():
            frames = pipe(
                source,
                pairs.instruction(index) if needed else None,
                height=source.shape[1],
                width=source.shape[2],
                fps=pairs.fps(index),
                generator=generator("validation edit", index),
                reuse_context=reuse_context,
                **arguments,
            ).frames[0]
        if counts:
            edited = (frames * 255).round().clip(0, 255).astype(np.uint8)
            name = re.sub(r"\W+", "-", pairs.instruction(index).lower()).strip("-")[:60]
            write_video(folder / f"{index}-{name}.mp4", edited, pairs.fps(index))
            rows = {"source": source, textwrap.shorten(pairs.instruction(index), 60): edited, "true edit": target}
            write_strip(folder / f"{index}-{name}.png", rows)
            images = [Image.fromarray(np.concatenate(frames, axis=1)) for frames in zip(source, edited, target)]
            duration = round(1000 / pairs.fps(index))
            more = {"save_all": True, "append_images": images[1:]}
            images[0].save(folder / f"{index}-{name}.gif", **more, duration=duration, loop=0)
    if isinstance(model, FSDPModule):
        model.reshard()
    model.train()
    accelerator.wait_for_everyone()
    return sorted(folder.glob("*.png"), key=lambda path: int(path.name.partition("-")[0]))
