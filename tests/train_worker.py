"""Runs examples/train.py in a process of a launch: `train_worker.py ddp|fsdp2 '[[option, ...], ...]'`."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env


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
    if wrapper == "fsdp2":
        # accelerate shards only where it finds accelerators; told that there are some, it does so on CPUs as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    train.main(argv)
    AcceleratorState._reset_state()
