"""The cores that this process may use: its affinity mask, the CPU quota of its control groups, and who are siblings."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usable", "cpu_name", "cpu_quota", "spread", "usable"]

PROC, CPUS, CPUINFO = Path("/proc/self"), Path("/sys/devices/system/cpu"), Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Usable:
    """Which logical processors the calling thread may run on, and how many of them at once.

    Attributes:
        cores: the affinity mask, ascending.
        quota: processors' worth of time that the control groups grant; None without a limit.
    """

    cores: tuple[int, ...]
    quota: float | None

    @property
    def count(self) -> int:
        """How many threads can run at once all the time: a part of a processor is none, but there is always one."""
        return len(self.cores) if self.quota is None else max(1, min(len(self.cores), int(self.quota)))

    def __str__(self) -> str:
        limit = "" if self.quota is None else f", cgroup quota {self.quota:g}"
        return f"{self.count} (affinity {len(self.cores)}{limit})"


def usable() -> Usable:
    """What the calling thread may use now."""
    return Usable(tuple(sorted(os.sched_getaffinity(0))), cpu_quota())


def cpu_quota(proc: Path = PROC) -> float | None:
    """Processors' worth of CPU time a second that control groups grant this process; None without a limit.

    Of version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``), of its group and of all groups above it that are
    mounted here: the least counts.
    """
    granted = [quota for folder in _groups(proc) if (quota := _quota(folder)) is not None]
    return min(granted, default=None)


def _groups(proc: Path) -> Iterator[Path]:
    """Folders of the groups of this process that may limit its CPU time, from its own up to the root of each mount."""
    groups = {}
    for line in _lines(proc / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):  # version 2 names no controllers
            groups["cgroup" if controllers else "cgroup2"] = Path(path)
    for line in _lines(proc / "mountinfo"):
        fields, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        root, mount = (_unescaped(part) for part in fields.split(" ")[3:5])
        if kind not in groups or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        # In a container the path may be one of the host's, of which this mount shows only what is below its root.
        group = groups[kind]
        folder = Path(mount) / group.relative_to(root) if group.is_relative_to(root) else Path(mount)
        yield folder
        yield from (above for above in folder.parents if above.is_relative_to(mount))


def _quota(folder: Path) -> float | None:
    maximum = _words(folder / "cpu.max") or [
        *_words(folder / "cpu.cfs_quota_us"),
        *_words(folder / "cpu.cfs_period_us"),
    ]
    if len(maximum) != 2 or not maximum[0].isdigit() or not maximum[1].isdigit():  # "max", -1, or no such file
        return None
    quota, period = map(int, maximum)
    return quota / period if quota and period else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:  # another system, or a file that we may not read
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _unescaped(path: str) -> str:
    """mountinfo writes blanks as \\040."""
    return path.replace("\\040", " ")


def spread(cores: Iterable[int], instances: int, threads: int, cpus: Path = CPUS) -> list[tuple[int, ...]]:
    """Of each instance the cores that its threads run on, none of them twice.

    Where the physical cores suffice each thread has one of its own; else the logical processors of one physical core go
    to one instance, as far as that is possible. Neighbours are of one socket.

    Raises:
        ValueError: there are fewer cores than threads.
    """
    places = sorted((_physical(core, cpus), core) for core in cores)
    if instances * threads > len(places):
        raise ValueError(f"cores: {instances} x {threads} threads do not fit on {len(places)}")
    first = {physical: core for physical, core in reversed(places)}
    firsts = [first[physical] for physical in sorted(first)]
    ordered = firsts if instances * threads <= len(firsts) else [core for _, core in places]
    return [tuple(ordered[i * threads : (i + 1) * threads]) for i in range(instances)]


def _physical(core: int, cpus: Path) -> tuple[int, int]:
    """Socket and physical core of a logical processor; each counts as one of its own where the system does not tell."""
    folder = cpus / f"cpu{core}" / "topology"
    package, place = _words(folder / "physical_package_id"), _words(folder / "core_id")
    return (int(package[0]), int(place[0])) if package and place else (-1, core)


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    for line in _lines(CPUINFO):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
