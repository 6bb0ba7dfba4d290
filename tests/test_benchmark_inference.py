"""The benchmark of inference: what it compares, what it counts, and that compiling is done once."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import costs  # noqa: E402
import inference  # noqa: E402
import models  # noqa: E402


CPU = torch.device("cpu")
TINY = ["--preset", "tiny", "--device", "cpu", "--repeats", "1", "--num_inference_steps", "1"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "new" / "inference.json"
    inference.main([*TINY, "--parts", "transformer", "edit", "--output", str(path)])
    assert [file.name for file in path.parent.iterdir()] == ["inference.json"]
    return json.loads(path.read_text())


def test_what_a_call_is_given_counts_as_its_memory():
    keys = (torch.zeros(3, dtype=torch.bfloat16), [torch.zeros(2)], None)
    assert models.num_argument_bytes(partial(print, torch.zeros(5), end=keys)) == 4 * 5 + 2 * 3 + 4 * 2
    assert models.num_argument_bytes(lambda: keys) == 0


def test_ratios_are_those_of_the_times(result):
    assert list(result["ratios"]) == [
        "transformer_vs_wan",
        "transformer_all_text_vs_wan",
        "transformer_context_in_each_call_vs_wan",
        "edit_vs_lucy",
        "edit_vs_lucy_plain",
        "edit_vs_vace",
    ]
    for name, ratio in result["ratios"].items():
        part, ours, other = inference.RATIOS[name]
        assert ratio == result[part]["seconds"][ours][0] / result[part]["seconds"][other][0]
    assert result["settings"]["preset"]["name"] == "tiny" and result["torch"] == torch.__version__


def test_edits_run_in_bfloat16(monkeypatch):
    monkeypatch.setattr(inference, "default_dtype", lambda device: torch.bfloat16)
    dtypes, build = [], inference.build_pipelines
    monkeypatch.setattr(inference, "build_pipelines", lambda *given: dtypes.append(given[3]) or build(*given))
    inference.main([*TINY, "--parts", "edit"])
    assert set(dtypes) == {torch.bfloat16}


def test_formulas_count_what_calls_do(result):
    found = result["transformer"]["flops"]
    ways = ["ours", "ours, all text tokens", "ours, context in each call"]  # from the cheapest on
    assert list(found) == [*ways, "wan"]
    assert all(flops["formula"] == flops["counted"] > 0 for flops in found.values())
    counts = [found[way]["counted"] for way in ways]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("changes", [{"num_layers": 5, "num_edit": 3}, {"channels": 7, "text_dim": 32, "num_text": 5}])
@torch.no_grad()
def test_formulas_hold_for_other_sizes(changes):
    preset = models.Preset(**{**vars(models.PRESETS["tiny"]), **changes})
    transformer, tokens = (
        models.build_transformer(preset),
        models.make_tokens(preset, torch.device("cpu"), torch.float32),
    )
    latents = torch.randn_like(tokens["source_hidden_states"])
    with FlopCounterMode(display=False) as counter:
        context = transformer.project_context(latents, **tokens)
    assert counter.get_total_flops() == costs.context_flops(preset)
    with FlopCounterMode(display=False) as counter:
        transformer(latents, torch.ones(1), context=context)
    assert counter.get_total_flops() == sum(costs.transformer_flops(preset, with_context=True).values())
    with FlopCounterMode(display=False) as counter:
        models.build_wan(preset)(latents, torch.ones(1), tokens["encoder_hidden_states"])
    assert counter.get_total_flops() == sum(costs.transformer_flops(preset, is_wan=True).values())


def test_all_calls_compute_with_the_same_inputs():
    args = inference.parse_args([*TINY, "--dtype", "float32"])
    with torch.no_grad():
        _, calls = inference.build_calls(args)
        torch.testing.assert_close(calls["ours"]().sample, calls["ours, context in each call"]().sample)
    assert calls["wan"].keywords["hidden_states"] is calls["ours"].keywords["hidden_states"]


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "mllm"])
def test_models_are_made_in_their_dtype_with_the_weights_that_they_have(name):
    preset = models.PRESETS["tiny"]
    config = UMT5Config(vocab_size=64, d_model=preset.text_dim, **preset.text_encoder)
    make = {
        "transformer": lambda: models.build_transformer(preset),
        "text_encoder": lambda: UMT5EncoderModel(config),
        "mllm": lambda: models.build_mllm(preset),
    }[name]
    built, usual = models.build(make, CPU, torch.bfloat16), make()
    if name == "transformer":
        usual = models.to_dtype(usual, torch.bfloat16)
        assert built.scale_shift_table.dtype == torch.float32
    else:
        usual.to(torch.bfloat16)
    parameters, wanted = (dict(model.named_parameters()) for model in (built, usual))
    assert {n: (p.shape, p.dtype) for n, p in parameters.items()} == {n: (p.shape, p.dtype) for n, p in wanted.items()}
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in parameters.values())
    for (n, buffer), (_, other) in zip(built.named_buffers(), usual.named_buffers(), strict=True):
        torch.testing.assert_close(buffer.float(), other.float(), msg=n, atol=0.01, rtol=0.01)


def test_what_is_prepared_is_before_the_time_of_its_action():
    order = []
    actions = {name: partial(order.append, name) for name in "ab"}
    models.measure_in_turns(actions, CPU, 1, 0, prepare=lambda name: order.append(f"prepare {name}"))
    assert order == ["prepare a", "a", "prepare b", "b"]


def test_pipelines_share_their_encoders_and_edit_clips_of_one_size():
    preset = models.PRESETS["tiny"]
    pipes = models.build_pipelines(preset, ["ours", "lucy", "vace"], CPU, torch.float32)
    assert (
        len({id(pipe.vae) for pipe in pipes.values()}) == len({id(pipe.text_encoder) for pipe in pipes.values()}) == 1
    )
    assert pipes["lucy"].config.expand_timesteps
    sizes = {(p.transformer.config.num_layers, p.transformer.config.ffn_dim) for p in pipes.values()}
    assert sizes == {(preset.num_layers, preset.ffn_dim)}
    assert preset.clip_size == (13, 128, 128)


@pytest.mark.slow
def test_blocks_are_compiled_once_for_all_steps_and_tokens_and_once_more_for_other_sizes(tmp_path):
    inference.main([*TINY, "--parts", "compile", "--output", str(tmp_path / "compile.json")])
    found = json.loads((tmp_path / "compile.json").read_text())
    assert found["compile"]["graph_breaks"] == 0
    assert found["compile"]["compilations"] == {
        "first": 3,  # shallow and deep blocks, and Wan's
        "other steps and tokens": 0,
        "three other numbers of frames": 2,
    }
    assert set(found["ratios"]) == {"compiled_vs_eager", "wan_compiled_vs_eager", "compiled_vs_wan_compiled"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--repeats", "0"], "--repeats has to be at least 1, but is 0"),
        (["--num_inference_steps", "0"], "--num_inference_steps has to be at least 1, but is 0"),
        (["--device", "meta"], "--device has to be a CPU or a CUDA device, but is meta"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
        (["--preset", "wan-5b"], "--preset wan-5b needs a GPU, and PyTorch finds none: --device cpu runs it"),
        (["--output", str(ROOT)], "--output has to be a file"),
    ],
)
def test_wrong_options_end_before_a_model_is_built(options, message, monkeypatch, capsys):
    monkeypatch.setattr(inference, "MEASURES", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        inference.main(["--preset", "tiny", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
