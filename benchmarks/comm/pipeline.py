"""Step time of a pipeline by the codec of its stages, all codecs in the same processes on the same links.

    python -m benchmarks.comm.pipeline --world 2 --rates 100mbit,1gbit     # in network namespaces: needs root
    torchrun --nproc-per-node 2 -m benchmarks.comm.pipeline                # on the links there are

A stage only hands out activations and gradients that were made before, so that the wire binds where ranks share cores;
`--model blocks` trains transformer layers. Rounds go through the codecs in turn; a figure is the median over the rounds
of the slowest rank's time. Communication is what a step takes longer than its chunks do on the slowest stage alone. The
wire bound is what the schedule takes where nothing but its bytes take time, at the rate of a plain TCP stream between
the ranks (pykernels/parallel/model.py).
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
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

from benchmarks.comm import netns
from benchmarks.comm.step import slowest, stream_rate
from pykernels import comm
from pykernels.parallel import STAGE_CODECS, StageHandle
from pykernels.parallel.model import Hop, pipeline_seconds

SCHEDULES = {"gpipe": schedules.ScheduleGPipe, "1f1b": schedules.Schedule1F1B}


class _Handed(torch.autograd.Function):
    """Activations that were made before, whatever comes in, and gradients that were."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, parameter: torch.Tensor, made: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradient = gradient
        return made.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient.clone(), None, None, None


class Stub(nn.Module):
    """A stage that costs two copies. Its parameter makes torch ask for gradients."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))
        self.made, self.gradient = (torch.randn(shape) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Handed.apply(x, self.parameter, self.made, self.gradient)


def blocks(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in range(2)),
        nn.LayerNorm(width),
    )


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.mean()


@dataclass
class Entrant:
    """A pipeline with a codec on its wire."""

    codec: str
    stage: PipelineStage
    handle: StageHandle
    schedule: Any


@dataclass
class Result:
    """Of a codec at a rate: milliseconds, medians over the rounds; MB that the busiest stage sent a step."""

    rate: str
    codec: str
    step_ms: float
    best_ms: float
    communication_ms: float
    megabytes: float
    wire_ms: float
    over_wire: float


def entrant(codec: str, make: Callable[[], nn.Module], schedule: str, chunks: int) -> Entrant:
    stage = PipelineStage(make(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    handle = comm.register(stage, forward=codec, backward=codec)
    return Entrant(codec, stage, handle, SCHEDULES[schedule](stage, chunks, loss_fn=loss))


def step(e: Entrant, x: torch.Tensor) -> None:
    e.stage.submod.zero_grad()
    inputs = (x,) if e.stage.is_first else ()
    e.schedule.step(*inputs, **({"target": x} if e.stage.is_last else {}), return_outputs=False)


def alone(e: Entrant, x: torch.Tensor, chunks: int) -> None:
    """What a stage computes in a step, without the others."""
    for part in x.chunk(chunks):
        given = part.clone().requires_grad_(not e.stage.is_first)
        e.stage.submod(given).mean().backward()


def timed(call: Callable[[], None]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    call()
    return slowest(time.perf_counter() - begin)


def measured(
    entrants: list[Entrant], x: torch.Tensor, given: argparse.Namespace, rate: str, link: float
) -> list[Result]:
    world, chunks = dist.get_world_size(), given.chunks
    before = {e.codec: e.handle.stats() for e in entrants}
    samples: dict[str, list[float]] = {e.codec: [] for e in entrants}
    by_itself = []
    for turn in range(given.rounds):
        for k in range(len(entrants)):
            e = entrants[(k + turn) % len(entrants)]
            samples[e.codec].append(timed(lambda e=e: step(e, x)))  # type: ignore[misc]
        by_itself.append(timed(lambda: alone(entrants[0], x, chunks)))
    found = []
    for e in entrants:
        now, past = e.handle.stats(), before[e.codec]
        sent = slowest((now.wire_bytes - past.wire_bytes) / given.rounds)
        ways = 1 if world == 2 else 2  # a stage in the middle sends both ways
        hop = Hop(0.0, sent / (ways * chunks) / link, 0.0, 0.0)
        wire = pipeline_seconds(given.schedule, world, chunks, 0.0, 0.0, hop)
        median = statistics.median(samples[e.codec])
        communication = median - statistics.median(by_itself)
        times = (1e3 * value for value in (median, min(samples[e.codec]), communication))
        found.append(Result(rate, e.codec, *times, sent / 1e6, 1e3 * wire, communication / wire))
    return found


def report(results: list[Result], given: argparse.Namespace, link: float) -> None:
    by_codec = {r.codec: r for r in results}

    def ratio(name: str, r: Result) -> str:
        return f"{by_codec[name].step_ms / r.step_ms:.2f}x" if name in by_codec else "-"

    print(
        f"\n{results[0].rate}, {dist.get_world_size()} stages, {given.schedule}, {given.chunks} chunks of "
        f"{given.batch} x {given.tokens} x {given.width}, {given.model}, stream {link * 8 / 1e6:.0f} Mbit/s, "
        f"medians of {given.rounds} rounds"
    )
    heads = ("ms a step", "best", "vs fp32", "vs bf16", "MB sent", "comm/wire")
    print(f"{'codec':8}" + "".join(f"{head:>11}" for head in heads))
    for r in results:
        print(
            f"{r.codec:8}{r.step_ms:11.1f}{r.best_ms:11.1f}{ratio('fp32', r):>11}{ratio('bf16', r):>11}"
            f"{r.megabytes:11.2f}{r.over_wire:11.2f}",
            flush=True,
        )


def worker(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    torch.manual_seed(dist.get_rank())
    shape = (given.batch, given.tokens, given.width)
    x = torch.randn(given.batch * given.chunks, given.tokens, given.width)

    def make() -> nn.Module:
        return Stub(shape) if given.model == "stub" else blocks(given.width)

    entrants = [entrant(codec, make, given.schedule, given.chunks) for codec in given.codecs]
    for e in entrants:  # the first steps exchange shapes and make buffers
        for _ in range(2):
            step(e, x)
    results: list[Result] = []
    links: dict[str, float] = {}
    for rate in given.rates:
        if rate != "asis":
            netns.shape(rate)
        links[rate] = stream_rate()
        for e in entrants:
            step(e, x)
        found = measured(entrants, x, given, rate, links[rate])
        results += found
        if dist.get_rank() == 0:
            report(found, given, links[rate])
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
    parser.add_argument("--codecs", default="fp32,bf16,int8,int4", help=f"some of: {','.join(STAGE_CODECS)}")
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), default="gpipe")
    parser.add_argument("--model", choices=("stub", "blocks"), default="stub")
    parser.add_argument("--chunks", type=int, default=8, help="microbatches of a step (8)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a chunk (8)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds, of all")
    parser.add_argument("--output", help="a JSON file")
    given = parser.parse_args()
    given.codecs = given.codecs.split(",")
    given.rates = netns.rates(given.rates)
    for codec in given.codecs:
        if codec not in STAGE_CODECS:
            parser.error(f"--codecs: one of {', '.join(STAGE_CODECS)}, not {codec}")
    if "RANK" in os.environ:
        worker(given)
        return
    netns.check_launch(parser, given.world)
    sys.exit(netns.run([sys.executable, "-m", "benchmarks.comm.pipeline", *sys.argv[1:]], given.world, given.timeout))


if __name__ == "__main__":
    main()
