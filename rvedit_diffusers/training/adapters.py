"""LoRA layers over a frozen transformer, and where its frozen weights rest."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from ..files import open_weights
from ..transformer_rvedit import RVEDiTTransformer3DModel


LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2")
SOURCE_TARGET = "source_embedding"
GRANULE = 64  # bytes; weights begin at multiples of it in a block of memory
SOURCE_RANK = 32  # whatever the others': peft cannot swap adapters of convolutions for ones of another rank


def add_lora(
    transformer: RVEDiTTransformer3DModel,
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = LORA_TARGETS,
) -> None:
    """Freeze a transformer and add adapters in float32, whatever its own dtype.

    Args:
        transformer ([`RVEDiTTransformer3DModel`]): Is changed.
        rank (`int`, defaults to 32), alpha (`float`, *optional*): The adapters' output is scaled by `alpha / rank`;
            alpha is the rank by default.
        dropout (`float`, defaults to 0.0): Of the adapters' input.
        targets (`Sequence[str]`): Names of linear layers, or their ends; or `source_embedding`, a convolution, whose
            adapters always have rank and alpha 32.

    Raises:
        ValueError: No layer has such a name.
    """
    transformer.requires_grad_(False)
    settings = {"r": rank, "lora_alpha": alpha or rank, "lora_dropout": dropout, "target_modules": list(targets)}
    if SOURCE_TARGET in targets:
        settings |= {"rank_pattern": {SOURCE_TARGET: SOURCE_RANK}, "alpha_pattern": {SOURCE_TARGET: SOURCE_RANK}}
    transformer.add_adapter(LoraConfig(**settings))
    cast_training_params(transformer, torch.float32)


def lora_targets(folder: str | Path, targets: Sequence[str] | None = None) -> list[str]:
    """The layers to adapt, such that the transformer sees the source clip.

    A converted model's `source_embedding` is zero, and adapters elsewhere would leave it so: blind to the source's
    latents.

    Args:
        folder (`str` or `Path`): Of the transformer.
        targets (`Sequence[str]`, *optional*): As for [`add_lora`]; by default `LORA_TARGETS`, and `source_embedding`
            where it is zero.

    Raises:
        ValueError: `source_embedding` is zero, and not among `targets`.
    """
    if targets is not None and SOURCE_TARGET in targets:
        return list(targets)
    is_blind = False
    for path in Path(folder).glob("*.safetensors"):
        with open_weights(path) as file:
            name = f"{SOURCE_TARGET}.weight"
            is_blind = is_blind or name in file.keys() and not file.get_tensor(name).any()
    if targets is None:
        return [*LORA_TARGETS, *[SOURCE_TARGET] * is_blind]
    if is_blind:
        raise ValueError(
            f"`lora_targets` has to name {SOURCE_TARGET}, which is zero in {folder}: without it the model never sees"
            f" the source clip's latents; got {list(targets)}"
        )
    return list(targets)


def store_in_fp8(transformer: RVEDiTTransformer3DModel) -> None:
    """Let frozen weights rest in fp8 (e4m3), and be cast to the transformer's dtype where they are used."""
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, transformer.dtype)


def offload_frozen_weights(transformer: RVEDiTTransformer3DModel, device: torch.device) -> None:
    """Let the weights under adapters rest in host memory, pinned, and move all else to `device`.

    A layer's weight is on the device while the layer runs, and never copied back: it does not change. Gradient
    checkpointing is needed: without it, autograd keeps what was moved there until the backward pass.
    """
    adapted = [layer.get_base_layer() for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)]
    at_rest = set(map(id, adapted))
    for layer in transformer.modules():
        if id(layer) not in at_rest:
            layer._apply(lambda tensor: tensor.to(device), recurse=False)
    parameters = [dict(layer.named_parameters(recurse=False)) for layer in adapted]
    if device.type == "cuda":
        pin_memory([parameter for each in parameters for parameter in each.values()])
    for layer, each in zip(adapted, parameters):
        resting = {name: parameter.data for name, parameter in each.items()}
        layer.register_forward_pre_hook(partial(_put, resting, device))
        layer.register_forward_hook(partial(_put, resting, None))


def pin_memory(parameters: Sequence[torch.nn.Parameter], block_bytes: int = 2**30, pinned: bool = True) -> None:
    """Put parameters into page-locked memory, many into one block.

    PyTorch rounds what it pins up to a power of two: the weights of Wan 14B, pinned one at a time, would take half as
    much again.

    Args:
        parameters (`Sequence[torch.nn.Parameter]`): Of any dtype, in host memory.
        block_bytes (`int`, defaults to 2**30): Of a block, where a parameter does not need more, or the rest less.
        pinned (`bool`, defaults to `True`): `False`: in blocks that are not page-locked.
    """
    sizes = [math.ceil(parameter.nbytes / GRANULE) * GRANULE for parameter in parameters]
    left, block, start = sum(sizes), torch.empty(0, dtype=torch.uint8), 0
    for parameter, size in zip(parameters, sizes):
        if start + size > block.nbytes:
            block, start = torch.empty(max(min(block_bytes, left), size), dtype=torch.uint8, pin_memory=pinned), 0
        data = parameter.data
        parameter.data = block[start : start + data.nbytes].view(data.dtype).view(data.shape).copy_(data)
        start, left = start + size, left - size


def _put(resting: dict[str, torch.Tensor], device: torch.device | None, layer: torch.nn.Module, *_) -> None:
    # Copies of resting weights on the device, or these themselves, as a layer's.
    for name, data in resting.items():
        layer.get_parameter(name).data = data if device is None else data.to(device, non_blocking=True)
