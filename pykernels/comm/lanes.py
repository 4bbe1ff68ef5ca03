"""Where a hook waits for the wire.

The steps of a bucket after its first collective must run in the same order on every rank, whatever the delays, and may
not wait inside a callback of the collective (gloo runs those on the thread that has to make progress). On a CPU each
step has a lane: one thread that takes the buckets in the order in which their gradients became ready, so that the
collectives of a lane, on a process group of its own, are launched in one order everywhere. On a GPU waiting blocks a
stream and no thread, so everything is launched at once, on a side stream.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from pykernels.comm.stats import Meter

Averaged = torch.futures.Future[torch.Tensor]
Way = Iterator[tuple[str, dist.Work]]  # a bucket's way: it yields what it waits for, and what that phase is called


class Lane:
    """A daemon thread that runs tasks one after another."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task`, which must not raise, after those before it."""
        self._tasks.put(task)

    def close(self) -> None:
        """End the thread once its tasks are done."""
        self._tasks.put(None)


def walk(way: Way, meter: Meter) -> None:
    """Go a whole way here and now: on a CPU the thread waits, on a GPU the current stream."""
    for phase, work in way:
        with meter.timed(phase):
            work.wait()


class Lanes:
    """Lets buckets go their ways: lane i waits for the i-th work of each and runs what follows it.

    Args:
        count: the most works that a way yields.
        meter: of the times that are waited.
    """

    def __init__(self, count: int, meter: Meter) -> None:
        self._count, self._meter = count, meter
        self._lanes: list[Lane] = []
        self._error: Exception | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def run(self, bucket: torch.Tensor, way: Way) -> Averaged:
        """The future holds `bucket` when its way is gone, or what was raised on it.

        After an error nothing is sent any more, since the ranks may be out of step: every bucket meets the same error.
        On a CPU the way begins here and now; on a GPU all of it is launched, on the side stream.
        """
        future, checked = promise(bucket.device)
        if bucket.is_cuda:
            walk(way, self._meter)
            future.set_result(bucket)
            return checked
        if not self._lanes:
            self._lanes = [Lane(f"pykernels comm {i}") for i in range(self._count)]
        self._advance(0, None, way, bucket, future)
        if self._error is not None:
            raise self._error
        return checked

    def _advance(
        self, lane: int, waited: tuple[str, dist.Work] | None, way: Way, bucket: torch.Tensor, future: Averaged
    ) -> None:
        """Wait, go on to the next work, and leave that to `lane`. Never raises: an error goes where backward waits."""
        try:
            if self._error is not None:
                raise self._error
            if waited is not None:
                with self._meter.timed(waited[0]):
                    waited[1].wait()
            following = next(way, None)
            if following is None:
                future.set_result(bucket)
            else:
                self._lanes[lane].submit(lambda: self._advance(lane + 1, following, way, bucket, future))
        except BaseException as error:  # of any kind: the thread must live, and the caller of backward must see it
            self._error = error if isinstance(error, Exception) else RuntimeError(f"pykernels: {error!r} in a hook")
            future.set_exception(self._error)  # type: ignore[arg-type]  # torch annotates it with the result's type

    def side_stream(self, device: torch.device) -> AbstractContextManager[object]:
        """On a GPU, a stream of our own that waits for the current one; nothing on a CPU."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes = []


def promise(device: torch.device) -> tuple[Averaged, Averaged]:
    """A future to set, for a tensor on `device`, and the one to give to DDP, which follows it.

    Only what a callback raises is an error for DDP: an exception that is merely set would be taken for a tensor.
    """
    future: Averaged = torch.futures.Future(devices=[device]) if device.type == "cuda" else torch.futures.Future()
    return future, future.then(lambda done: done.value())
