"""Write a trained pipeline as the embedded checkpoint is: bfloat16 weights, training logs, scores, and its model card.

In the place of the embedded checkpoint, unless --output says otherwise; MODEL_CARD.md is then the same card.

python examples/tiny/export.py --vae runs/vae --mllm runs/mllm --text runs/text --editor runs/editor \
    --scores runs/scores/results.json
"""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline
from rvedit_diffusers.files import replace_folder
from rvedit_diffusers.model_card import APACHE, fill_model_card, markdown_table
from rvedit_diffusers.training.checkpoint import read_log


def last(log: Path) -> dict:
    return json.loads(log.read_text().splitlines()[-1])


def joined_logs(folders: Sequence[Path]) -> list[dict]:
    """The logs of trainings that followed each other, as one of consecutive steps."""
    entries: list[dict] = []
    for folder in folders:
        before = entries[-1]["step"] if entries else 0
        entries += [entry | {"step": before + entry["step"]} for entry in read_log(folder / "log.jsonl")]
    return entries


def minutes(entries: Sequence[dict]) -> float:
    """What the steps took, validation left out."""
    steps = [0, *(entry["step"] for entry in entries)]
    rates = [entry.get("seconds_per_step", 0.0) for entry in entries]
    return sum(rate * (step - last) for rate, last, step in zip(rates, steps, steps[1:])) / 60


def millions(folder: Path) -> float:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total / 1e6


def listed(answers: dict[str, float]) -> str:
    """The last entry of a log in words, but for when it was."""
    return ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in answers.items() if k not in ("step", "seconds"))


def model_card(folder: Path, name: str | None = None) -> str:
    """The card of the checkpoint in a folder: of its weights and of what its `training` folder holds.

    Args:
        folder (`Path`): Of the checkpoint.
        name (`str`, *optional*): What to load it by; by default it is the embedded one.
    """
    training = folder / "training"
    summary = json.loads((training / "summary.json").read_text())
    vae, mllm, text = (last(training / f"{name}.jsonl") for name in ("vae", "mllm", "text"))
    editor = summary["editor"]
    sizes = {path.name: millions(path) for path in folder.iterdir() if path.is_dir()}
    editor_size = sizes["transformer"] + sizes["distiller"]
    of_text = (sizes["text_encoder"], "parses of instructions (`train_text.py`)")
    parts = [
        ["autoencoder", sizes["vae"], "reconstruction of clips (`train_vae.py`)", vae["step"], vae["seconds"]],
        ["MLLM and queries", sizes["mllm"], "questions about scenes (`train_mllm.py`)", mllm["step"], mllm["seconds"]],
        ["text encoder", *of_text, text["step"], text["seconds"]],
        ["editor", editor_size, "flow matching (`train.py`)", editor["step"], editor["minutes"] * 60],
    ]
    return fill_model_card(
        "embedded",
        "RVEDiT tiny",
        APACHE,
        scores=json.loads((training / "scores.json").read_text()),
        pipeline_argument=json.dumps(name) if name else "TINY_CHECKPOINT",
        parameters=f"{sum(sizes.values()):.1f}",
        parts=markdown_table(
            ["part", "parameters", "how it was trained", "steps", "minutes"],
            [[name, f"{size:.2f} M", how, step, f"{seconds / 60:.0f}"] for name, size, how, step, seconds in parts],
        ),
        note=summary["note"],
        answers=listed(mllm),
        parses=listed({name.removesuffix("_right"): value for name, value in text.items()}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="output folder of train_vae.py")
    parser.add_argument("--mllm", type=Path, required=True, help="output folder of train_mllm.py")
    parser.add_argument("--text", type=Path, required=True, help="output folder of train_text.py")
    parser.add_argument(
        "--editor",
        type=Path,
        nargs="+",
        required=True,
        help="output folders of train.py, each going on from the one before",
    )
    parser.add_argument("--scores", type=Path, required=True, help="results.json of evaluate.py")
    parser.add_argument("--note", default="", help="a paragraph for the card on how this training went")
    parser.add_argument("--output", type=Path, default=Path(TINY_CHECKPOINT))
    args = parser.parse_args()

    pipe = RVEDiTPipeline.from_pretrained(args.editor[-1] / "pipeline", torch_dtype=torch.bfloat16)
    temporary = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary)
    for name in ("mllm", "text_encoder"):  # load in float32 unless told otherwise: few CPUs compute in bfloat16
        path = temporary / name / "config.json"
        path.write_text(path.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    (temporary / "training").mkdir()
    for name, folder in (("vae", args.vae), ("mllm", args.mllm), ("text", args.text)):
        shutil.copy(folder / "log.jsonl", temporary / "training" / f"{name}.jsonl")
    entries = joined_logs(args.editor)
    lines = [json.dumps(entry) + "\n" for entry in entries]
    (temporary / "training" / "editor.jsonl").write_text("".join(lines))

    shutil.copy(args.scores, temporary / "training" / "scores.json")
    summary = {"editor": {"step": entries[-1]["step"], "minutes": round(minutes(entries))}, "note": args.note}
    (temporary / "training" / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    is_embedded = args.output.resolve() == Path(TINY_CHECKPOINT).resolve()
    card = model_card(temporary, None if is_embedded else args.output.name)
    (temporary / "README.md").write_text(card)
    replace_folder(temporary, args.output)
    if is_embedded:
        (Path(__file__).parents[2] / "MODEL_CARD.md").write_text(card)
    size = sum(path.stat().st_size for path in args.output.rglob("*.safetensors")) / 1e6
    print(f"{args.output}: {size:.1f} MB of safetensors")


if __name__ == "__main__":
    main()
