"""Kernels compiled by many processes at once, before one process alone times them.

A Triton kernel takes seconds to compile, on one core; a GPU that waits for it costs as much as one that works. So what
a command is about to run is gone through first by a pool of processes in which launches compile and do not run. What
they make lies in Triton's cache on disk (TRITON_CACHE_DIR), where the process that measures finds it.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

__all__ = ["cores", "kernels_only", "warm"]

PROCESSES = 16  # each has a context of its own on the GPU, about half a GB


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def kernels_only() -> Iterator[None]:
    """Meanwhile a launch of a Triton kernel compiles it and leaves its arguments as they are."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compiled(kernel: Any, *arguments: Any, **named: Any) -> Any:
        return run(kernel, *arguments, **{**named, "warmup": True})

    JITFunction.run = compiled
    try:
        yield
    finally:
        JITFunction.run = run


def _begin() -> None:
    torch.set_num_threads(1)


def warm(tasks: Sequence[Callable[[], Any]], processes: int | None = None) -> dict[str, int]:
    """Call `tasks` in a pool of processes, and say what they took; by its words, how many tasks raised an error.

    `tasks` must be picklable. They are started in any order, since neighbours often need the same kernels. What fails
    here fails again where it is measured, and is told of there.
    """
    begin = time.monotonic()
    errors: Counter[str] = Counter()
    order = random.Random(0).sample(list(tasks), len(tasks))
    count = min(processes or min(cores(), PROCESSES), len(order))
    if count == 0:
        return {}
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin) as pool:
        for done in as_completed([pool.submit(task) for task in order]):
            error = done.exception()
            if isinstance(error, BrokenProcessPool):
                errors["a process that compiled ended early; the rest is compiled when it is measured"] += 1
            elif error is not None:
                errors[f"{type(error).__name__}: {error}".splitlines()[0][:200]] += 1
    seconds = time.monotonic() - begin
    print(f"compiled: {len(order)} calls, {count} processes, {seconds:.1f} s", flush=True)
    for words, times in errors.items():
        print(f"  {times} did not compile: {words}", flush=True)
    return dict(errors)
