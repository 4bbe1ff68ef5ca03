"""What goes wrong in a cluster: ranks that die, that come back in other numbers, that send damaged bytes, that were set
up differently. Nothing may hang, and what is said names the rank or the parameter.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from training import backward, gradients, network, same_everywhere, train

from pykernels import comm
from pykernels.comm import wire

ROOT = Path(__file__).resolve().parents[2]
FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # else a restarted rank may read a dead one's address (torch 2.13)
AT_ONCE = 20.0  # seconds: far less than the collectives' timeout, enough for a busy machine


def complaint(model: nn.Module, rank: int, step: int) -> tuple[str, float]:
    """What a backward pass complains about, and after how many seconds."""
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        backward(model, rank, step)
    return str(raised.value), time.monotonic() - begin


# ---- a rank dies, the job starts again ----


FEW = ("--epochs", "2", "--width", "8")


def run_example(folder: Path, name: str, ranks: int, codec: str, *options: str) -> tuple[dict[str, Any], Any, str]:
    """Run the example on the digits; its report, its final weights and what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", "1", str(ROOT / "examples" / "train_ddp.py"), "--data", "digits"]
    command += ["--out", str(folder / name), "--hook", codec, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", FRESH_STORE: "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            said, _ = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its ranks
            raise
    assert process.returncode == 0, said
    report = json.loads((folder / name / f"{codec}.json").read_text())
    return report, torch.load(folder / name / f"{codec}.pt", weights_only=True), said


KEEP = ("--resume", "--checkpoint-every", "5", "--checkpoint-dir")


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "int8", "onebit"])
def test_a_job_that_lost_a_rank_ends_as_one_that_lost_none(codec: str, tmp_path: Path) -> None:
    report, weights, _ = run_example(tmp_path, "whole", 2, codec, *FEW)
    again, resumed, said = run_example(
        tmp_path, "killed", 2, codec, *FEW, "--kill-at", "8", *KEEP, str(tmp_path / "checkpoints")
    )
    assert "resumed from" in said and "step-00000005" in said.replace("\n", "")
    assert report["losses"] == again["losses"] and len(report["losses"]) == report["step"]
    assert weights.keys() == resumed.keys()
    for name in weights:
        assert torch.equal(weights[name], resumed[name]), name


@pytest.mark.slow
def test_without_options_digits_are_learned_and_the_time_is_told(tmp_path: Path) -> None:
    report, _, said = run_example(tmp_path, "whole", 2, "int8")
    assert report["accuracies"][-1] >= 0.95
    assert re.search(r"165 steps: some \d+ seconds more", said)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_training_goes_on_with_another_number_of_ranks(ranks: int, tmp_path: Path) -> None:
    kept = str(tmp_path / "checkpoints")
    before, _, _ = run_example(tmp_path, "before", 2, "int8", *FEW, *KEEP, kept)
    after, _, said = run_example(tmp_path, "after", ranks, "int8", *FEW, *KEEP, kept, "--epochs", "4")
    assert "resumed from" in said
    assert after["losses"][: before["step"]] == before["losses"]
    assert after["ranks"] == ranks and after["accuracies"][-1] > before["accuracies"][-1]


def remember(rank: int, folder: str, codec: str) -> float:
    """Three steps; the state of each rank goes to a file."""
    model = DDP(network(), bucket_cap_mb=0.03)
    handle = comm.register(model, codec)
    train(model, rank, range(3))
    state = handle.state_dict()
    torch.save(state, f"{folder}/{rank}.pt")
    return float(sum(values.abs().sum() for owned in state["shard"].values() for _, values in owned))


def go_on(rank: int, folder: str, codec: str, old_world: int) -> tuple[bool, bool, bool, int]:
    """In another number of ranks: worker residuals stayed, shard residuals are gone, ranks agree; steps done."""
    model = DDP(network(), bucket_cap_mb=0.03)
    handle = comm.register(model, codec)
    stayed = gone = True
    if rank < old_world:  # the others load nothing
        saved = torch.load(f"{folder}/{rank}.pt", weights_only=True)
        handle.load_state_dict(saved)
        state = handle.state_dict()
        stayed = all(torch.equal(state["worker"][name], saved["worker"][name]) for name in saved["worker"])
        stayed &= any(bool(values.any()) for values in saved["worker"].values())
        gone = not state["shard"]
    train(model, rank, range(3, 6))
    equal = all(bool(g.isfinite().all()) for g in gradients(model)) and same_everywhere(gradients(model))
    return stayed, gone, equal, handle.state_dict()["step"]


def test_residuals_after_a_change_of_the_number_of_ranks(tmp_path: Path) -> None:
    assert min(run_ranks(2, remember, str(tmp_path), "int4")) > 0
    for world in (1, 3):
        assert run_ranks(world, go_on, str(tmp_path), "int4", 2) == [(True, True, True, 5)] * world


# ---- a rank is lost, or sends garbage ----


def lose_a_peer(rank: int, folder: str) -> None:
    model = DDP(network(), bucket_cap_mb=0.03)
    comm.register(model, "int8")
    for step in range(2):
        backward(model, rank, step)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    message, seconds = complaint(model, rank, 2)
    Path(folder, f"{rank}.json").write_text(json.dumps([message, seconds]))


def test_backward_raises_when_a_peer_is_lost(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1: no answer"):
        run_ranks(3, lose_a_peer, str(tmp_path))
    for rank in (0, 2):
        message, seconds = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "onnection" in message and seconds < AT_ONCE, (message, seconds)


def damage(rank: int, where: str) -> tuple[str, float]:
    """Rank 1 damages one byte of what it sends in the second step: for rank 0, or of its share of the average."""
    model = DDP(network(), bucket_cap_mb=0.03)
    comm.register(model, "int8", checksum=True)
    backward(model, rank, 0)
    if rank == 1:
        original = getattr(wire, where)

        def damaging(output: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
            source[100] ^= 4
            return original(output, source, group)

        setattr(wire, where, damaging)
    return complaint(model, rank, 1)


@pytest.mark.parametrize(("where", "what"), [("all_to_all", "shard"), ("all_gather", "average")])
def test_damage_is_detected_and_its_sender_named(where: str, what: str) -> None:
    answers = run_ranks(2, damage, where)
    assert f"the {what} of bucket 0 that came from rank 1 is damaged" in answers[0][0]
    assert "Unable to cast" not in answers[0][0]
    assert all(seconds < AT_ONCE for _, seconds in answers)


# ---- ranks that were set up differently ----


def nothing_but_the_head(name: str, parameter: torch.Tensor) -> bool:
    return not name.startswith("4.")


DIFFERENCES = {
    "codec": ["int8", "int4"],
    "block": ["block 256", "block 128"],
    "exempt": ["0.weight", "False", "True"],
    "buckets": ["2.bias", "0.weight"],
    "names": ["0.0.weight"],
}


def disagree(rank: int) -> dict[str, tuple[str, float]]:
    """What each rank says if rank 1 differs in one respect; nothing is under way then, so the group stays good."""
    found = {}
    for what in DIFFERENCES:
        other = rank == 1
        net = nn.Sequential(network()) if what == "names" and other else network()
        cap = 25 if what == "buckets" and other else 0.03
        # DDP makes buckets of that size at once only if it must look for unused parameters
        model = DDP(net, bucket_cap_mb=cap, find_unused_parameters=what == "buckets")
        options: dict[str, Any] = {}
        if other:
            options = {"exempt": {"exempt": nothing_but_the_head}, "block": {"block": 128}}.get(what, {})
        comm.register(model, "int4" if what == "codec" and other else "int8", **options)
        found[what] = complaint(model, rank, 0)
    return found


def test_all_ranks_say_where_they_differ() -> None:
    answers = run_ranks(2, disagree)
    for what, words in DIFFERENCES.items():
        message, _ = answers[0][what]
        assert answers[1][what][0] == message
        assert "differs between ranks: rank 0 has" in message and "rank 1 has" in message
        assert all(word in message for word in words), message
        assert max(answer[what][1] for answer in answers) < AT_ONCE
