"""The commands `pykernels plan`: what the plans of a saved network do, and how long each of their kernels takes."""

from __future__ import annotations

import collections
import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

import pykernels
from pykernels.bench import chart as charts
from pykernels.bench import peaks as machine_peaks
from pykernels.bench.machine import machine
from pykernels.bench.peaks import Peaks
from pykernels.bench.report import LIMITS
from pykernels.cli.errors import fail
from pykernels.cli.network import Network, inputs_like, load
from pykernels.network.plan.planned import PlanReport, PlanRow

app = typer.Typer(help="What a saved network does on the CPU.", no_args_is_help=True)
PEAKS = {"uint8": "int8", "int8": "int8", "bfloat16": "bf16"}
"""By the dtype that a kernel reads, the peak that it is held against; fp32 for others: float16 is computed in fp32."""
CHARTS = (".png", ".svg")
WIDTH = 160  # of tables that go to a file or a pipe
BUSY = 1e-3  # seconds: a call longer than that is mostly kernels

Threads = Annotated[int | None, typer.Option(min=1, help="torch's number without.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Dimension 0 of every input; the example's without.")]
Size = Annotated[
    str | None,
    typer.Option(metavar="HxW", help="Height and width of the inputs that are images; the example's without."),
]


@app.callback()
def main() -> None:
    """What a saved network does on the CPU."""


@app.command()
def show(network: Network, threads: Threads = None, batch: Batch = None, size: Size = None) -> None:
    """List the kernel calls of a network: shapes, operations, bytes, tasks; then its memory.

    MOP: millions of multiplications and additions. MB: read and written, weights included. Tasks: the pieces that
    threads take.

    [cyan]pykernels plan show net.pk --batch 8 --threads 4[/]
    """
    fast = load(network)
    inputs = inputs_like(fast, batch, size)
    with _threads(threads):
        report = _report(fast, inputs, batch, size)
    console = _console()
    console.print(_table(report))
    console.print(_totals(report), highlight=False, soft_wrap=True)


@app.command()
def profile(
    network: Network,
    threads: Threads = None,
    batch: Batch = None,
    size: Size = None,
    rounds: Annotated[int, typer.Option(min=1, max=100_000, help="Calls that are timed; medians count.")] = 100,
    chart: Annotated[
        pathlib.Path | None, typer.Option(help="Draw the time of each kernel call to this .svg or .png.")
    ] = None,
) -> None:
    """Time each kernel call of a network, and say which share of this machine's limit it reached.

    The limit is the least time in which the machine, as it is measured here for as many threads, could do the step's
    operations at its peak for their dtype (ops), or move its bytes from the level of memory that holds them (bytes),
    whichever is longer.

    [cyan]pykernels plan profile net.pk --threads 2 --chart plan.svg[/]
    """
    if chart is not None and chart.suffix.lower() not in CHARTS:
        fail(f"--chart: {chart} must end in {' or '.join(CHARTS)}")
    if chart is not None and not chart.parent.is_dir():
        fail(f"--chart: the folder {chart.parent} does not exist")
    fast = load(network)
    inputs = inputs_like(fast, batch, size)
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with _threads(threads), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading the plans", total=None)
        _report(fast, inputs, batch, size)  # what is wrong with the inputs is said before the machine is measured
        progress.update(task, description="measuring the machine's peaks")
        peaks = machine_peaks.measure()
        progress.update(task, description=f"timing {rounds} calls")
        report = _report(fast, inputs, batch, size, rounds)
        facts = machine()
    limits = [_limit(row, peaks, report.threads) for row in report.rows]
    console = _console()
    console.print(_table(report, limits))
    console.print(_totals(report), highlight=False, soft_wrap=True)
    console.print(_times(report, [seconds for seconds, _ in limits], peaks), highlight=False, soft_wrap=True)
    if chart is not None:
        title = f"{network.name} {' '.join(str(list(x.shape)) for x in inputs)} · {facts}"
        try:
            charts.draw_plan(report, [seconds for seconds, _ in limits], title, chart)
        except ModuleNotFoundError as error:
            fail(f"--chart: {error}")
        console.print(f"written: {chart}", highlight=False)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(WIDTH, console.width))


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _report(
    fast: pykernels.Optimized, inputs: tuple[torch.Tensor, ...], batch: int | None, size: str | None, rounds: int = 0
) -> PlanReport:
    try:
        return fast.plan(inputs, rounds)
    except ValueError as error:
        fail(f"NETWORK: {error}")
    except (RuntimeError, IndexError) as error:
        given = [name for name, value in (("--batch", batch), ("--size", size)) if value is not None]
        shapes = " and ".join(str(list(x.shape)) for x in inputs)
        fail(f"{', '.join(given) or 'NETWORK'}: it refuses inputs of {shapes}: {str(error).splitlines()[0]}")


def _limit(row: PlanRow, peaks: Peaks, threads: int) -> tuple[float, str]:
    """The least seconds that this machine needs for a kernel call, and what sets it: see `Peaks.seconds`."""
    times = row.tasks / threads if row.by_image else 1  # an image a thread each time: that is what caches must hold
    seconds, bound = peaks.seconds(PEAKS.get(row.dtype, "fp32"), row.operations / times, row.bytes / times)
    return times * seconds, bound


def _table(report: PlanReport, limits: Sequence[tuple[float, str]] = ()) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("step", overflow="fold")
    table.add_column("kernel", overflow="fold")
    table.add_column("shape", no_wrap=True)
    for head in ("MOP", "MB", "tasks", *(("µs", "of limit", "GOP/s", "GB/s") if limits else ())):
        table.add_column(head, justify="right", no_wrap=True)
    for place, row in enumerate(report.rows):
        cells = [row.step, row.kernel, "x".join(map(str, row.shape))]
        cells += [f"{row.operations / 1e6:.1f}" if row.operations else "", f"{row.bytes / 1e6:.2f}", row.pieces]
        if limits and row.seconds:
            seconds, bound = limits[place]
            cells += [f"{1e6 * row.seconds:.1f}", f"{100 * seconds / row.seconds:.0f} % {LIMITS[bound]}"]
            cells.append(f"{row.operations / row.seconds / 1e9:.0f}" if row.operations else "")
            cells.append(f"{row.bytes / row.seconds / 1e9:.1f}")
        table.add_row(*cells)
    return table


def _totals(report: PlanReport) -> str:
    left = collections.Counter(report.left)
    between = ", ".join(f"{count} {target}" for target, count in left.items()) or "nothing"
    return "\n".join(
        [
            f"{_counted(len(report.rows), 'kernel call')} in {_counted(report.plans, 'plan')}; "
            f"left to torch between: {between}",
            f"weights {report.weight_bytes / 1e6:.2f} MB; memory between the steps {report.arena_bytes / 1e6:.2f} MB, "
            f"of which no placement could do without {report.least_arena_bytes / 1e6:.2f}",
            f"isa {report.isa}, {_counted(report.threads, 'thread')}",
        ]
    )


def _times(report: PlanReport, limits: Sequence[float], peaks: Peaks) -> str:
    kernels, call = report.seconds or 0.0, report.call_seconds or 0.0
    operations = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peaks.operations.items())
    levels = ", ".join(f"{level.name} {level.read / 1e9:.0f}" for level in peaks.levels)
    who = "the calls, torch's included, cost" if report.left else "a call costs"
    beside = f"{1e3 * (call - kernels):.3f} ms" if call > kernels else "nothing measurable"
    lines = [
        f"this machine's peaks: {operations} GOP/s; {levels} GB/s",
        f"kernels {1e3 * kernels:.3f} ms, {100 * sum(limits) / max(kernels, 1e-9):.0f} % of the limit; "
        f"whole call {1e3 * call:.3f} ms: {who} {beside} beside them",
    ]
    # Kernels are timed on one thread, which saw little of them if it came late; peaks are low on busy cores.
    if kernels < sum(limits) or (not report.left and kernels < call / 2 and call > BUSY):
        lines.append("other programs had the cores meanwhile, so these times mean little: measure again")
    return "\n".join(lines)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
