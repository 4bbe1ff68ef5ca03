"""The convolutions of ResNet-18/50, VGG16 and MobileNetV2: fp32, bf16, and int8 from bytes to bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.families import measure, parameters
from pykernels.bench import Case
from pykernels.bench.rivals import Rival


@pytest.mark.parametrize(("make", "rival"), parameters("conv"))
def test_conv(benchmark: BenchmarkFixture, make: Callable[[], Case], rival: Rival) -> None:
    measure(benchmark, make, rival)
