"""Pictures of a training run."""

import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


def plot_losses(log: str | Path, path: str | Path) -> None:
    """Draw every logged term over the steps, one panel a term, to a PNG.

    Args:
        log (`str` or `Path`): JSON lines with `step` and any number of figures.
        path (`str` or `Path`): The PNG.
    """
    entries = [json.loads(line) for line in Path(log).read_text().splitlines()]
    names = [name for name in ("flow", "align", "information_nats") if any(name in entry for entry in entries)]
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        axis.plot(*zip(*points, strict=True))
        axis.set(xlabel="step", title=name.replace("_", " "))
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
