"""Quantize, dequantize and the requantized addition: passes that only memory limits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.families import measure, parameters
from pykernels.bench import Case
from pykernels.bench.rivals import Rival


@pytest.mark.parametrize(("make", "rival"), parameters("quantize"))
def test_quantize(benchmark: BenchmarkFixture, make: Callable[[], Case], rival: Rival) -> None:
    measure(benchmark, make, rival)
