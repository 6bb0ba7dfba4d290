"""Complete tiny pipelines of the real classes with random weights, no download."""

import copy
import functools
import tempfile

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from rvedit_diffusers import RVEDiTPipeline, RVEDiTProcessor, RVEDiTTokenDistiller, RVEDiTTransformer3DModel
from rvedit_diffusers.tiny import build_text_tokenizer, save_tiny_mllm


NUM_FRAMES, HEIGHT, WIDTH = 5, 32, 32
NUM_EDIT_TOKENS = 4
TEXT_DIM, DIM = 16, 24


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def build_transformer(**config) -> RVEDiTTransformer3DModel:
    transformer = RVEDiTTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": DIM // 2,
            "text_dim": TEXT_DIM,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "num_shallow_blocks": 1,
            "rope_max_seq_len": 32,
        }
        | config
    ).eval()
    # A new model ignores its source and its visual tokens, whose projections start at zero: a trained one does not.
    with torch.no_grad():
        for name, parameter in sorted(transformer.named_parameters(), key=lambda item: item[0] == "edit_bias"):
            if not parameter.any():  # the editing tokens' origin last, and small beside the tokens
                parameter.normal_(std=0.01 if name == "edit_bias" else 0.05)
    return transformer


def build_components(family: str = "qwen2_5_vl", **transformer_config) -> dict:
    """
    All components of a tiny [`RVEDiTPipeline`], deterministic, in float32 and eval mode.

    Args:
        family: `"qwen2_5_vl"` or `"qwen3_vl"`.
        transformer_config: Overrides of the transformer's configuration.
    """
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        mllm, _ = save_tiny_mllm(folder, family, hidden_size=32, num_layers=2, vision_depth=1)
        processor = RVEDiTProcessor.from_mllm(
            folder, num_edit_tokens=NUM_EDIT_TOKENS, max_frames=4, max_pixels=32 * 32, min_pixels=16 * 16
        )
        tokenizer = build_text_tokenizer()
        return {
            "tokenizer": tokenizer,
            "text_encoder": build_text_encoder(len(tokenizer)),
            "processor": processor,
            "mllm": mllm,
            "distiller": RVEDiTTokenDistiller(32, DIM, NUM_EDIT_TOKENS).eval(),
            "vae": build_vae(),
            "transformer": build_transformer(**transformer_config),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }


@functools.cache
def _cached_components(family: str, transformer_config: tuple) -> dict:
    return build_components(family, **dict(transformer_config))


def build_pipeline(family: str = "qwen2_5_vl", **transformer_config) -> RVEDiTPipeline:
    """
    A tiny [`RVEDiTPipeline`] that the caller owns: a copy of components built once a session.

    Without arguments of its own a call of it takes 2 steps with guidance.
    """
    components = copy.deepcopy(_cached_components(family, tuple(sorted(transformer_config.items()))))
    pipe = RVEDiTPipeline(**components, default_num_inference_steps=2, default_guidance_scale=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_clip(num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """A bright square that moves over a gradient, uint8 `(num_frames, height, width, 3)`."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    background = np.stack([rows * 120 // height, columns * 120 // width, rows * 0 + 60], axis=-1)
    clip = np.repeat(background[None], num_frames, axis=0).astype(np.uint8)
    colour, size = rng.integers(128, 256, 3), max(height // 3, 1)
    for index in range(num_frames):
        left = index * max(width - size, 0) // max(num_frames - 1, 1)
        clip[index, size : 2 * size, left : left + size] = colour
    return clip


class Calls:
    """Counts forward passes of a module."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_pre_hook(self.add)

    def add(self, *args):
        self.count += 1
