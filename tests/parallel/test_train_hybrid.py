"""The example that trains with a pipeline and data parallelism at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_hybrid.py"


def run(*options: str, ranks: int = 4, status: int = 0) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(EXAMPLE), "--data", "digits", "--width", "8", *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert bool(done.returncode) == bool(status), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_two_stages_of_two_replicas_learn_with_codecs_on_both_wires() -> None:
    said = run("--pp", "2", "--dp", "2", "--hook", "int8", "--stage-codec", "int8", "--epochs", "8")
    assert float(re.search(r"test accuracy ([\d.]+)%", said)[1]) > 90  # type: ignore[index]
    # so narrow a network has many parameters of one dimension, which travel between replicas as fp32
    for wire, least in (("stages", 3.8), ("replicas", 3.3)):
        assert float(re.search(rf"between {wire}: .*\(([\d.]+)x fewer", said)[1]) > least  # type: ignore[index]


@pytest.mark.slow
def test_ranks_that_are_not_as_many_as_asked_for_are_told() -> None:
    assert "--pp 3 x --dp 2 are not the 2 ranks there are" in run("--pp", "3", "--dp", "2", ranks=2, status=1)
