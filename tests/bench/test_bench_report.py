"""The page of one machine, from a tiny network with hardly any timing."""

from __future__ import annotations

import json

import pytest

from benchmarks import report
from pykernels.bench import families
from pykernels.bench.peaks import Level, Peaks


@pytest.fixture
def quick(monkeypatch):
    """Peaks that cost nothing to measure, and one layer."""
    peaks = Peaks({"fp32": 1e11, "bf16": 1e11, "int8": 2e11}, (Level("DRAM", None, 1e10, 1e10),))
    monkeypatch.setattr("pykernels.bench.harness.peaks.measure", lambda: peaks)
    monkeypatch.setattr(report, "cases", lambda family, groups: [next(families.cases(family, groups))])


def test_a_page_with_its_charts_and_figures_is_written(quick, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    network, rest = "mobilenet_v3_small", "--batches 2 --threads 1 -p fp32 -r eager --size 32 --rounds 1 --seconds 0"
    chosen = ["-n", network, "--scaled", network, "--layers", "resnet18", *rest.split(), "-o", str(tmp_path)]
    path = report.main(chosen)
    text = path.read_text()
    assert f"| {network} b1 | fp32 |" in text and f"| {network} b2 | fp32 |" in text and "| eager |" in text
    assert "rival ÷ ours" in text and "limit ms" in text
    for part in report.PARTS:
        chart = path.with_name(f"{path.stem}-{part}.svg")
        assert f"](./{chart.name})" in text and "<svg" in chart.read_text()
    data = json.loads(path.with_suffix(".json").read_text())
    assert {part: len(runs) for part, runs in data["parts"].items()} == dict.fromkeys(report.PARTS, 1)
    printed = capsys.readouterr().out
    assert "limit" in printed and f"{network} b1" in printed


def test_threads_are_powers_of_two_and_all_cores():
    assert [report.thread_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
