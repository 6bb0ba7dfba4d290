import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import SeaCacheConfig
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformer3DModel,
)
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn
from torch.distributed.tensor import DTensor


TOKEN_STREAMS = ("edit", "text", "visual")


@dataclass
class RVEDiTTransformer3DModelOutput(BaseOutput):
    """
    Output of [`RVEDiTTransformer3DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch, out_channels, num_frames, height, width)`, *optional*):
            The prediction, in the dtype of `hidden_states`. `None` when `stop_after_block` was given.
        features (`tuple[torch.Tensor]`, *optional*):
            One `(batch, sequence, dim)` tensor for each entry of `return_features`, in that order: the output of that
            block's cross-attention before the residual. `None` when `return_features` was not given.
    """

    sample: torch.Tensor | None = None
    features: tuple[torch.Tensor, ...] | None = None


class ContextStates(NamedTuple):
    """
    Keys and values of one block's cross-attention, each `(batch, tokens, heads, head_dim)` or `None`.

    Args:
        key, value (`torch.Tensor`, *optional*): Of the editing and text tokens that the block reads.
        visual_key, visual_value (`torch.Tensor`, *optional*): Of the visual tokens, the keys rotated.
        attention_mask (`torch.Tensor` of shape `(batch, 1, 1, tokens)`, *optional*):
            Of `key`, as `scaled_dot_product_attention` takes it.
    """

    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    visual_key: torch.Tensor | None = None
    visual_value: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


class RVEDiTContext(NamedTuple):
    """
    What the calls of an edit have in common, as it depends neither on the noisy latents nor on the timestep: what
    [`~RVEDiTTransformer3DModel.project_context`] returns.

    Args:
        rotary_emb (`tuple[torch.Tensor, torch.Tensor]`): Cosines and sines of the latent grid.
        blocks (`tuple[ContextStates, ...]`): What the cross-attention of each block reads.
        source_patches (`torch.Tensor` of shape `(batch, dim, num_frames, height, width)`, *optional*):
            The embedded source, in patches, with the places of the patches.
    """

    rotary_emb: tuple[torch.Tensor, torch.Tensor]
    blocks: tuple[ContextStates, ...]
    source_patches: torch.Tensor | None = None


class RVEDiTAttnProcessor:
    """
    Attention of one block, self or cross, through diffusers' attention backends.

    Self-attention rotates queries and keys. Cross-attention reads one sequence of context tokens through `to_k` and
    `to_v` without positions, as Wan does, and the visual tokens through `add_k_proj` and `add_v_proj` in a softmax of
    their own, where queries and keys are rotated. Both results are summed before `to_out`.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "RVEDiTAttention",
        hidden_states: torch.Tensor,
        context: ContextStates | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        visual_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # 1. Projections
        attention_mask = None
        if attn.is_cross_attention:
            key, value, visual_key, visual_value, attention_mask = context
            # A single token gets all attention of every query. In training its key gets a gradient all the same, of 0.
            is_single = visual_key is None and attention_mask is None and key.shape[1] == 1
            if is_single and not torch.is_grad_enabled():
                feature = attn.to_out[1](attn.to_out[0](value.flatten(2, 3)))
                return feature.expand(-1, hidden_states.shape[1], -1)
            query = attn.to_q(hidden_states)  # (batch, seq, dim)
        else:
            if attn.fused_projections:
                query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
            else:
                query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
            key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
            value = value.unflatten(2, (attn.heads, -1))
            visual_key = None
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))  # (batch, seq, heads, head_dim)

        # 2. The block's own sequence (self) or the edit and text tokens (cross)
        attn_output = None
        if key is not None:
            attn_output = dispatch_attention_fn(
                query if attn.is_cross_attention else _apply_rotary_emb(query, *rotary_emb),
                key if attn.is_cross_attention else _apply_rotary_emb(key, *rotary_emb),
                value,
                attn_mask=attention_mask,
                backend=self._attention_backend,
                # Contexts stay whole on every rank, so only self-attention runs in parallel.
                parallel_config=None if attn.is_cross_attention else self._parallel_config,
            )
            attn_output = attn_output.flatten(2, 3).type_as(query)  # (batch, seq, dim)

        # 3. Visual tokens
        if visual_key is not None:
            visual_output = dispatch_attention_fn(
                _apply_rotary_emb(query, *rotary_emb),
                visual_key,
                visual_value,
                # (batch, 1, 1, num_visual): the one layout that every masking backend broadcasts alike.
                attn_mask=None if visual_attention_mask is None else visual_attention_mask[:, None, None, :],
                backend=self._attention_backend,
            )
            visual_output = visual_output.flatten(2, 3).type_as(query)  # (batch, seq, dim)
            attn_output = visual_output if attn_output is None else attn_output + visual_output

        return attn.to_out[1](attn.to_out[0](attn_output))


def _apply_rotary_emb(
    hidden_states: torch.Tensor,  # (batch, seq, heads, head_dim)
    cos: torch.Tensor,  # (1 or batch, seq, 1, head_dim / 2)
    sin: torch.Tensor,
) -> torch.Tensor:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        even, odd = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # the same products and sums in one pass over memory
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        pairs = torch.view_as_complex(hidden_states.to(dtype).unflatten(-1, (-1, 2)))
        rotated = torch.view_as_real(pairs * torch.complex(cos.to(dtype), sin.to(dtype)))
    return rotated.flatten(-2).type_as(hidden_states)


class RVEDiTAttention(WanAttention):
    """
    Wan's attention layers under Wan's names, called with RVEDiT's token streams.

    `add_k_proj`, `add_v_proj` and `norm_added_k` exist only with `reads_visual`. `add_v_proj` starts at zero, so that
    a converted base computes what it computed before it had visual tokens.
    """

    _default_processor_cls = RVEDiTAttnProcessor
    _available_processors = [RVEDiTAttnProcessor]

    def __init__(self, dim: int, heads: int, eps: float, is_cross_attention: bool, reads_visual: bool = False):
        super().__init__(
            dim=dim,
            heads=heads,
            dim_head=dim // heads,
            eps=eps,
            added_kv_proj_dim=dim if reads_visual else None,
            is_cross_attention=is_cross_attention,
            processor=RVEDiTAttnProcessor(),
        )
        if reads_visual:
            nn.init.zeros_(self.add_v_proj.weight)
            nn.init.zeros_(self.add_v_proj.bias)

    def project_context(
        self,
        encoder_hidden_states: torch.Tensor | None = None,  # (batch, num_tokens, dim)
        visual_hidden_states: torch.Tensor | None = None,  # (batch, num_visual, dim)
        visual_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> ContextStates:
        """Keys and values of what the cross-attention reads."""
        key = value = visual_key = visual_value = None
        if encoder_hidden_states is not None:
            if self.fused_projections:
                key, value = self.to_kv(encoder_hidden_states).chunk(2, dim=-1)
            else:
                key, value = self.to_k(encoder_hidden_states), self.to_v(encoder_hidden_states)
            key = self.norm_k(key).unflatten(2, (self.heads, -1))
            value = value.unflatten(2, (self.heads, -1))
        if visual_hidden_states is not None:
            if self.fused_projections:
                visual_key, visual_value = self.to_added_kv(visual_hidden_states).chunk(2, dim=-1)
            else:
                visual_key, visual_value = self.add_k_proj(visual_hidden_states), self.add_v_proj(visual_hidden_states)
            visual_key = self.norm_added_k(visual_key).unflatten(2, (self.heads, -1))
            visual_key = _apply_rotary_emb(visual_key, *visual_rotary_emb)
            visual_value = visual_value.unflatten(2, (self.heads, -1))
            if value is not None and visual_value.shape[1] == 1 and not torch.is_grad_enabled():
                # A single token gets all attention of every query: its value can be added to all others.
                value, visual_key, visual_value = value + visual_value, None, None
        return ContextStates(key, value, visual_key, visual_value)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: ContextStates | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        visual_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, context, rotary_emb, visual_attention_mask)


class RVEDiTRotaryPosEmbed(WanRotaryPosEmbed):
    """
    Wan's 3D RoPE of the latent grid, and the same RoPE at the fractional positions of the visual tokens.

    Cosines and sines are returned once for each rotated pair of channels, `head_dim / 2` of them, in fp32.
    """

    def __init__(
        self, attention_head_dim: int, patch_size: tuple[int, int, int], max_seq_len: int, theta: float = 10000.0
    ):
        super().__init__(attention_head_dim, patch_size, max_seq_len, theta)
        inv_freq = [
            theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
            for dim in (self.t_dim, self.h_dim, self.w_dim)
        ]
        self.register_buffer("inv_freq", torch.cat(inv_freq), persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (batch, channels, num_frames, height, width)
        visual_positions: torch.Tensor | None = None,  # (batch, num_visual, 3)
    ) -> tuple[torch.Tensor, ...]:  # cosines and sines of the grid, then those of the visual tokens, if there are any
        # 1. The latent grid. Wan repeats each value for both channels of a pair: keep one.
        freqs_cos, freqs_sin = super().forward(hidden_states)
        freqs_cos = freqs_cos[..., ::2].contiguous()  # (1, seq, 1, head_dim / 2)
        freqs_sin = freqs_sin[..., ::2].contiguous()
        if visual_positions is None:
            return freqs_cos, freqs_sin  # without `None`: the hook of context parallelism takes tensors alone

        # 2. Visual tokens: fractions of the clip to coordinates of the latent grid. A frame stands for an instant, so
        # the first and last frames are the ends of the time axis; a cell stands for its centre.
        p_t, p_h, p_w = self.patch_size
        num_frames, height, width = hidden_states.shape[2:]
        time, row, column = visual_positions.float().unbind(-1)
        positions = (time * (num_frames // p_t - 1), row * (height // p_h) - 0.5, column * (width // p_w) - 0.5)

        # 3. Angle addition on the table's nearest row: exact on the grid, and no large angle is formed in fp32.
        num_pairs = [dim // 2 for dim in (self.t_dim, self.h_dim, self.w_dim)]
        tables_cos = self.freqs_cos[:, ::2].split(num_pairs, dim=1)
        tables_sin = self.freqs_sin[:, ::2].split(num_pairs, dim=1)
        visual_cos, visual_sin = [], []
        for position, table_cos, table_sin, inv_freq in zip(
            positions, tables_cos, tables_sin, self.inv_freq.split(num_pairs)
        ):
            nearest = position.round().clamp(0, self.max_seq_len - 1)
            angle = (position - nearest).unsqueeze(-1) * inv_freq.float()  # (batch, num_visual, pairs)
            nearest_cos, nearest_sin = table_cos[nearest.long()], table_sin[nearest.long()]
            visual_cos.append(nearest_cos * angle.cos() - nearest_sin * angle.sin())
            visual_sin.append(nearest_sin * angle.cos() + nearest_cos * angle.sin())

        visual_cos = torch.cat(visual_cos, dim=-1).unsqueeze(2)  # (batch, num_visual, 1, head_dim / 2)
        visual_sin = torch.cat(visual_sin, dim=-1).unsqueeze(2)
        return freqs_cos, freqs_sin, visual_cos, visual_sin


class RVEDiTPositionEmbed(nn.Module):
    """
    Where in the frame a patch is, for instructions that name a place: RoPE tells distances between patches alone.

    Sines and cosines of the patch centre's row and column, as shares of the frame, so that clips of other sizes have
    the same places; through a linear layer that starts at zero. Wan has none.
    """

    def __init__(self, num_freqs: int, dim: int):
        super().__init__()
        self.num_freqs = num_freqs
        self.proj = nn.Linear(4 * num_freqs, dim, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Embeddings of shape `(1, dim, *grid)`, on the device and in the dtype of `hidden_states`."""
        num_frames, height, width = grid
        device = hidden_states.device
        freqs = math.pi * 2.0 ** torch.arange(self.num_freqs, device=device)
        rows, columns = (
            ((torch.arange(size, device=device) + 0.5) / size)[:, None] * freqs for size in (height, width)
        )
        angles = torch.cat(
            (rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1
        )  # (height, width, 2 * num_freqs)
        places = self.proj(torch.cat((angles.sin(), angles.cos()), dim=-1).to(hidden_states.dtype))
        return places.permute(2, 0, 1)[None, :, None].expand(-1, -1, num_frames, -1, -1)


class RVEDiTTransformerBlock(nn.Module):
    """
    A Wan block whose cross-attention reads only the token streams named in `tokens`.

    Takes every stream and drops those that it does not read, so that routing is a property of the block alone.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        tokens: Sequence[str],
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.tokens = tuple(tokens)

        # 1. Self-attention
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = RVEDiTAttention(dim, num_heads, eps, is_cross_attention=False)

        # 2. Routed cross-attention
        self.attn2 = RVEDiTAttention(
            dim, num_heads, eps, is_cross_attention=True, reads_visual="visual" in self.tokens
        )
        self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()

        # 3. Feed-forward
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)

        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def project_context(
        self,
        encoder_hidden_states: torch.Tensor | None,
        edit_hidden_states: torch.Tensor | None = None,
        visual_hidden_states: torch.Tensor | None = None,
        visual_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> ContextStates:
        """Keys and values of the streams that the block reads; see `forward` for their shapes."""
        tokens = [edit_hidden_states] if "edit" in self.tokens else []
        if "text" in self.tokens:
            tokens.append(encoder_hidden_states)
        states = self.attn2.project_context(
            torch.cat(tokens, dim=1) if tokens else None,
            visual_hidden_states if "visual" in self.tokens else None,
            visual_rotary_emb,
        )
        if encoder_attention_mask is None or "text" not in self.tokens:
            return states
        is_bool = encoder_attention_mask.dtype == torch.bool
        mask = encoder_attention_mask if is_bool else encoder_attention_mask.type_as(states.key)
        num_edit = states.key.shape[1] - mask.shape[1]  # all of them are read
        mask = F.pad(mask, (num_edit, 0), value=True if is_bool else 0.0)
        return states._replace(attention_mask=mask[:, None, None, :])

    def forward(
        self,
        hidden_states: torch.Tensor,  # (batch, seq, dim)
        encoder_hidden_states: torch.Tensor | None,  # (batch, text_len, dim)
        temb: torch.Tensor,  # (batch, 1 or seq, 6, dim)
        rotary_emb: tuple[torch.Tensor, torch.Tensor],  # (1, seq, 1, head_dim / 2) each
        edit_hidden_states: torch.Tensor | None = None,  # (batch, num_edit_tokens, dim)
        visual_hidden_states: torch.Tensor | None = None,  # (batch, num_visual, dim)
        visual_rotary_emb: tuple[torch.Tensor, torch.Tensor]
        | None = None,  # (batch, num_visual, 1, head_dim / 2) each
        visual_attention_mask: torch.Tensor | None = None,  # (batch, num_visual)
        return_features: bool = False,
        context: ContextStates | None = None,
        encoder_attention_mask: torch.Tensor | None = None,  # (batch, text_len)
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        modulation = self.scale_shift_table.float() + temb.float()  # (batch, 1 or seq, 6, dim)
        shift_msa, scale_msa, gate_msa, shift_ffn, scale_ffn, gate_ffn = modulation.unbind(2)

        # 1. Self-attention
        norm_hidden_states = (self.norm1(hidden_states.float()) * (1 + scale_msa) + shift_msa).type_as(hidden_states)
        attn_output = self.attn1(norm_hidden_states, rotary_emb=rotary_emb)
        hidden_states = (hidden_states.float() + attn_output * gate_msa).type_as(hidden_states)

        # 2. Routed cross-attention
        if context is None:
            context = self.project_context(
                encoder_hidden_states,
                edit_hidden_states,
                visual_hidden_states,
                visual_rotary_emb,
                encoder_attention_mask,
            )
        norm_hidden_states = self.norm2(hidden_states.float()).type_as(hidden_states)
        feature = self.attn2(norm_hidden_states, context, rotary_emb, visual_attention_mask)
        hidden_states = hidden_states + feature

        # 3. Feed-forward
        norm_hidden_states = (self.norm3(hidden_states.float()) * (1 + scale_ffn) + shift_ffn).type_as(hidden_states)
        ff_output = self.ffn(norm_hidden_states)
        hidden_states = (hidden_states.float() + ff_output.float() * gate_ffn).type_as(hidden_states)

        if return_features:
            return hidden_states, feature
        return hidden_states


def _is_group_offloaded(model: nn.Module) -> bool:
    hooks = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return any(registry is not None and registry.get_hook("group_offloading") is not None for registry in hooks)


def _near(device: torch.device, tensors: tuple) -> tuple:
    # Tensors of nested tuples on a device, which is that of a weight: "meta" while accelerate has it offloaded
    if device.type == "meta":
        return tensors
    return tuple(
        _near(device, each) if isinstance(each, tuple) else None if each is None else each.to(device)
        for each in tensors
    )


def _noisy_latents(module: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    return list(args[0] if args else kwargs["hidden_states"])


class RVEDiTTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    r"""
    The diffusion transformer of RVEDiT (arXiv 2605.24674): Wan's blocks with granularity-routed token conditioning.

    Blocks `0 ... num_shallow_blocks - 1` cross-attend to the streams named in `shallow_tokens`, the others to those in
    `deep_tokens`. Where the two models coincide, parameter names and numerics are those of
    [`~diffusers.WanTransformer3DModel`]. The latents of the source clip are embedded by `source_embedding`, a
    zero-initialised convolution whose output is added to that of `patch_embedding`: algebraically the concatenation of
    noisy and source latents on channels with extra input channels that start at zero. Editing tokens are read relative
    to `edit_bias`, which starts at zero; a converted base has what it knows as padding of its text there, so that the
    null condition, tokens of zeros, is the one that it was trained with.

    Args:
        patch_size (`tuple[int, int, int]`, defaults to `(1, 2, 2)`):
            Patch of the latents (time, height, width) that becomes one token.
        num_attention_heads (`int`, defaults to `12`):
            Number of heads. The model's width is `dim = num_attention_heads * attention_head_dim`.
        attention_head_dim (`int`, defaults to `128`):
            Channels of a head, even.
        in_channels (`int`, defaults to `16`):
            Channels of the noisy latents.
        source_channels (`int`, *optional*, defaults to `16`):
            Channels of the source latents. `0` or `None`: the model takes no source.
        out_channels (`int`, *optional*, defaults to `16`):
            Channels of the prediction. `None`: `in_channels`.
        text_dim (`int`, defaults to `4096`):
            Width of the text encoder's states.
        freq_dim (`int`, defaults to `256`):
            Width of the sinusoidal timestep embedding.
        ffn_dim (`int`, defaults to `8960`):
            Width of the feed-forward layers.
        num_layers (`int`, defaults to `30`):
            Number of blocks.
        cross_attn_norm (`bool`, defaults to `True`):
            Whether to normalise the hidden states before cross-attention.
        qk_norm (`str`, defaults to `"rms_norm_across_heads"`):
            Norm of queries and keys. Wan has no other.
        eps (`float`, defaults to `1e-6`):
            Epsilon of all norms.
        rope_max_seq_len (`int`, defaults to `1024`):
            Longest axis of the latent grid, in patches.
        num_shallow_blocks (`int`, *optional*):
            Number of shallow blocks, from `0` to `num_layers`. `None`: `num_layers // 3`.
        shallow_tokens (`tuple[str, ...]`, defaults to `("edit",)`):
            Streams of the shallow blocks: one or more of `"edit"`, `"text"`, `"visual"`.
        deep_tokens (`tuple[str, ...]`, defaults to `("text", "visual")`):
            Streams of the other blocks.
        num_position_freqs (`int`, defaults to `0`):
            Frequencies, in octaves from one half wave a frame, by which a patch knows its place in the frame. `0`:
            only how far it is from others, as Wan.

    Raises:
        `ValueError`: if a routing is empty or names an unknown stream, or `num_shallow_blocks`, `qk_norm` or
            `num_position_freqs` is out of range.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = [
        "patch_embedding",
        "source_embedding",
        "position_embedding",
        "condition_embedder",
        "norm",
    ]
    _no_split_modules = ["RVEDiTTransformerBlock"]
    _keep_in_fp32_modules = ["rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]
    _repeated_blocks = ["RVEDiTTransformerBlock"]
    # Wan's plan fits as it is: it splits latents, positions and timesteps, and leaves the contexts whole.
    _cp_plan = WanTransformer3DModel._cp_plan

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        source_channels: int | None = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        num_shallow_blocks: int | None = None,
        shallow_tokens: tuple[str, ...] = ("edit",),
        deep_tokens: tuple[str, ...] = ("text", "visual"),
        num_position_freqs: int = 0,
    ) -> None:
        super().__init__()

        for name, tokens in (("shallow_tokens", shallow_tokens), ("deep_tokens", deep_tokens)):
            if isinstance(tokens, str) or not tokens or not set(tokens) <= set(TOKEN_STREAMS):
                raise ValueError(
                    f"`{name}` has to be a non-empty tuple of names from {TOKEN_STREAMS}, got {tokens!r}."
                )
        if num_shallow_blocks is None:
            num_shallow_blocks = num_layers // 3
        if not 0 <= num_shallow_blocks <= num_layers:
            raise ValueError(
                f"`num_shallow_blocks` has to lie between 0 and `num_layers` = {num_layers}, got {num_shallow_blocks}."
            )
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(f"`qk_norm` has to be 'rms_norm_across_heads', got {qk_norm!r}.")
        if num_position_freqs < 0:
            raise ValueError(f"`num_position_freqs` has to be at least 0, got {num_position_freqs}.")

        inner_dim = num_attention_heads * attention_head_dim
        out_channels = out_channels or in_channels

        # 1. Patch & position embedding
        self.rope = RVEDiTRotaryPosEmbed(attention_head_dim, patch_size, rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(in_channels, inner_dim, kernel_size=patch_size, stride=patch_size)
        self.source_embedding = None
        if source_channels:
            self.source_embedding = nn.Conv3d(
                source_channels, inner_dim, kernel_size=patch_size, stride=patch_size, bias=False
            )
            nn.init.zeros_(self.source_embedding.weight)
        self.position_embedding = RVEDiTPositionEmbed(num_position_freqs, inner_dim) if num_position_freqs else None

        # 2. Timestep & text embedding
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=inner_dim, time_freq_dim=freq_dim, time_proj_dim=inner_dim * 6, text_embed_dim=text_dim
        )

        # 3. Transformer blocks
        self.blocks = nn.ModuleList(
            [
                RVEDiTTransformerBlock(
                    inner_dim,
                    ffn_dim,
                    num_attention_heads,
                    shallow_tokens if index < num_shallow_blocks else deep_tokens,
                    cross_attn_norm,
                    eps,
                )
                for index in range(num_layers)
            ]
        )

        # 4. Origin of the editing tokens: zero tokens, the null condition, stand for it
        self.edit_bias = None
        if any("edit" in block.tokens for block in self.blocks):
            self.edit_bias = nn.Parameter(torch.zeros(inner_dim))

        # 5. Output norm & projection
        self.norm_out = FP32LayerNorm(inner_dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(inner_dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, inner_dim) / inner_dim**0.5)

        self.gradient_checkpointing = False

    def enable_cache(self, config) -> None:
        r"""
        As [`~diffusers.CacheMixin.enable_cache`], but a [`~diffusers.SeaCacheConfig`] without `raw_vision_callback`
        watches the noisy latents.
        """
        if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
            # diffusers knows where its own classes have them (hooks/sea_cache.py:1005), others would skip nothing
            config = replace(config, raw_vision_callback=_noisy_latents)
        super().enable_cache(config)

    def _rotate(
        self, hidden_states: torch.Tensor, visual_hidden_states: torch.Tensor | None, visual_positions: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
        has_visual = visual_hidden_states is not None
        cos, sin, *visual = self.rope(hidden_states, visual_positions if has_visual else None)
        return (cos, sin), tuple(visual) if has_visual else None

    def _embed_source(
        self, hidden_states: torch.Tensor, source_hidden_states: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What is added to the patches of the noisy latents: the source's, and where they are."""
        patches = None if source_hidden_states is None else self.source_embedding(source_hidden_states)
        if self.position_embedding is None:
            return patches
        grid = tuple(size // patch for size, patch in zip(hidden_states.shape[2:], self.config.patch_size))
        places = self.position_embedding(hidden_states, grid)
        return places if patches is None else patches + places

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def project_context(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        edit_hidden_states: torch.Tensor | None = None,
        visual_hidden_states: torch.Tensor | None = None,
        visual_positions: torch.Tensor | None = None,
        source_hidden_states: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> RVEDiTContext | None:
        r"""
        Compute once what `forward` otherwise computes in every call: its `context`, for the calls with these tokens,
        this source, these weights and latents of this size. The arguments are those of `forward`.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, num_frames, height, width)`):
                Noisy latents, of which only the size matters.
            encoder_hidden_states, edit_hidden_states, visual_hidden_states, visual_positions, source_hidden_states:
                What all calls have in common.
            attention_kwargs (`dict`, *optional*):
                As in these calls.
            encoder_attention_mask (`torch.Tensor` of shape `(batch, text_len)`, *optional*):
                Of the text tokens; these calls need none.

        Returns:
            [`RVEDiTContext`]: keys and values of all tokens in all blocks, `4 * batch * num_tokens * dim * num_layers`
            bytes in half precision, and the source's patches, `2 * batch * seq * dim`. `None` with group offloading
            and FSDP, where weights are there in `forward` alone.

        Raises:
            `ValueError`: as `forward` does.
        """
        timestep = hidden_states.new_zeros(len(hidden_states))
        self._check_inputs(
            hidden_states,
            timestep,
            encoder_hidden_states,
            edit_hidden_states,
            visual_hidden_states,
            visual_positions,
            source_hidden_states=source_hidden_states,
            attention_kwargs=attention_kwargs,
            encoder_attention_mask=encoder_attention_mask,
        )
        if _is_group_offloaded(self) or isinstance(self.patch_embedding.weight, DTensor):
            return None
        # hooks move what `forward` gets to the weights' device, and nothing here
        device = get_module_execution_device(self)
        hidden_states, encoder_hidden_states, encoder_attention_mask = _near(
            device, (hidden_states, encoder_hidden_states, encoder_attention_mask)
        )
        edit_hidden_states, visual_hidden_states, visual_positions, source_hidden_states = _near(
            device, (edit_hidden_states, visual_hidden_states, visual_positions, source_hidden_states)
        )
        rotary_emb, visual_rotary_emb = self._rotate(hidden_states, visual_hidden_states, visual_positions)
        source_patches = self._embed_source(hidden_states, source_hidden_states)
        if encoder_hidden_states is not None:
            encoder_hidden_states = self.condition_embedder.text_embedder(encoder_hidden_states)
        if edit_hidden_states is not None and self.edit_bias is not None:
            edit_hidden_states = edit_hidden_states + self.edit_bias.to(edit_hidden_states)
        streams = (encoder_hidden_states, edit_hidden_states, visual_hidden_states, visual_rotary_emb)
        streams += (encoder_attention_mask,)
        blocks = tuple(block.project_context(*_near(block.attn2.to_q.weight.device, streams)) for block in self.blocks)
        return RVEDiTContext(rotary_emb, blocks, source_patches)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        edit_hidden_states: torch.Tensor | None = None,
        visual_hidden_states: torch.Tensor | None = None,
        visual_positions: torch.Tensor | None = None,
        visual_attention_mask: torch.Tensor | None = None,
        source_hidden_states: torch.Tensor | None = None,
        return_features: Sequence[int] | None = None,
        stop_after_block: int | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        context: RVEDiTContext | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> RVEDiTTransformer3DModelOutput | tuple:
        r"""
        Predict the flow at `timestep`. Streams that no block reads are ignored. `dim` is the model's width and `seq`
        the number of patches, ordered by time, row, column.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, num_frames, height, width)`):
                Noisy latents; the last three axes are multiples of `patch_size`, at most `rope_max_seq_len` patches
                each.
            timestep (`torch.Tensor` of shape `(batch,)` or `(batch, seq)`):
                Timesteps in `[0, 1000]`, per clip or per token.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, text_len, text_dim)`, *optional*):
                Text tokens, zero padded. All are attended to, as in Wan, but for `encoder_attention_mask`.
            edit_hidden_states (`torch.Tensor` of shape `(batch, num_edit_tokens, dim)`, *optional*):
                Editing tokens of the distiller.
            visual_hidden_states (`torch.Tensor` of shape `(batch, num_visual, dim)`, *optional*):
                Visual tokens of the distiller. `None` skips the visual branch of every block.
            visual_positions (`torch.Tensor` of shape `(batch, num_visual, 3)`, *optional*):
                (time, row, column) of each visual token as fractions of the clip in `[0, 1]`: time is 0 at the first
                frame and 1 at the last, row and column are the cell's centre. Required with `visual_hidden_states`.
            visual_attention_mask (`torch.Tensor` of shape `(batch, num_visual)`, bool, *optional*):
                `True` where a visual token is valid. `None`: all are; pass `None` then, since some attention backends
                take no mask.
            source_hidden_states (`torch.Tensor`, *optional*):
                Latents of the source clip, `(batch, source_channels, num_frames, height, width)`. `None` equals zeros.
            return_features (`Sequence[int]`, *optional*):
                Blocks whose cross-attention output to return.
            stop_after_block (`int`, *optional*):
                The last block to run; the prediction is then `None`. Requires `return_features`.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`RVEDiTTransformer3DModelOutput`] or a tuple.
            attention_kwargs (`dict`, *optional*):
                `{"scale": float}` scales the LoRA layers during this call.
            context ([`RVEDiTContext`], *optional*):
                Of `project_context`, in the place of the tokens, their positions, the text's mask and the source.
            encoder_attention_mask (`torch.Tensor` of shape `(batch, text_len)`, *optional*):
                bool, `True` where a text token is read, or floating point, what is added to the logits of the
                attention that it gets: `log(n)` lets a token count as `n` of its kind. `None`: all are read alike;
                pass `None` then, since some attention backends take no mask.

        Returns:
            [`RVEDiTTransformer3DModelOutput`], or with `return_dict=False` the tuple `(sample,)`, or
            `(sample, features)` when `return_features` is given.

        Raises:
            `ValueError`: if a stream that the routing needs is missing, or an argument's shape or value does not fit.
        """
        last_block = len(self.blocks) - 1 if stop_after_block is None else stop_after_block
        self._check_inputs(
            hidden_states,
            timestep,
            encoder_hidden_states,
            edit_hidden_states,
            visual_hidden_states,
            visual_positions,
            visual_attention_mask,
            source_hidden_states,
            return_features,
            stop_after_block,
            attention_kwargs,
            context,
            encoder_attention_mask,
        )

        batch_size, _, num_frames, height, width = hidden_states.shape
        p_t, p_h, p_w = self.config.patch_size

        # 1. Positions
        visual_rotary_emb = None
        if context is not None:
            rotary_emb = context.rotary_emb
        else:
            rotary_emb, visual_rotary_emb = self._rotate(hidden_states, visual_hidden_states, visual_positions)

        # 2. Patches of the noisy and of the source latents
        patches = self.patch_embedding(hidden_states)
        if context is not None:
            source_patches = context.source_patches
        else:
            source_patches = self._embed_source(hidden_states, source_hidden_states)
        if source_patches is not None:
            patches = patches + source_patches
        hidden_states = patches.flatten(2).transpose(1, 2).contiguous()  # (batch, seq, dim)

        # 3. Timestep and text. The embedder takes both: without text it gets one token, as some kernels take no empty
        # tensors, which is dropped.
        if context is not None:
            encoder_hidden_states = edit_hidden_states = visual_hidden_states = encoder_attention_mask = None
        has_text = encoder_hidden_states is not None
        if not has_text:
            encoder_hidden_states = hidden_states.new_zeros(batch_size, 1, self.config.text_dim)
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1)  # (batch, 1 or seq)
        temb, timestep_proj, encoder_hidden_states, _ = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, timestep_seq_len=timestep.shape[1]
        )
        if not has_text:
            encoder_hidden_states = encoder_hidden_states[:, :0]
        timestep_proj = timestep_proj.unflatten(2, (6, -1))  # (batch, 1 or seq, 6, dim)

        # 4. Editing tokens
        if edit_hidden_states is not None and self.edit_bias is not None:
            edit_hidden_states = edit_hidden_states + self.edit_bias.to(edit_hidden_states)

        # 5. Transformer blocks
        features = {}
        for index, block in enumerate(self.blocks):
            block_args = (
                hidden_states,
                encoder_hidden_states,
                timestep_proj,
                rotary_emb,
                edit_hidden_states,
                visual_hidden_states,
                visual_rotary_emb,
                visual_attention_mask,
                return_features is not None and index in return_features,
                None if context is None else context.blocks[index],
                encoder_attention_mask,
            )
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *block_args)
            else:
                hidden_states = block(*block_args)
            if return_features is not None and index in return_features:
                hidden_states, features[index] = hidden_states
            if index == last_block:
                break
        features = None if return_features is None else tuple(features[index] for index in return_features)

        # 6. Output norm, projection & unpatchify
        sample = None
        if stop_after_block is None:
            # With the model spread over devices, the table and the embedding are not where the last block is.
            modulation = self.scale_shift_table.to(temb.device).float() + temb.float().unsqueeze(2)
            shift, scale = modulation.to(hidden_states.device).unbind(2)  # (batch, 1 or seq, dim)
            hidden_states = (self.norm_out(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
            hidden_states = self.proj_out(hidden_states)  # (batch, seq, p_t * p_h * p_w * out_channels)
            hidden_states = hidden_states.reshape(
                batch_size, num_frames // p_t, height // p_h, width // p_w, p_t, p_h, p_w, -1
            )
            hidden_states = hidden_states.permute(0, 7, 1, 4, 2, 5, 3, 6)
            sample = hidden_states.reshape(batch_size, -1, num_frames, height, width)

        if not return_dict:
            return (sample,) if return_features is None else (sample, features)
        return RVEDiTTransformer3DModelOutput(sample=sample, features=features)

    def _check_inputs(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        edit_hidden_states,
        visual_hidden_states,
        visual_positions,
        visual_attention_mask=None,
        source_hidden_states=None,
        return_features=None,
        stop_after_block=None,
        attention_kwargs=None,
        context=None,
        encoder_attention_mask=None,
    ):
        num_blocks = len(self.blocks)
        if attention_kwargs:
            raise ValueError(f"`attention_kwargs` knows only the key 'scale', got {sorted(attention_kwargs)}.")

        # 1. What to run and what to return
        if stop_after_block is not None:
            if not 0 <= stop_after_block < num_blocks:
                raise ValueError(f"`stop_after_block` has to lie in [0, {num_blocks}), got {stop_after_block}.")
            if return_features is None:
                raise ValueError("`stop_after_block` leaves nothing to return without `return_features`.")
        last_block = num_blocks - 1 if stop_after_block is None else stop_after_block
        if return_features is not None:
            if any(not 0 <= index <= last_block for index in return_features):
                raise ValueError(f"`return_features` has to name blocks in [0, {last_block}], got {return_features}.")
            if self.is_cache_enabled:
                raise ValueError("`return_features` needs every block to run: call `disable_cache()` first.")

        # 2. Latents
        if hidden_states.ndim != 5 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`hidden_states` has to be (batch, {self.config.in_channels}, num_frames, height, width), got "
                f"{tuple(hidden_states.shape)}."
            )
        if any(size % patch for size, patch in zip(hidden_states.shape[2:], self.config.patch_size)):
            raise ValueError(
                f"`hidden_states` has to have a size that `patch_size` = {tuple(self.config.patch_size)} divides, got "
                f"{tuple(hidden_states.shape[2:])}."
            )
        grid = tuple(size // patch for size, patch in zip(hidden_states.shape[2:], self.config.patch_size))
        if any(size > self.config.rope_max_seq_len for size in grid):
            raise ValueError(
                f"`hidden_states` has to have at most `rope_max_seq_len` = {self.config.rope_max_seq_len} patches on "
                f"each axis, got {grid}."
            )
        batch_size, seq = hidden_states.shape[0], math.prod(grid)
        # Context parallelism hands each rank its own part of the timesteps of tokens, but the whole latents.
        is_split = self._parallel_config is not None and self._parallel_config.context_parallel_config is not None
        if (
            timestep.ndim not in (1, 2)
            or timestep.shape[0] != batch_size
            or (timestep.ndim == 2 and timestep.shape[1] != seq and not is_split)
        ):
            raise ValueError(
                f"`timestep` has to be ({batch_size},) or ({batch_size}, {seq}), got {tuple(timestep.shape)}."
            )
        if source_hidden_states is not None:
            if self.source_embedding is None:
                raise ValueError("`source_hidden_states` has to be None for a model with `source_channels` = 0.")
            expected = (batch_size, self.config.source_channels, *hidden_states.shape[2:])
            if tuple(source_hidden_states.shape) != expected:
                raise ValueError(
                    f"`source_hidden_states` has to be {expected}, got {tuple(source_hidden_states.shape)}."
                )

        # 3. Token streams, or what was made of them
        visual_shape = None if visual_hidden_states is None else visual_hidden_states.shape[:2]
        if context is not None:
            keys = [key for block in context.blocks for key in (block.key, block.visual_key) if key is not None]
            num_clips = {len(key) for key in keys}
            if len(context.blocks) != num_blocks or num_clips != {batch_size}:
                raise ValueError(
                    f"`context` has to be of {batch_size} clips and {num_blocks} blocks, as `project_context` of this "
                    f"model returns it, got {sorted(num_clips)} clips and {len(context.blocks)} blocks."
                )
            if context.source_patches is not None and tuple(context.source_patches.shape[2:]) != grid:
                raise ValueError(
                    f"`context` has to be of {grid} patches, got {tuple(context.source_patches.shape[2:])}."
                )
            visual_keys = [block.visual_key for block in context.blocks if block.visual_key is not None]
            visual_shape = visual_keys[0].shape[:2] if visual_keys else None
        if visual_shape is not None and visual_attention_mask is not None:
            if visual_attention_mask.dtype != torch.bool or visual_attention_mask.shape != visual_shape:
                raise ValueError(
                    f"`visual_attention_mask` has to be bool of shape {tuple(visual_shape)}, got "
                    f"{visual_attention_mask.dtype} of {tuple(visual_attention_mask.shape)}."
                )
        if context is not None:
            return
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        for index, block in enumerate(self.blocks):
            for name, tokens in (("edit", edit_hidden_states), ("text", encoder_hidden_states)):
                if tokens is None and name in block.tokens and index <= last_block:
                    argument = "edit_hidden_states" if name == "edit" else "encoder_hidden_states"
                    raise ValueError(f"`{argument}` is None, but block {index} reads the {name} tokens.")
            if visual_hidden_states is None and set(block.tokens) == {"visual"} and index <= last_block:
                raise ValueError(f"`visual_hidden_states` is None, but block {index} reads nothing else.")
        for argument, tokens, width in (
            ("encoder_hidden_states", encoder_hidden_states, self.config.text_dim),
            ("edit_hidden_states", edit_hidden_states, dim),
            ("visual_hidden_states", visual_hidden_states, dim),
        ):
            if tokens is not None and (tokens.ndim != 3 or tokens.shape[0] != batch_size or tokens.shape[2] != width):
                raise ValueError(
                    f"`{argument}` has to be ({batch_size}, sequence, {width}), got {tuple(tokens.shape)}."
                )
        if encoder_attention_mask is not None:
            expected = None if encoder_hidden_states is None else tuple(encoder_hidden_states.shape[:2])
            is_mask = encoder_attention_mask.dtype == torch.bool or encoder_attention_mask.is_floating_point()
            if not is_mask or tuple(encoder_attention_mask.shape) != expected:
                raise ValueError(
                    f"`encoder_attention_mask` has to be bool or floating point of shape {expected}, as there are text"
                    f" tokens, got {encoder_attention_mask.dtype} of {tuple(encoder_attention_mask.shape)}."
                )
        if visual_hidden_states is not None:
            expected = (*visual_hidden_states.shape[:2], 3)
            if visual_positions is None or tuple(visual_positions.shape) != expected:
                got = None if visual_positions is None else tuple(visual_positions.shape)
                raise ValueError(f"`visual_positions` has to be {tuple(expected)}, got {got}.")
