"""Write the trained pipeline as the embedded checkpoint: bfloat16 weights, training logs, a README with its scores.

The table of scores in MODEL_CARD.md is brought up to date, too.

python examples/tiny/export.py --vae runs/vae --mllm runs/mllm --editor runs/editor --scores runs/scores/results.json
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch

from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline
from rvedit_diffusers.training.checkpoint import checkpoints, read_state, replace_folder


README = """# The embedded checkpoint

A complete RVEDiT pipeline of {parameters:.1f} M parameters, trained from scratch on synthetic scenes by the scripts in
`examples/tiny` and `examples/train.py`, which `make tiny` runs one after the other.
It edits clips of 17 frames at 64x64: recolour, remove or replace one of a few moving shapes, or grade the whole clip.
It shows how the pieces work together; it is no judgement on the paper's model.

| part | parameters | how it was trained | steps | minutes |
|---|---|---|---|---|
{parts}

{note}The MLLM is a Qwen2.5-VL in miniature without any language of its own. It was first taught to answer questions
about scenes (what is in each cell, which cells change, which operation, object and value) and then frozen, as a
released MLLM is frozen. The text encoder learned together with the editor. No part has seen a real video; photographs
that ship inside scikit-image and scikit-learn served as backgrounds.

## Scores

`make score SEED={seed}`: scenes whose seeds were not used in training. An edit succeeds if, in at least 80 % of the
frames, the result is nearer to the true target than to the source and to every wrong edit, in the edited region and in
what the wrong edit alone would change. PSNR in dB: outside of the edited region (of a grade: everywhere), and what the
autoencoder alone reaches there.

| kind | success | outside PSNR | autoencoder | n |
|---|---|---|---|---|
{scores}

Where edits failed: {failures}.

The MLLM's answers on scenes over photographs that it never saw: {answers}.

`training/` holds the logs of the three runs.
"""


def last(log: Path) -> dict:
    return json.loads(log.read_text().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="output folder of train_vae.py")
    parser.add_argument("--mllm", type=Path, required=True, help="output folder of train_mllm.py")
    parser.add_argument("--editor", type=Path, required=True, help="output folder of train.py")
    parser.add_argument("--scores", type=Path, required=True, help="results.json of evaluate.py")
    parser.add_argument("--seed", type=int, default=0, help="that evaluate.py was run with")
    parser.add_argument("--note", default="", help="a paragraph for the README on how this training went")
    parser.add_argument("--output", type=Path, default=Path(TINY_CHECKPOINT))
    args = parser.parse_args()

    pipe = RVEDiTPipeline.from_pretrained(args.editor / "pipeline", torch_dtype=torch.bfloat16)
    temporary = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary)
    for path in temporary.rglob("*.json"):  # where the weights lay before is nobody's business
        values = json.loads(path.read_text())
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2) + "\n")
    (temporary / "training").mkdir()
    for name, folder in (("vae", args.vae), ("mllm", args.mllm), ("editor", args.editor)):
        shutil.copy(folder / "log.jsonl", temporary / "training" / f"{name}.jsonl")

    millions = {
        name: sum(p.numel() for p in component.parameters()) / 1e6
        for name, component in pipe.components.items()
        if isinstance(component, torch.nn.Module)
    }
    editor = sum(millions[name] for name in ("transformer", "distiller", "text_encoder"))
    rows = [
        ("autoencoder", millions["vae"], "reconstruction of clips (`train_vae.py`)", last(args.vae / "log.jsonl")),
        (
            "MLLM and queries",
            millions["mllm"],
            "questions about scenes (`train_mllm.py`)",
            last(args.mllm / "log.jsonl"),
        ),
        (
            "editor",
            editor,
            "flow matching and alignment (`train.py`)",
            read_state(checkpoints(args.editor)[-1]),
        ),
    ]
    parts = [f"| {name} | {m:.2f} M | {how} | {s['step']} | {s['seconds'] / 60:.0f} |" for name, m, how, s in rows]
    results = json.loads(args.scores.read_text())
    scores = "\n".join(
        f"| {kind} | {row['success']:.2f} | {row['outside_psnr']:.1f} | {row['vae_psnr']:.1f} | {row['n']} |"
        for kind, row in results.items()
    )
    failures = "; ".join(
        f"{kind}: " + ", ".join(f"{label} {count}" for label, count in row["failures"].items())
        for kind, row in results.items()
        if row["failures"]
    )
    answers = last(args.mllm / "log.jsonl")
    answers = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in answers.items() if k not in ("step", "seconds"))
    text = README.format(
        parameters=sum(millions.values()),
        parts="\n".join(parts),
        scores=scores,
        failures=failures or "none failed",
        note=f"{args.note}\n\n" if args.note else "",
        seed=args.seed,
        answers=answers,
    )
    (temporary / "README.md").write_text(text)
    replace_folder(temporary, args.output)
    card = Path(__file__).parents[2] / "MODEL_CARD.md"
    head, rule, rest = card.read_text().partition("|---|---|---|---|---|\n")
    head = re.sub(r"`make score SEED=\d+`", f"`make score SEED={args.seed}`", head)
    card.write_text(head + rule + scores + "\n\n" + rest.partition("\n\n")[2])
    size = sum(path.stat().st_size for path in args.output.rglob("*.safetensors")) / 1e6
    print(f"{args.output}: {size:.1f} MB of safetensors")


if __name__ == "__main__":
    main()
