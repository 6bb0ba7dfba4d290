"""diffusers' conveniences on a pipeline converted from Wan and Qwen-VL bases."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from bases import build_wan_transformer, save_converted
from components import Calls, make_clip
from diffusers import (
    AutoencoderKLWan,
    BitsAndBytesConfig,
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PipelineQuantizationConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    TorchAoConfig,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_dispatch import attention_backend
from diffusers.training_utils import EMAModel
from peft import LoraConfig

from rvedit_diffusers import RVEDiTPipeline, RVEDiTTokenDistiller, RVEDiTTransformer3DModel


CPU = torch.device("cpu")
CLASSES = {
    "text_encoder": transformers.UMT5EncoderModel,
    "mllm": transformers.Qwen2_5_VLForConditionalGeneration,
    "distiller": RVEDiTTokenDistiller,
    "vae": AutoencoderKLWan,
    "transformer": RVEDiTTransformer3DModel,
}
SPLITTABLE = [name for name in CLASSES if name != "vae"]  # diffusers' AutoencoderKLWan has no `_no_split_modules`
THREE_PASSES = {"guidance_scale": 3.0, "source_guidance_scale": 1.5}
ONE_PASS = {"guidance_scale": 1.0, "source_guidance_scale": 1.0}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A converted pipeline in which every weight matters. Read only."""
    return save_converted(tmp_path_factory.mktemp("converted"), trained=True)


@pytest.fixture(scope="module")
def plain(folder):
    """The converted pipeline, to compare with. Read only."""
    return load(folder)


@pytest.fixture
def compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()


def load(folder, **kwargs):
    pipe = RVEDiTPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, video=None, **kwargs):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"} | kwargs
    video = make_clip() if video is None else video
    return pipe(video, "make the red ball blue", generator=torch.Generator().manual_seed(0), **settings).frames


def assert_same(result, expected):
    # Weights at other addresses pick other kernels, which round differently.
    torch.testing.assert_close(result.cpu(), expected, atol=1e-5, rtol=0)


def assert_near(result, expected, atol):
    assert not torch.equal(result, expected)
    torch.testing.assert_close(result.float(), expected, atol=atol, rtol=0)


def models_of(pipe):
    return {name: component for name, component in pipe.components.items() if isinstance(component, torch.nn.Module)}


def stored_bytes(model):
    """Bytes of the parameters, those inside tensor subclasses for what they are."""
    size = 0
    for parameter in model.parameters():
        names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else None
        size += sum(getattr(parameter, name).nbytes for name in names) if names else parameter.nbytes
    return size


# ---- Loading ----


@pytest.mark.parametrize("argument", ["torch_dtype", "dtype"])
def test_one_dtype_for_all_components(folder, plain, argument):
    pipe = load(folder, **{argument: torch.float16})
    assert {model.dtype for model in models_of(pipe).values()} == {torch.float16}
    assert pipe.transformer.scale_shift_table.dtype == torch.float32
    assert_near(edit(pipe), edit(plain), atol=0.02)


@pytest.mark.parametrize("argument", ["torch_dtype", "dtype"])
def test_a_dtype_for_each_component(folder, plain, argument):
    dtypes = {"transformer": torch.bfloat16, "mllm": torch.float16, "default": torch.float32}
    pipe = load(folder, **{argument: dtypes})
    for name, model in models_of(pipe).items():
        assert model.dtype == dtypes.get(name, torch.float32), name
    assert_near(edit(pipe), edit(plain), atol=0.1)


@pytest.mark.parametrize("variant, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_sharded_variant_loads_as_it_was_saved(folder, tmp_path, variant, dtype):
    pipe = load(folder, dtype=dtype)
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size="30KB")
    for name in ("transformer", "mllm"):
        files = sorted(path.name for path in (tmp_path / name).glob("*.safetensors"))
        assert len(files) > 1 and all(f".{variant}-0" in file or f".{variant}." in file for file in files)
    loaded = load(tmp_path, variant=variant, dtype=dtype)
    for name, model in models_of(pipe).items():
        state = getattr(loaded, name).state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items()), name
    assert_same(edit(loaded), edit(pipe))


def test_variant_of_the_transformer_alone_leaves_the_rest_plain(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "pipeline")
    transformer = RVEDiTTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    with torch.no_grad():
        transformer.proj_out.bias.add_(1.0)
    transformer.save_pretrained(copy / "transformer", variant="ema")
    loaded = load(copy, variant="ema")
    assert torch.equal(loaded.transformer.proj_out.bias, transformer.proj_out.bias)
    assert not torch.equal(load(copy).transformer.proj_out.bias, transformer.proj_out.bias)


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map_of_the_pipeline(folder, plain, device_map):
    pipe = load(folder, device_map=device_map)
    assert {model.device for model in models_of(pipe).values()} == {CPU}
    assert_same(edit(pipe), edit(plain))


@pytest.mark.parametrize("name", SPLITTABLE)
def test_device_map_auto_puts_on_disk_what_does_not_fit(folder, plain, tmp_path, name):
    size = stored_bytes(getattr(plain, name))
    component = CLASSES[name].from_pretrained(
        folder, subfolder=name, device_map="auto", max_memory={"cpu": int(size * 0.9)}, offload_folder=tmp_path
    )
    assert any(parameter.is_meta for parameter in component.parameters())
    pipe = load(folder, **{name: component})
    assert_same(edit(pipe, output_type="pt"), edit(plain, output_type="pt"))


# ---- Offloading ----


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_pipeline_offloaded_to_disk_gives_the_same_edit(folder, plain, tmp_path, level):
    pipe = load(folder)
    pipe.enable_group_offload(CPU, offload_type=level, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    for name, model in models_of(plain).items():
        written = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        assert written >= stored_bytes(model), name
    for _ in range(2):
        assert_same(edit(pipe), edit(plain))
    assert_same(edit(pipe, output_type="pt"), edit(plain, output_type="pt"))


def test_a_folder_with_weights_of_others_is_refused(folder, tmp_path):
    (tmp_path / "group.safetensors").write_bytes(b"")
    pipe = load(folder)
    with pytest.raises(ValueError, match="`offload_to_disk_path` has to be a folder that does not exist or is empty"):
        pipe.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))


def test_lora_layers_are_refused_while_weights_are_on_disk(folder, plain, tmp_path):
    pipe = load(folder)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.save_lora_weights(tmp_path / "lora", pipe.transformer)
    pipe.unload_lora_weights()
    pipe.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk"))
    for change in (
        lambda: pipe.load_lora_weights(tmp_path / "lora"),
        pipe.unload_lora_weights,
        lambda: pipe.delete_adapters("default"),
        pipe.fuse_lora,
        pipe.unfuse_lora,
    ):
        with pytest.raises(ValueError, match="`text_encoder` is offloaded to disk"):
            change()
    with pytest.raises(ValueError, match="`text_encoder` is offloaded to disk: what is in memory are not its weights"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert_same(edit(pipe), edit(plain))


def test_lora_layers_on_disk_are_not_saved(folder, tmp_path):
    pipe = load(folder)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk"))
    with pytest.raises(ValueError, match="`transformer_lora_layers` is offloaded to disk"):
        pipe.save_lora_weights(tmp_path / "lora", pipe.transformer)
    assert not (tmp_path / "lora").exists()


def test_excluded_components_stay_off_the_disk(folder, plain, tmp_path):
    pipe = load(folder)
    pipe.enable_group_offload(
        CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path), exclude_modules=["mllm", "vae"]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"text_encoder", "distiller", "transformer"}
    assert torch.equal(pipe.vae.decoder.conv_in.weight, plain.vae.decoder.conv_in.weight)
    assert_same(edit(pipe), edit(plain))


@pytest.mark.parametrize(
    "name, level",
    # On its own UMT5 loses its embedding at leaf level, which the pipeline's method knows how to keep.
    [(name, "block_level") for name in CLASSES] + [(name, "leaf_level") for name in CLASSES if name != "text_encoder"],
)
def test_component_offloaded_to_disk_gives_the_same_edit(folder, plain, tmp_path, name, level):
    pipe = load(folder)
    offload = {"offload_type": level, "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
    apply_group_offloading(getattr(pipe, name), onload_device=CPU, **offload)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) >= stored_bytes(getattr(plain, name))
    assert_same(edit(pipe, output_type="pt"), edit(plain, output_type="pt"))


def edit_by_tiles(pipe):
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=16,
        tile_sample_stride_width=16,
    )
    clips = [make_clip(1, 64, 64, seed=seed) for seed in range(2)]
    return edit(pipe, clips, num_inference_steps=1, guidance_scale=1.0, output_type="pt")


@pytest.fixture(scope="module")
def by_tiles(folder):
    return edit_by_tiles(load(folder))


@pytest.mark.parametrize("mode", ["model", "sequential", "block_level", "leaf_level", "disk"])
def test_tiled_and_sliced_vae_gives_the_same_under_offloading(folder, by_tiles, tmp_path, mode):
    pipe = load(folder)
    apply_offloading(pipe, mode, tmp_path)
    assert_same(edit_by_tiles(pipe), by_tiles)


def apply_offloading(pipe, mode, path):
    if mode == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif mode == "sequential":
        from accelerate import cpu_offload

        for model in models_of(pipe).values():
            # What `enable_sequential_cpu_offload` does, but on plain "cpu": accelerate loses parameters on "cpu:0".
            cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)
    else:
        offload = {"offload_to_disk_path": str(path)} if mode == "disk" else {}
        level = "leaf_level" if mode == "disk" else mode
        pipe.enable_group_offload(CPU, offload_type=level, num_blocks_per_group=1, **offload)


# ---- Low precision ----


@pytest.mark.parametrize("name", CLASSES)
def test_layerwise_casting_equals_rounded_weights(folder, name):
    pipe, rounded = load(folder), load(folder)
    component = getattr(pipe, name)
    before = stored_bytes(component)
    casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    if hasattr(component, "enable_layerwise_casting"):
        component.enable_layerwise_casting(**casting)
    elif name == "text_encoder":  # UMT5 asks its `wo` layers for the dtype to compute in, and so gets that of storage
        apply_layerwise_casting(component, **casting, skip_modules_pattern=("norm", "wo"))
    else:
        apply_layerwise_casting(component, **casting)
    assert stored_bytes(component) < 0.75 * before
    state = {key: value.float() for key, value in component.state_dict().items()}
    getattr(rounded, name).load_state_dict(state)
    assert_same(edit(pipe), edit(rounded))


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig()
    names = ("mllm", "text_encoder")
    return {"transformer": TorchAoConfig(config)} | {name: transformers.TorchAoConfig(config) for name in names}


def torchao_int8_of_activations():
    quantization = pytest.importorskip("torchao.quantization")
    return {"transformer": TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())}


def torchao_float8():
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Float8WeightOnlyConfig()
    names = ("mllm", "text_encoder")
    return {"transformer": TorchAoConfig(config)} | {name: transformers.TorchAoConfig(config) for name in names}


def bitsandbytes_int8():
    pytest.importorskip("bitsandbytes")
    return {name: transformers.BitsAndBytesConfig(load_in_8bit=True) for name in ("mllm", "text_encoder")}


def bitsandbytes_nf4():
    pytest.importorskip("bitsandbytes")
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return {name: transformers.BitsAndBytesConfig(**config) for name in ("mllm", "text_encoder")}


@pytest.fixture(autouse=True)
def layers_of_any_width_in_4_bits(monkeypatch):
    """On CPUs with AVX-512's bfloat16, bitsandbytes packs 4-bit weights for a kernel that takes multiples of 32."""
    if "bitsandbytes" in sys.modules:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


QUANTIZATIONS = [torchao_int8, torchao_int8_of_activations, torchao_float8, bitsandbytes_int8, bitsandbytes_nf4]
LINEAR = {
    "transformer": "blocks.1.attn2.add_v_proj",
    "mllm": "model.language_model.layers.0.mlp.up_proj",
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.q",
}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantized_components_are_small_and_edit_alike(folder, plain, quantization):
    mapping = quantization()
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    pipe = load(folder, dtype=torch.float32, quantization_config=config)
    for name in mapping:
        weights = [getattr(owner, name).get_submodule(LINEAR[name]).weight for owner in (pipe, plain)]
        assert stored_bytes_of(weights[0]) < 0.5 * stored_bytes_of(weights[1]), name
    assert_near(edit(pipe), edit(plain), atol=0.25)
    assert_encodes_alike(pipe, plain)


def assert_encodes_alike(pipe, plain):
    """An edit of these untrained models would hardly show another text."""
    for encoded in zip(*(encode(each) for each in (pipe, plain)), strict=True):
        found, expected = (each.float().flatten() for each in encoded)
        assert torch.cosine_similarity(found, expected, dim=0) > 0.95


@torch.no_grad()
def encode(pipe):
    (text, _), tokens = pipe.encode_prompt("make it red"), pipe.encode_tokens([make_clip()], ["make it red"])
    length = int(text.any(-1).sum())  # what follows is padding
    return [text[:, :length], *tokens[:2]]


def stored_bytes_of(weight):
    holder = torch.nn.Module()
    holder.register_parameter("weight", weight)
    return stored_bytes(holder)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantized_pipeline_is_saved_and_loaded(folder, tmp_path, quantization):
    mapping = quantization()
    pipe = load(folder, dtype=torch.float32, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.float32)  # torchao takes bfloat16 otherwise
    for name in mapping:
        weights = [getattr(owner, name).get_submodule(LINEAR[name]).weight for owner in (pipe, loaded)]
        assert type(weights[0]) is type(weights[1]) and stored_bytes_of(weights[0]) == stored_bytes_of(weights[1])
    assert_same(edit(loaded), edit(pipe))


def test_quantization_backend_by_name(folder, plain):
    pytest.importorskip("bitsandbytes")
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True},
        components_to_quantize=["mllm", "text_encoder"],
    )
    pipe = load(folder, quantization_config=config)
    assert pipe.mllm.is_loaded_in_4bit and pipe.text_encoder.is_loaded_in_4bit
    assert_near(edit(pipe), edit(plain), atol=0.25)
    assert_encodes_alike(pipe, plain)


# ---- Compilation ----


def test_compiled_transformer_serves_all_passes_and_steps_with_one_graph(folder, plain, compiler):
    pipe = load(folder)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            result = edit(pipe, num_inference_steps=3, **THREE_PASSES)
    assert compiler["unique_graphs"] == 1
    assert_same(result, edit(plain, num_inference_steps=3, **THREE_PASSES))


def test_repeated_blocks_compile_once_for_each_routing_in_an_edit(folder, plain, compiler):
    pipe = load(folder)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    result = edit(pipe, num_inference_steps=3, **THREE_PASSES)
    assert compiler["unique_graphs"] == 2
    assert_same(result, edit(plain, num_inference_steps=3, **THREE_PASSES))


@pytest.mark.slow
def test_transformer_compiled_to_machine_code_gives_the_same_edit(folder, plain, compiler):
    pipe = load(folder)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)
    result = edit(pipe, **THREE_PASSES)
    torch.testing.assert_close(result, edit(plain, **THREE_PASSES), atol=1e-4, rtol=0)


# ---- Caches ----


ATTENTIONS = [r"blocks\.\d+\.attn[12]"]
ALWAYS = (-1, 1001)  # outside every timestep


def broadcast(pipe, every):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        cross_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=ALWAYS,
        cross_attention_timestep_skip_range=ALWAYS,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


NEUTRAL = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.0),
    "taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=1, cache_identifiers=ATTENTIONS),
    "taylor lite": lambda pipe: TaylorSeerCacheConfig(cache_interval=1, use_lite_mode=True),
    "mag": lambda pipe: MagCacheConfig(threshold=0.0, num_inference_steps=5, mag_ratios=[1.1] * 5),
    "mag calibration": lambda pipe: MagCacheConfig(calibrate=True, num_inference_steps=5),
    "sea": lambda pipe: SeaCacheConfig(threshold=0.0),
    "broadcast": lambda pipe: broadcast(pipe, every=1),
    "text": lambda pipe: TextKVCacheConfig(),  # for one other model (hooks/text_kv_cache.py:167): nothing to cache
}
# and, of 5 steps, those in which the last block's attentions and feed-forward run
STRONG = {
    "first block": (lambda pipe: FirstBlockCacheConfig(threshold=1e6), 1, 1),
    "taylor": (
        lambda pipe: TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, cache_identifiers=ATTENTIONS
        ),
        3,
        5,
    ),
    "taylor lite": (
        lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, use_lite_mode=True),
        3,
        3,
    ),
    "mag": (
        lambda pipe: MagCacheConfig(
            threshold=1e6, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=5, mag_ratios=[1.0] * 5
        ),
        2,
        2,
    ),
    "sea": (lambda pipe: SeaCacheConfig(threshold=1e6, residual_order=0, max_consecutive_cached=0), 2, 2),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_cache_at_a_neutral_setting_is_exact(folder, name):
    pipe = load(folder)
    expected = edit(pipe, num_inference_steps=5, **THREE_PASSES)
    pipe.transformer.enable_cache(NEUTRAL[name](pipe))
    assert torch.equal(edit(pipe, num_inference_steps=5, **THREE_PASSES), expected)
    pipe.transformer.disable_cache()
    assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize("name", STRONG)
def test_strong_cache_skips_work_and_starts_anew_with_each_edit(folder, name):
    pipe = load(folder)
    plain = edit(pipe, num_inference_steps=5, **THREE_PASSES)
    config, attention_steps, feed_forward_steps = STRONG[name]
    block = pipe.transformer.blocks[-1]
    calls = [Calls(module) for module in (block.attn1.to_q, block.attn2.to_q, block.ffn)]
    pipe.transformer.enable_cache(config(pipe))
    first = edit(pipe, num_inference_steps=5, **THREE_PASSES)
    passes = [3 * steps for steps in (attention_steps, attention_steps, feed_forward_steps)]
    assert [each.count for each in calls] == passes
    assert torch.equal(edit(pipe, num_inference_steps=5, **THREE_PASSES), first)
    assert [each.count for each in calls] == [2 * count for count in passes]
    pipe.transformer.disable_cache()
    assert_near(first, plain, atol=0.5)
    assert torch.equal(edit(pipe, num_inference_steps=5, **THREE_PASSES), plain)


@pytest.mark.parametrize("name", STRONG)
def test_cached_passes_do_not_see_each_other(folder, name):
    pipe = load(folder)
    pipe.transformer.enable_cache(STRONG[name][0](pipe))
    alone = edit(pipe, num_inference_steps=5, **ONE_PASS)
    # Three passes, of which the guided ones weigh next to nothing.
    together = edit(pipe, num_inference_steps=5, guidance_scale=1.0, source_guidance_scale=1.0 + 1e-7)
    assert_same(together, alone)


def test_attention_broadcast_skips_attention_of_edits_without_guidance(folder):
    pipe = load(folder)
    plain = edit(pipe, num_inference_steps=4, **ONE_PASS)
    block = pipe.transformer.blocks[-1]
    calls = [Calls(module) for module in (block.attn1.to_q, block.attn2.to_q, block.ffn)]
    pipe.transformer.enable_cache(broadcast(pipe, every=2))
    first = edit(pipe, num_inference_steps=4, **ONE_PASS)
    assert [each.count for each in calls] == [2, 2, 4]
    assert torch.equal(edit(pipe, num_inference_steps=4, **ONE_PASS), first)
    assert_near(first, plain, atol=0.1)


def test_faster_cache_skips_self_attention_of_edits_without_guidance(folder):
    pipe = load(folder)
    plain = edit(pipe, num_inference_steps=4, **ONE_PASS)
    block = pipe.transformer.blocks[-1]
    calls = [Calls(module) for module in (block.attn1.to_q, block.attn2.to_q, block.ffn)]
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 950),  # the first step fills the cache
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    pipe.transformer.enable_cache(config)
    first = edit(pipe, num_inference_steps=4, **ONE_PASS)
    assert [each.count for each in calls] == [2, 4, 4]
    assert torch.equal(edit(pipe, num_inference_steps=4, **ONE_PASS), first)
    assert_near(first, plain, atol=0.1)


def build_wan_like(name):
    """A transformer and its arguments: diffusers' own Wan, or ours with its blocks."""
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }
    if name == "wan":
        return build_wan_transformer(), inputs
    config = build_wan_transformer().config
    routing = {"shallow_tokens": ("text",), "deep_tokens": ("text",)}
    names = ("num_attention_heads", "attention_head_dim", "text_dim", "freq_dim", "ffn_dim", "num_layers")
    sizes = {each: config[each] for each in (*names, "rope_max_seq_len")}
    return RVEDiTTransformer3DModel(**sizes, **routing).eval(), inputs


@pytest.mark.parametrize("name", ["wan", "rvedit"])
@torch.no_grad()
def test_attention_broadcast_takes_a_second_pass_for_a_second_step_as_with_wan(name):
    model, inputs = build_wan_like(name)
    calls = Calls(model.blocks[0].attn1.to_q)
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: inputs["timestep"]
        )
    )
    for context in ("cond", "uncond"):
        with model.cache_context(context):
            model(**inputs)
    assert calls.count == 1


@pytest.mark.parametrize("name", ["wan", "rvedit"])
@torch.no_grad()
def test_faster_cache_needs_both_passes_in_one_batch_as_with_wan(name):
    model, inputs = build_wan_like(name)
    model.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: inputs["timestep"]))
    with model.cache_context("cond"), pytest.raises(IndexError):
        model(**inputs)


@pytest.mark.parametrize("name", ["wan", "rvedit"])
def test_taylor_cache_without_identifiers_finds_no_layer_as_with_wan(name):
    model, _ = build_wan_like(name)
    model.enable_cache(TaylorSeerCacheConfig())
    assert not any(module._diffusers_hook.hooks for module in model.modules() if hasattr(module, "_diffusers_hook"))


# ---- Attention, parallelism ----


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "flex"])
def test_attention_backends_give_the_same_edit(folder, plain, backend):
    pipe = load(folder)
    with attention_backend("native"):  # restores the process-wide backend, which `set_attention_backend` also sets
        pipe.transformer.set_attention_backend(backend)
        processors = pipe.transformer.attn_processors.values()
        assert {processor._attention_backend for processor in processors} == {backend}
        assert_same(edit(pipe), edit(plain))


@pytest.fixture(scope="module")
def two_ranks(folder, plain, tmp_path_factory):
    """What the two ranks of tests/parallel_worker.py wrote, and the arguments of their passes."""
    output = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    dim = 24
    inputs = {
        "hidden_states": torch.randn(2, 16, 2, 4, 4),
        "timestep": torch.rand(2, 8) * 1000,
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "edit_hidden_states": torch.randn(2, 4, dim),
        "visual_hidden_states": torch.randn(2, 5, dim),
        "visual_positions": torch.rand(2, 5, 3),
        "source_hidden_states": torch.randn(2, 16, 2, 4, 4),
    }
    torch.save(inputs, output / "inputs.pt")
    worker = Path(__file__).with_name("parallel_worker.py")
    command = [sys.executable, worker, folder, output / "inputs.pt", output]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return inputs, [torch.load(output / f"{rank}.pt") for rank in range(2)]


def test_context_parallel_edit_equals_that_of_one_process(two_ranks, plain):
    _, ranks = two_ranks
    expected = edit(plain, **THREE_PASSES)
    for result, *_ in ranks:
        assert_same(result, expected)


@torch.no_grad()
@pytest.mark.parametrize("place, changes", [(1, {}), (2, {"visual_hidden_states": None})], ids=["all", "no visual"])
def test_context_parallel_timesteps_of_tokens_equal_plain(two_ranks, plain, place, changes):
    inputs, ranks = two_ranks
    expected = plain.transformer(**inputs | changes).sample
    for results in ranks:
        assert_same(results[place], expected)


# ---- LoRA, EMA ----


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two adapters of different rank: folders, and edits with either loaded plainly."""
    adapters = []
    for seed, rank, alpha in ((1, 4, 12), (2, 8, 8)):
        path = tmp_path_factory.mktemp(f"lora{seed}")
        pipe = load(folder)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=["to_q", "to_k", "to_v", "to_out.0", "add_v_proj"],
            init_lora_weights=False,
        )
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(config)
        pipe.save_lora_weights(path, pipe.transformer)
        loaded = load(folder)
        loaded.load_lora_weights(path)
        adapters.append((path, edit(loaded)))
    assert (adapters[0][1] - adapters[1][1]).abs().max() > 0.1
    return adapters


@pytest.mark.parametrize("compiled", [False, True])
def test_hotswapped_adapter_equals_the_same_loaded_plainly(folder, adapters, compiler, compiled):
    pipe = load(folder)
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(adapters[0][0], adapter_name="style")
    if compiled:
        pipe.transformer.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(edit(pipe), adapters[0][1])
        pipe.load_lora_weights(adapters[1][0], adapter_name="style", hotswap=True)
        assert pipe.get_list_adapters() == {"transformer": ["style"]}
        assert_same(edit(pipe), adapters[1][1])
    assert compiler["unique_graphs"] == int(compiled)


def test_ema_is_saved_and_loaded_with_the_model_class(folder, tmp_path):
    transformer = RVEDiTTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    ema = EMAModel(
        transformer.parameters(), decay=0.5, model_cls=RVEDiTTransformer3DModel, model_config=transformer.config
    )
    for _ in range(2):  # the first takes the weights as they are
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(1.0)
        ema.step(transformer.parameters())
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, RVEDiTTransformer3DModel)
    assert loaded.decay == 0.5 and loaded.optimization_step == 2
    for average, expected, latest in zip(loaded.shadow_params, ema.shadow_params, transformer.parameters()):
        assert torch.equal(average, expected) and not torch.equal(average, latest)


# ---- What a CPU cannot show ----


def assert_same_on_cuda(result, expected):
    torch.testing.assert_close(result.float().cpu(), expected, atol=1e-3, rtol=0)


@pytest.mark.gpu
def test_balanced_device_map_uses_the_accelerator(folder, plain):
    pipe = DiffusionPipeline.from_pretrained(folder, device_map="balanced")
    pipe.set_progress_bar_config(disable=True)
    assert any(model.device.type == "cuda" for model in models_of(pipe).values())
    assert_same_on_cuda(edit(pipe), edit(plain))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPLITTABLE)
def test_auto_device_map_splits_a_component(folder, plain, name):
    size = stored_bytes(getattr(plain, name))
    max_memory = {0: int(size * 0.7), "cpu": 10**9}
    component = CLASSES[name].from_pretrained(folder, subfolder=name, device_map="auto", max_memory=max_memory)
    pipe = load(folder, **{name: component})
    for other, model in models_of(pipe).items():
        if other != name:
            model.to("cuda")
    assert_same_on_cuda(edit(pipe), edit(plain))


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_offload_from_the_accelerator_to_disk(folder, plain, tmp_path, level, streams):
    pipe = load(folder)
    pipe.enable_group_offload(
        "cuda", offload_type=level, num_blocks_per_group=1, use_stream=streams, offload_to_disk_path=str(tmp_path)
    )
    for _ in range(2):
        assert_same_on_cuda(edit(pipe), edit(plain))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_transformer_quantized_by_bitsandbytes(folder, plain, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    pipe = load(folder, quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config}))
    weight = pipe.transformer.get_submodule(LINEAR["transformer"]).weight
    assert weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    pipe.to("cuda")
    result = edit(pipe)
    assert_near(result.cpu(), edit(plain), atol=0.3)
    pipe.save_pretrained(tmp_path)
    assert_same_on_cuda(edit(load(tmp_path).to("cuda")), result.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["_native_cudnn", "_native_efficient", "_native_flash"])
def test_attention_backends_of_the_accelerator(tmp_path, backend):
    folder = save_converted(tmp_path, trained=True, attention_head_dim=16)  # a multiple of 8, which two of them need
    pipe = load(folder, dtype=torch.bfloat16).to("cuda")
    expected = edit(pipe)
    with attention_backend("native"):
        pipe.transformer.set_attention_backend(backend)
        torch.testing.assert_close(edit(pipe), expected, atol=0.1, rtol=0)
