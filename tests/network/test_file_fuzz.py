"""A few hundred damaged and hostile files (see fuzz_file.py, which makes as many as one likes)."""

from __future__ import annotations

import os
import subprocess
import sys


def test_no_damaged_file_crashes_hangs_or_is_believed() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = [sys.executable, "-W", "ignore", "-m", "tests.network.fuzz_file", "--count", "500"]
    done = subprocess.run(code, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("500 cases"), done.stdout + done.stderr[-2000:]
