import json

import pytest
import torch
from components import build_pipeline, make_clip
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rvedit_diffusers import RVEDiTPipeline
from rvedit_diffusers.training import adapters
from rvedit_diffusers.training.adapters import LORA_TARGETS, lora_targets


RANK, ALPHA = 4, 12  # their ratio, 3, shows in every output if it is lost
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FILE = "pytorch_lora_weights.safetensors"


def edit(pipe, **kwargs):
    kwargs = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"} | kwargs
    return pipe(make_clip(), "make the red ball blue", **kwargs).frames


def add_lora(pipe, adapter_name="default", seed=0, **config):
    config = LoraConfig(
        **{"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "init_lora_weights": False} | config
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(config, adapter_name=adapter_name)
    return pipe


@pytest.fixture
def lora_pipe(pipe):
    return add_lora(pipe)


def assert_same(first, second):
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def assert_different(first, second):
    assert (first - second).abs().max() > 1e-3


def test_saved_and_loaded_adapter_gives_the_same_edit(lora_pipe, tmp_path):
    expected = edit(lora_pipe)
    RVEDiTPipeline.save_lora_weights(tmp_path, lora_pipe.transformer)
    fresh = build_pipeline()
    assert_different(edit(fresh), expected)
    fresh.load_lora_weights(tmp_path)
    assert_same(edit(fresh), expected)


def test_a_second_transformer_is_refused(lora_pipe, tmp_path):
    RVEDiTPipeline.save_lora_weights(tmp_path, lora_pipe.transformer)
    other = build_pipeline()
    with pytest.raises(ValueError, match="`load_into_transformer_2` has to be False, got True"):
        other.load_lora_weights(tmp_path, load_into_transformer_2=True)
    other.load_lora_weights(tmp_path, load_into_transformer_2=False)
    assert other.get_active_adapters()


def test_state_dict_with_metadata_keeps_alpha(lora_pipe, tmp_path):
    RVEDiTPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(lora_pipe.transformer),
        transformer_lora_adapter_metadata=lora_pipe.transformer.peft_config["default"].to_dict(),
    )
    fresh = build_pipeline()
    fresh.load_lora_weights(tmp_path)
    assert fresh.transformer.peft_config["default_0"].lora_alpha == ALPHA
    assert_same(edit(fresh), edit(lora_pipe))


def test_compiled_transformer_saves_what_the_plain_one_saves(lora_pipe, tmp_path):
    RVEDiTPipeline.save_lora_weights(tmp_path / "plain", lora_pipe.transformer)
    compiled = torch.compile(lora_pipe.transformer, backend="eager")
    RVEDiTPipeline.save_lora_weights(tmp_path / "compiled", compiled)
    expected, saved = load_file(tmp_path / "plain" / FILE), load_file(tmp_path / "compiled" / FILE)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], value) for key, value in expected.items())
    fresh = build_pipeline()
    fresh.load_lora_weights(tmp_path / "compiled")
    assert_same(edit(fresh), edit(lora_pipe))


def test_given_metadata_go_before_those_of_the_transformer(lora_pipe, tmp_path):
    metadata = lora_pipe.transformer.peft_config["default"].to_dict() | {"lora_alpha": 2 * ALPHA}
    RVEDiTPipeline.save_lora_weights(tmp_path, lora_pipe.transformer, transformer_lora_adapter_metadata=metadata)
    fresh = build_pipeline()
    fresh.load_lora_weights(tmp_path)
    assert fresh.transformer.peft_config["default_0"].lora_alpha == 2 * ALPHA
    lora_pipe.set_adapters("default", 2.0)
    assert_same(edit(fresh), edit(lora_pipe))


def test_file_is_safetensors_with_prefixed_keys_and_metadata(lora_pipe, tmp_path):
    lora_pipe.save_lora_weights(tmp_path, lora_pipe.transformer)
    weights = load_file(tmp_path / FILE)
    # 2 blocks of 2 attentions with 4 layers each, every one a pair
    pairs = {key.removesuffix(".weight").rpartition(".lora_")[0] for key in weights}
    assert len(weights) == 32 and len(pairs) == 16
    assert "transformer.blocks.0.attn1.to_q" in pairs and "transformer.blocks.1.attn2.to_out.0" in pairs
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == ALPHA and metadata["transformer.r"] == RANK


def test_added_projections_of_the_visual_tokens_take_lora(pipe, tmp_path):
    expected = edit(pipe)
    add_lora(pipe, target_modules=["add_k_proj", "add_v_proj"])
    assert_different(edit(pipe), expected)
    pipe.save_lora_weights(tmp_path, pipe.transformer)
    fresh = build_pipeline()
    fresh.load_lora_weights(tmp_path)
    assert_same(edit(fresh), edit(pipe))


def train_lora(transformer, rank, targets):
    """Adapters as after a training: none of them is zero."""
    adapters.add_lora(transformer, rank, targets=targets)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def velocities(pipe):
    """What the transformer predicts beside two different source clips, all else equal."""
    config = pipe.transformer.config
    generator = torch.Generator().manual_seed(0)
    latents, first, second = torch.randn(3, 1, config.in_channels, 2, 4, 4, generator=generator)
    text = torch.randn(1, 3, config.text_dim, generator=generator)
    tokens = torch.randn(1, 3, pipe.distiller.config.dim, generator=generator)
    with torch.no_grad():
        return [
            pipe.transformer(latents, torch.tensor([500.0]), text, tokens, source_hidden_states=source).sample
            for source in (first, second)
        ]


@pytest.mark.parametrize("rank", [4, 48])
def test_default_targets_let_a_converted_model_see_the_source(tmp_path, rank):
    pipe, fresh = build_pipeline(), build_pipeline()
    for each in (pipe, fresh):
        torch.nn.init.zeros_(each.transformer.source_embedding.weight)  # as init_from_wan.py leaves it
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    assert_same(*velocities(pipe))
    train_lora(pipe.transformer, rank, lora_targets(tmp_path / "transformer"))
    assert_different(*velocities(pipe))
    pipe.save_lora_weights(tmp_path, pipe.transformer)
    fresh.load_lora_weights(tmp_path)
    assert_same(velocities(fresh)[1], velocities(pipe)[1])
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    assert_same(velocities(fresh)[1], velocities(pipe)[1])


def test_loras_of_converted_models_are_swapped_whatever_their_ranks(tmp_path):
    pipes = [build_pipeline() for _ in range(3)]
    for pipe, rank in zip(pipes, (8, 4)):
        torch.nn.init.zeros_(pipe.transformer.source_embedding.weight)
        train_lora(pipe.transformer, rank, [*LORA_TARGETS, "source_embedding"])
        pipe.save_lora_weights(tmp_path / str(rank), pipe.transformer)
    torch.nn.init.zeros_(pipes[2].transformer.source_embedding.weight)
    for rank, pipe in zip((8, 4), pipes):
        pipes[2].load_lora_weights(tmp_path / str(rank), adapter_name="only", hotswap=rank == 4)
        assert_same(velocities(pipes[2])[1], velocities(pipe)[1])


def test_adapters_that_leave_the_model_blind_are_refused(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path / "seeing")
    torch.nn.init.zeros_(pipe.transformer.source_embedding.weight)
    pipe.transformer.save_pretrained(tmp_path / "blind")
    assert lora_targets(tmp_path / "seeing") == list(LORA_TARGETS)
    assert lora_targets(tmp_path / "seeing", ["to_q"]) == ["to_q"]
    assert lora_targets(tmp_path / "blind") == [*LORA_TARGETS, "source_embedding"]
    with pytest.raises(ValueError, match=r"`lora_targets` has to name source_embedding.*got \['to_q'\]"):
        lora_targets(tmp_path / "blind", ["to_q"])


def test_adapter_is_chosen_by_name(pipe, tmp_path):
    add_lora(pipe, "first", seed=1)
    add_lora(pipe, "second", seed=2)
    pipe.set_adapters("first")
    expected = edit(pipe)
    pipe.save_lora_weights(tmp_path, pipe.transformer, adapter_name="first")
    fresh = build_pipeline()
    fresh.load_lora_weights(tmp_path, adapter_name="loaded")
    assert fresh.get_list_adapters() == {"transformer": ["loaded"]}
    assert_same(edit(fresh), expected)


def test_unknown_adapter_name_is_named(lora_pipe, tmp_path):
    with pytest.raises(ValueError, match=r"`adapter_name`.*\['default'\].*'other'"):
        lora_pipe.save_lora_weights(tmp_path, lora_pipe.transformer, adapter_name="other")
    assert not list(tmp_path.iterdir())


def test_transformer_without_an_adapter_is_an_error(pipe, tmp_path):
    with pytest.raises(ValueError, match="`adapter_name`"):
        pipe.save_lora_weights(tmp_path, pipe.transformer)


def test_set_adapters_weighs_and_combines(pipe):
    base = edit(pipe)
    add_lora(pipe, "first", seed=1)
    add_lora(pipe, "second", seed=2)
    pipe.set_adapters("first")
    first = edit(pipe)
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert_same(edit(pipe), first)
    pipe.set_adapters(["first", "second"])
    assert pipe.get_active_adapters() == ["first", "second"]
    assert_different(edit(pipe), first)
    pipe.set_adapters("first", 0.0)
    assert_same(edit(pipe), base)


def test_attention_kwargs_scale_equals_adapter_weight(lora_pipe):
    scaled = edit(lora_pipe, attention_kwargs={"scale": 0.5})
    assert_different(scaled, edit(lora_pipe))
    lora_pipe.set_adapters("default", 0.5)
    assert_same(edit(lora_pipe), scaled)


def test_scale_zero_equals_the_base(lora_pipe):
    assert_same(edit(lora_pipe, attention_kwargs={"scale": 0.0}), edit(build_pipeline()))


def test_fused_equals_unfused(lora_pipe):
    expected = edit(lora_pipe)
    lora_pipe.fuse_lora()
    assert lora_pipe.num_fused_loras == 1
    assert_same(edit(lora_pipe), expected)
    lora_pipe.unfuse_lora()
    assert lora_pipe.num_fused_loras == 0
    assert_same(edit(lora_pipe), expected)


def test_fused_adapter_can_be_unloaded(lora_pipe):
    expected = edit(lora_pipe, attention_kwargs={"scale": 0.5})
    lora_pipe.fuse_lora(lora_scale=0.5)
    lora_pipe.unload_lora_weights()
    assert not any("lora" in name for name, _ in lora_pipe.transformer.named_parameters())
    assert_same(edit(lora_pipe), expected)


def test_unloading_restores_the_base(lora_pipe):
    lora_pipe.unload_lora_weights()
    assert torch.equal(edit(lora_pipe), edit(build_pipeline()))
    assert lora_pipe.transformer.state_dict().keys() == build_pipeline().transformer.state_dict().keys()


def test_deleting_one_adapter_leaves_the_other(pipe):
    add_lora(pipe, "first", seed=1)
    pipe.set_adapters("first")
    first = edit(pipe)
    add_lora(pipe, "second", seed=2)
    pipe.set_adapters(["first", "second"])
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {"transformer": ["first"]}
    assert_same(edit(pipe), first)


def test_disabled_lora_equals_the_base(lora_pipe):
    expected = edit(lora_pipe)
    lora_pipe.disable_lora()
    assert_same(edit(lora_pipe), edit(build_pipeline()))
    lora_pipe.enable_lora()
    assert_same(edit(lora_pipe), expected)


def test_layers_of_wans_names_fit(pipe, tmp_path):
    from diffusers import WanPipeline, WanTransformer3DModel

    config = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32}
    wan = WanTransformer3DModel(**config, num_layers=2, rope_max_seq_len=32)
    wan.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False))
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(wan),
        transformer_lora_adapter_metadata=wan.peft_config["default"].to_dict(),
    )
    base = edit(pipe)
    pipe.load_lora_weights(tmp_path)
    assert_different(edit(pipe), base)
    loaded = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
    expected = get_peft_model_state_dict(wan)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


WAN_NAMES = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
WAN_NAMES |= {"ffn": "ffn", "net.0.proj": "0", "net.2": "2"}


@pytest.mark.parametrize("form", ["diffusion_model", "lora_unet"])
def test_keys_of_wans_own_code_are_converted(pipe, tmp_path, form):
    add_lora(pipe, target_modules=[*TARGETS, "net.0.proj", "net.2"])
    weights = {}
    for key, value in get_peft_model_state_dict(pipe.transformer).items():
        _, block, part, layer = key.split(".lora_")[0].split(".", 3)
        place = ["blocks", block, WAN_NAMES[part], WAN_NAMES[layer]]
        base = f"diffusion_model.{'.'.join(place)}" if form == "diffusion_model" else f"lora_unet_{'_'.join(place)}"
        weights[f"{base}.lora_{'down' if 'lora_A' in key else 'up'}.weight"] = value.contiguous()
        weights[f"{base}.alpha"] = torch.tensor(float(ALPHA))
    save_file(weights, tmp_path / FILE)
    fresh = build_pipeline()
    fresh.load_lora_weights(tmp_path)
    assert_same(edit(fresh), edit(pipe))


def test_layers_of_another_model_are_refused(pipe, tmp_path):
    save_file({"unet.down.0.lora_A.weight": torch.zeros(2, 4)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"has to hold layers of the transformer.*'unet.down.0.lora_A.weight'"):
        pipe.load_lora_weights(tmp_path)
    assert not getattr(pipe.transformer, "peft_config", {})


def test_pickles_are_read_on_demand_alone(lora_pipe, tmp_path):
    metadata = {"transformer_lora_layers": get_peft_model_state_dict(lora_pipe.transformer)}
    RVEDiTPipeline.save_lora_weights(tmp_path, **metadata, safe_serialization=False)
    (file,) = tmp_path.iterdir()
    with pytest.raises(OSError, match="safetensors"):
        build_pipeline().load_lora_weights(tmp_path)
    build_pipeline().load_lora_weights(tmp_path, weight_name=file.name, use_safetensors=False)
    weights = file.read_bytes()
    RVEDiTPipeline.save_lora_weights(tmp_path, lora_pipe.transformer, safe_serialization=False)
    assert file.read_bytes() == weights
