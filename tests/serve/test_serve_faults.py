"""No request is lost when something dies: `benchmarks/serve/faults.py`, whose exit status says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
pytest.importorskip("ray", reason="the extra `serve` is not installed")


@pytest.mark.parametrize("options", [[], ["--protocol", "grpc", "--only", "replica"]], ids=["http", "grpc"])
def test_every_request_is_answered_while_replicas_proxies_and_nodes_die_and_another_version_is_deployed(
    options: list[str],
) -> None:
    from benchmarks.serve.cluster import unusable

    if (why := unusable()) is not None:
        pytest.skip(why)
    command = [sys.executable, "-m", "benchmarks.serve.faults", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
