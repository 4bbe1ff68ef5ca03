"""What a run found, for people (a table) and for machines (JSON)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pykernels.bench.harness import Result, Run
from pykernels.bench.peaks import Level, Peaks

FORMAT = 1
"""Of the JSON; a reader refuses another."""
LIMITS = {"compute": "ops", "memory": "bytes"}
"""What bounds a case, in a word that fits a column."""


def case_table(results: Sequence[Result]) -> Group:
    """The results of one case, the fastest first; below it who is not there, and why. It fits 80 columns."""
    timed = sorted((r for r in results if r.median_ms is not None), key=lambda r: r.median_ms or 0.0)
    title = f"{results[0].group} {results[0].case}".strip()
    if results[0].family == "network":
        title = results[0].case or title
    table = _table(title)
    table.add_column("", min_width=18)
    rate = "GOP/s" if any(r.gops for r in timed) else "GB/s"
    for name in ("median ms", "best ms", rate, "of limit", "error", "ours"):
        table.add_column(name, justify="right")
    for r in timed:
        assert r.median_ms is not None and r.best_ms is not None
        against = min(
            (o.median_ms for o in timed if o.ours and o.precision == r.precision and o.median_ms), default=None
        )
        ratio = "" if r.ours or against is None else times(r.median_ms / against)
        table.add_row(
            Text(r.label, style="bold green" if r.ours else ""),
            milliseconds(r.median_ms),
            milliseconds(r.best_ms) + (" ~" if (r.spread or 0) > 0.2 else "  "),
            f"{r.gops:.0f}" if r.gops else f"{r.traffic / r.median_ms / 1e6:.1f}",
            "" if r.share is None else f"{100 * r.share:.0f} % {LIMITS[str(r.limit)]}",
            "" if r.error is None else f"{r.error:.2g}",
            Text(ratio, style="green" if ratio and r.median_ms > (against or 0) else "red"),
        )
    absent = [Text(f"  {r.label}: {r.reason}", style="dim") for r in results if r.median_ms is None]
    return Group(table, *absent, Text(""))


def summary(run: Run) -> Table:
    """For each case and precision: ours, the fastest rival, how many times faster ours is, and the least time that the
    machine's measured peaks allow. It fits 80 columns."""
    table = _table("ours beside the fastest rival, ms")
    table.add_column("case", overflow="fold")
    table.add_column("")
    for name in ("ours", "rival"):
        table.add_column(name, justify="right")
    table.add_column("fastest rival")
    for name in ("ours is", "limit"):
        table.add_column(name, justify="right")
    group = None
    for _, precision, ours, rival in pairs(run.results):
        heading = None if ours.family in ("network", "gemm") else ours.group
        if heading != group and heading is not None:
            table.add_row(f"[bold]{heading}[/]")
        group = heading
        ratio = rival.taken / ours.taken
        table.add_row(
            Text(ours.case),
            precision,
            milliseconds(ours.taken),
            milliseconds(rival.taken),
            rival.rival,
            Text(times(ratio), style="green" if ratio >= 1 else "red"),
            "" if ours.share is None else milliseconds(ours.share * ours.taken),
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)


def milliseconds(value: float) -> str:
    """Four digits, or three decimals: columns are narrow."""
    return f"{value:.{max(0, 4 - len(str(int(value))))}f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def pairs(results: Sequence[Result]) -> list[tuple[str, str, Result, Result]]:
    """(case, precision, our fastest, the fastest rival) wherever both were timed."""
    grouped: dict[tuple[str, str, str, str], list[Result]] = {}
    for r in results:
        if r.median_ms is not None:
            grouped.setdefault((r.family, r.group, r.case, r.precision), []).append(r)
    found = []
    for entries in grouped.values():
        ours = [r for r in entries if r.ours]
        others = [r for r in entries if not r.ours]
        if ours and others:
            mine, theirs = (min(some, key=lambda r: r.taken) for some in (ours, others))
            found.append((mine.title, mine.precision, mine, theirs))
    return found


def machine_table(run: Run) -> Table:
    """The machine, its measured ceilings and the versions."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    facts = run.machine
    table.add_row("machine", f"{facts.get('cpu')}, {run.settings.get('threads')} threads, isa {facts.get('isa')}")
    if run.peaks is not None:
        table.add_row("peak", ", ".join(f"{k} {v / 1e9:.0f} GOP/s" for k, v in run.peaks.operations.items()))
        levels = (
            f"{level.name} {level.read / 1e9:.0f} (copy {level.copy / 1e9:.0f}) GB/s" for level in run.peaks.levels
        )
        table.add_row("bandwidth", ", ".join(levels))
    table.add_row("versions", ", ".join(f"{k} {v}" for k, v in run.versions.items()))
    return table


def print_run(run: Run, console: Console) -> None:
    """The closing tables; each case's own was printed when it was done."""
    console.print(machine_table(run))
    console.print()
    if pairs(run.results):
        console.print(summary(run))


def save(run: Run, path: pathlib.Path) -> None:
    """Write `run` as JSON."""
    write({"format": FORMAT, **dataclasses.asdict(run)}, path)


def write(data: dict[str, Any], path: pathlib.Path) -> None:
    """JSON as every file of ours has it; times that are no numbers are refused."""
    path.write_text(json.dumps(data, indent=1, allow_nan=False, default=str) + "\n")


def load(path: pathlib.Path) -> Run:
    """Read what `save` wrote.

    Raises:
        ValueError: not such a file, of another format, or with missing or unknown fields.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: not a benchmark of format {FORMAT}")
    try:
        found = data.pop("peaks")
        ceilings = None
        if found is not None:
            ceilings = Peaks(found["operations"], tuple(Level(**level) for level in found["levels"]))
        results = tuple(Result(**result) for result in data.pop("results"))
        return Run(results=results, peaks=ceilings, **data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a field is missing or unknown: {error}") from error
