"""One family's cases as pytest-benchmark tests, thin over `pykernels.bench`: the same cases, rivals and checks.

`pykernels bench` interleaves rivals round by round and is what figures are quoted from; these files serve to compare
two commits (`pytest benchmarks/bench_conv.py --benchmark-compare`) and to profile one entry (`-k "resnet50 and int8"`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pykernels.bench import Case, cases, peaks
from pykernels.bench.rivals import Absent, Rival, everybody
from pykernels.bench.rivals.remote import Remote


def parameters(family: str) -> list[object]:
    """Every case of the family with every rival that may take it in this process; ids read "case-rival precision"."""
    found: list[object] = []
    for label, make in cases(family):
        making = functools.lru_cache(maxsize=1)(make)
        here = [r for r in everybody() if family in r.families and not isinstance(r, Remote)]
        found += [pytest.param(making, r, id=f"{label}-{r.label}") for r in here]
    return found


def measure(benchmark: BenchmarkFixture, make: Callable[[], Case], rival: Rival) -> None:
    """Prepare, hold the answer against the oracle, then time; skipped with the reason where the rival is absent."""
    try:
        case = make()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    if rival.precision not in case.precisions:
        pytest.skip(f"the case has no {rival.precision} form")
    try:
        run = rival.prepare(case)
    except Absent as absent:
        pytest.skip(str(absent))
    output = torch.as_tensor(run())
    error = case.error(rival.precision, output)
    assert error <= case.allowed(rival.precision, output), f"wrong answer: error {error:.3g}"
    benchmark.group = case.label
    benchmark(run)
    if benchmark.stats is not None:  # None under --benchmark-disable
        median = benchmark.stats.stats.median
        least, limit = ceilings().seconds(rival.precision, case.work, case.traffic[rival.precision])
        benchmark.extra_info.update(
            rival=rival.label, error=error, gops=case.work / median / 1e9, share_of_limit=least / median, limit=limit
        )


@functools.cache
def ceilings() -> peaks.Peaks:
    """The machine's, measured once a session."""
    return peaks.measure()
