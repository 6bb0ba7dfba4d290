"""Tiny base models in the layout of the released ones, with random weights: Wan pipelines and Qwen-VL checkpoints."""

import json
from pathlib import Path

import torch
from components import TEXT_DIM, build_text_encoder
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from rvedit_diffusers import RVEDiTTransformer3DModel
from rvedit_diffusers.conversion import convert, plan_conversion
from rvedit_diffusers.tiny import build_text_tokenizer, save_tiny_mllm


WAN_FAMILIES = ("wan2_1", "wan2_2")
# MODEL_INDEX of the released pipelines, without what diffusers writes itself
PUBLISHED_INDEX = {
    "wan2_1": {"tokenizer": ["transformers", "T5TokenizerFast"]},
    "wan2_2": {
        "boundary_ratio": None,
        "expand_timesteps": True,
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer_2": [None, None],
    },
}
FLOW_SHIFT = {"wan2_1": 3.0, "wan2_2": 5.0}


def build_wan_transformer(family: str = "wan2_1", **config) -> WanTransformer3DModel:
    channels = {"wan2_1": 16, "wan2_2": 48}[family]
    return WanTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": channels,
            "out_channels": channels,
            "text_dim": TEXT_DIM,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 3,
            "rope_max_seq_len": 32,
        }
        | config
    ).eval()


def build_wan_vae(family: str) -> AutoencoderKLWan:
    config = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    if family == "wan2_2":
        config |= {
            "base_dim": 4,
            "decoder_base_dim": 4,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.1] * 48,
            "latents_std": [1.5] * 48,
        }
    return AutoencoderKLWan(**config).eval()


def save_wan(
    folder: str | Path, family: str = "wan2_1", max_shard_size: str = "30KB", **transformer_config
) -> WanPipeline:
    """
    Save a tiny Wan pipeline as the released ones lie on the Hub: transformer and text encoder in shards, the scheduler
    a UniPC with flow sigmas, the index as published.

    Args:
        folder: Made if absent.
        family: `"wan2_1"` (16 channels, 8x) or `"wan2_2"` (the 5B: 48 channels, 16x).
        max_shard_size: Of the transformer's files.
        transformer_config: Overrides of the transformer's configuration.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = build_text_tokenizer()
        text_encoder = build_text_encoder(len(tokenizer))
        pipe = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=build_wan_vae(family),
            transformer=build_wan_transformer(family, **transformer_config),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT[family]
            ),
        )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    for name, size in (("transformer", max_shard_size), ("text_encoder", "3KB")):
        for path in (folder / name).glob("*.safetensors"):
            path.unlink()
        getattr(pipe, name).save_pretrained(folder / name, max_shard_size=size)
        assert len(list((folder / name).glob("*-of-*.safetensors"))) > 1
    index = json.loads((folder / "model_index.json").read_text())
    index = {name: value for name, value in index.items() if name not in ("boundary_ratio", "expand_timesteps")}
    index.pop("transformer_2")
    (folder / "model_index.json").write_text(json.dumps(index | PUBLISHED_INDEX[family], indent=2))
    return pipe


def save_qwen(folder: str | Path, family: str = "qwen2_5_vl"):
    """Save a tiny Qwen-VL, its weights in shards; returns model and processor."""
    mllm, processor = save_tiny_mllm(folder, family, hidden_size=32, num_layers=2, vision_depth=1)
    for path in Path(folder).glob("*.safetensors"):
        path.unlink()
    mllm.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(Path(folder).glob("*-of-*.safetensors"))) > 1
    return mllm, processor


def save_converted(
    folder: str | Path,
    wan_family: str = "wan2_1",
    mllm_family: str = "qwen2_5_vl",
    trained: bool = False,
    **transformer_config,
) -> Path:
    """
    Save tiny bases in `folder` and convert them.

    Args:
        folder: Gets `wan`, `mllm` and `pipeline`.
        wan_family, mllm_family: See [`save_wan`] and [`save_qwen`].
        trained: Whether weights that start at zero get random values, as training would give them.
        transformer_config: See [`save_wan`].

    Returns:
        The pipeline's folder.
    """
    folder = Path(folder)
    save_wan(folder / "wan", wan_family, **transformer_config)
    save_qwen(folder / "mllm", mllm_family)
    convert(plan_conversion(folder / "wan", folder / "mllm", num_edit_tokens=4), folder / "pipeline")
    if trained:
        transformer = RVEDiTTransformer3DModel.from_pretrained(folder / "pipeline" / "transformer")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in transformer.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05, generator=generator)
        transformer.save_pretrained(folder / "pipeline" / "transformer")
    return folder / "pipeline"
