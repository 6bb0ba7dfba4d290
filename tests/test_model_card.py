import ast
import json
import math
import re
from pathlib import Path

import pytest
from bases import save_wan
from huggingface_hub import ModelCard, metadata_load

import rvedit_diffusers
from rvedit_diffusers import hub
from rvedit_diffusers.conversion import convert, plan_conversion, record_stage
from rvedit_diffusers.model_card import (
    APACHE,
    check_model_card,
    ensure_model_card,
    fill_model_card,
    is_as_written,
    markdown_table,
    write_model_card,
)
from rvedit_diffusers.tiny import save_tiny_mllm


HUB_ID = "someone/rvedit-1.3b"
WAN, QWEN_7B, QWEN_3B = (
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct",
)
RESEARCH = {
    "license": "other",
    "license_name": "qwen-research",
    "license_link": f"https://huggingface.co/{QWEN_3B}/blob/main/LICENSE",
}
FACTS = {"data": "90 pairs of clips.csv, buckets 17x64x64", "steps": "1000 of 4 pairs"}
LOSSES = {"flow": 0.25, "validation_flow": 0.34567}
SCORES = {
    "settings": {"seed": 7},
    "levels": {
        "L1": {
            "union_success": 2 / 3,
            "union_success_low": 0.0,
            "union_success_high": 1.0,
            "op_success": 0.75,
            "twin_consistency": 0.5,
            "outside_psnr": 22.718,
            "vae_psnr": 23.8,
            "n": 3,
            "failures": {"no edit": 1},
        },
        "L0": {
            "union_success": 1.0,
            "union_success_low": 1.0,
            "union_success_high": 1.0,
            "op_success": 1.0,
            "twin_consistency": None,
            "outside_psnr": 26.0,
            "vae_psnr": 26.3,
            "n": 3,
            "failures": {},
        },
    },
}
ODD = [
    "a | b",
    "---",
    "a \"quoted\" 'one'",
    "{{ 7 * 7 }} {% raw %}",
    "two\nlines",
    "back\\|slash",
    "<!-- gone",
    "# top",
]


def record(wan=WAN, mllm=QWEN_7B, stages=()):
    counts = {"mapped": 1_418_996_800, "new": 12_345, "dropped": 0}
    origins = {"wan": {"source": wan, "revision": "a1b2"}, "mllm": {"source": mllm, "revision": None}}
    return json.dumps(origins | {"parameters": counts, "linked": False} | ({"stages": stages} if stages else {}))


def section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(text):
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.fixture
def card(tmp_path):
    """Writes a card into RUN/KIND and reads it back."""

    def card(kind="lora", base=HUB_ID, model_id=None, sample=None, facts=FACTS, **options):
        folder = tmp_path / "my-run" / kind
        folder.mkdir(parents=True, exist_ok=True)
        write_model_card(folder, kind, base, model_id, facts, LOSSES, sample, **options)
        assert [path.name for path in folder.iterdir() if path.suffix == ".partial"] == []
        check_model_card((folder / "README.md").read_text())
        return ModelCard.load(folder / "README.md")

    return card


@pytest.fixture
def folder(tmp_path):
    """A folder that looks like one of a pipeline, with other files."""

    def folder(name="edits", index="model_index.json", **files):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / index).write_text('{"conversion": ' + files.pop("conversion", "null") + "}")
        for stem, text in files.items():
            (path / {"readme": "README.md", "code": "pipeline.py"}[stem]).write_text(text)
        return path

    return folder


def ensured(folder, model_id=None):
    ensure_model_card(folder, model_id)
    check_model_card((folder / "README.md").read_text())
    return ModelCard.load(folder / "README.md")


def snippet(card):
    """The calls of the card's Python code: names as written, with their arguments."""
    code = card.text.partition("```python\n")[2].partition("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {
        ast.unparse(call.func): [ast.unparse(argument) for argument in (*call.args, *call.keywords)] for call in calls
    }


# What was trained


@pytest.mark.parametrize("kind, tags, relation", [("lora", ["lora"], "adapter"), ("pipeline", [], "finetune")])
def test_metadata_say_what_the_hub_has_to_know(card, kind, tags, relation):
    assert card(kind).data.to_dict() == {
        "license": "other",
        "license_name": "see-base-model",
        "license_link": f"https://huggingface.co/{HUB_ID}",
        "library_name": "diffusers",
        "pipeline_tag": "video-to-video",
        "language": ["en"],
        "base_model": HUB_ID,
        "base_model_relation": relation,
        "tags": ["rvedit", "video-editing", "instruction-based-editing", "diffusers", *tags],
    }


def test_a_folder_is_no_base_model_of_the_hub(card, tmp_path):
    base = tmp_path / "private" / "base"
    base.mkdir(parents=True)
    card = card(base=str(base))
    assert card.data.base_model is None and "private" not in card.content
    assert card.data.get("base_model_relation") is None and card.data.license == "unknown"


def test_the_table_holds_facts_and_last_losses(card):
    assert table(section(card().text, "Training")) == [
        "| | |",
        "|---|---|",
        "| data | 90 pairs of clips.csv, buckets 17x64x64 |",
        "| steps | 1000 of 4 pairs |",
        "| flow, last | 0.2500 |",
        "| validation flow, last | 0.3457 |",
    ]


@pytest.mark.parametrize("odd", ODD)
def test_odd_facts_stay_in_their_cell(card, odd):
    plain, card = card(), card(facts={"data": odd, odd: "5"})
    lines = card.text.splitlines()
    rows = table(section(card.text, "Training"))
    assert len(rows) == 6 and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows)
    assert len(lines) == len(plain.text.splitlines()) and card.data.to_dict() == plain.data.to_dict()
    assert "49" not in rows[2] and card.text.count("<!--") == 1  # our mark, in the last line


@pytest.mark.parametrize("odd", [*ODD, "yes", "1e3", "key: value", "- item", "'", "@me", "%TAG"])
def test_odd_names_stay_in_the_metadata(odd):
    text = fill_model_card("pipeline", odd, APACHE, scores=SCORES, training="none")
    assert ModelCard(text).data.model_name == " ".join(odd.split()).replace("<", "&lt;")
    assert metadata_of(text).keys() == metadata_of(fill_model_card("pipeline", "a", APACHE, scores=SCORES)).keys()


def metadata_of(text):
    return ModelCard(text).data.to_dict()


@pytest.mark.parametrize("odd", ['a"b', "a\\b", "{{ a }}", "a'b", "grün"])
def test_odd_folders_are_strings_in_the_code(card, tmp_path, odd):
    base = tmp_path / odd
    base.mkdir()
    calls = snippet(card(base=str(base)))
    assert ast.literal_eval(calls["RVEDiTPipeline.from_pretrained"][0]) == odd


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


def test_the_code_for_lora_of_the_embedded_checkpoint_takes_that(card):
    card = card(base=rvedit_diffusers.TINY_CHECKPOINT, model_id="me/blue")
    assert snippet(card)["RVEDiTPipeline.from_pretrained"] == ["TINY_CHECKPOINT"]
    assert "from rvedit_diffusers import TINY_CHECKPOINT, RVEDiTPipeline" in card.text


@pytest.mark.parametrize(
    "model_id, pipeline, arguments",
    [(None, "pipeline", ["'lora'"]), ("me/blue", "me/blue", ["'me/blue'", "subfolder='lora'"])],
)
def test_the_code_for_lora_beside_its_pipeline_loads_both(card, model_id, pipeline, arguments):
    calls = snippet(card("lora", model_id=model_id, subfolder="lora"))
    assert calls["RVEDiTPipeline.from_pretrained"] == [repr(pipeline)]
    assert calls["pipe.load_lora_weights"] == arguments


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


def test_scores_are_a_table_and_the_hubs_evaluation_results(card):
    card = card(scores=SCORES)
    assert table(section(card.text, "Scores"))[2:] == [
        "| L1 | one operation, on an object like no other | 0.67 (0.00 to 1.00) | 0.75 | 0.50 | 22.7 | 23.8 | 3 |",
        "| L0 | another grade, style or background | 1.00 (1.00 to 1.00) | 1.00 |  | 26.0 | 26.3 | 3 |",
    ]
    assert "Why operations failed: no edit 1." in card.text and "--seed 7 --num_samples 3" in card.text
    found = [
        (result.task_type, result.dataset_config, result.dataset_args, result.metric_type, result.metric_value)
        for result in card.data.eval_results
    ]
    place = {"seed": 7, "num_samples": 3}
    assert found == [
        ("video-to-video", "L1", place, "union_success", 0.6667),
        ("video-to-video", "L0", place, "union_success", 1.0),
    ]


def test_the_mean_over_levels_is_a_row_and_no_result_of_the_hub(card):
    levels = SCORES["levels"]
    mean = {name: value for name, value in levels["L1"].items() if name != "failures"}
    card = card(scores=SCORES | {"levels": levels | {"mean_L2_L6": mean}})
    assert table(section(card.text, "Scores"))[-1].startswith("| mean L2 L6 | mean of L2 to L6 | 0.67 (")
    assert [result.dataset_config for result in card.data.eval_results] == ["L1", "L0"]


@pytest.mark.parametrize(
    "kind, pipeline, dtype, command",
    [
        ("embedded", "TINY_CHECKPOINT", "float32", "make score SEED=7 NUM=3"),
        (
            "embedded",
            "TINY_CHECKPOINT",
            "bfloat16",
            "examples/evaluate.py --seed 7 --num_samples 3 --dtype bfloat16 --output out/scores",
        ),
        (
            "embedded",
            '"tiny"',
            "float32",
            "examples/evaluate.py --model tiny --seed 7 --num_samples 3 --output out/scores",
        ),
        (
            "pipeline",
            '"me/blue"',
            "bfloat16",
            "examples/evaluate.py --model me/blue --seed 7 --num_samples 3 --dtype bfloat16 --output out/scores",
        ),
    ],
)
def test_the_command_of_the_scores_takes_the_model_and_computes_in_their_dtype(kind, pipeline, dtype, command):
    scores = SCORES | {"settings": {"seed": 7, "dtype": dtype}}
    assert f"(`{command}`)." in fill_model_card(kind, "a", APACHE, scores=scores, pipeline_argument=pipeline)


def test_without_scores_none_are_claimed(card):
    card = card()
    assert "model-index" not in card.data.to_dict() and section(card.text, "Scores").strip().startswith("None were")


def test_another_kind_is_refused(card):
    with pytest.raises(ValueError, match="`kind`.*'adapter'"):
        card("adapter")


def test_what_the_hub_would_refuse_is_not_written(card, tmp_path):
    with pytest.raises(ValueError, match="base_model"):
        card(base="not/a/hub/id")
    assert list((tmp_path / "my-run" / "lora").iterdir()) == []


# From what


@pytest.mark.parametrize("kind", ["lora", "pipeline"])
@pytest.mark.parametrize("licence", [RESEARCH, {"license": "cc-by-nc-4.0"}], ids=["research", "cc"])
def test_the_licence_is_that_of_the_bases_card(card, folder, kind, licence):
    metadata = "\n".join(f"{name}: {value}" for name, value in licence.items())
    card = card(kind, base=str(folder("base", readme=f"---\n{metadata}\n---\nA base.\n")))
    assert {name: card.data.get(name) for name in licence} == licence
    assert licence.get("license_name", licence["license"]) in section(card.text, "Licence")


def test_a_licence_in_the_repository_of_the_base_is_linked_to_there(card, folder):
    text = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
    card = card(base=HUB_ID, base_folder=folder("snapshot", readme=text))
    assert card.data.license_link == f"https://huggingface.co/{HUB_ID}/blob/main/LICENSE"


@pytest.mark.parametrize("readme", ["---\nlicense: free\n---\n", "---\nlicense: [\n---\n", "A base.\n"])
def test_a_bases_card_that_says_no_licence_ends_no_training(card, folder, readme):
    assert card(base=str(folder("base", readme=readme, conversion=record()))).data.license == "apache-2.0"


def test_a_pipeline_that_was_trained_with_a_lora_tells_how_to_load_both(card):
    for name, arguments in ((None, '"lora"'), ("me/edits", '"me/edits", subfolder="lora"')):
        text = card("pipeline", model_id=name, subfolder="lora").text
        assert f"pipe.load_lora_weights({arguments})\n" in text and "without them it is" in text
    assert "load_lora_weights" not in card("pipeline").text


@pytest.mark.parametrize("kind, call", [("lora", "load_lora_weights"), ("pipeline", "from_pretrained")])
def test_a_card_gets_the_name_that_the_model_has_on_the_hub(folder, kind, call):
    """Of a training that did not know it; not one that somebody has changed."""
    if kind == "pipeline":
        path = folder("my-run/pipeline", conversion=record(stages=["edit"]), code="x = 1\n")
    else:
        path = folder("my-run/lora", index="pytorch_lora_weights.safetensors")
    write_model_card(path, kind, HUB_ID, None, {"steps": "3"}, {})
    written = (path / "README.md").read_text()
    ensure_model_card(path, "me/blue")
    card = ModelCard.load(path / "README.md")
    assert "\n# me/blue\n" in card.text and f'{call}("me/blue")' in card.text and "| steps | 3 |" in card.text
    assert f'from_pretrained("{HUB_ID}")' in card.text or kind == "pipeline"
    assert ('from_pretrained("me/blue", trust_remote_code=True)' in card.text) == (kind == "pipeline")
    assert is_as_written((path / "README.md").read_text())
    changed = written.replace("| steps | 3 |", "| steps | three |")
    (path / "README.md").write_text(changed)
    ensure_model_card(path, "me/blue")
    assert (path / "README.md").read_text() == changed


def test_the_embedded_checkpoint_gives_its_licence_on(card):
    assert card(base=rvedit_diffusers.TINY_CHECKPOINT).data.license == "apache-2.0"


@pytest.mark.parametrize("kind, relation", [("lora", "adapter"), ("pipeline", "finetune")])
def test_of_a_converted_base_the_models_that_it_was_made_from_are_named(card, folder, kind, relation):
    card = card(kind, base=str(folder("converted", conversion=record(mllm=QWEN_3B, stages=["connect", "edit"]))))
    assert card.data.base_model == [WAN, QWEN_3B] and card.data["base_model_relation"] == relation
    assert {name: card.data.get(name) for name in RESEARCH} == RESEARCH
    assert "No commercial use" in card.text and "Built with Qwen" in card.text and "UNTRAINED" not in card.text
    assert "1,418,996,800" in card.text


@pytest.mark.parametrize(
    "readme, mllm, licence",
    [
        ("---\nlicense: apache-2.0\n---\n", QWEN_7B, {"license": "apache-2.0"}),
        ("A base.\n", QWEN_7B, {"license": "other", "license_name": "see-base-model"}),
        ("A base.\n", QWEN_3B, RESEARCH),
    ],
)
def test_the_licence_of_a_converted_base_on_the_hub_is_what_its_card_says(card, folder, readme, mllm, licence):
    card = card("lora", base_folder=folder("snapshot", readme=readme, conversion=record(mllm=mllm)))
    assert {name: card.data.get(name) for name in licence} == licence


def test_a_converted_base_on_the_hub_is_the_base_model(card, folder):
    card = card("lora", base_folder=folder("snapshot", conversion=record()))
    assert card.data.base_model == HUB_ID
    assert [row.split(" | ")[1] for row in table(section(card.text, "Licence"))[2:]] == [
        f"[{name}](https://huggingface.co/{name})" for name in (HUB_ID, WAN, QWEN_7B)
    ]


@pytest.mark.parametrize("stages, is_untrained", [(["connect"], True), (["connect", "edit"], False)])
def test_a_pipeline_is_untrained_until_it_has_learned_to_edit(card, folder, stages, is_untrained):
    base = folder("converted", conversion=record())
    own = folder("my-run/pipeline", conversion=record(stages=stages))
    text = card("pipeline", base=str(base)).text
    assert ("UNTRAINED as an editor" in text) == is_untrained and (own / "README.md").is_file()


# Folders without a card


def test_a_converted_pipeline_is_called_untrained(folder):
    card = ensured(folder(conversion=record()), "me/converted")
    assert "UNTRAINED as an editor" in card.text and card.text.strip().startswith("# me/converted")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "video-to-video",
        "language": ["en"],
        "base_model": [WAN, QWEN_7B],
        "base_model_relation": "merge",
        "tags": ["rvedit", "video-editing", "instruction-based-editing", "diffusers"],
    }
    assert "a1b2" in section(card.text, "Licence")


@pytest.mark.parametrize(
    "wan, mllm, licence",
    [
        (WAN, QWEN_7B, {"license": "apache-2.0"}),
        ("Wan2.1-T2V-14B-Diffusers", "Qwen/Qwen3-VL-8B-Instruct", {"license": "apache-2.0"}),
        (WAN, QWEN_3B, RESEARCH),
        (WAN, "Qwen2.5-VL-3B-Instruct", RESEARCH),
        ("someone/wan", "someone/Qwen2.5-VL-3B-Instruct-AWQ", RESEARCH),
        (WAN, "my-qwen", {"license": "unknown"}),
        (
            "someone/wan",
            QWEN_7B,
            {
                "license": "other",
                "license_name": "see-base-model",
                "license_link": "https://huggingface.co/someone/wan",
            },
        ),
    ],
)
def test_the_strictest_licence_of_the_bases_holds(folder, wan, mllm, licence):
    data = ensured(folder(conversion=record(wan, mllm))).data
    assert {name: value for name, value in data.to_dict().items() if name.startswith("license")} == licence
    named = [name for name in (wan, mllm) if "/" in name]
    assert data.base_model == (named[0] if len(named) == 1 else named)


def test_what_the_converter_writes_is_understood(tmp_path):
    save_wan(tmp_path / "private" / "wan")
    save_tiny_mllm(tmp_path / "private" / "qwen")
    folder = tmp_path / "edits"
    convert(plan_conversion(str(tmp_path / "private" / "wan"), str(tmp_path / "private" / "qwen")), folder)
    card = ensured(folder)
    assert "UNTRAINED" in card.text and "private" not in card.content and card.data.base_model is None
    assert card.data.license == "unknown" and [row.split(" | ")[1] for row in table(card.text)[2:]] == ["wan", "qwen"]
    (folder / "README.md").unlink()
    record_stage(folder, "connect")
    assert "went through: connect." in ensured(folder).text


def test_a_record_that_cannot_be_read_is_named(folder):
    path = folder(conversion='{"wan": 1}')
    with pytest.raises(ValueError, match="model_index.json has no record"):
        ensure_model_card(path)
    assert not (path / "README.md").exists()


def test_of_a_pipeline_without_a_record_nothing_is_claimed(folder):
    card = ensured(folder("edits.partial"))
    assert card.data.license == "unknown" and card.data.base_model is None and "UNTRAINED" not in card.text
    assert card.text.strip().startswith("# edits\n") and "does\nnot record where its weights come from" in card.text


def test_lora_without_a_record_has_a_card(folder):
    card = ensured(folder(index="pytorch_lora_weights.safetensors"), "me/blue")
    assert "lora" in card.data.tags and snippet(card)["pipe.load_lora_weights"] == ["'me/blue'"]


def test_another_folder_gets_none(folder):
    path = folder(index="config.json")
    with pytest.raises(ValueError, match="model_index.json"):
        ensure_model_card(path)
    assert not (path / "README.md").exists()


@pytest.mark.parametrize("has_code", [True, False])
def test_code_that_goes_along_is_told_of(folder, has_code):
    text = ensured(folder(**({"code": "x = 1\n"} if has_code else {}))).text
    assert ("trust_remote_code=True" in text) == has_code
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)


def test_our_card_stays_byte_for_byte(card, folder):
    path = folder(conversion=record())
    ensure_model_card(path)
    edited = (path / "README.md").read_text().replace("license: apache-2.0", "license: mit") + "\nMore words.\n"
    (path / "README.md").write_text(edited)
    ensure_model_card(path, "me/other-name")
    assert (path / "README.md").read_text() == edited


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_card_that_nobody_changed_is_known(card, folder, tmp_path, is_trained):
    path = tmp_path / "my-run" / "lora" if is_trained else folder(conversion=record())
    card("lora") if is_trained else ensure_model_card(path)
    text = (path / "README.md").read_text()
    assert is_as_written(text)
    for changed in (text.replace("# ", "## ", 1), text + "\nMore.\n", text.rpartition("\n<!--")[0], ""):
        assert not is_as_written(changed)


def test_a_card_with_words_of_others_is_not_ours_alone(folder):
    path = folder(readme="Mine.\n", conversion=record())
    ensure_model_card(path)
    assert not is_as_written((path / "README.md").read_text())


def test_text_without_metadata_stands_below_the_card(folder):
    theirs = "# Mine\n\nIt {{ likes }} reds.\n\n\n\n---\nlicense: none\n---\n"
    card = ensured(folder(readme=theirs, conversion=record()))
    assert card.text.endswith(f"\n## Notes\n\n{theirs}") and card.data.license == "apache-2.0"
    assert card.text.strip().startswith("# edits\n")


def test_metadata_of_others_go_before_ours(folder):
    theirs = "---\nlicense: mit\ntags: [mine, diffusers]\npipeline_tag: text-to-video\nthumbnail: a.png\n---\nWords.\n"
    card = ensured(folder(readme=theirs, conversion=record(mllm=QWEN_3B)))
    assert card.data.license == "mit" and card.data.get("license_link") is None
    assert card.data["thumbnail"] == "a.png" and card.data.pipeline_tag == "video-to-video"
    assert card.data.tags == ["rvedit", "video-editing", "instruction-based-editing", "diffusers", "mine"]
    assert card.text.endswith("\n## Notes\n\nWords.\n")


@pytest.mark.parametrize(
    "readme, problem",
    [
        ("---\nlibrary_name: diffusers\ntags: [rvedit]\n---\n", "`license`"),
        ("---\nlicense: free\n---\n", "'free'"),
        ("---\nlicense: [\n---\n", "no YAML"),
        ("---\n- a\n- b\n---\n", "mapping"),
    ],
)
def test_what_the_hub_would_refuse_is_told_and_left(folder, readme, problem):
    path = folder(readme=readme)
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        ensure_model_card(path)
    assert str(path / "README.md") in str(error.value) and (path / "README.md").read_text() == readme


def test_the_template_goes_along_with_the_code():
    body = ast.parse(hub.bundle()).body
    values = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    template = Path(rvedit_diffusers.__file__).with_name("model_card_template.md").read_text()
    assert ast.literal_eval(values["CARD_TEMPLATE"]) == template


# What the Hub checks


SECTIONS = [
    "How to use",
    "What is the paper's and what is ours",
    "Training",
    "Scores",
    "Limits",
    "Intended use, and use that is not",
    "Licence",
    "Citation",
]


def test_all_cards_have_the_same_sections(card, folder):
    embedded = Path(rvedit_diffusers.TINY_CHECKPOINT, "README.md").read_text()
    for text in (card("lora").text, card("pipeline").text, ensured(folder(conversion=record())).text, embedded):
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
        assert "2605.24674" in section(text, "Citation") and "Yan Li and Lin Liu" in section(text, "Citation")
        assert "{{" not in text and "{%" not in text and "\n\n\n" not in text
        assert ("None were measured" in text) != ("| union success |" in text)
        for word in ("consent", "deceive", "labelled"):
            assert word in section(text, "Intended use, and use that is not")
        assert "no filter of content" in section(text, "Limits") and "Sound" in section(text, "Limits")


def test_metadata_can_be_loaded_as_the_hub_does(card, tmp_path):
    card("lora", scores=SCORES)
    data = metadata_load(tmp_path / "my-run" / "lora" / "README.md")
    assert data["model-index"][0]["results"][0]["dataset"]["name"].endswith("L1")


VALID = {
    "license": "apache-2.0",
    "library_name": "diffusers",
    "pipeline_tag": "video-to-video",
    "language": ["en"],
    "tags": ["rvedit"],
}
INDEX = [
    {
        "name": "a",
        "results": [
            {
                "task": {"type": "video-to-video"},
                "dataset": {"type": "b", "name": "c"},
                "metrics": [{"type": "d", "value": 0.5}],
            }
        ],
    }
]


def with_metadata(data, text="# A model\n"):
    return f"---\n{json.dumps(data)}\n---\n{text}"  # JSON is YAML


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"language": "en"},
        {"base_model": "gpt2"},
        {"base_model": ["a/b", "c/d"], "base_model_relation": "merge"},
        {"license": "other", "license_name": "mine-1.0", "license_link": "LICENSE"},
        {"model-index": INDEX},
    ],
)
def test_valid_metadata_are_accepted(data):
    check_model_card(with_metadata(VALID | data))


@pytest.mark.parametrize("name", VALID)
def test_a_missing_key_is_named(name):
    data = {key: value for key, value in VALID.items() if key != name}
    with pytest.raises(ValueError, match=f"`{name}`"):
        check_model_card(with_metadata(data))


@pytest.mark.parametrize(
    "name, data",
    [
        ("library_name", {"library_name": "keras"}),
        ("pipeline_tag", {"pipeline_tag": "video-editing"}),
        ("pipeline_tag", {"pipeline_tag": ["video-to-video"]}),
        ("language", {"language": ["English"]}),
        ("language", {"language": True}),
        ("tags", {"tags": "rvedit"}),
        ("tags", {"tags": ["diffusers"]}),
        ("tags", {"tags": ["rvedit", 1]}),
        ("license", {"license": "Apache 2.0"}),
        ("license", {"license": ["apache-2.0"]}),
        ("license_name", {"license": "other", "license_link": "LICENSE"}),
        ("license_name", {"license": "other", "license_name": "two words", "license_link": "LICENSE"}),
        ("license_link", {"license": "other", "license_name": "mine"}),
        ("license_link", {"license": "other", "license_name": "mine", "license_link": "README.md"}),
        ("base_model", {"base_model": "/home/me/base"}),
        ("base_model", {"base_model": ["a/b", "c/d/e"]}),
        ("base_model", {"base_model": 3}),
        ("base_model_relation", {"base_model": "a/b", "base_model_relation": "child"}),
        ("base_model_relation", {"base_model_relation": "adapter"}),
        ("model-index", {"model-index": [{"name": "a"}]}),
        ("model-index", {"model-index": "a"}),
        ("model-index", {"model-index": [INDEX[0] | {"colour": "red"}]}),
        ("model-index", {"model-index": [{"name": "a", "results": []}, *INDEX]}),
    ],
)
def test_a_wrong_value_is_named(name, data):
    with pytest.raises(ValueError, match=f"`{name}`"):
        check_model_card(with_metadata(VALID | data))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="finite"):
        row = SCORES["levels"]["L0"] | {"union_success": value}
        fill_model_card("pipeline", "a", APACHE, scores=SCORES | {"levels": {"L0": row}})


@pytest.mark.parametrize("text", ["# A model\n", "\n" + with_metadata(VALID), "# A model\n" + with_metadata(VALID)])
def test_metadata_come_first(text):
    with pytest.raises(ValueError, match="begin with its metadata"):
        check_model_card(text)


def test_a_table_without_titles_is_what_markdown_takes():
    assert markdown_table(["", ""], [["a", 1]]) == "| | |\n|---|---|\n| a | 1 |"
