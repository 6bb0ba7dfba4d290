"""Train and score variants of a small transformer that differ in one thing, and report what it is worth.

    python examples/ablation.py --config examples/ablation.json --output runs/ablation --report docs/ablation.md

The config is a JSON object:

    base         folder of the pipeline whose autoencoder, MLLM and queries all rows share; its transformer is replaced
    transformer  settings of all rows' transformers, over those of the base's; with another width the connectors are
                 new, with another `text_dim` the text encoder is
    start        optional: what weights all rows' transformers begin with, where name and shape agree, but for layers
                 that read tokens, which would favour the routing that they learned for: the folder of a pipeline, or
                 `{"seed": .., "train": {..}}`, a training of the first row's transformer with these options over
                 those of all rows
    train        options of train.py without what is set here: model, output, cache, seed
    evaluate     options of evaluate.py likewise; its levels include L2 to L6
    seeds        of the trainings
    rows         by name: `says`, what it is in a few words, and what it overrides in `transformer` and `train`
    baseline     the row that the others are compared with
    claim        [row, other]: the first is said to beat the second by 5 points of union success on the mean of L2-L6

All rows have as many parameters as the first, within 1 %, by the width of their feed-forward layers; the same pairs in
the same order, named by `data_seed` of `train`, 0 by default; and the same noise and initial weights of a seed.
Runs go seed by seed. The same command goes on with what was stopped, and makes the report again of what is finished;
rows and seeds may be added. What a run leaves is its log, its scores and what it was run with. The report has a JSON
file of the same name beside it with all that it was made of: runs that are in there are not made again, so that it
stands for the folder of runs.
"""

import argparse
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import evaluate
import torch
import train
from edit_video import Parser
from tqdm import tqdm

from rvedit_diffusers.evaluation.ablation import (
    FACTS,
    SETTINGS,
    Ablation,
    Outcome,
    claim_sentence,
    read_outcome,
    read_outcomes,
    write_outcomes,
)
from rvedit_diffusers.evaluation.ablation_grid import Run, plan_runs, plan_start, read_grid
from rvedit_diffusers.evaluation.ablation_report import write_report
from rvedit_diffusers.evaluation.record import write_json
from rvedit_diffusers.files import replace_folder
from rvedit_diffusers.training.options import as_arguments
from rvedit_diffusers.training.variants import build_variant, num_parameters, take_over_weights


SCRIPTS = Path(__file__).parent


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the grid, a JSON file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs; the same one goes on")
    parser.add_argument("--rows", nargs="+", help="run these alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the config's")
    parser.add_argument(
        "--cache_dir", type=Path, help="folder for encoded pairs; default: OUTPUT/cache, removed at last"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="runs at a time, each with one thread, or threads of what is made before them; default: 1",
    )
    parser.add_argument("--keep_weights", action="store_true", help="keep pipelines, checkpoints and clips")
    parser.add_argument("--report", type=Path, help="default: OUTPUT/ablation.md; beside it are a .png and a .json")
    parser.add_argument("--report_only", action="store_true", help="of what is finished; nothing is run")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes has to be at least 1, but is {args.processes}")
    args.report = args.report or args.output / "ablation.md"
    if args.report.suffix != ".md":
        parser.error(f"--report has to end in .md, but is {args.report}")
    args.cache_dir, args.removes_cache = args.cache_dir or args.output / "cache", args.cache_dir is None
    try:
        args.grid = read_grid(args.config)
        for name in args.rows or ():
            if name not in args.grid["rows"]:
                raise ValueError(f"--rows {name}: is none of {', '.join(args.grid['rows'])}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def check_options(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Let the scripts refuse options before anything is trained."""
    for run in {run.row: run for run in runs}.values():
        options = train_options(run, args) | {"model": args.grid["base"], "output": args.output / "none"}
        train.parse_args(as_arguments(options))
        parser = evaluate.build_parser()
        found = parser.parse_args(as_arguments(evaluate_options(run) | {"model": args.grid["base"]}))
        evaluate.fill_in(found)
        evaluate.check_arguments(parser, found)
        try:
            evaluate.synthetic_suites(found)
        except ValueError as error:
            parser.error(str(error))


def train_options(run: Run, args: argparse.Namespace) -> dict:
    return run.settings["train"] | {
        "model": run.folder / "init",
        "output": run.folder,
        "cache_dir": args.cache_dir,
        "seed": run.seed,
        "resume_from_checkpoint": "latest",
    }


def evaluate_options(run: Run) -> dict:
    options = run.settings["evaluate"] | {"model": run.folder / "pipeline", "output": run.folder / "scores"}
    return options | {"levels": ",".join(options["levels"])}


class Machine:
    """Runs scripts as processes, which end with this one; and what it is."""

    def __init__(self, lock: int):
        self.lock, self.children, self.is_stopped = lock, set(), False

    def call(self, script: str, options: dict, log: Path, num_threads: int = 1) -> None:
        """Run a script of this folder to its end; what it prints is added to a file.

        Raises:
            RuntimeError: It failed.
        """
        if self.is_stopped:
            raise RuntimeError("stopped")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(SCRIPTS / script), *as_arguments(options)]
        with open(log, "ab") as file:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(num_threads)},
                pass_fds=(self.lock,),  # held as long as one of them lives, should this process be killed
            )
            self.children.add(child)
            if self.is_stopped:
                child.terminate()
            status = child.wait()
            self.children.discard(child)
        if status:
            lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            raise RuntimeError(f"{script} ended with status {status}: {last.strip()} (see {log})")

    def stop(self) -> None:
        self.is_stopped = True
        for child in list(self.children):
            child.terminate()

    @staticmethod
    def facts() -> dict[str, str]:
        name = platform.processor() or platform.machine()
        if (info := Path("/proc/cpuinfo")).is_file():
            found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
            name = found[1] if found else name
        facts = {"CPU": name, "cores": str(os.cpu_count()), "threads a run": "1"}
        if torch.cuda.is_available():
            facts["GPU"] = torch.cuda.get_device_name()
        return facts | {"Python": platform.python_version(), "torch": torch.__version__}


building = threading.Lock()  # one at a time: initial weights are drawn from the global random state


def prepare(run: Run, args: argparse.Namespace, start: Path | None) -> None:
    """Write what a run begins with, and with which settings."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / SETTINGS, run.settings)
    if (run.folder / "init").is_dir():
        return
    with building:
        pipe = build_variant(args.grid["base"], run.settings["transformer"], run.seed)
        taken = {} if start is None else {"transformer": take_over_weights(pipe.transformer, start)}
        partial = run.folder / "init.partial"
        shutil.rmtree(partial, ignore_errors=True)
        pipe.save_pretrained(partial)
        write_json(run.folder / "taken.json", taken)
        replace_folder(partial, run.folder / "init")


def perform(run: Run, args: argparse.Namespace, machine: Machine, start: Path | None) -> None:
    """Train and score a run, from where it was stopped."""
    if not run.is_trained:
        prepare(run, args, start)
        machine.call("train.py", train_options(run, args), run.folder / "train.log")
    machine.call("evaluate.py", evaluate_options(run), run.folder / "evaluate.log")
    facts = {
        "parameters": num_parameters(run.settings["transformer"]),
        "ffn_dim": run.settings["transformer"]["ffn_dim"],
        "taken": json.loads((run.folder / "taken.json").read_text()),
        "machine": machine.facts(),
    }
    write_json(run.folder / FACTS, facts)


def clean(run: Run) -> None:
    """Remove what a finished run is not read for."""
    for path in [*run.folder.glob("checkpoint-*"), *(run.folder / n for n in ("init", "pipeline", "scores/clips"))]:
        shutil.rmtree(path, ignore_errors=True)


def perform_all(runs: Sequence[Run], args: argparse.Namespace, machine: Machine, first_run: Run | None) -> list[str]:
    """Perform runs, several at a time, in order, after the one that they begin with; what failed, a line each."""
    pending, failed = [run for run in runs if not run.is_finished], []
    start = args.grid.get("start") if first_run is None else first_run.folder / "pipeline"
    bar = tqdm(total=sum(run.size for run in runs), initial=sum(run.progress for run in runs), unit="step")
    executor = ThreadPoolExecutor(args.processes)
    try:
        first = next((run for run in pending if not run.is_trained), None)
        if first is not None:
            try:
                if first_run is not None and not first_run.is_trained:
                    bar.set_postfix_str("training what all begin with")
                    prepare(first_run, args, None)
                    machine.call(
                        "train.py", train_options(first_run, args), first_run.folder / "train.log", args.processes
                    )
                bar.set_postfix_str("encoding pairs")
                prepare(first, args, start)
                options = train_options(first, args) | {"output": args.cache_dir, "encode_only": True}
                options["resume_from_checkpoint"] = None
                machine.call("train.py", options, args.output / "encode.log", args.processes)
            except RuntimeError as error:
                return [f"before the rows: {error}"]
            bar.unpause()
        futures = {executor.submit(perform, run, args, machine, start): run for run in pending}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                run = futures[future]
                if (error := future.exception()) is not None:
                    failed.append(f"{run.name}: {error}")
                    bar.write(f"failed: {failed[-1]}")
                elif not args.keep_weights:
                    clean(run)
            bar.n = sum(run.progress for run in runs)
            bar.set_postfix_str(f"{sum(run.is_finished for run in runs)} of {len(runs)} runs", refresh=False)
            bar.refresh()
    finally:
        machine.stop()
        executor.shutdown(cancel_futures=True)
        bar.close()
    return failed


def report(args: argparse.Namespace, runs: Sequence[Run], known: dict[tuple[str, int], Outcome], num_missing: int):
    """Write the report of the runs that are finished or known, in the order of the config's rows.

    Raises:
        ValueError: None is.
    """
    names = list(args.grid["rows"])
    outcomes = [
        read_outcome(run.folder, run.row, run.seed) or known.get((run.row, run.seed))
        for run in sorted(runs, key=lambda run: names.index(run.row))
    ]
    outcomes = [outcome for outcome in outcomes if outcome is not None]
    if not outcomes:
        raise ValueError(f"{args.output} holds no finished run to report")
    ablation = Ablation(outcomes, args.grid["baseline"])
    command = ["python", "examples/ablation.py", "--config", args.config, "--output", args.output]
    command = shlex.join(map(str, [*command, "--report", args.report]))
    says = {name: row["says"] for name, row in args.grid["rows"].items()}
    args.report.parent.mkdir(parents=True, exist_ok=True)
    others = [outcome for (row, _), outcome in known.items() if row not in names]  # of another grid: none is lost
    write_outcomes(args.report.with_suffix(".json"), [*outcomes, *others])
    write_report(args.report, ablation, says, tuple(args.grid["claim"]), command, num_missing)
    print(claim_sentence(ablation, *args.grid["claim"]))
    print(f"wrote {args.report} and {args.report.with_suffix('.png')}")


def fail(message: str, status: int = 2) -> None:
    print(f"ablation.py: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    seeds = list(dict.fromkeys(args.seeds or args.grid["seeds"]))
    try:
        record = args.report.with_suffix(".json")
        known = read_outcomes(record)
        runs = plan_runs(args.grid, args.output, seeds, [seed for row, seed in known])
        first_run = plan_start(args.grid, args.output, runs[0])
        for run in [*runs, *([first_run] if first_run else [])]:
            outcome = known.get((run.row, run.seed))
            run.check(None if outcome is None else outcome.settings, record)
    except (OSError, ValueError) as error:
        fail(str(error))
    check_options(args, [*runs, *([first_run] if first_run else [])])
    planned = [run for run in runs if run.seed in seeds and (run.row, run.seed) not in known]
    failed = []
    if not args.report_only:
        args.output.mkdir(parents=True, exist_ok=True)
        with open(args.output / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                fail(f"--output {args.output} is in use by another process")
            wanted = [run for run in planned if args.rows is None or run.row in args.rows]
            failed = perform_all(wanted, args, Machine(lock.fileno()), first_run)
    missing = [run for run in planned if not run.is_finished]
    if args.removes_cache and not (missing or args.keep_weights or args.report_only):
        shutil.rmtree(args.cache_dir, ignore_errors=True)
    try:
        report(args, runs, known, len(missing))
    except ValueError as error:
        fail("; ".join([str(error), *failed]), 1)
    if failed:
        fail(f"{len(failed)} runs failed: {'; '.join(failed)}", 1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending the runs
    main()
