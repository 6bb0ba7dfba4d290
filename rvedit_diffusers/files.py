"""Folders that are written whole or not at all."""

import shutil
from pathlib import Path


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; whatever `folder` was before stays on disk until that has happened."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
