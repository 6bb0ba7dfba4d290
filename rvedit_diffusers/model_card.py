"""The README.md of a model, its page on the Hub: filled from a template, and checked as the Hub does, but offline."""

import hashlib
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id


# Written just so: `bundle` of hub.py puts the text in its place.
CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md").read_text(encoding="utf-8")

REQUIRED_METADATA = ("license", "library_name", "pipeline_tag", "language", "tags")

# The Hub's names of the tasks whose result is a video:
# https://github.com/huggingface/huggingface.js/blob/main/packages/tasks/src/pipelines.ts
VIDEO_TASKS = ("video-to-video", "text-to-video", "image-to-video", "image-text-to-video")

# https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
BASE_MODEL_RELATIONS = ("adapter", "finetune", "merge", "quantized")

# https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m"
    " afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0"
    " cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0"
    " cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0"
    " cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl"
    " gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql"
    " ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other"
).split()
LICENCE_KEYS = ("license", "license_name", "license_link")
LICENCE_FILES = ("LICENSE", "LICENSE.md")  # a `license_link` that is no address names a file in the repository

# What the pages of the bases on the Hub say, for those that conversion.py takes.
APACHE = {"license": "apache-2.0"}
APACHE_BASES = (
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    *(f"Qwen/Qwen3-VL-{size}-{kind}" for size in ("2B", "4B", "8B") for kind in ("Instruct", "Thinking")),
)
EMBEDDED = Path(__file__).resolve().parent / "checkpoints" / "tiny"
QWEN_RESEARCH = {
    "license": "other",
    "license_name": "qwen-research",
    "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
}

CODE_USAGE = """\
Without that package, the code in this repository's `pipeline.py` does it, after a look at it:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({}, trust_remote_code=True)
```
"""
# The models that the record of a conversion names, and what is taken from them.
PARTS = {"wan": "text-to-video model: transformer, VAE, text encoder", "mllm": "MLLM"}
ORIGIN_HEAD = ["made from", "source", "revision", "licence"]

SCORE_HEAD = ["level", "what it asks for", "union success", "operations", "twins", "outside PSNR", "autoencoder", "n"]
LEVELS = {
    "L0": "another grade, style or background",
    "L1": "one operation, on an object like no other",
    "L2": "one operation, among objects that look alike",
    "L3": "two operations, on two objects",
    "L4": "two operations, on one object",
    "L5": "an operation on an object, and one on the whole",
    "L6": "three operations, or one that depends on another",
    "OOD": "looks and pairs of operations that training items of the other levels never have",
    "mean_L2_L6": "mean of L2 to L6",
}


def check_model_card(text: str) -> None:
    """
    Whether the Hub takes a model card of ours as it is, as far as that can be known without asking it.

    Args:
        text (`str`): The whole of `README.md`.

    Raises:
        `ValueError`: naming the key of the metadata that is wrong, its value, and what would be right.
    """
    if not text.startswith("---\n"):
        raise ValueError("a model card has to begin with its metadata, between two lines of `---`")
    data, _ = _split_card(text)
    for name in REQUIRED_METADATA:
        if not data.get(name):
            raise ValueError(f"the metadata of a model card have to say `{name}`")
    if data["library_name"] != "diffusers":
        raise ValueError(f"`library_name` has to be diffusers, got {data['library_name']!r}")
    if data["pipeline_tag"] not in VIDEO_TASKS:
        raise ValueError(f"`pipeline_tag` has to be one of {', '.join(VIDEO_TASKS)}, got {data['pipeline_tag']!r}")
    if not all(re.fullmatch("[a-z]{2,3}|multilingual", str(language)) for language in _as_list(data["language"])):
        raise ValueError(f"`language` has to be an ISO 639 code, or a list of them, got {data['language']!r}")
    tags = data["tags"]
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags) or "rvedit" not in tags:
        raise ValueError(f"`tags` has to be a list of words, with rvedit, got {tags!r}")
    _check_licence(data)

    bases, relation = _as_list(data.get("base_model")), data.get("base_model_relation")
    for base in bases:
        try:
            validate_repo_id(base)
        except HFValidationError as error:
            raise ValueError(f"`base_model` has to be the id of a model on the Hub, or a list: {error}") from error
    if relation is not None and (relation not in BASE_MODEL_RELATIONS or not bases):
        raise ValueError(
            f"`base_model_relation` has to be one of {', '.join(BASE_MODEL_RELATIONS)}, with a `base_model`, got"
            f" {relation!r}"
        )

    if "model-index" in data:
        try:
            name, results = model_index_to_eval_results(data["model-index"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`model-index` cannot be read: {type(error).__name__} {error}") from error
        if eval_results_to_model_index(name, results) != data["model-index"]:
            raise ValueError(f"`model-index` has entries that the Hub does not know, or that are empty: {results}")
        for result in results:
            if isinstance(result.metric_value, float) and not math.isfinite(result.metric_value):
                raise ValueError(f"`model-index` has to hold finite values, got {result.metric_value}")


def _check_licence(data: dict) -> None:
    if data["license"] not in HUB_LICENCES:
        raise ValueError(
            f"`license` has to be one of the Hub's identifiers, such as apache-2.0, got {data['license']!r}"
        )
    link = str(data.get("license_link"))
    if data["license"] == "other":
        if not re.fullmatch(r"[\w.-]+", str(data.get("license_name") or "")):
            raise ValueError(
                f"`license_name` has to be a word, as `license` is other, got {data.get('license_name')!r}"
            )
        if link not in LICENCE_FILES and not re.fullmatch(r"https?://\S+", link):
            raise ValueError(f"`license_link` has to be an address, LICENSE or LICENSE.md, got {link!r}")


def _split_card(text: str) -> tuple[dict, str]:
    block = REGEX_YAML_BLOCK.match(text)
    if block is None:
        return {}, text
    try:
        data = yaml.safe_load(block.group(2)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of the model card are no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise ValueError(f"the metadata of the model card have to be a mapping with words as keys, got {data!r}")
    return data, text[block.end() :]


def fill_model_card(
    kind: str,
    title: str,
    licence: dict[str, str],
    base_models: list[str] | None = None,
    relation: str | None = None,
    scores: dict[str, dict] | None = None,
    **values,
) -> str:
    """
    The text of a model card, which [`check_model_card`] has accepted.

    Args:
        kind (`str`): `"lora"`; `"pipeline"`, one that was trained; `"converted"`, any other; or `"embedded"`, the
            checkpoint of this package.
        title (`str`): Of the page, and the model's name beside its scores.
        licence (`dict[str, str]`): `license`, and for `other` also `license_name` and `license_link`.
        base_models (`list[str]`, *optional*), relation (`str`, *optional*): Ids on the Hub, and what it is to them.
        scores (`dict[str, dict]`, *optional*): What `examples/evaluate.py` wrote to `results.json`, with the synthetic
            benchmark: `settings`, with their `seed` and `dtype`, and `levels`.
        values: What else the template asks for.

    Raises:
        `ValueError`: if the Hub would not take the card.
    """
    title = _line(title)
    results = None
    if scores:
        levels, seed = scores["levels"], scores["settings"]["seed"]
        results = [_eval_result(name, row, seed) for name, row in levels.items() if name != "mean_L2_L6"]
        failures = sum((Counter(row.get("failures", {})) for row in levels.values()), Counter())
        values |= {
            "seed": seed,
            "dtype": scores["settings"].get("dtype", "float32"),
            "num_samples": next(iter(levels.values()))["n"],
            "scores": markdown_table(SCORE_HEAD, [_score_row(name, row) for name, row in levels.items()]),
            "failures": ", ".join(f"{label} {count}" for label, count in failures.items()) or "none",
        }
    bases = base_models or []
    data = ModelCardData(
        **licence,
        language=["en"],
        library_name="diffusers",
        pipeline_tag="video-to-video",
        tags=["rvedit", "video-editing", "instruction-based-editing", "diffusers", *["lora"] * (kind == "lora")],
        base_model=(bases[0] if len(bases) == 1 else bases) or None,
        base_model_relation=relation if bases else None,
        model_name=title if results else None,
        eval_results=results,
    )
    values |= {"kind": kind, "title": title, "licence": licence}
    card = ModelCard.from_template(data, template_str=CARD_TEMPLATE, **values)
    card.text = "\n" + re.sub(r"\n{3,}", "\n\n", card.text).strip() + "\n"  # what the template's conditions left empty
    check_model_card(str(card))
    return str(card)


def _eval_result(level: str, row: dict, seed: int) -> EvalResult:
    return EvalResult(
        task_type="video-to-video",
        task_name="Instruction-based video editing",
        dataset_type="rvedit-synthetic-edits",
        dataset_name=f"Synthetic benchmark of rvedit_diffusers: {level}",
        dataset_config=level,
        dataset_split="test",
        dataset_args={"seed": seed, "num_samples": row["n"]},
        metric_type="union_success",
        metric_name="Share of clips in which every operation succeeds and nothing else is spoiled",
        metric_value=round(row["union_success"], 4),
    )


def _score_row(level: str, row: dict) -> list:
    success = "{union_success:.2f} ({union_success_low:.2f} to {union_success_high:.2f})".format(**row)
    twins = row.get("twin_consistency")
    return [
        level.replace("_", " "),
        LEVELS.get(level, "this operation alone"),
        success,
        f"{row['op_success']:.2f}",
        "" if twins is None else f"{twins:.2f}",
        f"{row['outside_psnr']:.1f}",
        f"{row['vae_psnr']:.1f}",
        row["n"],
    ]


def _line(text: str) -> str:
    return " ".join(str(text).split()).replace("<", "&lt;")


def markdown_table(head: list[str], rows: list[list]) -> str:
    """
    A table in Markdown; what would end a cell, a row or the page's text is escaped.

    Args:
        head (`list[str]`): Titles of the columns.
        rows (`list[list]`): Of values, as many as columns.
    """
    cells = [[_line(value).replace("\\", "\\\\").replace("|", "\\|") for value in row] for row in [head, *rows]]
    lines = ["| " + " | ".join(row) + " |" if any(row) else "|" + " |" * len(row) for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def write_model_card(
    folder: str | Path,
    kind: str,
    base: str,
    model_id: str | None,
    facts: dict[str, str],
    losses: dict[str, float],
    sample: Path | None = None,
    base_folder: Path | None = None,
    subfolder: str | None = None,
    scores: dict[str, dict] | None = None,
) -> None:
    """
    Write `README.md` of what was trained, and `sample.png` beside it.

    Args:
        folder (`str` or `Path`): Of the weights.
        kind (`str`): `"lora"` or `"pipeline"`.
        base (`str`): What was trained: a Hub id, which the metadata name too, or a folder.
        model_id (`str`, *optional*): The name on the Hub to be.
        facts (`dict[str, str]`): Rows of the table of the training.
        losses (`dict[str, float]`): Rows of the table of the last losses.
        sample (`Path`, *optional*): A strip of the source, the edit and the true edit.
        base_folder (`Path`, *optional*): Where the base's files are; `base` if that is a folder. Its `README.md` tells
            the licence, and its `model_index.json` the models that it was made from.
        subfolder (`str`, *optional*): Where a pipeline and a LoRA were trained together: the folder of the LoRA in the
            repository, whose root is the pipeline.
        scores (`dict[str, dict]`, *optional*): See [`fill_model_card`].

    Raises:
        `ValueError`: if `kind` is neither, a file of the base cannot be read, or the Hub would not take the card.
    """
    if kind not in ("lora", "pipeline"):
        raise ValueError(f"`kind` has to be lora or pipeline, got {kind!r}")
    folder = Path(folder)
    is_hub_id = not Path(base).exists()
    shown = base if is_hub_id else Path(base).resolve().name
    usage = _usage(kind, shown, model_id, folder.name, subfolder)
    if kind == "lora" and subfolder is None and Path(base).resolve() == EMBEDDED:
        usage["pipeline_argument"] = "TINY_CHECKPOINT"
    base_folder = base_folder if is_hub_id else Path(base)
    record, inherited = _read_record(folder), None  # a pipeline's own says more than its base's: this training's stage
    if base_folder is not None:
        record = record or _read_record(base_folder)
        inherited = _licence_in(base_folder / "README.md", base if is_hub_id else None)
    sources = _sources(record)
    # a base on the Hub is somebody's own: its parts say no more than what it cannot be
    licence = inherited or _licence_of_all([*sources, shown] if is_hub_id else sources or [shown])
    base_licence = inherited or (licence if sources else _licence_of(shown))
    base_row = ["base", _show_source(shown), "", _show_licence(base_licence)]
    text = fill_model_card(
        kind,
        model_id or folder.resolve().parent.name,
        licence,
        base_models=[base] if is_hub_id else _hub_ids(sources),
        relation="adapter" if kind == "lora" else "finetune",
        scores=scores,
        base="`" + shown.replace("`", "'") + "`",
        origins=markdown_table(ORIGIN_HEAD, [base_row, *_origin_rows(record)]),
        untrained=kind == "pipeline" and _is_untrained(record),
        stages=", ".join(map(_line, record.get("stages", []))),
        counts=record.get("parameters"),
        sample=sample is not None,
        training=markdown_table(
            ["", ""],
            [[name, value] for name, value in facts.items()]
            + [[f"{name.replace('_', ' ')}, last", f"{value:.4f}"] for name, value in losses.items()],
        ),
        **usage,
    )
    text += _mark(text)
    if sample is not None:
        partial = folder / "sample.png.partial"
        shutil.copyfile(sample, partial)
        partial.replace(folder / "sample.png")
    _write_card(folder, text)


def ensure_model_card(folder: Path, model_id: str | None = None) -> None:
    """
    Give the folder of a pipeline or of LoRA weights a model card, unless it has one.

    A `README.md` with metadata of ours (`library_name: diffusers`, tag `rvedit`) stays as it is; if nobody has changed
    it, it gets the model's name on the Hub, and shows how to use the code that goes along. Any other keeps what
    it says: its text stands below the card's, and its metadata go before the card's, but for library, task and tags,
    by which the Hub finds the model.

    Args:
        folder (`Path`): With `model_index.json` or `pytorch_lora_weights.safetensors`. Of a pipeline that was
            converted, the former tells the models that it was made from.
        model_id (`str`, *optional*): The name on the Hub to be.

    Raises:
        `ValueError`: if the folder is neither, or the Hub would not take the `README.md` that there is, or the one
            that it would become.
    """
    folder = Path(folder)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    try:
        theirs, their_text = _split_card(text)
        if is_of_ours(text):
            check_model_card(text)
            if model_id is not None and is_as_written(text):
                _write_card(folder, _named(text, folder, model_id))
            return
        card = _card_of_folder(folder, model_id)
        card = _add_to_card(card, theirs, their_text) if text.strip() else card + _mark(card)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _write_card(folder, card)


def _card_of_folder(folder: Path, model_id: str | None) -> str:
    if (folder / "model_index.json").is_file():
        kind = "converted"
    elif (folder / "pytorch_lora_weights.safetensors").is_file():
        kind = "lora"
    else:
        raise ValueError("a model card is for a folder with model_index.json or pytorch_lora_weights.safetensors")
    name = folder.resolve().name.removesuffix(".partial")  # an export is written under such a name
    record = _read_record(folder)
    sources, rows = _sources(record), _origin_rows(record)
    usage = _usage(kind, "the pipeline that they were trained on", model_id, name, None)
    return fill_model_card(
        kind,
        model_id or name,
        _licence_of_all(sources),
        base_models=_hub_ids(sources),
        # Of the four relations that the Hub knows, two models put together without training are a merge.
        relation="finetune" if record.get("stages") else "merge",
        origins=markdown_table(ORIGIN_HEAD, rows) if rows else None,
        untrained=_is_untrained(record),
        stages=", ".join(map(_line, record.get("stages", []))),
        counts=record.get("parameters"),
        code_usage=CODE_USAGE.format(usage["pipeline_argument"]) if (folder / "pipeline.py").is_file() else None,
        **usage,
    )


def _add_to_card(card: str, theirs: dict, their_text: str) -> str:
    data, text = _split_card(card)
    if "license" in theirs:
        data = {name: value for name, value in data.items() if name not in LICENCE_KEYS}
    tags = [*data["tags"], *_as_list(theirs.get("tags"))]
    data |= {name: value for name, value in theirs.items() if name not in ("library_name", "pipeline_tag")}
    if their_text.strip():
        text += f"\n## Notes\n\n{their_text.strip()}\n"
    card = f"---\n{ModelCardData(**data | {'tags': tags}).to_yaml()}\n---\n{text}"
    check_model_card(card)
    return card


def _usage(kind: str, base: str, model_id: str | None, name: str, subfolder: str | None) -> dict[str, str]:
    # JSON's strings are Python's, too.
    own = json.dumps(model_id or name, ensure_ascii=False)
    if subfolder is None:
        if kind == "lora":
            return {"pipeline_argument": json.dumps(base, ensure_ascii=False), "lora_arguments": own}
        return {"pipeline_argument": own}
    place = json.dumps(subfolder, ensure_ascii=False)
    return {
        "pipeline_argument": json.dumps(model_id or "pipeline", ensure_ascii=False),
        "lora_arguments": f"{own}, subfolder={place}" if model_id else place,
    }


def _read_record(folder: Path) -> dict:
    path = folder / "model_index.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8")).get("conversion")
        if record is None:
            return {}
        counts = {name: int(record["parameters"][name]) for name in ("mapped", "new", "dropped")}
        origins = {name: {"revision": None} | record[name] | {"source": str(record[name]["source"])} for name in PARTS}
        return origins | {"parameters": counts, "stages": list(map(str, record.get("stages", [])))}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no record of a conversion: {type(error).__name__} {error}") from error


def _sources(record: dict) -> list[str]:
    return [record[name]["source"] for name in PARTS] if record else []


def _hub_ids(sources: list[str]) -> list[str]:
    return [source for source in sources if "/" in source]  # of a folder, the record has the name alone


def _is_untrained(record: dict) -> bool:
    return bool(record) and "edit" not in record["stages"]


def _origin_rows(record: dict) -> list[list]:
    rows = []
    for name in PARTS if record else ():
        source, revision = record[name]["source"], record[name]["revision"]
        rows.append([PARTS[name], _show_source(source), revision or "", _show_licence(_licence_of(source))])
    return rows


def _show_source(source: str) -> str:
    return f"[{source}](https://huggingface.co/{source})" if "/" in source else source


def _show_licence(licence: dict[str, str] | None) -> str:
    if licence is None:
        return "not known here"
    name, link = licence.get("license_name", licence["license"]), licence.get("license_link")
    return f"[{name}]({link})" if link else name


def _licence_of(source: str) -> dict[str, str] | None:
    if "qwen2.5-vl-3b" in source.lower():  # what others derived from it, too
        return QWEN_RESEARCH
    return APACHE if source in APACHE_BASES or any(source == base.split("/")[1] for base in APACHE_BASES) else None


def _licence_of_all(sources: list[str]) -> dict[str, str]:
    licences = [_licence_of(source) for source in sources]
    if QWEN_RESEARCH in licences:
        return QWEN_RESEARCH
    if sources and None not in licences:
        return APACHE
    page = next((source for source in _hub_ids(sources) if _licence_of(source) is None), None)
    if page is None:
        return {"license": "unknown"}
    return {"license": "other", "license_name": "see-base-model", "license_link": f"https://huggingface.co/{page}"}


def _licence_in(path: Path, base: str | None) -> dict[str, str] | None:
    # What a base's own card says, unless that is nothing the Hub knows: a training must not end with the base's typo.
    try:
        data, _ = _split_card(path.read_text(encoding="utf-8-sig") if path.is_file() else "")
        licence = {name: data[name] for name in LICENCE_KEYS if name in data}
        _check_licence({"license": None} | licence)
    except ValueError:
        return None
    if base is not None and licence.get("license_link") in LICENCE_FILES:  # a file in the base's repository
        licence["license_link"] = f"https://huggingface.co/{base}/blob/main/{licence['license_link']}"
    return licence


def _named(text: str, folder: Path, model_id: str) -> str:
    # A card that was written before the model had its name on the Hub, or with another one.
    text, own = text.rpartition("\n<!-- ")[0] + "\n", json.dumps(model_id, ensure_ascii=False)
    text = re.sub("^# .*$", lambda _: f"# {_line(model_id)}", text, count=1, flags=re.MULTILINE)
    call = "from_pretrained" if (folder / "model_index.json").is_file() else "load_lora_weights"
    text = re.sub(rf'\b{call}\("(\\.|[^"\\])*"', lambda _: f"{call}({own}", text)
    if (folder / "pipeline.py").is_file() and "trust_remote_code" not in text:
        end = text.index("```\n", text.index("```python\n")) + len("```\n")
        text = text[:end] + "\n" + CODE_USAGE.format(own) + text[end:]
    return text + _mark(text)


def is_of_ours(text: str) -> bool:
    """
    Whether the metadata of a model card are those of our models: `library_name: diffusers` and the tag `rvedit`.

    Args:
        text (`str`): The whole of `README.md`.

    Raises:
        `ValueError`: if the metadata cannot be read.
    """
    data, _ = _split_card(text)
    return data.get("library_name") == "diffusers" and "rvedit" in _as_list(data.get("tags"))


def _as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def is_as_written(text: str) -> bool:
    """
    Whether a model card is one that [`write_model_card`] or [`ensure_model_card`] has written, without a change since.

    Args:
        text (`str`): The whole of `README.md`.
    """
    card, _, mark = text.rpartition("\n<!-- ")
    return mark == _mark(card + "\n").removeprefix("<!-- ")


def _mark(card: str) -> str:
    return f"<!-- written by rvedit_diffusers {hashlib.sha256(card.encode()).hexdigest()[:16]} -->\n"


def _write_card(folder: Path, text: str) -> None:
    partial = folder / "README.md.partial"
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(folder / "README.md")
