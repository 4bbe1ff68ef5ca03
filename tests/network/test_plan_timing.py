"""How long steps take, from rounds of which some were disturbed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.network.plan import timing


@pytest.mark.parametrize(
    "rounds, least", [([[5, 9], [3, -2], [7, 8]], 13e-9), ([[5, -2], [-1, 4]], 0.0), ([[5, 9]], 14e-9)]
)
def test_a_round_in_which_a_step_ends_before_it_begins_does_not_count(
    rounds: list[list[int]], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3)).eval(), torch.randn(1, 16, 8, 8)
    planned = pk.optimize(model, (x,)).planned
    assert planned is not None

    def profiled(plan: torch.Tensor, weights: torch.Tensor, inputs: list[torch.Tensor], count: int) -> torch.Tensor:
        drivers = len(timing.describe_plan(plan, weights, inputs)["drivers"])
        return torch.tensor([row + [0] * (drivers - 2) for row in rounds])

    monkeypatch.setattr(timing, "profile_plan", profiled)
    assert sum(timing.step_seconds(planned, [x], len(rounds)).values()) == pytest.approx(least)
