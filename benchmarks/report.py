"""Put the results of the benchmarks together in one page.

    python benchmarks/report.py docs/benchmarks/*.json --output docs/performance.md

Each JSON file that a benchmark has written gives a section: its command, its machine and its tables; those of
`growth.py` and `quality.py` give a picture beside the page as well.
"""

import argparse
import json
import shlex
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from growth import QUANTITIES, UNITS  # noqa: E402


SCRIPTS = (
    "inference.py",
    "quality.py",
    "training.py",
    "memory.py",
    "growth.py",
    "plan.py",
)  # in the order of the page
HEAD = """# {title}

Results of the scripts in `benchmarks/`, put together by

```bash
{command}
```

Models have random weights, but where quality is measured. What a table compares took turns in one process; seconds are
medians with least and most, ratios those of times of one turn. On a CPU, seconds are the process' own, summed over its
threads. Sections are of different runs: their seconds are not to be compared."""

NOTES = {
    "training.py": (
        "Of the steps, `plain` is flow matching alone; `align` has the reference branch, without a gradient, to the"
        " last aligned\nblock; `naive` has two whole branches with gradients. Encoders do not run: tokens come from"
        " the cache. Memory is of the\ntransformer and what learns with it, where nothing was run on a GPU as"
        " `rvedit_diffusers/training/memory.py` estimates it;\nan MLLM that runs in every step comes on top."
    )
}  # under the first title of a script


def describe(path: Path) -> tuple[str, dict]:
    """The script that wrote a file, and what it wrote.

    Raises:
        ValueError: None did.
    """
    try:
        result = json.loads(path.read_text())
        return result["command"].split()[1].removeprefix("benchmarks/"), result
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is no result of a benchmark: {error!r}") from error


def plot_growth(result: dict, path: Path) -> None:
    """Each quantity over each axis, both logarithmic."""
    growth = result["growth"]
    quantities = [name for name in QUANTITIES if any(name in values for values in growth.values())]
    figure, axes = plt.subplots(
        len(quantities), len(growth), figsize=(4 * len(growth), 3 * len(quantities)), squeeze=False
    )
    for row, quantity in zip(axes, quantities):
        for panel, (axis, values) in zip(row, growth.items()):
            for name, label in (("ours", "RVEDiT"), ("wan", "Wan")):
                slope = result["exponents"][f"{axis}_{quantity}"][name]
                figures = [value / UNITS[quantity] for value in values[quantity][name]]
                panel.plot(values["places"], figures, "o-", label=f"{label}, exponent {slope:.2f}")
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=QUANTITIES[quantity])
            panel.set_xticks(values["places"], [f"{place:g}" for place in values["places"]])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small")
    save(figure, path)


def plot_quality(result: dict, path: Path) -> None:
    """Union success over time, each setting a point, those of one kind joined."""
    found = result["quality"]
    figure, axes = plt.subplots(figsize=(7, 4))
    kinds = {name: name.split(",")[0].lstrip("0123456789 ") for name in found}
    for kind in dict.fromkeys(kinds.values()):
        rows = [found[name] for name in found if kinds[name] == kind]
        times, success = [row["time_ratio"] for row in rows], [row["union_success"] for row in rows]
        errors = [[abs(row["union_success"] - row[f"union_success_{end}"]) for row in rows] for end in ("low", "high")]
        axes.errorbar(times, success, errors, fmt="o-", capsize=3, alpha=0.8, label=kind)
    axes.set(
        xlabel="time of an edit, as a share of the full one's", ylabel="union success", xlim=(0, None), ylim=(0, 1)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=90, format="png")
    partial.replace(path)
    plt.close(figure)


PICTURES = {
    "growth.py": (plot_growth, "Cost over frames, area and batch"),
    "quality.py": (plot_quality, "Union success over time"),
}


def title(script: str, settings: dict) -> str:
    """What was run, on which preset or model, and how, where sections differ in it."""
    preset = settings["preset"]
    words = [script.removesuffix(".py").capitalize(), preset["name"] if isinstance(preset, dict) else preset]
    if script == "training.py":
        words.append({"lora": "LoRA", "full": "full"}[settings["training_type"]])
        words += ["gradient checkpointing"] * settings["gradient_checkpointing"]
    elif script == "inference.py":
        words.append(settings["dtype"].removeprefix("torch."))
    return ", ".join(words)


def section(script: str, result: dict, picture: Path) -> list[str]:
    parts = [f"## {title(script, result['settings'])}", f"```bash\n{result['command']}\n```"]
    if "device" in result:
        threads = f", {result['threads']} threads" if "CPU" in result["device"] else ""
        parts.append(f"{result['device']}{threads}; {result['cpu']}; torch {result['torch']}.")
    else:
        parts.append("Counted; nothing was run.")
    parts.append(result["text"])
    if script in PICTURES:
        plot, caption = PICTURES[script]
        plot(result, picture)
        parts.append(f"![{caption}]({picture.name})")
    return parts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of the benchmarks")
    parser.add_argument("--output", type=Path, required=True, help="the page, a .md file; pictures are beside it")
    args = parser.parse_args(argv)
    if args.output.suffix != ".md":
        parser.error(f"--output has to end in .md, but is {args.output}")
    try:
        found = [(*describe(path), path.stem) for path in args.results]
    except ValueError as error:
        parser.error(str(error))
    if unknown := [script for script, *_ in found if script not in SCRIPTS]:
        parser.error(f"there is no section for results of {', '.join(unknown)}")

    args.output.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/report.py", *map(str, args.results), "--output", str(args.output)])
    is_quality = all(script == "quality.py" for script, *_ in found)
    parts = [HEAD.format(title="Speed against success" if is_quality else "Speed and memory", command=command)]
    notes = dict(NOTES)
    for script, result, name in sorted(found, key=lambda each: SCRIPTS.index(each[0])):
        heading, *rest = section(script, result, args.output.with_name(f"{args.output.stem}_{name}.png"))
        parts += [heading, *([notes.pop(script)] if script in notes else []), *rest]
    partial = args.output.with_name(f".{args.output.name}.partial")
    partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    partial.replace(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
