"""The linears of BERT-base and of a 4096-wide decoder: fp32, bf16, and int8 quantized as the activations come."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.families import measure, parameters
from pykernels.bench import Case
from pykernels.bench.rivals import Rival


@pytest.mark.parametrize(("make", "rival"), parameters("linear"))
def test_linear(benchmark: BenchmarkFixture, make: Callable[[], Case], rival: Rival) -> None:
    measure(benchmark, make, rival)
