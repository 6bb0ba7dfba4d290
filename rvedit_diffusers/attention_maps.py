"""
What a transformer's cross-attention reads: the probabilities of chosen blocks, recorded while a pipeline runs, and
measures of them.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils.torch_utils import is_compiled_module
from transformers import PreTrainedTokenizerBase

from .pipeline_rvedit import RVEDiTPipeline
from .transformer_rvedit import ContextStates, RVEDiTAttention, RVEDiTTransformer3DModel, _apply_rotary_emb


LOGITS_AT_ONCE = 2**24  # 64 MiB in float32


@dataclass
class BlockAttention:
    """
    What the cross-attention of one block read: means over its heads and the recorded steps, float32 on the CPU.

    The latent tokens, the queries, stand on a grid `(frames, height, width)`: the latents' patches. Editing and text
    tokens of a block that reads both share one softmax over all of them; visual tokens have a softmax of their own.

    Args:
        maps (`dict[str, torch.Tensor]`):
            By stream, `"edit"`, `"text"` or `"visual"`, `(batch, num_tokens, frames, height, width)` in [0, 1]: the
            share of its attention that the latent token at a place gives to each token. Over all tokens of a softmax
            it sums to 1 at each place. Padding of the text has what the model gives it, which masks none of it, in as
            few tokens as the pipeline merges it into; visual tokens that are masked have 0.
        entropy (`dict[str, torch.Tensor]`):
            By stream, `(batch, frames, height, width)` in nats, in `[0, log(num_tokens)]`: the entropy of the
            attention within the stream, scaled to sum to 1, merged padding as all that it stands for. It is taken of
            each head and step and then averaged: heads that look at one token each have 0, whether or not it is the
            same one.
        num_steps (`int`): How many steps were recorded.
        visual_positions (`torch.Tensor` of shape `(batch, num_visual, 3)`, *optional*):
            (time, row, column) of the visual tokens in [0, 1], as [`RVEDiTTransformer3DModel`] takes them.
        visual_attention_mask (`torch.Tensor` of shape `(batch, num_visual)`, bool, *optional*):
            `True` where a visual token is valid. `None`: all are.
    """

    maps: dict[str, torch.Tensor]
    entropy: dict[str, torch.Tensor]
    num_steps: int
    visual_positions: torch.Tensor | None = None
    visual_attention_mask: torch.Tensor | None = None


class _Call:
    """The call of the transformer that is running, as its forward pre-hook sees it."""

    def __init__(self, steps: Sequence[int] | None):
        self.steps = steps
        self.step, self.timestep = -1, None
        self.is_recorded = False

    def begin(self, transformer: RVEDiTTransformer3DModel, args: tuple, kwargs: dict) -> None:
        inputs = inspect.signature(RVEDiTTransformer3DModel.forward).bind(transformer, *args, **kwargs).arguments
        timestep = inputs["timestep"]
        is_same = self.timestep is not None and torch.equal(timestep, self.timestep)
        if not is_same:
            self.step, self.timestep = self.step + 1, timestep.clone()
        # The unconditional branches of guidance follow the conditional one at its timestep.
        self.is_recorded = not is_same and (self.steps is None or self.step in self.steps)
        sizes = zip(inputs["hidden_states"].shape[2:], transformer.config.patch_size)
        self.grid = tuple(size // patch for size, patch in sizes)
        edit = inputs.get("edit_hidden_states")
        self.num_edit = 0 if edit is None else edit.shape[1]
        self.visual_positions = inputs.get("visual_positions")


class RecordingAttnProcessor:
    """
    Leaves the attention to another processor and computes its probabilities beside it, as fused kernels return none.

    Args:
        processor ([`RVEDiTAttnProcessor`]): What computes the output.
        tokens (`tuple[str, ...]`): The streams that the block reads.
        call (`_Call`): Says what is being called.
    """

    def __init__(self, processor, tokens: tuple[str, ...], call: _Call):
        self.processor, self.tokens, self.call = processor, tokens, call
        self._attention_backend = processor._attention_backend
        self.sums = {}  # stream -> (batch, seq, num_tokens)
        self.entropy_sums = {}  # stream -> (batch, seq)
        self.num_steps = 0
        self.grid = self.visual_positions = self.visual_attention_mask = None

    def __call__(
        self,
        attn: RVEDiTAttention,
        hidden_states: torch.Tensor,
        context: ContextStates | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        visual_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.call.is_recorded:
            self._record(attn, hidden_states, context, rotary_emb, visual_attention_mask)
        return self.processor(attn, hidden_states, context, rotary_emb, visual_attention_mask)

    @torch.no_grad()
    def _record(
        self,
        attn: RVEDiTAttention,
        hidden_states: torch.Tensor,
        context: ContextStates,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        visual_attention_mask: torch.Tensor | None,
    ) -> None:
        if self.grid not in (None, self.call.grid):
            raise ValueError(
                f"One recording is of one edit, but the latents have {self.call.grid} patches after {self.grid}."
            )
        self.grid = self.call.grid
        self.num_steps += 1
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))  # (batch, seq, heads, head_dim)

        # 1. Editing and text tokens
        if context.key is not None:
            num_tokens = context.key.shape[1]  # may be fewer than the call has, where the pipeline merges them
            lengths = {name: num_tokens for name in ("edit", "text") if name in self.tokens}
            if len(lengths) == 2:
                lengths = {"edit": self.call.num_edit, "text": num_tokens - self.call.num_edit}
            self._add(query, context.key, lengths, context.attention_mask)

        # 2. Visual tokens
        if context.visual_key is not None:
            query = _apply_rotary_emb(query, *rotary_emb)
            mask = None if visual_attention_mask is None else visual_attention_mask[:, None, None, :]
            self._add(query, context.visual_key, {"visual": context.visual_key.shape[1]}, mask)
            self.visual_positions = self.call.visual_positions.float().cpu()
            self.visual_attention_mask = None if visual_attention_mask is None else visual_attention_mask.cpu()

    def _add(
        self,
        query: torch.Tensor,  # (batch, seq, heads, head_dim)
        key: torch.Tensor,  # (batch, num_tokens, heads, head_dim)
        lengths: dict[str, int],  # of the streams in `key`, in their order
        mask: torch.Tensor | None = None,  # (batch, 1, 1, num_tokens)
    ) -> None:
        batch_size, seq, num_heads, head_dim = query.shape
        for stream, length in lengths.items():
            if stream not in self.sums:
                self.sums[stream] = torch.zeros(batch_size, seq, length)
                self.entropy_sums[stream] = torch.zeros(batch_size, seq)
        key = key.float().permute(0, 2, 3, 1) / math.sqrt(head_dim)  # (batch, heads, head_dim, num_tokens)
        bias = key.new_zeros(1, 1, 1, key.shape[-1]) if mask is None else mask
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill_(~bias, -math.inf)
        bias = bias.float()
        rows = max(LOGITS_AT_ONCE // (batch_size * num_heads * key.shape[-1]), 1)
        for start in range(0, seq, rows):
            some = slice(start, start + rows)
            logits = query[:, some].float().transpose(1, 2) @ key + bias  # (batch, heads, rows, num_tokens)
            parts = (each.split(list(lengths.values()), -1) for each in (logits.softmax(-1).mean(1), logits, bias))
            for stream, share, stream_logits, stream_bias in zip(lengths, *parts):
                self.sums[stream][:, some] += share.cpu()  # (batch, rows, stream's length)
                within = stream_logits.softmax(-1)
                # A token whose logit has log(n) added stands for n of equal shares; one that is masked has none.
                entropy = torch.special.entr(within) + within * stream_bias.clamp(min=0)
                entropy = entropy.sum(-1).mean(1)  # (batch, rows)
                self.entropy_sums[stream][:, some] += entropy.cpu()

    def average(self) -> BlockAttention:
        """The means of all that was recorded, for which memory is reused."""
        maps = {
            stream: sums.div_(self.num_steps).transpose(1, 2).unflatten(2, self.grid)
            for stream, sums in self.sums.items()
        }
        entropy = {
            stream: sums.div_(self.num_steps).unflatten(1, self.grid) for stream, sums in self.entropy_sums.items()
        }
        return BlockAttention(maps, entropy, self.num_steps, self.visual_positions, self.visual_attention_mask)


@contextmanager
def record_attention(
    transformer: RVEDiTTransformer3DModel, blocks: Sequence[int], steps: Sequence[int] | None = None
) -> Iterator[dict[int, BlockAttention]]:
    r"""
    Record what blocks read, while one edit runs:

    ```python
    with record_attention(pipe.transformer, blocks=[1, 2]) as attention:
        pipe(clip, "make the red ball blue")
    attention[1].maps["edit"]  # (batch, num_tokens, frames, height, width)
    ```

    The output is what it would be without the recording. Of several calls in a row at one timestep the first is
    recorded, which is the pipeline's conditional branch. Steps in which a cache skips a block do not count for it.

    The probabilities are computed in float32, for a part of the queries at a time, and kept on the CPU, averaged over
    heads and steps: `4 * seq * num_tokens` bytes for each block and stream, 340 MB for the 2,592 visual tokens of a
    default [`RVEDiTProcessor`] and 81 frames of 480p. The transformer has to be eager, not compiled.

    Args:
        transformer ([`RVEDiTTransformer3DModel`]): Gets other processors and a hook until the `with` block ends.
        blocks (`Sequence[int]`): Numbers of the blocks, from 0.
        steps (`Sequence[int]`, *optional*): Numbers of the denoising steps, from 0, the noisiest; all by default.

    Yields:
        `dict[int, BlockAttention]`: By block, in the order of `blocks`; filled when the `with` block ends.

    Raises:
        `ValueError`: if there is no such block, the transformer is compiled or split over processes, or, at the end, a
            block was recorded in no step.
    """
    if is_compiled_module(transformer) or any(module._compiled_call_impl for module in transformer.modules()):
        raise ValueError("`transformer` has to be eager, but is compiled: load it anew to record what it reads.")
    if getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None) is not None:
        raise ValueError("`transformer` has to be whole, but its sequence is split over processes.")
    blocks = list(blocks)
    num_blocks = len(transformer.blocks)
    if not blocks or not all(index in range(num_blocks) for index in blocks):
        raise ValueError(f"`blocks` has to name one or more blocks in [0, {num_blocks - 1}], got {blocks}.")

    call = _Call(steps)
    layers = {index: transformer.blocks[index].attn2 for index in blocks}
    recorders = {
        index: RecordingAttnProcessor(layer.processor, transformer.blocks[index].tokens, call)
        for index, layer in layers.items()
    }
    attention = {}
    hook = transformer.register_forward_pre_hook(call.begin, with_kwargs=True)
    try:
        for index, layer in layers.items():
            layer.set_processor(recorders[index])
        yield attention
    finally:
        hook.remove()
        for index, layer in layers.items():
            layer.set_processor(recorders[index].processor)
    for index, recorder in recorders.items():
        if recorder.num_steps == 0:
            raise ValueError(
                f"Block {index} was recorded in no step: there were {call.step + 1}, and `steps` is {steps}."
            )
        attention[index] = recorder.average()


def place_information(maps: torch.Tensor) -> torch.Tensor:
    r"""
    How far attention departs from its mean over all places: `p log(p / m) - p + m` with `m` the mean of `p`.

    Summed over the tokens of a softmax it is the Kullback-Leibler divergence of what a place reads from what is read
    on average. Averaged over the places it says how selective of places a token is. Both together are the mutual
    information of place and token.

    Args:
        maps (`torch.Tensor` of shape `(..., frames, height, width)`): Attention, as in `BlockAttention.maps`.

    Returns:
        `torch.Tensor` of the shape of `maps`: nats, 0 or more.
    """
    mean = maps.mean((-3, -2, -1), keepdim=True)
    return (torch.xlogy(maps, maps) - torch.xlogy(maps, mean) - maps + mean).clamp_(min=0)  # rounding goes below


def text_words(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text_len: int
) -> tuple[list[tuple[str, list[int]]], list[int], list[int]]:
    """
    Which text tokens make up the words of a prompt, as [`~RVEDiTPipeline.encode_prompt`] reads it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The pipeline's, a fast one of SentencePiece's kind.
        prompt (`str`): The instruction.
        text_len (`int`): Number of text tokens, padding included.

    Returns:
        `tuple`: a list of `(word, indices of its tokens)` in the order of the text, the indices of the marks of its
        end, and those of the padding.
    """
    text = prompt_clean(prompt)
    encoded = tokenizer(text, max_length=text_len, truncation=True, return_offsets_mapping=True)
    words, marks = [], []  # of a word its start, its end and its tokens
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(encoded.input_ids)):
        start, end = encoded.offset_mapping[index]
        if encoded.input_ids[index] == tokenizer.eos_token_id:
            marks.append(index)
        elif token.startswith("▁") or not words:
            words.append((start, end, [index]))
        else:
            words[-1] = (words[-1][0], end, words[-1][2] + [index])
    padding = list(range(len(encoded.input_ids), text_len))
    return [(text[start:end].strip(), tokens) for start, end, tokens in words], marks, padding


def latent_frames(pipe: RVEDiTPipeline, num_frames: int) -> list[int]:
    """
    In which frame of the maps each frame of a clip is.

    Args:
        pipe ([`RVEDiTPipeline`]): What edited the clip.
        num_frames (`int`): Of the clip.
    """
    patch_size = pipe.transformer.config.patch_size[0]
    return [math.ceil(frame / pipe.vae_scale_factor_temporal) // patch_size for frame in range(num_frames)]


def changed_places(region: torch.Tensor, grid: tuple[int, int, int], frames: Sequence[int]) -> torch.Tensor:
    """
    The places of a grid that a region of the clip covers: those of whose pixels it has at least half as large a share
    as of the place that it covers most. The rims that an autoencoder blurs are none of them, thin objects are.

    Args:
        region (`torch.Tensor` of shape `(num_frames, pixel_height, pixel_width)`): bool.
        grid (`tuple[int, int, int]`): `(frames, height, width)` of the places.
        frames (`Sequence[int]`): For each frame of `region`, the frame of the grid that it is in, such as what
            [`latent_frames`] returns.

    Returns:
        `torch.Tensor` of shape `grid`: bool; all `False` if the region is empty.
    """
    cells = F.adaptive_avg_pool2d(region.float()[:, None], grid[1:])[:, 0]  # (num_frames, height, width)
    frames = torch.tensor(frames)
    share = torch.zeros(grid).index_add_(0, frames, cells) / frames.bincount(minlength=grid[0]).view(-1, 1, 1)
    return (share > 0) & (share >= share.max() / 2)


def visual_grid(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Where in the clip the visual tokens stand, as a grid of their indices.

    Args:
        positions (`torch.Tensor` of shape `(num_visual, 3)`): (time, row, column) of the valid tokens of one clip,
            which fill a grid, as those of [`RVEDiTProcessor`] do.

    Returns:
        `tuple`: int64 `(times, rows, columns)`, the index of the token at each place, and the times `(times,)`, as
        fractions of the clip.

    Raises:
        `ValueError`: if the tokens fill no grid.
    """
    axes = [positions[:, axis].unique(return_inverse=True) for axis in range(3)]
    shape = tuple(len(places) for places, _ in axes)
    grid = torch.full(shape, -1)
    grid[tuple(index for _, index in axes)] = torch.arange(len(positions))
    if math.prod(shape) != len(positions) or (grid < 0).any():
        raise ValueError(f"`positions` has to fill a grid, got {len(positions)} places on axes of {shape} places.")
    return grid, axes[0][0]
