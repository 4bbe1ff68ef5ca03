"""Replicas under torchft's manager, one of which is killed amid a step and comes back."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import context
from torch import nn
from training import backward, gradients, network, relative

pytest.importorskip("torchft", reason="torchft (extra torchft) is not installed")

import torchft
from torchft.coordination import LighthouseServer
from torchft.process_group import ProcessGroupDummy

from pykernels import comm

KILL_AT, STEPS = 4, 10
PATIENCE = 240.0  # seconds; packages that nobody has imported yet take their time


def digest(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def residuals(state: dict[str, Any]) -> str:
    return digest([*state["worker"].values(), *(part for parts in state["shard"].values() for _, part in parts)])


def true_mean(net: nn.Module, replicas: list[int], step: int) -> list[torch.Tensor]:
    """Of the replicas' gradients, at the weights of `net`."""
    twin = network()
    twin.load_state_dict(net.state_dict())
    for number in replicas:
        backward(twin, number, step)
    return [g / len(replicas) for g in gradients(twin)]


def wait_for(folder: str | Path, files: str, count: int) -> None:
    begin = time.monotonic()
    while len(list(Path(folder).glob(files))) < count:
        assert time.monotonic() - begin < PATIENCE, files
        time.sleep(0.05)


def manager_of(number: int, lighthouse: str, **options: Any) -> tuple[torchft.Manager, dist.TCPStore]:
    """A replica's manager, and the store that must live as long."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=10)),
        min_replica_size=2,
        timeout=timedelta(seconds=20),
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica_{number}",
        hostname="localhost",
        **options,
    )
    return manager, store


def replica(number: int, life: int, lighthouse: str, folder: str, codec: str, at_once: bool) -> None:
    """Train to `STEPS`, or die amid `KILL_AT` in the first life of number 1; what happened goes to a file."""
    torch.set_num_threads(1)
    net = network()

    def load_state_dict(state: dict[str, Any]) -> None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])

    def state_dict() -> dict[str, Any]:
        return {"net": net.state_dict(), "optimizer": optimizer.state_dict()}

    manager, _store = manager_of(
        number, lighthouse, load_state_dict=load_state_dict, state_dict=state_dict, use_async_quorum=not at_once
    )
    model = comm.torchft.DistributedDataParallel(manager, net, codec, bucket_cap_mb=0.03)
    optimizer = torchft.Optimizer(manager, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9))
    Path(folder, f"{number}-{life}.alive").touch()  # from now on a quorum waits for this one
    wait_for(folder, "*.alive", 3)
    tries = []
    while (step := manager.current_step()) < STEPS:
        if step == KILL_AT + 3:  # the others have gone on, and wait to be three again
            Path(folder, f"{number}-{life}.waits").touch()
            wait_for(folder, "1-1.alive", 1)
        before = model.handle.state_dict()
        if (number, life, step) == (1, 0, KILL_AT):  # when most buckets have been exchanged
            net[0].weight.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
        optimizer.zero_grad()
        backward(model, number, step)
        trained, participants = manager.current_step(), manager.num_participants()
        found = {
            "step": trained,
            "participants": participants,
            "takes part": manager.is_participating(),
            "error": None,
        }
        if step and manager.errored() is None and found["takes part"]:  # at first torchft averages one with zeros
            mean = true_mean(net, [0, 1, 2] if participants == 3 else [0, 2], step)
            found["error"] = relative(gradients(net), mean, True)
        optimizer.step()
        found["committed"] = manager.current_step() > trained
        after = model.handle.state_dict()
        found["as before"] = residuals(before) == residuals(after)
        found["residual"] = sum(float(values.norm()) for values in after["worker"].values())
        found["weights"] = digest([*net.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())])
        tries.append(found)
    torch.save({"tries": tries, "stats": str(model.handle.stats())}, Path(folder, f"{number}-{life}.pt"))
    manager.shutdown(wait=False)
    os._exit(0)  # the manager's threads would go on


@pytest.fixture
def lighthouse() -> Any:
    server = LighthouseServer("[::]:0", min_replicas=2, join_timeout_ms=10_000, heartbeat_timeout_ms=1000)
    yield server.address()
    server.shutdown()


@pytest.mark.parametrize(("codec", "at_once"), [("int8", False), ("onebit", True)], ids=["heal_later", "heal_at_once"])
def test_two_go_on_when_the_third_is_killed_and_it_comes_back_with_their_bits(
    codec: str, at_once: bool, lighthouse: str, tmp_path: Path
) -> None:
    def start(number: int, life: int) -> Any:
        process = context.Process(target=replica, args=(number, life, lighthouse, str(tmp_path), codec, at_once))
        process.start()
        return process

    processes = [start(number, 0) for number in range(3)]
    try:
        processes[1].join(PATIENCE)
        assert processes[1].exitcode == -signal.SIGKILL
        wait_for(tmp_path, "*-0.waits", 2)
        processes.append(start(1, 1))
        for process in processes:
            process.join(PATIENCE)
    finally:
        for process in processes:
            process.kill()
    lives = {number: torch.load(tmp_path / f"{number}-{life}.pt")["tries"] for number, life in ((0, 0), (1, 1), (2, 0))}
    for number in (0, 2):
        tries = lives[number]
        failed = [one for one in tries if not one["committed"]]
        assert failed and {one["step"] for one in failed} == {KILL_AT}
        assert failed[0]["as before"]  # residuals, to the bit
        assert not tries[KILL_AT - 1]["as before"]
        assert sum(one["residual"] for one in tries) > 0
        committed = [one for one in tries if one["committed"]]
        assert [one["step"] for one in committed] == list(range(STEPS))
        participants = [one["participants"] for one in committed]
        assert participants[1:KILL_AT] == [3] * (KILL_AT - 1) and participants[KILL_AT] == 2 and participants[-1] == 3
    healed = lives[1]
    assert healed[0]["step"] > KILL_AT and healed[-1]["step"] == STEPS - 1
    assert at_once or not healed[0]["takes part"]
    assert at_once or healed[0]["residual"] == 0.0
    assert healed[-1]["takes part"] and healed[-1]["residual"] > 0
    for step in range(STEPS):
        weights = [
            one["weights"] for tries in lives.values() for one in tries if one["committed"] and one["step"] == step
        ]
        assert len(set(weights)) == 1 and len(weights) == (3 if step >= healed[0]["step"] else 2)
    if codec == "int8":
        errors = [one["error"] for tries in lives.values() for one in tries if one["error"] is not None]
        assert len(errors) > 2 * STEPS - 4 and max(errors) < 0.03, errors


def other_codec(number: int, lighthouse: str, folder: str) -> None:
    net = network()
    manager, _store = manager_of(number, lighthouse, load_state_dict=net.load_state_dict, state_dict=net.state_dict)
    model = comm.torchft.DistributedDataParallel(manager, net, ["int8", "int4"][number])
    optimizer = torchft.Optimizer(manager, torch.optim.SGD(net.parameters(), 0.05))
    optimizer.zero_grad()
    try:
        backward(model, number, 0)
    except RuntimeError as error:
        Path(folder, f"{number}.error").write_text(str(error))
    os._exit(0)


def test_replicas_that_compress_otherwise_are_told(lighthouse: str, tmp_path: Path) -> None:
    processes = [context.Process(target=other_codec, args=(number, lighthouse, str(tmp_path))) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    for number in range(2):
        said = (tmp_path / f"{number}.error").read_text()
        assert "bucket 0 differs between ranks" in said and "int8" in said and "int4" in said, said


def test_what_is_wrong_is_named() -> None:
    def manager(group: Any) -> Any:
        return SimpleNamespace(_pg=group, register_state_dict_fn=lambda *functions: None)

    gloo = torchft.ProcessGroupGloo()
    with pytest.raises(ValueError, match=r"codec must be one of .*int8.*, not 'topk'"):
        comm.torchft.DistributedDataParallel(manager(gloo), network(), "topk")
    with pytest.raises(TypeError, match="manager must have a ProcessGroupGloo, not a ProcessGroupDummy"):
        comm.torchft.DistributedDataParallel(manager(ProcessGroupDummy(0, 1)), network())
    with pytest.raises(ValueError, match="must be on the CPU"):
        comm.torchft.DistributedDataParallel(manager(gloo), network().to("meta"))
    with pytest.raises(TypeError, match="nonsense"):
        comm.torchft.DistributedDataParallel(manager(gloo), network(), nonsense=1)
