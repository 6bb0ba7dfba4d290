"""Put the embedded checkpoint's parts together: trained VAE, MLLM and text encoder, and an editor that is untrained or
another's.

python examples/tiny/build.py --vae runs/vae/vae --mllm runs/mllm --text runs/text --output runs/init
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from transformers import Qwen2_5_VLForConditionalGeneration, T5Tokenizer, UMT5EncoderModel

from rvedit_diffusers import RVEDiTPipeline, RVEDiTProcessor, RVEDiTTokenDistiller, RVEDiTTransformer3DModel
from rvedit_diffusers.transformer_rvedit import TOKEN_STREAMS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="folder of train_vae.py's VAE")
    parser.add_argument("--mllm", type=Path, required=True, help="output folder of train_mllm.py")
    parser.add_argument("--text", type=Path, required=True, help="output folder of train_text.py")
    parser.add_argument(
        "--start", type=Path, help="folder of a pipeline whose transformer and connectors to begin with"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = AutoencoderKLWan.from_pretrained(args.vae)
    distiller = RVEDiTTokenDistiller.from_pretrained(args.mllm / "distiller")
    tokenizer = T5Tokenizer.from_pretrained(args.text / "tokenizer")
    text_encoder = UMT5EncoderModel.from_pretrained(args.text / "text_encoder", dtype=torch.float32)
    num_heads = 4
    transformer = RVEDiTTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=num_heads,
        attention_head_dim=distiller.config.dim // num_heads,
        in_channels=vae.config.z_dim,
        source_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=text_encoder.config.d_model,
        freq_dim=128,
        ffn_dim=3 * distiller.config.dim,
        num_layers=6,
        # docs/ablation.md: at this size no routing edits better
        shallow_tokens=TOKEN_STREAMS,
        deep_tokens=TOKEN_STREAMS,
        rope_max_seq_len=256,
        num_position_freqs=4,  # down to a wave of two of the eight patches of a side
    )
    # the velocity starts at zero
    torch.nn.init.zeros_(transformer.proj_out.weight)
    if args.start is not None:
        started = RVEDiTTransformer3DModel.from_pretrained(args.start / "transformer", torch_dtype=torch.float32)
        loaded = transformer.load_state_dict(started.state_dict(), strict=False)  # it may have read fewer tokens
        if loaded.unexpected_keys:
            parser.error(
                f"--start {args.start} has weights that there is no place for: {loaded.unexpected_keys[0]}, ..."
            )
        connected = RVEDiTTokenDistiller.from_pretrained(args.start / "distiller", torch_dtype=torch.float32)
        connected.queries = distiller.queries
        distiller = connected
    pipe = RVEDiTPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        processor=RVEDiTProcessor.from_pretrained(args.mllm / "processor"),
        mllm=Qwen2_5_VLForConditionalGeneration.from_pretrained(args.mllm / "mllm"),
        distiller=distiller,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        default_num_inference_steps=12,
        default_guidance_scale=2.0,
        default_max_area=64 * 64,
        default_keep_detail=True,
    )
    pipe.save_pretrained(args.output)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            print(f"{name:12s} {sum(p.numel() for p in component.parameters()) / 1e6:6.2f} M parameters")


if __name__ == "__main__":
    main()
