"""Step time of a pipeline by the codec of its stages, all codecs in the same processes on the same links.

    python -m benchmarks.comm.pipeline --world 2 --rates 100mbit,1gbit     # in network namespaces: needs root
    python -m benchmarks.comm.pipeline --world 2 --rates 100mbit,1gbit --model resnet50 --batch 2
    torchrun --nproc-per-node 2 -m benchmarks.comm.pipeline                # on the links there are

A stage of the stub only hands out activations and gradients that were made before, so that the wire binds where ranks
share cores; `--model transformer` (a small one, `--width 256`) and `--model resnet50` are trained, with SGD, each stage
on a thread. Rounds go through the codecs in turn, beginning with another one each time; a figure is the median over the
rounds of the slowest rank's time. "torch" is a pipeline without our handle, "fp32" one whose handle compresses nothing:
on a CPU it asks for what comes before it sends.

"coding" is encoding and decoding of the rank that does most of it. Communication is what a step takes longer than its
chunks do on the slowest stage alone, all ranks at once, and the schedule's bubble of such chunks. The wire bound is
what the schedule takes where nothing but its bytes take time, at the rate of a plain TCP stream between the ranks
(pykernels/parallel/model.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules

from benchmarks.comm import netns
from benchmarks.comm.stages import MODELS, Part
from benchmarks.comm.step import slowest, stream_rate
from pykernels import comm
from pykernels.parallel import STAGE_CODECS, StageHandle
from pykernels.parallel.model import Hop, pipeline_seconds

SCHEDULES = {"gpipe": schedules.ScheduleGPipe, "1f1b": schedules.Schedule1F1B}
PLAIN = "torch"


@dataclass
class Entrant:
    """A pipeline with a codec on its wire."""

    codec: str
    part: Part
    stage: PipelineStage
    handle: StageHandle
    schedule: Any
    optimizer: torch.optim.Optimizer

    def sent(self) -> float:
        """Bytes of this rank, a step."""
        stats = self.handle.stats()
        return stats.wire_bytes / stats.steps

    def coding(self) -> float:
        seconds = self.handle.stats().seconds
        return seconds.get("encode", 0.0) + seconds.get("decode", 0.0)


@dataclass
class Result:
    """Of a codec at a rate: milliseconds, medians over the rounds; MB that the busiest stage sent a step."""

    rate: str
    codec: str
    step_ms: float
    best_ms: float
    coding_ms: float
    communication_ms: float
    megabytes: float
    wire_ms: float
    over_wire: float


def entrant(codec: str, given: argparse.Namespace) -> Entrant:
    rank, world = dist.get_rank(), dist.get_world_size()
    part = MODELS[given.model](rank, world, given)
    stage = PipelineStage(part.module, rank, world, torch.device("cpu"))
    sends = "fp32" if codec == PLAIN else codec
    handle = comm.register(stage, forward=sends, backward=sends)
    schedule = SCHEDULES[given.schedule](stage, given.chunks, loss_fn=part.loss)
    found = Entrant(codec, part, stage, handle, schedule, torch.optim.SGD(part.module.parameters(), 1e-3, 0.9))
    for _ in range(2):  # the first steps exchange shapes and make buffers
        step(found)
    if codec == PLAIN:
        handle.remove()
    return found


def step(e: Entrant) -> None:
    e.optimizer.zero_grad()
    inputs = (e.part.x,) if e.stage.is_first else ()
    e.schedule.step(*inputs, **({"target": e.part.target} if e.stage.is_last else {}), return_outputs=False)
    e.optimizer.step()


def alone(e: Entrant, chunks: int) -> None:
    """What a stage computes in a step, without the others."""
    e.optimizer.zero_grad()
    targets = e.part.target.chunk(chunks)
    for n in range(chunks):
        given = e.part.given.clone()
        output = e.part.module(given if e.stage.is_first else given.requires_grad_())
        if e.stage.is_last:
            e.part.loss(output, targets[n]).backward()
        else:
            output.backward(output.detach())
    e.optimizer.step()


def timed(call: Callable[[], None]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    call()
    return slowest(time.perf_counter() - begin)


def measured(entrants: list[Entrant], given: argparse.Namespace, rate: str, link: float) -> tuple[list[Result], float]:
    """And the milliseconds of a stage alone."""
    world, chunks = dist.get_world_size(), given.chunks
    before = {e.codec: e.coding() for e in entrants}
    samples: dict[str, list[float]] = {e.codec: [] for e in entrants}
    by_itself = []
    for turn in range(given.rounds):
        for k in range(len(entrants)):
            e = entrants[(k + turn) % len(entrants)]
            samples[e.codec].append(timed(lambda e=e: step(e)))  # type: ignore[misc]
        by_itself.append(timed(lambda: alone(entrants[0], chunks)))
    found, least = [], statistics.median(by_itself)
    for e in entrants:
        sent, coding = slowest(e.sent()), slowest((e.coding() - before[e.codec]) / given.rounds)
        ways = 1 if world == 2 else 2  # a stage in the middle sends both ways
        hop = Hop(0.0, sent / (ways * chunks) / link, 0.0, 0.0)
        wire = pipeline_seconds(given.schedule, world, chunks, 0.0, 0.0, hop)
        median = statistics.median(samples[e.codec])
        communication = median - least * (chunks + world - 1) / chunks
        times = (1e3 * value for value in (median, min(samples[e.codec]), coding, communication))
        found.append(Result(rate, e.codec, *times, sent / 1e6, 1e3 * wire, communication / wire))
    return found, 1e3 * least


def report(results: list[Result], given: argparse.Namespace, link: float, least: float, shape: torch.Size) -> None:
    by_codec = {r.codec: r for r in results}

    def ratio(name: str, r: Result) -> str:
        return f"{by_codec[name].step_ms / r.step_ms:.2f}x" if name in by_codec else "-"

    print(
        f"\n{results[0].rate}, {dist.get_world_size()} stages, {given.schedule}, {given.chunks} chunks of "
        f"{' x '.join(map(str, shape))} into a stage, {given.model}, stream {link * 8 / 1e6:.0f} Mbit/s, a stage alone "
        f"{least:.1f} ms, medians of {given.rounds} rounds"
    )
    heads = ("ms a step", "best", "vs torch", "vs fp32", "vs bf16", "MB sent", "coding", "comm/wire")
    print(f"{'codec':8}" + "".join(f"{head:>11}" for head in heads))
    for r in results:
        print(
            f"{r.codec:8}{r.step_ms:11.1f}{r.best_ms:11.1f}{ratio(PLAIN, r):>11}{ratio('fp32', r):>11}"
            f"{ratio('bf16', r):>11}{r.megabytes:11.2f}{r.coding_ms:11.1f}{r.over_wire:11.2f}",
            flush=True,
        )


def worker(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    entrants = [entrant(codec, given) for codec in given.codecs]
    crosses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(crosses, entrants[0].part.given.shape)
    results: list[Result] = []
    links: dict[str, float] = {}
    for rate in given.rates:
        if rate != "asis":
            netns.shape(rate)
        links[rate] = stream_rate()
        for e in entrants:
            step(e)
        found, least = measured(entrants, given, rate, links[rate])
        results += found
        if dist.get_rank() == 0:
            report(found, given, links[rate], least, crosses[-1])
    if dist.get_rank() == 0 and given.output:
        settings = {k: v for k, v in vars(given).items() if k != "output"}
        path = pathlib.Path(given.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"settings": settings, "stream_bytes_per_second": links, "results": [asdict(r) for r in results]}
        path.write_text(json.dumps(data, indent=1) + "\n")
        print(f"written: {path}")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, help="make network namespaces for so many ranks")
    parser.add_argument("--rates", help="of the links: 100mbit,1gbit,unshaped; as they are without")
    parser.add_argument(
        "--codecs", default="torch,fp32,bf16,int8,int4", help=f"some of: {','.join((PLAIN, *STAGE_CODECS))}"
    )
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), default="gpipe")
    parser.add_argument("--model", choices=tuple(MODELS), default="stub")
    parser.add_argument("--chunks", type=int, default=8, help="microbatches of a step (8)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a chunk (8)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6, help="of the transformer (6)")
    parser.add_argument("--size", type=int, default=224, help="of ResNet-50's images (224)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds, of all")
    parser.add_argument("--output", help="a JSON file")
    given = parser.parse_args()
    given.codecs = given.codecs.split(",")
    given.rates = netns.rates(given.rates)
    for codec in given.codecs:
        if codec not in (PLAIN, *STAGE_CODECS):
            parser.error(f"--codecs: one of {', '.join((PLAIN, *STAGE_CODECS))}, not {codec}")
    if "RANK" in os.environ:
        worker(given)
        return
    netns.check_launch(parser, given.world)
    sys.exit(netns.run([sys.executable, "-m", "benchmarks.comm.pipeline", *sys.argv[1:]], given.world, given.timeout))


if __name__ == "__main__":
    main()
