"""Loaders that are read on, entries that are held out, and what judges a network."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pykernels.compress.data import Judge, Loader, hold_out, take

X = (torch.zeros(1, 4),)


def test_a_loader_goes_on_where_the_pass_before_stopped() -> None:
    batches = [torch.full((2, 4), float(number)) for number in range(3)]
    loader = Loader(batches, "train", X)
    seen = [[int(x[0, 0]) for x in itertools.islice(iter(loader), 2)] for _ in range(4)]
    assert seen == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert [int(x[0, 0]) for x in loader.once()] == [0, 1, 2]


def test_a_loader_that_can_be_read_once_only_does_not_spin() -> None:
    class Once:
        def __init__(self) -> None:
            self.left = iter([torch.zeros(2, 4)])

        def __iter__(self) -> object:
            return self.left

    with pytest.raises(ValueError, match="train: it is empty"):
        list(itertools.islice(iter(Loader(Once(), "train", X)), 3))


def test_as_many_entries_are_taken_as_hold_the_samples() -> None:
    loader = Loader([(torch.zeros(100, 4), torch.zeros(100))] * 5, "train", X)
    assert [len(take(loader, count)) for count in (1, 100, 101, 10_000)] == [1, 1, 2, 5] and len(take(loader)) == 5


@pytest.mark.parametrize("count, held", [(2, [1]), (3, [2]), (4, [3]), (9, [3, 7])])
def test_what_is_judged_by_is_nothing_that_is_fitted_to(count: int, held: list[int]) -> None:
    entries = list(range(count))
    assert hold_out(entries, "data") == ([e for e in entries if e not in held], held)


def test_answers_that_are_classes_are_judged_by_agreement() -> None:
    model, held = nn.Identity(), [(torch.eye(4), torch.zeros(4)), torch.eye(4)]
    judge = Judge(None, model, X, held)
    assert judge.measure == "agreement" and judge.samples == 8
    assert judge(model) == 1.0 and judge(lambda x: 2 * x) == 1.0
    assert judge(lambda x: x.roll(1, 0)) == 0.0


def test_other_answers_are_judged_by_their_likeness() -> None:
    model = nn.Flatten(0)
    judge = Judge(None, model, X, [torch.ones(2, 4)])
    assert judge.measure == "likeness" and judge(model) == 1.0
    assert judge(lambda x: 0.9 * x.flatten()) == pytest.approx(0.9)


@pytest.mark.parametrize("value, message", [(None, "NoneType, not a number"), (float("nan"), "returned nan")])
def test_an_accuracy_is_a_number(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"validate: .*{message}"):
        Judge(lambda network: value, nn.Identity(), X, [])(None)  # type: ignore[arg-type]
