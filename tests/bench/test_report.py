"""Tables, JSON and charts of a run."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pykernels.bench import chart, report
from pykernels.bench.harness import VERSIONED, Result, Run
from pykernels.bench.peaks import Level, Peaks
from pykernels.bench.rivals import everybody


def result(
    case: str, rival: str, precision: str, ms: float | None, ours: bool = False, reason: str | None = None
) -> Result:
    timed = {"median_ms": ms, "best_ms": ms * 0.9, "spread": 0.05, "rounds": 5, "gops": 8.0 / ms} if ms else {}
    more = {"share": 0.5, "limit": "compute", "error": 1e-6} if ms else {}
    return Result("conv", "net", case, rival, precision, ours, 8e6, 1e5, reason=reason, **timed, **more)


def a_run(cases: int = 1) -> Run:
    results = []
    for i in range(cases):
        results += [
            result(f"layer {i}", "pykernels", "int8", 1.0 + i, ours=True),
            result(f"layer {i}", "ONNX Runtime", "int8", 2.0 + i),
            result(f"layer {i}", "eager", "fp32", 6.0),
            result(f"layer {i}", "OpenVINO", "int8", None, reason="openvino does not import"),
        ]
    peaks = Peaks(
        {"fp32": 2e11, "bf16": 2e11, "int8": 4e11}, (Level("L2", 2**20, 2e11, 2e11), Level("DRAM", None, 3e10, 2e10))
    )
    machine = {"cpu": "a processor", "isa": "avx2"}
    return Run(tuple(results), peaks, machine, {"torch": "2"}, {"threads": 2}, "2026-01-01T00:00:00+00:00")


def text(renderable: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_a_case_lists_the_fastest_first_and_the_absent_with_their_reason():
    shown = text(report.case_table(a_run().results))
    assert shown.index("pykernels int8") < shown.index("ONNX Runtime int8") < shown.index("eager fp32")
    assert "2.00x" in shown
    assert "OpenVINO int8: openvino does not import" in shown


def test_no_line_of_a_report_is_longer_than_80_columns_and_no_name_is_cut_or_wrapped():
    """With the longest names there are and large figures, as they are printed where the width is 80."""
    labels = [(r.name, r.precision, r.ours) for r in everybody()]
    shapes = ("112x112x512 3x3/2 dw -> 512", "mobilenet_v3_large b16")
    results = [
        dataclasses.replace(
            result(case, name, precision, 1234.5678 * (1 + i), ours), family="network" if "net" in case else "conv",
            gops=12345.6, spread=0.5, error=1.234e-05, share=1.0, limit="memory", group="mobilenet_v2",
        )
        for case in shapes for i, (name, precision, ours) in enumerate(labels)
    ]  # fmt: skip
    run = dataclasses.replace(a_run(), results=tuple(results), versions={k: "2.13.0+cpu" for k in VERSIONED})
    console = Console(width=80, record=True, file=io.StringIO())
    for case in shapes:
        console.print(report.case_table([r for r in results if r.case == case]))
    report.print_run(run, console)
    lines = console.export_text().splitlines()
    assert max(len(line) for line in lines) <= 80
    assert not any("…" in line for line in lines)
    for name, precision, _ in labels:
        assert sum(line.startswith(f"{name} {precision} ") for line in lines) == len(shapes), name
    for case in shapes:
        assert sum(line.startswith(f"{case} ") and " eager " in line for line in lines) == 3, case  # its precisions


def test_the_summary_holds_ours_against_the_fastest_rival_of_the_same_precision():
    ((title, precision, ours, rival),) = report.pairs(a_run().results)
    assert (title, precision, ours.rival, rival.rival) == ("net layer 0", "int8", "pykernels", "ONNX Runtime")


def test_what_is_saved_is_what_is_loaded(tmp_path):
    run = a_run(2)
    report.save(run, tmp_path / "bench.json")
    loaded = report.load(tmp_path / "bench.json")
    assert loaded == run
    data = json.loads((tmp_path / "bench.json").read_text())
    assert {"format", "results", "peaks", "machine", "versions", "settings", "date"} == data.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "not JSON"),
        ("[]", "format"),
        ('{"format": 99}', "format"),
        ('{"format": 1, "peaks": null, "results": [{"family": "conv"}]}', "missing"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        report.load(path)


@pytest.mark.parametrize("cases", [1, 12])
def test_a_chart_is_drawn_for_few_cases_and_for_many(tmp_path, cases):
    pytest.importorskip("matplotlib")
    path = chart.draw(a_run(cases), tmp_path / "bench.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_there_is_no_chart_of_nothing(tmp_path):
    run = a_run()
    empty = Run(run.results[-1:], run.peaks, run.machine, run.versions, run.settings, run.date)
    with pytest.raises(ValueError, match="nothing was timed"):
        chart.draw(empty, tmp_path / "bench.png")


def test_the_command_explains_itself_and_refuses_by_name():
    from pykernels.cli.main import app

    shown = CliRunner().invoke(app, ["bench", "--help"])
    assert shown.exit_code == 0 and "oracle" in shown.output
    wrong = CliRunner().invoke(app, ["bench", "poetry"])
    assert wrong.exit_code != 0 and "poetry" in wrong.output
