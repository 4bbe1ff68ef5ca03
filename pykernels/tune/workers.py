"""`Workers`: threads of this process that are pinned to cores and have a number of torch's threads of their own."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from pykernels.tune.cores import spread, usable
from pykernels.tune.setup import Setup

__all__ = ["Workers"]

T = TypeVar("T")


class Workers:
    """`setup.instances` threads of this process, with `setup.threads` of torch's threads and cores each.

    A call waits in one queue until one of them is free. Each is a Python thread that is pinned to cores of its own
    before torch starts that thread's OpenMP pool, which inherits them. Numbers and cores of other threads stay as they
    are. Gradients are not recorded. Close it, or use it as a context manager.

    Args:
        setup: threads and instances.
        queue: how many calls may wait; `submit` blocks while so many do.
        cores: the logical processors to take, by default all that the calling thread may use. Two objects that are
            to run side by side need disjoint ones.

    Attributes:
        setup: as given.
        cores: of each instance the processors that it is pinned to.

    Raises:
        TypeError: `setup` is something else.
        ValueError: `queue` is below 1; the setup asks for more cores than there are, by the affinity mask, by the
            control groups' quota or by `cores`; or `cores` names some that this thread may not use.
        RuntimeError: the system did not pin a thread, or torch did not take the number of threads.
    """

    def __init__(self, setup: Setup, queue: int = 256, cores: Iterable[int] | None = None) -> None:
        if not isinstance(setup, Setup):
            raise TypeError(f"setup: a Setup is needed, not {type(setup).__name__}")
        if type(queue) is not int or queue < 1:
            raise ValueError(f"queue: must be a whole number of at least 1, not {queue!r}")
        there = usable()
        chosen = there.cores if cores is None else tuple(sorted(set(cores)))
        if not set(chosen) <= set(there.cores):
            raise ValueError(f"cores: {sorted(set(chosen) - set(there.cores))} are none of {list(there.cores)}")
        needed, most = setup.instances * setup.threads, min(there.count, len(chosen))
        if needed > most:
            given = "" if cores is None else f", cores names {len(chosen)}"
            raise ValueError(
                f"setup: {setup.instances} instances of {setup.threads} threads need {needed} cores, but this process "
                f"may use {there}{given}"
            )
        self.setup = setup
        self.cores = spread(chosen, setup.instances, setup.threads)
        self._pool = _Pool(queue)
        weakref.finalize(self, self._pool.close)  # what is queued is still answered
        self._pool.start(self.cores)

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queue ``function(*args, **kwargs)``. Blocks while the queue is full. Errors of the call go to the future.

        Raises:
            RuntimeError: closed, an instance has died, or the queue is full and it is an instance that asks (in a
                callback of a future), which would wait for itself.
        """
        future: Future[T] = Future()
        self._pool.put(future, partial(function, *args, **kwargs))
        return future

    def refuse_own_threads(self, what: str) -> None:
        """Raise RuntimeError when it is an instance that asks, for what it would wait for itself."""
        self._pool.refuse_own_threads(what)

    def close(self) -> None:
        """Take no more calls, finish those that are queued, end the threads. May be called again.

        Raises:
            RuntimeError: called by an instance.
        """
        self._pool.refuse_own_threads("close")
        self._pool.close()
        self._pool.join()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Pool:
    """The threads and what they share. They hold no reference to the `Workers`, so that these can be collected."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self.death: BaseException | None = None
        self.threads: list[threading.Thread] = []
        self.process = os.getpid()

    def start(self, cores: list[tuple[int, ...]]) -> None:
        before = torch.get_num_threads()
        started: list[Future[None]] = [Future() for _ in cores]
        for i, (own, ready) in enumerate(zip(cores, started, strict=True)):
            self.threads.append(
                threading.Thread(target=self._work, args=(own, ready), name=f"pykernels-{i}", daemon=True)
            )
        _POOLS.add(self)
        try:
            for thread in self.threads:
                thread.start()
            for ready in started:
                ready.result()
        except BaseException:
            self.close()
            self.join()
            raise
        finally:
            # torch gives a thread that it sees for the first time the number that any thread has set last.
            torch.set_num_threads(before)

    def put(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if not self._here():  # and the lock may be held by a thread that this process does not have
            raise RuntimeError("submit: these instances are threads of the process that this one was forked from")
        with self.changed:
            while True:
                if self.death is not None:
                    raise RuntimeError(f"submit: an instance has died: {self.death!r}") from self.death
                if self.closed:
                    raise RuntimeError("submit: these instances are closed")
                if len(self.calls) < self.limit:
                    break
                self.refuse_own_threads("submit while the queue is full")
                self.changed.wait()
            self.calls.append((future, call))
            self.changed.notify_all()

    def refuse_own_threads(self, what: str) -> None:
        if threading.current_thread() in self.threads:
            raise RuntimeError(
                f"{what}: an instance itself cannot do that, it would wait for itself; use another thread"
            )

    def close(self) -> None:
        if self._here():
            with self.changed:
                self.closed = True
                self.changed.notify_all()

    def join(self) -> None:
        if self._here():
            for thread in self.threads:
                if thread.ident is not None:  # it was started
                    thread.join()

    def _here(self) -> bool:
        return os.getpid() == self.process

    def _work(self, cores: tuple[int, ...], ready: Future[None]) -> None:
        try:
            os.sched_setaffinity(0, cores)  # of this thread; its OpenMP pool, started at the first call, inherits it
            torch.get_num_threads()  # torch's own setting of a new thread happens now, not after ours
            torch.set_num_threads(len(cores))
            if os.sched_getaffinity(0) != set(cores) or torch.get_num_threads() != len(cores):
                raise RuntimeError(
                    f"instances: asked for {len(cores)} threads on cores {list(cores)}, got {torch.get_num_threads()} "
                    f"on {sorted(os.sched_getaffinity(0))}"
                )
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            with torch.no_grad():
                while self._one():
                    pass
        except BaseException as error:  # of a callback, or sent to this thread: those of calls are in their futures
            self._die(error)

    def _one(self) -> bool:
        """Answer one call; False when there will be none."""
        with self.changed:
            while not self.calls and not self.closed:
                self.changed.wait()
            if not self.calls:
                return False
            future, call = self.calls.popleft()
            self.changed.notify_all()
        if not future.set_running_or_notify_cancel():
            return True
        try:
            answer = call()
        except BaseException as error:
            with contextlib.suppress(InvalidStateError):  # somebody else has set it
                future.set_exception(error)
        else:
            with contextlib.suppress(InvalidStateError):
                future.set_result(answer)
        return True

    def _die(self, error: BaseException) -> None:
        """Fewer instances would be slower in silence: nothing more is taken, and who waits is told."""
        with self.changed:
            self.death, self.closed = error, True
            left = list(self.calls)
            self.calls.clear()
            self.changed.notify_all()
        for future, _ in left:
            if future.set_running_or_notify_cancel():
                told = RuntimeError(f"an instance has died: {error!r}")
                told.__cause__ = error
                with contextlib.suppress(BaseException):  # of callbacks: the others are told nevertheless
                    future.set_exception(told)


_POOLS: weakref.WeakSet[_Pool] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """The interpreter must not go while a thread computes; what is queued is answered first, as by Python's own."""
    for pool in list(_POOLS):
        pool.close()
        pool.join()
