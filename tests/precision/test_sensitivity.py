"""Estimated errors: they rank assignments as simulated ones do."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from scipy.stats import spearmanr

from pykernels.precision import sensitivity
from pykernels.precision.auto import costs
from pykernels.precision.choose import Table
from pykernels.precision.mixture import Fitted, Mixture
from pykernels.precision.timing import Times
from pykernels.quantization.recipes import calibrate_captured

from .small import small, with_outliers


def weighed(make: object) -> tuple[Mixture, Table, Fitted]:
    """A network's steps, their costs, and int8 weights with biases of their own."""
    model, inputs = make()
    mixture = Mixture(calibrate_captured(model, (inputs[0],), {}, inputs, dynamic_batch=True))
    graph = copy.deepcopy(mixture.calibrated.captured.module)
    mixture.calibrated.refine(graph)
    fitted = mixture.fitted(graph)
    found = sensitivity.measure(mixture, fitted)
    nothing = [0.0] * len(mixture.values)
    times = Times([(2.0, 1.0)] * len(mixture.steps), nothing, nothing, nothing)
    own = {name: (weight, found.biases[name]) for name, (weight, _) in fitted.items()}
    return mixture, costs(mixture, times, found), own


def assignment(table: Table, pick: random.Random) -> list[bool]:
    """Some steps in int8, as many as chance says."""
    found, share = [True] * len(table.steps), pick.random()
    for place in range(len(found)):
        if pick.random() > share:
            found = table.without(found, place)
    return found


def error(mixture: Mixture, int8: list[bool], fitted: Fitted) -> float:
    """Relative squared error of the answers, simulated."""
    places = {place for place, chosen in enumerate(int8) if chosen}
    x = torch.cat([sample[0] for sample in mixture.calibrated.samples])
    with torch.no_grad():
        (exact,), (found,) = mixture.graph(())(x), mixture.graph(places, fitted)(x)
    return float((found - exact).square().sum() / exact.square().sum())


@pytest.fixture(scope="module")
def plain() -> tuple[Mixture, Table, Fitted]:
    return weighed(small)


def test_random_assignments_are_ranked_as_simulation_ranks_them(plain: tuple[Mixture, Table, Fitted]) -> None:
    mixture, table, fitted = plain
    pick = random.Random(0)
    some = [assignment(table, pick) for _ in range(20)]
    expected = [table.error(a) for a in some]
    simulated = [error(mixture, a, fitted) for a in some]
    assert spearmanr(expected, simulated).statistic >= 0.9


def test_errors_are_of_the_size_of_simulated_ones(plain: tuple[Mixture, Table, Fitted]) -> None:
    mixture, table, fitted = plain
    everything = [True] * len(table.steps)
    assert 0.5 < table.error(everything) / error(mixture, everything, fitted) < 2.0
    assert table.error([False] * len(table.steps)) == 0.0 == error(mixture, [False] * len(table.steps), fitted)


def test_a_layer_with_outliers_makes_most_of_the_error() -> None:
    mixture, table, _ = weighed(with_outliers)
    everything = [True] * len(table.steps)
    saved = {
        step.where: table.error(everything) - table.error(table.without(everything, place))
        for place, step in enumerate(mixture.steps)
    }
    assert saved.pop("wide") > 10 * max(saved.values())
