"""The instructions that the embedded checkpoint's text encoder is taught with are parsed right, and it learns."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from rvedit_diffusers import TINY_CHECKPOINT
from rvedit_diffusers.synthetic.levels import held_out
from rvedit_diffusers.synthetic.stage import HELD_OUT_LOOKS
from rvedit_diffusers.training.checkpoint import checkpoints


SCRIPT = Path(__file__).parent.parent / "examples" / "tiny" / "train_text.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def drawn(script):
    rng = np.random.default_rng(0)
    return [script["draw_instruction"](rng) for _ in range(500)]


def test_spans_are_the_clauses_and_names_of_the_instruction(drawn, script):
    names = {"object": 0, "anchor": 0}
    for text, spans, facts in drawn:
        assert len(spans) == len(facts)
        for (whole, *parts), fact in zip(spans, facts, strict=True):
            assert whole[2] == script["PARTS"].index("rest") and whole[0] < whole[1] <= len(text)
            if parts:  # all of a name, and not the beginning of a word such as "its"
                assert text[parts[1][1] : parts[1][1] + 1] in ("", " ", ",")
            for begin, end, part in parts:
                said, name = text[begin:end].strip(), script["PARTS"][part]
                if not said:
                    continue
                names[name] += 1
                assert whole[0] <= begin < end <= whole[1]
                assert said == "it" or said.startswith("the ")
                of_anchor = {word.removeprefix("of ") for word in fact["name"] if word.startswith("of ")}
                if name == "anchor":
                    assert set(said.split()[1:]) == of_anchor
        between = [text[a[0][1] : b[0][0]] for a, b in zip(spans, spans[1:])]
        assert set(between) <= {", ", " and ", ", and ", ", then "}
        assert spans[0][0][0] == 0 and spans[-1][0][1] == len(text)
    assert min(names.values()) > 50


def test_it_is_what_was_named_before(drawn, script):
    found = 0
    for text, spans, facts in drawn:
        if " it " in f"{text} ":
            found += 1
            assert len(spans) == 2 and facts[0] is facts[1] and len(facts[0]["operation"]) == 2 and facts[0]["name"]
    assert found > 20


def test_nothing_that_is_held_out_is_said(drawn):
    for text, _, facts in drawn:
        assert not any(f"{colour} {shape}" in text for colour, shape in HELD_OUT_LOOKS)
        unique = {id(fact): fact["operation"] for fact in facts}.values()
        assert not held_out([kind for kinds in unique for kind in kinds])


def test_each_token_has_the_answers_of_its_clause(script):
    tokenizer = script["build_text_tokenizer"](script["clauses"](), model_max_length=script["MAX_LENGTH"])
    text = "remove the red circle and make the star left of the blue square smaller"
    first, second = text.split(" and ")
    start = len(text) - len(second)
    anchor = text.index("the blue")
    spans = [
        [(0, len(first), 2), (7, len(first), 0), (len(first), len(first), 1)],
        [(start, len(text), 2), (start + 5, anchor, 0), (anchor, anchor + len("the blue square"), 1)],
    ]
    facts = [
        {"operation": ["remove"], "value": [], "name": ["red", "circle"]},
        {"operation": ["resize"], "value": ["smaller"], "name": ["star", "left of", "of blue", "of square"]},
    ]
    batch = script["make_batch"]([(text, spans, facts)] * 2, tokenizer)

    words = [word.removeprefix("▁") for word in tokenizer.convert_ids_to_tokens(batch["input_ids"][1])]
    count = len(text.split())
    assert words[:count] == text.split()
    parts = [2, 0, 0, 0, -100, 2, 0, 0, 0, 0, 1, 1, 1, 2]
    assert batch["part"][1].tolist() == parts + [-100] * (len(words) - count)
    operations = [[script["KINDS"][k] for k in row.nonzero().flatten()] for row in batch["operation"][1]]
    assert operations[:count] == [["remove"]] * 4 + [[]] + [["resize"]] * 9
    names = [{script["NAME_WORDS"][k] for k in row.nonzero().flatten()} for row in batch["name"][1]]
    assert names[0] == {"red", "circle"} and names[5] == {"star", "left of", "of blue", "of square"}
    assert not batch["operation"][1, count:].any() and not batch["value"][1, :4].any()
    assert batch["value"][1, 5].nonzero().flatten().tolist() == [script["VALUE_WORDS"].index("smaller")]


def test_it_learns_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, stopped_at_the_first_checkpoint):
    def train(folder, steps):
        options = ["--steps", steps, "--batch_size", 8, "--save_every", 30]
        monkeypatch.setattr(sys, "argv", ["train_text.py", "--output", str(folder), *map(str, options)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return load_file(folder / "text_encoder" / "model.safetensors")

    whole = train(tmp_path / "whole", 80)
    assert json.loads((tmp_path / "whole" / "tokenizer" / "tokenizer.json").read_text())["padding"] is None
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert log[-2]["operation"] < 0.95 * log[0]["operation"] and log[-2]["value"] < 0.97 * log[0]["value"]
    assert {"operation_right", "value_right", "name_right", "part_right"} <= set(log[-1])

    with stopped_at_the_first_checkpoint():
        train(tmp_path / "stopped", 80)
    assert [folder.name for folder in checkpoints(tmp_path / "stopped")] == ["checkpoint-30"]
    resumed = train(tmp_path / "stopped", 80)
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, msg=name)


def test_a_probe_teaches_the_heads_alone_and_writes_no_model(tmp_path, monkeypatch):
    options = ["--probe", TINY_CHECKPOINT, "--steps", 20, "--batch_size", 2, "--save_every", 20]
    monkeypatch.setattr(sys, "argv", ["train_text.py", "--output", str(tmp_path), *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not (tmp_path / "text_encoder").exists()
    saved = load_file(tmp_path / "checkpoint-20" / "others.safetensors")
    weights = UMT5EncoderModel.from_pretrained(
        Path(TINY_CHECKPOINT) / "text_encoder", dtype=torch.float32
    ).state_dict()
    asked = {name.removeprefix("text_encoder."): weight for name, weight in saved.items() if "heads" not in name}
    assert len(asked) > 20
    for name, weight in asked.items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)


def test_a_probe_of_no_pipeline_is_refused(tmp_path, monkeypatch, capsys):
    options = ["--probe", str(tmp_path), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train_text.py", *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert f"--probe {tmp_path} has to be the folder of a pipeline" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
