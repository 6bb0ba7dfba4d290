"""Pictures of a training run."""

import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


def plot_losses(log: str | Path, path: str | Path) -> None:
    """Draw every logged number over the steps, one panel a name, to a PNG.

    `lr`, `progress` and `seconds` get no panel. Names that start with `information_ceiling` get none either: they are
    dashed lines in the panel of `information_nats`.

    Args:
        log (`str` or `Path`): JSON lines with `step` and other numbers by name.
        path (`str` or `Path`): The PNG.

    Raises:
        ValueError: There is nothing to draw in `log`.
    """
    entries = [  # booleans are no numbers here
        {name: value for name, value in json.loads(line).items() if type(value) in (int, float)}
        for line in Path(log).read_text().splitlines()
    ]
    logged = dict.fromkeys(name for entry in entries for name in entry)
    ceilings = [name for name in logged if name.startswith("information_ceiling")]
    names = [name for name in logged if name not in ("step", "lr", "progress", "seconds", *ceilings)]
    if not names:
        raise ValueError(f"`log` has to hold numbers beside the steps, but {log} has none to draw")
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        axis.plot(*zip(*points, strict=True))
        if name == "information_nats":
            for ceiling in {entry[key] for entry in entries for key in ceilings if key in entry}:
                axis.axhline(ceiling, color="gray", linestyle="--")
        axis.set(xlabel="step", title=name.replace("_", " "))
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
