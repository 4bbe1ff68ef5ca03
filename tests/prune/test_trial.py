"""What a removal costs is measured on entries that nothing is fitted to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pykernels.prune.trial import Trial, held_out


@pytest.mark.parametrize(
    "entries, fitted, held", [(1, [0], [0]), (2, [0], [1]), (3, [0, 1], [2]), (9, [0, 1, 2, 4, 5, 6, 8], [3, 7])]
)
def test_every_fourth_entry_is_held_out(entries: int, fitted: list[int], held: list[int]) -> None:
    data = [torch.full((2, 3), float(number)) for number in range(entries)]
    rest, others = held_out(data, entries)
    for _ in range(2):
        assert [int(x[0, 0]) for x in rest] == fitted
    assert [int(x[0, 0]) for x in others] == held


def test_no_more_is_held_out_than_a_trial_takes() -> None:
    data = [torch.zeros(20, 3) for _ in range(40)]
    assert len(held_out(data, 40)[1]) == 2  # 40 samples, and 32 are enough
    assert sum(len(args[0]) for args, _ in Trial(nn.Linear(3, 2), data[:2], 1, None).parts) <= 36


@pytest.mark.parametrize(
    "label, loss, expected",
    [
        (None, None, lambda y, z, k: (y - z).square().sum(1).view(2, 8).sum(1).mean()),
        (torch.arange(16) % 3, None, lambda y, z, k: squared(F.cross_entropy, y, z, k)),
        (torch.randn(16, 3), F.mse_loss, lambda y, z, k: squared(F.mse_loss, y, z, k)),
    ],
)
def test_the_squared_change_of_the_objective_is_averaged(label: Any, loss: Any, expected: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).train(), torch.randn(16, 4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[:, 1] = 0
        y, z = (m[0](x) for m in (model, other))
    trial = Trial(model, [x if label is None else (x, label)], 1, loss)
    assert trial(model) == 0.0 and model.training and other.training
    assert trial(other) == pytest.approx(float(expected(y, z, label)), rel=1e-4)


def squared(loss: Any, y: torch.Tensor, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Eight samples at a time."""
    pairs = zip(y.split(8), z.split(8), label.split(8), strict=True)
    return torch.stack([(loss(a, k) - loss(b, k)).square() for a, b, k in pairs]).mean()
