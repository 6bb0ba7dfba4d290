"""Training state on disk: safetensors and JSON only, written to a temporary name and renamed."""

import json
import shutil
from pathlib import Path
from typing import TextIO

import torch
from safetensors.torch import load_file, save_file


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name, each once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; whatever `folder` was before stays on disk until that has happened."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def has_training_state(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint; puts the one before it back if the writer died between two renames."""
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    return folder.is_dir()


def save_training_state(
    folder: str | Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, state: dict
) -> None:
    """Write weights, optimizer state and `state` to `folder`; what it held before is removed last.

    Args:
        folder (`str` or `Path`): Where the checkpoint goes; its parent is created.
        modules (`dict[str, torch.nn.Module]`): Their parameters that learn are saved, one safetensors file each, under
            these names.
        optimizer (`torch.optim.Optimizer`): Its per-parameter tensors are saved by parameter index.
        state (`dict`): JSON-serialisable: step, seed, whatever the loop needs to go on.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, module in modules.items():
        tensors = {key: value.detach().contiguous().cpu() for key, value in trainable(module).items()}
        save_file(tensors, temporary / f"{name}.safetensors")
    moments = {
        f"{index}.{key}": torch.as_tensor(value).detach().contiguous().cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    replace_folder(temporary, folder)


def open_log(path: str | Path, step: int) -> TextIO:
    """Open a log of JSON lines to go on after `step`: lines of later steps, to be trained again, are taken out."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)
    return open(path, "a")


def load_training_state(
    folder: str | Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> dict:
    """Read back what [`save_training_state`] wrote, into the same modules and optimizer; returns `state`.

    Raises:
        FileNotFoundError: `folder` is not a finished checkpoint.
        ValueError: Other parameters of a module learn than those that were saved.
    """
    folder = Path(folder)
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(f"{folder} holds no training checkpoint (state.json is missing)")
    for name, module in modules.items():
        parameters, saved = trainable(module), load_file(folder / f"{name}.safetensors")
        different = parameters.keys() ^ saved.keys()
        if different:
            raise ValueError(f"{folder} is of a training of other parameters of {name}, such as {min(different)}")
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(saved[key])
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
    return json.loads((folder / "state.json").read_text())
