"""The tests of what works with Flower and with torchft, in a folder of packages that comes first: they are no part of
the tests' environment, since Flower wants another version of what our command line is written with.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
REQUIREMENTS = HERE.parents[1] / ".ci" / "requirements.py"
TORCHFT_NEEDS = ["opentelemetry-exporter-otlp-proto-http>=1.39", "opentelemetry-sdk>=1.39"]  # and torch, which is here


def required(extra: str) -> str:
    return subprocess.run(
        [sys.executable, str(REQUIREMENTS), extra], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Flower 1.42 wants Python 3.11")
def test_flower_and_torchft(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "packages"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(folder),
    ]
    subprocess.run([*install, required("federated"), *TORCHFT_NEEDS], check=True, timeout=900)
    subprocess.run([*install, "--no-deps", required("torchft")], check=True, timeout=900)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *(p for p in sys.path if p)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_flower.py", "test_torchft.py"]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\b\d+ passed in ", done.stdout.splitlines()[-1]), done.stdout[-5000:]  # and none was skipped
