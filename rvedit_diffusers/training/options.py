"""Command line options that may also stand in a file, and what follows from the machine."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device is faster in bfloat16 than in float32: of CPUs, those with AMX or AVX512-BF16.

    Elsewhere it is emulated; AVX-512 alone takes twice the time of float32 for the same matrix product.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def default_precision() -> str:
    """`"bf16"` where the machine's GPU, or without one its CPU, computes in bfloat16, else `"no"`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if computes_in_bfloat16(device) else "no"


def as_arguments(values: dict) -> list[str]:
    """Options by name as a command line: `True` gives a flag, `False` and `None` give nothing, a list gives several
    values, and an object gives its JSON."""
    options = []
    for name, value in values.items():
        if value is True:
            options.append(f"--{name}")
        elif isinstance(value, dict):
            options += [f"--{name}", json.dumps(value)]
        elif value is not False and value is not None:
            options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return options


def with_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The options in the file that `--config` names, as a command line, and `argv` after them, which so goes first.

    Args:
        parser (`argparse.ArgumentParser`): Knows `--config`; ends the program with a message if the file is wrong.
        argv (`Sequence[str]`): The command line.

    Returns:
        `list[str]`: `argv` itself without `--config`. The file holds one JSON object, see [`as_arguments`].
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    path = first.parse_known_args(argv)[0].config
    if path is None:
        return list(argv)
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} has to hold one JSON object")
    unknown = set(values) - {action.dest for action in parser._actions}
    if unknown:
        parser.error(f"--config {path} sets unknown options: {', '.join(sorted(unknown))}")
    return [*as_arguments(values), *argv]
