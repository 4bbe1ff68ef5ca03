"""Residuals in checkpoints of torch.distributed.checkpoint, written while training goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.nn.parallel import DistributedDataParallel as DDP
from training import network, train

from pykernels import comm

PROGRAM = Path(__file__).with_name("elastic.py")
FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # else a restarted rank may read a dead one's address (torch 2.13)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def made(codec: str) -> tuple[DDP, dict[str, Any], Any]:
    model = DDP(network(), bucket_cap_mb=0.03)
    handle = comm.register(model, codec)
    return model, {"model": model.module.state_dict(), "comm": comm.PerRank(handle)}, handle


def saved_and_resumed(rank: int, folder: str, codec: str) -> tuple[bool, bool, bool]:
    """Whether a resumed run has the bits of one that went on; the same without residuals; whether they came back."""
    model, state, handle = made(codec)
    train(model, rank, range(4))
    kept = handle.state_dict()["worker"]
    writing = dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group(backend="gloo"))
    train(model, rank, range(4, 8))
    writing.result()
    answers = []
    for parts in (("model", "comm"), ("model",)):
        again, state, handle = made(codec)
        dcp.load({part: state[part] for part in parts}, checkpoint_id=folder)
        if "comm" in parts:
            back = handle.state_dict()["worker"]
            same = back.keys() == kept.keys() and all(torch.equal(back[name], kept[name]) for name in kept)
        train(again, rank, range(4, 8))
        answers.append(torch.equal(weights(again), weights(model)))
    return answers[0], answers[1], same


def more_ranks(rank: int, folder: str, codec: str) -> tuple[bool, bool]:
    """Whether residuals came back; whether ranks agree after a step."""
    model, state, handle = made(codec)
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    came = any(bool(values.any()) for values in handle.state_dict()["worker"].values())
    train(model, rank, range(4, 5))
    mine = weights(model)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return came, all(torch.equal(mine, other) for other in theirs)


def test_a_run_resumed_from_a_checkpoint_written_aside_has_the_same_bits(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    assert run_ranks(2, saved_and_resumed, folder, "onebit") == [(True, False, True)] * 2
    assert run_ranks(3, more_ranks, folder, "onebit") == [(True, True), (True, True), (False, True)]


def run(folder: Path, *options: str) -> tuple[torch.Tensor, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(PROGRAM), str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", FRESH_STORE: "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "weights.pt"), done.stdout


@pytest.mark.slow
def test_a_job_that_torchrun_started_again_ends_with_the_bits_of_one_that_lost_no_rank(tmp_path: Path) -> None:
    whole, said = run(tmp_path / "whole")
    assert "resumed" not in said
    again, said = run(tmp_path / "killed", "--kill-at", "9")
    assert "resumed from step" in said
    assert torch.equal(whole, again)


def damaged(rank: int, codec: str) -> list[str]:
    """What is said of states that are not what was saved; the last is of the good one, loaded after all of them."""
    model, _, handle = made(codec)
    train(model, rank, range(2))
    good, kept = handle.state_dict(), comm.PerRank(handle).state_dict()
    name = next(iter(good["worker"]))
    size, residual = good["worker"][name].numel(), good["worker"][name]
    bad: list[Any] = [
        *({key: value for key, value in good.items() if key != lost} for lost in ("codec", "worker", "shard")),
        {**good, "worker": 3},
        {**good, "worker": {name: residual[1:]}},
        {**good, "worker": {"other": residual}},
        {**good, "worker": {name: torch.full_like(residual, float("nan"))}},
        {**good, "shard": {name: [(size - 1, residual[:2])]}},
        {**good, "shard": {name: [(0, "bytes")]}},
    ]
    said = []
    for state in bad:
        with pytest.raises(ValueError, match="pykernels: state_dict: ") as raised:
            handle.load_state_dict(state)
        said.append(str(raised.value).removeprefix("pykernels: state_dict: "))
    mine = f"rank-{rank}"
    for entry in ({}, {"rank-7": b""}, {mine: kept[mine][:-100]}, {mine: b"garbage"}):
        with pytest.raises(ValueError, match=mine) as raised:
            comm.PerRank(handle).load_state_dict(entry)
        said.append(str(raised.value))
    comm.PerRank(handle).load_state_dict(kept)
    back = handle.state_dict()["worker"]
    assert all(torch.equal(back[name], good["worker"][name]) for name in back)
    train(model, rank, range(2, 3))  # together, after all of this
    return said


def test_a_damaged_checkpoint_is_refused_before_anything_is_taken_over() -> None:
    for said in run_ranks(2, damaged, "onebit"):
        assert said[:3] == [f"lacks {key}: it is damaged" for key in ("codec", "worker", "shard")]
        assert "worker or shard is not what state_dict gave" in said[3]
        assert "14999 elements, in the model 15000" in said[4] and "other has 15000 elements" in said[5]
        assert "0.weight is no tensor of finite floats" in said[6]
        assert "2 elements from 14999, in the model 15000" in said[7] and "no tensor of finite floats" in said[8]
        assert "only none" in said[9] and "only rank-7" in said[10]
        assert "is damaged" in said[11] and "is damaged" in said[12]
