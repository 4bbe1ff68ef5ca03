"""Instances: a network in pinned threads that share its weights; futures, errors, the end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.tune import workers as module
from pykernels.tune.cores import Usable
from tests.networks import Mixed, lively

CORES = sorted(os.sched_getaffinity(0))
TWO = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
PATIENCE = 30  # seconds: whoever waits longer hangs


@pytest.fixture(scope="module")
def network() -> pk.Optimized:
    return pk.optimize(lively(Mixed(), 3, 16, 16), (torch.randn(2, 3, 16, 16),))


@pytest.fixture
def gate(network: pk.Optimized, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The network answers when the gate is opened."""
    gate = Gate()
    monkeypatch.setattr(network, "forward", gate.forward)
    yield gate
    gate.opened.set()


class Gate:
    def __init__(self) -> None:
        self.entered, self.opened = threading.Semaphore(0), threading.Event()
        self.seen: list[Any] = []

    def forward(self, x: Any) -> Any:
        self.seen.append(x)
        self.entered.release()
        assert self.opened.wait(PATIENCE)
        return x


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found, expected) and found.dtype == expected.dtype


@TWO
def test_answers_are_the_networks_own_bits_from_many_submitters(network: pk.Optimized) -> None:
    inputs = [torch.randn(1 + i % 3, 3, 16, 16) for i in range(48)]
    expected = [network(x) for x in inputs]
    with pk.Instances(network, pk.Setup(1, 2), queue=4) as instances:

        def submitter(part: int) -> list[tuple[int, torch.Tensor]]:
            futures = [(i, instances.submit(inputs[i])) for i in range(part, len(inputs), 6)]
            return [(i, future.result(PATIENCE)) for i, future in futures]

        with ThreadPoolExecutor(6) as submitters:
            found = dict(pair for pairs in submitters.map(submitter, range(6)) for pair in pairs)
        assert all(equal(found[i], expected[i]) for i in range(len(inputs)))
        assert all(equal(y, e) for y, e in zip(instances.map(inputs), expected, strict=True))
        assert equal(instances(inputs[0]), expected[0])


def test_keyword_inputs_and_nested_outputs_are_the_networks() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.linear(x) * scale}

    x, scale = torch.randn(2, 6), torch.randn(2, 1)
    fast = pk.optimize(Named().eval(), (x,), example_kwargs={"scale": scale})
    with pk.Instances(fast, pk.Setup(1, 1)) as instances:
        assert equal(instances(x, scale=scale)["y"], fast(x, scale=scale)["y"])


def test_gradients_are_not_recorded(network: pk.Optimized) -> None:
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    with pk.Instances(network, pk.Setup(1, 1)) as instances:
        y = instances(x)
    assert not y.requires_grad and not y.is_inference()


# ---- cores and threads -----------------------------------------------------------------------------------------------
def pinned(task: str) -> set[int] | None:
    """The cores of a thread, as the system tells them; None when it has ended."""
    try:
        status = Path(f"/proc/self/task/{task}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    text = next(line for line in status if line.startswith("Cpus_allowed_list")).split()[1]
    ranges = [list(map(int, part.split("-"))) for part in text.split(",")]
    return {core for r in ranges for core in range(r[0], r[-1] + 1)}


def tasks() -> set[str]:
    return set(os.listdir("/proc/self/task"))


@TWO
def test_every_instance_has_cores_and_a_number_of_threads_of_its_own(network: pk.Optimized, gate: Gate) -> None:
    """Those of everybody else stay as they are."""
    numbers: list[tuple[int, int]] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        numbers.append((threading.get_native_id(), torch.get_num_threads()))
        return gate.forward(x)

    network.forward = forward  # type: ignore[method-assign]
    before, others = torch.get_num_threads(), {task: pinned(task) for task in tasks()}
    with pk.Instances(network, pk.Setup(1, 2)) as instances:
        futures = [instances.submit(torch.zeros(1)) for _ in range(2)]
        for _ in range(2):
            assert gate.entered.acquire(timeout=PATIENCE)
        assert [number for _, number in numbers] == [1, 1]
        places = [pinned(str(thread)) for thread, _ in numbers]
        assert sorted(tuple(place or ()) for place in places) == sorted(instances.cores)
        assert len(set().union(*instances.cores)) == 2
        assert all(pinned(task) in (place, None) for task, place in others.items())
        assert torch.get_num_threads() == before
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == before
        gate.opened.set()
        assert [future.result(PATIENCE).shape for future in futures] == [(1,), (1,)]


@TWO
def test_the_threads_that_openmp_starts_for_an_instance_are_pinned_as_it_is(network: pk.Optimized) -> None:
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("torch was built without OpenMP")
    cores = CORES[:2]
    with pk.Instances(network, pk.Setup(2, 1), cores=cores) as instances:
        before = tasks()
        instances(torch.randn(8, 3, 16, 16))
        started = tasks() - before
        assert started and all(pinned(task) == set(cores) for task in started)
    one = CORES[1]
    with pk.Instances(network, pk.Setup(1, 1), cores=[one]) as instances:
        before = tasks()
        instances(torch.randn(8, 3, 16, 16))
        assert tasks() <= before and instances.cores == [(one,)]


def test_a_setup_that_needs_more_cores_than_there_are_is_refused(
    network: pk.Optimized, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=rf"setup: 1 instances of {len(CORES) + 1} threads need {len(CORES) + 1} cores"
    ):
        pk.Instances(network, pk.Setup(len(CORES) + 1, 1))
    monkeypatch.setattr(module, "usable", lambda: Usable((0, 1, 2, 3), 2.5))
    with pytest.raises(ValueError, match=r"need 3 cores, but this process may use 2 \(affinity 4, cgroup quota 2.5\)"):
        pk.Instances(network, pk.Setup(1, 3))
    with pytest.raises(ValueError, match=r"need 2 cores, .*, cores names 1"):
        pk.Instances(network, pk.Setup(2, 1), cores=[3])
    with pytest.raises(ValueError, match=r"cores: \[9\] are none of \[0, 1, 2, 3\]"):
        pk.Instances(network, pk.Setup(1, 1), cores=[0, 9])


def test_a_thread_that_cannot_be_pinned_is_an_error_and_leaves_no_thread(
    network: pk.Optimized, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()

    def refused(process: int, cores: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setaffinity", refused)
    with pytest.raises(PermissionError, match="not here"):
        pk.Instances(network, pk.Setup(1, 1))
    assert threading.active_count() == before


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_what_cannot_run_side_by_side_is_refused(network: pk.Optimized) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return x + self.calls

    counter = pk.optimize(Counter().eval(), (torch.randn(2, 3),))
    with pytest.raises(ValueError, match="network: its calls write into buffers or inputs"):
        pk.Instances(counter, pk.Setup(1, 1))
    with pytest.raises(TypeError, match="network: an Optimized network is needed, not Mixed"):
        pk.Instances(Mixed(), pk.Setup(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="setup: a Setup is needed, not int"):
        pk.Instances(network, 2)  # type: ignore[arg-type]
    for queue in (0, 1.5, True):
        with pytest.raises(ValueError, match="queue: must be a whole number of at least 1"):
            pk.Instances(network, pk.Setup(1, 1), queue=queue)  # type: ignore[arg-type]


# ---- errors, cancelling, the end -------------------------------------------------------------------------------------
def test_errors_go_to_their_futures_and_the_instance_goes_on(network: pk.Optimized) -> None:
    x = torch.randn(1, 3, 16, 16)
    with pk.Instances(network, pk.Setup(1, 1)) as instances:
        bad = [instances.submit(torch.randn(1, 5, 16, 16)), instances.submit(), instances.submit(x, x)]
        good = instances.submit(x)
        assert all(future.exception(PATIENCE) is not None for future in bad)
        assert equal(good.result(PATIENCE), network(x))
        with pytest.raises(RuntimeError):
            instances(torch.randn(1, 5, 16, 16))


def test_even_an_exit_in_a_call_goes_to_its_future(network: pk.Optimized, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "forward", lambda x: sys.exit(3) if x is None else x)
    with pk.Instances(network, pk.Setup(1, 1)) as instances:
        assert isinstance(instances.submit(None).exception(PATIENCE), SystemExit)
        assert instances(5) == 5


def test_cancelled_calls_are_not_made(network: pk.Optimized, gate: Gate) -> None:
    with pk.Instances(network, pk.Setup(1, 1)) as instances:
        futures = [instances.submit(i) for i in range(4)]
        assert gate.entered.acquire(timeout=PATIENCE)
        assert not futures[0].cancel() and futures[1].cancel() and futures[3].cancel()
        gate.opened.set()
        assert futures[0].result(PATIENCE) == 0 and futures[2].result(PATIENCE) == 2
        with pytest.raises(CancelledError):
            futures[1].result()
    assert gate.seen == [0, 2]


def test_a_future_that_somebody_else_has_set_does_no_harm(network: pk.Optimized, gate: Gate) -> None:
    with pk.Instances(network, pk.Setup(1, 1)) as instances:
        future = instances.submit(1)
        assert gate.entered.acquire(timeout=PATIENCE)
        future.set_result("mine")
        gate.opened.set()
        assert future.result() == "mine" and instances(2) == 2


def background(call: Callable[[], Any]) -> Future[Any]:
    """What a call of another thread comes to."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def waits(future: Future[Any]) -> bool:
    time.sleep(0.05)
    return not future.done()


def test_submit_waits_while_the_queue_is_full_and_close_drains_it(network: pk.Optimized, gate: Gate) -> None:
    instances = pk.Instances(network, pk.Setup(1, 1), queue=2)
    futures = [instances.submit(0)]
    assert gate.entered.acquire(timeout=PATIENCE)
    futures += [instances.submit(1), instances.submit(2)]
    late = background(lambda: instances.submit(3))
    assert waits(late)
    closing = background(instances.close)
    with pytest.raises(RuntimeError, match="submit: these instances are closed"):
        late.result(PATIENCE)
    assert waits(closing)
    gate.opened.set()
    closing.result(PATIENCE)
    assert [future.result(0) for future in futures] == [0, 1, 2]
    instances.close()  # again
    with pytest.raises(RuntimeError, match="submit: these instances are closed"):
        instances.submit(4)


def test_an_instance_that_dies_takes_nobody_with_it_into_silence(network: pk.Optimized, gate: Gate) -> None:
    """It dies of what a callback raises that is no Exception."""
    instances = pk.Instances(network, pk.Setup(1, 1), queue=2)
    first = instances.submit(0)
    assert gate.entered.acquire(timeout=PATIENCE)
    first.add_done_callback(lambda _: sys.exit("enough"))
    waiting = [instances.submit(1), instances.submit(2)]
    blocked = background(lambda: instances.submit(3))
    assert waits(blocked)
    gate.opened.set()
    assert first.result(PATIENCE) == 0
    for future in waiting:
        with pytest.raises(RuntimeError, match=r"an instance has died: SystemExit\('enough'\)"):
            future.result(PATIENCE)
    with pytest.raises(RuntimeError, match="an instance has died"):
        blocked.result(PATIENCE)
    with pytest.raises(RuntimeError, match="an instance has died"):
        instances(4)
    background(instances.close).result(PATIENCE)


def test_an_instance_does_not_wait_for_itself(network: pk.Optimized, gate: Gate) -> None:
    found: list[str] = []

    def callback(_: Any) -> None:
        for call in (lambda: instances(1), lambda: list(instances.map([1])), instances.close, more):
            try:
                call()
            except RuntimeError as error:
                found.append(str(error))

    def more() -> None:
        for _ in range(3):
            instances.submit(7)

    with pk.Instances(network, pk.Setup(1, 1), queue=2) as instances:
        future = instances.submit(0)
        assert gate.entered.acquire(timeout=PATIENCE)
        future.add_done_callback(callback)
        gate.opened.set()
        future.result(PATIENCE)
    assert [text.split(":")[0] for text in found] == ["a call", "map", "close", "submit while the queue is full"]
    assert gate.seen == [0, 7, 7]


def test_map_reads_ahead_no_further_than_it_must_and_cancels_the_rest(network: pk.Optimized, gate: Gate) -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for i in range(100):
            read.append(i)
            yield i

    with pk.Instances(network, pk.Setup(1, 1)) as instances:
        gate.opened.set()
        answers = instances.map(source())
        assert [next(answers), next(answers)] == [0, 1]
        assert len(read) <= 5
        answers.close()  # type: ignore[attr-defined]
    assert len(gate.seen) <= 5


def test_a_network_is_let_go_and_threads_end_without_close(network: pk.Optimized, gate: Gate) -> None:
    instances = pk.Instances(network, pk.Setup(1, 1))
    threads, gone = instances._workers._pool.threads, weakref.ref(instances)
    future = instances.submit(1)
    del instances
    gc.collect()
    assert gone() is None
    gate.opened.set()
    assert future.result(PATIENCE) == 1  # what is queued is answered
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_program_that_forgets_to_close_ends_and_answers_first(tmp_path: Path, network: pk.Optimized) -> None:
    network.save(tmp_path / "net.pk")
    program = f"""
import torch, pykernels as pk
instances = pk.Instances(pk.load({str(tmp_path / "net.pk")!r}), pk.Setup(1, 1))
for _ in range(3):
    instances.submit(torch.zeros(1, 3, 16, 16)).add_done_callback(lambda f: print(tuple(f.result().shape), flush=True))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["(1, 10)"] * 3), done.stderr


def test_a_fork_is_told_that_it_has_no_instances(network: pk.Optimized) -> None:
    with pk.Instances(network, pk.Setup(1, 1)) as instances:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                instances.submit(torch.zeros(1, 3, 16, 16))
            except RuntimeError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        assert b"forked from" in os.read(read, 1000)
        os.close(read)
        os.waitpid(child, 0)
