"""The order in which channels go: those that the others make up for first; and what is lost, in the unit of a trial."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pykernels.prune import eliminate as module
from pykernels.prune.coupling import couple
from pykernels.prune.eliminate import eliminate, steps
from pykernels.prune.importance import taylor
from pykernels.prune.recipe import recipe_of
from pykernels.prune.surgery import cut
from pykernels.prune.trial import Trial, held_out
from tests.prune import prunable


def eliminated(model: nn.Module, data: list[torch.Tensor]) -> tuple[Any, Any]:
    """The groups, and what `eliminate` says of them."""
    groups = couple(copy.deepcopy(model), (data[0],), ()).groups
    weighed = taylor(copy.deepcopy(model), groups, data, 1)
    rest, held = held_out(data, len(data))
    return groups, eliminate(model, groups, weighed.curvature, rest, held, 1, Trial(model, held, 1, None))


@pytest.mark.parametrize("reader", [nn.Conv2d(48, 8, 1), nn.Conv2d(48, 8, 3, padding=1, stride=2, bias=False)])
def test_of_channels_that_are_there_twice_one_goes_first_and_nothing_is_lost(reader: nn.Module) -> None:
    """48 channels, of which the first 16 are there a second time, in the places from 32 on."""
    torch.manual_seed(0)
    maker = nn.Conv2d(32, 48, 1, bias=False)
    with torch.no_grad():
        maker.weight.copy_(torch.eye(32).repeat(2, 1)[:48].view(48, 32, 1, 1))
    data = [torch.randn(32, 32, 9, 9) for _ in range(4)]
    order, lost = eliminated(nn.Sequential(maker, reader).eval(), data)[1]["0"]
    assert sorted(order) == list(range(48)) and list(lost) == [48, 32, 16]
    assert {unit % 32 for unit in order[32:]} == set(range(16))  # of each pair one
    assert lost[48] == 0 and lost[32] < 0.01 * lost[16]


def test_dead_channels_cost_nothing_and_say_nothing_of_others() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    data, lost = [torch.randn(16, 3, 12, 12) for _ in range(8)], {}
    for dead in (0, 16):
        with torch.no_grad():
            model[1].weight[:dead] = 0
            model[1].bias[:dead] = -1
        order, lost[dead] = eliminated(model, data)[1]["0"]
        assert dead == 0 or set(order[48:]) == set(range(16))
    assert lost[16][48] < 1e-3 * lost[16][16]
    assert 0.2 < lost[16][16] / lost[0][16] < 2  # 32 living channels are gone there, without dead ones 48


def test_what_few_data_promise_is_not_believed() -> None:
    """Channels that tell nothing of one another: weights fitted to few positions help nowhere else."""
    torch.manual_seed(0)
    maker = nn.Conv2d(64, 64, 1, bias=False)
    with torch.no_grad():
        maker.weight.copy_(torch.eye(64).view(64, 64, 1, 1))
    model, data = nn.Sequential(maker, nn.Conv2d(64, 32, 1)).eval(), [torch.randn(1, 64, 9, 9) for _ in range(4)]
    (group,), found = eliminated(model, data)
    order, lost = found["0"]
    trial = Trial(model, held_out(data, 4)[1], 1, None)
    plain = {w: trial(cut(model, recipe_of(model, [group], {"0": order[:w]}))) for w in (16, 32, 48)}
    assert steps(group) == [16, 32, 48] and lost[64] == 0
    assert all(lost[width] > 0.95 * plain[width] for width in plain)


def test_layers_that_cannot_be_fitted_and_few_data_are_left_out() -> None:
    circular = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 3, padding=1, padding_mode="circular"))
    assert eliminated(circular, [torch.randn(8, 3, 12, 12)] * 2)[1] == {}
    plain = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 1))
    assert eliminated(plain, [torch.randn(1, 3, 7, 9)] * 2)[1] == {}  # 126 positions, 128 are needed
    assert eliminated(plain, [torch.randn(1, 3, 8, 8)] * 2)[1].keys() == {"0"}


def test_streams_are_ordered_for_all_that_read_them_however_little_fits_into_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, data = prunable.lively(prunable.residual(), 3, 8, 8), [torch.randn(64, 3, 8, 8) for _ in range(3)]
    groups, found = eliminated(model, data)
    assert found.keys() == {group.name for group in groups}
    assert any(len({slot.layer for slot in group.units[0] if slot.axis == "in"}) > 2 for group in groups)
    for group in groups:
        order, lost = found[group.name]
        assert sorted(order) == list(range(len(group.units))) and sorted(lost) == group.widths
    monkeypatch.setattr(module, "ROOM", 1)
    assert eliminated(model, data)[1] == found
