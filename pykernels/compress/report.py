"""The account of a compression: what was tried, what it gave, what was turned down and why; printable, and a chart."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Report", "Row"]

_WIDTH, _HEIGHT = 56, 11  # characters of the chart


@dataclass
class Row:
    """One network that was made and measured.

    Attributes:
        name: the stages behind it.
        precision: of the network: of what ``auto`` was asked for, what it chose.
        seconds: of a call on the example: the sum of its steps, each the quickest of many rounds.
        latency: `seconds` as a part of the original's in fp32, timed in turn with it.
        quality: as `Report.measure` says.
        bytes: of the weights.
        spent: seconds that it took to make and judge.
        verdict: what became of it.
    """

    name: str
    precision: str
    seconds: float
    latency: float
    quality: float
    bytes: int
    spent: float = 0.0
    verdict: str = ""


@dataclass
class Report:
    """What was tried.

    Attributes:
        rows: the networks in the order in which they were made; the first is the original in fp32.
        measure: accuracy, agreement or likeness.
        latency, drop: what was asked for; None where nothing was.
        chosen: the place of the chosen row.
        refused: what could not be made, and why.
        notes: what a user should know, a sentence each.
    """

    rows: list[Row] = field(default_factory=list)
    measure: str = "accuracy"
    latency: float | None = None
    drop: float | None = None
    chosen: int = 0
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        table = [("", "network", "ms", "latency", self.measure, "drop", "MB", "spent", "")]
        for number, row in enumerate(self.rows, start=1):
            drop = self.rows[0].quality - row.quality
            table.append(
                (
                    str(number),
                    row.name,
                    f"{1e3 * row.seconds:.3f}",
                    f"{row.latency:.3f}",
                    f"{row.quality:.4f}",
                    f"{drop + 0.0:.4f}" if number > 1 else "",
                    f"{row.bytes / 1e6:.2f}",
                    f"{row.spent:.0f} s",
                    row.verdict,
                )
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for line in table:
            cells = [c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            lines.append("  ".join([*cells[:-1], line[-1]]).rstrip())
        lines += [f"turned down: {text}" for text in self.refused]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", *self._chart()])

    def draw(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Draw quality against latency to a file that matplotlib can write (.png, .svg); return its path.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from pykernels.bench import chart

        points = [(row.latency, row.quality, row.name, row.precision) for row in self.rows]
        return chart.draw_compression(
            points, self.chosen, self.measure, self._least(), self.latency, pathlib.Path(path)
        )

    def _least(self) -> float | None:
        return None if self.drop is None or not self.rows else self.rows[0].quality - self.drop

    def _chart(self) -> list[str]:
        """Quality (up) against latency (right), each network by its number in the table, the chosen in brackets."""
        if not self.rows:
            return []
        right = max(1.0, *(row.latency for row in self.rows))
        worst, best = _span([row.quality for row in self.rows])
        grid = [[" "] * (_WIDTH + 4) for _ in range(_HEIGHT)]
        least = self._least()
        if least is not None and worst <= least <= best:
            grid[_place(least, worst, best)] = list("." * _WIDTH + "    ")
        if self.latency is not None:
            for line in grid:
                line[round(self.latency / right * (_WIDTH - 1))] = ":"
        order = [place for place in range(len(self.rows)) if place != self.chosen]
        for place in [*order, self.chosen]:  # the last one drawn is seen
            row = self.rows[place]
            mark = f"[{place + 1}]" if place == self.chosen else str(place + 1)
            at = round(row.latency / right * (_WIDTH - 1))
            grid[_place(row.quality, worst, best)][at : at + len(mark)] = mark
        lines = []
        for place, line in enumerate(grid):
            value = best - place * (best - worst) / (_HEIGHT - 1)
            lines.append(f"{value:9.4f} |{''.join(line).rstrip()}")
        lines.append(f"{self.measure:>9} +{'-' * _WIDTH}")
        lines.append(f"{'':11}0{'latency, as a part of the original in fp32':^{_WIDTH - 5}}{right:.2f}")
        return lines


def _span(values: Sequence[float]) -> tuple[float, float]:
    worst, best = min(values), max(values)
    return (worst - 0.005, best + 0.005) if best - worst < 1e-9 else (worst, best)


def _place(value: float, worst: float, best: float) -> int:
    """The line of the chart; the first is the best."""
    return round((best - value) / (best - worst) * (_HEIGHT - 1))
