"""A real network on real photographs, before and after: `make demo`, or `python -m examples.demo`.

EfficientNet-Lite0 with its ImageNet weights runs on 20 labelled photographs as PyTorch runs it, then as pykernels does
in fp32 and in int8. Every figure printed comes from this run. int8 is calibrated on ten of the photographs; what it
answers is judged on all twenty, and on the ten it has not seen.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import pykernels as pk
from benchmarks import assets
from pykernels.bench import zoo
from pykernels.bench.machine import machine
from pykernels.cli.main import hush

CALIBRATION = 10  # photographs, every second one
Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Entry:
    """One way to run the network, and what this run measured of it."""

    name: str
    network: Network
    weights: int  # bytes
    milliseconds: list[float] = field(default_factory=list)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def latency(self) -> float:
        return statistics.median(self.milliseconds)

    def top(self, k: int, labels: torch.Tensor) -> int:
        """How many photographs have their label among the k best answers."""
        return int((self.logits.topk(k).indices == labels[:, None]).any(1).sum())

    def agreement(self, other: Entry, rows: slice = slice(None)) -> int:
        """How many photographs get the same first answer as from `other`."""
        return int((self.logits[rows].argmax(1) == other.logits[rows].argmax(1)).sum())


@contextmanager
def step(progress: Progress, description: str, total: float | None = None) -> Iterator[Callable[[], None]]:
    """A line of progress; yields what to call after each unit of work."""
    task = progress.add_task(description, total=total)
    yield lambda: progress.advance(task)
    progress.update(task, total=total or 1, completed=total or 1)


def measure(entries: list[Entry], x: torch.Tensor, rounds: int, advance: Callable[[], None]) -> None:
    """Time one call of each entry, round by round, so that whatever disturbs the machine disturbs all alike."""
    for entry in entries:
        for _ in range(3):
            entry.network(x)
    for number in range(rounds):
        for index in range(len(entries)):
            entry = entries[(index + number) % len(entries)]
            start = time.perf_counter()
            entry.network(x)
            entry.milliseconds.append((time.perf_counter() - start) * 1e3)
        advance()


def results(entries: list[Entry], photographs: assets.Photographs) -> Table:
    eager, count = entries[0], len(photographs)
    table = Table(title="EfficientNet-Lite0, one photograph at a time", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for column in ("median ms", "speed", "top-1", "top-5", "same answer", "weights"):
        table.add_column(column, justify="right")
    for entry in entries:
        table.add_row(
            entry.name,
            f"{entry.latency:.2f}",
            f"{eager.latency / entry.latency:.2f}x",
            f"{entry.top(1, photographs.labels)}/{count}",
            f"{entry.top(5, photographs.labels)}/{count}",
            f"{entry.agreement(eager)}/{count}",
            f"{entry.weights / 1e6:.1f} MB",
        )
    return table


def fused(report: Any) -> Table:
    """What surgery made of the network: each kind of fused call and how often it occurs."""
    title = f"int8: {len(report.fused)} fused calls, {len(report.left)} left to torch"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("op", "stands for"):
        table.add_column(column)
    table.add_column("calls", justify="right")
    for (op, what), calls in collections.Counter((entry.op, entry.what) for entry in report.fused).most_common():
        table.add_row(op, what, str(calls))
    for (op, reason), calls in collections.Counter((entry.op, entry.reason) for entry in report.left).most_common():
        table.add_row(f"[yellow]{op}[/]", f"[yellow]left to torch: {reason}[/]", str(calls))
    return table


def chart(entries: list[Entry], photographs: assets.Photographs, subtitle: str, file: pathlib.Path) -> None:
    """Latency, size and answers side by side, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, muted = "#1f2933", "#7b8794"
    colours = ["#b8c1cc", "#5fa8d3", "#e4572e"][: len(entries)]
    plt.rcParams.update({"font.size": 10, "text.color": ink, "axes.labelcolor": muted, "ytick.color": ink})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 4), gridspec_kw={"width_ratios": [3, 2, 3], "wspace": 0.12}, facecolor="white"
    )
    names = [entry.name for entry in entries]
    eager = entries[0]

    latencies = [entry.latency for entry in entries]
    deciles = [statistics.quantiles(entry.milliseconds, n=10) for entry in entries]
    spread = [
        [max(0.0, median - d[0]) for median, d in zip(latencies, deciles, strict=True)],
        [max(0.0, d[-1] - median) for median, d in zip(latencies, deciles, strict=True)],
    ]
    left.barh(names, latencies, color=colours, height=0.62, xerr=spread, error_kw={"ecolor": muted, "elinewidth": 1.2})
    ends = [latency + above for latency, above in zip(latencies, spread[1], strict=True)]
    for row, entry in enumerate(entries):
        factor = "" if entry is eager else f"   {eager.latency / entry.latency:.1f}x"
        left.text(ends[row] + 0.02 * max(ends), row, f"{entry.latency:.1f} ms{factor}", va="center", weight="bold")
    left.set_xlim(0, 1.7 * max(ends))
    left.set_title("Latency, median and 10-90 %", loc="left", fontsize=11)

    sizes = [entry.weights / 1e6 for entry in entries]
    middle.barh(names, sizes, color=colours, height=0.62)
    for row, size in enumerate(sizes):
        middle.text(size + 0.02 * max(sizes), row, f"{size:.1f} MB", va="center", weight="bold")
    middle.set_xlim(0, 1.4 * max(sizes))
    middle.set_title("Weights", loc="left", fontsize=11)

    kinds = ["top-1", "top-5", "same answer\nas eager"]
    count = len(photographs)
    width = 0.8 / len(entries)
    for row, entry in enumerate(entries):
        values = [entry.top(1, photographs.labels), entry.top(5, photographs.labels), entry.agreement(eager)]
        places = [kind + (row - (len(entries) - 1) / 2) * width for kind in range(len(kinds))]
        right.bar(places, values, width * 0.92, color=colours[row], label=entry.name)
        for place, value in zip(places, values, strict=True):
            right.text(place, value + 0.015 * count, str(value), ha="center", fontsize=9)
    right.set_xticks(range(len(kinds)), kinds)
    right.set_ylim(0, 1.12 * count)
    right.set_title(f"Answers on {count} photographs", loc="left", fontsize=11)

    for axis in (left, middle):
        axis.invert_yaxis()
        axis.set_xticks([])
    middle.set_yticks([])
    right.set_yticks([])
    for axis in (left, middle, right):
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    figure.suptitle(
        "EfficientNet-Lite0 before and after pykernels", x=0.07, ha="left", weight="bold", fontsize=14, y=1.06
    )
    figure.text(0.07, 0.965, subtitle, color=muted, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each contestant (default 60)")
    parser.add_argument("--chart", type=pathlib.Path, default=pathlib.Path("out/demo.png"), help="the PNG to write")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")

    console = Console()
    console.print(f"[bold]pykernels demo[/]  [dim]{machine()}[/]")
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(24),
        TimeElapsedColumn(),
    )
    hush()
    with Progress(*columns, console=console) as progress, torch.no_grad():
        with step(progress, "load EfficientNet-Lite0 and its weights"):
            model = zoo.efficientnet_lite0()
        with step(progress, "load 20 labelled photographs"):
            photographs = assets.load_foolbox_photographs()
        x, seen = photographs.images[:1], photographs.images[::2][:CALIBRATION]
        with step(progress, "optimize: fp32"):
            fp32 = pk.optimize(model, (x,), precision="fp32")
        with step(progress, f"optimize: int8, calibrated on {len(seen)} photographs"):
            int8 = pk.optimize(model, (x,), precision="int8", calibration=[image[None] for image in seen])
        entries = [
            Entry("eager fp32", model, int8.report().bytes_before),
            Entry("pykernels fp32", fp32, fp32.report().bytes_after),
            Entry("pykernels int8", int8, int8.report().bytes_after),
        ]
        with step(progress, "look at the photographs", len(entries) * len(photographs)) as advance:
            for entry in entries:
                answers = []
                for image in photographs.images:
                    answers.append(entry.network(image[None]).clone())
                    advance()
                entry.logits = torch.cat(answers)
        with step(progress, f"time {arguments.rounds} interleaved rounds", arguments.rounds) as advance:
            measure(entries, x, arguments.rounds, advance)
        with step(progress, f"draw {arguments.chart}"):
            chart(entries, photographs, str(machine()), arguments.chart)

    eager, unseen = entries[0], slice(1, None, 2)
    console.print()
    console.print(results(entries, photographs))
    console.print(
        f"int8 was calibrated on {len(seen)} of these photographs; on the {len(photographs.images[unseen])} others "
        f"it gives the same answer as eager on {entries[2].agreement(eager, unseen)}."
    )
    console.print()
    console.print(fused(int8.report()))
    console.print(f"chart: [bold]{arguments.chart}[/]")


if __name__ == "__main__":
    main()
