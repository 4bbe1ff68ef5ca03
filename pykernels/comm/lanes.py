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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


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


Averaged = torch.futures.Future[torch.Tensor]
Step = Callable[[], "Step | None"]  # a part of a bucket's way, which returns the next one, or None at the end


class Lanes:
    """Runs the steps of buckets: step i of every bucket in lane i."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lanes: list[Lane] = []
        self._error: Exception | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def run(self, bucket: torch.Tensor, first: Step) -> Averaged:
        """Begin with `first`; the future holds `bucket` when no step is left, or what a step raised.

        After an error nothing is sent any more, since the ranks may be out of step: every bucket meets the same error.
        On a CPU the bucket's first step runs here and now, on a GPU all of them, on the side stream.
        """
        future, checked = promise(bucket.device)
        if bucket.is_cuda:
            step: Step | None = first
            while step is not None:
                step = step()
            future.set_result(bucket)
            return checked
        if self._error is not None:
            raise self._error
        if not self._lanes:
            self._lanes = [Lane(f"pykernels comm {i}") for i in range(self._count)]
        self._follow(0, first(), bucket, future)
        return checked

    def _follow(self, lane: int, step: Step | None, bucket: torch.Tensor, future: Averaged) -> None:
        if step is None:
            future.set_result(bucket)
            return

        def task() -> None:
            try:
                if self._error is not None:
                    raise self._error
                following = step()
            except Exception as error:  # whatever a step meets is what the caller of backward must see
                self._error = error
                future.set_exception(error)  # type: ignore[arg-type]  # torch annotates it with the result's type
                return
            self._follow(lane + 1, following, bucket, future)

        self._lanes[lane].submit(task)

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
