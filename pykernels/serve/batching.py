"""Which requests are computed together, and when: by what a call costs, and by the requests' deadlines.

One `Scheduler` hands batches of all models to the threads of their runners. All of it runs on one event loop; calls of
networks alone, and what belongs to them, run on the threads.

An instance that is idle takes what waits, so that batches grow by themselves while all are busy. It waits for more
only where that pays: where the rows that are expected, an instance's share of those that come, would arrive before the
idle time has cost as much as a common call saves (`Costs.patience`), and no deadline is put at risk. A service that
answers its load without batches never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch.utils import _pytree as pytree

from pykernels.serve.errors import Expired, Overloaded, TooLarge, Unavailable

if TYPE_CHECKING:
    from pykernels.serve.costs import Costs
    from pykernels.serve.runner import Runner
    from pykernels.serve.signature import Network, Request

__all__ = ["Counts", "Queue", "Scheduler", "Spent", "compute"]

Answer: TypeAlias = tuple[torch.Tensor, ...]
MARGIN = 1.25  # of a call's measured time: what it takes beside other work


class Spent(NamedTuple):
    """Seconds of a batch: waiting of each of its requests comes beside it."""

    gather: float
    compute: float
    scatter: float


@dataclass(eq=False)
class Item:
    """A request that waits.

    Attributes:
        deadline: (of `time.monotonic`) when the client gives up; infinite where it did not say.
        target: when the answer is wanted; not later than `deadline`.
    """

    request: Request
    arrival: float
    deadline: float
    target: float
    future: asyncio.Future[Answer]

    @property
    def rows(self) -> int:
        return self.request.rows or 1


@dataclass
class Counts:
    """What has become of the requests of a queue. `waited`: seconds; `batches`: calls and their seconds by rows."""

    answered: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    refused: int = 0
    rows: int = 0
    waited: float = 0.0
    whole: float = 0.0
    failed_seconds: float = 0.0
    last: float = 0.0  # when the last was answered, seconds of the epoch
    batches: dict[int, tuple[int, Spent]] = field(default_factory=dict)

    def add(self, rows: int, spent: Spent) -> None:
        calls, sums = self.batches.get(rows, (0, Spent(0.0, 0.0, 0.0)))
        self.batches[rows] = calls + 1, Spent(*(a + b for a, b in zip(sums, spent, strict=True)))


class Queue:
    """The requests that wait for one network.

    Args:
        network: what is called.
        costs: of calls by rows. `costs.most` is 1 for a network whose requests must stay apart.
        limit: how many may wait.
        target: seconds in which answers are wanted; None where nobody said.
        runner: where the network is called.
        counts: to be added to.
    """

    def __init__(
        self,
        network: Network,
        costs: Costs,
        limit: int,
        target: float | None,
        runner: Runner,
        counts: Counts | None = None,
    ) -> None:
        self.network, self.costs, self.limit, self.target, self.runner = network, costs, limit, target, runner
        self.waiting: deque[Item] = deque()
        self.counts = Counts() if counts is None else counts
        self.coming = 0  # requests whose bodies are being read
        self.gap = math.inf  # seconds between requests, as an average that forgets
        self.last = -math.inf

    def put(self, request: Request, deadline: float, now: float) -> Item:
        """A request's place in the queue.

        Raises:
            Overloaded: so many wait that it would be refused, or be too late.
        """
        if len(self.waiting) >= self.limit or now + self.delay() > deadline:
            raise self.overloaded()
        self._note(now)
        target = min(deadline, now + (math.inf if self.target is None else self.target))
        item = Item(request, now, deadline, target, asyncio.get_running_loop().create_future())
        self.waiting.append(item)
        return item

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While a request is read: under overload none of its bytes is, or reading would take the time of answering.

        Raises:
            Overloaded: as many are being read or wait as could run or wait.
        """
        if len(self.waiting) + self.coming >= self.limit + self.costs.most * self.runner.at_once:
            raise self.overloaded()
        self.coming += 1
        try:
            yield
        finally:
            self.coming -= 1

    def overloaded(self) -> Overloaded:
        """What one more request is told."""
        self.counts.refused += 1
        return Overloaded(f"{len(self.waiting)} requests wait already", retry_after=max(1, math.ceil(self.delay())))

    def cancel(self, item: Item) -> None:
        """Nobody wants the answer any more. What is being computed goes on."""
        self.counts.cancelled += 1
        if item in self.waiting:
            self.waiting.remove(item)

    def delay(self) -> float:
        """Seconds until what waits will have been computed, about."""
        rows = sum(item.rows for item in self.waiting)
        return self.costs.of(self.costs.most) / self.costs.most * rows / self.runner.at_once

    def _note(self, now: float) -> None:
        """That a request came."""
        gap = min(now - self.last, 16 * self.costs.of(self.costs.most))  # a night without any is soon forgotten
        if math.isinf(self.gap):
            self.gap = gap if math.isfinite(self.last) else math.inf
        else:
            self.gap += (gap - self.gap) / 8
        self.last = now

    def expire(self, now: float) -> None:
        """Tell those whose time is over."""
        for item in [item for item in self.waiting if item.deadline <= now]:
            self.waiting.remove(item)
            self.counts.expired += 1
            if not item.future.done():
                item.future.set_exception(Expired("the request's time was over before it was its turn"))

    def take(self, now: float, idle_since: float) -> list[Item] | float:
        """The batch to run now, in order of arrival; or how many seconds to wait for more.

        Args:
            idle_since: when an instance was free for it.
        """
        items, counts = self._together()
        place = self.costs.best(counts)
        while place and now + MARGIN * self.costs.of(counts[place]) > min(i.target for i in items[: place + 1]):
            if now + MARGIN * self.costs.of(counts[0]) > items[0].target:
                break  # the oldest is too late anyhow: the more are answered, the fewer the next ones that are
            place -= 1
        rows = counts[place]
        if len(items) == len(self.waiting) and place == len(items) - 1:  # all that there is
            patience = self._patience(items, rows, now)
            pause = max(items[-1].arrival, idle_since) + patience - now
            if pause > 0:
                return pause
        for item in items[: place + 1]:
            self.waiting.remove(item)
        return items[: place + 1]

    def _together(self) -> tuple[list[Item], list[int]]:
        """Those that may run with the oldest one, in order, and how many rows they make."""
        first = self.waiting[0]
        items, counts = [first], [first.rows]
        if first.request.rows is not None:
            for item in list(self.waiting)[1:]:
                if item.request.key == first.request.key and counts[-1] + item.rows <= self.costs.most:
                    items.append(item)
                    counts.append(counts[-1] + item.rows)
        return items, counts

    def _patience(self, items: Sequence[Item], rows: int, now: float) -> float:
        """Seconds for which waiting for one more like the last one pays, from when the last one came."""
        more = items[-1].rows
        patience = self.costs.patience(rows, more)
        if self.gap * self.runner.at_once > patience:
            return 0.0
        joint = self.costs.of(min(rows + more, self.costs.most))
        oldest = items[0]
        slack = min(item.target for item in items) - MARGIN * joint - now
        if math.isinf(oldest.target):  # nobody said: no request waits longer than the largest batch takes
            slack = oldest.arrival + self.costs.of(self.costs.most) - now
        return min(patience, max(slack, 0.0))


def compute(network: Network, requests: Sequence[Request], size: int | None) -> tuple[list[Answer | Exception], Spent]:
    """Answers to requests of one key by one call; on an instance's thread. Where that fails each is computed alone, so
    that only those fail whose fault it is.

    Args:
        size: the rows of the call, at least as many as the requests have; None for the inputs as they are.
    """
    try:
        return _compute(network, requests, size)
    except Exception as error:
        if len(requests) == 1:
            return [error], Spent(0.0, 0.0, 0.0)
    found = [compute(network, [request], request.rows) for request in requests]
    spent = Spent(*map(sum, zip(*(spent for _, spent in found), strict=True)))
    return [answer for answers, _ in found for answer in answers], spent


def _compute(network: Network, requests: Sequence[Request], size: int | None) -> tuple[list[Answer | Exception], Spent]:
    begin = time.perf_counter()
    inputs = requests[0].inputs
    if size is not None:
        inputs = tuple(_rows([r.inputs[i] for r in requests], size) for i in range(len(inputs)))
    args, kwargs = network.nested(inputs)
    gathered = time.perf_counter()
    outputs = tuple(pytree.tree_leaves(network(*args, **kwargs)))
    computed = time.perf_counter()
    answers: list[Answer | Exception] = [outputs]
    if size is not None:
        rows = [r.rows or 0 for r in requests]
        parts = [y[: sum(rows)].split(rows) for y in outputs]
        answers = [tuple(part[i] for part in parts) for i in range(len(requests))]
    return answers, Spent(gathered - begin, computed - gathered, time.perf_counter() - computed)


def _rows(parts: list[torch.Tensor], size: int) -> torch.Tensor:
    missing = size - sum(part.shape[0] for part in parts)
    if missing:
        parts = [*parts, parts[-1][-1:].expand(missing, *parts[-1].shape[1:])]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _urgency(queue: Queue) -> tuple[float, float]:
    return min(((item.target, item.arrival) for item in queue.waiting), default=(math.inf, math.inf))


class Scheduler:
    """Hands batches of several queues to the threads that are free, the queue whose request is wanted first before
    others. On one event loop."""

    def __init__(self) -> None:
        self.stopping = False
        self._queues: dict[Queue, None] = {}  # that hold something
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Future[None]] = set()

    async def answer(self, queue: Queue, request: Request, deadline: float = math.inf) -> Answer:
        """The answer to one request. A caller that is cancelled takes it out of the queue.

        Args:
            deadline: (of `time.monotonic`) when nobody wants the answer any more.

        Raises:
            TooLarge: more rows than may wait.
            Overloaded: too much waits.
            Expired: it was not its turn before the deadline.
            Unavailable: the service stops.
            Exception: of the network.
        """
        if self.stopping:
            raise Unavailable("the service stops", retry_after=1)
        most = queue.costs.most
        if request.rows is not None and request.rows > most:
            return await self._split(queue, request, deadline, most)
        begin = time.monotonic()
        item = queue.put(request, deadline, begin)
        self._queues[queue] = None
        self._dispatch()
        try:
            answer = await item.future
        except asyncio.CancelledError:
            queue.cancel(item)
            raise
        except Exception:
            queue.counts.failed += 1
            queue.counts.failed_seconds += time.monotonic() - begin
            raise
        queue.counts.answered += 1
        queue.counts.rows += item.rows
        queue.counts.whole += time.monotonic() - begin
        queue.counts.last = time.time()
        return answer

    async def drain(self) -> None:
        """Take nothing more, and wait until all that was taken is answered."""
        self.stopping = True
        while self._queues or self._running:
            self._dispatch()
            await asyncio.wait(self._running, timeout=0.05) if self._running else await asyncio.sleep(0.005)

    async def _split(self, queue: Queue, request: Request, deadline: float, most: int) -> Answer:
        parts = zip(*(x.split(most) for x in request.inputs), strict=True)
        requests = [request._replace(inputs=part, rows=part[0].shape[0]) for part in parts]
        if len(requests) > queue.limit:
            raise TooLarge(f"{request.rows} rows are too many: at most {queue.limit * most} are answered at once")
        if len(requests) > queue.limit - len(queue.waiting):
            raise queue.overloaded()
        tasks = [asyncio.ensure_future(self.answer(queue, part, deadline)) for part in requests]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # of one that failed, the others are of no use
                task.cancel()
        return tuple(torch.cat(ys) for ys in zip(*answers, strict=True))

    def _dispatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        for queue in list(self._queues):
            queue.expire(now)
        pause = math.inf
        for queue in sorted(self._queues, key=_urgency):
            while queue.runner.free and queue.waiting:
                batch = queue.take(now, queue.runner.idle_since)
                if not isinstance(batch, list):
                    if not self.stopping:
                        pause = min(pause, batch)
                        break
                    batch = [queue.waiting.popleft()]
                self._run(queue, batch, now)
            if not queue.waiting:
                del self._queues[queue]
        due = min((i.deadline for q in self._queues for i in q.waiting), default=math.inf) - now
        if min(pause, due) < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, min(pause, due)), self._dispatch)

    def _run(self, queue: Queue, batch: list[Item], now: float) -> None:
        size = None if batch[0].request.rows is None else queue.costs.size(sum(item.rows for item in batch))
        for item in batch:
            queue.counts.waited += now - item.arrival
        try:
            call = queue.runner.submit(compute, queue.network, [item.request for item in batch], size)
        except RuntimeError as error:  # an instance has died: whoever watches over this process must start it again
            queue.runner.death = str(error)
            for item in batch:
                item.future.set_exception(Unavailable(queue.runner.death))
            return
        queue.runner.free -= 1
        task = asyncio.ensure_future(self._finish(queue, batch, asyncio.wrap_future(call)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _finish(
        self, queue: Queue, batch: list[Item], call: asyncio.Future[tuple[list[Answer | Exception], Spent]]
    ) -> None:
        try:
            answers, spent = await call
        except Exception as error:
            for item in batch:
                if not item.future.done():
                    item.future.set_exception(error)
        else:
            queue.counts.add(sum(item.rows for item in batch), spent)
            for item, answer in zip(batch, answers, strict=True):
                if item.future.done():  # nobody waits for it any more
                    continue
                if isinstance(answer, Exception):
                    item.future.set_exception(answer)
                else:
                    item.future.set_result(answer)
        finally:
            queue.runner.free += 1
            queue.runner.idle_since = time.monotonic()
            self._dispatch()
