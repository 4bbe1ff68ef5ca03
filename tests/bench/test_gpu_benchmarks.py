"""benchmarks.gpu walked through on the CPU, at small sizes and without a clock: what it asks of our ops is right.

Rivals that only a GPU has say why they did not run, as they do there.
"""

from __future__ import annotations

import json
import pathlib
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import pytest
import torch

import pykernels as pk
from benchmarks.gpu import bench, bench_networks, check_codecs, timing, tune
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
    for module in (timing, tune):
        monkeypatch.setattr(module, "compare", once)


def timed(cases: Iterable[timing.Case]) -> list[dict[str, Any]]:
    """Rows: each has a time of ours, and can be a line of a report, and one that is printed."""
    rows = []
    for case in cases:
        row = case.measure(1)
        ours = [seconds for name, seconds in row["times"].items() if name.startswith("pykernels")]
        assert len(ours) == 1 and isinstance(ours[0], float)
        assert all(name in case.line(row) for name in row["times"]) and "\n" not in case.line(row)
        rows.append(row)
    assert rows
    json.dumps(rows)
    return rows


def test_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)  # takes half a minute
    rows = timed(bench.gemm(((1, 32, 64), (20, 48, 32)), "cpu"))
    assert all(isinstance(seconds, float) for name, seconds in rows[0]["times"].items() if "cuBLASLt" not in name)
    assert rows[0]["weights GB/s"] is not None and rows[1]["TOP/s"] is not None


def test_conv() -> None:
    rows = timed(bench.conv((1, 2), bench.layers("resnet50")[-2:], "cpu"))
    assert [row["batch"] for row in rows] == [1, 1, 2, 2] and rows[0]["layer"] == "2048x7x7, 512 of 1x1/1"


def test_memory() -> None:
    rows = timed(bench.memory(1, "cpu"))
    assert len(rows) == len({row["op"] for row in rows})
    assert all("copy" in row["times"] for row in rows)


def test_codecs() -> None:
    timed(check_codecs.cases(5000, "cpu"))


def test_every_case_is_compiled_by_a_task_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setitem(bench.CASES, "conv", lambda: bench.conv((1, 2), bench.layers("resnet50")[-2:], "cpu"))
    monkeypatch.setattr(timing.Case, "compile", lambda case: compiled.append(case.head))
    for number in range(4):
        bench.compile_case("conv", number)
    assert compiled == [case.head for case in bench.CASES["conv"]()]


def test_a_report_grows_row_by_row_and_says_what_did_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "bench.json"
    monkeypatch.setattr(bench, "save", lambda name, report: written.write_text(json.dumps(report)))
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    report = bench.Report({"device": "a device"})
    row = {"op": "qadd", "times": {"pykernels": 1e-5, "copy": 2e-5}}
    report.add("memory", row, "qadd: pykernels 10.0")
    assert json.loads(written.read_text())["memory"] == [row]
    report.end("memory", "RuntimeError: no more")
    held = json.loads(written.read_text())
    assert held["memory"] == [row] and held["did_not_run"] == {"memory": "RuntimeError: no more"}
    assert "memory: qadd: pykernels 10.0" in capsys.readouterr().out


def test_the_command_compiles_first_and_measures_every_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks: list[Any] = []
    monkeypatch.setattr("sys.argv", ["bench", "--only", "memory", "codecs"])
    monkeypatch.setattr(bench, "require_gpu", lambda command: None)
    monkeypatch.setattr(bench, "facts", lambda: {"device": "a device"})
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 4240.0)
    monkeypatch.setattr(bench, "warm", tasks.extend)
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "save", lambda name, report: timing.save(name, report, tmp_path))
    cases = {"memory": lambda: bench.memory(1, "cpu"), "codecs": lambda: check_codecs.cases(5000, "cpu")}
    monkeypatch.setattr(bench, "CASES", cases)
    bench.main()
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["copy_GB_s"] == 4240 and "did_not_run" not in report
    assert len(tasks) == len(report["memory"]) + len(report["codecs"]) > 20
    assert "written" in capsys.readouterr().out


class TestNetworks:
    """A process a network: here without a network."""

    def test_they_wait_for_each_other_and_are_timed_in_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And one that cannot be made is told of."""
        monkeypatch.setattr(bench_networks, "NETWORKS", {"first": (), "broken": (), "second": ()})
        monkeypatch.setattr(bench_networks, "measured", stand_in_network)
        networks = bench_networks.Networks(1, False)
        networks.start()
        networks.wait()
        assert networks._seen == {"first": "ready", "broken": "ended", "second": "ready"}
        rows = [row for row, _ in networks.measure()]
        assert sorted(row["network"] for row in rows) == ["first", "first", "second", "second"]
        first, second = sorted((row["begin"], row["end"]) for row in rows if row["batch"] == "all")
        assert first[1] <= second[0], "one after another"
        assert networks.errors == ["broken: RuntimeError: it cannot be lowered"]

    def test_rows_of_a_small_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "compile", lambda network, **_: network)
        monkeypatch.setattr(bench_networks.families, "network_case", lambda name, batch: small_network())
        monkeypatch.setattr(bench_networks, "lowered", lambda name, case: pk.optimize(case.model, case.inputs[0]))
        rows = timed(bench_networks.cases("small", (1, 3), True, "cpu"))
        assert [row["batch"] for row in rows] == [1, 3]
        assert not any("TensorRT" in name for name in rows[0]["times"])
        assert [name for name in rows[0]["times"] if "max-autotune" in name] == [
            "torch.compile fp16 max-autotune", "torch.compile bf16 max-autotune",
        ]  # fmt: skip

    def test_tensorrt_loses_its_row_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where torch_tensorrt is installed: made in its turn, and left out where it cannot be made."""

        def broken(*_: Any) -> None:
            raise RuntimeError("no engine")

        made = lambda network, **how: broken if how.get("backend") == "tensorrt" else network  # noqa: E731
        monkeypatch.setattr(torch, "compile", made)
        monkeypatch.setattr(bench_networks.importlib.util, "find_spec", lambda name: name == "torch_tensorrt")
        monkeypatch.setattr(bench_networks.families, "network_case", lambda name, batch: small_network())
        monkeypatch.setattr(bench_networks, "lowered", lambda name, case: pk.optimize(case.model, case.inputs[0]))
        (row,) = timed(bench_networks.cases("small", (1,), True, "cpu"))
        wrong = {name: found for name, found in row["times"].items() if isinstance(found, str)}
        assert wrong == dict.fromkeys(("TensorRT fp16", "TensorRT bf16"), "RuntimeError: no engine")


def small_network() -> Any:
    class Case:
        model = torch.nn.Conv2d(3, 8, 3).eval()
        inputs = (torch.randn(2, 3, 8, 8),)

    return Case()


def stand_in_network(
    name: str, rounds: int, autotune: bool, go: Any, turn: Any, number: int, of: int
) -> Iterator[tuple[str, Any]]:
    yield "begun", None
    if name == "broken":
        raise RuntimeError("it cannot be lowered")
    yield "ready", None
    assert go.wait(60)
    with turn:
        begin = time.monotonic()
        yield "row", ({"network": name, "batch": 1}, "")
        time.sleep(0.05)
        yield "row", ({"network": name, "batch": "all", "begin": begin, "end": time.monotonic()}, "")


class TestTune:
    ON = tune.Machine((9, 0), 132, "cpu")
    STATE: ClassVar = {"device": "a device", "torch": "2", "triton": "3", "kernels": "0"}

    @pytest.fixture(autouse=True)
    def files(self, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
        """Tables lie in a folder of the test; few layers are measured."""
        text = (tables.FOLDER / "sm90.json").read_text()
        (tmp_path / "sm90.json").write_text(text)
        monkeypatch.setattr(tables, "FOLDER", tmp_path)
        shapes = [(s, size, row) for s, size, row in tune.conv_shapes([1]) if s.h == 7]
        assert len(shapes) == 1 and shapes[0][1] == (49, 512, 9 * 512)
        monkeypatch.setattr(tune, "conv_shapes", lambda batches: iter(shapes))
        few = {"conv": tune.conv_layers, "gemm": lambda on: tune.gemm_layers(on, [(32, 64)], [1, 40])}
        monkeypatch.setattr(tune, "LAYERS", few)

    @staticmethod
    def tuner(seconds: float = 60.0, **state: str) -> tune.Tuner:
        times = tune.Times(tables.FOLDER / "times.json", {**TestTune.STATE, **state})
        return tune.Tuner("sm90", TestTune.ON, times, 1, seconds)

    @staticmethod
    def table() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tables.FOLDER / "sm90.json").read_text())
        return found

    def test_tiles_of_a_shape_begin_with_the_formula_s_and_waste_little(self) -> None:
        candidates = self.table()["triton"]["candidates"]
        formula = tune.gemm.by_formula(90, 132, 100, 64, 8192)
        found = tune.tiles(formula, candidates, 132, 100, 64, 8192)
        assert found[0] == (formula.bm, formula.bn, formula.bk, formula.warps, formula.stages, formula.resident, 8)
        assert len(found) == len(set(found)) > 2
        assert all(64 <= bm <= 128 and bn <= 64 for bm, bn, *_ in found)
        assert {tile[:6] for tile in found} <= {tuple(c) for c in candidates} | {found[0][:6]}

    def test_a_shape_s_winners_become_rows_of_the_table(self) -> None:
        before, tuner = self.table(), self.tuner()
        shapes = [shape for shape in tuner.every if shape.kind == "gemm"]
        assert tuner.measure(shapes) == 0
        assert list(tuner.times.found) == ["gemm 1x32x64", "gemm 40x32x64"]
        formula = [tune.gemm.by_formula(90, 132, m, 32, 64) for m in (1, 40)]  # the first, so the fastest
        table = self.table()
        rows = table["triton"]["gemm"]["32x64"]
        assert [tune.gemm.measured(tuple(tile)) for _, tile in rows] == formula
        assert [m for m, _ in rows] == [1, None]
        assert table["int8_gemm"] == before["int8_gemm"]  # there is no library here
        assert table["note"].startswith("measured") and "conv and few_channels as before" in table["note"]

    def test_what_was_not_measured_stays(self) -> None:
        before, tuner = self.table(), self.tuner()
        tuner.measure([shape for shape in tuner.every if shape.kind == "conv"])
        table = self.table()
        assert [m for m, _ in table["triton"]["conv"]["512x4608"]] == [None]
        del table["triton"]["conv"]["512x4608"], before["triton"]["conv"]["512x4608"]
        assert table["triton"] == before["triton"]
        assert (
            "gemm and few_channels as before; 2 shapes are still to be measured" in table["note"]
            and table["device"] == "a device"
        )

    def test_a_table_is_written_after_each_shape_and_the_next_run_goes_on(self) -> None:
        first = self.tuner()
        first.measure(first.every[:1])
        assert (tables.FOLDER / "times.json").exists() and self.table()["device"] == "a device"
        second = self.tuner()
        assert [shape.title for shape in second.times.left(second.every)] == [s.title for s in second.every[1:]]
        second.measure(second.times.left(second.every))
        assert self.tuner().times.left(second.every) == [] and "still" not in self.table()["note"]
        assert len(self.table()["triton"]["gemm"]["32x64"]) == 2 and self.table()["triton"]["conv"]["512x4608"]

    def test_other_versions_or_kernels_are_measured_again_and_their_times_serve_until_then(self) -> None:
        first = self.tuner()
        first.measure(first.every)
        again = self.tuner(kernels="1")
        assert again.times.left(again.every) == again.every and set(again.times.found) == set(first.times.found)
        again.measure(again.every[:1])
        resumed = self.tuner(kernels="1")
        assert [s.title for s in resumed.times.left(resumed.every)] == [s.title for s in resumed.every[1:]]
        assert self.table()["triton"]["gemm"]["32x64"] and "2 shapes are still" in self.table()["note"]

    def test_the_command_goes_on_and_says_what_is_left(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        properties = types.SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(tune, "require_gpu", lambda command: None)
        monkeypatch.setattr(tune, "facts", lambda: self.STATE)
        monkeypatch.setattr(tune, "FOLDER", tables.FOLDER)
        monkeypatch.setattr(tune, "warm", lambda tasks: None)
        monkeypatch.setattr(tune, "Machine", lambda capability, processors: self.ON)
        for arguments, words in (
            (["--only", "gemm", "--seconds", "-1"], "no time was left for 2 shapes"),
            (["--only", "gemm"], "3 shapes, 2 to be measured"),
            ([], "3 shapes, 1 to be measured"),
            (["--again", "--dry-run"], "3 shapes, 3 to be measured"),
        ):
            monkeypatch.setattr("sys.argv", ["tune", *arguments])
            tune.main()
            assert words in capsys.readouterr().out
        assert set(json.loads((tables.FOLDER / "tune-a-device.json").read_text())["microseconds"]) == {
            "gemm 1x32x64", "gemm 40x32x64", "conv 1x512x7x7, 512 of 3x3/1",
        }  # fmt: skip

    def test_the_kernel_of_a_short_k_is_measured_beside_the_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = (128 * 56 * 56, 256, 64)
        calls = tune.short_calls("gemm", self.ON, sizes, lambda: tables.short_k(*sizes, False, 90))
        assert [call() for call in calls.values()] == [True] and list(calls) == [tables.SHORT_K]
        assert not tune.short_calls("conv", self.ON, sizes, len) and not tune.short_calls(
            "gemm", self.ON, (1, 256, 64), len
        )
        times = tune.Times(tables.FOLDER / "times.json", self.STATE)
        shape = next(shape for shape in self.tuner().every if shape.kind == "gemm")
        times.add(shape.title, {"sm90 64x64": 3e-6, "[64, 64, 64, 4, 4, 3, 1]": 2e-6, tables.SHORT_K: 1e-6})
        table = tune.table_of(self.table(), [shape], times)
        assert table["int8_gemm"][shape.width] == [[None, tables.SHORT_K]]
        assert table["triton"]["gemm"][shape.width] == [[None, [64, 64, 64, 4, 4, 3, 1]]]

    def test_kernels_of_few_channels_are_measured_beside_triton_s_one(self) -> None:
        shapes = [shape for shape in tune.few_layers(self.ON) if shape.sizes[0] == 112 * 112]
        assert [(shape.title, shape.width) for shape in shapes] == [
            ("conv 1x3x224x224, 64 of 7x7/2", "64x147"), ("conv 1x3x224x224, 32 of 3x3/2", "32x27"),
        ]  # fmt: skip
        assert list(self.tuner().triton(shapes[0], len)) == [tables.TRITON]
        times = tune.Times(tables.FOLDER / "times.json", self.STATE)
        times.add(shapes[0].title, {"sm80 7x7 by 32": 3e-6, "sm80 7x7 by 16": 2e-6, tables.TRITON: 4e-6})
        times.add(shapes[1].title, {"sm80 3x3 by 32": 3e-6, "sm80 3x3 by 16": 4e-6, tables.TRITON: 2e-6})
        assert tune.table_of(self.table(), shapes, times)["int8_few_channels"] == {
            "64x147": [[None, "sm80 7x7 by 16"]], "32x27": [[None, tables.TRITON]],
        }  # fmt: skip

    def test_every_tile_that_is_measured_is_compiled_before(self) -> None:
        tuner = self.tuner()
        tasks = tuner.tasks(tuner.every)
        assert len(tasks) == sum(len(tuner.tiles(shape)) for shape in tuner.every)
        tasks[0]()  # finds its shape by its title

    def test_every_layer_of_the_implicit_gemm_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        found = [s for s, *_ in tune.conv_shapes([32])]
        assert len(found) == len(set(found)) == 10 and all(s.groups == 1 and s.c >= 16 for s in found)

    def test_nothing_is_measured_when_time_is_over(self) -> None:
        tuner, before = self.tuner(-1.0), self.table()
        assert tuner.measure(tuner.every) == 3
        assert not tuner.times.found and self.table() == before

    def test_the_table_of_9_0_is_what_the_times_of_the_h200_make(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        times = tune.Times(timing.FOLDER / "tune-h200.json", {})
        shapes = [shape for layers in tune.LAYERS.values() for shape in layers(self.ON)]
        assert {shape.kind for shape in times.left(shapes)} == {"few_channels"}  # whose kernels came later
        assert len(shapes) == len(times.found) + len(times.left(shapes))
        before = {**self.table(), "int8_gemm": {}, "int8_conv": {}}
        before["triton"] = {**before["triton"], "gemm": {}, "conv": {}}
        assert tune.table_of(before, shapes, times) == self.table()

    @pytest.mark.parametrize("name", ["sm80", "sm89", "sm90"])
    def test_tables_are_in_the_form_that_the_tuner_writes(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        text = (tables.FOLDER / f"{name}.json").read_text()
        assert tune.as_text(json.loads(text)) + "\n" == text

    def test_times_lie_in_a_file_of_the_device(self) -> None:
        assert tune.times_path("NVIDIA H200").name == "tune-h200.json"
        assert tune.times_path("NVIDIA H100 80GB HBM3").name == "tune-h100-80gb-hbm3.json"

    def test_rows_of_a_table_join_what_agrees(self) -> None:
        assert tune.ladder({64: "b", 1: "a", 16: "a"}) == [(16, "a"), (None, "b")]
        few = {1: "a swapped", 64: "b", 128: "c swapped"}
        assert tune.names_ladder(few) == [(1, "a swapped"), (64, "b"), (128, "c swapped"), (None, "b")]
        assert tune.names_ladder({1: "a swapped"}) == [(1, "a swapped"), (None, "triton")]
