"""What surgery did to a model: each fused group, what stayed with torch and why, and the size of the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from pykernels.cuda import registry
from pykernels.network.step import Network

__all__ = ["Chosen", "Fused", "Left", "Report", "bytes_of"]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """The size of some tensors, one that comes twice counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


@dataclass(frozen=True)
class Fused:
    """One call of ours: its op, what it stands for (``conv2d + relu + quantize``) and where that was in the model;
    on a CUDA device also what computes it there (``Triton``, ``cuDNN through ATen``)."""

    op: str
    what: str
    where: str
    by: str = ""


@dataclass(frozen=True)
class Left:
    """One call that stayed with torch, where it was in the model, and the reason."""

    op: str
    where: str
    reason: str


@dataclass(frozen=True)
class Chosen:
    """The precision of one step, where each had its own.

    Attributes:
        name: of the step, in the exported graph.
        what: what the step stands for.
        where: where that was in the model.
        precision: ``fp32`` or ``int8``.
        error: the relative squared error of the network's answer that int8 here is expected to make.
        fp32, int8: measured seconds of the step, conversions apart. Where precisions were given none of these is known.
    """

    name: str
    what: str
    where: str
    precision: str
    error: float | None = None
    fp32: float | None = None
    int8: float | None = None


@dataclass
class Report:
    """The account of one optimized model. ``str(report)`` is a table for people, `to_json` one for machines.

    Attributes:
        precision: ``fp32``, ``bf16``, ``fp16``, ``int8``, or ``mixed``: some steps in int8, some in fp32.
        fused: every call of ours in the order of execution.
        left: every call that computes and stayed with torch.
        moves: how many calls only move or rename elements (reshape, chunk ...).
        conversions: how many dequantize or quantize passes stand alone, at the edges or around what stayed with torch.
        bytes_before: bytes of the parameters and buffers the original graph reads.
        bytes_after: bytes of the constants of the optimized graph, packed weights with their padding included.
        notes: remarks, such as why the batch size is fixed.
        device: where the weights are.
        chosen: where precisions were chosen by step, those of each step that can run in int8, and what was weighed.
    """

    precision: str = "fp32"
    fused: list[Fused] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    moves: int = 0
    conversions: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    notes: list[str] = field(default_factory=list)
    device: str = "cpu"
    chosen: list[Chosen] = field(default_factory=list)

    @classmethod
    def of(cls, network: Network) -> Report:
        """The account of a network; its bytes are the caller's to count."""
        report = cls(precision=network.precision)
        for step in network.steps:
            if step.kind in ("quantize", "dequantize"):
                report.conversions += 1
            elif step.op is not None:
                report.fused.append(Fused(step.op, step.what, step.where))
            elif step.kind == "move":
                report.moves += step.what != "getitem"
            elif step.kind == "torch" and step.what != "getitem":
                report.left.append(Left(step.what, step.where, step.reason))
        return report.on(network.device)

    def on(self, device: torch.device) -> Report:
        """The account of the same network on `device`."""
        by = registry.runs if device.type == "cuda" else lambda _: ""
        return replace(self, device=str(device), fused=[replace(entry, by=by(entry.op)) for entry in self.fused])

    @property
    def choice(self) -> str | dict[str, str]:
        """What ``pykernels.optimize(precision=...)`` makes this network of again: a name, or each step's precision."""
        return {c.name: c.precision for c in self.chosen} if self.precision == "mixed" else self.precision

    def to_json(self) -> str:
        """The report as JSON, which `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote. Raises ValueError when it is not a report."""
        try:
            values = json.loads(text)
            fused = [Fused(**entry) for entry in values.pop("fused")]
            left = [Left(**entry) for entry in values.pop("left")]
            chosen = [Chosen(**entry) for entry in values.pop("chosen", [])]
            report = cls(fused=fused, left=left, chosen=chosen, **values)
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a report of pykernels: {error}") from error
        texts = [report.precision, report.device, *(text for e in (*fused, *left) for text in asdict(e).values())]
        texts += [text for entry in chosen for text in (entry.name, entry.what, entry.where, entry.precision)]
        counts = [report.moves, report.conversions, report.bytes_before, report.bytes_after]
        if not isinstance(report.notes, list) or not all(isinstance(text, str) for text in (*texts, *report.notes)):
            raise ValueError("not a report of pykernels: something in it is no text")
        numbers = [n for entry in chosen for n in (entry.error, entry.fp32, entry.int8) if n is not None]
        if not all(type(count) is int for count in counts) or not all(type(n) in (int, float) for n in numbers):
            raise ValueError("not a report of pykernels: something in it is no number")
        return report

    def __str__(self) -> str:
        lines = [
            f"pykernels {self.precision}{'' if self.device == 'cpu' else f' on {self.device}'}: "
            f"{len(self.fused)} fused calls, {len(self.left)} left to torch, "
            f"weights {_size(self.bytes_before)} -> {_size(self.bytes_after)}"
        ]
        lines += [f"note: {note}" for note in self.notes]
        if self.fused:
            head, rows = ("op", "stands for", "in the model"), [(f.op, f.what, f.where) for f in self.fused]
            if any(f.by for f in self.fused):
                head, rows = ("op", "by", *head[1:]), [(f.op, f.by, f.what, f.where) for f in self.fused]
            lines += ["", *_table(head, _runs(rows))]
        if self.left:
            lines += ["", "left to torch"]
            lines += _table(("op", "in the model", "why"), _runs((e.op, e.where, e.reason) for e in self.left))
        if self.chosen:
            lines += ["", "precisions: microseconds in either, and the squared error that int8 is expected to make"]
            rows = [
                (
                    c.precision,
                    _micro(c.fp32),
                    _micro(c.int8),
                    "" if c.error is None else f"{c.error:.1e}",
                    c.what,
                    c.where,
                )
                for c in self.chosen
            ]
            lines += _table(("runs in", "fp32", "int8", "error", "stands for", "in the model"), list(map(list, rows)))
        lines += ["", f"{self.moves} calls only move elements; {self.conversions} conversions between int8 and float"]
        return "\n".join(lines)


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f}"


def _runs(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Rows as lists; equal neighbours are told once with their number."""
    merged: list[tuple[list[str], int]] = []
    for row in rows:
        if merged and merged[-1][0] == list(row):
            merged[-1] = (merged[-1][0], merged[-1][1] + 1)
        else:
            merged.append((list(row), 1))
    return [[row[0] if count == 1 else f"{row[0]} x{count}", *row[1:]] for row, count in merged]


def _table(head: Sequence[str], rows: list[list[str]], widest: int = 60) -> list[str]:
    cells = [list(head), *([_clip(cell, widest) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
