"""Files and folders of weights: read with clear errors, written whole or not at all, silent on other folders."""

import json
import os
import re
import shutil
import tempfile
import textwrap
from pathlib import Path

from safetensors import SafetensorError, safe_open


SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")  # a name of one of several files of weights


def open_weights(path: str | os.PathLike) -> safe_open:
    """
    Open a safetensors file, of which the header alone is read.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `safe_open`: A context manager, of PyTorch tensors.

    Raises:
        `ValueError`: if it is none, or cut off.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def forget_names(folder: str | os.PathLike) -> None:
    """
    Take `_name_or_path` out of the configurations in a folder: where weights were loaded from is nobody's business.

    Args:
        folder (`str` or `os.PathLike`): Of a pipeline, whose components `model_index.json` names, or of a model. Other
            folders in it, and files behind links, stay as they are.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    if index.is_file():
        components = json.loads(index.read_text(encoding="utf-8"))
        paths = [index, *(path for name in components for path in (folder / name).glob("*.json"))]
    else:
        paths = folder.glob("*.json")
    for path in paths:
        if path.is_symlink() or path.stat().st_size > 2**20:  # no configuration is so large
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; whatever `folder` was before stays on disk until that has happened."""
    if not folder.exists():
        new.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(aside / folder.name)
    try:
        new.rename(folder)
    except OSError:
        (aside / folder.name).rename(folder)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def told_in_a_line(error: Exception) -> str:
    """What an error says, in one line; of an answer of the Hub without the number of the request."""
    text = re.sub(r"\(Request ID: [^)]*\)", "", str(error))
    return textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__
