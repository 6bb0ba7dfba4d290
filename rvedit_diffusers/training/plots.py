"""Pictures of a training run."""

from pathlib import Path

import matplotlib

from .checkpoint import read_log


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


# What shares a panel: the beginning of the names, or names.
PANELS = {
    "flow matching loss": ("flow", "validation_flow", "validation_flow_base"),
    "flow matching loss by noise level": ("flow_sigma_",),
    "held-out loss by noise level": ("validation_flow_sigma_",),
    "alignment loss": ("align",),
    "distance to the base's features": ("connect",),
    "distance to the base's features by noise level": ("connect_sigma_",),
    "mutual information, nats": ("information_nats", "information_ceiling_nats"),
    "gradient norms": ("gradient_norm", "gradient_norm_flow", "gradient_norm_align"),
    "learning rate": ("lr",),
    "steps skipped": ("nonfinite",),
    "seconds a step": ("seconds_per_step",),
}


def plot_losses(log: str | Path, path: str | Path) -> None:
    """Draw the numbers that a training logged over its steps to a PNG, related ones in one panel.

    Ceilings are dashed; gradient norms have a logarithmic axis. What no panel is for, such as the progress, is left
    out, and so is a panel that would be all zero.

    Args:
        log (`str` or `Path`): JSON lines with `step` and other numbers by name.
        path (`str` or `Path`): The PNG.

    Raises:
        FileNotFoundError: There is no file `log`.
        ValueError: There is nothing to draw in it.
    """
    entries = [  # booleans are no numbers here
        {name: value for name, value in entry.items() if type(value) in (int, float)} for entry in read_log(log)
    ]
    logged = sorted({name for entry in entries for name in entry})
    panels = {}
    for title, patterns in PANELS.items():
        names = [name for name in logged if name in patterns or (name.startswith(patterns) and patterns[0][-1] == "_")]
        if any(entry.get(name) for entry in entries for name in names):
            panels[title] = names
    if not panels:
        raise ValueError(f"`log` has to hold losses beside the steps, but {log} has none to draw")

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            style = "--" if "ceiling" in name else ".-" if len(points) < 20 else "-"
            axis.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
        axis.set(xlabel="step", title=title)
        if title == "gradient norms":
            axis.set_yscale("log")
        if len(names) > 1:
            axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
