"""A run as a picture: bars beside the rivals, and where every entry stands under the machine's roofline. A plan as one:
the time of each kernel call."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from pykernels.bench.harness import Result, Run
from pykernels.bench.peaks import Peaks
from pykernels.bench.report import pairs
from pykernels.network.plan.planned import PlanReport

COLORS = {"fp32": "#4c72b0", "bf16": "#dd8452", "int8": "#55a868"}
PALE = "#c9d5e8"
Series = dict[str, dict[tuple[str, str], list[tuple[int, float]]]]
"""Of each network its lines, named (who, precision): points of (batch or threads, images a second)."""
DETAILED = 8
"""With at most so many cases every entry has its bar; with more, ours and the fastest rival of each precision."""


def draw(run: Run, path: pathlib.Path) -> pathlib.Path:
    """Draw `run` to a PNG and return its path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing was timed.
    """
    timed = [r for r in run.results if r.median_ms is not None]
    if not timed:
        raise ValueError("run: nothing was timed, so there is nothing to draw")
    bars = _bars(timed)
    roofline = run.peaks is not None and any(r.work > 0 for r in timed)
    height = max(5.0, 0.24 * sum(len(entries) + 1 for _, entries in bars) + 1.5)
    figure = _figure(17 if roofline else 10, height)
    axes = figure.subplots(1, 2 if roofline else 1, squeeze=False)[0]
    _draw_bars(axes[0], bars)
    if roofline:
        assert run.peaks is not None
        _draw_roofline(axes[1], timed, run.peaks)
    facts = run.machine
    figure.suptitle(
        f"{facts.get('cpu')}, {run.settings.get('threads')} threads, {facts.get('isa')} · pykernels "
        f"{run.versions.get('pykernels', '')}, torch {run.versions.get('torch', '')} · {run.date[:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    return path


def draw_plan(report: PlanReport, limits: Sequence[float], title: str, path: pathlib.Path) -> pathlib.Path:
    """Draw the time of each kernel call of timed plans, in order, to a file that matplotlib can write; return its path.

    Args:
        limits: of each row the least seconds that the machine needs; drawn in full colour, what is above them pale.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing was timed.
    """
    if report.seconds is None:
        raise ValueError("report: nothing was timed, so there is nothing to draw")
    figure = _figure(11, 0.19 * len(report.rows) + 1.5)
    axes = figure.subplots()
    for place, (row, least) in enumerate(zip(report.rows, limits, strict=True)):
        taken = 1e6 * (row.seconds or 0.0)
        axes.barh(place, taken, color=PALE, height=0.8)
        axes.barh(place, min(1e6 * least, taken), color=COLORS["fp32"], height=0.8)
        axes.text(taken, place, f" {taken:.3g}", va="center", fontsize=7)
    labels = [f"{row.step} · {row.kernel} {'x'.join(map(str, row.shape))}" for row in report.rows]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels), -1)
    axes.set_xlabel("median µs; in full colour what the machine needs at least")
    axes.spines[["top", "right"]].set_visible(False)
    kernels, call = 1e3 * report.seconds, 1e3 * (report.call_seconds or 0.0)
    figure.suptitle(f"{title}\nkernels {kernels:.3f} ms, whole call {call:.3f} ms", fontsize=10)
    figure.savefig(path, dpi=120)
    return path


def draw_ratios(run: Run, path: pathlib.Path) -> pathlib.Path:
    """Draw how many times faster ours is than the fastest rival, a bar for each case and precision.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing of ours was timed beside a rival.
    """
    found = pairs(run.results)
    if not found:
        raise ValueError("run: nothing of ours was timed beside a rival")
    figure = _figure(9, 0.22 * len(found) + 1.2)
    axes = figure.subplots()
    for place, (_, precision, ours, rival) in enumerate(found):
        ratio = rival.taken / ours.taken
        axes.barh(place, ratio, color=COLORS[precision], height=0.8)
        axes.text(ratio, place, f" {ratio:.2f}x {rival.rival}", va="center", fontsize=7)
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.set_yticks(range(len(found)), [f"{title} {precision}" for title, precision, *_ in found], fontsize=7)
    axes.set_ylim(len(found), -1)
    axes.set_xlim(0.0, 1.25 * max(rival.taken / ours.taken for *_, ours, rival in found))
    axes.set_xlabel("fastest rival ÷ ours (above 1: ours is faster)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def draw_roofline(run: Run, path: pathlib.Path) -> pathlib.Path:
    """Draw where every timed entry stands under the machine's roofline.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing was timed, or the peaks were not measured.
    """
    timed = [r for r in run.results if r.median_ms is not None and r.work > 0]
    if not timed or run.peaks is None:
        raise ValueError("run: nothing that has operations was timed")
    figure = _figure(8, 6)
    _draw_roofline(figure.subplots(), timed, run.peaks)
    figure.savefig(path)
    return path


def draw_scaling(series: Series, of: str, path: pathlib.Path) -> pathlib.Path:
    """Draw images a second against batch or threads (`of` names the axis): for each network ours and the fastest rival.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = _figure(5.5 * len(series), 4)
    for axes, (network, lines) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True):
        for (who, precision), points in lines.items():
            ours = who == "ours"
            xs, ys = zip(*points, strict=True)
            axes.plot(
                xs, ys, color=COLORS[precision], linestyle="-" if ours else "--", marker="o" if ours else "x",
                label=f"{who} {precision}",
            )  # fmt: skip
            axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
        axes.set_title(network, fontsize=10)
        axes.set_xlabel(of)
        axes.set_ylabel("images a second")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def draw_compression(
    points: Sequence[tuple[float, float, str, str]],
    chosen: int,
    measure: str,
    least: float | None,
    latency: float | None,
    path: pathlib.Path,
) -> pathlib.Path:
    """Draw what a compression tried: quality against latency, as a part of the original's.

    Args:
        points: latency, quality, name and precision of each network.
        chosen: the place of the one that was taken.
        measure: what quality is, in a word.
        least, latency: the budget's bounds, where it has them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = _figure(9, 5)
    axes = figure.subplots()
    for place, (x, y, name, precision) in enumerate(points):
        color = COLORS.get(precision, "grey")
        axes.scatter([x], [y], s=120 if place == chosen else 40, marker="*" if place == chosen else "o", color=color)
        axes.annotate(
            name, (x, y), fontsize=7, fontweight="bold" if place == chosen else "normal", xytext=(5, 5),
            textcoords="offset points", ha="right" if x > 0.6 else "left",
        )  # fmt: skip
    if least is not None:
        axes.axhline(least, color="grey", linewidth=1, linestyle="--")
    if latency is not None:
        axes.axvline(latency, color="grey", linewidth=1, linestyle="--")
    axes.set_xlim(left=0)
    axes.set_xlabel("latency, as a part of the original's in fp32")
    axes.set_ylabel(measure)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _figure(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the chart needs matplotlib: pip install matplotlib ({error})") from error
    figure = Figure(figsize=(width, min(height, 60.0)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bars(timed: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    cases: dict[str, list[Result]] = {}
    for r in timed:
        cases.setdefault(r.title, []).append(r)
    if len(cases) <= DETAILED:
        return [(name, sorted(entries, key=lambda r: r.taken)) for name, entries in cases.items()]
    short: dict[str, list[Result]] = {}
    for name, _, ours, rival in pairs(timed):
        short.setdefault(name, []).extend((ours, rival))
    return [(name, sorted(entries, key=lambda r: r.taken)) for name, entries in (short or cases).items()]


def _draw_bars(axes: Any, bars: list[tuple[str, list[Result]]]) -> None:
    position = 0.0
    ticks: list[float] = []
    labels: list[str] = []
    for name, entries in bars:
        axes.text(
            0.0, position, f" {name}", fontweight="bold", fontsize=8, va="center", transform=axes.get_yaxis_transform()
        )
        position += 1
        for r in entries:
            color = COLORS[r.precision]
            axes.barh(position, r.taken, color=color, alpha=1.0 if r.ours else 0.4, edgecolor=color, height=0.8)
            axes.text(r.taken, position, f" {r.taken:.3g} ms", va="center", fontsize=7)
            ticks.append(position)
            labels.append(r.label)
            position += 1
    axes.set_yticks(ticks, labels, fontsize=7)
    for tick, label in zip(axes.get_yticklabels(), labels, strict=True):
        if label.startswith("pykernels"):
            tick.set_fontweight("bold")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 1.6)
    axes.set_ylim(position, -1)
    axes.set_xlabel("median ms a call (log; shorter is better)")
    axes.set_title("beside the rivals (ours in full colour)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_roofline(axes: Any, timed: Sequence[Result], peaks: Peaks) -> None:
    points = [(r.work / r.traffic, r.gops, r) for r in timed if r.work > 0 and r.traffic > 0 and r.gops]
    high = max(x for x, _, _ in points) * 2
    used = {r.precision for r in timed}
    top = max(peaks.operations[p] for p in used) / 1e9
    # From left of the ridge of the fastest memory, so that every slanted roof shows.
    ridges = [top / (level.read / 1e9) for level in peaks.levels]
    low = min(*ridges, *(x for x, _, _ in points)) / 2
    for level in peaks.levels:
        bandwidth = level.read / 1e9
        ends = [low, min(high, max(low, top / bandwidth))]
        axes.plot(ends, [v * bandwidth for v in ends], color="grey", linewidth=1, linestyle="--")
        axes.annotate(
            f"{level.name} {bandwidth:.0f} GB/s", (low, low * bandwidth), fontsize=7, color="grey", va="bottom"
        )
    for precision in used:
        peak = peaks.operations[precision] / 1e9
        axes.axhline(peak, color=COLORS[precision], linewidth=1)
        axes.annotate(
            f"{precision} peak {peak:.0f} GOP/s",
            (high, peak),
            fontsize=7,
            ha="right",
            va="bottom",
            color=COLORS[precision],
        )
    for x, y, r in points:
        color = COLORS[r.precision]
        axes.scatter(
            [x], [y], s=30 if r.ours else 14, marker="o" if r.ours else "x", color=color, alpha=1.0 if r.ours else 0.6
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("operations a byte that must move")
    axes.set_ylabel("GOP/s (median)")
    axes.set_title("roofline: circles ours, crosses rivals", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
