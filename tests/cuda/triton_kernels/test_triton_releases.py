"""Kernels compile, and their machine code is what it is to be, with the Tritons of every torch that we promise.

torch 2.10 and 2.11 come with 3.6, 2.12 and 2.13 with 3.7, 2.14 with 3.8. The one that is installed here is seen by the
tests of machine code beside this file; these install the others into folders of their own and run the same tests.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import triton

HERE = pathlib.Path(__file__).parent
RELEASES = ["3.6.0", "3.7.1", "3.8.0"]


@pytest.mark.slow
@pytest.mark.parametrize("release", [r for r in RELEASES if r != triton.__version__])
def test_machine_code_of(release: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "triton"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*install, "--target", str(folder), f"triton=={release}"], check=True, timeout=600)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *(p for p in sys.path if p)]),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    seen = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.run(seen, env=environment, capture_output=True, text=True, check=True).stdout.strip() == release
    files = ["test_cubin.py", "test_cubin_gemm.py", "test_cubin_conv.py"]
    tests = [*files, *(path.name for path in sorted(HERE.glob("test_triton_*.py")) if path != pathlib.Path(__file__))]
    chosen = " or ".join([*(name.removesuffix(".py") for name in files), "test_machine_code"])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
