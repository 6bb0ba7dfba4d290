"""Variants of a small transformer to compare: of equally many parameters, alike at the start wherever they can be."""

import copy
import json
import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import UMT5EncoderModel

from ..distiller_rvedit import RVEDiTTokenDistiller
from ..pipeline_rvedit import RVEDiTPipeline
from ..transformer_rvedit import RVEDiTTransformer3DModel
from .sampler import derive_seed


FFN_STEP = 8
TOLERANCE = 0.01  # of the number of parameters
READS_TOKENS = re.compile(r"\.attn2\.|\.norm2\.|^condition_embedder\.text_embedder\.|^edit_bias$")


@cache
def _num_parameters(config: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in RVEDiTTransformer3DModel(**json.loads(config)).parameters())


def num_parameters(config: dict) -> int:
    """How many parameters an [`RVEDiTTransformer3DModel`] of this configuration has."""
    return _num_parameters(json.dumps(config, sort_keys=True))


def match_parameters(config: dict, target: int) -> dict:
    """Choose the width of the feed-forward layers so that a variant has as many parameters as another.

    Args:
        config (`dict`): Of an [`RVEDiTTransformer3DModel`]; its `ffn_dim` does not count.
        target (`int`): The number of parameters to come near to.

    Returns:
        `dict`: `config` with an `ffn_dim` that is a multiple of 8.

    Raises:
        ValueError: No such `ffn_dim` brings the number within 1 % of `target`.
    """
    least, next_one = (num_parameters(config | {"ffn_dim": FFN_STEP * count}) for count in (1, 2))
    ffn_dim = FFN_STEP * (1 + max(0, round((target - least) / (next_one - least))))
    config = config | {"ffn_dim": ffn_dim}
    found = num_parameters(config)
    if abs(found - target) > TOLERANCE * target:
        raise ValueError(
            f"`config` has {found} parameters with the best `ffn_dim`, {ffn_dim}, which is not within"
            f" {TOLERANCE:.0%} of {target}: a larger or a smaller model is needed"
        )
    return config


@torch.no_grad()
def draw_weights(module: nn.Module, seed: int) -> None:
    """Draw the initial weights of a module anew, those of each layer as a function of seed, name and shapes alone.

    Modules that differ elsewhere so agree in every layer whose name and shapes agree. What the module starts at a
    constant, such as zero, stays so. The global random state does not change.

    Args:
        module (`nn.Module`): Just built. Its layers have `reset_parameters`; parameters outside of layers that are no
            constants are taken for Wan's modulation tables, normal with a variance of one over their last dimension.
        seed (`int`): Names the draw.
    """
    with torch.random.fork_rng(devices=[]):
        for name, layer in module.named_modules():
            own = dict(layer.named_parameters(recurse=False))
            constants = {key: value.clone() for key, value in own.items() if (value == value.flatten()[0]).all()}
            shapes = [f"{key} {tuple(value.shape)}" for key, value in own.items()]
            torch.manual_seed(derive_seed(seed, "weights", name, *shapes))
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
            else:
                for value in own.values():
                    value.normal_(std=value.shape[-1] ** -0.5)
            for key, value in constants.items():
                own[key].copy_(value)


def build_variant(base: str | Path, config: dict, seed: int) -> RVEDiTPipeline:
    """A pipeline around a new transformer.

    Args:
        base (`str` or `Path`): Folder of the pipeline whose other parts are taken. Where the transformer has another
            width, the distiller's connectors are new ones that fit, and where it has another `text_dim`, the text
            encoder is; the queries are always the base's, as they belong to the MLLM.
        config (`dict`): Of the [`RVEDiTTransformer3DModel`].
        seed (`int`): Of what is new, see [`draw_weights`]: variants of one seed agree wherever they can.

    Returns:
        [`RVEDiTPipeline`]: In float32. The velocity starts at zero.
    """
    pipe = RVEDiTPipeline.from_pretrained(base, transformer=None, dtype=torch.float32)
    transformer = RVEDiTTransformer3DModel(**config)
    nn.init.zeros_(transformer.proj_out.weight)
    draw_weights(transformer, seed)
    dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    distiller, text_config = pipe.distiller, pipe.text_encoder.config
    if dim != distiller.config.dim:
        settings = {name: distiller.config[name] for name in ("mllm_hidden_size", "num_edit_tokens", "hidden_layer")}
        distiller = RVEDiTTokenDistiller(dim=dim, **settings)
        draw_weights(distiller, seed)
        distiller.queries = pipe.distiller.queries
    if transformer.config.text_dim != text_config.d_model:
        text_config = copy.deepcopy(text_config)
        text_config.d_model = transformer.config.text_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "weights", "text encoder"))
            pipe.register_modules(text_encoder=UMT5EncoderModel(text_config).eval())
    pipe.register_modules(transformer=transformer.eval(), distiller=distiller.eval())
    return pipe


@torch.no_grad()
def take_over_weights(transformer: RVEDiTTransformer3DModel, start: str | Path) -> str:
    """Give a transformer the weights of another one, wherever name and shape agree, but for layers that read tokens.

    Those (cross-attention, its norm, the embedding of the text) learned for the routing of the other one, which would
    favour transformers of the same routing: they stay new. A wider feed-forward layer gets the units of the narrower
    one, and its further units begin without an effect.

    Args:
        transformer ([`RVEDiTTransformer3DModel`]): Changes.
        start (`str` or `Path`): Folder of the pipeline with the other one.

    Returns:
        `str`: How many tensors were taken, of how many that read no tokens: `"12 of 40"`.
    """
    targets = {name: value for name, value in transformer.named_parameters() if not READS_TOKENS.search(name)}
    count = 0
    for path in sorted((Path(start) / "transformer").glob("*.safetensors")):
        for name, value in load_file(path).items():
            target = targets.get(name)
            if target is None:
                continue
            is_wider = ".ffn." in name and all(n >= m for n, m in zip(target.shape, value.shape, strict=True))
            if target.shape != value.shape and not is_wider:
                continue
            if target.ndim == 2 and target.shape[1] > value.shape[1]:
                target.zero_()  # what further units give
            target[tuple(map(slice, value.shape))] = value
            count += 1
    return f"{count} of {len(targets)}"
