"""The report of gpu-check, from parts that stand in for those that a GPU has."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from benchmarks.gpu.side_by_side import Findings, Skipped, share_of


def counting(number: int, of: int) -> Findings:
    for i in share_of(range(5), number, of):
        yield f"thing {i}", "it is [three]" if i == 3 else None


def raising(number: int, of: int) -> Findings:
    yield "before", None
    raise RuntimeError("the device is lost")


def skipping(number: int, of: int) -> Iterator[tuple[str, str | None]]:
    raise Skipped("it is not installed")
    yield "", None


def test_parts_are_reported_and_printed_as_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import check  # not above: the processes, which import this file, need not wait for it

    parts = {"count": (counting, 1), "raise": (raising, 1), "skip": (skipping, 1), "other": (counting, 1)}
    monkeypatch.setattr(check, "PARTS", parts)
    console = Console(file=io.StringIO(), width=160)
    report = check.check_parts(["count", "raise", "skip"], 2, 1, console)
    assert list(report) == ["count", "raise", "skip"]
    assert all(part.pop("seconds") > 0 for part in report.values())
    assert report == {
        "count": {"looked_at": 5, "wrong": {"thing 3": "it is [three]"}},
        "raise": {"looked_at": 2, "wrong": {"share 1 of 1": "RuntimeError: the device is lost"}},
        "skip": {"looked_at": 0, "wrong": {}, "skipped": "it is not installed"},
    }
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "count: thing 3: it is [three]" in printed and "count: 5 looked at, 1 wrong" in printed
    assert printed.index("thing 3") < printed.index("count: 5 looked at")


def test_samples_are_divided_among_shares() -> None:
    """Every sample that a device knows is looked at by one of them."""
    from benchmarks.gpu import check

    names = [s.name for s in check.samples() if s.op not in check.CPU_ONLY]
    shares = [share_of(names, i, check.PARTS["ops"][1]) for i in range(check.PARTS["ops"][1])]
    assert sorted(name for share in shares for name in share) == sorted(names)
