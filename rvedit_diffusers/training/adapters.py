"""LoRA layers over a frozen transformer, and where its frozen weights rest."""

from collections.abc import Sequence

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from ..transformer_rvedit import RVEDiTTransformer3DModel


LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2")


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
        targets (`Sequence[str]`): Names of linear layers, or their ends.

    Raises:
        ValueError: No layer has such a name.
    """
    transformer.requires_grad_(False)
    settings = {"r": rank, "lora_alpha": alpha or rank, "lora_dropout": dropout, "target_modules": list(targets)}
    transformer.add_adapter(LoraConfig(**settings))
    cast_training_params(transformer, torch.float32)


def store_in_fp8(transformer: RVEDiTTransformer3DModel) -> None:
    """Let frozen weights rest in fp8 (e4m3), and be cast to the transformer's dtype where they are used."""
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, transformer.dtype)


def offload_frozen_weights(transformer: RVEDiTTransformer3DModel, device: torch.device) -> None:
    """Let the weights under adapters rest in host memory, and move all else to `device`.

    A layer's weight is on the device while the layer runs. Gradient checkpointing is needed: without it, autograd
    keeps what was moved there until the backward pass.
    """
    adapted = [layer.get_base_layer() for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)]
    at_rest = set(map(id, adapted))
    for layer in transformer.modules():
        if id(layer) not in at_rest:
            layer._apply(lambda tensor: tensor.to(device), recurse=False)
    for layer in adapted:
        apply_group_offloading(layer, device, offload_type="leaf_level", non_blocking=device.type == "cuda")
