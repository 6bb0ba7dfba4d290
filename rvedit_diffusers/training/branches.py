"""What runs in a training step, as one module: an editing branch and the branch that it is compared with."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..distiller_rvedit import RVEDiTTokenDistiller
from ..losses import (
    AlignmentHead,
    cosine_alignment_loss,
    feature_matching_loss,
    infonce_loss,
    relational_alignment_loss,
)
from ..transformer_rvedit import RVEDiTTransformer3DModel


ALIGNMENT_LOSSES = ("infonce", "cosine", "relational")
ROWS_AT_ONCE = 2048  # of InfoNCE's logits: 16 MiB a clip in float32


def default_align_blocks(config) -> list[int]:
    """The last shallow block and the first deep one, near a third of the depth, where the reference pass is cheap.

    Args:
        config (`FrozenDict`): Of an [`RVEDiTTransformer3DModel`].
    """
    num_shallow = config.num_layers // 3 if config.num_shallow_blocks is None else config.num_shallow_blocks
    return sorted({max(num_shallow - 1, 0), min(num_shallow, config.num_layers - 1)})


class EditingBranches(nn.Module):
    """Everything that learns, so that one wrapped module (DDP, FSDP2) runs both branches of a step.

    The reference branch has the same parameters, noise, noise levels and dropped conditions, but its MLLM has seen the
    edited clip. It runs first, without gradient, and stops after the last aligned block.

    Args:
        transformer ([`RVEDiTTransformer3DModel`]): Serves both branches.
        distiller ([`RVEDiTTokenDistiller`], *optional*): Given when its connectors, or all of it, learn.
        text_encoder (`PreTrainedModel`, *optional*): Given when it learns.
        mllm (`PreTrainedModel`, *optional*): The frozen MLLM, for queries that learn. It is no submodule: it is
            neither wrapped nor saved.
        align_blocks (`Sequence[int]`, *optional*): Blocks whose cross-attention features are aligned;
            [`default_align_blocks`] by default.
        align_loss (`str`, defaults to `"infonce"`): One of `ALIGNMENT_LOSSES`. InfoNCE compares both branches behind
            one head. The others have no negatives, so that a head on both sides would collapse: the head maps features
            of the editing branch onto those of the reference branch.
        align_temperature (`float`, defaults to 0.07): Of InfoNCE.
        align_reference_latents (`str`, defaults to `"source"`): Whether the reference branch has the latents of the
            source clip beside the noisy ones, so that only the tokens differ, or those of the edited clip
            (`"reference"`).

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        transformer: RVEDiTTransformer3DModel,
        distiller: RVEDiTTokenDistiller | None = None,
        text_encoder: nn.Module | None = None,
        mllm: nn.Module | None = None,
        align_blocks: Sequence[int] | None = None,
        align_loss: str = "infonce",
        align_temperature: float = 0.07,
        align_reference_latents: str = "source",
    ):
        super().__init__()
        config = transformer.config
        self.align_blocks = list(align_blocks or default_align_blocks(config))
        if not all(0 <= block < config.num_layers for block in self.align_blocks):
            raise ValueError(
                f"`align_blocks` has to name blocks in [0, {config.num_layers - 1}], but is {self.align_blocks}"
            )
        if align_loss not in ALIGNMENT_LOSSES:
            raise ValueError(f"`align_loss` has to be one of {ALIGNMENT_LOSSES}, but is {align_loss!r}")
        if align_reference_latents not in ("source", "reference"):
            raise ValueError(
                f"`align_reference_latents` has to be 'source' or 'reference', but is {align_reference_latents!r}"
            )
        self.transformer, self.distiller, self.text_encoder = transformer, distiller, text_encoder
        self._mllm = (mllm,)  # out of sight of nn.Module
        self.align_loss, self.align_temperature = align_loss, align_temperature
        self.align_reference_latents = align_reference_latents
        dim = config.num_attention_heads * config.attention_head_dim
        out_dim = 128 if align_loss == "infonce" else dim
        self.heads = nn.ModuleList(AlignmentHead(dim, out_dim=out_dim) for _ in self.align_blocks)

    def _tokens(self, batch: dict, prefix: str = "") -> dict[str, torch.Tensor]:
        if f"{prefix}mllm_inputs" in batch:
            inputs = batch[f"{prefix}mllm_inputs"]
            edit, visual, positions, mask = self.distiller(self._mllm[0], inputs, return_dict=False)
            assert mask is None  # clips of one size have equally many visual tokens
        else:
            edit, visual = batch[f"{prefix}edit_tokens"], batch[f"{prefix}visual_tokens"]
            positions = batch["visual_positions"]
            if self.distiller is not None:
                edit, visual = self.distiller.connect(edit, visual)
        keep = batch["keep_instruction"].view(-1, 1, 1)
        return {
            "edit_hidden_states": edit * keep,
            "visual_hidden_states": visual * keep,
            "visual_positions": positions,
        }

    def _align(self, head: AlignmentHead, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.align_loss == "infonce":
            chunk_size = ROWS_AT_ONCE if features.shape[1] > ROWS_AT_ONCE else None
            return infonce_loss(head(features), head(targets), self.align_temperature, chunk_size=chunk_size)
        if self.align_loss == "cosine":
            return cosine_alignment_loss(head(features), targets)
        return relational_alignment_loss(head(features), targets)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a step.

        Args:
            batch (`dict`): What [`~rvedit_diffusers.training.samples.Samples`] makes of each sample, as batches:
                - `latents`, `source_latents`, `noise` `(batch, channels, frames, height, width)`;
                - `sigmas`, `keep_instruction`, `keep_source` `(batch,)`;
                - `prompt_embeds` `(batch, length, text_dim)`, or `input_ids` and `attention_mask` `(batch, length)`;
                - `edit_tokens`, `visual_tokens`, `reference_edit_tokens`, `reference_visual_tokens` `(batch, num, dim
                  or mllm_hidden_size)` and `visual_positions` `(batch, num, 3)`, or `mllm_inputs` and
                  `reference_mllm_inputs`, what [`RVEDiTProcessor`] returns;
                - `align_positions` `(batch, num)` int64, the tokens to align; without it the reference branch does not
                  run.

        Returns:
            `tuple`: the velocity `(batch, channels, frames, height, width)`, and the alignment loss `(batch,)`, the
            mean over the blocks in float32, or `None`.
        """
        text = batch.get("prompt_embeds")
        if self.text_encoder is not None:
            mask = batch["attention_mask"]
            text = self.text_encoder(batch["input_ids"], mask).last_hidden_state * mask.unsqueeze(-1)
        level = batch["sigmas"].view(-1, 1, 1, 1, 1)
        keep_source = batch["keep_source"].view(-1, 1, 1, 1, 1)
        condition = {
            "hidden_states": (1 - level) * batch["latents"] + level * batch["noise"],
            "timestep": 1000 * batch["sigmas"],
            "encoder_hidden_states": text,
        }
        source = {"source_hidden_states": batch["source_latents"] * keep_source}
        if "align_positions" not in batch:
            return self.transformer(**condition, **source, **self._tokens(batch)).sample, None

        # 1. The reference branch
        with torch.no_grad():
            reference_source = source
            if self.align_reference_latents == "reference":
                reference_source = {"source_hidden_states": batch["latents"] * keep_source}
            targets = self.transformer(
                **condition,
                **reference_source,
                **self._tokens(batch, "reference_"),
                return_features=self.align_blocks,
                stop_after_block=max(self.align_blocks),
            ).features

        # 2. The editing branch
        output = self.transformer(**condition, **source, **self._tokens(batch), return_features=self.align_blocks)
        losses = []
        for head, features, target in zip(self.heads, output.features, targets, strict=True):
            positions = batch["align_positions"].unsqueeze(-1).expand(-1, -1, features.shape[-1])
            losses.append(self._align(head, features.gather(1, positions), target.gather(1, positions)))
        return output.sample, torch.stack(losses).mean(0)


class ConnectingBranches(EditingBranches):
    """The first stage after a base was converted: its shallow blocks learn to read editing tokens in place of text.

    The text branch is the base itself: its shallow blocks read the text, as editing tokens of the text's own values.
    The editing branch reads what the distiller makes of a clip and its caption. Where both have the same features the
    converted model computes what the base computes, as deep blocks read the text in both, and see neither visual
    tokens nor the source. Both branches stop after the last shallow block. The transformer does not learn.

    Args:
        transformer ([`RVEDiTTransformer3DModel`]): Its shallow blocks read editing tokens, its deep ones do not.
        distiller ([`RVEDiTTokenDistiller`]): What learns.
        mllm (`PreTrainedModel`, *optional*): See [`EditingBranches`].

    Raises:
        ValueError: The transformer's routing leaves nothing to connect.
    """

    def __init__(
        self, transformer: RVEDiTTransformer3DModel, distiller: RVEDiTTokenDistiller, mllm: nn.Module | None = None
    ):
        tokens = [block.tokens for block in transformer.blocks]
        shallow = [index for index, names in enumerate(tokens) if "edit" in names]
        if not shallow or any("text" in tokens[index] for index in shallow) or len(shallow) == len(tokens):
            raise ValueError(
                "`transformer` has to read editing tokens without text in its shallow blocks, and text in its deep"
                f" ones, but has num_shallow_blocks={transformer.config.num_shallow_blocks},"
                f" shallow_tokens={transformer.config.shallow_tokens}, deep_tokens={transformer.config.deep_tokens}"
            )
        super().__init__(transformer, distiller, mllm=mllm, align_blocks=shallow)
        self.heads = nn.ModuleList()
        transformer.requires_grad_(False)
        distiller.visual_connector.requires_grad_(False)  # shallow blocks read no visual tokens

    def forward(self, batch: dict) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Run a step.

        Args:
            batch (`dict`): As for [`EditingBranches`]; `source_latents`, what is of the reference and the conditions
                that are kept have no use. `is_base` (`bool`): whether the shallow blocks read the text.

        Returns:
            `tuple`: with `align_positions` in the batch, `None` and the loss `(batch,)`, the mean over the shallow
            blocks in float32; without, the velocity `(batch, channels, frames, height, width)` and `None`.
        """
        level = batch["sigmas"].view(-1, 1, 1, 1, 1)
        condition = {
            "hidden_states": (1 - level) * batch["latents"] + level * batch["noise"],
            "timestep": 1000 * batch["sigmas"],
            "encoder_hidden_states": batch["prompt_embeds"],
        }
        if isinstance(self.transformer, FSDPModule):
            self.transformer.unshard()  # weights of its own are used before it is called
        with torch.no_grad():  # the transformer adds its bias to editing tokens
            text = self.transformer.condition_embedder.text_embedder(batch["prompt_embeds"])
            text = text.float() - self.transformer.edit_bias.float()
        if "align_positions" not in batch:
            edit = text if batch.get("is_base") else self._tokens(batch)["edit_hidden_states"]
            return self.transformer(**condition, edit_hidden_states=edit).sample, None

        stop = {"return_features": self.align_blocks, "stop_after_block": max(self.align_blocks)}
        with torch.no_grad():
            targets = self.transformer(**condition, edit_hidden_states=text, **stop).features
        edit = self._tokens(batch)["edit_hidden_states"]
        features = self.transformer(**condition, edit_hidden_states=edit, **stop).features
        positions = batch["align_positions"].unsqueeze(-1).expand(-1, -1, features[0].shape[-1])
        losses = [
            feature_matching_loss(feature.gather(1, positions), target.gather(1, positions))
            for feature, target in zip(features, targets, strict=True)
        ]
        return None, torch.stack(losses).mean(0)
