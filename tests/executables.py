"""The executables of tests/cpp, built and run."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PATH = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
CMAKE = shutil.which("cmake", path=PATH)

buildable = [
    pytest.mark.skipif(CMAKE is None or shutil.which("ninja", path=PATH) is None, reason="no cmake or no ninja"),
    pytest.mark.skipif(shutil.which("c++", path=PATH) is None, reason="no C++ compiler"),
]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True)


def built(target: str, folder: pathlib.Path, *options: str) -> pathlib.Path:
    """The executable, configured with these options and built in the folder."""
    assert CMAKE is not None
    fixed = [f"-DPython_EXECUTABLE={sys.executable}", "-DPYKERNELS_CPP_TESTS=ON", "-DPYKERNELS_CUDA=off"]
    for command in (
        [CMAKE, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *fixed, *options],
        [CMAKE, "--build", str(folder), "--target", target],
    ):
        done = _run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / target


def report(target: str, folder: pathlib.Path, *options: str, arguments: Sequence[str] = ()) -> list[str]:
    """What the executable prints, line by line, when it is built so and called with these arguments."""
    done = _run(str(built(target, folder, *options)), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()
