"""
One edit, and passes with timesteps of tokens, by two processes: `parallel_worker.py PIPELINE INPUTS OUTPUT`.

INPUTS holds the transformer's arguments. Rank `r` writes the edit, the sample and that without visual tokens to
`OUTPUT/r.pt`.
"""

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
from components import make_clip
from diffusers import ContextParallelConfig

from rvedit_diffusers import RVEDiTPipeline


@torch.no_grad()
def run(rank: int, pipeline: str, inputs: str, output: str, port) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(minutes=5)
    # Rank 0 takes any free port and tells it: no port is chosen first and bound later, no file is shared.
    is_master = rank == 0
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0 if is_master else port.get(), 2, is_master, timeout, wait_for_workers=False
    )
    if is_master:
        port.put(store.port)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)

    pipe = RVEDiTPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    torch.accelerator.device_count = lambda: 2  # `enable_parallelism` divides by it, also on CPUs
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    edit = pipe(
        make_clip(),
        "make the red ball blue",
        num_inference_steps=2,
        guidance_scale=3.0,
        source_guidance_scale=1.5,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames
    inputs = torch.load(inputs)
    (sample,) = pipe.transformer(**inputs, return_dict=False)
    (without_visual,) = pipe.transformer(**inputs | {"visual_hidden_states": None}, return_dict=False)
    torch.save((edit, sample, without_visual), Path(output) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = socket.if_nameindex()[0][1]  # loopback: the host's name may not resolve
    # One import serves both. A fork is safe here: nothing has been computed, so no thread runs.
    port = torch.multiprocessing.get_context("fork").SimpleQueue()
    torch.multiprocessing.start_processes(run, (*sys.argv[1:], port), nprocs=2, start_method="fork")
