"""Interleaved timing: every entry runs once a round, so that a disturbance or a change of clock meets them all
alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PAUSE_SECONDS = 30e-3
"""Before each sample: for so long, measured, the worker threads of OpenVINO and ONNX Runtime spin after a call."""
SAMPLE_SECONDS = 2e-3
"""A sample shorter than this is repeated within the round: the watch and the loop must not count."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one number a round, in the order taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """The interquartile range over the median: above 0.2 the machine was busy."""
        if len(self.samples) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median


def interleave(
    calls: Sequence[Callable[[], object]],
    rounds: int = 15,
    seconds: float = 10.0,
    pause: float = PAUSE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Timing]:
    """Time `calls` round by round and return a `Timing` for each.

    The calls have run before (their answers were checked). Within a round each call gets a pause (the worker threads
    of the call before may spin on a core for milliseconds), one run that is not counted (its code and weights
    come back into the caches) and one sample of one or more runs. At least three rounds are made, then more until
    `rounds` are done or `seconds` have passed. A call with a method `seconds(times)` is in another process and holds
    the watch itself: it tells how long so many runs took there.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: must be at least 1, not {rounds}")
    runs = [_watched(call, clock) for call in calls]
    repeats, warmed = [], []
    for run in runs:
        taken = run(1)
        repeats.append(max(1, min(1000, round(SAMPLE_SECONDS / max(taken, 1e-7)))))
        warmed.append(taken > max(1.0, seconds / 10))  # so long a call brings its own data into the caches
    samples: list[list[float]] = [[] for _ in calls]
    begin = clock()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and clock() - begin > seconds:
                break
            for k in range(len(calls)):
                i = (k + done) % len(calls)  # nobody always runs after the same neighbour's pause
                sleep(pause)
                if not warmed[i]:
                    runs[i](1)
                samples[i].append(runs[i](repeats[i]) / repeats[i])
    finally:
        if collecting:
            gc.enable()
    return [Timing(tuple(taken)) for taken in samples]


def _watched(call: Callable[[], object], clock: Callable[[], float]) -> Callable[[int], float]:
    """Seconds that so many runs of `call` take."""
    own: Callable[[int], float] | None = getattr(call, "seconds", None)
    if own is not None:
        return own

    def run(times: int) -> float:
        start = clock()
        for _ in range(times):
            call()
        return clock() - start

    return run
