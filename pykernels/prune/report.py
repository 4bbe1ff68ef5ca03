"""The account of a pruning, printable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Report", "Row"]


@dataclass
class Row:
    """A layer that lost channels: what it reads and makes, before and after."""

    layer: str
    reads: tuple[int, int]
    makes: tuple[int, int]


@dataclass
class Report:
    """What was removed, and what it is worth.

    Attributes:
        rows: the layers that lost channels, in the model's order.
        blocks: the blocks that were dropped.
        left: layers whose channels all stay, and why.
        fitted: layers whose weights make up for channels that they do not read any more.
        importance: what the channels were weighed by, in words.
        precision: what latencies were measured in; None where none were.
        budget: the latency that was asked for, of the original's.
        predicted: what the search expected of the latency, of the original's.
        before, after: seconds of a call on the example, on our kernels: the sum of its steps, each the quickest of many
            rounds.
        operations: multiplications and additions of one call, before and after.
        weights: numbers of parameters, before and after.
        notes: what a user should know, a sentence each.
    """

    rows: list[Row] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    left: Mapping[str, str] = field(default_factory=dict)
    fitted: list[str] = field(default_factory=list)
    importance: str = ""
    precision: str | None = None
    budget: float | None = None
    predicted: float | None = None
    before: float | None = None
    after: float | None = None
    operations: tuple[float, float] = (0.0, 0.0)
    weights: tuple[int, int] = (0, 0)
    notes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> float | None:
        """The latency that was measured, of the original's."""
        return None if self.before is None or self.after is None else self.after / self.before

    def __str__(self) -> str:
        table = [("layer", "reads", "makes")]
        table += [(row.layer, _change(row.reads), _change(row.makes)) for row in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines += [f"dropped: {block}" for block in self.blocks]
        lines += [f"left as it is: {name}: {why}" for name, why in self.left.items()]
        lines += [f"note: {note}" for note in self.notes]
        if self.importance:
            lines.append(f"channels were weighed by {self.importance}")
        if self.fitted:
            lines.append(f"weights were fitted to what was removed in {len(self.fitted)} layers")
        lines.append(
            f"operations {self.operations[0] / 1e6:.1f} -> {self.operations[1] / 1e6:.1f} million "
            f"({_percent(self.operations)}), weights {self.weights[0]} -> {self.weights[1]} ({_percent(self.weights)})"
        )
        if self.before is not None and self.after is not None:
            lines.append(
                f"{self.precision}: {1e3 * self.before:.3f} -> {1e3 * self.after:.3f} ms, "
                f"{100 * (self.measured or 0):.1f} % (budget {100 * (self.budget or 0):.1f}, "
                f"predicted {100 * (self.predicted or 0):.1f})"
            )
        return "\n".join(lines)


def _change(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} -> {pair[1]}"


def _percent(pair: tuple[float, float]) -> str:
    return f"{100 * pair[1] / max(pair[0], 1):.1f} %"
