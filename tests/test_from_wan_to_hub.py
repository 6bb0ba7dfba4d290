"""The whole way: base models, conversion, an edit, a training, the Hub, and back from it in three ways."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from bases import WAN_FAMILIES, save_qwen, save_wan
from components import make_clip
from hub_server import USER, serve
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_hub import WAYS, edit_in, hub_at

from rvedit_diffusers import RVEDiTPipeline, write_video
from rvedit_diffusers.tiny import FAMILIES


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import init_from_wan  # noqa: E402
import push_to_hub  # noqa: E402
import train  # noqa: E402


PROMPT = "make the red ball blue"
CASES = [(wan, mllm) for wan in WAN_FAMILIES for mllm in FAMILIES]
NAMES = [f"{USER}/{wan}-{mllm}" for wan, mllm in CASES]
TRAINING = {
    "buckets": "5x64x64",
    "num_pairs": 4,
    "train_batch_size": 2,
    "max_train_steps": 5,
    "learning_rate": 1e-2,
    "lr_warmup_steps": 1,
    "lora_rank": 2,
    "logging_steps": 1,
    "num_validation_pairs": 0,
    "validation_steps": 0,
    "num_workers": 0,
    "report_to": "none",
}


def edit(pipe, clip):
    return pipe(clip, PROMPT, generator=torch.Generator().manual_seed(0)).frames


@pytest.fixture(scope="module")
def way_there(tmp_path_factory):
    """A Hub with the base models, from which four pipelines were converted, trained, and uploaded."""
    work = tmp_path_factory.mktemp("way")
    write_video(work / "clip.mp4", make_clip(5, 64, 64), 16)
    results = []
    with serve() as server:
        for family, save in [*((name, save_wan) for name in WAN_FAMILIES), *((name, save_qwen) for name in FAMILIES)]:
            save(work / family, family)
            files = [path for path in (work / family).rglob("*") if path.is_file()]
            contents = {path.relative_to(work / family).as_posix(): path.read_bytes() for path in files}
            server.add(f"bases/{family}", contents | {"big.bin": b"not to be downloaded"})
        with hub_at(server, work / "cache"):
            for name, (wan, mllm) in zip(NAMES, CASES):
                folder = work / name
                arguments = {"wan": f"bases/{wan}", "mllm": f"bases/{mllm}", "output": folder, "num_edit_tokens": 4}
                init_from_wan.main([f"--{key}={value}" for key, value in arguments.items()])
                index = json.loads((folder / "model_index.json").read_text())
                index["default_num_inference_steps"] = 2  # the 50 of models of this family take long
                (folder / "model_index.json").write_text(json.dumps(index))
                output = work / "runs" / name
                options = TRAINING | {"model": folder, "output": output, "cache_dir": work / "encoded"}
                train.main([f"--{key}={value}" for key, value in options.items()])
                AcceleratorState._reset_state(reset_partial_state=True)
                pipe = RVEDiTPipeline.from_pretrained(folder)
                result = {"loaded": edit(pipe, work / "clip.mp4")}
                pipe.load_lora_weights(output / "lora")
                result["lora"] = edit(pipe, work / "clip.mp4")
                layers = load_file(output / "lora" / "pytorch_lora_weights.safetensors")
                result["source"] = layers["transformer.source_embedding.lora_B.weight"]
                log = (output / "log.jsonl").read_text().splitlines()
                result["steps"] = [json.loads(line)["step"] for line in log]
                push_to_hub.main([str(folder), name, "--remote_code"])
                results.append(result)
        yield server, work, results


def test_only_what_is_needed_of_the_bases_is_downloaded(way_there):
    _, work, _ = way_there
    downloaded = {path.name for path in (work / "cache").rglob("*") if path.is_symlink()}
    assert "model_index.json" in downloaded and "big.bin" not in downloaded


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_the_pipeline_edits_and_is_trained(way_there, number):
    server, work, results = way_there
    result = results[number]
    assert result["loaded"].shape == (1, 5, 64, 64, 3) and np.isfinite(result["loaded"]).all()
    assert result["steps"] == [1, 2, 3, 4, 5]
    assert np.abs(result["lora"] - result["loaded"]).max() > 1e-3
    assert result["source"].abs().max() > 0, "the source clip's latents, which the conversion leaves out, are read"


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_the_hub_shows_where_the_pipeline_comes_from(way_there, number):
    server, _, _ = way_there
    files = server.files(NAMES[number])
    data = ModelCard(files["README.md"].decode()).data
    wan, mllm = CASES[number]
    assert data.base_model == [f"bases/{wan}", f"bases/{mllm}"] and data.pipeline_tag == "video-to-video"
    record = json.loads(files["model_index.json"])["conversion"]
    for part, family in (("wan", wan), ("mllm", mllm)):
        assert record[part] == {"source": f"bases/{family}", "revision": server.sha(f"bases/{family}")}


@pytest.mark.parametrize("number", [0, 3], ids=[NAMES[0], NAMES[3]])  # each base once
def test_the_way_to_an_editor_is_that_of_the_readme(way_there, tmp_path, number):
    _, work, _ = way_there
    common = TRAINING | {"cache_dir": tmp_path / "encoded", "max_train_steps": 2, "num_validation_pairs": 1}
    connect = {
        "stage": "connect",
        "validation_steps": 2,
        "model": work / NAMES[number],
        "output": tmp_path / "connect",
    }
    del (options := common | connect)["lora_rank"]
    train.main([f"--{key}={value}" for key, value in options.items()])
    AcceleratorState._reset_state(reset_partial_state=True)
    log = [json.loads(line) for line in (tmp_path / "connect" / "log.jsonl").read_text().splitlines()]
    assert log[0]["validation_flow_base"] > 0 and log[-1]["validation_flow"] > 0
    options = common | {"model": tmp_path / "connect" / "pipeline", "output": tmp_path / "edit"}
    train.main([f"--{key}={value}" for key, value in (options | {"train_distiller": "connectors"}).items()])
    AcceleratorState._reset_state(reset_partial_state=True)
    before, after = (RVEDiTPipeline.from_pretrained(tmp_path / name / "pipeline") for name in ("connect", "edit"))
    connectors = [pipe.distiller.visual_connector.state_dict() for pipe in (before, after)]
    assert any((connectors[1][name] != value).any() for name, value in connectors[0].items())
    after.load_lora_weights(tmp_path / "edit" / "lora")
    assert np.isfinite(edit(after, work / "clip.mp4")).all()


@pytest.mark.parametrize(
    "way", [way if way == "plugin" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_all_four_come_back_and_edit_as_before(way_there, tmp_path, way):
    server, work, results = way_there
    loras = [str(work / "runs" / name / "lora") for name in NAMES]
    found = edit_in(way, NAMES, server.endpoint, tmp_path / "work", work / "clip.mp4", loras, prompt=PROMPT)
    for result, expected in zip(found, results, strict=True):
        np.testing.assert_allclose(result["loaded"], expected["loaded"], atol=1e-5)
        np.testing.assert_allclose(result["again"], expected["loaded"], atol=1e-5)
        np.testing.assert_allclose(result["lora"], expected["lora"], atol=1e-5)
