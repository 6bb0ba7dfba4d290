"""Checkpoints of a training: weights in the layout that the pipeline loads, and all that is needed to go on.

Only safetensors and JSON. A checkpoint is written to a temporary name and renamed, so that a folder `checkpoint-N` is
whole. Tensors that FSDP2 has sharded are gathered and distributed again: a checkpoint does not depend on how many
processes wrote it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from diffusers.training_utils import EMAModel
from huggingface_hub import save_torch_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..files import forget_names, replace_folder
from ..hub import bundle, write_code
from ..pipeline_rvedit import RVEDiTPipeline


STATE_NAME = "trainer_state.json"
MAX_SHARD_SIZE = "10GB"


def _has_adapter(module: nn.Module) -> bool:
    return bool(getattr(module, "peft_config", None))


def named_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module that a checkpoint holds, under the names of its files: its adapter's, or all."""
    if _has_adapter(module):
        return {f"transformer.{name}": tensor for name, tensor in get_peft_model_state_dict(module).items()}
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _folder_of(name: str, module: nn.Module) -> str:
    return "lora" if _has_adapter(module) else name


def _gather(tensor: torch.Tensor, is_main_process: bool) -> torch.Tensor | None:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor().clone()  # else the end of a larger buffer may hang on it
    return tensor.detach().cpu().contiguous() if is_main_process else None


def _assign(target: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def _read(*paths: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _write_module(folder: Path, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    if _has_adapter(module):
        layers = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        metadata = module.peft_config["default"].to_dict()
        RVEDiTPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
    elif isinstance(module, PreTrainedModel):
        module.save_pretrained(folder, state_dict=tensors)
    else:
        module.save_config(folder)
        path = folder / "config.json"  # of a model that FSDP2 shares out, with a class of its making
        path.write_text(path.read_text().replace('"_class_name": "FSDP', '"_class_name": "'))
        save_torch_state_dict(
            tensors,
            folder,
            filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
            max_shard_size=MAX_SHARD_SIZE,
        )


class _Writer:
    """Writes on the main process until the first failure; the processes gather on together whatever happens."""

    def __init__(self, is_main_process: bool):
        self.is_main_process, self.problem = is_main_process, None

    def __call__(self, function: Callable, *arguments) -> None:
        if self.is_main_process and self.problem is None:
            try:
                function(*arguments)
            except (OSError, SafetensorError) as error:
                self.problem = str(error)

    def modules(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            tensors = {key: _gather(value, self.is_main_process) for key, value in named_weights(module).items()}
            self(_write_module, folder / _folder_of(name, module), module, tensors)


def export(
    output: str | Path, base: str | Path, modules: dict[str, nn.Module], is_main_process: bool = True
) -> tuple[list[Path], str | None]:
    """Write the result of a training: `lora`, a whole `pipeline`, or both. All processes of a run have to call it.

    Args:
        output (`str` or `Path`): Where the folders go.
        base (`str` or `Path`): Folder of the pipeline that was trained. What did not learn is copied as it is.
        modules (`dict[str, nn.Module]`): What learned, by name of the component: `transformer`, `distiller`,
            `text_encoder`.
        is_main_process (`bool`): Whether this process writes.

    Returns:
        `tuple`: the folders, on the main process, and why they could not be written, or `None`.
    """
    output, results = Path(output), []
    parts, whole = output / "weights.partial", output / "pipeline.partial"
    write = _Writer(is_main_process)
    write(shutil.rmtree, parts, True)
    write.modules(parts, modules)

    def finish() -> None:
        if (parts / "lora").is_dir():
            replace_folder(parts / "lora", output / "lora")
            results.append(output / "lora")
        learned = [path.name for path in parts.iterdir()]
        if learned:
            shutil.rmtree(whole, ignore_errors=True)
            unchanged = [path for path in Path(base).iterdir() if path.name not in learned and path.name[0] != "."]
            whole.mkdir()
            for path in unchanged:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, whole / path.name)
            for name in learned:
                (parts / name).rename(whole / name)
            forget_names(whole)
            if (whole / "pipeline.py").is_file():  # the base came with its code: what learned needs it, too
                write_code(whole, bundle())
            replace_folder(whole, output / "pipeline")
            results.append(output / "pipeline")

    write(finish)
    if is_main_process:
        for folder in (parts, whole):
            shutil.rmtree(folder, ignore_errors=True)
    return results, write.problem


def load_weights(folder: str | Path, modules: dict[str, nn.Module]) -> None:
    """Read weights back from the folders of a checkpoint, into the same modules.

    Raises:
        ValueError: `folder` holds other parameters of a module.
    """
    for name, module in modules.items():
        source, targets = Path(folder) / _folder_of(name, module), named_weights(module)
        with torch.no_grad():
            for key, value in _read(*sorted(source.glob("*.safetensors"))):
                if key not in targets or targets[key].shape != value.shape:
                    raise ValueError(f"{source} holds other parameters than {name}, such as {key}")
                _assign(targets.pop(key), value)
        if targets:
            raise ValueError(f"{source} lacks parameters of {name}, such as {min(targets)}")


class averaged:
    """A context in which the parameters have their moving averages; without an average it changes nothing.

    Args:
        ema ([`~diffusers.training_utils.EMAModel`], *optional*): Of the parameters.
        parameters (`Iterable[nn.Parameter]`): In the order in which the average was made.
    """

    def __init__(self, ema: EMAModel | None, parameters: Iterable[nn.Parameter]):
        self.ema, self.parameters = ema, list(parameters)

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *_) -> None:
        if self.ema is not None:
            self.ema.restore(self.parameters)


def save_checkpoint(
    folder: str | Path,
    modules: dict[str, nn.Module],
    others: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    ema: EMAModel | None = None,
    parameters: Iterable[nn.Parameter] = (),
    is_main_process: bool = True,
    engine=None,
) -> str | None:
    """Write a checkpoint. All processes of a run have to call it.

    Args:
        folder (`str` or `Path`): `checkpoint-N`; its parent is created.
        modules (`dict[str, nn.Module]`): What learns, as in [`export`].
        others (`nn.Module`): Learns, too, and is no part of the pipeline, such as the alignment heads.
        optimizer (`torch.optim.Optimizer`): Its state is saved by index of the parameter.
        state (`dict`): JSON-serialisable: step, configuration, whatever is needed to go on.
        ema ([`~diffusers.training_utils.EMAModel`], *optional*): Goes to the folder `ema`, in the same layout.
        parameters (`Iterable[nn.Parameter]`): Those of `ema`.
        is_main_process (`bool`): Whether this process writes.
        engine (`deepspeed.DeepSpeedEngine`, *optional*): Writes the optimizer's state in DeepSpeed's own format, which
            is read by as many processes.

    Returns:
        `str`: why it could not be written, or `None`. What was begun is removed then.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".partial")
    write = _Writer(is_main_process)
    write(shutil.rmtree, temporary, True)
    write(temporary.mkdir, 0o777, True)
    write.modules(temporary, modules)
    if ema is not None:
        with averaged(ema, parameters):
            write.modules(temporary / "ema", modules)
        state = state | {"ema_steps": ema.optimization_step}
    weights = {name: _gather(tensor, is_main_process) for name, tensor in named_weights(others).items()}
    write(save_file, weights, temporary / "others.safetensors")

    moments, numbers = {}, {}
    if engine is not None:
        torch.distributed.barrier()  # the folder is there
        engine.save_checkpoint(str(temporary / "deepspeed"), tag="state", exclude_frozen_parameters=True)
        torch.distributed.barrier()
    for index, entry in ({} if engine is not None else optimizer.state_dict()["state"]).items():
        for wrapped in [name for name, value in entry.items() if isinstance(value, dict)]:
            # bitsandbytes' optimizers nest what is quantised, with tables that parameters share
            entry |= {name: value.clone() for name, value in entry.pop(wrapped).items()}
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                moments[f"{index}.{name}"] = _gather(value, is_main_process)
            elif value is not None:
                numbers[f"{index}.{name}"] = value
    write(save_file, moments, temporary / "optimizer.safetensors")
    # the last file: without it, nothing is taken for a checkpoint
    text = json.dumps(state | {"optimizer": numbers}, indent=2)
    write(lambda: (temporary / STATE_NAME).write_text(text))
    write(_flush, temporary)
    write(replace_folder, temporary, folder)
    if write.problem is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    return write.problem


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(
    folder: str | Path,
    modules: dict[str, nn.Module],
    others: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None = None,
    parameters: Iterable[nn.Parameter] = (),
    engine=None,
) -> dict:
    """Read back what [`save_checkpoint`] wrote, into the same modules and optimizer; returns `state`.

    Raises:
        ValueError: Other parameters learn than those that were saved, or of other shapes, or there is no average in
            the checkpoint; or the optimizer's state is DeepSpeed's, and `engine` is missing, or the other way round.
    """
    folder = Path(folder)
    state = read_state(folder)
    if (folder / "deepspeed").is_dir() != (engine is not None):
        whose = "another" if engine is not None else "DeepSpeed's"
        raise ValueError(f"{folder} holds the optimizer's state in {whose} format, which DeepSpeed does not share")
    if ema is not None:
        if "ema_steps" not in state:
            raise ValueError(f"{folder} holds no moving average of the weights")
        load_weights(folder / "ema", modules)
        for shadow, parameter in zip(ema.shadow_params, parameters, strict=True):
            shadow.copy_(parameter.detach())
        ema.optimization_step = state["ema_steps"]
    load_weights(folder, modules)
    targets, saved = named_weights(others), dict(_read(folder / "others.safetensors"))
    shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (saved, targets)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the alignment heads have the shapes {shapes[1]}, but in {folder} {shapes[0]}")
    with torch.no_grad():
        for name, value in saved.items():
            _assign(targets[name], value)

    if engine is not None:
        engine.load_checkpoint(str(folder / "deepspeed"), tag="state", load_module_strict=False)
        return state
    entries: dict[int, dict] = {}
    for name, value in [*_read(folder / "optimizer.safetensors"), *state["optimizer"].items()]:
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = value
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in entries.items():
        parameter = learned[index]
        for key, value in entry.items():
            if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entry[key] = torch.zeros_like(parameter, dtype=value.dtype)
                _assign(entry[key], value)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
    return state


def read_state(folder: str | Path) -> dict:
    """The `state` of a checkpoint.

    Raises:
        FileNotFoundError: `folder` is not a checkpoint.
    """
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint of a training: it holds no {STATE_NAME}")
    return json.loads(path.read_text())


def checkpoints(output: str | Path) -> list[Path]:
    """The folders `checkpoint-N` in `output`, the oldest first."""
    found = {path: path.name.removeprefix("checkpoint-") for path in Path(output).glob("checkpoint-*")}
    whole = [path for path, number in found.items() if number.isdigit() and (path / STATE_NAME).is_file()]
    return sorted(whole, key=lambda path: int(found[path]))


def prune_checkpoints(output: str | Path, limit: int | None) -> None:
    """Remove all but the last `limit` checkpoints, and what a killed process has left half-written or half-removed."""
    for path in checkpoints(output)[: -limit if limit else 0]:
        path.rename(path.with_name(path.name + ".old"))
    for name in ("checkpoint-*.old", "checkpoint-*.partial"):
        for path in Path(output).glob(name):
            shutil.rmtree(path, ignore_errors=True)


def keep_latest(output: str | Path, learned: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the checkpoint of `state["step"]` in place of earlier ones, or end the program with the reason why not.

    Args:
        output (`str` or `Path`): Folder of the checkpoints.
        learned (`nn.Module`): All that learns.
        optimizer (`torch.optim.Optimizer`): Its state is saved by index of the parameter.
        state (`dict`): JSON-serialisable: step, and whatever is needed to go on.
    """
    folder = Path(output) / f"checkpoint-{state['step']}"
    problem = save_checkpoint(folder, {}, learned, optimizer, state)
    if problem is not None:
        raise SystemExit(f"{folder} cannot be written: {problem}")
    prune_checkpoints(output, 1)


def differences(before: dict, after: dict) -> list[str]:
    """What differs between two configurations, a line a name."""
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)
    ]


def open_log(path: str | Path, step: int) -> TextIO:
    """Open a log of JSON lines to go on after `step`: lines of later steps, to be trained again, are taken out."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [entry for entry in read_log(path) if entry["step"] <= step] if path.exists() else []
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept))
    temporary.replace(path)
    return open(path, "a")


def read_log(path: str | Path) -> list[dict]:
    """The entries of a log of JSON lines, without the one that a killed process has cut off."""
    entries = []
    for line in Path(path).read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
