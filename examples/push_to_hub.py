"""
Upload a pipeline, or LoRA weights, to the Hub:

    python examples/push_to_hub.py my-pipeline me/my-pipeline --remote_code

DIR is checked first. A repository that holds an RVEDiT pipeline is brought up to date; one with anything else is left
alone. An upload that was interrupted goes on when the same command is run again.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from rvedit_diffusers.hub import check_folder, export_folder, open_repository, upload


class Parser(argparse.ArgumentParser):
    def error(self, message: str, status: int = 2):
        self.exit(status, f"{self.prog}: error: {' '.join(message.split())}\n")


def repo_id(text: str) -> str:
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if "/" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has to be a user's or organization's name, a slash and a name")
    return text


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a pipeline's folder, or one of LoRA weights")
    parser.add_argument("repo_id", metavar="REPO_ID", type=repo_id, help="the repository, owner/name; made if need be")
    parser.add_argument(
        "--remote_code",
        action="store_true",
        help="the pipeline's code goes along: it then loads without this package, too, with trust_remote_code=True",
    )
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument(
        "--export_only", metavar="OUT", type=Path, help="write what would be uploaded to this folder, and end"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    hub_logging.set_verbosity_error()  # else a lost connection is told many times before it is told clearly
    try:
        if args.export_only is not None:
            export_folder(args.folder, args.export_only, args.remote_code, args.repo_id)
            print(f"wrote {args.export_only}")
            return
        kind = check_folder(args.folder)
        if args.remote_code and kind == "lora":
            parser.error(f"--remote_code is for pipelines, but {args.folder} holds LoRA weights")
        with tempfile.TemporaryDirectory() as folder:
            trial, whole = Path(folder) / "trial", Path(folder) / "upload"
            export_folder(args.folder, trial, args.remote_code, args.repo_id, link=True)  # before a repository is made
            repository = open_repository(args.repo_id, kind, private=args.private or None)
            if not repository.is_empty:
                print(f"{args.repo_id} exists: it is brought up to date with a new commit")
            export_folder(args.folder, whole, args.remote_code, args.repo_id, repository.card, link=True)
            print(f"uploaded {args.folder}: {upload(whole, repository)}")
    except ConnectionError as error:
        parser.error(str(error), status=1)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
