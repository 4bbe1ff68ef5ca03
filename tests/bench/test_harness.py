"""The harness: who is measured, who is only listed, and that a wrong answer has no time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pykernels.bench import harness
from pykernels.bench.case import Case, QDQLayer, QuantizedLayer
from pykernels.bench.peaks import Level, Peaks, cache_sizes, measure
from pykernels.bench.rivals import Absent, Rival, everybody

PEAKS = Peaks({"fp32": 1e9, "bf16": 1e9, "int8": 4e9}, (Level("L2", 1000, 100e9, 90e9), Level("DRAM", None, 1e9, 1e9)))


class Fake(Rival):
    families = frozenset({"linear"})

    def __init__(self, name: str, answer: Callable[[Case], torch.Tensor], precision: str = "fp32") -> None:
        super().__init__(precision)
        self.name = name
        self.answer = answer

    def prepare(self, case: Case) -> Callable[[], torch.Tensor]:
        y = self.answer(case)
        return lambda: y


def absent(case: Case) -> torch.Tensor:
    raise Absent("not installed here")


def broken(case: Case) -> torch.Tensor:
    raise RuntimeError("it fell over\nwith details")


@pytest.fixture
def case() -> Case:
    model = nn.Linear(8, 4).eval()
    return Case(
        "linear", "test", "2x8x4", 128.0, {"fp32": 64.0, "bf16": 32.0, "int8": 16.0}, model, (torch.randn(2, 8),)
    )


def quick(case: Case, *entrants: Rival) -> dict[str, harness.Result]:
    results = harness.measure_case(case, entrants, PEAKS, rounds=3, seconds=0.0, pause=0.0)
    return {r.rival: r for r in results}


def test_a_right_answer_is_timed_with_its_share_of_the_limit(case):
    found = quick(case, Fake("right", lambda c: c.oracle.clone()))["right"]
    assert found.reason is None and found.error == 0.0 and found.rounds == 3
    assert found.median_ms is not None and found.best_ms is not None and found.best_ms <= found.median_ms
    assert found.gops == pytest.approx(128.0 / (found.median_ms * 1e-3) / 1e9)
    assert found.limit == "compute"  # 128 operations at 1e9 a second take longer than 64 bytes from the cache
    assert found.share == pytest.approx(128e-9 / (found.median_ms * 1e-3))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("off by a little", lambda c: c.oracle * 1.01),
        ("another shape", lambda c: c.oracle[:1]),
        ("not a number", lambda c: c.oracle * float("nan")),
    ],
)
def test_a_wrong_answer_has_no_time(case, name, answer):
    found = quick(case, Fake(name, answer))[name]
    assert found.median_ms is None and found.gops is None
    assert found.error is None or math.isfinite(found.error)  # JSON has no other numbers
    assert found.reason is not None and found.reason.startswith("wrong answer")


def test_an_answer_left_in_freed_memory_is_not_taken_for_the_rivals_own():
    class WritesNothing(Fake):
        def prepare(self, case: Case) -> Callable[[], torch.Tensor]:
            left = [case.oracle.clone() for _ in range(4)]
            del left
            return lambda: torch.empty_like(case.oracle)

    large = Case("linear", "test", "", 1.0, {"fp32": 1.0}, nn.Identity(), (torch.randn(64, 64),), precisions=("fp32",))
    found = quick(large, WritesNothing("writes nothing", lambda c: c.oracle))["writes nothing"]
    assert found.reason is not None and found.reason.startswith("wrong answer")


def test_each_precision_has_its_own_tolerance(case):
    close = Fake("close", lambda c: c.oracle * 1.01)
    close_bf16 = Fake("close bf16", lambda c: c.oracle * 1.01, precision="bf16")
    found = quick(case, close, close_bf16)
    assert found["close"].median_ms is None
    assert found["close bf16"].median_ms is not None


def test_who_cannot_take_part_is_listed_with_the_reason_and_the_others_are_measured(case):
    found = quick(case, Fake("gone", absent), Fake("broken", broken), Fake("right", lambda c: c.oracle))
    assert found["gone"].reason == "not installed here"
    assert found["broken"].reason == "failed: RuntimeError: it fell over"
    assert found["right"].median_ms is not None


def test_rivals_of_another_family_or_precision_are_not_listed(case):
    other = Fake("pools only", lambda c: c.oracle)
    other.families = frozenset({"pool"})
    assert quick(case, other) == {}


def test_bytes_may_differ_by_one_quantum_and_sums_not_at_all():
    g = torch.Generator().manual_seed(0)
    layer = QuantizedLayer(
        x=torch.randint(0, 256, (3, 16), generator=g, dtype=torch.uint8),
        x_scale=0.05,
        x_zero_point=128,
        weight=torch.randint(-127, 128, (5, 16), generator=g, dtype=torch.int8),
        weight_scale=torch.full((5,), 0.01),
        bias=torch.zeros(5),
        out_scale=0.1,
        out_zero_point=90,
    )
    case = Case("gemm", "test", "", 1.0, {"int8": 1.0}, quantized=layer)
    assert case.error("int8", layer.accumulator) == 0.0
    assert case.error("int8", layer.accumulator + 1) == float("inf")
    answer = layer.expected.int()
    near = torch.where(answer < 255, answer + 1, answer - 1).to(torch.uint8)
    assert case.error("int8", near) == 1.0 == case.allowed("int8", near)
    assert torch.equal(QDQLayer(layer)(layer.x), layer.expected)


def test_every_rival_has_its_own_label_and_ours_stand_in_every_family():
    labels = [r.label for r in everybody()]
    assert len(labels) == len(set(labels))
    assert {f for r in everybody() if r.ours for f in r.families} == {f for r in everybody() for f in r.families}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": ("poetry",)}, "family"),
        ({"families": ("conv",), "precisions": ("int4",)}, "precisions"),
        ({"families": ("conv",), "groups": ("alexnet",)}, "groups"),
        ({"families": ("gemm",), "threads": 0}, "threads"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        harness.run(**arguments)


def test_a_case_of_other_precisions_is_passed_over(case, monkeypatch):
    only_int8 = dataclasses.replace(case, name="bytes", precisions=("int8",))
    monkeypatch.setattr(
        harness.shapes, "cases", lambda family, groups: [("bytes", lambda: only_int8), ("floats", lambda: case)]
    )
    monkeypatch.setattr(harness.rivals, "everybody", lambda: [Fake("right", lambda c: c.oracle.clone())])
    monkeypatch.setattr(harness.peaks, "measure", lambda: PEAKS)
    shown: list[list[harness.Result]] = []
    run = harness.run(("linear",), precisions=("fp32",), rounds=3, seconds=0.0, done=shown.append)
    assert [[r.case for r in results] for results in shown] == [[case.name]] == [[r.case for r in run.results]]
    monkeypatch.setattr(harness.shapes, "cases", lambda family, groups: [("bytes", lambda: only_int8)])
    with pytest.raises(ValueError, match="precisions"):
        harness.run(("linear",), precisions=("fp32",))


def test_peaks_are_measured_on_the_isa_in_force(isa):
    found = measure(seconds=0.01)
    assert set(found.operations) == {"fp32", "bf16", "int8"}
    assert all(rate > 0 for rate in found.operations.values())
    assert found.levels[-1].capacity is None
    assert all(level.read > 0 and level.copy > 0 for level in found.levels)


def test_the_roof_is_the_slower_of_arithmetic_and_memory():
    assert PEAKS.seconds("fp32", 1e9, 10.0) == (1.0, "compute")
    assert PEAKS.seconds("fp32", 1.0, 2e9) == (2.0, "memory")
    assert PEAKS.bandwidth(500) == 100e9 and PEAKS.bandwidth(5000) == 1e9


def test_cache_sizes_are_read_as_the_system_tells_them(tmp_path):
    for i, (level, kind, size) in enumerate([(1, "Data", "32K"), (1, "Instruction", "64K"), (2, "Unified", "1M")]):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("level", str(level)), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert cache_sizes(tmp_path) == {1: 32 * 1024, 2: 2**20}
    assert cache_sizes(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(("dtype", "steps", "message"), [("fp64", 1, "dtype"), ("int8", -1, "steps")])
def test_the_peak_op_refuses_by_name(dtype, steps, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pykernels._peak(dtype, steps)
