"""Run what `make test` leaves out, slice by slice, until the time is up: `.ci/slices.py SECONDS [VARIABLE=VALUE ...]`.

The first slice is another one at each commit, and the others follow where they fit, so a few commits run them all. One
that the time cuts off is "not finished", which is no failure; a test that failed before is. The variables are make's.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

GRACE = 30.0  # seconds between the interrupt, at which pytest prints its closing lines, and the kill
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])  # where cmake/cuda.cmake looks, too
FAILURE = re.compile(r"(FAILED|ERROR) \S+\.py|=+ .*\b\d+ (failed|errors?)\b")  # of pytest's closing lines


class Slice(NamedTuple):
    name: str
    make: list[str]
    minutes: float  # about, build included, on two cores; 30 where nobody has measured it
    tool: str | None = None  # without which it cannot run


def emulate(name: str, minutes: float, *tests: str) -> Slice:
    return Slice(f"every isa: {name}", ["emulate", f"TESTS={' '.join(tests)}"], minutes)


def sanitize(name: str, minutes: float, *tests: str) -> Slice:
    return Slice(f"sanitizers: {name}", ["sanitize", f"SANITIZED_TESTS={' '.join(tests)}"], minutes)


CONV = (
    "tests/ops/test_names.py",
    "tests/ops/test_conv.py",
    "tests/ops/test_conv_bn_act.py",
    "tests/ops/test_epilogue.py",
    "tests/ops/test_linear.py",
    "tests/ops/test_pool.py",
    "tests/ops/test_upsample.py",
    "tests/ops/test_winograd.py",
)
CODECS = ("tests/ops/test_compress.py", "tests/ops/test_sparse.py")
QUANTIZE = (
    "tests/ops/test_arithmetic.py",
    "tests/ops/test_attention.py",
    "tests/ops/test_normalize.py",
    "tests/ops/test_pointwise.py",
    "tests/ops/test_quantize.py",
    "tests/ops/test_quantize_contract.py",
)
COMPRESSION = ("tests/compress", "tests/precision", "tests/prune", "tests/serve", "tests/tune")
RANKS = ("tests/comm", "tests/parallel")
SLICES = [
    Slice("the emulated device", ["test-emulated"], 30, tool="nvcc"),
    emulate("convolutions, products, pools", 30, *CONV),
    sanitize("codecs, quantization", 30, *CODECS, *QUANTIZE),
    emulate("codecs, quantization", 30, *CODECS, *QUANTIZE),
    Slice("slow tests", ["test-slow"], 16),
    sanitize("convolutions, products, pools", 30, *CONV),
    emulate(
        "networks and modules", 30, "tests/network", "tests/from_onnx", "tests/nn", "tests/quantization", "tests/bench"
    ),
    emulate("ranks, compression, command line, contracts", 30, *COMPRESSION, *RANKS, "tests/test_*.py"),
]


def rotated(slices: Sequence[Slice], turn: int) -> list[Slice]:
    first = turn % len(slices)
    return [*slices[first:], *slices[:first]]


def turn() -> int:
    """The number of commits; in a shallow clone, which cannot count them, one drawn by the commit."""
    shallow, commit = git("rev-parse", "--is-shallow-repository", "HEAD")
    return int(commit, 16) if shallow == "true" else int(*git("rev-list", "--count", "HEAD"))


def git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.split()


def run(command: Sequence[str], seconds: float) -> str:
    """Passed, failed or not finished; its output is printed as it comes."""
    # restored, since a shell's background jobs ignore it, and pytest would with them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    failures: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if FAILURE.match(line):
                failures.append(line)

    # a thread, since a grandchild that lives on would keep the pipe open
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    finished = True
    for stop, patience in ((signal.SIGINT, seconds), (signal.SIGKILL, GRACE)):
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            finished = False
            os.killpg(process.pid, stop)
    code = process.wait()
    reader.join(5)
    if finished:
        return "failed" if code else "passed"
    return "failed" if failures else "not finished"


def run_slices(slices: Sequence[Slice], seconds: float, make: Sequence[str]) -> list[tuple[str, str]]:
    """Each slice's name and what became of it. All ends within `seconds`."""
    end = time.monotonic() + seconds - GRACE - 10
    found = []
    for number, (name, goal, minutes, tool) in enumerate(slices):
        left = end - time.monotonic()
        if tool is not None and shutil.which(tool, path=PATH) is None:
            found.append((name, f"not run: {tool} is not here"))
        elif left <= 0 or (number and left < 60 * minutes):  # the first has its turn, however slow the machine
            found.append((name, f"not begun: it takes {minutes:g} minutes, and {max(left, 0) / 60:.0f} are left"))
        else:
            print(f"---- {name}", flush=True)
            begin = time.monotonic()
            answer = run([*make, *goal], left)
            found.append((name, f"{answer} after {(time.monotonic() - begin) / 60:.1f} minutes"))
    return found


def main(seconds: str, *variables: str) -> int:
    found = run_slices(rotated(SLICES, turn()), float(seconds), ["make", *variables])
    print("\n".join(f"{name}: {answer}" for name, answer in found))
    return int(any(answer.startswith("failed") for _, answer in found))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
