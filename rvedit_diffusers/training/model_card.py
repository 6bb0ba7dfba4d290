"""The README.md of a trained model, which is its page on the Hub."""

import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


USAGE = {
    "lora": """pipe = RVEDiTPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{model}")""",
    "pipeline": 'pipe = RVEDiTPipeline.from_pretrained("{model}")',
}


def write_model_card(
    folder: str | Path,
    kind: str,
    base: str,
    model_id: str | None,
    facts: dict[str, str],
    losses: dict[str, float],
    sample: Path | None = None,
) -> None:
    """Write `README.md`, and `sample.png` beside it.

    Args:
        folder (`str` or `Path`): Of the weights.
        kind (`str`): `"lora"` or `"pipeline"`.
        base (`str`): What was trained: a Hub id, which the metadata name too, or a folder.
        model_id (`str`, *optional*): The name on the Hub to be.
        facts (`dict[str, str]`): Rows of the table of the training.
        losses (`dict[str, float]`): Rows of the table of the last losses.
        sample (`Path`, *optional*): A strip of the source, the edit and the true edit.
    """
    folder = Path(folder)
    is_hub_id = not Path(base).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="video-to-video",
        base_model=base if is_hub_id else None,
        tags=["rvedit", "video-editing", "diffusers", *(["lora"] if kind == "lora" else [])],
    )
    name = model_id or folder.resolve().parent.name
    shown = base if is_hub_id else Path(base).name
    what = "LoRA layers for" if kind == "lora" else "A fine-tuned"
    lines = [f"# {name}", "", f"{what} the instruction-based video editor `{shown}`.", ""]
    if sample is not None:
        shutil.copyfile(sample, folder / "sample.png")
        lines += ["Source, edit and true edit of a clip, over time:", "", "![Source, edit, true edit](sample.png)", ""]
    usage = USAGE[kind].format(base=shown, model=model_id or folder.name)
    lines += [
        "```python",
        "from rvedit_diffusers import RVEDiTPipeline, read_video, write_video",
        "",
        usage,
        'clip = read_video("clip.mp4")',
        'edited = pipe(clip, "what to change").frames[0]',
        'write_video("edited.mp4", edited, clip.fps)',
        "```",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        *(f"| {name.replace('_', ' ')}, last | {value:.4f} |" for name, value in losses.items()),
        "",
        "Trained with `examples/train.py` of rvedit_diffusers, an implementation of RVEDiT"
        " ([arXiv 2605.24674](https://arxiv.org/abs/2605.24674)).",
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n").save(folder / "README.md")
