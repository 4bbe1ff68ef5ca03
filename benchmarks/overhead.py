"""What a network costs beside its kernels: its plans (`fast`) and its graph of ops (`fast.program`, a call a step).

Each network is optimized once, in fp32 and in int8, and saved. Fresh processes load it, since a process can be slow for
its whole life; in each of them both are called in turn, with pauses, for every size and number of threads. Of a
process its medians count; the table gives the medians of the processes, and the fastest and the slowest of them.
At 32x32 pixels little is computed.

A second table, of processes of their own: what a network costs until its first answer, after `import pykernels` and
with the file in the page cache; the memory that it added; and the page faults of calls after the first ones.

    python -m benchmarks.overhead [--networks mobilenet_v2 ...] [--processes 20] [--nets FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETWORKS = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet50")
PRECISIONS = ("fp32", "int8")
SIZES = (32, 224)
THREADS = (1, 2)
PAUSE = 0.03  # seconds: another's threads spin for a while after a call
STEADY = 100  # calls whose page faults are counted
MB = 1e6


# ---- in a process of its own -----------------------------------------------------------------------------------------
def compare(paths: dict[str, str], sizes: list[int], threads: list[int], rounds: int) -> list[dict[str, Any]]:
    """Medians in ms of both ways to run a network, for each precision, size and number of threads."""
    import torch

    import pykernels as pk

    nets = {precision: pk.load(path) for precision, path in paths.items()}
    found = []
    with torch.inference_mode():
        for count in threads:
            torch.set_num_threads(count)
            for size in sizes:
                x = torch.randn(1, 3, size, size)
                calls = {(p, "ops"): net.program for p, net in nets.items()} | {
                    (p, "plan"): net for p, net in nets.items()
                }
                times = _interleaved(calls, x, rounds)
                found += [
                    {"precision": p, "px": size, "threads": count, "ops": times[p, "ops"], "plan": times[p, "plan"]}
                    for p in nets
                ]
    return found


def _interleaved(calls: dict[Any, Callable[..., Any]], x: Any, rounds: int) -> dict[Any, float]:
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            time.sleep(PAUSE)
            call(x)
            start = time.perf_counter()
            call(x)
            times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(found) for key, found in times.items()}


def start(path: str, size: int, threads: int) -> dict[str, float]:
    """Load a network and call it: ms until the first answer, MB added by then, page faults of later calls."""
    import gc
    import resource

    import torch

    import pykernels as pk

    torch.set_num_threads(threads)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        torch.nn.functional.relu(x)  # starts torch's threads
        before, begin = _resident(), time.perf_counter()
        fast = pk.load(path)
        fast(x)
        taken, added = time.perf_counter() - begin, _resident() - before
        for _ in range(20):
            fast(x)
        gc.collect()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(STEADY):
            fast(x)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        plan = fast.plan((x,))
    needed = plan.weight_bytes + plan.least_arena_bytes
    return {"ms": 1e3 * taken, "added": added / MB, "needed": needed / MB, "faults": faults}


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


# ---- the tables ------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="torchvision's names")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="pixels of a side")
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--processes", type=int, default=5, help="fresh processes for each network, and each start")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each in a process")
    parser.add_argument("--nets", type=Path, help="keep the optimized networks in this folder, and take those there")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a process measures, as JSON
    chosen = parser.parse_args()
    if chosen.child:
        what, arguments = json.loads(chosen.child)
        print(json.dumps({"compare": compare, "start": start}[what](**arguments)))
        return

    from pykernels.bench.machine import machine

    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.nets or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: _optimized(name, folder) for name in chosen.networks}
        print(f"\nms a call, batch 1, {chosen.processes} processes of {chosen.rounds} rounds; 2nd core: 1 thread / 2")
        print(
            f"{'network':20}{'':5}{'px':>4}{'threads':>8}{'ops':>9}{'plan':>9}{'fastest':>9}{'slowest':>9}"
            f"{'plan/ops':>9}{'2nd core':>9}{'least':>6}{'ops':>6}"
        )
        for name, files in paths.items():
            arguments = {"paths": files, "sizes": chosen.sizes, "threads": chosen.threads, "rounds": chosen.rounds}
            _print_calls(name, [_child("compare", arguments) for _ in range(chosen.processes)])
        size, threads = max(chosen.sizes), max(chosen.threads)
        print(f"\nfrom pk.load to the first answer, {size}x{size}, {threads} threads, {chosen.processes} processes")
        print(
            f"{'network':20}{'':5}{'ms':>9}{'fastest':>9}{'slowest':>9}{'MB added':>9}"
            f"{'weights + between the steps':>29}{f'page faults of {STEADY} calls':>27}"
        )
        for name, files in paths.items():
            for precision, path in files.items():
                arguments = {"path": path, "size": size, "threads": threads}
                _print_start(name, precision, [_child("start", arguments) for _ in range(chosen.processes)])


def _optimized(name: str, folder: Path) -> dict[str, str]:
    """Its files, by precision."""
    import torch

    import pykernels as pk
    from pykernels.bench import zoo

    found = {precision: folder / f"{name}-{precision}.pk" for precision in PRECISIONS}
    for precision, path in found.items():
        if not path.exists():
            print(f"optimizing {name}, {precision}", file=sys.stderr, flush=True)
            torch.manual_seed(0)
            images = torch.randn(8, 3, 224, 224)
            calibration = [images] if precision == "int8" else None
            pk.optimize(zoo.settle(zoo.build(name), images), (images[:1],), precision, calibration).save(path)
    return {precision: str(path) for precision, path in found.items()}


def _child(what: str, arguments: dict[str, Any]) -> Any:
    """What a fresh process measured."""
    order = json.dumps([what, arguments])
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.overhead", "--child", order], stdout=-1, text=True, check=True
    )
    return json.loads(child.stdout.splitlines()[-1])


def _print_calls(name: str, processes: list[list[dict[str, Any]]]) -> None:
    """A line for each precision, size and number of threads."""

    def key(entry: dict[str, Any], threads: int | None = None) -> tuple[Any, ...]:
        return entry["precision"], entry["px"], threads or entry["threads"]

    tables = [{key(entry): entry for entry in entries} for entries in processes]
    for precision, px, threads in sorted(tables[0]):
        entries = [table[precision, px, threads] for table in tables]
        ops, plan = (statistics.median(entry[way] for entry in entries) for way in ("ops", "plan"))
        times = [entry["plan"] for entry in entries]
        ratio = statistics.median(entry["plan"] / entry["ops"] for entry in entries)
        line = f"{ops:9.3f}{plan:9.3f}{min(times):9.3f}{max(times):9.3f}{ratio:9.2f}"
        alone = [table.get((precision, px, 1)) for table in tables]
        if threads == 2 and None not in alone:
            pairs = list(zip(alone, entries, strict=True))
            gains = {way: [one[way] / two[way] for one, two in pairs if one] for way in ("ops", "plan")}
            middle = {way: statistics.median(found) for way, found in gains.items()}
            line += f"{middle['plan']:9.2f}{min(gains['plan']):6.2f}{middle['ops']:6.2f}"
        print(f"{name:20}{precision:5}{px:4}{threads:8}{line}", flush=True)


def _print_start(name: str, precision: str, processes: list[dict[str, float]]) -> None:
    times = [found["ms"] for found in processes]
    added, needed, faults = (
        statistics.median(found[what] for found in processes) for what in ("added", "needed", "faults")
    )
    line = f"{statistics.median(times):9.1f}{min(times):9.1f}{max(times):9.1f}{added:9.1f}{needed:29.1f}{faults:27.0f}"
    print(f"{name:20}{precision:5}{line}", flush=True)


if __name__ == "__main__":
    main()
