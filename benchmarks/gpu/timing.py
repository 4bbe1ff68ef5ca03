"""What the GPU commands share: timing by CUDA events, the device's facts, a report as JSON, tables and charts."""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pykernels
from benchmarks.gpu.warm import kernels_only
from pykernels.cuda import registry
from pykernels.ops import _load

REPEAT = 10  # calls in one CUDA graph
FOLDER = pathlib.Path(__file__).parent.parent.parent / "docs" / "benchmarks" / "gpu"


def require_gpu(command: str) -> None:
    """Leave with status 1 and the reason where no op of ours can run on a GPU."""
    error = _load.CPU_ERROR or registry.error() or (None if torch.cuda.is_available() else "torch sees no GPU")
    if error is not None:
        sys.exit(f"{command}: {error}")


def facts() -> dict[str, Any]:
    """What was measured with: device, versions, whether the CUDA library is loaded."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "pykernels": pykernels.__version__,
        "cuda_library": _load.CUDA_ERROR or "loaded",
    }


def best(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds of each call, the best of all rounds, one call after another in each round."""
    times = [float("inf")] * len(calls)
    for call in calls * 3:
        call()
    for _ in range(rounds):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        torch.cuda.synchronize()
        for i, (begin, end) in enumerate(itertools.pairwise(marks)):
            times[i] = min(times[i], begin.elapsed_time(end) / 1e3)
    return times


def graphed(call: Callable[[], Any], repeat: int = REPEAT) -> Callable[[], Any]:
    """`repeat` calls as one CUDA graph: what the device does, without what a launch costs the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(max(3, repeat)):  # calls that take turns have all been made once
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    return graph.replay


def compare(calls: dict[str, Callable[[], Any]], rounds: int = 20, repeat: int = REPEAT) -> dict[str, float | str]:
    """Seconds of one call of each rival, by name, in CUDA graphs; or why it did not run, as words."""
    found: dict[str, float | str] = {}
    graphs: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        try:
            call()
            torch.cuda.synchronize()
            graphs[name] = graphed(call, repeat)
        except Exception as error:  # a rival that cannot run is told of, and the others are measured
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    for name, seconds in zip(graphs, best(list(graphs.values()), rounds), strict=True):
        found[name] = seconds / repeat
    return {name: found[name] for name in calls}


@dataclass(frozen=True)
class Case:
    """One row of a report.

    Attributes:
        head: what stands before the times.
        rivals: makes what is compared, by name; those of ours are called `pykernels ...`.
        speed: what stands beside `head` once our seconds are known, or that we did not run (None).
        repeat: calls in one CUDA graph.
    """

    head: dict[str, Any]
    rivals: Callable[[], dict[str, Callable[[], Any]]]
    speed: Callable[[float | None], dict[str, Any]] = field(default=lambda _: {})
    repeat: int = REPEAT

    def measure(self, rounds: int) -> dict[str, Any]:
        """The row, seconds of one call of each rival under `times`."""
        times = compare(self.rivals(), rounds, self.repeat)
        ours = next(seconds for name, seconds in times.items() if name.startswith("pykernels"))
        return {**self.head, **self.speed(ours if isinstance(ours, float) else None), "times": times}

    def line(self, row: dict[str, Any]) -> str:
        """The row in one line, times in µs."""
        heads = " ".join(f"{key} {value}" for key, value in row.items() if key != "times")
        times = (f"{n} {t * 1e6:.1f}" if isinstance(t, float) else f"{n} –" for n, t in row["times"].items())
        return f"{heads}: {', '.join(times)}"

    def compile(self) -> None:
        """Compile our kernels, and no rival's, and run none."""
        with kernels_only():
            for name, call in self.rivals().items():
                if name.startswith("pykernels"):
                    call()


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one kind; seconds under `times` become columns of µs."""
    if not rows:
        return
    names = list(rows[0]["times"])
    heads = [key for key in rows[0] if key != "times"]
    table = Table(*heads, *(f"{name}, µs" for name in names), title=title, title_justify="left")
    for row in rows:
        cells = [f"{row['times'][n] * 1e6:.1f}" if isinstance(row["times"][n], float) else "–" for n in names]
        table.add_row(*(str(row[key]) for key in heads), *cells)
    console = Console(width=160)
    console.print(table)
    for name, reason in {(n, r) for row in rows for n, r in row["times"].items() if isinstance(r, str)}:
        console.print(f"{name} did not run: {reason}")


def save(name: str, report: dict[str, Any], folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """Write a report beside the others and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def draw(title: str, rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Bars of each row's times over our own, longer is slower; without matplotlib nothing is drawn, and it says so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"{path.name} is not drawn: pip install matplotlib")
        return
    names = list(rows[0]["times"])
    figure = Figure(figsize=(10, 1.5 + 0.13 * len(names) * len(rows) + 0.12 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, name in enumerate(names):
        drawn = [(j + 0.8 * i / len(names), row["times"][name] * 1e6) for j, row in enumerate(rows)
                 if isinstance(row["times"][name], float)]  # fmt: skip
        if drawn:
            axes.barh([y for y, _ in drawn], [x for _, x in drawn], 0.8 / len(names), label=name)
    labels = [" ".join(str(value) for key, value in row.items() if key != "times") for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set(xscale="log", xlabel="µs")
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
