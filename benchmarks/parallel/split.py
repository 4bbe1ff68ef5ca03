"""The throughput of a network that is split over processes of this machine, against one process and against what the
balance of its parts allows.

One process, each part by itself, and the pipeline are timed in turn, round by round; of each the median counts. The
bound is the time of one process over that of the slowest part, or, where there are fewer cores than parts, what the
cores allow: theirs over the share that all parts take together of one process's time. Every process has as many
threads.

    python -m benchmarks.parallel.split [--network resnet50 | FILE] [--stages 2 4] [--batch 1] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import pykernels as pk
from pykernels.bench import zoo
from pykernels.parallel.split import Split, split
from pykernels.tune.cores import usable

SIZE = 224  # pixels
HANG = 600.0  # seconds of silence: a machine that is held up for other measurements is no lost part


def network(name: str, precision: str) -> pk.Optimized:
    if Path(name).is_file():
        return pk.load(name)
    images = torch.randn(2, 3, SIZE, SIZE)
    model = zoo.settle(zoo.build(name), images)
    return pk.optimize(model, (images[:1],), precision=precision, calibration=[images] if precision == "int8" else None)


def each(call: Any, calls: int) -> float:
    """Seconds of a call: all of them over their number."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def measure(fast: pk.Optimized, parts: Split, batch: int, rounds: int, calls: int, threads: int) -> dict[str, Any]:
    xs = [torch.randn(batch, 3, SIZE, SIZE) for _ in range(4)]
    given: list[tuple[Any, ...]] = [(xs[0],)]
    for part in parts.parts[:-1]:
        given.append(part(*given[-1]))
    single: list[float] = []
    alone: list[list[float]] = [[] for _ in parts.parts]
    piped: list[float] = []
    with parts.serve(threads=threads, silence=HANG) as chain:
        bits = all(torch.equal(y, fast(x)) for x, y in zip(xs, chain.map(xs), strict=True))
        for _ in range(rounds):
            single.append(each(lambda: fast(xs[0]), calls))
            for part, inputs, times in zip(parts.parts, given, alone, strict=True):
                times.append(each(lambda part=part, inputs=inputs: part(*inputs), calls))
            begin = time.perf_counter()
            for _ in chain.map(xs[number % len(xs)] for number in range(calls)):
                pass
            piped.append((time.perf_counter() - begin) / calls)
    return {
        "bits": bits,
        "one": statistics.median(single),
        "parts": [statistics.median(times) for times in alone],
        "pipeline": statistics.median(piped),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="of torchvision, or a saved one of images")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=100, help="of each, a round")
    parser.add_argument("--threads", type=int, default=1, help="torch's, of each process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    fast = network(args.network, args.precision)
    cores = usable().count
    print(f"{args.network}, batch {args.batch}, {args.threads} thread(s) a process, {cores} core(s)")
    for stages in args.stages:
        parts = split(fast, stages, (torch.randn(args.batch, 3, SIZE, SIZE),))
        found = measure(fast, parts, args.batch, args.rounds, args.calls, args.threads)
        balance = found["one"] / max(found["parts"])
        of_cores = cores / args.threads * found["one"] / sum(found["parts"])
        gain, bound = found["one"] / found["pipeline"], min(balance, of_cores)
        times = ", ".join(f"{1e3 * seconds:.2f}" for seconds in found["parts"])
        print(
            f"{stages} processes: bits {'equal' if found['bits'] else 'DIFFER'}; one process {1e3 * found['one']:.2f} "
            f"ms, parts {times} ms, pipeline {1e3 * found['pipeline']:.2f} ms an answer: {gain:.2f} times the "
            f"throughput; bound of the balance {balance:.2f}, of the cores {of_cores:.2f}; share {gain / bound:.2f} of "
            f"that of the {'cores' if of_cores < balance else 'balance'}"
        )


if __name__ == "__main__":
    main()
