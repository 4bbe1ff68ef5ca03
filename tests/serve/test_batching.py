"""Which requests run together and when: deadlines, waiting that pays, row counts, cancellation, bounds; the bits."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

import pykernels as pk
from pykernels.serve.batching import Item, Queue, Scheduler
from pykernels.serve.costs import Costs
from pykernels.serve.errors import Expired, Overloaded, Unavailable
from pykernels.serve.runner import Runner, Submits
from pykernels.serve.signature import Request
from pykernels.tune import Workers
from tests.networks import Mixed, lively

CORES = len(os.sched_getaffinity(0))
CHEAP = Costs({1: 1.0, 2: 1.1, 4: 1.3})  # batches save nearly everything
DEAR = Costs({1: 1.0, 2: 2.0, 4: 4.0})  # batches save nothing


def request(rows: int = 1, width: int = 4) -> Request:
    return Request((torch.zeros(rows, width),), rows, ((width,),))


def queue(costs: Costs = CHEAP, limit: int = 8, target: float | None = None, instances: int = 1) -> Queue:
    return Queue(None, costs, limit, target, Runner(None, instances))  # type: ignore[arg-type]  # nothing is called


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def fill(q: Queue, arrivals: list[float], rows: int = 1, deadline: float = math.inf) -> list[Item]:
    return [q.put(request(rows), deadline, now) for now in arrivals]


def test_a_lone_request_runs_at_once() -> None:
    async def test() -> None:
        q = queue()
        (item,) = fill(q, [10.0])
        assert q.take(10.0, 0.0) == [item]
        assert not q.waiting

    run(test)


def test_what_has_gathered_while_all_were_busy_runs_together() -> None:
    async def test() -> None:
        q = queue()
        items = fill(q, [0.0, 0.1, 0.2, 0.3])
        assert q.take(5.0, 5.0) == items

    run(test)


def test_an_idle_instance_waits_where_the_next_request_is_near_and_saves_more_than_that() -> None:
    async def test() -> None:
        q = queue()
        fill(q, [0.0, 0.1, 0.2])
        q.waiting.clear()
        (item,) = fill(q, [0.3])
        assert q.take(0.3, 0.0) == pytest.approx(0.9)  # one comes every 0.1 s, and two cost 1.1 together
        assert q.take(1.3, 0.0) == [item]  # nobody came

    run(test)


def test_nobody_waits_where_batches_save_nothing_or_requests_are_rare_or_others_will_take_them() -> None:
    async def test() -> None:
        for q, gap in ((queue(DEAR), 0.1), (queue(), 5.0), (queue(instances=16), 0.1)):
            fill(q, [0.0, gap])
            q.waiting.clear()
            (item,) = fill(q, [2 * gap])
            assert q.take(2 * gap, 0.0) == [item]

    run(test)


def test_nobody_waits_past_a_deadline() -> None:
    async def test() -> None:
        q = queue(target=1.5)
        fill(q, [0.0, 0.1])
        q.waiting.clear()
        fill(q, [0.2])
        pause = q.take(0.2, 0.0)
        assert isinstance(pause, float) and 0.2 + pause + 1.1 <= 1.7

    run(test)


def test_a_batch_is_no_larger_than_the_oldest_deadline_allows() -> None:
    async def test() -> None:
        q = queue(Costs({1: 1.0, 2: 1.5, 4: 2.0}))
        items = [q.put(request(), 2.0, 0.0), *fill(q, [0.0, 0.0, 0.0])]
        assert q.take(0.0, 0.0) == items[:2]

    run(test)


def test_who_is_late_anyhow_does_not_make_batches_small() -> None:
    async def test() -> None:
        q = queue(target=0.5)
        items = fill(q, [0.0, 0.0, 0.0, 0.0])
        assert q.take(3.0, 3.0) == items

    run(test)


def test_requests_of_several_rows_fill_a_batch_as_far_as_they_fit() -> None:
    async def test() -> None:
        q = queue()
        a, b, c = (q.put(request(rows), math.inf, 0.0) for rows in (2, 3, 2))
        assert q.take(0.0, 0.0) == [a, c]
        assert q.take(0.0, 0.0) == [b]

    run(test)


def test_requests_of_other_sizes_stay_apart() -> None:
    async def test() -> None:
        q = queue(DEAR)
        a, b = q.put(request(width=4), math.inf, 0.0), q.put(request(width=5), math.inf, 0.0)
        assert q.take(0.0, 0.0) == [a]
        assert q.take(0.0, 0.0) == [b]

    run(test)


def test_the_queue_is_bounded_and_says_when_to_come_again() -> None:
    async def test() -> None:
        q = queue(limit=2)
        fill(q, [0.0, 0.0])
        with pytest.raises(Overloaded, match="2 requests wait already") as caught:
            q.put(request(), math.inf, 0.0)
        assert caught.value.retry_after == 1
        assert q.counts.refused == 1

    run(test)


def test_who_would_be_too_late_is_refused_at_once() -> None:
    async def test() -> None:
        q = queue(DEAR)
        fill(q, [0.0, 0.0, 0.0])
        with pytest.raises(Overloaded):
            q.put(request(), 2.0, 0.0)

    run(test)


# ---- with threads ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> pk.Optimized:
    return pk.optimize(lively(Mixed(), 3, 16, 16), (torch.randn(2, 3, 16, 16),))


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(pk.Setup(1, min(2, CORES))) as workers:
        yield workers


class Gate:
    """A network of which each call waits until it is let through."""

    def __init__(self) -> None:
        self.opened, self.sizes = threading.Semaphore(0), []  # type: ignore[var-annotated]

    def nested(self, inputs: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        return inputs, {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(x.shape[0])
        assert self.opened.acquire(timeout=30)
        if x.isnan().any():
            raise ValueError("input 'x' holds NaN")
        return x + 1


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.release(100)


@pytest.fixture
def one() -> Iterator[Workers]:
    with Workers(pk.Setup(1, 1)) as workers:
        yield workers


def gated(gate: Gate, one: Submits, limit: int = 8) -> Queue:
    return Queue(gate, Costs({1: 1e-3, 2: 1.1e-3, 4: 1.2e-3}), limit, None, Runner(one, 1))  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_answers_of_batches_are_the_bits_of_single_calls(network: pk.Optimized, workers: Workers) -> None:
    inputs = [torch.randn(1 + i % 3, 3, 16, 16) for i in range(60)]
    expected = [network(x) for x in inputs]

    async def test() -> None:
        scheduler = Scheduler()
        costs = Costs({size: 1e-3 for size in (1, 2, 4, 8, 11)})
        q = Queue(network, costs, 100, None, Runner(workers, workers.setup.instances))
        requests = [Request((x,), x.shape[0], ((3, 16, 16),)) for x in inputs]
        found = await asyncio.gather(*(scheduler.answer(q, r) for r in requests))
        assert all(torch.equal(y, e) for (y,), e in zip(found, expected, strict=True))
        assert q.counts.answered == 60 and q.counts.rows == sum(x.shape[0] for x in inputs)
        assert max(q.counts.batches) > 3
        await scheduler.drain()

    run(test)


def test_a_request_of_more_rows_than_a_batch_is_cut_and_joined(network: pk.Optimized, workers: Workers) -> None:
    x = torch.randn(9, 3, 16, 16)
    expected = network(x)

    async def test() -> None:
        scheduler = Scheduler()
        q = Queue(network, Costs({1: 1e-3, 2: 1e-3, 4: 1e-3}), 8, None, Runner(workers, workers.setup.instances))
        (found,) = await scheduler.answer(q, Request((x,), 9, ((3, 16, 16),)))
        assert torch.equal(found, expected)

    run(test)


def test_a_cancelled_request_leaves_the_batch(gate: Gate, one: Workers) -> None:
    async def test() -> None:
        scheduler, q = Scheduler(), gated(gate, one)
        first = asyncio.create_task(scheduler.answer(q, request()))
        await until(lambda: len(gate.sizes) == 1)
        others = [asyncio.create_task(scheduler.answer(q, request())) for _ in range(3)]
        await until(lambda: len(q.waiting) == 3)
        others[1].cancel()
        await until(lambda: len(q.waiting) == 2)
        gate.opened.release(2)
        await asyncio.gather(first, others[0], others[2])
        assert gate.sizes == [1, 2]
        assert q.counts.cancelled == 1 and q.counts.answered == 3

    run(test)


def test_who_gives_up_while_it_is_computed_does_not_disturb_the_others(gate: Gate, one: Workers) -> None:
    async def test() -> None:
        scheduler, q = Scheduler(), gated(gate, one)
        task = asyncio.create_task(scheduler.answer(q, request()))
        await until(lambda: len(gate.sizes) == 1)
        task.cancel()
        gate.opened.release(2)
        (found,) = await scheduler.answer(q, request())
        assert torch.equal(found, torch.ones(1, 4))

    run(test)


def test_a_request_whose_time_is_over_is_told_and_not_computed(gate: Gate, one: Workers) -> None:
    async def test() -> None:
        scheduler, q = Scheduler(), gated(gate, one)
        first = asyncio.create_task(scheduler.answer(q, request()))
        await until(lambda: len(gate.sizes) == 1)
        with pytest.raises(Expired, match="time was over before it was its turn"):
            await scheduler.answer(q, request(), asyncio.get_running_loop().time() + 0.05)
        gate.opened.release()
        await first
        assert gate.sizes == [1] and q.counts.expired == 1

    run(test)


def test_an_error_of_a_call_goes_to_its_requests_alone(gate: Gate, one: Workers) -> None:
    async def test() -> None:
        scheduler, q = Scheduler(), gated(gate, one)
        gate.opened.release(2)
        bad = request()._replace(inputs=(torch.full((1, 4), math.nan),))
        with pytest.raises(ValueError, match="holds NaN"):
            await scheduler.answer(q, bad)
        (found,) = await scheduler.answer(q, request())
        assert torch.equal(found, torch.ones(1, 4))
        assert q.counts.failed == 1

    run(test)


def test_of_a_batch_that_fails_only_those_fail_whose_fault_it_is(gate: Gate, one: Workers) -> None:
    async def test() -> None:
        scheduler, q = Scheduler(), gated(gate, one)
        first = asyncio.create_task(scheduler.answer(q, request()))
        await until(lambda: len(gate.sizes) == 1)
        bad = request()._replace(inputs=(torch.full((1, 4), math.nan),))
        tasks = [asyncio.create_task(scheduler.answer(q, r)) for r in (request(), bad, request())]
        await until(lambda: len(q.waiting) == 3)
        gate.opened.release(10)
        await first
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert gate.sizes == [1, 4, 1, 1, 1]
        assert isinstance(found[1], ValueError)
        assert all(torch.equal(found[i][0], torch.ones(1, 4)) for i in (0, 2))

    run(test)


def test_a_stop_answers_what_was_taken_and_takes_nothing_more(gate: Gate, one: Workers) -> None:
    async def test() -> None:
        scheduler, q = Scheduler(), gated(gate, one)
        tasks = [asyncio.create_task(scheduler.answer(q, request())) for _ in range(4)]
        await until(lambda: len(gate.sizes) == 1)
        stopped = asyncio.create_task(scheduler.drain())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="the service stops"):
            await scheduler.answer(q, request())
        assert not stopped.done()
        gate.opened.release(10)
        await asyncio.gather(*tasks)
        await stopped

    run(test)


def test_dead_threads_are_told_to_whoever_asks(gate: Gate) -> None:
    class Dead:
        def submit(self, *_: Any) -> Future[Any]:
            raise RuntimeError("submit: an instance has died")

    async def test() -> None:
        q = gated(gate, Dead())
        with pytest.raises(Unavailable, match="an instance has died"):
            await Scheduler().answer(q, request())
        assert q.runner.death == "submit: an instance has died"

    run(test)
