"""int8 matrix products with static scales: u8 x s8 -> fp32 (and s32 by int8_mm and torch._int_mm)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.families import measure, parameters
from pykernels.bench import Case
from pykernels.bench.rivals import Rival


@pytest.mark.parametrize(("make", "rival"), parameters("gemm"))
def test_gemm(benchmark: BenchmarkFixture, make: Callable[[], Case], rival: Rival) -> None:
    measure(benchmark, make, rival)
