"""benchmarks.gpu walked through on the CPU, at small sizes and without a clock: what it asks of our ops is right.

Rivals that only a GPU has say why they did not run, as they do there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu import bench, check_codecs, tune
from pykernels.cuda import tables


def once(calls: dict[str, Callable[[], Any]], rounds: int = 0, repeat: int = 0) -> dict[str, float | str]:
    """In the place of `timing.compare`: each rival is called, the later ones are slower."""
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = 1e-3 * (1 + len(found))
        except (AssertionError, RuntimeError) as error:
            assert "pykernels" not in name, error
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench, tune):
        monkeypatch.setattr(module, "compare", once)

    def best(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
        for call in calls:
            call()
        return [1e-3] * len(calls)

    monkeypatch.setattr(check_codecs, "best", best)


def timed(rows: list[dict[str, Any]]) -> None:
    """Every row has a time of ours, and can be a line of a report."""
    assert rows
    for row in rows:
        ours = [seconds for name, seconds in row["times"].items() if name.startswith("pykernels")]
        assert len(ours) == 1 and isinstance(ours[0], float)
    json.dumps(rows)


def test_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)  # takes half a minute
    rows = bench.gemm(1, ((1, 32, 64), (20, 48, 32)), "cpu")
    timed(rows)
    assert all(isinstance(seconds, float) for name, seconds in rows[0]["times"].items() if "cuBLASLt" not in name)


def test_conv() -> None:
    rows = bench.conv(1, (1, 2), bench.layers("resnet50")[-2:], "cpu")
    timed(rows)
    assert [row["batch"] for row in rows] == [1, 1, 2, 2] and rows[0]["layer"] == "2048x7x7, 512 of 1x1/1"


def test_memory() -> None:
    rows = bench.memory(1, 1, "cpu")
    timed(rows)
    assert len(rows) == len({row["op"] for row in rows})
    assert all("copy" in row["times"] for row in rows)


def test_codecs() -> None:
    timed(check_codecs.measure(5000, 1, "cpu"))


class TestTune:
    @pytest.fixture
    def tuner(self) -> tune.Tuner:
        return tune.Tuner("sm90", (9, 0), 132, 60.0, 1, "cpu")

    def test_tiles_of_a_shape_begin_with_the_formula_s_and_waste_little(self) -> None:
        candidates = tables.table("sm90")["triton"]["candidates"]
        formula = tune.gemm.by_formula(90, 132, 100, 64, 8192)
        found = tune.tiles(formula, candidates, 132, 100, 64, 8192)
        assert found[0] == (formula.bm, formula.bn, formula.bk, formula.warps, formula.stages, formula.resident, 8)
        assert len(found) == len(set(found)) > 2
        assert all(64 <= bm <= 128 and bn <= 64 for bm, bn, *_ in found)
        assert {tile[:6] for tile in found} <= {tuple(c) for c in candidates} | {found[0][:6]}

    def test_gemm(self, tuner: tune.Tuner) -> None:
        before = tuner.table["int8_gemm"]
        tuner.gemm([(32, 64)], [1, 40])
        assert list(tuner.times) == ["gemm 1x32x64", "gemm 40x32x64"]
        formula = [tune.gemm.by_formula(90, 132, m, 32, 64) for m in (1, 40)]  # the first, so the fastest
        rows = tuner.table["triton"]["gemm"]["32x64"]
        assert [tune.gemm.measured(tile) for _, tile in rows] == formula
        assert [m for m, _ in rows] == [1, None]
        assert tuner.table["int8_gemm"] == before  # there is no library here

    def test_conv(self, tuner: tune.Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes = [(s, size, row) for s, size, row in tune.conv_shapes([1]) if s.h == 7]
        assert len(shapes) == 1 and shapes[0][1] == (49, 512, 9 * 512)
        monkeypatch.setattr(tune, "conv_shapes", lambda batches: iter(shapes))
        others = {name: rows for name, rows in tuner.table["triton"]["conv"].items() if name != "512x4608"}
        tuner.conv([1])
        assert [m for m, _ in tuner.table["triton"]["conv"]["512x4608"]] == [None]
        assert {name: rows for name, rows in tuner.table["triton"]["conv"].items() if name != "512x4608"} == others
        text = json.loads(tuner.finish({"device": "a device", "torch": "2"}))
        assert text["note"].startswith("measured") and text["note"].endswith("gemm as before")
        assert text["device"] == "a device" and list(text["microseconds"]) == ["conv 1x512x7x7, 512 of 3x3/1"]

    def test_every_layer_of_the_implicit_gemm_is_there(self) -> None:
        found = [s for s, *_ in tune.conv_shapes([32])]
        assert len(found) == len(set(found)) == 10 and all(s.groups == 1 and s.c >= 16 for s in found)

    def test_nothing_is_measured_when_time_is_over(self) -> None:
        tuner = tune.Tuner("sm90", (9, 0), 132, -1.0, 1, "cpu")
        before = json.dumps(tuner.table)
        tuner.gemm([(32, 64)], [1])
        assert not tuner.times and json.dumps(tuner.table) == before
        assert "no time was left for 1 shapes" in json.loads(tuner.finish({"device": "d", "torch": "2"}))["note"]

    def test_rows_of_a_table_join_what_agrees(self) -> None:
        assert tune.ladder({64: "b", 1: "a", 16: "a"}) == [(16, "a"), (None, "b")]
        few = {1: "a swapped", 64: "b", 128: "c swapped"}
        assert tune.names_ladder(few) == [(1, "a swapped"), (64, "b"), (128, "c swapped"), (None, "b")]
        assert tune.names_ladder({1: "a swapped"}) == [(1, "a swapped"), (None, "triton")]
