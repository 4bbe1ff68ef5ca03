"""Where calls of networks run, and how many at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

__all__ = ["Runner", "Submits"]


class Submits(Protocol):
    """`pykernels.tune.Workers`, or an executor."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]: ...


class Runner:
    """Threads on which networks are called. On one event loop.

    Args:
        threads: what runs the calls.
        at_once: how many.

    Attributes:
        free: how many calls could begin now.
        idle_since: when (of `time.monotonic`) one of them ended last.
        death: why no call can run any more; None while they can.
    """

    def __init__(self, threads: Submits, at_once: int) -> None:
        self.threads, self.at_once = threads, at_once
        self.free = at_once
        self.idle_since = -math.inf
        self.death: str | None = None

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Queue a call.

        Raises:
            RuntimeError: no call can run any more.
        """
        return self.threads.submit(function, *args)
