import os
import time
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import CpuOffload
from components import TEXT_DIM, build_pipeline, make_clip
from safetensors.torch import load_file

from rvedit_diffusers import RVEDiTPipeline, RVEDiTTokenDistiller
from rvedit_diffusers.synthetic import SyntheticEdits, caption
from rvedit_diffusers.training import cache
from rvedit_diffusers.training.cache import (
    TEXTS,
    TOKENS,
    CachedPairs,
    cache_paths,
    cached_null_text,
    fill_cache,
    fingerprint,
    text_length,
)
from rvedit_diffusers.training.data import Bucket
from rvedit_diffusers.training.pairs import SyntheticPairs


EDITS = SyntheticEdits(20, 5, 32, 32, edits_per_scene=2)
PAIRS = SyntheticPairs(EDITS, 4, 16.0)
NEAR = {"atol": 0.03, "rtol": 0.02}  # the cache is bfloat16


class Clips:
    """Pairs of clips of given sizes and instructions."""

    def __init__(self, *pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def bucket(self, index):
        return Bucket(*self.pairs[index][0])

    def load(self, index):
        return make_clip(*self.pairs[index][0], seed=index), make_clip(*self.pairs[index][0], seed=index + 100)

    def instruction(self, index):
        return self.pairs[index][1]

    def fps(self, index):
        return 16.0

    def key(self, index):
        return f"{self.pairs[index]} {index}"


def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def count_calls(monkeypatch, owner, name):
    """The arguments of the calls of a method from now on."""
    calls, method = [], getattr(owner, name)

    def call(*args, **kwargs):
        calls.append(args)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


# What is computed


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_sample_holds_what_its_training_needs(pipe, tmp_path, tokens, text):
    pairs = SyntheticPairs(EDITS, 1, 16.0)
    sample = CachedPairs(fill_cache(pipe, pairs, tmp_path, tokens, text), text_length(pipe))[0]
    names = {"latents", "source_latents"} | (
        {"prompt_embeds"} if text == "embeds" else {"input_ids", "attention_mask"}
    )
    if tokens != "none":
        names |= {f"{prefix}{kind}_tokens" for prefix in ("", "reference_") for kind in ("edit", "visual")}
        names |= {"visual_positions"}
    assert sample.keys() == names


@pytest.fixture(scope="module", params=[("tokens", "embeds"), ("states", "ids")], ids="-".join)
def filled(request, tmp_path_factory):
    """A pipeline, the kinds of tokens and text, and a cache of batches of 3 of `PAIRS`."""
    pipe = build_pipeline()
    paths = fill_cache(pipe, PAIRS, tmp_path_factory.mktemp("cache"), *request.param, batch_size=3)
    return pipe, *request.param, CachedPairs(paths, text_length(pipe))


@pytest.mark.parametrize("index", [1, 3])
@pytest.mark.parametrize("name, clip", [("source_latents", "source_frames"), ("latents", "target_frames")])
def test_latents_are_those_of_the_pipeline(filled, index, name, clip):
    pipe, _, _, cached = filled
    video = torch.from_numpy(getattr(EDITS[index], clip)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(cached[index][name], pipe.encode_video(video)[0], **NEAR)


@pytest.mark.parametrize("index", [1, 3])
@pytest.mark.parametrize("prefix, clip", [("", "source_frames"), ("reference_", "target_frames")])
def test_tokens_are_those_of_the_pipeline(filled, index, prefix, clip):
    pipe, tokens, _, cached = filled
    edit = EDITS[index]
    with torch.no_grad():
        if tokens == "tokens":
            expected = pipe.encode_tokens(getattr(edit, clip), edit.instruction, fps=16.0)
        else:
            inputs = pipe.processor([getattr(edit, clip)], [edit.instruction], fps=16.0)
            expected = pipe.distiller.harvest(pipe.mllm, inputs)
    names = (f"{prefix}edit_tokens", f"{prefix}visual_tokens", "visual_positions")
    torch.testing.assert_close([cached[index][name] for name in names], [rows[0] for rows in expected[:3]], **NEAR)


def embeds_of(pipe, sample):
    """The text of a sample as the transformer reads it."""
    if "prompt_embeds" in sample:
        return sample["prompt_embeds"]
    mask = sample["attention_mask"][None]
    return (pipe.text_encoder(sample["input_ids"][None], mask).last_hidden_state * mask.unsqueeze(-1))[0]


@pytest.mark.parametrize("index", [1, 3])
def test_text_is_that_of_the_pipeline(filled, index):
    pipe, _, _, cached = filled
    with torch.no_grad():
        expected = pipe.encode_prompt(EDITS[index].instruction)[0][0]
        torch.testing.assert_close(embeds_of(pipe, cached[index]), expected, **NEAR)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "instruction", ["make the &quot;ball&quot; blue", "make \n the  ball blue", "turn it of\ufb01"]
)
def test_text_is_cleaned_as_in_the_pipeline(pipe, tmp_path, instruction, text):
    pairs = Clips(((1, 32, 32), instruction))
    sample = CachedPairs(fill_cache(pipe, pairs, tmp_path, "none", text), text_length(pipe))[0]
    with torch.no_grad():
        torch.testing.assert_close(embeds_of(pipe, sample), pipe.encode_prompt(instruction)[0][0], **NEAR)


def test_a_sample_does_not_depend_on_its_batch(pipe, tmp_path):
    pairs = Clips(
        ((5, 32, 32), "make it red"), ((5, 32, 48), "remove the ball"), ((5, 32, 32), "make the video darker")
    )
    alone, together = (
        CachedPairs(fill_cache(pipe, pairs, tmp_path / str(size), batch_size=size), text_length(pipe))
        for size in (1, 3)
    )
    for index in range(3):
        torch.testing.assert_close(together[index], alone[index], **NEAR)


def test_a_source_clip_of_several_edits_is_encoded_once(pipe, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch, pipe, "encode_video")
    fill_cache(pipe, PAIRS, tmp_path, "none", batch_size=4)
    assert [len(video) for (video,) in calls] == [2, 4]  # two scenes, four edits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captioned_clip_is_encoded_and_kept_once(pipe, tmp_path, monkeypatch, dtype):
    pipe.mllm.to(dtype)
    pairs = SyntheticPairs(EDITS, 2, 16.0, captioned=True)
    videos = count_calls(monkeypatch, pipe, "encode_video")
    passes = count_calls(monkeypatch, pipe.distiller, "harvest")
    paths = fill_cache(pipe, pairs, tmp_path, "states", batch_size=2)
    assert len(videos) == len(passes) == 1
    assert "latents" not in load_file(paths[0]) and "reference_edit_tokens" not in load_file(paths[0])
    sample = CachedPairs(paths, text_length(pipe))[0]
    for name in ("latents", "edit_tokens", "visual_tokens"):
        other = "source_latents" if name == "latents" else f"reference_{name}"
        assert torch.equal(sample[name], sample[other])
    with torch.no_grad():
        text, _ = pipe.encode_prompt(caption(EDITS[0].scene), do_classifier_free_guidance=False)
    torch.testing.assert_close(sample["prompt_embeds"], text[0], atol=0.01, rtol=0.01)


def test_captions_and_instructions_have_their_own_files(pipe):
    keys = {SyntheticPairs(EDITS, 1, 16.0, captioned).key(0) for captioned in (False, True)}
    assert len(keys) == 2


# Lengths of texts


@pytest.mark.parametrize("model_max_length, length", [(16, 16), (512, 512), (int(1e30), 512)])
def test_the_length_of_texts_is_capped_as_in_the_pipeline(pipe, model_max_length, length):
    pipe.tokenizer.model_max_length = model_max_length
    assert text_length(pipe) == length == pipe.encode_prompt("red")[0].shape[1]


def test_a_tokenizer_without_a_limit_pads_ids_to_the_cap(pipe, tmp_path):
    pipe.tokenizer.model_max_length = int(1e30)
    sample = CachedPairs(fill_cache(pipe, PAIRS, tmp_path, "none", "ids"), text_length(pipe))[0]
    assert sample["input_ids"].shape == sample["attention_mask"].shape == (512,)


def test_texts_that_are_too_long_are_cut(pipe, tmp_path):
    pipe.tokenizer.model_max_length = 4
    sample = CachedPairs(fill_cache(pipe, PAIRS, tmp_path, "none"), text_length(pipe))[0]
    torch.testing.assert_close(sample["prompt_embeds"], pipe.encode_prompt(EDITS[0].instruction)[0][0], **NEAR)


# The files


def test_what_is_there_is_not_made_again(pipe, tmp_path):
    paths = fill_cache(pipe, PAIRS, tmp_path, batch_size=3)
    before = written(tmp_path)
    assert fill_cache(pipe, PAIRS, tmp_path) == paths and written(tmp_path) == before


def test_there_is_a_file_for_each_pair_and_no_other(pipe, tmp_path):
    paths = fill_cache(pipe, PAIRS, tmp_path, batch_size=3)
    assert len(paths) == 4 and set(paths) == set(tmp_path.iterdir())


def test_only_what_is_missing_is_made(pipe, tmp_path):
    paths = fill_cache(pipe, PAIRS, tmp_path)
    before = written(tmp_path)
    paths[2].unlink()
    fill_cache(pipe, PAIRS, tmp_path, batch_size=4)
    after = written(tmp_path)
    assert after.keys() == before.keys()
    assert [path for path in paths if after[path] != before[path]] == [paths[2]]


def test_other_pairs_have_other_files(tmp_path):
    paths = set(cache_paths(tmp_path, PAIRS, "key"))
    others = [SyntheticPairs(SyntheticEdits(21, 5, 32, 32), 4, 16.0), SyntheticPairs(EDITS, 4, 8.0)]
    assert all(not paths & set(cache_paths(tmp_path, other, "key")) for other in others)


def test_more_pairs_have_the_same_files(tmp_path):
    more = cache_paths(tmp_path, SyntheticPairs(EDITS, 6, 16.0), "key")
    assert more[:4] == cache_paths(tmp_path, PAIRS, "key")


def test_kinds_of_tokens_and_text_have_their_own_files(pipe):
    assert len({fingerprint(pipe, tokens, text) for tokens in TOKENS for text in TEXTS}) == 6


def test_a_fingerprint_is_the_same_in_every_process():
    assert fingerprint(build_pipeline(), "tokens", "embeds") == fingerprint(build_pipeline(), "tokens", "embeds")


def test_a_fingerprint_does_not_tell_where_the_weights_lie(tmp_path):
    build_pipeline().save_pretrained(tmp_path / "one")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    pipes = [RVEDiTPipeline.from_pretrained(tmp_path / name) for name in ("one", "two")]
    assert fingerprint(pipes[0], "tokens", "embeds") == fingerprint(pipes[1], "tokens", "embeds")


@pytest.mark.parametrize("tokens, is_shared", [("tokens", False), ("states", True), ("none", True)])
def test_transformers_of_other_widths_share_what_comes_before_the_connectors(pipe, tokens, is_shared):
    before = fingerprint(pipe, tokens, "embeds")
    config = pipe.distiller.config
    wider = RVEDiTTokenDistiller(config.mllm_hidden_size, 2 * config.dim, config.num_edit_tokens, config.hidden_layer)
    wider.queries = pipe.distiller.queries
    pipe.distiller = wider
    assert (fingerprint(pipe, tokens, "embeds") == before) == is_shared


@pytest.mark.parametrize("name", ["vae", "mllm", "distiller", "text_encoder"])
def test_other_weights_have_other_files(pipe, name):
    before = fingerprint(pipe, "tokens", "embeds")
    with torch.no_grad():
        next(getattr(pipe, name).parameters()).flatten()[0] += 1.0
    assert fingerprint(pipe, "tokens", "embeds") != before


@pytest.mark.parametrize(
    "component, setting, value",
    [("processor", "default_fps", 5.0), ("processor", "max_frames", 2), ("tokenizer", "model_max_length", 8)],
)
def test_other_settings_have_other_files(pipe, component, setting, value):
    before = fingerprint(pipe, "tokens", "embeds")
    setattr(getattr(pipe, component), setting, value)
    assert fingerprint(pipe, "tokens", "embeds") != before


@pytest.mark.parametrize(
    "name, tokens, text", [("text_encoder", "tokens", "ids"), ("transformer", "tokens", "embeds")]
)
def test_what_is_not_used_does_not_matter_to_the_files(pipe, name, tokens, text):
    before = fingerprint(pipe, tokens, text)
    with torch.no_grad():
        next(getattr(pipe, name).parameters()).flatten()[0] += 1.0
    assert fingerprint(pipe, tokens, text) == before


def test_connectors_that_learn_do_not_matter_to_the_files(pipe):
    before = fingerprint(pipe, "states", "embeds")
    with torch.no_grad():
        next(pipe.distiller.edit_connector.parameters()).add_(1.0)
    assert fingerprint(pipe, "states", "embeds") == before


def test_queries_matter_to_the_states(pipe):
    before = fingerprint(pipe, "states", "embeds")
    with torch.no_grad():
        pipe.distiller.queries.add_(1.0)
    assert fingerprint(pipe, "states", "embeds") != before


def test_a_given_key_names_the_files(pipe, tmp_path):
    assert fill_cache(pipe, PAIRS, tmp_path, "none", model_key="key") == cache_paths(tmp_path, PAIRS, "key")


def test_with_a_given_key_no_weights_are_hashed(pipe, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch, cache, "fingerprint")
    fill_cache(pipe, PAIRS, tmp_path, "none", model_key="key")
    assert not calls


# Processes that stop, and processes that work together


@pytest.fixture
def stopped(pipe, tmp_path, monkeypatch):
    """A folder whose filling was stopped in the second of four pairs."""
    encode, calls = pipe.encode_video, []

    def stop(video):
        calls.append(video)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(video)

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "encode_video", stop)
        with pytest.raises(KeyboardInterrupt):
            fill_cache(pipe, PAIRS, tmp_path)
    return tmp_path


def test_nothing_half_written_is_left_when_encoding_stops(stopped):
    assert [path.suffix for path in stopped.iterdir()] == [".safetensors"]


def test_filling_goes_on_after_a_stop(pipe, stopped):
    before = written(stopped)
    paths = fill_cache(pipe, PAIRS, stopped)
    after = written(stopped)
    assert set(paths) == set(after) and before.items() <= after.items()


def test_processes_share_the_work(pipe, tmp_path):
    shares = []
    for rank in range(3):
        before = set(tmp_path.iterdir())
        fill_cache(pipe, PAIRS, tmp_path, "none", rank=rank, num_processes=3)
        shares.append(len(set(tmp_path.iterdir()) - before))
    assert shares == [2, 1, 1]


@pytest.mark.parametrize("late", [0, 1])
def test_processes_that_start_at_different_times_leave_nothing_out(pipe, tmp_path, late):
    fill_cache(pipe, PAIRS, tmp_path, "none", rank=1 - late, num_processes=2)
    paths = fill_cache(pipe, PAIRS, tmp_path, "none", rank=late, num_processes=2)
    assert set(paths) == set(tmp_path.iterdir())


@pytest.mark.parametrize("age, is_kept", [(3500, True), (3700, False)])
def test_only_old_remains_of_killed_processes_are_removed(pipe, tmp_path, age, is_kept):
    path = tmp_path / "0123.partial77"
    path.write_bytes(b"half a file")
    os.utime(path, (time.time() - age,) * 2)
    fill_cache(pipe, PAIRS, tmp_path, "none")
    assert path.exists() is is_kept


def test_a_file_of_another_process_may_vanish_while_remains_are_looked_for(pipe, tmp_path):
    (tmp_path / "0123.partial77").symlink_to(tmp_path / "renamed")  # listed, but no longer there
    paths = fill_cache(pipe, PAIRS, tmp_path, "none")
    assert all(path.exists() for path in paths)


def test_without_anything_to_encode_nothing_is_moved(pipe, tmp_path, monkeypatch):
    fill_cache(pipe, PAIRS, tmp_path, "none")
    calls = count_calls(monkeypatch, pipe, "to")
    fill_cache(pipe, PAIRS, tmp_path, "none", device=torch.device("cpu"))
    assert not calls


def test_models_that_take_turns_on_a_device_take_one_for_all_pairs(pipe, tmp_path, monkeypatch):
    plain = fill_cache(pipe, PAIRS, tmp_path / "plain")
    pipe.enable_model_cpu_offload(device="cpu")
    names = {id(component): name for name, component in pipe.components.items()}
    calls = count_calls(monkeypatch, CpuOffload, "pre_forward")
    in_turns = fill_cache(pipe, PAIRS, tmp_path / "in turns")
    monkeypatch.undo()
    assert [name for name, _ in groupby(names[id(call[1])] for call in calls)] == [
        "vae",
        "mllm",
        "distiller",
        "text_encoder",
    ]
    for paths in zip(plain, in_turns, strict=True):
        first, second = map(load_file, paths)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The empty instruction


@pytest.mark.parametrize("text", TEXTS)
def test_the_empty_instruction_is_that_of_the_pipeline(pipe, tmp_path, text):
    null_text = cached_null_text(pipe, tmp_path, text, "key")
    with torch.no_grad():
        torch.testing.assert_close(embeds_of(pipe, null_text), pipe.encode_prompt("")[0][0], **NEAR)


def test_the_empty_instruction_is_made_once(pipe, tmp_path):
    first = cached_null_text(pipe, tmp_path / "new", "embeds", "key")
    without_encoder = SimpleNamespace(tokenizer=pipe.tokenizer)
    again = cached_null_text(without_encoder, tmp_path / "new", "embeds", "key")
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_the_empty_instruction_has_rows_of_full_length(pipe, tmp_path):
    assert cached_null_text(pipe, tmp_path, "embeds", "key")["prompt_embeds"].shape == (16, TEXT_DIM)


def test_the_empty_instruction_of_another_model_has_another_file(pipe, tmp_path):
    for key in ("key", "other key"):
        cached_null_text(pipe, tmp_path, "embeds", key)
    assert len(list(tmp_path.iterdir())) == 2
