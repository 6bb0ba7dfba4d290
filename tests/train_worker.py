"""Runs examples/train.py in a process of a launch: `train_worker.py ddp|fsdp2|deepspeed '[[option, ...], ...]'`."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train  # noqa: E402


torch.set_num_threads(1)
PartialState.destroy_process_group = lambda *_: None  # at the end of a run: the next one needs the group
wrapper, runs = sys.argv[1], json.loads(sys.argv[2])
if wrapper == "fsdp2":
    config = EXAMPLES / "accelerate" / "fsdp2.yaml"
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(config), "x"]))
    settings = prepare_multi_gpu_env(options)
    os.environ |= {name: settings[name] for name in settings if name.startswith(("FSDP", "ACCELERATE_USE_FSDP"))}
for argv in runs:
    PartialState(cpu=True)
    if wrapper != "ddp":
        # accelerate shards only where it finds accelerators; told that there are some, it does so on CPUs as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if wrapper == "deepspeed":
        config = EXAMPLES / "accelerate" / "deepspeed_zero2.yaml"
        options, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(config), "x"]))
        options.deepspeed_fields_from_accelerate_config = ""
        settings = prepare_deepspeed_cmd_env(options)[1]
        os.environ |= {name: settings[name] for name in settings if name.startswith("ACCELERATE")}
        train.Accelerator = lambda cpu, **settings: Accelerator(**settings)
    train.main(argv)
    AcceleratorState._reset_state()
# left to the interpreter's end, its threads may still run then, which aborts the process
torch.distributed.barrier()
torch.distributed.destroy_process_group()
