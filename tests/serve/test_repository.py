"""A folder of networks: versions, what is mapped, what goes, what cannot be loaded; nothing outside is reachable."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.serve import repository as module
from pykernels.serve.errors import Invalid, NotFound, Unavailable
from pykernels.serve.model import UNTRIED, Limits
from pykernels.serve.repository import Repository
from pykernels.serve.runner import Runner
from pykernels.tune import Workers
from tests.networks import Function


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of two networks that answer differently."""
    folder = tmp_path_factory.mktemp("nets")
    for seed in range(2):
        torch.manual_seed(seed)
        pk.optimize(nn.Linear(4, 3), (torch.randn(2, 4),)).save(folder / f"{seed}.pk")
    return [folder / "0.pk", folder / "1.pk"]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Workers(pk.Setup(1, 1)) as workers:
        yield Runner(workers, 1)


def put(net: Path, folder: Path, name: str, version: object) -> Path:
    """As a deployment does it: written beside, then renamed."""
    target = folder / name / str(version) / "net.pk"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(net, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)
    return target


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def repository(source: Any, runner: Runner, limit: int = 1 << 30) -> Repository:
    return Repository(source, runner, Limits(batch=2), limit)


def test_the_highest_version_answers_and_every_other_one_that_is_asked_for(
    tmp_path: Path, nets: list[Path], runner: Runner
) -> None:
    put(nets[0], tmp_path, "a", 2)
    put(nets[1], tmp_path, "a", 10)

    async def test() -> None:
        r = repository(tmp_path, runner)
        await r.start()
        assert r.versions("a") == [2, 10]
        assert (await r.get("a")).version == 10
        assert [s.state for s in r.index()] == ["UNAVAILABLE", "READY"]
        assert (await r.get("a", "2")).version == 2
        assert [s.state for s in r.index()] == ["READY", "READY"]
        assert (await r.get("a")).version == 10
        x = torch.randn(2, 4)
        assert not torch.equal((await r.get("a")).network(x), (await r.get("a", "2")).network(x))

    run(test)


def test_a_new_version_takes_over_when_it_is_ready(tmp_path: Path, nets: list[Path], runner: Runner) -> None:
    put(nets[0], tmp_path, "a", 1)

    async def test() -> None:
        r = repository(tmp_path, runner)
        await r.start()
        put(nets[1], tmp_path, "a", 2)
        refreshing = asyncio.create_task(r.refresh())
        while not refreshing.done():
            assert (await r.get("a")).version in (1, 2)  # somebody always answers
            await asyncio.sleep(0)
        assert (await r.get("a")).version == 2

    run(test)


def test_a_new_version_that_cannot_be_loaded_changes_nothing(tmp_path: Path, nets: list[Path], runner: Runner) -> None:
    put(nets[0], tmp_path, "a", 1)

    async def test() -> None:
        r = repository(tmp_path, runner)
        await r.start()
        bad = put(nets[1], tmp_path, "a", 2)
        bad.write_bytes(bad.read_bytes()[:-100])
        await r.refresh()
        assert (await r.get("a")).version == 1
        with pytest.raises(Unavailable, match=r"model 'a' version 2 cannot be loaded: path: .*truncated"):
            await r.get("a", "2")
        assert r.known("a") and not r.known("a", "2")
        put(nets[1], tmp_path, "a", 2)
        await r.refresh()
        assert (await r.get("a")).version == 2

    run(test)


def test_a_version_that_is_gone_is_not_answered_and_another_one_takes_over(
    tmp_path: Path, nets: list[Path], runner: Runner
) -> None:
    put(nets[0], tmp_path, "a", 1)
    put(nets[1], tmp_path, "a", 2)

    async def test() -> None:
        r = repository(tmp_path, runner)
        await r.start()
        shutil.rmtree(tmp_path / "a" / "2")
        await r.refresh()
        assert (await r.get("a")).version == 1
        with pytest.raises(NotFound, match="model 'a' has no version 2; it has 1"):
            await r.get("a", "2")

    run(test)


def test_a_file_in_anothers_place_takes_over(tmp_path: Path, nets: list[Path], runner: Runner) -> None:
    path = shutil.copy(nets[0], tmp_path / "net.pk")

    async def test() -> None:
        r = repository({"a": path}, runner)
        await r.start()
        x = torch.randn(2, 4)
        before = (await r.get("a")).network(x)
        shutil.copy(nets[1], tmp_path / "new")
        os.replace(tmp_path / "new", path)
        await r.refresh()
        after = (await r.get("a")).network(x)
        assert torch.equal(after, pk.load(nets[1])(x)) and not torch.equal(before, after)

    run(test)


def test_who_was_used_longest_ago_makes_room(tmp_path: Path, nets: list[Path], runner: Runner) -> None:
    for name in ("a", "b", "c"):
        put(nets[0], tmp_path, name, 1)

    async def test() -> None:
        r = repository(tmp_path, runner, limit=2 * nets[0].stat().st_size)
        await r.start()
        assert [name for name, _ in r.mapped] == ["a", "b"]
        await r.get("a")
        await r.get("c")
        assert [name for name, _ in r.mapped] == ["a", "c"]
        assert (await r.get("b")).name == "b"
        assert [name for name, _ in r.mapped] == ["c", "b"]

    run(test)


def test_one_that_is_wanted_by_several_is_mapped_once(
    tmp_path: Path, nets: list[Path], runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(nets[0], tmp_path, "a", 1)
    calls = []
    ready = module.ready
    monkeypatch.setattr(module, "ready", lambda *given: calls.append(given) or ready(*given))

    async def test() -> None:
        r = repository(tmp_path, runner)
        await r.scan()
        tasks = [asyncio.create_task(r.get("a")) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # who gives up does not stop it
        found = await asyncio.gather(*tasks[1:])
        assert len(calls) == 1 and len(set(map(id, found))) == 1

    run(test)


@pytest.mark.parametrize("name", ["../a", "a/../a", "..", ".", "", "/etc/passwd", "a\0", "A" * 10_000, "a/1/net.pk"])
def test_names_are_looked_up_and_never_paths(tmp_path: Path, nets: list[Path], runner: Runner, name: str) -> None:
    put(nets[0], tmp_path / "models", "a", 1)
    put(nets[0], tmp_path, "a", 1)

    async def test() -> None:
        r = repository(tmp_path / "models", runner)
        await r.start()
        with pytest.raises(NotFound, match="is unknown"):
            await r.get(name)

    run(test)


@pytest.mark.parametrize("version", ["../1", "1/", "-1", "0", "01", "1.0", "one", "１", "9" * 100])
def test_versions_are_whole_numbers(tmp_path: Path, nets: list[Path], runner: Runner, version: str) -> None:
    put(nets[0], tmp_path, "a", 1)

    async def test() -> None:
        r = repository(tmp_path, runner)
        await r.start()
        with pytest.raises(Invalid, match="is no whole number above 0"):
            await r.get("a", version)

    run(test)


def test_what_is_no_version_or_lies_outside_is_not_there(tmp_path: Path, nets: list[Path], runner: Runner) -> None:
    models = tmp_path / "models"
    put(nets[0], models, "a", 1)
    for version in ("0", "01", "new", ".2"):
        put(nets[0], models, "a", version)
    put(nets[0], models, ".hidden", 1)
    (models / "out" / "1").mkdir(parents=True)
    (models / "out" / "1" / "net.pk").symlink_to(nets[1])
    (models / "inside").symlink_to(models / "a")  # as Kubernetes mounts volumes

    async def test() -> None:
        r = repository(models, runner)
        await r.start()
        assert [(s.name, s.version) for s in r.index()] == [("a", 1), ("inside", 1)]

    run(test)


def test_what_was_taken_out_of_service_comes_back_when_it_is_loaded(
    tmp_path: Path, nets: list[Path], runner: Runner
) -> None:
    put(nets[0], tmp_path, "a", 1)

    async def test() -> None:
        r = repository(tmp_path, runner)
        await r.start()
        r.unload("a")
        assert r.index()[0].state == "UNAVAILABLE" and not r.known("a")
        with pytest.raises(Unavailable, match="model 'a' is not loaded"):
            await r.get("a")
        await r.load("a")
        assert (await r.get("a")).version == 1
        for act in (r.unload, r.versions):
            with pytest.raises(NotFound):
                act("b")

    run(test)


def test_a_start_with_nothing_to_serve_is_refused(tmp_path: Path, nets: list[Path], runner: Runner) -> None:
    async def refused(source: Any, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            await repository(source, runner).start()

    (tmp_path / "bad.pk").write_bytes(b"nothing")
    run(lambda: refused(tmp_path, ValueError, "models: there is no net.pk in"))
    run(lambda: refused({"a": tmp_path / "none.pk"}, FileNotFoundError, "models: a: there is no file"))
    run(lambda: refused({"a/b": nets[0]}, ValueError, "models: 'a/b' is no name"))
    run(lambda: refused({"a": tmp_path / "bad.pk"}, ValueError, "models: model 'a' version 1 cannot be loaded"))


def test_a_model_answers_before_its_batches_are_tried(nets: list[Path], runner: Runner) -> None:
    async def test() -> None:
        r = repository({"a": nets[0]}, runner)
        await r.start()
        first = await r.get("a")
        assert first.apart == UNTRIED and first.queue.costs.most == 1
        await r.settled()
        then = await r.get("a")
        assert then.apart is None and then.queue.costs.most == 2
        assert then.network is first.network and then.queue.counts is first.queue.counts

    run(test)


@pytest.mark.parametrize("batch", [1, 2])
def test_networks_whose_rows_depend_on_each_other_are_not_put_together(
    tmp_path: Path, runner: Runner, batch: int
) -> None:
    mixing = {
        "softmax": lambda m, x: m.a(x).softmax(0),
        "turned": lambda m, x: m.a(x).T,
        "one": lambda m, x: m.a(x).sum(0),
    }
    for name, function in mixing.items():
        path = tmp_path / name / "1" / "net.pk"
        path.parent.mkdir(parents=True)
        pk.optimize(Function(function, a=nn.Linear(4, 3)), (torch.randn(2, 4),)).save(path)

    async def test() -> None:
        r = Repository(tmp_path, runner, Limits(batch))
        await r.start()
        await r.settled()
        models = {name: await r.get(name) for name in mixing}
        assert models["softmax"].apart == "a batch of 2 does not give the bits of its rows one by one"
        assert models["turned"].apart == "an output does not have the batch's rows"
        assert models["one"].apart == "an output does not have the batch's rows"

    run(test)
