"""`Instances`: one network in several threads of this process, each with cores and a thread pool of its own.

Calls of one large network gain little from many threads, and nothing at all in layers of few tasks; several calls side
by side do. All instances call the same network: weights and plans are there once, and each call has memory of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from pykernels.graph.alias import writes
from pykernels.optimized import Optimized
from pykernels.tune.on_device import copy_on, from_host
from pykernels.tune.setup import Setup
from pykernels.tune.workers import Workers

__all__ = ["Instances", "check"]


def check(network: Optimized) -> None:
    """Whether several threads may call this network at once.

    Raises:
        TypeError: it is no `Optimized` network.
        ValueError: its calls write into buffers or inputs.
    """
    if not isinstance(network, Optimized):
        raise TypeError(f"network: an Optimized network is needed, not {type(network).__name__}")
    if any(writes(node) for node in network.program.graph.nodes):
        raise ValueError("network: its calls write into buffers or inputs, so they cannot run side by side")


class Instances:
    """A network in `setup.instances` threads of this process, `setup.threads` of torch's threads and cores each.

    A call waits in one queue until an instance is free. An instance is a Python thread that is pinned to cores of its
    own before torch starts that thread's OpenMP pool, which inherits them. Numbers and cores of other threads stay as
    they are. `setup.batch` is what the setup was measured with: calls may have any size, nothing is put together here.

    Gradients are not recorded. Results are those of ``network(...)``, bit for bit. On a CUDA device inputs are copied
    there from the host's memory and answers back to it, beside the calls of other instances. Close it, or use it as a
    context manager.

    Args:
        network: an `Optimized` network whose calls write into nothing.
        setup: threads, instances and device; where the network is on another device, a copy of it runs there.
        queue: how many calls may wait; `submit` blocks while so many do.
        cores: the logical processors to take, by default all that the calling thread may use. Two objects that are
            to run side by side need disjoint ones.

    Attributes:
        cores: of each instance the processors that it is pinned to.

    Raises:
        TypeError: `network` or `setup` is something else.
        ValueError: as `check`; the setup's device cannot be used; `queue` is below 1; the setup asks for more cores
            than there are, by the affinity mask, by the control groups' quota or by `cores`; or `cores` names some that
            this thread may not use.
        RuntimeError: the system did not pin a thread, or torch did not take the number of threads.
    """

    def __init__(self, network: Optimized, setup: Setup, queue: int = 256, cores: Iterable[int] | None = None) -> None:
        check(network)
        self._workers = Workers(setup, queue, cores)
        self.setup, self.cores = self._workers.setup, self._workers.cores
        try:
            self._network = from_host(network if setup.device is None else copy_on(network, setup.device))
        except BaseException:
            self._workers.close()
            raise

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call of the network. Blocks while the queue is full. Errors of the call go to the future.

        Raises:
            RuntimeError: closed, an instance has died, or the queue is full and it is an instance that asks (in a
                callback of a future), which would wait for itself.
        """
        return self._workers.submit(self._network, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer, as it is in turn.

        Raises:
            RuntimeError: as `submit`, or called by an instance.
        """
        self._workers.refuse_own_threads("a call")
        return self.submit(*args, **kwargs).result()

    def map(self, *iterables: Iterable[Any]) -> Iterator[Any]:
        """Answers in order, of calls with one entry of each iterable, as of the built-in ``map``. They are read as far
        ahead as there are instances, twice; what is queued when the iterator is given up is cancelled.

        Raises:
            RuntimeError: as a call.
        """
        self._workers.refuse_own_threads("map")
        waiting: deque[Future[Any]] = deque()
        try:
            for args in zip(*iterables, strict=False):
                if len(waiting) >= 2 * self.setup.instances:
                    yield waiting.popleft().result()
                waiting.append(self.submit(*args))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Take no more calls, finish those that are queued, end the threads. May be called again.

        Raises:
            RuntimeError: called by an instance.
        """
        self._workers.close()

    def __enter__(self) -> Instances:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
