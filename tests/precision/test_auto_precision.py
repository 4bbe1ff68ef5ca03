"""`optimize(precision="auto")`: a budget is held, the quickest within it is the answer, the report tells why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.precision import timing
from pykernels.precision.mixture import Mixture
from pykernels.quantization import quantize
from pykernels.quantization.recipes import calibrate_captured

from .small import LAYERS, halved, small, with_outliers


def auto(make: Any, budget: Any = None, **options: Any) -> tuple[pk.Optimized, float]:
    """The network, and the relative error of its answers to the calibration inputs."""
    model, inputs = make()
    fast = pk.optimize(model, (inputs[0],), precision="auto", calibration=inputs, budget=budget, **options)
    with torch.no_grad():
        exact, found = (torch.cat([network(x) for x in inputs]) for network in (model, fast))
    return fast, float((found - exact).norm() / exact.norm())


def precisions(fast: pk.Optimized) -> dict[str, str]:
    return {entry.where: entry.precision for entry in fast.report().chosen}


def test_int8_is_returned_where_it_holds_the_budget() -> None:
    with halved():
        fast, error = auto(small)
    assert fast.report().precision == "int8" and error < 0.1
    assert set(precisions(fast).values()) == {"int8"}


def test_a_tight_budget_is_held_by_a_mixture(tmp_path: Path) -> None:
    with halved():
        fast, error = auto(small, {"error": 0.002})  # all in int8: 0.004
    report = fast.report()
    assert report.precision == "mixed" and error <= 0.002 * 1.001
    assert set(precisions(fast).values()) == {"int8", "fp32"}
    assert "measured, mixed" in str(report) and "runs in" in str(report)
    fast.save(tmp_path / "net.pk")
    loaded = pk.load(tmp_path / "net.pk")
    assert loaded.report() == report
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(loaded(x), fast(x))


def test_what_was_chosen_can_be_made_again() -> None:
    model, inputs = small()
    with halved():
        fast, _ = auto(small, {"error": 0.002})
    choice = json.loads(json.dumps(fast.report().choice))
    assert set(choice.values()) == {"int8", "fp32"} and list(choice) == [c.name for c in fast.report().chosen]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "measure", None)  # nothing is measured
        again = pk.optimize(model, (inputs[0],), precision=choice, calibration=inputs)
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(again(x), fast(x)) and again.report().choice == choice
    assert again.report().chosen[0].fp32 is None and "runs in" in str(again.report())
    whole = pk.optimize(model, (inputs[0],), precision=dict.fromkeys(choice, "int8"), calibration=inputs)
    assert torch.equal(whole(x), pk.optimize(model, (inputs[0],), precision="int8", calibration=inputs)(x))
    assert whole.report().choice == "int8"


def test_choices_for_another_model_are_refused() -> None:
    model, inputs = small()
    with halved():
        choice = {entry.name: "int8" for entry in auto(small)[0].report().chosen}
    first = next(iter(choice))
    for wrong, message in (
        ({**choice, "conv9": "int8"}, "precision: it is for another model: this one has no step 'conv9'"),
        ({step: p for step, p in choice.items() if step != first}, f"this one has also '{first}'"),
        ({**choice, first: "bf16"}, f"precision: of step '{first}' it is 'bf16', neither"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            pk.optimize(model, (inputs[0],), precision=wrong, calibration=inputs)
    with pytest.raises(ValueError, match="calibration: precision by step needs"):
        pk.optimize(model, (inputs[0],), precision=choice)


def test_a_budget_that_only_float_holds_gets_float() -> None:
    with halved():
        fast, error = auto(small, {"error": 1e-6})
    assert fast.report().precision == "fp32" and error <= 1e-6
    assert "over the budget" in str(fast.report())


def test_one_layer_with_outliers_is_the_only_one_in_float() -> None:
    with halved():
        fast, error = auto(with_outliers, {"error": 0.01})  # all in int8: 0.035
    assert [where for where in LAYERS if precisions(fast)[where] == "fp32"] == ["wide"]
    assert error <= 0.01 * 1.001


def test_what_is_timed_slower_than_a_uniform_network_is_not_returned() -> None:
    with halved(calls=[1.0, 2.0, 3.0, 4.0]):  # fp32 is the first that holds it
        fast, _ = auto(small, {"error": 0.01})
    assert fast.report().precision == "fp32"


def test_steps_that_are_quicker_in_float_stay_so() -> None:
    with halved(int8=3.0):
        fast, _ = auto(small)
    report = fast.report()
    assert report.precision in ("fp32", "bf16", "fp16", "int8")
    assert not any("mixed" in note for note in report.notes)


@pytest.mark.parametrize("budget", [{"agreement": 1.0}, {"error": 0.2, "agreement": 0.9}])
def test_agreement(budget: dict[str, float]) -> None:
    model, inputs = small()
    with halved():
        fast, error = auto(small, budget)
    with torch.no_grad():
        same = [model(x).argmax(1) == fast(x).argmax(1) for x in inputs]
    assert float(torch.cat(same).float().mean()) >= budget["agreement"] and error <= budget.get("error", 1.0)


def test_accuracy_by_the_callers_measure() -> None:
    model, inputs = small()
    with torch.no_grad():
        exact = model(inputs[0])

    def validate(network: Any) -> float:
        return 1.0 - float((network(inputs[0]) - exact).norm() / exact.norm())

    with halved():
        fast, _ = auto(small, {"drop": 0.004}, validate=validate)
    assert validate(fast) >= 0.996
    assert "accuracy lower by" in str(fast.report())


def test_steps_and_conversions_are_timed() -> None:
    model, inputs = small()
    mixture = Mixture(calibrate_captured(model, (inputs[0],), {}, inputs, dynamic_batch=True))
    times = timing.measure(mixture, [inputs[0]], None)
    by_name = dict(zip((step.where for step in mixture.steps), times.steps, strict=True))
    assert all(min(by_name[where]) > 0 for where in ("stem", "inner", "outer"))  # others are a clock's tick or two
    conversions = (times.quantize, times.dequantize, times.as_float)
    assert all(len(seconds) == len(mixture.values) and min(seconds) >= 0 for seconds in conversions)
    assert sum(times.quantize) > 0 and sum(times.dequantize) > 0


def test_it_needs_calibration_and_a_float_model() -> None:
    model, inputs = small()
    with pytest.raises(ValueError, match="calibration"):
        pk.optimize(model, (inputs[0],), precision="auto")
    with pytest.raises(ValueError, match="calibration: no inputs"):
        pk.optimize(model, (inputs[0],), precision="auto", calibration=[])
    with pytest.raises(ValueError, match="budget"):
        pk.optimize(model, (inputs[0],), precision="auto", calibration=inputs, budget={"error": -1})
    quantized = quantize(model, (inputs[0],), inputs, refine=False)
    with pytest.raises(ValueError, match="model: it is quantized already"):
        pk.optimize(quantized, (inputs[0],), precision="auto", calibration=inputs)
    with pytest.raises(ValueError, match="model: it is optimized already"):
        pk.optimize(pk.optimize(model, (inputs[0],)), (inputs[0],), precision="auto", calibration=inputs)


def test_other_precisions_have_no_budget() -> None:
    model, inputs = small()
    with pytest.raises(ValueError, match="budget"):
        pk.optimize(model, (inputs[0],), precision="fp32", budget={"error": 0.1})
    with pytest.raises(ValueError, match="validate"):
        pk.optimize(model, (inputs[0],), precision="fp32", validate=lambda network: 1.0)


def test_a_network_without_float_outputs_is_refused() -> None:
    class Class(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).argmax(1)

    _, inputs = small()
    with pytest.raises(ValueError, match="budget: no error is relative to"):
        pk.optimize(Class().eval(), (inputs[0],), precision="auto", calibration=inputs)
