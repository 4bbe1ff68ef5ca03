"""A program for torchrun: trains with compressed gradients, writes checkpoints aside, goes on from the newest."""

from __future__ import annotations

import argparse
import gc
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from training import backward, network

from pykernels import comm

STEPS, EVERY = 12, 4


def whole(folder: Path) -> list[Path]:
    """Checkpoints that were finished, the newest last: DCP writes their metadata at the end."""
    return sorted(file.parent for file in folder.glob("step-*/.metadata"))


def train(folder: Path, kill_at: int | None) -> None:
    rank = dist.get_rank()
    aside = dist.new_group(backend="gloo")  # training's own group must not carry both
    model = DistributedDataParallel(network(), bucket_cap_mb=0.03)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    residuals = comm.PerRank(comm.register(model, "onebit"))
    step = 0
    if found := whole(folder):
        weights, momenta = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": momenta, "comm": residuals, "step": step}
        dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=momenta)
        step = state["step"]
        print(f"resumed from step {step}", flush=True)
    writing = None
    while step < STEPS:
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
        step += 1
        if step % EVERY == 0:
            if writing is not None:
                writing.result()
            weights, momenta = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": momenta, "comm": residuals, "step": step}
            writing = dcp.async_save(state, checkpoint_id=folder / f"step-{step:03}", process_group=aside)
        if step == kill_at and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
    assert writing is not None
    writing.result()
    if rank == 0:
        torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), folder / "weights.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    train(options.folder, options.kill_at)
    gc.collect()  # the model goes before its process group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
