"""The vector layer (csrc/cpu/isa) yields the same bits on every isa: tests/cpp/vec_test.cpp, built and run here.

Built twice: as shipped, where it runs the isas of this CPU, and emulated, where AVX2 runs every isa's code.
"""

from __future__ import annotations

import pathlib
import re

import pytest
from executables import buildable, report

from pykernels.ops.names import ISAS

pytestmark = buildable


@pytest.mark.parametrize("emulate", ["OFF", "ON"], ids=["shipped", "emulated"])
def test_vector_layer_yields_the_same_bits_on_every_isa(emulate: str, tmp_path: pathlib.Path) -> None:
    lines = report("vec_test", tmp_path, f"-DPYKERNELS_EMULATE={emulate}")
    checked = re.fullmatch(r"scalar: (\d+) operations, 0 differences", lines[0])
    assert len(lines) == len(ISAS) and checked is not None and int(checked[1]) > 50, lines
    if emulate == "ON" and "avx2: not on this CPU" not in lines:
        assert all(line.endswith(f": {checked[1]} operations, 0 differences") for line in lines), lines
