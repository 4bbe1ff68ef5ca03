"""A network that is split is served like any other: bits, batches, lost parts, versions; its processes end with it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.parallel import PartError, Split, split
from pykernels.serve.batching import Counts, Scheduler
from pykernels.serve.errors import Unavailable
from pykernels.serve.files import Files, find, parts_in
from pykernels.serve.linked import Linked
from pykernels.serve.model import Limits, Model, ready
from pykernels.serve.runner import Runner
from tests.networks import lively
from tests.processes import alive
from tests.serve.deployed import deploy
from tests.serve.serving import PATIENCE, serving


@pytest.fixture(scope="module")
def network() -> pk.Optimized:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1) for n in range(3)]
    return pk.optimize(lively(nn.Sequential(*layers), 3, 8, 8), (torch.randn(2, 3, 8, 8),))


@pytest.fixture(scope="module")
def folder(network: pk.Optimized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two parts."""
    folder = tmp_path_factory.mktemp("served") / "parts"
    split(network, 2, rounds=2).save(folder)
    return folder


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Pipeline:
    """Stands for the processes: a chain of parts in this one."""

    def __init__(self, folder: Path) -> None:
        self.split, self.death, self.restarts, self.closed = Split.load(folder), None, 0, False
        self.lose: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.lose is not None:
            raise self.lose
        return self.split(*args, **kwargs)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Those that were made."""
    made: list[Any] = []

    def of_folder(folder: Path, threads: int, in_flight: int, devices: list[str]) -> Pipeline:
        assert set(devices) == {"cpu"}
        made.append(Pipeline(folder))
        return made[-1]

    monkeypatch.setattr("pykernels.serve.linked.Chain.of_folder", of_folder)
    yield made


def post(place: Any, x: torch.Tensor, name: str = "net") -> tuple[int, Any]:
    inputs = [{"name": "input_1", "shape": list(x.shape), "datatype": "FP32", "data": x.flatten().tolist()}]
    return place.json("POST", f"/v2/models/{name}/infer", {"inputs": inputs})


def put(folder: Path, target: Path) -> None:
    target.mkdir(parents=True)
    Split.load(folder).save(target)


# --- which files ---


def test_a_folder_of_parts_is_a_version_when_all_are_there(folder: Path, tmp_path: Path) -> None:
    put(folder, tmp_path / "net" / "3")
    (found,) = find(tmp_path).items()
    assert found[0] == ("net", 3) and found[1].path == tmp_path / "net" / "3" and len(found[1].identity) == 2
    assert found[1].bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert parts_in(str(tmp_path)) == 2
    (tmp_path / "net" / "3" / "part-2-of-2.pk").unlink()
    assert find(tmp_path) == {} and parts_in(str(tmp_path)) == 1


def test_a_part_outside_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "models" / "net" / "1"
    put(folder, place)
    os.replace(place / "part-2-of-2.pk", tmp_path / "outside.pk")
    (place / "part-2-of-2.pk").symlink_to(tmp_path / "outside.pk")
    assert find(tmp_path / "models") == {}


def test_parts_that_are_missing_of_a_named_folder_are_told(folder: Path, tmp_path: Path) -> None:
    put(folder, tmp_path / "parts")
    (tmp_path / "parts" / "part-1-of-2.pk").unlink()
    with pytest.raises(ValueError, match=r"models: net: the files of all parts .* has part-2-of-2\.pk"):
        find({"net": tmp_path / "parts"})


# --- how it is called ---


async def model_of(folder: Path) -> Model:
    nobody: Any = None
    return await ready("net", 1, Files.of(folder), Runner(nobody, 1), Limits(batch=4), Counts())


def test_it_says_of_itself_what_the_whole_network_does(
    network: pk.Optimized, folder: Path, pipelines: list[Any]
) -> None:
    linked = Linked(folder, 1)
    assert linked.input_names == network.input_names and linked.output_names == network.output_names
    assert linked.example == network.example and linked.free == network.free
    assert linked.runner.at_once == 3


def test_as_many_batches_are_under_way_as_there_are_parts_and_one_more(
    network: pk.Optimized, folder: Path, pipelines: list[Any]
) -> None:
    images = [torch.randn(n % 2 + 1, 3, 8, 8) for n in range(24)]
    most = 0

    async def test() -> None:
        nonlocal most
        model, scheduler = await model_of(folder), Scheduler()
        assert model.apart is None and model.queue.costs.most == 4
        runner = model.queue.runner
        tasks = [asyncio.create_task(scheduler.answer(model.queue, model.request({"input_1": x}))) for x in images]
        while not all(task.done() for task in tasks):
            most = max(most, runner.at_once - runner.free)
            await asyncio.sleep(0)
        for x, task in zip(images, tasks, strict=True):
            assert torch.equal(task.result()[0], network(x))

    asyncio.run(asyncio.wait_for(test(), PATIENCE))
    assert most == 3


def test_a_pipeline_that_is_given_up_is_made_anew_and_a_call_that_fails_is_its_requests(
    network: pk.Optimized, folder: Path, pipelines: list[Any]
) -> None:
    x = torch.randn(1, 3, 8, 8)
    with serving(models={"net": str(folder)}) as place:
        pipelines[0].lose = PartError("part 2 of 2: RuntimeError: no", 2)
        status, said = post(place, x)
        assert status == 400 and "part 2 of 2" in said["error"] and len(pipelines) == 1
        pipelines[0].death = pipelines[0].lose
        status, said = post(place, x)
        assert status in (200, 503)  # as the refresh comes before it or not
        status, said = post(place, x)
        assert status == 200 and len(pipelines) == 2
        assert said["outputs"][0]["data"] == network(x).flatten().tolist()
        until(lambda: pipelines[0].closed)
        assert not pipelines[1].closed
    assert pipelines[1].closed


def test_who_asks_a_pipeline_that_is_given_up_is_told_to_come_again(folder: Path, pipelines: list[Any]) -> None:
    linked = Linked(folder, 1)
    pipelines[0].lose = pipelines[0].death = PartError("the pipeline was lost 4 times without an answer", None)
    with pytest.raises(Unavailable, match="the network's processes are lost: the pipeline was lost 4 times"):
        linked(torch.randn(1, 3, 8, 8))
    assert linked.lost


def test_what_was_evicted_ends_when_nobody_holds_it(folder: Path, pipelines: list[Any]) -> None:
    linked = Linked(folder, 1)
    assert not pipelines[0].closed
    del linked
    until(lambda: pipelines[0].closed)


# --- in processes ---


@pytest.mark.slow
def test_parts_are_processes_and_a_lost_one_costs_no_request(network: pk.Optimized, folder: Path) -> None:
    images = [torch.randn(1, 3, 8, 8) for _ in range(64)]
    with serving(models={"net": str(folder)}, batch=4) as place:
        (model,) = place.service.repository.mapped.values()
        assert isinstance(model.network, Linked) and model.network.chain._processes is not None
        pids = [process.pid for process in model.network.chain._processes.running]
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(post, place, x) for x in images[:32]]
            os.kill(pids[1], signal.SIGKILL)
            asked += [clients.submit(post, place, x) for x in images[32:]]
        for x, answer in zip(images, asked, strict=True):
            status, said = answer.result()
            assert status == 200 and said["outputs"][0]["data"] == network(x).flatten().tolist()
        _, _, said = place.raw("GET", "/metrics")
        assert b'pykernels_part_restarts_total{model="net",version="1"} 1.0' in said
        now = [process.pid for process in model.network.chain._processes.running]
        assert now[0] == pids[0] and now[1] != pids[1]
    assert not any(alive(pid) for pid in now)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_on_ray_a_replica_is_a_pipeline_and_a_lost_part_costs_no_request(network: pk.Optimized, folder: Path) -> None:
    pytest.importorskip("ray", reason="the extra `serve` is not installed")
    images = [torch.randn(1, 3, 8, 8) for _ in range(200)]
    with deploy(f"net={folder}", "--replicas", "1", "--max-batch", "4") as deployed:
        (replica,), before = deployed.replicas(), deployed.parts()
        assert len(before) == 2
        own = set().union(*(os.sched_getaffinity(pid) for pid in before))
        assert own <= os.sched_getaffinity(replica) and len(os.sched_getaffinity(replica)) == 2
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(deployed.ask, x, "net") for x in images]
            until(lambda: sum(answer.done() for answer in asked) > 20)
            os.kill(before[1], signal.SIGKILL)
            assert not asked[-1].done()
        for x, answer in zip(images, asked, strict=True):
            assert torch.equal(answer.result(), network(x))
        now = deployed.parts()
        assert deployed.replicas() == [replica] and len(now) == 2 and len(set(now) & set(before)) == 1
    until(lambda: not any(alive(pid) for pid in [replica, *now]))


@pytest.mark.slow
def test_a_part_that_is_started_anew_gets_the_file_that_was_there(
    network: pk.Optimized, folder: Path, tmp_path: Path
) -> None:
    put(folder, tmp_path / "parts")
    x = torch.randn(1, 3, 8, 8)
    linked = Linked(tmp_path / "parts", 1)
    try:
        for file in (tmp_path / "parts").iterdir():
            file.with_suffix(".new").write_bytes(b"another")
            os.replace(file.with_suffix(".new"), file)
        assert linked.chain._processes is not None
        os.kill(linked.chain._processes.running[0].pid, signal.SIGKILL)
        assert torch.equal(linked(x), network(x)) and linked.chain.restarts == 1
    finally:
        linked.close()
