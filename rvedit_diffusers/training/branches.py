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
    token_contrast_loss,
)
from ..transformer_rvedit import RVEDiTTransformer3DModel


ALIGNMENT_LOSSES = ("infonce", "contrast", "cosine", "relational")
CONTRASTIVE_LOSSES = ("infonce", "contrast")  # those with negatives, which bound the mutual information
REFERENCE_TOKENS = ("own", "shuffled")
NEGATIVES = ("next", "twin")
ROWS_AT_ONCE = 2048  # of InfoNCE's logits: 16 MiB a clip in float32


def default_align_blocks(config) -> list[int]:
    """The last shallow block and the first deep one, near a third of the depth, where the reference pass is cheap.

    Args:
        config (`FrozenDict`): Of an [`RVEDiTTransformer3DModel`].
    """
    num_shallow = config.num_layers // 3 if config.num_shallow_blocks is None else config.num_shallow_blocks
    return sorted({max(num_shallow - 1, 0), min(num_shallow, config.num_layers - 1)})


def needs_next_sample(align_loss: str, align_reference_tokens: str, align_negatives: str) -> bool:
    """Whether a branch reads the tokens of the next sample, so that a micro-batch has to hold two; see
    [`EditingBranches`] for the arguments."""
    return align_reference_tokens == "shuffled" or (align_loss == "contrast" and align_negatives == "next")


def _of_next_sample(tokens: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(each.roll(-1, dims=0) for each in tokens)


def _kept(batch: dict, tokens: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    edit, visual, positions = tokens
    keep = batch["keep_instruction"].view(-1, 1, 1)
    return {
        "edit_hidden_states": edit * keep,
        "visual_hidden_states": visual * keep,
        "visual_positions": positions,
    }


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
        align_loss (`str`, defaults to `"infonce"`): One of `ALIGNMENT_LOSSES`. InfoNCE and the contrast, for which the
            reference branch runs a second time with wrong tokens, compare both branches behind one head. The others
            have no negatives, so that a head on both sides would collapse: the head maps features of the editing
            branch onto those of the reference branch.
        align_temperature (`float`, defaults to 0.07): Of InfoNCE and the contrast.
        align_reference_latents (`str`, defaults to `"source"`): Whether the reference branch has the latents of the
            source clip beside the noisy ones, so that only the tokens differ, or those of the edited clip
            (`"reference"`).
        align_reference_tokens (`str`, defaults to `"own"`): `"shuffled"`: the reference branch reads the reference
            tokens of the next sample of the micro-batch, the first one's in the last. A control: whatever it gains is
            not owed to what the tokens say.
        align_negatives (`str`, defaults to `"next"`): Which tokens the contrast takes for wrong: the reference tokens
            of the next sample of the micro-batch, mostly of another scene, or those of the `"twin"`, which come with
            the batch. The twin has the same source and an instruction that differs in one word, so that nothing but
            this word tells them apart: the hardest negative.
        align_ignore_radius (`int`, defaults to 0): Tokens that are at most so many patches away, in time, rows and
            columns, are no negatives of InfoNCE; 0: all are. The loss is given as if they were, such that the log of
            the number of positions minus it stays a bound on the mutual information.

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
        align_reference_tokens: str = "own",
        align_negatives: str = "next",
        align_ignore_radius: int = 0,
    ):
        super().__init__()
        config = transformer.config
        self.align_blocks = list(align_blocks or default_align_blocks(config))
        if not all(0 <= block < config.num_layers for block in self.align_blocks):
            raise ValueError(
                f"`align_blocks` has to name blocks in [0, {config.num_layers - 1}], but is {self.align_blocks}"
            )
        for name, value, choices in (
            ("align_loss", align_loss, ALIGNMENT_LOSSES),
            ("align_reference_latents", align_reference_latents, ("source", "reference")),
            ("align_reference_tokens", align_reference_tokens, REFERENCE_TOKENS),
            ("align_negatives", align_negatives, NEGATIVES),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` has to be one of {choices}, but is {value!r}")
        if align_loss == "contrast" and align_reference_tokens != "own":
            raise ValueError(
                "`align_reference_tokens` has to be 'own' where `align_loss` is 'contrast', which tells them from"
                f" others, but is {align_reference_tokens!r}"
            )
        if align_ignore_radius < 0:
            raise ValueError(f"`align_ignore_radius` has to be at least 0, but is {align_ignore_radius}")
        if align_ignore_radius and align_loss != "infonce":
            raise ValueError(
                "`align_ignore_radius` has to be 0 where `align_loss` is not 'infonce', which alone has other tokens"
                f" for negatives, but is {align_ignore_radius}"
            )
        self.transformer, self.distiller, self.text_encoder = transformer, distiller, text_encoder
        self._mllm = (mllm,)  # out of sight of nn.Module
        self.align_loss, self.align_temperature = align_loss, align_temperature
        self.align_reference_latents, self.align_reference_tokens = align_reference_latents, align_reference_tokens
        self.align_negatives, self.align_ignore_radius = align_negatives, align_ignore_radius
        dim = config.num_attention_heads * config.attention_head_dim
        out_dim = 128 if align_loss in CONTRASTIVE_LOSSES else dim
        self.heads = nn.ModuleList(AlignmentHead(dim, out_dim=out_dim) for _ in self.align_blocks)

    def _make_tokens(self, batch: dict, prefix: str = "") -> tuple[torch.Tensor, ...]:
        if f"{prefix}mllm_inputs" in batch:
            inputs = batch[f"{prefix}mllm_inputs"]
            edit, visual, positions, mask = self.distiller(self._mllm[0], inputs, return_dict=False)
            assert mask is None  # clips of one size have equally many visual tokens
        else:
            edit, visual = batch[f"{prefix}edit_tokens"], batch[f"{prefix}visual_tokens"]
            positions = batch["visual_positions"]
            if self.distiller is not None:
                edit, visual = self.distiller.connect(edit, visual)
        return edit, visual, positions

    def _tokens(self, batch: dict, prefix: str = "") -> dict[str, torch.Tensor]:
        return _kept(batch, self._make_tokens(batch, prefix))

    def _neighbours(self, batch: dict) -> torch.Tensor | None:
        # Of each two of the positions whether they are near, `(batch, num, num)` bool
        if not self.align_ignore_radius:
            return None
        sizes = zip(batch["latents"].shape[3:], self.transformer.config.patch_size[1:], strict=True)
        num_rows, num_columns = (size // patch for size, patch in sizes)
        at = batch["align_positions"]
        are_near = ~torch.eye(at.shape[1], dtype=torch.bool, device=at.device).expand(len(at), -1, -1)
        for place in (at // (num_rows * num_columns), at // num_columns % num_rows, at % num_columns):
            place = place.to(torch.int16)  # the differences are as many as the tokens squared
            are_near = are_near & ((place[:, :, None] - place[:, None]).abs() <= self.align_ignore_radius)
        return are_near

    def _align(
        self,
        head: AlignmentHead,
        features: torch.Tensor,
        targets: torch.Tensor,
        *wrong_targets: torch.Tensor,
        ignored: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.align_loss == "infonce":
            chunk_size = ROWS_AT_ONCE if features.shape[1] > ROWS_AT_ONCE else None
            loss = infonce_loss(head(features), head(targets), self.align_temperature, ignored, chunk_size)
            if ignored is not None:
                share = (~ignored).float().mean(-1)  # of the positions, which are candidates: that of each row
                loss = loss - share.log().mean(-1)
            return loss
        if self.align_loss == "contrast":
            projected = [head(each) for each in (features, targets, *wrong_targets)]
            return token_contrast_loss(*projected, self.align_temperature)
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
                - `wrong_edit_tokens`, `wrong_visual_tokens`, where the twin's are the negatives;
                - `align_positions` `(batch, num)` int64, the tokens to align; without it the reference branch does not
                  run.

        Returns:
            `tuple`: the velocity `(batch, channels, frames, height, width)`, and the alignment loss `(batch,)`, the
            mean over the blocks in float32, or `None`.

        Raises:
            ValueError: There is to be a next sample, but the batch holds one alone.
        """
        settings = (self.align_loss, self.align_reference_tokens, self.align_negatives)
        if "align_positions" in batch and len(batch["latents"]) < 2 and needs_next_sample(*settings):
            raise ValueError("`batch` has to hold at least 2 samples to read the tokens of the next, but holds 1")
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

        # 1. The reference branch, with its tokens and with wrong ones
        with torch.no_grad():
            reference_source = source
            if self.align_reference_latents == "reference":
                reference_source = {"source_hidden_states": batch["latents"] * keep_source}
            tokens = [self._make_tokens(batch, "reference_")]
            if self.align_reference_tokens == "shuffled":
                tokens = [_of_next_sample(*tokens)]
            if self.align_loss == "contrast":
                is_twin = self.align_negatives == "twin"
                tokens.append(self._make_tokens(batch, "wrong_") if is_twin else _of_next_sample(*tokens))
            targets = [
                self.transformer(
                    **condition,
                    **reference_source,
                    **_kept(batch, each),
                    return_features=self.align_blocks,
                    stop_after_block=max(self.align_blocks),
                ).features
                for each in tokens
            ]

        # 2. The editing branch. Some versions of PyTorch would give it what autocast has copied without gradients
        torch.clear_autocast_cache()
        output = self.transformer(**condition, **source, **self._tokens(batch), return_features=self.align_blocks)
        losses, ignored = [], self._neighbours(batch)
        for head, *features in zip(self.heads, output.features, *targets, strict=True):
            positions = batch["align_positions"].unsqueeze(-1).expand(-1, -1, features[0].shape[-1])
            losses.append(self._align(head, *(each.gather(1, positions) for each in features), ignored=ignored))
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
