"""What a budget may say, and what is held against it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from pykernels.precision.budget import Budget, Reference

SPEC = pytree.tree_structure(((0,), {}))


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        ({}, "budget"),
        ({"speed": 1}, "budget"),
        (0.1, "budget"),
        ({"error": 0}, "error"),
        ({"error": float("nan")}, "error"),
        ({"error": True}, "error"),
        ({"error": "small"}, "error"),
        ({"agreement": 1.5}, "agreement"),
        ({"agreement": 0}, "agreement"),
        ({"drop": 0.1}, "validate"),
    ],
)
def test_malformed_budgets_are_refused_by_name(budget: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Budget.read(budget, None)


def test_drop_stands_alone_and_needs_a_function() -> None:
    assert Budget.read({"drop": 0.01}, lambda network: 1.0).drop == 0.01
    for budget, validate in (
        ({"drop": -1}, lambda network: 1.0),
        ({"drop": 0.1, "error": 0.1}, lambda network: 1.0),
        ({"error": 0.1}, lambda network: 1.0),
        (None, lambda network: 1.0),
        ({"drop": 0.1}, 3),
    ):
        with pytest.raises(ValueError, match=r"budget|validate"):
            Budget.read(budget, validate)


def test_the_default_is_an_error_of_a_tenth() -> None:
    assert Budget.read(None, None) == Budget(error=0.1)


def test_error_and_agreement_are_those_of_all_samples() -> None:
    samples = [(torch.eye(4)[:2],), (torch.eye(4)[2:],)]
    reference = Reference(lambda x: x, samples, SPEC, Budget(error=0.5, agreement=0.75))

    def one_wrong(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, 3:] > 0, x.roll(1, 1), x)

    kept = reference.keeps(one_wrong)
    assert kept.agreement == 0.75
    assert kept.error == pytest.approx((2 / 4) ** 0.5)
    assert not reference.holds(kept)
    assert reference.holds(reference.keeps(lambda x: 0.75 * x))
    assert not reference.holds(reference.keeps(lambda x: x * float("nan")))


def test_accuracy_may_drop_by_so_much() -> None:
    accuracies = {"float": 0.9, "good": 0.895, "bad": 0.8}

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

    budget = Budget.read({"drop": 0.01}, lambda network: accuracies[network.name])
    reference = Reference(Named("float"), [(torch.ones(2, 3),)], SPEC, budget)
    assert reference.holds(reference.keeps(Named("good")))
    assert not reference.holds(reference.keeps(Named("bad")))


def test_what_no_budget_can_be_held_against_is_refused() -> None:
    with pytest.raises(ValueError, match="agreement"):
        Reference(lambda x: x.sum(), [(torch.ones(2, 3),)], SPEC, Budget(agreement=0.9))
    with pytest.raises(ValueError, match="not finite"):
        Reference(torch.zeros_like, [(torch.ones(2, 3),)], SPEC, Budget(error=0.1))
    with pytest.raises(ValueError, match="validate"):
        Reference(lambda x: x, [(torch.ones(2, 3),)], SPEC, Budget(drop=0.1, validate=lambda network: None))
    with pytest.raises(ValueError, match="validate: it returned nan"):
        Reference(lambda x: x, [(torch.ones(2, 3),)], SPEC, Budget(drop=0.1, validate=lambda network: math.nan))
