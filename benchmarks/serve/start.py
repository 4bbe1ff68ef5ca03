"""How soon a server answers and ends, and what its replicas hold in memory, on this machine.

    python -m benchmarks.serve.start                       # ResNet-50 in int8
    python -m benchmarks.serve.start --network mobilenet_v2 --precision fp32

Seconds from the start of a process to its first answer, in turn with a process that only imports torch; then from
SIGTERM to its end. Memory: the proportional set size (/proc/PID/smaps_rollup: a page that several processes map counts
in parts) of the replicas of `pykernels serve` on Ray, one and as many as there are cores, with the network and with
one that has next to no weights: the difference is what the network's weights cost.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

import torch

import pykernels as pk
from benchmarks.serve.in_process import Mean
from pykernels.bench import zoo
from pykernels.bench.machine import machine

ROUNDS = 5
PORTS = ("--port", "18230", "--grpc-port", "18231")
SHAPE = (1, 3, 224, 224)


def ask(address: str) -> None:
    """One inference over HTTP, tensors as JSON says them in binary."""
    x = torch.zeros(SHAPE)
    tensor = {"name": "x", "shape": SHAPE, "datatype": "FP32", "parameters": {"binary_data_size": 4 * x.numel()}}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    request = urllib.request.Request(
        f"{address}/v2/models/net/infer",
        text + x.numpy().tobytes(),
        {"Inference-Header-Content-Length": str(len(text))},
    )
    urllib.request.urlopen(request, timeout=60).read()


def started(net: pathlib.Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """A server that listens, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pykernels", "serve", f"net={net}", *PORTS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    while "grpc://" not in (line := process.stdout.readline()):
        if not line:
            raise RuntimeError(f"pykernels serve ended with {process.wait()}")
    return process, line.split()[0]


def times(net: pathlib.Path) -> None:
    taken: dict[str, list[float]] = {"import torch": [], "first answer": [], "SIGTERM to the end": []}
    for _ in range(ROUNDS):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        taken["import torch"].append(time.monotonic() - begin)
        begin = time.monotonic()
        process, address = started(net, "--in-process")
        ask(address)
        taken["first answer"].append(time.monotonic() - begin)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        taken["SIGTERM to the end"].append(time.monotonic() - begin)
    for what, found in taken.items():
        print(f"{what:20} {statistics.median(found):6.2f} s")


def descendants(ancestor: int) -> Iterator[tuple[int, bytes]]:
    """Processes that descend from another process, and their command lines."""
    names, parents = {}, {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    for pid, name in names.items():
        above = pid
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor:
            yield pid, name


def replicas(ancestor: int) -> Iterator[int]:
    """Processes of replicas that descend from another process."""
    return (pid for pid, name in descendants(ancestor) if name.startswith(b"ray::ServeReplica:pykernels:"))


def held(net: pathlib.Path, count: int) -> float:
    """Megabytes of all replicas together, after each has answered."""
    process, address = started(net, "--replicas", str(count))
    try:
        for _ in range(20 * count):
            ask(address)
        found = list(replicas(process.pid))
        if len(found) != count:
            raise RuntimeError(f"{len(found)} replicas run, not {count}")
        rows = [pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n") for pid in found]
        return sum(int(row.split()[1]) for part in rows for row in part if row.startswith("Pss:")) / 1e3
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def memory(net: pathlib.Path, mean: pathlib.Path) -> None:
    size, most = net.stat().st_size / 1e6, len(os.sched_getaffinity(0))
    whole = {count: (held(net, count), held(mean, count)) for count in sorted({1, most})}
    print(f"\n{'replicas':>8}  {'MB':>7}  {'without weights':>15}  {'weights':>7}   (the file: {size:.1f} MB)")
    for count, (with_it, without) in whole.items():
        print(f"{count:8}  {with_it:7.1f}  {without:15.1f}  {with_it - without:7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--precision", default="int8", choices=["int8", "fp32", "bf16"])
    parser.add_argument("--only", choices=["times", "memory"])
    arguments = parser.parse_args()
    x = torch.randn(SHAPE)
    given = {"calibration": [x]} if arguments.precision == "int8" else {}
    with tempfile.TemporaryDirectory() as folder:
        mean, net = pathlib.Path(folder) / "mean.pk", pathlib.Path(folder) / "net.pk"
        pk.optimize(Mean(), (x,)).save(mean)
        pk.optimize(zoo.build(arguments.network).eval(), (x,), arguments.precision, **given).save(net)
        print(f"{arguments.network}, {arguments.precision}, {machine()}")
        if arguments.only != "memory":
            times(net)
        if arguments.only != "times":
            memory(net, mean)


if __name__ == "__main__":
    main()
