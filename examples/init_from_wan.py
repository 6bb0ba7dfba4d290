"""Make an RVEDiT pipeline of a Wan text-to-video model and a Qwen-VL.

    python examples/init_from_wan.py --wan Wan-AI/Wan2.1-T2V-1.3B-Diffusers --mllm Qwen/Qwen2.5-VL-3B-Instruct \
        --output models/rvedit-1.3b --dtype bfloat16

It is no editor until it has been trained: see examples/train.py, and its `--stage connect` for the first step.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from rvedit_diffusers.conversion import convert, describe_parameters, plan_conversion


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wan", required=True, help="Hub id or folder of a Wan pipeline in diffusers' layout")
    parser.add_argument("--mllm", required=True, help="Hub id or folder of a Qwen2.5-VL or Qwen3-VL")
    parser.add_argument("--output", type=Path, help="folder for the pipeline; needed but for --dry_run")
    parser.add_argument("--num_edit_tokens", type=int, default=64, help="learnable queries in the MLLM's context")
    parser.add_argument("--num_shallow_blocks", type=int, help="blocks that read them; default: a third of all")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of transformer and distiller; auto: the base's own, and float32 for the distiller",
    )
    parser.add_argument("--link", action="store_true", help="link to the bases' weights instead of copying them")
    parser.add_argument("--max_shard_size", default="5GB", help="of the transformer's files, and so of memory")
    parser.add_argument("--seed", type=int, default=0, help="of what begins at random")
    parser.add_argument("--dry_run", action="store_true", help="print the table of parameters and end")
    args = parser.parse_args(argv)
    if args.output is None and not args.dry_run:
        parser.error("--output is required")

    try:
        conversion = plan_conversion(args.wan, args.mllm, args.num_edit_tokens, args.num_shallow_blocks)
        print(describe_parameters(conversion.parameters))
        if not args.dry_run:
            convert(conversion, args.output, DTYPES[args.dtype], args.link, args.max_shard_size, args.seed)
            print(f"{args.output} is an RVEDiT pipeline; it is yet to be trained")
    except (OSError, SafetensorError, ValueError) as error:
        print(f"init_from_wan.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
