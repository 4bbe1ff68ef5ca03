"""The cores of a replica: its own, and nobody else's."""

from __future__ import annotations

import contextlib
import os

from pykernels.tune.cores import spread, usable

__all__ = ["pin"]


def pin(rank: int, count: int) -> tuple[int, ...]:
    """Pin every thread of this process, and so those that they start, to `count` cores: the `rank`-th such set of those
    that the process may use, from the first again after the last. To be called before torch starts its threads.

    Raises:
        ValueError: there are fewer cores.
    """
    there = usable().cores
    if count > len(there):
        raise ValueError(f"threads: a replica needs {count} cores, but this process may use {usable()}")
    sets = spread(there, len(there) // count, count)
    own = sets[rank % len(sets)]
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            os.sched_setaffinity(int(thread), own)
    return own
