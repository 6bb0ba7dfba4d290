"""What the documents show is run: Python as it stands, in order; of shell lines, that target or options exist."""

import math
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from components import make_clip
from huggingface_hub import ModelCard

from rvedit_diffusers.evaluation.ablation import SUCCESS, Ablation, read_outcomes
from rvedit_diffusers.evaluation.ablation_grid import read_grid
from rvedit_diffusers.evaluation.ablation_report import tables
from rvedit_diffusers.evaluation.report import MEAN_LEVELS
from rvedit_diffusers.model_card import check_model_card
from rvedit_diffusers.video import write_video


ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "MODEL_CARD.md")
ALL_DOCUMENTS = (*DOCUMENTS, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    text = "\n".join(block for document in ALL_DOCUMENTS for block in blocks(document, "bash"))
    lines = text.replace("\\\n", " ").splitlines()
    return sorted({line.split("#")[0].strip() for line in lines} - {""})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", make_clip(5, 64, 64), 25)
    names = {}
    snippets = blocks(document, "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, document, "exec"), names)


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("make ")])
def test_make_targets_exist(line):
    subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("line", [line for line in shell_lines() if "--model" in line])
def test_models_are_pipelines(line):
    words = shlex.split(line)
    model = words[words.index("--model") + 1]
    if (ROOT / model / "model_index.json").is_file():
        return
    lines = [words for words in map(shlex.split, shell_lines()) if "--output" in words]
    made = [words for words in lines if words[words.index("--output") + 1] == model.removesuffix("/pipeline")]
    learns_more = {"--stage", "--training_type", "--train_distiller"}  # a LoRA alone is no pipeline
    assert any(not model.endswith("/pipeline") or learns_more & set(words) for words in made)


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("python ")])
def test_options_of_scripts_exist(line, monkeypatch, capsys):
    _, script, *arguments = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))  # as python does for a script
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    named = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    assert named <= set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.mark.parametrize(
    "line", [line for line in shell_lines() if "examples/train.py" in line and "--plot" not in line]
)
def test_values_of_options_of_trainings_are_taken(line, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train

    words = shlex.split(line)[2:]
    for name, value in (("--model", ROOT / "rvedit_diffusers" / "checkpoints" / "tiny"), ("--output", tmp_path)):
        words[words.index(name) + 1] = str(value)
    train.parse_args(words)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("ablation*.md")), ids=lambda path: path.name)
def test_tables_of_an_ablation_are_those_of_its_runs(page):
    text = page.read_text()
    grid = read_grid(ROOT / re.search(r"--config (\S+)", text)[1])
    ablation = Ablation(list(read_outcomes(page.with_suffix(".json")).values()), grid["baseline"])
    for title, table in tables(ablation, {name: row["says"] for name, row in grid["rows"].items()}).items():
        assert f"## {title}\n\n{table}" in text


def test_figures_of_the_ablation_are_those_of_its_runs():
    ablation = Ablation(list(read_outcomes(ROOT / "docs" / "ablation.json").values()), "uniform")
    text = " ".join((ROOT / "README.md").read_text().split())
    for row in ("routed", "reversed", "routed-source"):
        share = ablation.figure(row, SUCCESS, MEAN_LEVELS).mean
        mean, low, high = (f"{100 * value:.1f}" for value in ablation.difference(row, "uniform", SUCCESS, MEAN_LEVELS))
        assert f" {100 * share:.1f} % ({mean} points, from {low} to {high}" in text
    assert f" {100 * ablation.figure('uniform', SUCCESS, MEAN_LEVELS).mean:.1f} % of the items of L2 to L6" in text
    without, one_block, all_blocks, aligned = (
        f"{100 * ablation.figure(row, SUCCESS, MEAN_LEVELS).mean:.1f} %"
        for row in ("native-only", "split-1", "edit-only", "uniform-source")
    )
    assert f"without editing tokens {without}: no difference" in text
    assert f"from {one_block} with one to {all_blocks} with all six" in text
    assert f"and the other {aligned}." in text
    parameters = ablation.runs["uniform"][0].facts["parameters"] / 1e6
    assert f"a transformer of {parameters:.1f} M parameters all of whose blocks read all tokens" in text
    nats = ablation.figure("routed-source", "information_nats").mean
    ceiling = math.log(ablation.runs["routed-source"][0].settings["train"]["align_tokens"])
    assert f"({nats:.2f} nats of at most {ceiling:.2f})" in text


def test_no_other_shell_lines():
    assert [line for line in shell_lines() if not line.startswith(("make ", "python "))] == []


@pytest.mark.parametrize("document", ALL_DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for link in links:
        path, _, heading = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, link


def test_the_hub_would_take_the_model_card():
    text = (ROOT / "MODEL_CARD.md").read_text()
    check_model_card(text)
    data = ModelCard(text).data
    assert data.license == "apache-2.0"
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "video-to-video"
