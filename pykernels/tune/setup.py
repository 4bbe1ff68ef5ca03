"""`Setup`: how a network is run, why, and where that was measured; as JSON, which is checked when it is read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

__all__ = ["DEVICE", "Setup", "Trial", "place"]

DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
MOST = 1 << 20  # of what is counted: more is a mistake


def place(device: str | None) -> str:
    """A device in words behind others: none for the CPU."""
    return "" if device in (None, "cpu") else f" on {device}"


@dataclass(frozen=True)
class Trial:
    """A setup that was measured.

    Attributes:
        threads, instances, batch, device: as in `Setup`.
        latency_ms: milliseconds a call, the median of the rounds' medians.
        p99_ms: milliseconds in which 99 % of all calls were done.
        items_per_second: items (dimension 0) of all instances together, the median of the rounds.
        calls, rounds: how many calls were timed, in how many rounds.

    Raises:
        ValueError: a field is of another type, or out of range.
    """

    threads: int
    instances: int
    batch: int
    latency_ms: float
    p99_ms: float
    items_per_second: float
    calls: int
    rounds: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("threads", "instances", "batch", "calls", "rounds"):
            _count(self, name)
        for name in ("latency_ms", "p99_ms", "items_per_second"):
            _measure(self, name)
        _device(self)


@dataclass(frozen=True)
class Setup:
    """How a network is run on a machine. `tune` finds one; one made by hand needs `threads` and `instances` alone.

    Attributes:
        threads: threads of one call.
        instances: calls at once, each on cores of its own.
        batch: items a call: dimension 0 of its inputs.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None is where the network is.
        bound_ms: the bound that p99_ms was to keep; None where the latency of a call was minimized.
        latency_ms, p99_ms, items_per_second, calls: what was measured, as in `Trial`; None where nothing was.
        cpu, cores, isa, gpu: the machine it was measured on: the processor's name, how many cores the process could
            use, the kernels in force; the CUDA device's name where one was tried.
        version: of pykernels.
        tried: everything that was measured, the best first.
        untried: for how many setups the time did not suffice, or which could not keep the bound as fewer items did not.

    Raises:
        ValueError: a field is of another type, or out of range.
    """

    threads: int
    instances: int
    batch: int = 1
    device: str | None = None
    bound_ms: float | None = None
    latency_ms: float | None = None
    p99_ms: float | None = None
    items_per_second: float | None = None
    calls: int | None = None
    cpu: str | None = None
    cores: int | None = None
    isa: str | None = None
    gpu: str | None = None
    version: str | None = None
    tried: tuple[Trial, ...] = dataclasses.field(default=(), repr=False)
    untried: int = 0

    def __post_init__(self) -> None:
        for name in ("threads", "instances", "batch"):
            _count(self, name)
        _count(self, "untried", least=0)
        for name in ("calls", "cores"):
            if getattr(self, name) is not None:
                _count(self, name)
        for name in ("bound_ms", "latency_ms", "p99_ms", "items_per_second"):
            if getattr(self, name) is not None:
                _measure(self, name)
        for name in ("cpu", "isa", "gpu", "version"):
            if not isinstance(getattr(self, name), str | None):
                _wrong(self, name, "text")
        if self.device is not None:
            _device(self)
        if not isinstance(self.tried, tuple) or not all(isinstance(trial, Trial) for trial in self.tried):
            _wrong(self, "tried", "a tuple of Trial")

    def __str__(self) -> str:
        text = f"{self.instances} x {self.threads} threads, batch {self.batch}{place(self.device)}"
        if self.latency_ms is not None and self.p99_ms is not None and self.items_per_second is not None:
            text += f": {self.latency_ms:.2f} ms, p99 {self.p99_ms:.2f} ms, {self.items_per_second:.1f} items/s"
        return text

    def report(self) -> str:
        """The table of what was tried, the best first, with the machine and the choice; printable."""
        rows = [("device", "threads", "instances", "batch", "ms", "p99 ms", "items/s", "calls", "rounds", "")]
        for t in self.tried:
            own = self.threads, self.instances, self.batch, self.device
            chosen = (t.threads, t.instances, t.batch, t.device) == own
            over = self.bound_ms is not None and t.p99_ms > self.bound_ms
            times = f"{t.latency_ms:.2f}", f"{t.p99_ms:.2f}", f"{t.items_per_second:.1f}"
            counts = str(t.calls), str(t.rounds)
            remark = "chosen" if chosen else "over the bound" if over else ""
            rows.append((t.device, str(t.threads), str(t.instances), str(t.batch), *times, *counts, remark))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = ("  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) for row in rows)
        lines = [f"{text}  {row[-1]}".rstrip() for text, row in zip(aligned, rows, strict=True)] if self.tried else []
        goal = "the shortest call" if self.bound_ms is None else f"most items/s with p99 up to {self.bound_ms:g} ms"
        lines += [f"{goal}: {self}"] if self.latency_ms is not None else [str(self)]
        if self.untried:
            lines.append(f"not tried: {self.untried} setups, for which the time or the bound left no room")
        if self.cpu is not None:
            gpu = "" if self.gpu is None else f", {self.gpu}"
            lines.append(f"{self.cpu}, {self.cores} cores, {self.isa}{gpu}, pykernels {self.version}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The setup as JSON, which `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no JSON, a key is missing, unknown or there twice, or a value is of another type or out of
                range; the message names it.
        """
        try:
            content = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"setup: it cannot be read: {error}") from error
        content = _fields(cls, content, "setup")
        tried = content.get("tried", [])
        if not isinstance(tried, list):
            raise ValueError("setup: tried must be a list")
        content["tried"] = tuple(Trial(**_fields(Trial, trial, f"tried[{i}]")) for i, trial in enumerate(tried))
        return cls(**content)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to a file.

        Raises:
            OSError: the file cannot be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Setup:
        """Read what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: as `from_json`, with the path.
        """
        with open(path, "rb") as file:
            content = file.read()
        try:
            return cls.from_json(content.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"path: {os.fspath(path)}: {error}") from error


def _fields(kind: type[Setup] | type[Trial], content: Any, where: str) -> dict[str, Any]:
    """`content` as arguments of `kind`."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: a JSON object is needed, not {type(content).__name__}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [name for name in content if name not in known]
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in content]
    if unknown or missing:
        complaint = f"unknown key {unknown[0]!r}" if unknown else f"{missing[0]!r} is missing"
        raise ValueError(f"{where}: {complaint}; the keys are {', '.join(known)}")
    return dict(content)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands in it twice")
    return content


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _count(owner: Any, name: str, least: int = 1) -> None:
    value = getattr(owner, name)
    if type(value) is not int or not least <= value <= MOST:
        _wrong(owner, name, f"a whole number of {least} to {MOST}")


def _measure(owner: Any, name: str) -> None:
    value = getattr(owner, name)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        _wrong(owner, name, "a finite number above 0")


def _device(owner: Any) -> None:
    if not isinstance(owner.device, str) or DEVICE.fullmatch(owner.device) is None:
        _wrong(owner, "device", "cpu, cuda or cuda:N")


def _wrong(owner: Any, name: str, wanted: str) -> NoReturn:
    what = type(owner).__name__.lower()
    raise ValueError(f"{what}: {name} must be {wanted}, not {getattr(owner, name)!r:.80}")
