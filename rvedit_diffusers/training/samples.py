"""Samples of a training: a cached pair with its noise, noise level and dropped conditions."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..losses import sample_sigmas, sample_token_positions
from .cache import CachedPairs
from .pairs import EditPairs
from .sampler import BatchSampler, generator, share


@dataclass(frozen=True)
class Draws:
    """How the random numbers of a sample are drawn.

    Args:
        seed (`int`): Of the training.
        sigma_shift (`float`): Shift of the noise levels, see [`sample_sigmas`].
        drop_instruction, drop_all (`float`): Shares, in [0, 1] together, of samples without their instruction, and
            without it and the source clip.
        num_positions (`int`): Tokens that are aligned, at most; see [`sample_token_positions`].
        patch_volume (`int`): Latent cells in a token.
    """

    seed: int
    sigma_shift: float = 1.0
    drop_instruction: float = 0.1
    drop_all: float = 0.1
    num_positions: int = 2048
    patch_volume: int = 4

    def __call__(self, number: int, shape: torch.Size) -> dict[str, torch.Tensor]:
        """Draw for the sample `number` of the whole run, a function of seed and number alone.

        Args:
            number (`int`): How many samples the run has trained on before, over all processes.
            shape (`torch.Size`): Of the latents, `(channels, frames, height, width)`.

        Returns:
            `dict`: `noise` of that shape; `sigmas`, `keep_instruction` and `keep_source` scalars, the last two 0 or 1;
            `align_positions` `(num,)`, int64.
        """
        chance = torch.rand((), generator=generator(self.seed, number, "drop"))
        drop_all = chance < self.drop_all
        num_tokens = math.prod(shape[1:]) // self.patch_volume
        positions = generator(self.seed, number, "positions")
        return {
            "noise": torch.randn(shape, generator=generator(self.seed, number, "noise")),
            "sigmas": sample_sigmas(1, self.sigma_shift, generator(self.seed, number, "sigma"))[0],
            "keep_instruction": (~(drop_all | (chance > 1 - self.drop_instruction))).float(),
            "keep_source": (~drop_all).float(),
            "align_positions": sample_token_positions(num_tokens, self.num_positions, positions),
        }


class Samples(torch.utils.data.Dataset):
    """Cached pairs with all that a step draws for them, by (index of the pair, number of the sample in the run).

    Args:
        cached ([`CachedPairs`]): The pairs.
        draws ([`Draws`]): See there; anything with its signature.
        null_text (`dict[str, torch.Tensor]`): The empty instruction as the cache holds instructions, in rows of full
            length; it stands for instructions that are dropped.
        pairs ([`EditPairs`], *optional*): For an MLLM that runs during training: each sample gets what it reads, as
            `frames`, `reference_frames`, `instruction` and `fps`, which [`MLLMCollator`] turns into its inputs.
        twin (`Callable[[int], int]`, *optional*): From the index of a pair to that of its twin, whose reference tokens
            each sample gets as `wrong_edit_tokens` and `wrong_visual_tokens`.
    """

    def __init__(
        self,
        cached: CachedPairs,
        draws: Callable[[int, torch.Size], dict[str, torch.Tensor]],
        null_text: dict[str, torch.Tensor],
        pairs: EditPairs | None = None,
        twin: Callable[[int], int] | None = None,
    ):
        self.cached, self.draws, self.null_text, self.pairs, self.twin = cached, draws, null_text, pairs, twin

    def __len__(self) -> int:
        return len(self.cached)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, number = key
        sample = self.cached[index]
        sample |= self.draws(number, sample["latents"].shape)
        if sample["keep_instruction"] == 0:
            sample |= {name: value.to(sample[name]) for name, value in self.null_text.items()}
        if self.twin is not None:
            other = self.cached[self.twin(index)]
            sample |= {f"wrong_{name}": other[f"reference_{name}"] for name in ("edit_tokens", "visual_tokens")}
        if self.pairs is not None:
            sample["frames"], sample["reference_frames"] = self.pairs.load(index)
            sample |= {"instruction": self.pairs.instruction(index), "fps": self.pairs.fps(index)}
        return sample


class MLLMCollator:
    """Batches [`Samples`] that were made with `pairs`: the processor's `mllm_inputs` and `reference_mllm_inputs`.

    Args:
        processor ([`RVEDiTProcessor`]): Of the pipeline.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, samples: list[dict]) -> dict:
        read = ("frames", "reference_frames", "instruction", "fps")
        clips, reference_clips, texts, rates = ([sample.pop(name) for sample in samples] for name in read)
        batch = torch.utils.data.default_collate(samples)
        batch["mllm_inputs"] = dict(self.processor(clips, texts, fps=rates))
        is_captioned = all(clip is reference for clip, reference in zip(clips, reference_clips, strict=True))
        batch["reference_mllm_inputs"] = (
            batch["mllm_inputs"] if is_captioned else dict(self.processor(reference_clips, texts, fps=rates))
        )
        return batch


def numbered_batches(
    sampler: BatchSampler, first_step: int, rank: int, num_processes: int, accumulation: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """The (pair, sample number) of each micro-batch of process `rank`, without end.

    The numbers do not depend on how a step's batch is split among processes and micro-batches.

    Args:
        sampler ([`BatchSampler`]): Of the batches of whole steps.
        first_step (`int`): From 0; the cursor of a run that goes on.
        rank, num_processes (`int`): The part of each micro-batch that is this process'.
        accumulation (`int`, defaults to 1): Micro-batches a step.
    """
    step = first_step
    while True:
        rows = list(enumerate(sampler[step], start=step * sampler.batch_size))
        for micro in range(accumulation):
            yield [(index, number) for number, index in share(share(rows, micro, accumulation), rank, num_processes)]
        step += 1
