"""A pipeline of parts: bits, errors, and what is lost on the way. Its parts are threads here, and processes where it is
slow."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.parallel import part as part_module
from pykernels.parallel.chain import Chain, PartError
from pykernels.parallel.link import Link, Server
from pykernels.parallel.processes import Processes
from pykernels.parallel.split import Place, Split, split
from pykernels.tune.on_device import OnDevice, copy_on, from_host
from tests.networks import lively
from tests.processes import alive
from tests.stand_in import Gpu

PATIENCE = 60  # seconds: whoever waits longer hangs
SILENCE = 1.0
POISON = 666.0


@pytest.fixture(scope="module")
def network() -> pk.Optimized:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1) for n in range(4)]
    return pk.optimize(lively(nn.Sequential(*layers), 3, 8, 8), (torch.randn(2, 3, 8, 8),))


@pytest.fixture(scope="module")
def parts(network: pk.Optimized) -> Split:
    return split(network, 3, rounds=2)


def images(count: int) -> list[torch.Tensor]:
    return [torch.randn(number % 4 + 1, 3, 8, 8) for number in range(count)]


class Watched:
    """A part of which a test sees the calls."""

    def __init__(self, part: pk.Optimized, seen: Callable[[torch.Tensor], None]) -> None:
        self._part, self._seen = part, seen
        self.in_spec, self.out_spec, self.nested = part.in_spec, part.out_spec, part.nested

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._seen(args[0])
        return self._part(*args, **kwargs)


class Threads:
    """Stands for the processes of the parts."""

    def __init__(self, folder: Path, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        self.key, self.count = secrets.token_bytes(32), len(split.parts)
        self.places = [str(folder / str(number)) for number in range(self.count + 1)]
        self.networks: list[Any] = list(split.parts)
        self.splits = ["0" * 16] * self.count
        self.servers: dict[int, Server] = {}
        self.links: dict[int, list[Link]] = {}
        self.ended: dict[int, str] = {}
        self.broken: set[int] = set()  # parts that cannot be started
        self.here = threading.local()
        monkeypatch.setattr(part_module, "dial_until", self._noting(part_module.dial_until))
        monkeypatch.setattr(Server, "accept", self._noting(Server.accept))

    def _noting(self, make: Callable[..., Link | None]) -> Callable[..., Link | None]:
        def made(*args: Any, **kwargs: Any) -> Link | None:
            link = make(*args, **kwargs)
            if link is not None and hasattr(self.here, "number"):
                self.links[self.here.number].append(link)
            return link

        return made

    def start(self) -> None:
        for number in range(1, self.count + 1):
            self._start(number)

    def _start(self, number: int) -> None:
        self.ended.pop(number, None)
        if number in self.broken:
            self.ended[number] = "with exit status 1"
            return
        self.servers[number], self.links[number] = Server(self.places[number - 1], self.key, SILENCE), []

        def run() -> None:
            self.here.number = number
            where = self.servers[number], self.places[number]
            network, place = self.networks[number - 1], Place(number, self.count, self.splits[number - 1])
            part_module.attend(network, place, *where, self.key, SILENCE, PATIENCE)

        threading.Thread(target=run, daemon=True).start()

    def dead(self) -> dict[int, str]:
        return dict(self.ended)

    def restart(self, number: int) -> None:
        self.end(number)
        self._start(number)

    def end(self, number: int) -> None:
        """As if the process were killed."""
        if number in self.servers:
            self.servers.pop(number).close()
            for link in self.links[number]:
                link.close()
        self.ended[number] = "by signal 9"

    def stop(self, number: int) -> None:
        """As if the process were stopped: nothing comes from it any more."""
        for link in self.links[number]:
            link.send = lambda *_: time.sleep(PATIENCE)  # type: ignore[method-assign]

    def freeze(self, number: int) -> None:
        """The same, and nobody is greeted any more."""
        self.stop(number)
        self.servers[number]._greet = lambda *_: None  # type: ignore[method-assign]

    def close(self) -> None:
        for number in list(self.servers):
            self.end(number)

    def chain(self, in_flight: int = 6) -> Chain:
        return Chain(self.places[0], self.places[-1], self.key, in_flight, SILENCE, self)  # type: ignore[arg-type]


@pytest.fixture
def threads(parts: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    yield Threads(tmp_path, parts, monkeypatch)


def test_answers_have_the_bits_of_one_process_and_come_in_order(threads: Threads, network: pk.Optimized) -> None:
    xs = images(40)
    with threads.chain() as chain:
        assert all(torch.equal(y, network(x)) for x, y in zip(xs, chain.map(xs), strict=True))
        with ThreadPoolExecutor(4) as callers:
            assert all(torch.equal(y, network(x)) for x, y in zip(xs, callers.map(chain, xs), strict=True))
        assert len(chain.seconds()) == 3 and min(chain.seconds()) > 0
        last = chain.submit(xs[0])
    assert torch.equal(last.result(0), network(xs[0]))  # closing waits for what was asked
    assert chain.restarts == 0
    with pytest.raises(RuntimeError, match="closed"):
        chain.submit(xs[0])
    chain.close()


def test_each_part_works_on_another_request(threads: Threads) -> None:
    lock, inside, most = threading.Lock(), [0], [0]

    def dwell(_: torch.Tensor) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        with lock:
            inside[0] -= 1

    threads.networks = [Watched(part, dwell) for part in threads.networks]
    with threads.chain() as chain:
        list(chain.map(images(8)))
    assert most == [3]
    with threads.chain(in_flight=1) as chain:
        most[0] = 0
        list(chain.map(images(4)))
    assert most == [1]


def test_an_error_names_the_part_and_is_that_requests_alone(threads: Threads, network: pk.Optimized) -> None:
    def refuse(x: torch.Tensor) -> None:
        if len(x) == 3:
            raise ValueError("three are too many")

    threads.networks[1] = Watched(threads.networks[1], refuse)
    xs = images(12)
    with threads.chain() as chain:
        futures = [chain.submit(x) for x in xs]
        for x, future in zip(xs, futures, strict=True):
            if len(x) == 3:
                with pytest.raises(PartError, match="part 2 of 3: ValueError: three are too many") as raised:
                    future.result(PATIENCE)
                assert raised.value.part == 2
            else:
                assert torch.equal(future.result(PATIENCE), network(x))
        with pytest.raises(PartError, match=r"part 1 of 3: RuntimeError: .*4 channels"):
            chain(torch.randn(2, 4, 8, 8))
        for what, said in (("an image", "not str"), (xs[0].to_sparse(), "sparse_coo"), (xs[0].to("meta"), "on meta")):
            with pytest.raises(TypeError, match=said):
                chain(what)
        with pytest.raises(ValueError, match="inputs are nested as"):
            chain(xs[0], xs[0])
        assert torch.equal(chain(xs[0]), network(xs[0])) and chain.restarts == 0


def test_an_answer_that_cannot_be_sent_is_that_requests_error(threads: Threads, network: pk.Optimized) -> None:
    x, last = images(1)[0], threads.networks[2]

    class Sparse(Watched):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return last(*args, **kwargs).to_sparse() if len(args[0]) == 2 else last(*args, **kwargs)

    threads.networks[2] = Sparse(last, print)
    with threads.chain() as chain:
        with pytest.raises(PartError, match=r"part 3 of 3: TypeError: a tensor of .*sparse_coo"):
            chain.submit(torch.cat([x, x])).result(PATIENCE)
        assert torch.equal(chain(x), network(x)) and chain.restarts == 0


def test_callbacks_may_ask_and_must_not_wait(threads: Threads, network: pk.Optimized) -> None:
    x, found, done = images(1)[0], list[Any](), threading.Event()

    def after(_: object) -> None:
        for call in (lambda: chain(x), lambda: list(chain.map([x])), chain.close):
            try:
                call()
            except RuntimeError as error:
                found.append(str(error))
        found.append(chain.submit(x))
        done.set()

    with threads.chain() as chain:
        chain.submit(x).add_done_callback(after)
        assert done.wait(PATIENCE)
        assert [said.partition(":")[0] for said in found[:3]] == ["a call", "map", "close"]
        assert torch.equal(found[3].result(PATIENCE), network(x))


def test_a_forked_process_neither_asks_nor_closes(
    threads: Threads, network: pk.Optimized, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(1)[0]
    with threads.chain() as chain:
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: -1)
            with pytest.raises(RuntimeError, match="submit: the pipeline is that of the process"):
                chain(x)
            chain.close()
        assert torch.equal(chain(x), network(x))


def test_what_nobody_foresaw_is_told_to_all_who_wait(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(number: int) -> None:
        raise OSError("too many open files")

    x = images(1)[0]
    with threads.chain() as chain:
        chain(x)
        monkeypatch.setattr(threads, "restart", no_file)
        threads.end(2)
        with pytest.raises(PartError, match="the pipeline: OSError: too many open files"):
            chain.submit(x).result(PATIENCE)


@pytest.mark.parametrize("hung", [(1, 2), (1, 2, 3)])
def test_parts_that_hang_together_are_all_started_anew(
    hung: tuple[int, ...], threads: Threads, network: pk.Optimized, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pykernels.parallel.chain.HUNG", 2.0)
    x = images(1)[0]
    with threads.chain() as chain:
        chain(x)
        for number in hung:
            threads.freeze(number)
        assert torch.equal(chain.submit(x).result(PATIENCE), network(x))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_part_that_dies_is_started_again_and_all_are_answered(
    threads: Threads, network: pk.Optimized, number: int
) -> None:
    died = []

    def die_once(x: torch.Tensor) -> None:
        if len(x) == 3 and not died:
            died.append(number)
            threads.end(number)

    threads.networks[number - 1] = Watched(threads.networks[number - 1], die_once)
    xs = images(30)
    with threads.chain() as chain:
        futures = [chain.submit(x) for x in xs]
        assert all(torch.equal(f.result(PATIENCE), network(x)) for x, f in zip(xs, futures, strict=True))
        assert chain.restarts == 1 and died == [number]


def test_a_part_that_hangs_is_noticed_and_started_again(threads: Threads, network: pk.Optimized) -> None:
    xs = images(4)
    with threads.chain() as chain:
        chain(xs[0])
        threads.stop(2)
        begin = time.monotonic()
        assert all(torch.equal(y, network(x)) for x, y in zip(xs, chain.map(xs), strict=True))
        assert chain.restarts == 1 and time.monotonic() - begin < 10 * SILENCE


def test_a_request_that_kills_a_part_fails_alone(threads: Threads, network: pk.Optimized) -> None:
    def poisoned(x: torch.Tensor) -> None:
        if x[0, 0, 0, 0] == POISON:
            threads.end(1)

    threads.networks[0] = Watched(threads.networks[0], poisoned)
    xs = images(10)
    xs[4][0, 0, 0, 0] = POISON
    with threads.chain() as chain:
        futures = [chain.submit(x) for x in xs]
        with pytest.raises(PartError, match="part 1 ended by signal 9, twice, while it was at this request"):
            futures[4].result(PATIENCE)
        del futures[4], xs[4]
        assert all(torch.equal(f.result(PATIENCE), network(x)) for x, f in zip(xs, futures, strict=True))
        assert chain.restarts == 2


def test_parts_of_several_splits_are_not_joined(threads: Threads) -> None:
    threads.splits[1] = "1" * 16
    with pytest.raises(PartError, match=r"not all of one split in order, but part 1 .* part 2 of 3 of split 1111"):
        threads.chain()


def test_arguments_that_cannot_be_are_named(parts: Split) -> None:
    for given, said in (
        ({"threads": 0}, "threads: must be a whole number"),
        ({"in_flight": 0}, "in_flight: must be a whole number"),
        ({"silence": 0.0}, "silence: must be between 0.1"),
        ({"silence": float("nan")}, "silence: must be between 0.1"),
        ({"devices": ["cpu"]}, "devices: one for each of the 3 parts is needed"),
        ({"devices": "cpu"}, "devices: one for each of the 3 parts is needed"),
        ({"devices": ["cpu", "cpu", "gpu"]}, "devices: must be cpu, cuda, cuda:0, cuda:1 ..., not 'gpu'"),
        ({"devices": ["cpu", "cpu", "cuda:999"]}, "devices: cuda:999 cannot be used"),
    ):
        with pytest.raises(ValueError, match=said):
            parts.serve(**given)  # type: ignore[arg-type]


def test_a_part_that_cannot_be_started_is_named(threads: Threads, network: pk.Optimized) -> None:
    threads.broken.add(2)
    with pytest.raises(PartError, match="part 2 ended with exit status 1 before the pipeline was joined"):
        threads.chain()
    threads.broken.clear()
    with threads.chain() as chain:
        x = images(1)[0]
        assert torch.equal(chain(x), network(x))
        threads.broken.add(2)
        threads.end(2)
        with pytest.raises(PartError, match="part 2 ended"):  # later, too, when it has been tried again
            chain.submit(x).result(PATIENCE)


# ---- devices ---------------------------------------------------------------------------------------------------------
def test_parts_on_devices_are_called_from_the_host(
    threads: Threads, network: pk.Optimized, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for two GPUs: one part on each, one on the CPU."""
    gpu = Gpu(monkeypatch, count=2)
    where = ["cuda:1", "cpu", "cuda:0"]
    threads.networks = [from_host(copy_on(part, to)) for part, to in zip(threads.networks, where, strict=True)]
    xs = images(12)
    with threads.chain() as chain:
        for x, y in zip(xs, chain.map(xs), strict=True):
            torch.testing.assert_close(y, network(x), rtol=1e-5, atol=1e-6)
        assert gpu.captured > 0 and len(gpu.streams) == 2 and chain.restarts == 0


def test_the_process_of_a_part_brings_it_to_its_device(
    parts: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu(monkeypatch, count=2)
    found: list[Any] = []

    def attend(network: Any, place: Place, *_: object) -> None:
        assert place[:2] == (2, 3)
        found.append(network)

    monkeypatch.setattr(part_module, "attend", attend)
    monkeypatch.setenv("PYKERNELS_PIPELINE_KEY", "0" * 64)
    given = [str(parts.save(tmp_path / "parts")[1]), "--listen", f"{tmp_path}/2"]
    before = torch.get_num_threads()
    for device in ("cuda:1", "cpu"):
        part_module.main([*given, "--next", f"{tmp_path}/3", "--device", device, "--threads", str(before)])
    assert isinstance(found[0], OnDevice) and str(found[0].device) == "cuda:1"
    assert found[1].report().device == "cpu"
    processes = Processes(parts.save(tmp_path / "parts"), 1, SILENCE, ["cuda:1", "cpu", "cuda"])
    assert [command[command.index("--device") + 1] for command in processes._commands] == ["cuda:1", "cpu", "cuda"]
    processes.close()


# ---- processes -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_processes_that_are_killed_or_stopped_are_started_again(parts: Split, network: pk.Optimized) -> None:
    xs = images(40)
    with parts.serve(threads=1, silence=3.0) as chain:
        assert all(torch.equal(y, network(x)) for x, y in zip(xs, chain.map(xs), strict=True))
        assert chain._processes is not None
        for number, (kind, count) in enumerate(((signal.SIGKILL, 1), (signal.SIGSTOP, 2))):
            futures = [chain.submit(x) for x in xs]
            os.kill(chain._processes.running[number].pid, kind)
            assert all(torch.equal(f.result(PATIENCE), network(x)) for x, f in zip(xs, futures, strict=True))
            while chain.restarts < count:  # all may have been answered before
                time.sleep(0.1)
        assert torch.equal(chain(xs[0]), network(xs[0]))
        processes = chain._processes.running
    assert all(process.poll() is not None for process in processes)


@pytest.mark.slow
def test_parts_end_with_who_asks_and_leave_nothing(parts: Split, tmp_path: Path) -> None:
    parts.save(tmp_path)
    asks = (
        "import sys, time; from pykernels.parallel import Chain; c = Chain.of_folder(sys.argv[1], threads=1);"
        "print(c._processes.first, *(p.pid for p in c._processes.running), flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", asks, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first, *pids = process.stdout.readline().split()
    os.kill(int(pids[0]), signal.SIGINT)  # ^C is not theirs
    process.kill()
    process.wait()
    end = time.monotonic() + PATIENCE
    while Path(first).parent.exists() or any(alive(int(pid)) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_parts_on_hosts_are_joined_by_their_addresses(
    parts: Split, network: pk.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on three hosts: `pykernels part` for each, which starts again what is killed."""
    with socket.socket() as one, socket.socket() as two, socket.socket() as three, socket.socket() as four:
        addresses = []
        for free in (one, two, three, four):
            free.bind(("127.0.0.1", 0))
            addresses.append(f"127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("PYKERNELS_PIPELINE_KEY", secrets.token_hex(32))
    commands = [
        [*(sys.executable, "-m", "pykernels", "part", str(path)), "--listen", here, "--next", following]
        for path, (here, following) in zip(parts.save(tmp_path), itertools.pairwise(addresses), strict=True)
    ]
    hosts = [subprocess.Popen(command) for command in commands]
    try:
        with Chain.connect(addresses[0], addresses[-1]) as chain:
            xs = images(20)
            assert all(torch.equal(y, network(x)) for x, y in zip(xs, chain.map(xs), strict=True))
            inner = Path(f"/proc/{hosts[1].pid}/task/{hosts[1].pid}/children").read_text().split()
            os.kill(int(inner[0]), signal.SIGKILL)
            assert all(torch.equal(y, network(x)) for x, y in zip(xs, chain.map(xs), strict=True))
    finally:
        for host in hosts:
            host.kill()
            host.wait()
