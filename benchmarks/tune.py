"""`pk.tune` against measuring everything, and its images a second against OpenVINO's THROUGHPUT hint.

    python -m benchmarks.tune exhaustive [--networks NAME ...] [--runs 10] [--seconds 10]
    python -m benchmarks.tune openvino [--networks NAME ...] [--precision int8]

``exhaustive``: every setup is measured for a long time, in turn; then `tune` chooses, run by run, with a bound of four
times the quickest call, and for the quickest call. What it chose is looked up among what was measured.

``openvino``: OpenVINO chooses its streams and requests by its THROUGHPUT hint and is asked asynchronously; what its
p99 is, is the bound that `tune` keeps; then both run in turn. Ours runs as `pk.Instances`. Networks are those of
`pykernels bench network`; int8 is NNCF's there and `pk.optimize`'s here, by the same inputs.
Quiet machines only: every core is used.
"""

from __future__ import annotations

import argparse
import io
import statistics
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

import pykernels as pk
from pykernels.bench.case import Case
from pykernels.bench.families import network_case
from pykernels.bench.machine import machine
from pykernels.bench.rivals.onnx_layers import exported
from pykernels.bench.rivals.openvino_rival import quantized
from pykernels.tune.choose import space
from pykernels.tune.search import Candidate, NoSetup, Sample, p99

NETWORKS = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18", "resnet50", "squeezenet1_1")
ROUNDS, EACH, PAUSE = 5, 0.6, 0.1
REST = 1.0  # seconds of rest behind a run of the other: its threads go on spinning


def ours(name: str, precision: str) -> tuple[Case, pk.Optimized]:
    case = network_case(name)
    assert case.model is not None
    calibration = {"calibration": list(case.calibration)} if precision == "int8" else {}
    inputs, free = (case.inputs[0].repeat(2, 1, 1, 1),), ({0: torch.export.Dim.DYNAMIC},)
    return case, pk.optimize(case.model, inputs, precision=precision, dynamic_shapes=free, **calibration)


def p99_ms(samples: Sequence[Sample]) -> float:
    return 1e3 * p99([latency for sample in samples for latency in sample.latencies])


def exhaustive(options: argparse.Namespace) -> None:
    heads = ("network", "goal", "best of all", f"tune: worst of {options.runs}", "within 3 %", "over the bound")
    print(f"\n| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for name in options.networks:
        case, fast = ours(name, options.precision)
        (x,) = case.inputs
        wanted, measure = space(fast, x)
        samples: dict[Candidate, list[Sample]] = {candidate: [] for candidate in wanted}
        for _ in range(ROUNDS):
            for candidate in wanted:
                time.sleep(PAUSE)
                samples[candidate].append(measure(candidate, EACH))
        rates = {c: statistics.median(s.items_per_second for s in found) for c, found in samples.items()}
        middle = {c: statistics.median(statistics.median(s.latencies) for s in found) for c, found in samples.items()}
        slowest = {c: p99_ms(found) for c, found in samples.items()}
        alone = {c: 1 / t for c, t in middle.items() if c.instances == c.batch == 1}
        bound = 4e3 * min(middle.values())
        kept = {c: rate for c, rate in rates.items() if slowest[c] <= bound}
        for goal, latency_ms, table in (("the shortest call", None, alone), (f"p99 <= {bound:.1f} ms", bound, kept)):
            best = max(table, key=lambda c: table[c])
            parts, over = [], 0
            for _ in range(options.runs):
                setup = pk.tune(fast, x, latency_ms=latency_ms, seconds=options.seconds)
                chosen = Candidate(setup.threads, setup.instances, setup.batch)
                over += chosen not in table  # its p99 was over the bound when everything was measured
                parts.append((rates if latency_ms else alone)[chosen] / table[best])
            near = sum(part >= 0.97 for part in parts)
            told = f"{best.instances} x {best.threads} threads, batch {best.batch}: {table[best]:.1f}/s"
            print(f"| {name} | {goal} | {told} | {min(parts):.3f} | {near} of {options.runs} | {over} |", flush=True)


class Streams:
    """A network in OpenVINO as its THROUGHPUT hint sets it up; a call of `run` keeps its requests busy."""

    def __init__(self, case: Case, precision: str) -> None:
        import openvino

        core = openvino.Core()
        graph = core.read_model(io.BytesIO(exported(case.model, case.inputs)))
        if precision == "int8":
            graph = quantized(graph, case)
        hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
        self.queue = openvino.AsyncInferQueue(core.compile_model(graph, "CPU", hints))
        self.requests, self.x = len(self.queue), case.inputs[0].contiguous().numpy()

    def run(self, seconds: float) -> Sample:
        taken: list[float] = []
        lock = threading.Lock()

        def done(_: Any, began: float) -> None:
            with lock:
                taken.append(time.perf_counter() - began)

        self.queue.set_callback(done)
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            self.queue.get_idle_request_id()  # waits for one, so that a call's time begins when it does
            self.queue.start_async({0: self.x}, time.perf_counter())
        self.queue.wait_all()
        return Sample(tuple(taken), len(taken) / (time.perf_counter() - begin))


def openvino(options: argparse.Namespace) -> None:
    print(
        "\n| network | OpenVINO: requests | p99 ms | images/s | ours: setup | p99 ms | images/s | ratio |\n"
        + "| --- " * 8
        + "|"
    )
    for name in options.networks:
        case, fast = ours(name, options.precision)
        (x,), streams = case.inputs, Streams(case, options.precision)
        streams.run(1.0)
        bound = p99_ms([streams.run(2.0) for _ in range(3)])
        time.sleep(REST)
        try:
            setup = pk.tune(fast, x, latency_ms=bound, seconds=options.seconds)
        except NoSetup as error:
            print(f"| {name} | {streams.requests} | {bound:.2f} | | {error} | | | |", flush=True)
            continue
        measure = space(fast, x, batches=[setup.batch])[1]
        chosen = Candidate(setup.threads, setup.instances, setup.batch)
        theirs, mine = [], []
        for _ in range(ROUNDS):
            theirs.append(streams.run(2.0))
            time.sleep(REST)
            mine.append(measure(chosen, 2.0))
            time.sleep(REST)
        rates = [statistics.median(s.items_per_second for s in found) for found in (theirs, mine)]
        tails = [p99_ms(found) for found in (theirs, mine)]
        told = f"{setup.instances} x {setup.threads} threads, batch {setup.batch}"
        each = [f"{tail:.2f} | {rate:.1f}" for tail, rate in zip(tails, rates, strict=True)]
        print(
            f"| {name} | {streams.requests} | {each[0]} | {told} | {each[1]} | {rates[1] / rates[0]:.2f} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", choices=["exhaustive", "openvino"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="torchvision's names")
    parser.add_argument("--precision", default="int8", choices=["int8", "fp32"])
    parser.add_argument("--runs", type=int, default=10, help="of tune, each goal")
    parser.add_argument("--seconds", type=float, default=10.0, help="that tune may take")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{options.precision}, {machine()}")
    {"exhaustive": exhaustive, "openvino": openvino}[options.against](options)


if __name__ == "__main__":
    main()
