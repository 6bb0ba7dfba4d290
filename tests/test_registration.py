import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from components import build_pipeline, make_clip
from diffusers.hooks import FirstBlockCacheConfig

import rvedit_diffusers


ROOT = Path(__file__).parents[1]
PROMPT = "make the red ball blue"


def run_python(code, *arguments):
    """A clean interpreter that has imported nothing."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    build_pipeline().save_pretrained(folder)
    return folder


def test_clean_interpreter_loads_and_edits(folder, tmp_path):
    np.save(tmp_path / "clip.npy", make_clip())
    code = """
import sys
import numpy as np
import torch
import rvedit_diffusers
from diffusers import DiffusionPipeline

folder, work = sys.argv[1:]
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(folder)
assert type(pipe) is rvedit_diffusers.RVEDiTPipeline, type(pipe)
assert type(pipe.transformer) is rvedit_diffusers.RVEDiTTransformer3DModel
assert type(pipe.distiller) is rvedit_diffusers.RVEDiTTokenDistiller
assert type(pipe.processor) is rvedit_diffusers.RVEDiTProcessor
clip = np.load(work + "/clip.npy")
frames = pipe(clip, "make the red ball blue", generator=torch.Generator().manual_seed(0)).frames
np.save(work + "/frames.npy", frames)
"""
    result = run_python(code, folder, tmp_path)
    assert result.returncode == 0, result.stderr
    pipe = rvedit_diffusers.RVEDiTPipeline.from_pretrained(folder)
    expected = pipe(make_clip(), PROMPT, generator=torch.Generator().manual_seed(0)).frames
    np.testing.assert_allclose(np.load(tmp_path / "frames.npy"), expected, atol=1e-6)


def test_clean_interpreter_without_the_import_does_not_load(folder):
    code = "import sys; from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained(sys.argv[1])"
    result = run_python(code, folder)
    assert result.returncode != 0 and "RVEDiTPipeline" in result.stderr


def test_model_index_names_the_package(folder):
    index = json.loads((folder / "model_index.json").read_text())
    libraries = {name: value[0] for name, value in index.items() if isinstance(value, list)}
    assert libraries == {
        "distiller": "rvedit_diffusers",
        "mllm": "transformers",
        "processor": "rvedit_diffusers",
        "scheduler": "diffusers",
        "text_encoder": "transformers",
        "tokenizer": "transformers",
        "transformer": "rvedit_diffusers",
        "vae": "diffusers",
    }


def test_repository_with_its_own_code_loads_the_packages_classes(folder, tmp_path):
    repository = shutil.copytree(folder, tmp_path / "repository")
    for component in ("transformer", "distiller", "processor"):
        (repository / component / "rvedit_diffusers.py").write_text("raise RuntimeError('the copy was run')\n")
    pipe = diffusers.DiffusionPipeline.from_pretrained(repository)
    assert type(pipe.transformer) is rvedit_diffusers.RVEDiTTransformer3DModel


def test_components_can_be_passed_to_from_pretrained(folder):
    transformer = rvedit_diffusers.RVEDiTTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    pipe = rvedit_diffusers.RVEDiTPipeline.from_pretrained(folder, transformer=transformer)
    assert pipe.transformer is transformer


def test_registering_again_changes_nothing():
    from diffusers.pipelines import pipeline_loading_utils

    tables = (dict(pipeline_loading_utils.LOADABLE_CLASSES), dict(pipeline_loading_utils.ALL_IMPORTABLE_CLASSES))
    rvedit_diffusers.registration.register()
    assert tables == (pipeline_loading_utils.LOADABLE_CLASSES, pipeline_loading_utils.ALL_IMPORTABLE_CLASSES)
    assert diffusers.RVEDiTPipeline is rvedit_diffusers.RVEDiTPipeline


def test_blocks_are_registered_for_caches():
    transformer = build_pipeline().transformer
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert transformer.is_cache_enabled


def test_public_names_exist():
    for name in rvedit_diffusers.__all__:
        assert getattr(rvedit_diffusers, name) is not None
    assert Path(rvedit_diffusers.TINY_CHECKPOINT) == Path(rvedit_diffusers.__file__).parent / "checkpoints" / "tiny"
