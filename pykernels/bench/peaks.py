"""The machine's measured ceilings: arithmetic peak of the isa in force per precision, and bandwidth per level of
memory."""

from __future__ import annotations

import pathlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Level:
    """One level of memory: `capacity` bytes for all threads together (None: no end), bandwidth in bytes a second."""

    name: str
    capacity: int | None
    read: float
    copy: float


@dataclass(frozen=True)
class Peaks:
    """`operations`: for fp32, bf16 and int8, operations a second of all threads (a multiply and an add are two)."""

    operations: dict[str, float]
    levels: tuple[Level, ...]

    def bandwidth(self, traffic: float) -> float:
        """Read bandwidth of the first level that holds `traffic` bytes."""
        for level in self.levels:
            if level.capacity is None or traffic <= level.capacity:
                return level.read
        return self.levels[-1].read

    def seconds(self, precision: str, work: float, traffic: float) -> tuple[float, str]:
        """The least time the machine needs, and what sets it: "compute" or "memory" (the roofline)."""
        compute, memory = work / self.operations[precision], traffic / self.bandwidth(traffic)
        return (compute, "compute") if compute >= memory else (memory, "memory")


def cache_sizes(root: pathlib.Path = pathlib.Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[int, int]:
    """Bytes of the data caches by level, as the system tells them; empty where it tells nothing."""
    sizes: dict[int, int] = {}
    for index in sorted(root.glob("index*")):
        kind, size = index / "type", index / "size"
        found = re.fullmatch(r"(\d+)([KMG]?)", size.read_text().strip()) if size.exists() else None
        if found and kind.exists() and kind.read_text().strip() != "Instruction":
            sizes[int((index / "level").read_text())] = int(found.group(1)) * _UNITS[found.group(2)]
    return sizes


def measure(seconds: float = 0.15) -> Peaks:
    """Measure with torch's present threads and the isa in force; each number is the best of several tries of
    `seconds` in all.

    Raises:
        RuntimeError: the CPU library is not loaded.
    """
    operations = {precision: _operations(precision, seconds) for precision in ("fp32", "bf16", "int8")}
    threads, caches = torch.get_num_threads(), cache_sizes()
    l2, l3 = caches.get(2, 2**20), caches.get(3, 0)
    levels = [_level("L2", l2 * threads, l2 * threads // 4, seconds)]
    if l3 > 2 * l2 * threads:
        # A virtual machine may be told of an L3 that it shares: measure well inside it.
        levels.append(_level("L3", l3, max(2 * l2 * threads, min(l3 // 8, 2**23)), seconds))
    levels.append(_level("DRAM", None, max(2**27, 4 * l3), seconds))
    return Peaks(operations, tuple(levels))


def _operations(precision: str, seconds: float) -> float:
    return _best(lambda steps: torch.ops.pykernels._peak(precision, steps), 2**20, seconds)


def _level(name: str, capacity: int | None, measured: int, seconds: float) -> Level:
    source, target = torch.ones(measured // 2, dtype=torch.uint8), torch.zeros(measured // 2, dtype=torch.uint8)

    def rate(kind: str) -> float:
        return _best(
            lambda rounds: torch.ops.pykernels._bandwidth(target, source, kind, rounds),
            max(1, 2**26 // measured),
            seconds,
        )

    return Level(name, capacity, rate("read"), rate("copy"))


def _best(run: Callable[[int], float], count: int, seconds: float) -> float:
    """The best rate over `seconds` of tries; the count grows until a try would take a sixteenth of them at that rate.

    (At the best rate, not at this try's: on a busy machine a short try may take long for no reason of its own.)
    """
    best, enough = 0.0, False
    run(count)  # starts the threads
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not enough:
        start = time.perf_counter()
        done = run(count)
        best = max(best, done / (time.perf_counter() - start))
        enough = done / best >= seconds / 16
        if not enough:
            count *= 2
    return best
