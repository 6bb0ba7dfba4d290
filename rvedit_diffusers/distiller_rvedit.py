"""The token distiller: learnable queries inside an MLLM's context, read out once and projected for the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn
from transformers import PreTrainedModel


@dataclass
class RVEDiTTokenDistillerOutput(BaseOutput):
    """Output of [`RVEDiTTokenDistiller`].

    Args:
        edit_hidden_states (`torch.Tensor` of shape `(batch, num_edit_tokens, dim)`): Editing tokens.
        visual_hidden_states (`torch.Tensor` of shape `(batch, num_visual, dim)`): Native visual tokens.
        visual_positions (`torch.Tensor` of shape `(batch, num_visual, 3)`): float32 (time, row, column), fractions of
            the clip.
        visual_attention_mask (`torch.Tensor` of shape `(batch, num_visual)`, *optional*): bool, `True` for tokens that
            exist; `None` if all do.
    """

    edit_hidden_states: torch.Tensor
    visual_hidden_states: torch.Tensor
    visual_positions: torch.Tensor
    visual_attention_mask: torch.Tensor | None = None


class RVEDiTConnector(nn.Module):
    """LayerNorm -> Linear -> GELU (tanh) -> Linear, from the MLLM's width to the transformer's; hidden width `dim`."""

    def __init__(self, mllm_hidden_size: int, dim: int):
        super().__init__()
        self.norm = FP32LayerNorm(mllm_hidden_size)
        self.linear_1 = nn.Linear(mllm_hidden_size, dim)
        self.act = nn.GELU(approximate="tanh")
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.norm(hidden_states)  # (batch, seq, mllm_hidden_size)
        hidden_states = self.linear_1(hidden_states)  # (batch, seq, dim)
        hidden_states = self.act(hidden_states)
        return self.linear_2(hidden_states)  # (batch, seq, dim)


class RVEDiTTokenDistiller(ModelMixin, ConfigMixin):
    """Distils a clip and an instruction into editing tokens and visual tokens with one pass of a frozen MLLM.

    `num_edit_tokens` learnable queries stand in the MLLM's context as the embeddings of the slots that
    [`RVEDiTProcessor`] appends. The hidden states at the slots and at the clip's visual tokens, found by mask, go
    through one connector each.

    The two halves can be called apart: [`~RVEDiTTokenDistiller.harvest`] runs the MLLM (its result can be cached as
    long as MLLM and queries are frozen), [`~RVEDiTTokenDistiller.connect`] is cheap. Under accelerate's offloading
    call the halves instead of the module, whose hook would move the MLLM along with the other arguments.

    The abstract of RVEDiT (arXiv 2605.24674) asks for learnable editing tokens distilled from a multimodal LLM;
    queries in its context, the read-out by mask and the connectors are this library's choice.

    Args:
        mllm_hidden_size (`int`): Width of the MLLM's language model.
        dim (`int`): Width of the tokens: the transformer's `num_attention_heads * attention_head_dim`. Also the hidden
            width of the connectors.
        num_edit_tokens (`int`, defaults to 64): Number of queries.
        hidden_layer (`int`, defaults to -1): Which of the MLLM's hidden states is read, as an index into transformers'
            `hidden_states` tuple: 0 is the embeddings, -1 the last layer after the final norm.
    """

    _no_split_modules = ["RVEDiTConnector"]
    _group_offload_block_modules = ["edit_connector", "visual_connector"]
    _skip_layerwise_casting_patterns = ["queries", "norm"]

    @register_to_config
    def __init__(self, mllm_hidden_size: int, dim: int, num_edit_tokens: int = 64, hidden_layer: int = -1):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_edit_tokens, mllm_hidden_size) * 0.02)
        self.edit_connector = RVEDiTConnector(mllm_hidden_size, dim)
        self.visual_connector = RVEDiTConnector(mllm_hidden_size, dim)

    def check_inputs(self, mllm: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> None:
        """Raise a `TypeError` or `ValueError` that names the argument if `mllm` or `inputs` does not fit."""
        if not hasattr(getattr(mllm, "base_model", None), "get_rope_index"):
            raise TypeError(
                f"`mllm` must be a Qwen2.5-VL or Qwen3-VL model of transformers, got {type(mllm).__name__}."
            )
        text_config = mllm.config.get_text_config()
        if text_config.hidden_size != self.config.mllm_hidden_size:
            raise ValueError(
                f"`mllm` has hidden size {text_config.hidden_size}, but this distiller was made for"
                f" `mllm_hidden_size={self.config.mllm_hidden_size}`."
            )
        num_states = text_config.num_hidden_layers + 1
        if not -num_states <= self.config.hidden_layer < num_states:
            raise ValueError(
                f"`hidden_layer` must be in [{-num_states}, {num_states - 1}] for this `mllm`,"
                f" got {self.config.hidden_layer}."
            )
        if not isinstance(inputs, Mapping):
            raise TypeError(f"`inputs` must be what RVEDiTProcessor returns, got {type(inputs).__name__}.")
        required = (
            "input_ids",
            "attention_mask",
            "mm_token_type_ids",
            "pixel_values_videos",
            "video_grid_thw",
            "edit_mask",
            "visual_mask",
            "visual_positions",
        )
        if missing := [name for name in required if name not in inputs]:
            raise ValueError(f"`inputs` must be what RVEDiTProcessor returns, but lacks {missing}.")
        num_slots = inputs["edit_mask"].sum(1)
        if (num_slots != self.config.num_edit_tokens).any():
            raise ValueError(
                f"`inputs` has {num_slots.tolist()} editing slots per sample, but this distiller has"
                f" `num_edit_tokens={self.config.num_edit_tokens}`: the processor must be made with the same number."
            )
        if inputs["visual_positions"].dtype != torch.float32:
            raise ValueError(
                f'`inputs["visual_positions"]` must be float32, got {inputs["visual_positions"].dtype}: move the'
                " processor's output to a device without a dtype."
            )

    def harvest(
        self, mllm: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run the MLLM once, without its language-model head, and read its states at the slots and the visual tokens.

        Args:
            mllm (`PreTrainedModel`): A Qwen2.5-VL or Qwen3-VL model, with or without the head. Freeze it with
                `requires_grad_(False)`: gradients still reach the queries. Its state does not change.
            inputs (`BatchFeature`): What [`RVEDiTProcessor`] returns, on the MLLM's device.

        Returns:
            `tuple`: edit states `(batch, num_edit_tokens, mllm_hidden_size)` and visual states `(batch, num_visual,
            mllm_hidden_size)` in the MLLM's dtype, `visual_positions` `(batch, num_visual, 3)` float32, and a bool
            mask `(batch, num_visual)` of the visual tokens that exist, or `None` if all do. States of padding are 0.

        Raises:
            TypeError, ValueError: If `mllm` is of another kind or width, or `inputs` of another processor or number of
                slots.
        """
        self.check_inputs(mllm, inputs)
        # offloading needs to be told: the base model is called, not `mllm`, and the queries are read outside `forward`
        if hasattr(mllm, "_hf_hook") and hasattr(mllm._hf_hook, "pre_forward"):
            mllm._hf_hook.pre_forward(mllm)
        if self.queries.device.type == "meta":  # wherever else they rest, model offload would move the MLLM for them
            self._hf_hook.pre_forward(self)
        group_hooks = []
        for module in (mllm, self):
            hooks = getattr(module, "_diffusers_hook", None)
            group_hook = hooks.get_hook("group_offloading") if hooks is not None else None
            if group_hook is not None:
                group_hook.pre_forward(module)
                stream = group_hook.group.stream  # diffusers waits for it in layers, but not in what is here
                if stream is not None:
                    torch.accelerator.current_stream(stream.device).wait_stream(stream)
                group_hooks.append((group_hook, module))
        base_model = mllm.base_model
        input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        edit_mask, visual_mask, visual_positions = (
            inputs[name] for name in ("edit_mask", "visual_mask", "visual_positions")
        )
        batch_size = input_ids.shape[0]
        grid = {name: inputs[name] for name in ("video_grid_thw", "second_per_grid_ts") if name in inputs}

        # 1. The queries take the slots. Qwen3-VL refuses ids next to embeddings, so the ids give the positions here.
        position_ids, _ = base_model.get_rope_index(
            input_ids, mm_token_type_ids=inputs["mm_token_type_ids"], attention_mask=attention_mask, **grid
        )  # (3, batch, seq)
        inputs_embeds = base_model.get_input_embeddings()(input_ids)  # (batch, seq, mllm_hidden_size)
        queries = self.queries.to(inputs_embeds).repeat(batch_size, 1)  # (batch * num_edit_tokens, mllm_hidden_size)
        # a split MLLM may embed on another device than it sees
        slots = edit_mask.unsqueeze(-1).to(inputs_embeds.device)
        inputs_embeds = inputs_embeds.masked_scatter(slots, queries)

        # 2. One pass
        last_layer = self.config.hidden_layer == -1
        outputs = base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values_videos=inputs["pixel_values_videos"],
            video_grid_thw=inputs["video_grid_thw"],
            use_cache=False,
            output_hidden_states=not last_layer,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state if last_layer else outputs.hidden_states[self.config.hidden_layer]
        hidden_states = hidden_states.to(edit_mask.device)  # a split MLLM ends on another device than it begins on
        for group_hook, module in group_hooks:
            group_hook.post_forward(module, None)

        # 3. Read under the masks
        edit_states = hidden_states[edit_mask].view(batch_size, -1, hidden_states.shape[-1])
        num_visual = visual_mask.sum(1, keepdim=True)  # (batch, 1)
        slots = torch.arange(visual_positions.shape[1], device=num_visual.device) < num_visual  # (batch, num_visual)
        visual_states = hidden_states.new_zeros(*slots.shape, hidden_states.shape[-1])
        visual_states = visual_states.masked_scatter(slots.unsqueeze(-1), hidden_states[visual_mask])
        return edit_states, visual_states, visual_positions, None if slots.all() else slots

    @apply_forward_hook
    def connect(self, edit_states: torch.Tensor, visual_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project harvested states to the transformer's width.

        Args:
            edit_states (`torch.Tensor` of shape `(batch, num_edit_tokens, mllm_hidden_size)`): Any floating dtype, on
                any device.
            visual_states (`torch.Tensor` of shape `(batch, num_visual, mllm_hidden_size)`): Likewise.

        Returns:
            `tuple`: `edit_hidden_states` `(batch, num_edit_tokens, dim)` and `visual_hidden_states`
            `(batch, num_visual, dim)` in this model's dtype and on its device.

        Raises:
            ValueError: If the last dimension of an argument is not `mllm_hidden_size`.
        """
        for name, states in (("edit_states", edit_states), ("visual_states", visual_states)):
            if states.ndim != 3 or states.shape[-1] != self.config.mllm_hidden_size:
                raise ValueError(
                    f"`{name}` must have shape (batch, seq, {self.config.mllm_hidden_size}),"
                    f" got {tuple(states.shape)}."
                )
        device = get_module_execution_device(self)
        edit_states, visual_states = (states.to(device, self.dtype) for states in (edit_states, visual_states))
        return self.edit_connector(edit_states), self.visual_connector(visual_states)

    def forward(
        self, mllm: PreTrainedModel, inputs: Mapping[str, torch.Tensor], return_dict: bool = True
    ) -> RVEDiTTokenDistillerOutput | tuple[torch.Tensor, ...]:
        """[`~RVEDiTTokenDistiller.harvest`] then [`~RVEDiTTokenDistiller.connect`].

        Args:
            mllm, inputs: See `harvest`.
            return_dict (`bool`, defaults to `True`): Whether to return a [`RVEDiTTokenDistillerOutput`] or its fields
                as a tuple.
        """
        edit_states, visual_states, visual_positions, visual_attention_mask = self.harvest(mllm, inputs)
        edit_hidden_states, visual_hidden_states = self.connect(edit_states, visual_states)
        output = (edit_hidden_states, visual_hidden_states, visual_positions, visual_attention_mask)
        return RVEDiTTokenDistillerOutput(*output) if return_dict else output
