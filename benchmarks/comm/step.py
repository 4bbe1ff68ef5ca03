"""Step time of DistributedDataParallel by communication hook, every hook in the same processes on the same links.

    python -m benchmarks.comm.step --world 4 --rates 100mbit,1gbit        # in network namespaces: needs root
    torchrun --nproc-per-node 4 -m benchmarks.comm.step                   # on the links there are

The model has ResNet-50's 25.6 M parameters and a backward pass that only hands out gradients made before, so that the
wire binds; `--model resnet50` trains the real one. Rounds go through the hooks in turn; a figure is the median over the
rounds of the slowest rank's time. Communication is what a step takes longer than the same step without it; the wire
bound is the bytes that a rank sends over the rate of a plain TCP stream between the ranks, the best of three, measured
before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.nn.parallel import DistributedDataParallel

from benchmarks.comm import netns
from pykernels import comm


# ---- models ----------------------------------------------------------------------------------------------------------
def resnet50_shapes() -> list[tuple[int, ...]]:
    """Of ResNet-50's parameters, in the order of the forward pass."""
    shapes: list[tuple[int, ...]] = []

    def conv(outputs: int, inputs: int, size: int) -> None:
        shapes.extend([(outputs, inputs, size, size), (outputs,), (outputs,)])  # with its batch norm

    conv(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv(width, inputs, 1)
            conv(width, width, 3)
            conv(4 * width, width, 1)
            if block == 0:
                conv(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


class _Gradient(torch.autograd.Function):
    """Passes a scalar on; the gradient of `parameter` is `gradient`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return upstream[0], ctx.gradient, None


class Cheap(nn.Module):
    """Parameters of given sizes whose gradients are fixed noise, another on each rank."""

    def __init__(self, values: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(value) for value in values])
        self.noise = list(gradients)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight, gradient in zip(self.weights, self.noise, strict=True):
            x = _Gradient.apply(x, weight, gradient)
        return x


# ---- who takes part --------------------------------------------------------------------------------------------------
@dataclass
class Entrant:
    """A model with a hook. `bytes_sent` tells what one rank has sent so far; `state` is ours, if the hook is."""

    name: str
    model: DistributedDataParallel
    handle: comm.Handle | None = None
    bytes_per_gradient: float | None = None


def _torch_bf16(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's bf16 hook under a name that DistributedDataParallel does not refuse on a CPU."""
    return default_hooks.bf16_compress_hook(state, bucket)


def _pertensor(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return quantization_hooks.quantization_pertensor_hook(state, bucket)


def _perchannel(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return quantization_hooks.quantization_perchannel_hook(state, bucket)


# No annotations that are strings: DistributedDataParallel compares those of a hook with the classes themselves.
for _hook in (_torch_bf16, _pertensor, _perchannel):
    _hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}

THEIRS: dict[str, tuple[Callable[..., Any] | None, float]] = {
    "ddp fp32": (None, 4.0),
    "torch allreduce hook": (default_hooks.allreduce_hook, 4.0),
    "torch fp16": (default_hooks.fp16_compress_hook, 2.0),
    "torch bf16": (_torch_bf16, 2.0),
    "torch int8 per tensor": (_pertensor, 1.0),
    "torch int8 per channel": (_perchannel, 1.0),
}
POWERSGD = "torch powersgd"  # hangs under gloo (torch 2.13), so that it runs in processes of its own
POWERSGD_SECONDS = 45.0


def entrant(name: str, make: Callable[[], nn.Module], world: int) -> Entrant:
    """`name` is one of THEIRS, POWERSGD or "pykernels CODEC"."""
    model = DistributedDataParallel(make(), gradient_as_bucket_view=True, init_sync=False)
    if name.startswith("pykernels "):
        codec = name.removeprefix("pykernels ")
        # PowerSGD averages plainly at first: in the two steps of the warm-up only.
        options = {"start_step": 2} if codec == "powersgd" else {}
        return Entrant(name, model, comm.register(model, codec, **options))
    if name == POWERSGD:
        # Averages plainly in the two steps of the warm-up.
        power = powerSGD_hook.PowerSGDState(dist.group.WORLD, matrix_approximation_rank=4, start_powerSGD_iter=2)
        model.register_comm_hook(power, powerSGD_hook.powerSGD_hook)
        shapes = [(p.shape[0], p.numel() // p.shape[0]) for p in model.parameters()]
        thin = sum(min(4 * (rows + columns), rows * columns) for rows, columns in shapes)
        share = thin / sum(rows * columns for rows, columns in shapes)
        return Entrant(name, model, None, 4 * share * 2 * (world - 1) / world)
    hook, size = THEIRS[name]
    if hook is not None:
        model.register_comm_hook(dist.group.WORLD, hook)
    share = 2 * (world - 1) / world if "int8" not in name else world - 1  # those gather every rank's whole gradient
    return Entrant(name, model, None, size * share)


# ---- measuring -------------------------------------------------------------------------------------------------------
def slowest(seconds: float) -> float:
    worst = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def stream_rate(seconds: float = 1.0, chunk: int = 1 << 18) -> float:
    """Bytes/s of a plain TCP stream from each rank to the next, all at once; the slowest rank's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    listener = socket.create_server((os.environ.get("BENCHMARK_ADDRESS", "127.0.0.1"), 0))
    addresses: list[Any] = [None] * world
    dist.all_gather_object(addresses, listener.getsockname())
    out = socket.create_connection(addresses[(rank + 1) % world])
    incoming, _ = listener.accept()
    block, start = bytes(chunk), time.perf_counter()

    def send() -> None:
        while time.perf_counter() - start < 1.3 * seconds:
            out.sendall(block)
        out.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    buffer, got, begin, last = bytearray(chunk), 0, 0.0, 0.0
    while size := incoming.recv_into(buffer):
        last = time.perf_counter()
        if last - start < 0.3 * seconds or begin == 0.0:
            begin = last  # bursts that a shaped link lets pass, and the begin of the connection
        else:
            got += size
    sender.join()
    for s in (out, incoming, listener):
        s.close()
    return 1 / slowest((last - begin) / got)


@dataclass
class Result:
    """Of one hook at one rate; milliseconds, medians over the rounds. error: of the first average, relative."""

    rate: str
    world: int
    hook: str
    step_ms: float | None = None
    best_ms: float | None = None
    rounds: int = 0
    communication_ms: float | None = None
    megabytes: float | None = None
    wire_ms: float | None = None
    over_wire: float | None = None
    error: float | None = None
    reason: str | None = None
    detail: str | None = None


def steps(model: nn.Module, data: torch.Tensor, target: torch.Tensor | None) -> None:
    model.zero_grad(set_to_none=False) if target is not None else None
    output = model(data)
    loss = output if target is None else nn.functional.cross_entropy(output, target)
    loss.backward()


def gradient_error(model: DistributedDataParallel, exact: Sequence[torch.Tensor]) -> float:
    """‖average - exact‖ / ‖exact‖ over all parameters."""
    found = [p.grad for p in model.module.parameters()]
    off = sum(float((f - e).square().sum(dtype=torch.float64)) for f, e in zip(found, exact, strict=True))
    norm = sum(float(e.square().sum(dtype=torch.float64)) for e in exact)
    return (off / norm) ** 0.5


def worker(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    rank, world = dist.get_rank(), dist.get_world_size()
    shapes = resnet50_shapes()
    if given.scale != 1.0:
        shapes = [(max(1, int(shape[0] * given.scale)), *shape[1:]) for shape in shapes]
    torch.manual_seed(0)
    target: torch.Tensor | None = None
    if given.model == "resnet50":
        from pykernels.bench import zoo

        data = torch.randn(given.batch, 3, 64, 64)
        target = torch.randint(1000, (given.batch,))

        def make() -> nn.Module:
            torch.manual_seed(0)
            return zoo.network("resnet50").train()
    else:
        data = torch.zeros(())
        values = [torch.zeros(shape) for shape in shapes]
        torch.manual_seed(rank)
        noise = [torch.randn(shape) * 10 ** (-2 - 2 * torch.rand(())) for shape in shapes]
        data.requires_grad_()

        def make() -> nn.Module:
            return Cheap(values, noise)

    def measured(found: Sequence[Entrant], rate: str, link: float) -> list[Result]:
        samples: dict[str, list[float]] = {e.name: [] for e in found}
        alone: list[float] = []
        before = {e.name: e.handle.stats() for e in found if e.handle}
        for turn in range(given.rounds):
            for k in range(len(found)):
                e = found[(k + turn) % len(found)]
                samples[e.name].append(timed(lambda e=e: steps(e.model, data, target)))  # type: ignore[misc]
            with found[0].model.no_sync():
                alone.append(timed(lambda: steps(found[0].model, data, target)))
            found[0].model.zero_grad(set_to_none=False)
        compute = statistics.median(alone)
        results = []
        for e in found:
            if e.handle is not None:
                now, past = e.handle.stats(), before[e.name]
                sent = (now.wire_bytes - past.wire_bytes) / (now.steps - past.steps)
            else:
                assert e.bytes_per_gradient is not None
                sent = e.bytes_per_gradient * sum(p.numel() for p in e.model.parameters())
            step = statistics.median(samples[e.name])
            results.append(
                Result(
                    rate,
                    world,
                    e.name,
                    1e3 * step,
                    1e3 * min(samples[e.name]),
                    given.rounds,
                    1e3 * (step - compute),
                    sent / 1e6,
                    1e3 * sent / link,
                    (step - compute) / (sent / link),
                    errors.get(e.name),
                    detail=str(e.handle.stats()) if e.handle else None,
                )
            )
        return results

    def timed(call: Callable[[], None]) -> float:
        dist.barrier()
        begin = time.perf_counter()
        call()
        return slowest(time.perf_counter() - begin)

    # Everybody gets ready before the links are shaped: the first step makes buffers, the second one new buckets.
    entrants: list[Entrant] = []
    results: list[Result] = []
    errors: dict[str, float] = {}
    exact = None
    if target is None:
        exact = [value.clone() for value in noise]
        for value in exact:
            dist.all_reduce(value)
            value.div_(world)
    for name in given.hooks:
        if name == "pykernels auto":
            continue  # it measures the link when it is made
        try:
            e = entrant(name, make, world)
            steps(e.model, data, target)
            if exact is not None:
                errors[name] = gradient_error(e.model, exact)
            steps(e.model, data, target)
            entrants.append(e)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            results.append(Result("", world, name, reason=f"{type(error).__name__}: {str(error).splitlines()[0]}"))
    links: dict[str, float] = {}
    for rate in given.rates:
        if rate != "asis":
            netns.shape(rate)
        dist.barrier()
        links[rate] = max(stream_rate() for _ in range(3))
        here = list(entrants)
        if "pykernels auto" in given.hooks:
            begin = time.perf_counter()
            e = entrant("pykernels auto", make, world)
            if rank == 0:
                print(f"{rate}: auto registered in {time.perf_counter() - begin:.2f} s", flush=True)
            for _ in range(2):
                steps(e.model, data, target)
            here.append(e)
        found = measured(here, rate, links[rate])
        results += found
        if rank == 0:
            report(rate, links[rate], found)
        if "pykernels auto" in given.hooks:
            here.pop().handle.state.close()  # type: ignore[union-attr]
    if rank == 0:
        for result in results:
            if result.reason:
                print(f"{result.hook}: {result.reason}")
        if given.output:
            save(given, world, links, results)
    dist.barrier()
    dist.destroy_process_group()


# ---- reporting -------------------------------------------------------------------------------------------------------
def report(rate: str, link: float, results: Sequence[Result]) -> None:
    by_name = {r.hook: r for r in results}

    def ratio(name: str, r: Result) -> str:
        other = by_name.get(name)
        if other is None or other.step_ms is None or r.step_ms is None:
            return "-"
        return f"{other.step_ms / r.step_ms:.2f}x"

    print(
        f"\n{rate}, {results[0].world} ranks, stream {link * 8 / 1e6:.0f} Mbit/s, medians of {results[0].rounds} rounds"
    )
    heads = (
        ("ms a step", 11),
        ("best", 10),
        ("vs fp32", 9),
        ("vs bf16", 9),
        ("MB sent", 9),
        ("comm/wire", 11),
        ("error", 9),
    )
    print(f"{'hook':24}" + "".join(f"{head:>{width}}" for head, width in heads))
    for r in sorted(results, key=lambda r: r.step_ms or 0.0):
        error = "" if r.error is None else f"{r.error:.2g}"
        print(
            f"{r.hook:24}{r.step_ms:11.1f}{r.best_ms:10.1f}{ratio('ddp fp32', r):>9}{ratio('torch bf16', r):>9}"
            f"{r.megabytes:9.2f}{r.over_wire:11.2f}{error:>9}"
        )
    for r in results:
        if r.hook == "pykernels auto":
            print(r.detail)
    sys.stdout.flush()


def save(given: argparse.Namespace, world: int, links: dict[str, float], results: Sequence[Result]) -> None:
    folder = pathlib.Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"comm-{given.model}-{world}.json"
    data = {
        "format": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "settings": {k: v for k, v in vars(given).items() if k != "output"},
        "stream_bytes_per_second": links,
        "results": [asdict(r) for r in results],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"written: {path}, {draw(path)}")


def draw(path: pathlib.Path) -> pathlib.Path:
    """Bars of step time, a panel for each rate, beside the JSON."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = json.loads(path.read_text())
    timed = [r for r in data["results"] if r["step_ms"] is not None]
    rates = list(dict.fromkeys(r["rate"] for r in timed))
    figure = Figure(figsize=(4.6 * len(rates) + 1, 0.32 * len(timed) / len(rates) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, rate in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates, strict=True):
        rows = sorted((r for r in timed if r["rate"] == rate), key=lambda r: -r["step_ms"])
        colors = ["#55a868" if r["hook"].startswith("pykernels") else "#999999" for r in rows]
        axes.barh([r["hook"] for r in rows], [r["step_ms"] for r in rows], color=colors)
        axes.plot([r["wire_ms"] for r in rows], range(len(rows)), "k|", markersize=9)
        for i, r in enumerate(rows):
            axes.text(r["step_ms"], i, f" {r['step_ms']:.0f}", va="center", fontsize=8)
        axes.set_title(f"{rate} ({data['stream_bytes_per_second'][rate] * 8 / 1e6:.0f} Mbit/s measured)", fontsize=10)
        axes.set_xlabel("ms a step; | is the wire bound")
        axes.tick_params(axis="y", labelsize=8)
        axes.set_xlim(0, 1.15 * max(r["step_ms"] for r in rows))
        axes.spines[["top", "right"]].set_visible(False)
    world = timed[0]["world"]
    figure.suptitle(
        f"DDP, {world} ranks, {data['settings']['model']} ResNet-50 gradients, torch {data['torch']}", fontsize=10
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    return target


# ---- the command -----------------------------------------------------------------------------------------------------
HOOKS = (
    "ddp fp32",
    "torch fp16",
    "torch bf16",
    "torch int8 per tensor",
    "torch int8 per channel",
    POWERSGD,
    *(
        f"pykernels {codec}"
        for codec in ("bf16", "fp8", "int8", "int4", "int2", "onebit", "topk", "powersgd", "auto")
        if codec in comm.HOOKS
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, help="make network namespaces for so many ranks")
    parser.add_argument("--rates", help="of the links: 100mbit,1gbit,10gbit,unshaped; as they are without")
    parser.add_argument("--hooks", help=f"some of: {','.join(HOOKS)},torch allreduce hook,pykernels fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=("cheap", "resnet50"), default="cheap")
    parser.add_argument("--scale", type=float, default=1.0, help="of the cheap model's sizes")
    parser.add_argument("--batch", type=int, default=4, help="of the real model, images of 64x64")
    parser.add_argument("--threads", type=int, default=1, help="a rank")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds, of all")
    parser.add_argument("--output", help="folder for the JSON and the chart")
    given = parser.parse_args()
    given.hooks = given.hooks.split(",") if given.hooks else list(HOOKS)
    given.rates = netns.rates(given.rates)
    if "RANK" in os.environ:
        worker(given)
        return
    netns.check_launch(parser, given.world)
    command = [sys.executable, "-m", "benchmarks.comm.step", *sys.argv[1:]]
    if POWERSGD in given.hooks:
        alone = ["--hooks", POWERSGD, "--rates", "unshaped", "--scale", "0.05", "--rounds", "3", "--output", ""]
        status = netns.run([*command, *alone], given.world, POWERSGD_SECONDS)
        if status:
            what = "hung, and was stopped" if status == 124 else f"failed with status {status}"
            print(f"{POWERSGD}: {what} (its own processes, {POWERSGD_SECONDS:.0f} s at most)", flush=True)
        given.hooks.remove(POWERSGD)
        command += ["--hooks", ",".join(given.hooks)]
    sys.exit(netns.run(command, given.world, given.timeout))


if __name__ == "__main__":
    main()
