"""Three ways to load a repository, and the way there. The Hub is a server on loopback, the pipelines are real ones."""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from components import build_pipeline, make_clip
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from hub_server import TOKEN, USER, serve
from huggingface_hub import ModelCard
from peft import LoraConfig

from rvedit_diffusers import RVEDiTPipeline, RVEDiTTokenDistiller, hub, write_video
from rvedit_diffusers.model_card import write_model_card
from rvedit_diffusers.training.checkpoint import export


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import push_to_hub  # noqa: E402
import train  # noqa: E402


NAME = f"{USER}/edits"
PROMPT = "make the red ball blue"
WAYS = ("class", "plugin", "remote code")
CACHE = {"threshold": 10.0}  # so high that the second step is taken from the cache

EDIT = """
import importlib.util, json, sys
from pathlib import Path

way, folder, prompt, repositories, packages, clip, loras, cache = (json.loads(value) for value in sys.argv[1:])
sys.path += packages
if way == "remote code":
    assert importlib.util.find_spec("rvedit_diffusers") is None
elif way == "plugin":
    import rvedit_diffusers

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import FirstBlockCacheConfig

torch.set_num_threads(1)

def load(name):
    if way == "class":
        from rvedit_diffusers import RVEDiTPipeline
        return RVEDiTPipeline.from_pretrained(name)
    if way == "plugin":
        return DiffusionPipeline.from_pretrained(name)
    return DiffusionPipeline.from_pretrained(name, trust_remote_code=True)

def edit(pipe, name):
    pipe.set_progress_bar_config(disable=True)
    np.save(Path(folder, name), pipe(clip, prompt, generator=torch.Generator().manual_seed(0)).frames)

if way == "remote code":
    try:
        DiffusionPipeline.from_pretrained(repositories[0])
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("code was run without the flag")

for number, repository in enumerate(repositories):
    pipe = load(repository)
    if way == "plugin":  # with the flag, too, it is the installed class
        assert type(DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)) is type(pipe)
    home = "diffusers_modules" if way == "remote code" else "rvedit_diffusers"
    for part in (pipe, pipe.transformer, pipe.distiller, pipe.processor):
        assert type(part).__module__.split(".")[0] == home, type(part)
    edit(pipe, f"{number} loaded.npy")
    pipe.save_pretrained(Path(folder, f"{number}"))
    again = load(str(Path(folder, f"{number}")))
    assert type(again).__module__.split(".")[0] == home, type(again)
    edit(again, f"{number} again.npy")
    if loras is not None:
        pipe.load_lora_weights(loras[number])
        edit(pipe, f"{number} lora.npy")
        pipe.unload_lora_weights()
    if cache is not None:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(**cache))
        edit(pipe, f"{number} cache.npy")
"""


def edit_in(way, repositories, endpoint, folder, clip, loras=None, cache=None, prompt=PROMPT):
    """
    In a process of its own: load each repository by one way, edit a clip, save the pipeline, load and edit again.

    Args:
        way: Of `WAYS`; the last one runs where this package cannot be imported.
        repositories: Their names.
        endpoint: The Hub's address.
        folder: Where results go; the saved pipelines are in folders of it, "0", "1", ...
        clip: A file.
        loras: A folder for each; given, there is an edit with these weights, too.
        cache: Arguments of a first-block cache; given, there is an edit with that, too.

    Returns:
        For each repository the edited frames: `loaded`, `again`, and `lora` and `cache` if asked for.
    """
    folder.mkdir(parents=True)
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Without `site`, the hook of an editable install is not there.
    options = ["-I", "-S"] if way == "remote code" else []
    values = (way, str(folder), prompt, repositories, packages if options else [], str(clip), loras, cache)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, *options, "-c", EDIT, *map(json.dumps, values)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for warning in ("Expected types", "might require the following packages"):
        assert warning not in result.stderr
    names = ["loaded", "again"] + ["lora"] * (loras is not None) + ["cache"] * (cache is not None)
    return [{name: np.load(folder / f"{number} {name}.npy") for name in names} for number in range(len(repositories))]


@contextlib.contextmanager
def hub_at(server, home, token=TOKEN):
    """This process takes the server for the Hub, and is logged in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", token)
        yield


@pytest.fixture
def server(tmp_path):
    with serve() as server, hub_at(server, tmp_path / "cache"):
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A pipeline's folder of the test's own."""
    return shutil.copytree(saved, tmp_path / "pipeline")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    transformer = build_pipeline().transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
    hub_pipeline = build_pipeline()
    hub_pipeline.save_lora_weights(folder, transformer)
    return folder


def read_tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(capfd, *arguments, status=0):
    """What the script prints, or its one line of error."""
    capfd.readouterr()
    if status == 0:
        push_to_hub.main([str(argument) for argument in arguments])
        return capfd.readouterr().out
    with pytest.raises(SystemExit) as stop:
        push_to_hub.main([str(argument) for argument in arguments])
    output = capfd.readouterr()
    lines = [line for line in output.err.splitlines() if ": error: " in line]
    assert stop.value.code == status and len(lines) == 1 and "Traceback" not in output.err, output.err
    return lines[0]


# Three ways to load


@pytest.fixture(scope="module")
def published(saved, lora, tmp_path_factory):
    """A Hub with a repository without code and one with it, and what the original pipeline answers."""
    work = tmp_path_factory.mktemp("published")
    write_video(work / "clip.mp4", make_clip(), 16)
    pipe = build_pipeline()

    def edit():
        return pipe(work / "clip.mp4", PROMPT, generator=torch.Generator().manual_seed(0)).frames

    expected = {"loaded": edit()}
    expected["again"] = expected["loaded"]
    pipe.load_lora_weights(lora)
    expected["lora"] = edit()
    pipe.unload_lora_weights()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(**CACHE))
    expected["cache"] = edit()
    with serve() as server:
        with hub_at(server, work / "cache"):
            push_to_hub.main([str(saved), f"{USER}/plain"])
            push_to_hub.main([str(saved), f"{USER}/with.code", "--remote_code"])
        yield server, work / "clip.mp4", expected


@pytest.mark.parametrize("way", WAYS)
def test_a_repository_loads_edits_and_saves(published, lora, tmp_path, way):
    server, clip, expected = published
    assert not any(np.allclose(expected[name], expected["loaded"]) for name in ("lora", "cache"))
    repositories = [f"{USER}/with.code"] + [f"{USER}/plain"] * (way != "remote code")
    results = edit_in(
        way, repositories, server.endpoint, tmp_path / "work", clip, [str(lora)] * len(repositories), CACHE
    )
    for result in results:
        for name, frames in expected.items():
            np.testing.assert_allclose(result[name], frames, atol=1e-6, err_msg=name)


# The bundle


def test_the_bundle_imports_nothing_that_is_not_installed(tmp_path):
    (tmp_path / "pipeline.py").write_text(hub.bundle())
    compile(hub.bundle(), "pipeline.py", "exec")
    assert get_relative_imports(tmp_path / "pipeline.py") == []
    assert "rvedit_diffusers" not in re.findall(r"^\s*(?:from|import) (\w+)", hub.bundle(), re.MULTILINE)


MODULES = {
    "pipeline_rvedit": "from .other import double\n\n\nclass RVEDiTPipeline:\n    value = double(2)\n",
    "registration": "def register_blocks():\n    pass\n",
    "other": "# why it is two\nFACTOR = 2\nUNUSED = 3\n\n\ndef double(value):\n    return FACTOR * value\n",
}


@pytest.fixture
def package(tmp_path):
    def package(**modules):
        for name, text in (MODULES | modules).items():
            (tmp_path / f"{name}.py").write_text(text)
        return tmp_path

    return package


def test_what_is_used_is_inlined_and_nothing_else(package):
    text = hub.bundle(package())
    names = {}
    exec(text, names)
    assert names["RVEDiTPipeline"].value == 4
    assert "# why it is two\nFACTOR" in text and "UNUSED" not in text


@pytest.mark.parametrize(
    "modules",
    [
        {"pipeline_rvedit": "from .other import double\nFACTOR = 3\nclass RVEDiTPipeline:\n    at = double(FACTOR)\n"},
        {"pipeline_rvedit": "import math as FACTOR\n" + MODULES["pipeline_rvedit"] + "    other = FACTOR\n"},
        {"other": "def max(*values):\n    return 0\n\n\ndef double(value):\n    return max(value)\n"},
    ],
)
def test_a_name_of_two_meanings_is_refused(package, modules):
    with pytest.raises(ValueError, match="is another thing in .*one file cannot have both"):
        hub.bundle(package(**modules))


@pytest.mark.parametrize(
    "text",
    [
        "def double(value):\n    from .more import factor\n\n    return factor * value\n",
        "from .more import factor as double\n",
        "if True:\n    double = len\n",
    ],
)
def test_what_cannot_be_moved_is_refused(package, text):
    with pytest.raises(ValueError, match="other.py, line [12]: .* cannot be"):
        hub.bundle(package(other=text, more="def factor(value):\n    return value\n"))


# What is checked before an upload


def break_link(folder):
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to("/nowhere/config.json")
    return folder / "vae" / "config.json"


def remove_component(folder):
    shutil.rmtree(folder / "mllm")
    return folder / "mllm"


def remove_weights(folder):
    (folder / "distiller" / "diffusion_pytorch_model.safetensors").unlink()
    return folder / "distiller"


def remove_shard(folder):
    build_pipeline().transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    shard = sorted((folder / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    return shard


def truncate(folder):
    path = folder / "mllm" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def add_pickle(folder):
    torch.save({}, folder / "transformer" / "extra.pt")
    return folder / "transformer" / "extra.pt"


def rename_class(folder):
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("RVEDiTPipeline", "WanPipeline"))
    return path


def remove_index(folder):
    (folder / "model_index.json").unlink()
    return folder


def remove_index_of_shards(folder):
    build_pipeline().transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    return sorted((folder / "transformer").glob("*-of-*.safetensors"))[0]


def spoil_card(folder):
    (folder / "README.md").write_text("---\nlicense: Apache-2.0\n---\n")
    return folder / "README.md"


def link_to_itself(folder):
    (folder / "vae" / "loop").symlink_to(folder)
    return folder / "vae" / "loop"


@pytest.mark.parametrize(
    "spoil",
    [
        break_link,
        remove_component,
        remove_weights,
        remove_shard,
        remove_index_of_shards,
        spoil_card,
        truncate,
        add_pickle,
        rename_class,
        remove_index,
        link_to_itself,
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_name(server, folder, capfd, spoil):
    assert str(spoil(folder)) in main(capfd, folder, NAME, status=2)
    assert server.repositories == {}


@pytest.mark.parametrize("name", ["edits", "me/edits/more", "me/ed its", "me/-edits"])
def test_a_name_that_is_none_is_refused(server, saved, capfd, name):
    assert f"{name}" in main(capfd, saved, name, status=2)
    assert server.repositories == {}


def test_lora_weights_have_no_code(server, lora, capfd):
    assert "--remote_code" in main(capfd, lora, NAME, "--remote_code", status=2)


# The upload


@pytest.mark.parametrize("options", [(), ("--remote_code",)])
def test_export_only_writes_what_is_uploaded_and_needs_no_network(server, folder, tmp_path, capfd, options):
    (folder / "vae").rename(tmp_path / "vae of the base")
    (folder / "vae").symlink_to(tmp_path / "vae of the base")
    weights = (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "weights")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").symlink_to(weights)
    before = read_tree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        main(capfd, folder, NAME, *options, "--export_only", tmp_path / "out")
    main(capfd, folder, NAME, *options)
    uploaded = server.files(NAME)
    assert read_tree(tmp_path / "out") | {".gitattributes": b""} == uploaded
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert {"vae/diffusion_pytorch_model.safetensors", "vae/config.json", "README.md"} <= uploaded.keys()
    assert uploaded["transformer/diffusion_pytorch_model.safetensors"] == weights.read_bytes()
    assert ("pipeline.py" in uploaded) == bool(options)
    assert read_tree(folder) == before


def test_export_only_overwrites_nothing(folder, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert str(tmp_path / "out") in main(capfd, folder, NAME, "--export_only", tmp_path / "out", status=2)
    assert "outside" in main(capfd, folder, NAME, "--export_only", folder / "out", status=2)
    assert read_tree(tmp_path / "out") == {"mine.txt": b"mine"} and not (folder / "out").exists()


def test_lora_weights_are_uploaded(server, lora, capfd):
    main(capfd, lora, NAME)
    files = server.files(NAME)
    assert_is_our_card(files.pop("README.md"))
    assert files == read_tree(lora) | {".gitattributes": b""}


def test_a_repository_of_ours_is_brought_up_to_date(server, folder, capfd):
    assert "exists" not in main(capfd, folder, NAME)
    server.commit(NAME, {"README.md": b"written by hand", "docs/picture.png": b"a picture"})
    build_pipeline().transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert f"{NAME} exists" in main(capfd, folder, NAME)
    files = server.files(NAME)
    assert_is_our_card(card := files.pop("README.md"))
    assert b"written by hand" in card
    kept = {".gitattributes": b"", "docs/picture.png": b"a picture"}
    assert files == read_tree(folder) | kept  # without the weights that the shards replace
    assert server.sent.total() == len(server.sent)


def test_weights_of_one_variant_replace_each_other_alone(server, folder, capfd):
    transformer, single = build_pipeline().transformer, "transformer/diffusion_pytorch_model.safetensors"
    (folder / single).unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    main(capfd, folder, NAME)
    shards = {name for name in server.files(NAME) if name.startswith("transformer/diffusion_pytorch_model")}
    assert len(shards) > 2 and f"{single}.index.json" in shards
    half = "transformer/diffusion_pytorch_model.fp16.safetensors"
    server.commit(NAME, {half: b"weights in half precision"})
    for name in shards:
        (folder / name).unlink()
    transformer.save_pretrained(folder / "transformer")
    main(capfd, folder, NAME)
    assert shards.isdisjoint(server.files(NAME)) and {single, half} <= server.files(NAME).keys()


@pytest.mark.parametrize(
    "files",
    [
        {"model_index.json": b'{"_class_name": "WanPipeline"}'},
        {"config.json": b"{}", "model.safetensors": b""},
        {"pytorch_lora_weights.safetensors": b""},
    ],
)
def test_a_repository_of_something_else_is_left_alone(server, saved, capfd, files):
    server.add(NAME, files)
    assert f"{NAME} exists and holds something else" in main(capfd, saved, NAME, status=2)
    assert len(server.repositories[NAME]["commits"]) == 2 and not server.sent


def test_lora_weights_do_not_go_into_a_pipelines_repository(server, saved, lora, capfd):
    main(capfd, saved, NAME)
    assert f"{NAME} exists and holds something else" in main(capfd, lora, NAME, status=2)


def test_private_is_private(server, saved, capfd):
    main(capfd, saved, NAME, "--private")
    assert server.repositories[NAME]["private"]
    main(capfd, saved, NAME, "--private")


def test_a_public_repository_does_not_get_what_shall_be_private(server, saved, capfd):
    server.add(NAME, {})
    assert f"{NAME} exists and is public" in main(capfd, saved, NAME, "--private", status=2)
    assert not server.sent


@pytest.mark.parametrize(
    "token, name, reason",
    [("hf_expired", NAME, "Invalid credentials"), (TOKEN, "others/edits", "You have no rights in others")],
)
def test_a_refused_token_is_told_with_the_hubs_reason(server, saved, capfd, monkeypatch, token, name, reason):
    monkeypatch.setenv("HF_TOKEN", token)
    line = main(capfd, saved, name, status=2)
    assert "hf auth login" in line and "HF_TOKEN" in line and name in line
    assert reason in line and "Request ID" not in line
    assert server.repositories == {}


def test_nobody_is_logged_in(server, pipe, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="hf auth login"):
        pipe.push_to_hub("edits")


def test_lora_weights_of_others_are_left_alone(server, lora, capfd):
    server.add(NAME, {"pytorch_lora_weights.safetensors": b"", "README.md": b"---\ntags: [lora]\n---\n"})
    assert f"{NAME} exists and holds something else" in main(capfd, lora, NAME, status=2)


def test_a_card_that_was_changed_on_the_hub_goes_on(server, lora, tmp_path, capfd):
    lora = shutil.copytree(lora, tmp_path / "lora")
    main(capfd, lora, NAME)
    changed = server.files(NAME)["README.md"] + b"\nBetter than it looks.\n"
    server.commit(NAME, {"README.md": changed})
    write_model_card(lora, "lora", "someone/base", NAME, {"steps": "1"}, {})  # as a training does
    main(capfd, lora, NAME)
    assert server.files(NAME)["README.md"] == changed


def test_where_there_are_no_links_weights_are_copied(server, saved, capfd, monkeypatch):
    def refuse(self, target):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    main(capfd, saved, NAME)
    assert read_tree(saved).keys() < server.files(NAME).keys()


def test_a_hub_that_cannot_be_reached_is_told(saved, capfd, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in main(capfd, saved, NAME, status=1)


def test_a_lost_upload_goes_on_where_it_was(server, saved, capfd, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    server.lost_after = 2
    line = main(capfd, saved, NAME, status=1)
    assert "what was uploaded is kept" in line and "the same command goes on" in line
    assert server.sent.total() == 2 and server.files(NAME).keys() == {".gitattributes"}
    server.lost_after = None
    assert "exists" not in main(capfd, saved, NAME)
    assert server.files(NAME).keys() == read_tree(saved).keys() | {".gitattributes", "README.md"}
    assert set(server.sent.values()) == {1} and server.sent.keys() == server.objects.keys()


# From Python


def test_a_training_uploads_its_pipeline_and_beside_it_its_lora_weights(server, folder, lora, tmp_path):
    shutil.copytree(lora, tmp_path / "lora")
    args = {"output": tmp_path, "model": "someone/base", "push_to_hub": True, "hub_model_id": NAME}
    args |= {"training_type": "lora", "train_distiller": "all", "train_text_encoder": False, "hub_private_repo": True}
    args = argparse.Namespace(**args)
    train.make_repository(args)
    assert server.repositories[NAME]["private"]
    train.publish(args, folder, [tmp_path / "lora", folder], {"steps": "1"}, {"flow": 0.5})
    files = {**read_tree(folder), **{f"lora/{name}": data for name, data in read_tree(tmp_path / "lora").items()}}
    assert server.files(NAME) == files | {".gitattributes": b""}
    train.make_repository(args)
    pipe = RVEDiTPipeline.from_pretrained(folder)
    pipe.load_lora_weights(NAME, subfolder="lora")  # as the model card shows
    assert pipe.get_active_adapters() == ["default_0"]


def assert_is_our_card(data):
    card = ModelCard(data.decode())
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "video-to-video"
    assert "rvedit" in card.data.tags and "automatically generated" not in card.text


def test_push_to_hub_uploads_what_is_saved_and_our_card(server, pipe, saved):
    commit = pipe.push_to_hub("edits", private=True)  # without an owner it is the user's own
    assert commit.startswith(f"{server.endpoint}/{NAME}/commit/") and server.repositories[NAME]["private"]
    files = server.files(NAME)
    assert_is_our_card(files.pop("README.md"))
    assert files == read_tree(saved) | {".gitattributes": b""}


def test_save_pretrained_uploads_what_it_saves_and_our_card(server, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "edits", push_to_hub=True)
    assert server.files(NAME) == read_tree(tmp_path / "edits") | {".gitattributes": b""}
    assert_is_our_card(server.files(NAME)["README.md"])


def test_a_pull_request_has_its_message_and_the_given_token(server, pipe, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    pipe.push_to_hub(NAME, commit_message="A better editor", token=TOKEN, create_pr=True)
    pipe.save_pretrained(
        tmp_path / "others", push_to_hub=True, commit_message="Better still", token=TOKEN, create_pr=True
    )
    assert server.asked == [("create_pr=1", "A better editor"), ("create_pr=1", "Better still")]
    pipe.push_to_hub("third", token=TOKEN)
    assert server.asked[2] == ("", "Upload RVEDiTPipeline")


def test_a_card_on_the_hub_keeps_its_text(server, pipe):
    server.add(NAME, {"README.md": b"written by hand"})
    pipe.push_to_hub(NAME)
    card = server.files(NAME)["README.md"]
    assert_is_our_card(card)
    assert b"written by hand" in card
    pipe.push_to_hub(NAME)
    assert server.files(NAME)["README.md"] == card


def test_a_folder_of_any_repository_can_be_pushed_to(server, pipe, saved):
    server.add(NAME, {"notes.txt": b"something else"})
    pipe.push_to_hub(NAME, subfolder="editor")
    uploaded = {f"editor/{name}": data for name, data in read_tree(saved).items()}
    assert server.files(NAME) == uploaded | {".gitattributes": b"", "notes.txt": b"something else"}


def test_nothing_is_saved_for_a_repository_that_cannot_be_had(server, pipe, tmp_path):
    server.add(NAME, {"model_index.json": b"{}", "weights.safetensors": b""})
    with pytest.raises(ValueError, match="holds something else"):
        pipe.save_pretrained(tmp_path / "edits", push_to_hub=True)
    assert not (tmp_path / "edits").exists()


def test_a_card_that_tells_of_an_earlier_state_is_written_anew(server, folder, capfd):
    main(capfd, folder, NAME)
    first = server.files(NAME)["README.md"].decode()
    main(capfd, folder, NAME, "--remote_code")
    assert "trust_remote_code" in server.files(NAME)["README.md"].decode() and "trust_remote_code" not in first
    server.commit(NAME, {"README.md": server.files(NAME)["README.md"] + b"\nMine.\n"})
    main(capfd, folder, NAME)
    assert server.files(NAME)["README.md"].endswith(b"\nMine.\n")


def test_a_repository_brought_up_to_date_without_its_code_has_none(server, folder, capfd):
    main(capfd, folder, NAME, "--remote_code")
    server.commit(NAME, {"notes.py": b"mine"})
    assert {"pipeline.py", "transformer/rvedit_diffusers.py"} <= server.files(NAME).keys()
    RVEDiTPipeline.from_pretrained(folder).push_to_hub(NAME)
    assert [name for name in server.files(NAME) if name.endswith(".py")] == ["notes.py"]


def test_a_folder_that_is_saved_again_without_its_code_has_none(folder, tmp_path, capfd):
    main(capfd, folder, NAME, "--remote_code", "--export_only", tmp_path / "out")
    (tmp_path / "out" / "notes.py").write_text("mine")
    RVEDiTPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.py")] == ["notes.py"]
    assert hub.check_folder(tmp_path / "out") == "pipeline"


def test_a_pipeline_with_lora_layers_is_not_saved(server, pipe, tmp_path):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"carries the LoRA layers \['default'\], with which it would not load"):
        pipe.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="carries the LoRA layers"):
        pipe.push_to_hub(NAME)
    assert not (tmp_path / "out").exists() and NAME not in server.repositories
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "out")


def test_where_weights_lay_is_not_told(server, pipe, tmp_path, capfd):
    pipe.save_pretrained(tmp_path / "first")
    again = RVEDiTPipeline.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "again")
    again.transformer.save_pretrained(tmp_path / "again" / "transformer")  # by diffusers alone
    assert b"_name_or_path" in (tmp_path / "again" / "transformer" / "config.json").read_bytes()
    main(capfd, tmp_path / "again", NAME)
    told = [name for name, data in server.files(NAME).items() if str(tmp_path).encode() in data]
    assert told == []


def test_other_folders_beside_a_saved_pipeline_stay_as_they_are(pipe, tmp_path):
    others = {"settings.json": "{// a comment\n}", "model/config.json": '{"b": 1, "_name_or_path": "mine", "a": 2}'}
    for name, text in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    pipe.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in others} == others


@pytest.mark.parametrize("name", ["pipeline.py", "transformer/rvedit_diffusers.py"])
def test_code_that_is_missing_is_named(folder, tmp_path, capfd, name):
    main(capfd, folder, NAME, "--remote_code", "--export_only", tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing, but model_index.json says that the code goes along"):
        hub.check_folder(tmp_path / "out")


def test_what_is_trained_of_a_pipeline_with_code_has_code(folder, tmp_path, capfd):
    main(capfd, folder, NAME, "--remote_code", "--export_only", tmp_path / "base")
    distiller = RVEDiTTokenDistiller.from_pretrained(tmp_path / "base" / "distiller")
    results, problem = export(tmp_path / "run", tmp_path / "base", {"distiller": distiller})
    assert problem is None and hub.check_folder(results[0]) == "pipeline"
    assert (results[0] / "distiller" / "rvedit_diffusers.py").is_file()


def test_pickles_are_refused_before_anything_is_saved(server, pipe, tmp_path):
    with pytest.raises(ValueError, match="`safe_serialization` has to be True"):
        pipe.push_to_hub(NAME, safe_serialization=False)
    with pytest.raises(ValueError, match="`safe_serialization` has to be True"):
        pipe.save_pretrained(tmp_path / "out", safe_serialization=False, push_to_hub=True, repo_id=NAME)
    assert NAME not in server.repositories and not (tmp_path / "out").exists()
