"""What the protocols cost: `pykernels serve --in-process` beside the network alone, on this machine.

    python -m benchmarks.serve.in_process                       # mobilenet_v2, [1, 3, 224, 224]: 600 KB a request
    python -m benchmarks.serve.in_process --network resnet18 --seconds 10

Latency: one client, one request at a time, of one instance of one thread: p50 and p99 of the call itself, of HTTP and
of gRPC, taken in turn. First of a network that only averages its input, so that nearly all is the protocol's; then of
the network. "added" is the difference of the medians; "server CPU" is what the server's process computed for a request,
the network included. A call after a pause is slower than one that follows another, server or not: "rested" is a
call after 3 ms of sleep, which are not counted. Throughput: as many clients as fill
batches, against `pykernels.Instances` with the same threads and the same batch, in turn. Clients run in processes of
their own on the same cores: what they take of the machine counts against the server.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import pykernels as pk
from pykernels.bench import zoo
from pykernels.bench.machine import machine
from pykernels.serve.model import UNTRIED

ROUNDS = 5
PAUSE = 0.003  # seconds
INPUT = "x"  # as torchvision's networks call it


class Mean(nn.Module):
    """Next to nothing to compute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


@contextlib.contextmanager
def server(net: pathlib.Path, *options: str) -> Iterator[tuple[str, str, int]]:
    """Addresses of HTTP and gRPC, and the process, of a server that runs while the context lasts."""
    command = [
        sys.executable,
        "-m",
        "pykernels",
        "serve",
        f"net={net}",
        "--in-process",
        "--port",
        "0",
        "--grpc-port",
        "0",
    ]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        http, grpc = (part.partition("://")[2] for part in process.stdout.readline().split())
        while UNTRIED in urllib.request.urlopen(f"http://{http}/v2/models/net/config").read().decode():
            time.sleep(0.1)  # batches are tried behind the first requests
        yield http, grpc, process.pid
    finally:
        process.terminate()
        process.wait(60)


def client(protocol: str, address: str) -> Callable[[torch.Tensor], None]:
    """A call of the server by NVIDIA's client."""
    import tritonclient.grpc
    import tritonclient.http

    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    stub = module.InferenceServerClient(address)

    def call(x: torch.Tensor) -> None:
        given = module.InferInput(INPUT, list(x.shape), "FP32")
        given.set_data_from_numpy(x.numpy())
        stub.infer("net", [given])

    return call


def cpu(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(call: Callable[[torch.Tensor], object], x: torch.Tensor, seconds: float, pause: float = 0.0) -> list[float]:
    """Seconds of each call, one after the other, with a pause between."""
    with torch.no_grad():
        call(x)
        found: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            time.sleep(pause)
            before = time.perf_counter()
            call(x)
            found.append(time.perf_counter() - before)
    return found


def latency(net: pathlib.Path, x: torch.Tensor, seconds: float) -> None:
    fast = pk.load(net)
    with (
        server(net, "--replicas", "1", "--max-batch", "1") as (http, grpc, pid),
        pk.Instances(fast, pk.Setup(1, 1)) as alone,
    ):
        calls: dict[str, Callable[[torch.Tensor], object]] = {
            "the network": lambda x: fast(x),
            "rested": lambda x: fast(x),
            "Instances": alone,
            "HTTP": client("http", http),
            "gRPC": client("grpc", grpc),
        }
        taken: dict[str, list[float]] = {what: [] for what in calls}
        spent = dict.fromkeys(calls, 0.0)
        for _ in range(ROUNDS):
            for what, call in calls.items():
                before = cpu(pid)
                taken[what] += timed(call, x, seconds / ROUNDS, PAUSE if what == "rested" else 0.0)
                spent[what] += cpu(pid) - before
    base = statistics.median(taken["the network"])
    print(f"{'':12}  p50 ms  p99 ms  added p50 ms  server CPU ms")
    for what, found in taken.items():
        p50, p99 = statistics.median(found), sorted(found)[int(0.99 * (len(found) - 1))]
        row = f"{what:12}  {1e3 * p50:6.2f}  {1e3 * p99:6.2f}  {1e3 * (p50 - base):12.2f}"
        print(f"{row}  {1e3 * spent[what] / len(found):13.2f}")


def _load(protocol: str, address: str, shape: tuple[int, ...], clients: int, seconds: float, found: object) -> None:
    """Many requests at once from one process, until the time is over; how many were answered."""
    import asyncio

    import tritonclient.grpc.aio
    import tritonclient.http.aio

    x = torch.randn(shape)
    module: Any = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    limit = {"conn_limit": clients} if protocol == "http" else {}

    async def one(stub: Any, end: float) -> int:
        answered = 0
        while time.monotonic() < end:
            given = module.InferInput(INPUT, list(shape), "FP32")
            given.set_data_from_numpy(x.numpy())
            await stub.infer("net", [given])
            answered += 1
        return answered

    async def all_of_them() -> float:
        async with module.aio.InferenceServerClient(address, **limit) as stub:
            await one(stub, time.monotonic() + 0.5)
            begin = time.monotonic()
            answered = sum(await asyncio.gather(*(one(stub, begin + seconds) for _ in range(clients))))
            return answered / (time.monotonic() - begin)

    found.put(asyncio.run(all_of_them()))  # type: ignore[attr-defined]


def rate(protocol: str, address: str, shape: tuple[int, ...], clients: int, seconds: float) -> float:
    """Answers a second, to clients that each send their next request when they have the answer to the last one."""
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue[float] = context.Queue()
    asking = context.Process(target=_load, args=(protocol, address, shape, clients, seconds, answer))
    asking.start()
    found = answer.get()
    asking.join()
    return found


def throughput(net: pathlib.Path, x: torch.Tensor, seconds: float, batch: int) -> None:
    cores = len(os.sched_getaffinity(0))
    fast = pk.load(net)
    rows = x.expand(batch, *x.shape[1:]).contiguous()
    rates: dict[str, list[float]] = {"Instances": [], "HTTP": []}
    with server(net, "--replicas", str(cores), "--max-batch", str(batch)) as (http, _, _):
        for _ in range(ROUNDS):
            with pk.Instances(fast, pk.Setup(1, cores)) as alone:
                list(alone.map([rows] * cores))
                begin, calls = time.perf_counter(), 0
                while time.perf_counter() - begin < seconds / ROUNDS:
                    calls += len(list(alone.map([rows] * 2 * cores)))
                rates["Instances"].append(calls * batch / (time.perf_counter() - begin))
            rates["HTTP"].append(rate("http", http, tuple(x.shape), 2 * cores * batch, seconds / ROUNDS))
    print(f"\n{cores} instances of one thread, batches of up to {batch}: items a second")
    best = {what: statistics.median(found) for what, found in rates.items()}
    for what, found in best.items():
        print(f"{what:12}  {found:8.1f}  {found / best['Instances']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="mobilenet_v2")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    x = torch.randn(1, 3, 224, 224)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mean, net = pathlib.Path(folder) / "mean.pk", pathlib.Path(folder) / "net.pk"
        pk.optimize(Mean(), (x,)).save(mean)
        pk.optimize(zoo.build(arguments.network).eval(), (x,)).save(net)
        print(f"{x.numel() * 4 / 1e3:.0f} KB a request, {machine()}\n\nnothing but an average")
        latency(mean, x, arguments.seconds)
        print(f"\n{arguments.network}, fp32")
        latency(net, x, arguments.seconds)
        throughput(net, x, arguments.seconds, arguments.batch)


if __name__ == "__main__":
    main()
