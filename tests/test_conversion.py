import dataclasses
import inspect
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from bases import WAN_FAMILIES, save_converted, save_qwen, save_wan
from components import make_clip
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rvedit_diffusers import RVEDiTPipeline, RVEDiTProcessor, RVEDiTTransformer3DModel
from rvedit_diffusers.conversion import (
    Parameters,
    account_for_parameters,
    convert,
    convert_config,
    convert_transformer,
    describe_parameters,
    plan_conversion,
    record_stage,
)
from rvedit_diffusers.hub import check_folder
from rvedit_diffusers.tiny import FAMILIES


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import init_from_wan  # noqa: E402


NUM_EDIT_TOKENS = 4
PATTERN = "diffusion_pytorch_model*.safetensors"

# transformer/config.json of the released pipelines, and the bytes of their weights in float32
PUBLISHED_WAN = {
    "Wan2.1-T2V-1.3B": ({"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, 5_675_987_200),
    "Wan2.1-T2V-14B": ({"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}, 57_153_966_336),
    "Wan2.2-TI2V-5B": (
        {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        19_999_150_848,
    ),
}
PUBLISHED_WAN_COMMON = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}


def qwen2_5(hidden_size, intermediate_size, layers, heads, kv_heads, vocab_size, tied):
    text = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab_size}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
    vision |= {"out_hidden_size": hidden_size, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    # flat, as the released files are
    return {"model_type": "qwen2_5_vl", **text, "vision_config": vision, "tie_word_embeddings": tied}


def qwen3(hidden_size, intermediate_size, layers, heads, tied, vision):
    text = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    depth, width, inner, deepstack = vision
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": inner, "num_heads": 16, "patch_size": 16}
    vision |= {"out_hidden_size": hidden_size, "deepstack_visual_indexes": deepstack, "num_position_embeddings": 2304}
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


# the sizes of the released models' config.json, and the number of their parameters as the Hub shows it
PUBLISHED_MLLMS = {
    "Qwen2.5-VL-3B": (qwen2_5(2048, 11008, 36, 16, 2, 151936, True), 3_754_622_976),
    "Qwen2.5-VL-7B": (qwen2_5(3584, 18944, 28, 28, 4, 152064, False), 8_292_166_656),
    "Qwen3-VL-2B": (qwen3(2048, 6144, 28, 16, True, (24, 1024, 4096, [5, 11, 17])), 2_127_532_032),
    "Qwen3-VL-4B": (qwen3(2560, 9728, 36, 32, True, (24, 1024, 4096, [5, 11, 17])), 4_437_815_808),
    "Qwen3-VL-8B": (qwen3(4096, 12288, 36, 32, False, (27, 1152, 4304, [8, 16, 24])), 8_767_123_696),
}


# text_encoder/config.json of the released pipelines
PUBLISHED_UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for family in WAN_FAMILIES:
        save_wan(folder / family, family)
    for family in FAMILIES:
        save_qwen(folder / family, family)
    return folder


@pytest.fixture(scope="module", params=WAN_FAMILIES)
def wan(request, bases):
    return bases / request.param


@pytest.fixture(scope="module")
def converted(bases, tmp_path_factory):
    """A converted pipeline of each family of Wan."""
    folder = tmp_path_factory.mktemp("converted")
    for family in WAN_FAMILIES:
        plan = plan_conversion(bases / family, bases / "qwen2_5_vl", NUM_EDIT_TOKENS)
        convert(plan, folder / family, max_shard_size="20KB")
    return folder


def read(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def inputs_for(config, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    dim = config.num_attention_heads * config.attention_head_dim

    def draw(*shape):
        return torch.randn(batch_size, *shape, generator=generator)

    return {
        "hidden_states": draw(config.in_channels, 2, 4, 6),
        "timestep": torch.tensor([700.0, 20.0]),
        "encoder_hidden_states": draw(5, config.text_dim),
        "edit_hidden_states": draw(NUM_EDIT_TOKENS, dim),
        "visual_hidden_states": draw(6, dim),
        "visual_positions": torch.rand(batch_size, 6, 3, generator=generator),
        "source_hidden_states": draw(config.in_channels, 2, 4, 6),
    }


# ---- Released configurations, without weights ----


@pytest.mark.parametrize("name", PUBLISHED_WAN)
def test_every_parameter_of_a_released_wan_is_accounted_for(name):
    sizes, num_bytes = PUBLISHED_WAN[name]
    wan_config = PUBLISHED_WAN_COMMON | sizes
    config = convert_config(wan_config)
    parameters = account_for_parameters(wan_config, config)
    channels, layers = wan_config["in_channels"], sizes["num_layers"]
    dim = sizes["num_attention_heads"] * 128
    assert 4 * parameters.counts()["mapped"] == num_bytes
    assert parameters.dropped == {}
    deep = range(layers // 3, layers)
    expected = {"source_embedding.weight": (dim, channels, 1, 2, 2), "edit_bias": (dim,)}
    for block in deep:
        for layer in ("add_k_proj", "add_v_proj"):
            expected |= {
                f"blocks.{block}.attn2.{layer}.weight": (dim, dim),
                f"blocks.{block}.attn2.{layer}.bias": (dim,),
            }
        expected[f"blocks.{block}.attn2.norm_added_k.weight"] = (dim,)
    assert parameters.new == expected
    with torch.device("meta"):
        model = RVEDiTTransformer3DModel.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        map(math.prod, (parameters.mapped | parameters.new).values())
    )


@pytest.mark.parametrize("name", PUBLISHED_MLLMS)
def test_released_mllms_are_planned_for_with_their_width(name, bases, tmp_path):
    config, num_parameters = PUBLISHED_MLLMS[name]
    folder = tmp_path / name
    folder.mkdir()
    for path in (bases / ("qwen3_vl" if name.startswith("Qwen3") else "qwen2_5_vl")).iterdir():
        if ".safetensors" not in path.name:  # its processor
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config))
    plan = plan_conversion(bases / "wan2_1", folder)
    model_class = getattr(transformers, plan.mllm_class)
    with torch.device("meta"):
        model = model_class(transformers.AutoConfig.from_pretrained(folder))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert plan.distiller_config["mllm_hidden_size"] == model.get_input_embeddings().embedding_dim


def test_the_document_has_the_tables_of_the_released_models():
    text = (Path(__file__).parents[1] / "docs" / "base_models.md").read_text()
    sizes = {name: number for name, (_, number) in PUBLISHED_MLLMS.items()}
    for name, (config, _) in PUBLISHED_WAN.items():
        config = PUBLISHED_WAN_COMMON | config
        parameters = account_for_parameters(config, convert_config(config))
        assert f"### {name}\n\n```\n{describe_parameters(parameters)}\n```\n" in text
        sizes[name] = parameters.counts()["mapped"] + parameters.counts()["new"]
    with torch.device("meta"):
        text_encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**PUBLISHED_UMT5))
    sizes["UMT5-XXL"] = sum(parameter.numel() for parameter in text_encoder.parameters())
    for name, number in sizes.items():
        assert f"{name} | {number:,} | {2 * number / 2**30:.1f} |" in text


def test_the_table_adds_up():
    parameters = Parameters(
        mapped={"proj_out.weight": (4, 3), "blocks.0.attn1.to_q.weight": (2, 2), "blocks.1.attn1.to_q.weight": (2, 2)},
        new={"blocks.1.attn2.add_k_proj.weight": (2, 2), "edit_bias": (7,)},
        dropped={"image.weight": (5,)},
    )
    rows = [line.split() for line in describe_parameters(parameters).splitlines()]
    assert rows[0] == ["part", "tensors", "mapped", "new", "dropped"]
    assert ["blocks.*.attn1", "2", "8", "0", "0"] in rows and ["blocks.*.attn2", "1", "0", "4", "0"] in rows
    assert rows[-1] == ["all", "6", "20", "11", "5"]


@pytest.mark.parametrize("num_shallow_blocks, expected", [(None, 10), (0, 0), (7, 7), (30, 30)])
def test_the_shallow_blocks_read_editing_tokens_the_others_text_and_visual_tokens(num_shallow_blocks, expected):
    config = convert_config(PUBLISHED_WAN_COMMON | PUBLISHED_WAN["Wan2.1-T2V-1.3B"][0], num_shallow_blocks)
    with torch.device("meta"):
        tokens = [block.tokens for block in RVEDiTTransformer3DModel.from_config(config).blocks]
    assert tokens == [("edit",)] * expected + [("text", "visual")] * (30 - expected)


# ---- What the converted transformer computes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_text_in_all_blocks_it_is_the_base_bit_for_bit(bases, converted, dtype):
    for family in WAN_FAMILIES:
        base = WanTransformer3DModel.from_pretrained(bases / family, subfolder="transformer", torch_dtype=dtype)
        model, loading = RVEDiTTransformer3DModel.from_pretrained(
            converted / family,
            subfolder="transformer",
            torch_dtype=dtype,
            shallow_tokens=("text",),
            deep_tokens=("text",),
            output_loading_info=True,
        )
        assert loading["missing_keys"] == [] and {block.tokens for block in model.blocks} == {("text",)}
        inputs = inputs_for(model.config)
        shared = ("hidden_states", "timestep", "encoder_hidden_states")
        arguments = {name: inputs[name].to(dtype if name != "timestep" else None) for name in shared}
        expected = base(**arguments).sample
        assert torch.equal(model(**arguments, source_hidden_states=torch.ones_like(expected)).sample, expected)


@torch.no_grad()
def test_deep_blocks_start_as_the_base(bases, converted):
    for family in WAN_FAMILIES:
        base = WanTransformer3DModel.from_pretrained(bases / family, subfolder="transformer").eval()
        model = RVEDiTTransformer3DModel.from_pretrained(converted / family, subfolder="transformer").eval()
        inputs = inputs_for(model.config)
        with_text = model.condition_embedder.text_embedder(inputs["encoder_hidden_states"]) - model.edit_bias
        inputs["edit_hidden_states"] = with_text  # shallow blocks read the text, too
        shared = {name: inputs[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")}
        expected = base(**shared).sample
        # adding the bias rounds once more than the base does
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["visual_hidden_states", "visual_positions", "source_hidden_states"])
@torch.no_grad()
def test_what_is_new_has_no_effect_at_first(converted, name):
    model = RVEDiTTransformer3DModel.from_pretrained(converted / "wan2_1", subfolder="transformer").eval()
    inputs = inputs_for(model.config)
    expected = model(**inputs).sample
    assert torch.equal(model(**inputs | {name: inputs[name].flip(1)}).sample, expected)


@torch.no_grad()
def test_editing_tokens_of_zero_are_the_padding_of_the_bases_text(bases, converted):
    model = RVEDiTTransformer3DModel.from_pretrained(converted / "wan2_1", subfolder="transformer").eval()
    base = WanTransformer3DModel.from_pretrained(bases / "wan2_1", subfolder="transformer").eval()
    padding = base.condition_embedder.text_embedder(torch.zeros(1, 1, 16))[0, 0]
    torch.testing.assert_close(model.edit_bias, padding)
    inputs = inputs_for(model.config)
    shared = {name: inputs[name] for name in ("hidden_states", "timestep")}
    nothing = {"encoder_hidden_states": torch.zeros(2, 9, 16)}
    zeros = {"edit_hidden_states": torch.zeros(2, NUM_EDIT_TOKENS, 24)}
    torch.testing.assert_close(model(**shared, **nothing, **zeros).sample, base(**shared, **nothing).sample)


def test_new_weights_begin_as_those_of_a_new_model(converted):
    config = RVEDiTTransformer3DModel.load_config(converted / "wan2_1", subfolder="transformer")
    fresh = RVEDiTTransformer3DModel.from_config(config).state_dict()
    weights = read(converted / "wan2_1" / "transformer")
    assert weights.keys() == fresh.keys()
    new = set(account_for_parameters(*_configs(converted)).new) - {"edit_bias"}
    assert {name for name in new if not weights[name].any()} == {name for name in new if not fresh[name].any()}
    for name in new:
        assert weights[name].shape == fresh[name].shape
        torch.testing.assert_close(weights[name].std(), fresh[name].std(), atol=0.02, rtol=0.25)


def _configs(converted):
    config = RVEDiTTransformer3DModel.load_config(converted / "wan2_1", subfolder="transformer")
    wan = {name: value for name, value in config.items() if name[0] != "_" and name not in OWN}
    return wan, config


OWN = ("source_channels", "num_shallow_blocks", "shallow_tokens", "deep_tokens")


# ---- The files ----


def test_weights_are_in_shards_of_the_size_asked_for(converted):
    folder = converted / "wan2_1" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob(PATTERN))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    largest = max(math.prod(tensor.shape) * 4 for tensor in read(folder).values())
    for name in files:
        size = sum(tensor.nbytes for tensor in load_file(folder / name).values())
        assert size <= max(20_000, largest)
        assert all(index["weight_map"][key] == name for key in load_file(folder / name))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read(folder).values())


def test_mapped_weights_are_the_bases(wan, converted):
    base, weights = read(wan / "transformer"), read(converted / wan.name / "transformer")
    assert base.keys() < weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.items())


def test_another_dtype_leaves_what_is_kept_in_float32(bases, tmp_path):
    config = convert_config(json.loads((bases / "wan2_1" / "transformer" / "config.json").read_text()))
    convert_transformer(bases / "wan2_1" / "transformer", tmp_path, config, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in read(tmp_path).items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        name for name in dtypes if any(word in name for word in ("time_embedder", "scale_shift_table", "norm2"))
    }
    loaded = RVEDiTTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert all(parameter.dtype == dtypes[name] for name, parameter in loaded.named_parameters())


def test_a_base_in_half_precision_stays_so(bases, tmp_path):
    half = WanTransformer3DModel.from_pretrained(bases / "wan2_1", subfolder="transformer").to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    config = convert_config(json.loads((tmp_path / "half" / "config.json").read_text()))
    convert_transformer(tmp_path / "half", tmp_path / "converted", config)
    assert {tensor.dtype for tensor in read(tmp_path / "converted").values()} == {torch.float16}


def test_the_same_seed_gives_the_same_files(bases, tmp_path):
    plan = plan_conversion(bases / "wan2_1", bases / "qwen3_vl", NUM_EDIT_TOKENS)
    state = torch.get_rng_state()
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        convert(plan, tmp_path / name, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("transformer", "distiller"):
        first, second, third = (read(tmp_path / name / part) for name in ("first", "second", "third"))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(first[name], third[name]) for name in first)


def test_unchanged_components_are_copied_byte_for_byte(bases, wan, converted):
    for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
        files = sorted(path.name for path in (wan / name).iterdir())
        assert sorted(path.name for path in (converted / wan.name / name).iterdir()) == files
        for file in files:
            assert (converted / wan.name / name / file).read_bytes() == (wan / name / file).read_bytes()
    for path in (converted / wan.name / "mllm").iterdir():
        assert path.read_bytes() == (bases / "qwen2_5_vl" / path.name).read_bytes()


def test_variants_beside_the_weights_are_left_out(bases, tmp_path):
    shutil.copytree(bases / "wan2_1", tmp_path / "wan")
    pipe = WanPipeline.from_pretrained(bases / "wan2_1")
    pipe.vae.save_pretrained(tmp_path / "wan" / "vae", variant="fp16")
    assert (tmp_path / "wan" / "vae" / "diffusion_pytorch_model.fp16.safetensors").exists()
    pipe.text_encoder.save_pretrained(tmp_path / "wan" / "text_encoder", variant="fp16", max_shard_size="3KB")
    assert list((tmp_path / "wan" / "text_encoder").glob("*.index.fp16.json"))
    convert(plan_conversion(tmp_path / "wan", bases / "qwen3_vl", NUM_EDIT_TOKENS), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "vae").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert [path.name for path in (tmp_path / "out" / "text_encoder").iterdir() if "fp16" in path.name] == []
    assert check_folder(tmp_path / "out") == "pipeline"


def test_linked_weights_are_those_of_the_bases(bases, converted, tmp_path):
    convert(plan_conversion(bases / "wan2_1", bases / "qwen2_5_vl", NUM_EDIT_TOKENS), tmp_path / "out", link=True)
    links = [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert {path.parent.name for path in links} == {"text_encoder", "vae", "mllm"}
    for path in links:
        folder = bases / "qwen2_5_vl" if path.parent.name == "mllm" else bases / "wan2_1" / path.parent.name
        assert path.resolve() == (folder / path.name).resolve()
    RVEDiTPipeline.from_pretrained(tmp_path / "out")


def test_a_converted_pipeline_edits_with_wans_own_steps_and_guidance(wan, converted):
    pipe = RVEDiTPipeline.from_pretrained(converted / wan.name)
    own = {name: value.default for name, value in inspect.signature(WanPipeline.__call__).parameters.items()}
    for name in ("num_inference_steps", "guidance_scale"):
        assert pipe.config[f"default_{name}"] == own[name]


def test_the_index_is_what_the_pipeline_itself_writes(wan, converted, tmp_path):
    folder = converted / wan.name
    pipe = RVEDiTPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path)
    first, second = (json.loads((path / "model_index.json").read_text()) for path in (folder, tmp_path))
    assert first.pop("tokenizer") == ["transformers", "T5TokenizerFast"]  # as published; an alias of the next
    assert second.pop("tokenizer") == ["transformers", "T5Tokenizer"]
    assert first == second
    assert pipe.config.default_max_area == {"wan2_1": 480 * 832, "wan2_2": 704 * 1280}[wan.name]
    assert pipe.scheduler.config.flow_shift == {"wan2_1": 3.0, "wan2_2": 5.0}[wan.name]


def test_the_record_names_the_bases_but_not_where_they_lay(wan, converted):
    record = json.loads((converted / wan.name / "model_index.json").read_text())["conversion"]
    assert record["wan"] == {"source": wan.name, "revision": None}
    assert record["mllm"] == {"source": "qwen2_5_vl", "revision": None}
    counts = plan_conversion(wan, wan.parent / "qwen2_5_vl").parameters.counts()
    assert record["parameters"] == counts and counts["new"] > 0 and counts["dropped"] == 0


def test_stages_are_added_to_the_record(converted, tmp_path):
    record_stage(tmp_path, "connect")
    assert list(tmp_path.iterdir()) == []
    path, index = tmp_path / "model_index.json", {"_class_name": "RVEDiTPipeline", "conversion": None}
    path.write_text(json.dumps(index))
    record_stage(tmp_path, "connect")
    assert json.loads(path.read_text()) == index
    path.write_text(json.dumps(index | {"conversion": {"mllm": "x"}}))
    record_stage(tmp_path, "connect")
    record_stage(tmp_path, "edit")
    assert json.loads(path.read_text()) == index | {"conversion": {"mllm": "x", "stages": ["connect", "edit"]}}
    assert list(tmp_path.iterdir()) == [path]


def test_the_processor_has_as_many_slots_as_the_distiller_queries(bases, converted):
    assert RVEDiTProcessor.from_pretrained(converted / "wan2_1" / "processor").num_edit_tokens == NUM_EDIT_TOKENS
    with safe_open(converted / "wan2_1" / "distiller" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_slice("queries").get_shape() == [NUM_EDIT_TOKENS, 32]


MEMORY = """
import sys, threading, torch
from pathlib import Path
from rvedit_diffusers.conversion import convert, plan_conversion

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

plan = plan_conversion(sys.argv[1], sys.argv[2], 4, num_shallow_blocks=0)
start, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
convert(plan, sys.argv[3], torch.bfloat16, max_shard_size="8MB")
done.set()
thread.join()
print(peak[0] - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_no_more_than_a_shard_is_in_memory(bases, tmp_path):
    size = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 512, "num_layers": 20}
    save_wan(tmp_path / "wan", max_shard_size="16MB", **size)
    weights = sum(path.stat().st_size for path in (tmp_path / "wan" / "transformer").glob(PATTERN))
    command = [sys.executable, "-c", MEMORY, tmp_path / "wan", bases / "qwen3_vl", tmp_path / "out"]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shard, layer, slack = 8e6, 4 * 512 * 512, 24e6  # the last is the allocator's own, and tokenizers
    new = 20 * 2 * layer  # in float32; a third of it
    assert taken < shard + 2 * layer + slack < min(weights / 2.5, shard + new)


# ---- The script ----


@pytest.mark.parametrize("mllm", FAMILIES)
def test_the_script_makes_pipelines_that_edit(wan, bases, tmp_path, mllm, capsys):
    output = tmp_path / "out"
    arguments = ["--wan", str(wan), "--mllm", str(bases / mllm), "--output", str(output), "--num_edit_tokens", "3"]
    init_from_wan.main([*arguments, "--num_shallow_blocks", "2", "--dtype", "bfloat16"])
    assert "all" in capsys.readouterr().out
    pipe = RVEDiTPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    assert [block.tokens for block in pipe.transformer.blocks] == [("edit",), ("edit",), ("text", "visual")]
    assert pipe.distiller.config.num_edit_tokens == 3
    clip, generator = make_clip(), torch.Generator().manual_seed(0)
    frames = pipe(clip, "make the red ball blue", num_inference_steps=2, generator=generator, output_type="pt").frames
    assert frames.shape == (1, 5, 3, 32, 32) and frames.isfinite().all()


def test_a_dry_run_prints_the_table_and_writes_nothing(bases, tmp_path, capsys):
    arguments = ["--wan", str(bases / "wan2_1"), "--mllm", str(bases / "qwen3_vl"), "--output", str(tmp_path / "out")]
    init_from_wan.main([*arguments, "--dry_run"])
    assert not any(tmp_path.iterdir())
    plan = plan_conversion(bases / "wan2_1", bases / "qwen3_vl")
    assert capsys.readouterr().out.strip() == describe_parameters(plan.parameters)


# ---- Refusals ----


@pytest.fixture
def broken(bases, tmp_path):
    """Copies of tiny bases to be spoiled, and a check that the script then refuses and leaves nothing behind."""
    wan, mllm, output = (tmp_path / name for name in ("wan", "mllm", "out"))
    shutil.copytree(bases / "wan2_1", wan)
    shutil.copytree(bases / "qwen2_5_vl", mllm)

    class Broken:
        def change(self, path, **values):
            path = tmp_path / path
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

        def refused(self, capsys, *words, arguments=()):
            with pytest.raises(SystemExit) as end:
                init_from_wan.main(["--wan", str(wan), "--mllm", str(mllm), "--output", str(output), *arguments])
            assert end.value.code == 2
            message = capsys.readouterr().err.strip().splitlines()[-1]
            assert message.startswith("init_from_wan.py: error: ")
            assert all(word in message for word in words), message
            assert sorted(path.name for path in tmp_path.iterdir()) == ["mllm", "wan"]

    broken = Broken()
    broken.wan, broken.mllm, broken.output = wan, mllm, output
    return broken


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("wan/model_index.json", {"boundary_ratio": 0.875}, ("A14B",)),
        ("wan/model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, ("A14B",)),
        ("wan/model_index.json", {"_class_name": "WanImageToVideoPipeline"}, ("WanImageToVideoPipeline",)),
        ("wan/model_index.json", {"_class_name": "WanVACEPipeline"}, ("WanVACEPipeline",)),
        ("wan/model_index.json", {"vae": [None, None]}, ("component vae",)),
        ("wan/transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, ("WanVACETransformer3DModel",)),
        ("wan/transformer/config.json", {"image_dim": 1280}, ("image_dim",)),
        ("wan/transformer/config.json", {"added_kv_proj_dim": 5120}, ("added_kv_proj_dim",)),
        ("wan/transformer/config.json", {"in_channels": 36}, ("36 channels and predicts 16",)),
        ("wan/transformer/config.json", {"vace_layers": [0, 5]}, ("vace_layers",)),
        ("wan/vae/config.json", {"z_dim": 48}, ("48 channels", "16")),
    ],
)
def test_other_models_of_the_wan_family_are_refused_with_what_is_supported(broken, capsys, file, change, words):
    broken.change(file, **change)
    supported = ("Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-14B-Diffusers", "Wan2.2-TI2V-5B-Diffusers")
    broken.refused(capsys, "`wan`", *words, *supported)


def test_the_original_layout_is_refused(broken, capsys):
    (broken.wan / "model_index.json").unlink()
    broken.refused(capsys, "`wan`", "no model_index.json", "diffusers' layout")


@pytest.mark.parametrize("change, words", [({"model_type": "qwen3"}, ("type qwen3",)), ({}, ("no config.json",))])
def test_other_language_models_are_refused_with_what_is_supported(broken, capsys, change, words):
    if change:
        broken.change("mllm/config.json", **change)
    else:
        (broken.mllm / "config.json").unlink()
    broken.refused(capsys, "`mllm`", *words, "Qwen2.5-VL", "Qwen3-VL")


@pytest.mark.parametrize("folder", ["wan/transformer", "wan/text_encoder", "mllm"])
def test_a_missing_shard_is_named_before_anything_is_written(broken, capsys, monkeypatch, folder):
    monkeypatch.setattr("rvedit_diffusers.conversion.convert_transformer", None)
    path = sorted((broken.wan.parent / folder).glob("*.safetensors"))[1]
    path.unlink()
    broken.refused(capsys, f"{folder} is not complete", path.name)


def test_weights_in_eight_bits_are_refused(broken, capsys):
    path = sorted((broken.wan / "transformer").glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path)
    broken.refused(capsys, "F32, F16, BF16", name, "F8_E4M3")


def test_weights_in_pickles_are_not_read(broken, capsys):
    path = broken.wan / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    broken.refused(capsys, "vae holds no weights in safetensors")


@pytest.mark.parametrize("change", [{"ffn_dim": 64}, {"num_layers": 2}, {"num_layers": 4}])
def test_weights_that_are_not_those_of_the_configuration_are_refused(broken, capsys, change):
    broken.change("wan/transformer/config.json", **change)
    broken.refused(capsys, "does not hold the weights that its config.json describes", "blocks.")


@pytest.mark.parametrize("folder", ["wan/transformer", "wan/text_encoder", "wan/vae", "mllm"])
def test_an_unreadable_file_is_named(broken, capsys, monkeypatch, folder):
    monkeypatch.setattr("rvedit_diffusers.conversion.convert_transformer", None)
    path = sorted((broken.wan.parent / folder).glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:50])
    broken.refused(capsys, f"{path} cannot be read as safetensors")


@pytest.mark.parametrize("part", ["text_encoder", "mllm"])
def test_shards_without_their_index_are_refused(broken, capsys, part):
    folder = broken.mllm if part == "mllm" else broken.wan / part
    (folder / "model.safetensors.index.json").unlink()
    broken.refused(capsys, "model-00001-of-0000", ".safetensors, but not the index")


def test_weights_of_a_variant_alone_are_refused(broken, capsys):
    (path,) = (broken.wan / "vae").glob("*.safetensors")
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    broken.refused(capsys, "diffusion_pytorch_model.fp16.safetensors is of a variant")


@pytest.mark.parametrize("arguments", [[], ["--dry_run"]])
def test_an_mllm_without_its_processor_is_refused_beforehand(broken, capsys, monkeypatch, arguments):
    monkeypatch.setattr("rvedit_diffusers.conversion.convert_transformer", None)
    for path in broken.mllm.iterdir():
        if path.name != "config.json" and ".safetensors" not in path.name:
            path.unlink()
    broken.refused(capsys, "`mllm`", "has no processor that can be read", arguments=arguments)


def test_a_mount_point_is_refused(broken, capsys, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(broken.output))
    broken.refused(capsys, f"`output` has to be a folder inside of {broken.output}, which is a mount point")


def test_what_is_saved_onto_links_leaves_the_bases_as_they_are(broken):
    before = {path: path.read_bytes() for path in broken.wan.parent.rglob("*") if path.is_file()}
    convert(plan_conversion(broken.wan, broken.mllm), broken.output, link=True)
    RVEDiTPipeline.from_pretrained(broken.output).save_pretrained(broken.output)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_disk_that_is_too_small_is_told(broken, capsys, monkeypatch, dtype):
    """Of a base in float32, in whatever dtype it is written."""
    plan = plan_conversion(broken.wan, broken.mllm)
    convert(plan, broken.output, None if dtype == "auto" else torch.bfloat16)
    size = sum(tensor.nbytes for tensor in read(broken.output / "transformer").values())
    shutil.rmtree(broken.output)
    copied = sum(path.stat().st_size for path in broken.wan.parent.rglob("*.safetensors"))
    copied -= sum(path.stat().st_size for path in (broken.wan / "transformer").iterdir() if path.suffix != ".json")
    # the first is known beforehand, the second when the transformer's dtype is
    for free, what, link in ((copied, "for out", []), (size - 1, "for", ["--link"]), (100 * size, None, [])):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if what is None:
            init_from_wan.main(
                [f"--wan={broken.wan}", f"--mllm={broken.mllm}", f"--output={broken.output}", f"--dtype={dtype}"]
            )
        else:
            broken.refused(capsys, "`output` needs", what, arguments=[f"--dtype={dtype}", *link])


def test_wrong_numbers_are_refused(broken, capsys):
    broken.refused(capsys, "`num_edit_tokens`", "0", arguments=["--num_edit_tokens", "0"])
    broken.refused(capsys, "`num_shallow_blocks`", "3 layers", "4", arguments=["--num_shallow_blocks", "4"])


@pytest.mark.parametrize("option, value", [("seed", str(2**63)), ("seed", "-1"), ("max_shard_size", "large")])
def test_wrong_settings_are_refused_before_anything_is_written(broken, capsys, monkeypatch, option, value):
    monkeypatch.setattr("rvedit_diffusers.conversion.convert_transformer", None)
    broken.refused(capsys, f"`{option}`", value, arguments=[f"--{option}={value}"])


def test_an_output_that_is_taken_is_refused_and_stays(broken, capsys, tmp_path):
    plan = plan_conversion(broken.wan, broken.mllm)
    broken.output.mkdir()
    (broken.output / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output`.*taken"):
        convert(plan, broken.output)
    assert [path.name for path in broken.output.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("is_link", [False, True])
def test_an_empty_output_folder_is_used(broken, is_link):
    broken.output.mkdir()
    output = broken.output
    if is_link:
        output = broken.output.with_name("link")
        output.symlink_to(broken.output)
    convert(plan_conversion(broken.wan, broken.mllm), output)
    assert (broken.output / "model_index.json").is_file()


def test_licences_go_along(broken):
    (broken.mllm / "LICENSE").write_text("of the MLLM")
    (broken.wan / "LICENSE.txt").write_text("of Wan")
    convert(plan_conversion(broken.wan, broken.mllm), broken.output)
    assert (broken.output / "mllm" / "LICENSE").read_text() == "of the MLLM"
    assert (broken.output / "transformer" / "LICENSE.txt").read_text() == "of Wan"


def test_a_snapshot_of_the_cache_is_known_by_its_repository_and_commit(broken, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("hub") / "models--Wan-AI--Wan2.1-T2V" / "snapshots" / ("0f" * 20)
    shutil.copytree(broken.wan, snapshot)
    convert(plan_conversion(snapshot, broken.mllm), broken.output)
    record = json.loads((broken.output / "model_index.json").read_text())["conversion"]
    assert record["wan"] == {"source": "Wan-AI/Wan2.1-T2V", "revision": "0f" * 20}
    assert record["mllm"] == {"source": "mllm", "revision": None}


def test_a_model_that_is_nowhere_is_told(broken, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="`wan` nobody/nothing is no folder, and from the Hub it cannot be had"):
        plan_conversion("nobody/nothing", broken.mllm)


def test_plans_are_plain_records(bases):
    plan = plan_conversion(bases / "wan2_1", bases / "qwen2_5_vl")
    assert dataclasses.asdict(plan)["config"]["source_channels"] == 16


def test_the_helper_of_other_tests_trains_every_zero_weight(tmp_path):
    weights = read(save_converted(tmp_path, trained=True) / "transformer")
    assert [name for name, tensor in weights.items() if not tensor.any()] == []
