import os
from collections.abc import Callable

import torch
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook  # line 1009
from diffusers.loaders import CogVideoXLoraLoaderMixin, WanLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from diffusers.utils.torch_utils import unwrap_module
from peft.utils import get_peft_model_state_dict


class RVEDiTLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """
    LoRA layers of [`RVEDiTTransformer3DModel`] for [`RVEDiTPipeline`]: `load_lora_weights`, `save_lora_weights`,
    `set_adapters`, `get_active_adapters`, `fuse_lora`, `unfuse_lora`, `delete_adapters` and `unload_lora_weights`.

    Everything but saving is diffusers' own mixin for pipelines whose one adapted component is `transformer`. Files
    hold safetensors with keys `transformer.<module>.lora_A.weight` and `transformer.<module>.lora_B.weight`. Layers
    that carry Wan's names, such as `blocks.0.attn1.to_q`, fit because the transformer keeps those names, and so do
    files with the keys of Wan's own code or of musubi-tuner, which are converted.
    """

    _lora_loadable_modules = ["transformer"]

    def _check_nothing_is_on_disk(self, advice: str = "load, fuse and remove LoRA weights") -> None:
        # diffusers makes the groups of all components again when layers change (loaders/peft.py, line 378), and takes
        # the files that are there for those of the new ones: weights would be lost without a word.
        for name, component in self.components.items():
            if isinstance(component, torch.nn.Module):
                _check_is_not_on_disk(component, f"The component `{name}`", advice)

    def load_lora_weights(self, *args, **kwargs) -> None:
        r"""
        As [`~diffusers.loaders.WanLoraLoaderMixin.load_lora_weights`]; see `lora_state_dict` for what is read.

        Raises:
            `ValueError`: if `load_into_transformer_2` is true, as there is one transformer, or if weights are
                offloaded to disk. For the latter so do `unload_lora_weights`, `delete_adapters`, `fuse_lora` and
                `unfuse_lora`.
        """
        if kwargs.pop("load_into_transformer_2", False):
            raise ValueError("`load_into_transformer_2` has to be False, got True: there is one transformer")
        self._check_nothing_is_on_disk()
        super().load_lora_weights(*args, **kwargs)

    def unload_lora_weights(self) -> None:
        self._check_nothing_is_on_disk()
        super().unload_lora_weights()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        self._check_nothing_is_on_disk()
        super().delete_adapters(adapter_names)

    def fuse_lora(self, *args, **kwargs) -> None:
        self._check_nothing_is_on_disk()
        super().fuse_lora(*args, **kwargs)

    def unfuse_lora(self, *args, **kwargs) -> None:
        self._check_nothing_is_on_disk()
        super().unfuse_lora(*args, **kwargs)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        r"""
        Read LoRA layers as diffusers reads Wan's, which converts those with the keys of Wan's own code
        (`diffusion_model.blocks.0.self_attn.q...`) or of musubi-tuner (`lora_unet_blocks_0_...`).

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`), kwargs:
                As in [`~diffusers.loaders.WanLoraLoaderMixin.lora_state_dict`], but pickles are read with
                `use_safetensors=False` alone.

        Returns:
            `dict[str, torch.Tensor]`: the layers; with `return_lora_metadata=True` a tuple of them and their metadata.

        Raises:
            `ValueError`: if no key begins with `transformer.`: such layers would be left out without a word.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if kwargs.get("subfolder") is not None and kwargs.get("weight_name") is None:
            # The name that diffusers guesses in a Hub repository holds the folder, which would come twice.
            kwargs["weight_name"] = LORA_WEIGHT_NAME_SAFE if kwargs["use_safetensors"] else LORA_WEIGHT_NAME
        result = WanLoraLoaderMixin.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        state_dict = result[0] if kwargs.get("return_lora_metadata") else result
        if not any(key.startswith(f"{cls.transformer_name}.") for key in state_dict):
            is_given = isinstance(pretrained_model_name_or_path_or_dict, dict)
            given = "the given dict" if is_given else repr(str(pretrained_model_name_or_path_or_dict))
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` has to hold layers of the transformer, with keys such as"
                f" 'transformer.blocks.0.attn1.to_q.lora_A.weight', but those of {given} are {sorted(state_dict)[:3]}."
            )
        return result

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: torch.nn.Module | dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict | None = None,
        adapter_name: str = "default",
    ) -> None:
        r"""
        Save one LoRA adapter of the transformer as a file that `load_lora_weights` reads.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to write to; made if it does not exist.
            transformer_lora_layers (`RVEDiTTransformer3DModel` or `dict[str, torch.Tensor]`):
                The transformer that carries the adapter, compiled or not, or the adapter's state dict as
                `peft.utils.get_peft_model_state_dict` returns it. A state dict holds no scaling: without
                `transformer_lora_adapter_metadata` the file loads as if `lora_alpha` were the rank.
            is_main_process (`bool`, defaults to `True`):
                Whether this process writes the file. Give `False` on all but one process of a distributed run.
            weight_name (`str`, *optional*):
                Name of the file; `pytorch_lora_weights.safetensors` by default.
            save_function (`Callable`, *optional*):
                `save_function(weights, filename)`, in place of `safetensors.torch.save_file`. It writes no metadata.
            safe_serialization (`bool`, defaults to `True`):
                Whether to write safetensors. The pickle format (`False`) cannot hold metadata, hence no `lora_alpha`.
            transformer_lora_adapter_metadata (`dict`, *optional*):
                `LoraConfig.to_dict()` of the adapter. `None`: the transformer's own; none if a state dict is given.
            adapter_name (`str`, defaults to `"default"`):
                Which adapter of the transformer to save, when the transformer is given.

        Raises:
            `ValueError`: if `transformer_lora_layers` is missing, the transformer has no adapter `adapter_name` or is
                offloaded to disk, or metadata is to be written without `safe_serialization`.
        """
        if isinstance(transformer_lora_layers, torch.nn.Module):
            transformer = unwrap_module(transformer_lora_layers)
            advice = "what is in memory are not its weights: save LoRA weights"
            _check_is_not_on_disk(transformer, "`transformer_lora_layers`", advice)
            adapters = getattr(transformer, "peft_config", {})
            if adapter_name not in adapters:
                raise ValueError(f"`adapter_name` has to be one of {sorted(adapters)}, got {adapter_name!r}.")
            if transformer_lora_adapter_metadata is None and safe_serialization:
                transformer_lora_adapter_metadata = adapters[adapter_name].to_dict()
            transformer_lora_layers = get_peft_model_state_dict(transformer, adapter_name=adapter_name)

        super().save_lora_weights(
            save_directory,
            transformer_lora_layers,
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
            transformer_lora_adapter_metadata=transformer_lora_adapter_metadata,
        )


def _check_is_not_on_disk(module: torch.nn.Module, name: str, advice: str) -> None:
    hook = _get_top_level_group_offload_hook(module)
    if hook is not None and hook.config.offload_to_disk_path is not None:
        raise ValueError(
            f"{name} is offloaded to disk: {advice} before `enable_group_offload` is given an `offload_to_disk_path`."
        )
