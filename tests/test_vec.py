"""The vector layer (csrc/cpu/isa) yields the same bits on every isa: tests/cpp/vec_test.cpp, built and run here.

Built twice: as shipped, where it runs the isas of this CPU, and emulated, where AVX2 runs every isa's code.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PATH = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
CMAKE = shutil.which("cmake", path=PATH)

pytestmark = [
    pytest.mark.skipif(CMAKE is None or shutil.which("ninja", path=PATH) is None, reason="no cmake or no ninja"),
    pytest.mark.skipif(shutil.which("c++", path=PATH) is None, reason="no C++ compiler"),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True)


@pytest.mark.parametrize("emulate", ["OFF", "ON"], ids=["shipped", "emulated"])
def test_vector_layer_yields_the_same_bits_on_every_isa(emulate: str, tmp_path: pathlib.Path) -> None:
    assert CMAKE is not None
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DPYKERNELS_CPP_TESTS=ON", f"-DPYKERNELS_EMULATE={emulate}"]
    options.append("-DPYKERNELS_CUDA=off")
    for command in (
        [CMAKE, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", *options],
        [CMAKE, "--build", str(tmp_path), "--target", "vec_test"],
        [str(tmp_path / "vec_test")],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout.splitlines()
    checked = re.fullmatch(r"scalar: (\d+) operations, 0 differences", report[0])
    assert len(report) == 5 and checked is not None and int(checked[1]) > 50, done.stdout
    if emulate == "ON" and "avx2: not on this CPU" not in report:
        assert all(line.endswith(f": {checked[1]} operations, 0 differences") for line in report), done.stdout
