import ast

import pytest
from huggingface_hub import ModelCard

import rvedit_diffusers
from rvedit_diffusers.training.model_card import write_model_card


HUB_ID = "someone/rvedit-1.3b"
FACTS = {"data": "90 pairs of clips.csv, buckets 17x64x64", "steps": "1000 of 4 pairs"}
LOSSES = {"flow": 0.25, "validation_flow": 0.34567}


@pytest.fixture
def card(tmp_path):
    """Writes a card into RUN/KIND and reads it back."""

    def card(kind="lora", base=HUB_ID, model_id=None, sample=None):
        folder = tmp_path / "my-run" / kind
        folder.mkdir(parents=True, exist_ok=True)
        write_model_card(folder, kind, base, model_id, FACTS, LOSSES, sample)
        return ModelCard.load(folder / "README.md")

    return card


def snippet(card):
    """The calls of the card's Python code: names as written, with their arguments."""
    code = card.text.partition("```python\n")[2].partition("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {ast.unparse(call.func): [ast.unparse(argument) for argument in call.args] for call in calls}


@pytest.mark.parametrize("kind, tags", [("lora", ["lora"]), ("pipeline", [])])
def test_metadata_say_what_the_hub_has_to_know(card, kind, tags):
    assert card(kind).data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "video-to-video",
        "base_model": HUB_ID,
        "tags": ["rvedit", "video-editing", "diffusers", *tags],
    }


def test_a_folder_is_no_base_model_of_the_hub(card, tmp_path):
    base = tmp_path / "private" / "base"
    base.mkdir(parents=True)
    card = card(base=str(base))
    assert card.data.base_model is None and "private" not in card.content


def test_the_table_holds_facts_and_last_losses(card):
    rows = [line for line in card().text.splitlines() if line.startswith("|")]
    assert rows == [
        "| | |",
        "|---|---|",
        "| data | 90 pairs of clips.csv, buckets 17x64x64 |",
        "| steps | 1000 of 4 pairs |",
        "| flow, last | 0.2500 |",
        "| validation flow, last | 0.3457 |",
    ]


def test_the_sample_is_copied_and_shown(card, tmp_path):
    sample = tmp_path / "3-make-it-blue.png"
    sample.write_bytes(b"a picture")
    text = card(sample=sample).text
    assert "](sample.png)" in text and (tmp_path / "my-run" / "lora" / "sample.png").read_bytes() == b"a picture"


def test_without_a_sample_no_picture_is_shown(card):
    assert "![" not in card().text


@pytest.mark.parametrize("model_id, title", [(None, "# my-run"), ("me/blue", "# me/blue")])
def test_the_title_is_the_name_on_the_hub_or_of_the_run(card, model_id, title):
    assert card(model_id=model_id).text.strip().splitlines()[0] == title


@pytest.mark.parametrize("model_id, name", [(None, "lora"), ("me/blue", "me/blue")])
def test_the_code_for_lora_loads_the_layers_into_the_base(card, model_id, name):
    calls = snippet(card("lora", model_id=model_id))
    assert calls["RVEDiTPipeline.from_pretrained"] == [repr(HUB_ID)]
    assert calls["pipe.load_lora_weights"] == [repr(name)]


@pytest.mark.parametrize("model_id, name", [(None, "pipeline"), ("me/blue", "me/blue")])
def test_the_code_for_a_pipeline_loads_it_alone(card, model_id, name):
    calls = snippet(card("pipeline", model_id=model_id))
    assert calls["RVEDiTPipeline.from_pretrained"] == [repr(name)]
    assert "pipe.load_lora_weights" not in calls


@pytest.mark.parametrize("kind", ["lora", "pipeline"])
def test_the_code_imports_what_there_is(card, kind):
    code = card(kind).text.partition("```python\n")[2].partition("```")[0]
    statement = ast.parse(code).body[0]
    assert statement.module == "rvedit_diffusers"
    assert {alias.name for alias in statement.names} <= set(dir(rvedit_diffusers))
