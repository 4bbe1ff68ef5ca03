"""The links that the benchmarks run on, where namespaces can be made."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

from benchmarks.comm import netns, step

REASON = netns.unusable()


def left() -> list[str]:
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if name.startswith(f"pk{os.getpid()}")]


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_ranks_see_each_other_over_shaped_links_and_leave_nothing_behind() -> None:
    code = (
        "import os, subprocess; from benchmarks.comm import netns; rank = int(os.environ['RANK']);"
        "netns.shape('1gbit');"
        "tc = subprocess.run(['tc', 'qdisc', 'show', 'dev', netns.INTERFACE], capture_output=True, text=True).stdout;"
        "assert 'tbf' in tc and 'rate 1Gbit' in tc, tc; netns.shape('unshaped');"
        "tc = subprocess.run(['tc', 'qdisc', 'show', 'dev', netns.INTERFACE], capture_output=True, text=True).stdout;"
        "assert 'tbf' not in tc, tc;"
        "import socket; address = (os.environ['MASTER_ADDR'], 29501);\n"
        "if rank == 0: socket.create_server(address).accept()\n"
        "else:\n"
        "  import time\n"
        "  for _ in range(100):\n"
        "    try: socket.create_connection(address); break\n"
        "    except OSError: time.sleep(0.1)\n"
        "  else: raise SystemExit('no connection')\n"
    )
    assert netns.run([sys.executable, "-c", code], 2, 60.0) == 0
    assert left() == []


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_program_is_given_rates_of_its_ranks() -> None:
    code = (
        "import os, subprocess; from benchmarks.comm import netns; rank = int(os.environ['RANK']);"
        "tc = subprocess.run(['tc', 'qdisc', 'show', 'dev', netns.INTERFACE], capture_output=True, text=True).stdout;"
        "assert ('rate 10Mbit' in tc) == (rank > 0), (rank, tc)"
    )
    assert netns.run([sys.executable, "-c", code], 3, 60.0, ["unshaped", "10mbit"]) == 0


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_rank_that_fails_or_hangs_ends_all() -> None:
    assert netns.run(["sh", "-c", "test $RANK = 0 && exit 3; sleep 60"], 2, 30.0) == 3
    assert netns.run(["sleep", "60"], 2, 0.5) == 124
    assert left() == []


def test_rates() -> None:
    assert netns.bits_per_second("100mbit") == 1e8
    with pytest.raises(ValueError, match="'100' is not like 100mbit"):
        netns.bits_per_second("100")


def test_the_model_is_as_large_as_resnet50() -> None:
    assert sum(map(math.prod, step.resnet50_shapes())) == 25_557_032
