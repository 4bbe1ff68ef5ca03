"""Which of many setups is best, by interleaved successive halving. It measures nothing itself, so it is tested without.

All candidates are measured round by round, so that a disturbance meets them alike; medians of the rounds count. Then
the better half goes on, with longer rounds (successive halving: Jamieson and Talwalkar, AISTATS 2016).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pykernels.tune.setup import Trial, place

__all__ = ["Candidate", "Measure", "NoSetup", "Sample", "candidates", "counts", "p99", "search"]

ROUNDS = 9  # at most, before half of the candidates go
SLICE = 0.1  # seconds of one measurement, or more
AT_ONCE = 4  # calls on a CUDA device: one computes, one is copied there, one back, one is between
_SURE = 1.645  # deviations of a normal distribution that one of twenty exceeds
PAUSE = 0.03  # seconds between two: the threads of OpenMP spin for some milliseconds after a call


@dataclass(frozen=True)
class Candidate:
    """Threads a call, calls at once, items a call; where."""

    threads: int
    instances: int
    batch: int
    device: str = "cpu"


@dataclass(frozen=True)
class Sample:
    """One measurement: the seconds of each call, and items a second of all instances together."""

    latencies: tuple[float, ...]
    items_per_second: float


Measure = Callable[[Candidate, float], Sample]
"""Measures a candidate for about so many seconds."""


def p99(latencies: Sequence[float]) -> float:
    """The time within which 99 % of these were done; of fewer than 100 the slowest."""
    return sorted(latencies)[math.ceil(0.99 * len(latencies)) - 1]


class NoSetup(ValueError):
    """No setup that was measured keeps the bound."""


def counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 ... up to `most`, which is one of them."""
    steps = {2**i * k // 2 for i in range(most.bit_length()) for k in (2, 3)}
    return sorted({n for n in steps if n <= most} | {most})


def candidates(cores: int, batches: Sequence[int], several: bool, device: str = "cpu") -> list[Candidate]:
    """All that need no more than `cores`, of one instance or of `several`: those that leave few cores idle first, and
    among them small batches. On a CUDA device each call has one thread, which copies and launches, and a few at once
    are enough to keep it busy: small batches first."""
    if device != "cpu":
        most = min(cores, AT_ONCE) if several else 1
        return [Candidate(1, n, batch, device) for batch in sorted(batches) for n in range(1, most + 1)]
    found = [
        Candidate(threads, instances, batch)
        for threads in counts(cores)
        for instances in (counts(cores // threads) if several else [1])
        for batch in batches
    ]
    return sorted(found, key=lambda c: (cores - c.threads * c.instances, c.batch, c.threads))


@dataclass
class _Entry:
    """A candidate and all that was measured of it. `halvings`: how often it was in the better half."""

    candidate: Candidate
    samples: list[Sample] = field(default_factory=list)
    halvings: int = 0
    taken: float = 0.0  # seconds of its last measurement, with all that belongs to it

    def trial(self) -> Trial:
        latencies = [latency for sample in self.samples for latency in sample.latencies]
        c = self.candidate
        return Trial(
            threads=c.threads,
            instances=c.instances,
            batch=c.batch,
            latency_ms=statistics.median(statistics.median(s.latencies) for s in self.samples) * 1e3,
            p99_ms=p99(latencies) * 1e3,
            items_per_second=statistics.median(s.items_per_second for s in self.samples),
            calls=len(latencies),
            rounds=len(self.samples),
            device=c.device,
        )

    def rank(self, bound_ms: float | None) -> tuple[bool, float]:
        """As `_rank`; but over the bound only where more calls were than one of twenty setups that keep it would have:
        of few calls the slowest is the p99, and one that was disturbed says nothing."""
        trial = self.trial()
        if bound_ms is None or trial.p99_ms <= bound_ms:
            return _rank(trial, bound_ms)
        late = sum(1e3 * latency > bound_ms for sample in self.samples for latency in sample.latencies)
        usual = trial.calls / 100  # and its square root is about the deviation
        if late <= max(1.0, usual + _SURE * math.sqrt(0.99 * usual)):
            return False, -trial.items_per_second
        return _rank(trial, bound_ms)


def search(
    wanted: Sequence[Candidate],
    measure: Measure,
    bound_ms: float | None = None,
    seconds: float = 30.0,
    pause: float = PAUSE,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Trial]:
    """What was measured, the best first: those that were measured longest before others, then by the goal.

    Without a bound the goal is the shortest call (the median), with one most items a second among those whose p99 of
    all calls keeps it. At least one candidate is measured; a measurement is not begun that would end after the time.

    Args:
        wanted: in the order of the first round.
        measure: called as ``measure(candidate, seconds)``.
        bound_ms: of the p99 latency.
        seconds: for all of it.
        pause: before each measurement: threads of the one before may still spin on a core.
        progress: called as ``progress("4 setups", done, total)``, in seconds.

    Raises:
        NoSetup: none that was measured keeps the bound; the message names the best p99.
    """
    begin = clock()
    entries = [_Entry(candidate) for candidate in wanted]

    def timed(entry: _Entry, alive: int, each: float) -> bool:
        """Measure a candidate once more; False when there is no time for it."""
        now = clock() - begin
        if any(e.samples for e in entries) and now + max(entry.taken, pause + SLICE) > seconds:
            return False
        if bound_ms is None or entry.samples or not _hopeless(entry.candidate, entries, bound_ms):
            if progress is not None:
                progress(f"{alive} setups", int(now), math.ceil(seconds))
            sleep(pause)
            entry.samples.append(measure(entry.candidate, each))
            entry.taken = clock() - begin - now
        return True

    alive = entries
    while len(alive) > 1 or not alive[0].samples:
        halvings = max(1, math.ceil(math.log2(len(alive))))
        left = 0.9 * (seconds - (clock() - begin))  # a measurement takes a little longer than it is told to
        budget = left / halvings / len(alive)  # of one candidate, until the next halving
        rounds = min(max(int(budget / (SLICE + pause)), 1), ROUNDS)
        each = max(budget / rounds - pause, SLICE)
        # Nobody always runs behind the same neighbour, but the first round goes from small batches to large ones.
        turns = [alive[i:] + alive[:i] for i in (turn % len(alive) for turn in range(rounds))]
        if not all(timed(entry, len(alive), each) for turn in turns for entry in turn):
            break
        measured = sorted((e for e in alive if e.samples), key=lambda e: e.rank(bound_ms))
        alive = measured[: (len(measured) + 1) // 2]
        for entry in alive:
            entry.halvings += 1
    done = [(e.halvings, e.trial()) for e in entries if e.samples]
    trials = [trial for _, trial in sorted(done, key=lambda pair: _place(pair[0], pair[1], bound_ms))]
    if bound_ms is not None and trials[0].p99_ms > bound_ms:
        best = min(trials, key=lambda trial: trial.p99_ms)
        raise NoSetup(
            f"latency_ms: no setup keeps a p99 of {bound_ms:g} ms; the best p99 was {best.p99_ms:.2f} ms, with "
            f"{best.instances} x {best.threads} threads and batch {best.batch}{place(best.device)}"
        )
    return trials


def _hopeless(candidate: Candidate, entries: Sequence[_Entry], bound_ms: float) -> bool:
    """Whether half of the calls with fewer items were over the bound already: more items do not take less time."""
    return any(
        replace(e.candidate, batch=candidate.batch) == candidate
        and e.candidate.batch < candidate.batch
        and e.trial().latency_ms > bound_ms
        for e in entries
        if e.samples
    )


def _rank(trial: Trial, bound_ms: float | None) -> tuple[bool, float]:
    """Less is better."""
    if bound_ms is None:
        return False, trial.latency_ms
    over = trial.p99_ms > bound_ms
    return over, trial.p99_ms if over else -trial.items_per_second


def _place(halvings: int, trial: Trial, bound_ms: float | None) -> tuple[bool, int, float]:
    """Who was over the bound comes last, however long it stayed."""
    over, goal = _rank(trial, bound_ms)
    return over, -halvings, goal
