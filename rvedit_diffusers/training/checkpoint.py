"""Training state on disk: safetensors and JSON only, written to a temporary name and renamed."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_file, save_model


def save_training_state(
    folder: str | Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, state: dict
) -> None:
    """Write weights, optimizer state and `state` to `folder`, replacing it in one rename.

    Args:
        folder (`str` or `Path`): Where the checkpoint goes; its parent is created.
        modules (`dict[str, torch.nn.Module]`): Saved whole, one safetensors file each, under these names.
        optimizer (`torch.optim.Optimizer`): Its per-parameter tensors are saved by parameter index.
        state (`dict`): JSON-serialisable: step, seed, whatever the loop needs to go on.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, module in modules.items():
        save_model(module, str(temporary / f"{name}.safetensors"))
    moments = {
        f"{index}.{key}": torch.as_tensor(value).detach().contiguous().cpu()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def load_training_state(
    folder: str | Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> dict:
    """Read back what [`save_training_state`] wrote, into the same modules and optimizer; returns `state`.

    Raises:
        FileNotFoundError: `folder` is not a finished checkpoint.
        RuntimeError: A module's parameters differ from the saved ones.
    """
    folder = Path(folder)
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(f"{folder} holds no training checkpoint (state.json is missing)")
    for name, module in modules.items():
        load_model(module, str(folder / f"{name}.safetensors"))
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
    return json.loads((folder / "state.json").read_text())
