"""What a hook did: bytes, times, residuals."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace


@dataclass
class Stats:
    """Sums over all steps so far.

    Attributes:
        steps: backward passes with communication.
        gradient_bytes: what an uncompressed ring all-reduce would have sent from this rank.
        wire_bytes: what this rank sent.
        seconds: by phase: encode, exchange, reduce, gather, decode. Exchange and gather are waits for the wire; the
            phases of different buckets overlap. On GPUs these are times to launch, since nothing waits.
        residual_norms: Euclidean norm of the worker residual of each parameter, where there is one.
    """

    steps: int = 0
    gradient_bytes: int = 0
    wire_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    residual_norms: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Bytes of an uncompressed all-reduce over bytes sent."""
        return self.gradient_bytes / self.wire_bytes if self.wire_bytes else 1.0

    def __str__(self) -> str:
        over, count = (" a step", f"{self.steps} steps, ") if self.steps else ("", "")  # nobody counts some steps
        each = max(1, self.steps)
        times = ", ".join(f"{name} {1e3 * value / each:.1f}" for name, value in self.seconds.items())
        return (
            f"{count}{self.wire_bytes / each / 1e6:.2f} MB{over} on the wire ({self.ratio:.1f}x fewer), "
            f"ms{over}: {times or 'none'}"
        )


class Meter:
    """Adds up, from the threads of all lanes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = Stats()

    def __getstate__(self) -> Stats:
        return self.snapshot()

    def __setstate__(self, total: Stats) -> None:
        self._lock, self.total = threading.Lock(), total

    def snapshot(self, norms: Mapping[str, float] | None = None) -> Stats:
        """A copy of the sums, with residual `norms`."""
        with self._lock:
            return replace(self.total, seconds=dict(self.total.seconds), residual_norms=dict(norms or {}))

    def sent(self, gradient_bytes: float, wire_bytes: float) -> None:
        with self._lock:
            self.total.gradient_bytes += int(gradient_bytes)
            self.total.wire_bytes += int(wire_bytes)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            with self._lock:
                self.total.seconds[phase] = self.total.seconds.get(phase, 0.0) + elapsed
