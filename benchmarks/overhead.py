"""What a network costs beside its kernels: whole calls at 32x32 pixels, where little is computed, and at 224x224.

Each network is timed in eager fp32 and optimized (fp32 and int8) on one thread and on two, interleaved round by round
with pauses; medians in ms. It starts a process for each row and repetition, since a process can be slow for its whole
life: the table gives the median of the processes' medians, and the fastest and the slowest of them.

    python -m benchmarks.overhead [--networks mobilenet_v2 ...] [--processes 3] [--rounds 30]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

NETWORKS = ("mobilenet_v2", "mobilenet_v3_large", "resnet50")
SIZES = (32, 224)
THREADS = (1, 2)
PAUSE = 0.03  # seconds: another's threads spin for a while after a call


def measure(name: str, size: int, threads: int, rounds: int) -> dict[str, Any]:
    """Medians in ms of eager fp32 and of the optimized networks, in this process."""
    import torch

    import pykernels as pk
    from pykernels.bench import zoo

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = zoo.settle(zoo.build(name), torch.randn(8, 3, size, size))
    x = torch.randn(1, 3, size, size)
    fast = {"fp32": pk.optimize(model, (x,)), "int8": pk.optimize(model, (x,), "int8", [torch.randn(8, 3, size, size)])}
    calls = {"eager": model, **fast}
    times: dict[str, list[float]] = {label: [] for label in calls}
    with torch.inference_mode():
        for _ in range(rounds):
            for label, call in calls.items():
                time.sleep(PAUSE)
                call(x)
                start = time.perf_counter()
                call(x)
                times[label].append(1e3 * (time.perf_counter() - start))
    steps = {label: len(network.report().fused) for label, network in fast.items()}
    return {"ms": {label: statistics.median(found) for label, found in times.items()}, "calls": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="torchvision's names")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes for each row")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each in a process")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child measures, as JSON
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(*json.loads(chosen.one))))
        return

    from pykernels.bench.machine import machine

    print(machine())
    print(
        f"{'network':20} {'px':>3} {'threads':>7}  {'':6} {'ms':>8} {'fastest':>8} {'slowest':>8} {'eager/':>7} calls"
    )
    for name in chosen.networks:
        for size in SIZES:
            for threads in THREADS:
                row(name, size, threads, chosen.processes, chosen.rounds)


def row(name: str, size: int, threads: int, processes: int, rounds: int) -> None:
    """One line a precision."""
    found = []
    for _ in range(processes):
        order = json.dumps([name, size, threads, rounds])
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.overhead", "--one", order], stdout=-1, text=True, check=True
        )
        found.append(json.loads(child.stdout.splitlines()[-1]))
    medians = {label: sorted(one["ms"][label] for one in found) for label in found[0]["ms"]}
    eager = statistics.median(medians["eager"])
    for label, times in medians.items():
        middle, calls = statistics.median(times), found[0]["calls"].get(label, "")
        line = f"{label:6} {middle:8.3f} {times[0]:8.3f} {times[-1]:8.3f} {eager / middle:6.2f}x {calls}"
        print(f"{name:20} {size:3} {threads:7}  {line}", flush=True)


if __name__ == "__main__":
    main()
