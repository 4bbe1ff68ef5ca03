"""Graphs of which some steps are float: the same as PT2E makes when it is told so before it calibrates."""

from __future__ import annotations

import pytest
import torch

from pykernels.graph.nodes import is_call
from pykernels.graph.qdq import QUANTIZE
from pykernels.precision.auto import costs
from pykernels.precision.choose import Table
from pykernels.precision.mixture import Mixture
from pykernels.precision.sensitivity import Sensitivity
from pykernels.precision.timing import Times
from pykernels.quantization.recipes import calibrate_captured

from .small import LAYERS, small


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    model, inputs = small()
    return Mixture(calibrate_captured(model, (inputs[0],), {}, inputs, dynamic_batch=True))


def test_steps_and_what_they_exchange(mixture: Mixture) -> None:
    steps = {step.where: step for step in mixture.steps}

    def read(where: str) -> set[str]:
        return {mixture.values[value].name for value in steps[where].reads}

    def made(where: str) -> str:
        return mixture.values[steps[where].writes].name

    assert set(LAYERS) == {step.where for step in mixture.steps if step.layer}
    assert read("inner") == {made("stem")} and read("outer") == {made("inner"), made("stem")}  # the residual
    assert read("pool") == {made("outer")} and read("down") == {made("pool")}
    assert steps["head"].writes is None
    assert [where for where in steps if steps[where].follows] == [where for where in steps if where not in LAYERS]
    assert mixture.values[steps["pool"].writes].keeps and not mixture.values[steps["stem"].writes].keeps


@pytest.mark.parametrize("where", LAYERS)
def test_a_step_in_float_is_what_keep_float_makes(mixture: Mixture, where: str) -> None:
    model, inputs = small()
    table = free(mixture)
    place = next(place for place, step in enumerate(mixture.steps) if step.where == where)
    int8 = {i for i, chosen in enumerate(table.without([True] * len(mixture.steps), place)) if chosen}
    kept = calibrate_captured(
        model, (inputs[0],), {}, inputs, dynamic_batch=True, keep_float=mixture.steps[place].nodes
    )
    graph = mixture.graph(int8)
    with torch.no_grad():
        (found,), (expected,) = graph(inputs[1]), kept.captured.module(inputs[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_int8_it_is_the_model(mixture: Mixture) -> None:
    model, inputs = small()
    graph = mixture.graph(())
    assert quantizers(graph) == 0
    with torch.no_grad():
        torch.testing.assert_close(graph(inputs[0])[0], model(inputs[0]), rtol=1e-4, atol=1e-5)


def test_the_calibrated_graph_stays_as_it_is(mixture: Mixture) -> None:
    _, inputs = small()
    graph = mixture.calibrated.captured.module
    with torch.no_grad():
        before = graph(inputs[0])[0]
        mixture.graph({0, 1})
        everything = mixture.graph(range(len(mixture.steps)))(inputs[0])[0]
        assert torch.equal(before, graph(inputs[0])[0]) and torch.equal(before, everything)


def free(mixture: Mixture) -> Table:
    """A table in which nothing costs anything."""
    nothing = [0.0] * len(mixture.values)
    steps = [0.0] * len(mixture.steps)
    times = Times([(0.0, 0.0)] * len(steps), nothing, nothing, nothing)
    return costs(mixture, times, Sensitivity(steps, nothing, {}))


def quantizers(graph: torch.fx.GraphModule) -> int:
    return sum(is_call(node, QUANTIZE) for node in graph.graph.nodes)
