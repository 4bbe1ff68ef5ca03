"""What is lost with channels and blocks, measured: what weights can make up for is not lost, a block's part is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pykernels.prune.coupling import couple
from pykernels.prune.recipe import recipe_of
from pykernels.prune.surgery import masked
from pykernels.prune.trial import changes
from tests.prune import prunable


def alike(told: bool) -> nn.Module:
    """Channels of which the first 16 tell the last 16, or not; the last ones are worth as much as the first."""
    first = nn.Conv2d(32, 32, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(32).view(32, 32, 1, 1))
        if told:
            first.weight[16:] = first.weight[:16]
    return nn.Sequential(first, nn.Conv2d(32, 8, 3, padding=1, bias=False)).eval()


def lost(model: nn.Module, data: list[torch.Tensor]) -> dict[int, float]:
    (group,) = couple(copy.deepcopy(model), (data[0],), ()).groups
    return changes(model, [group], [], {group.name: range(32)}, data, 1)[0][group.name]


def unread(model: nn.Module, data: list[torch.Tensor]) -> float:
    """By hand: what the last 16 channels add to the output, squared, an entry."""
    with torch.no_grad():
        y = model[0](torch.cat(data))
        added = nn.functional.conv2d(y[:, 16:], model[1].weight[:, 16:], padding=1)
    return float(added.square().sum()) / len(data)


def test_what_others_tell_is_not_lost() -> None:
    torch.manual_seed(0)
    data = [torch.randn(8, 32, 16, 16) for _ in range(4)]
    model = alike(told=True)
    assert lost(model, data).keys() == {16} and lost(model, data)[16] < 1e-3 * unread(model, data)


def test_what_nothing_tells_is_lost() -> None:
    torch.manual_seed(0)
    data = [torch.randn(8, 32, 16, 16) for _ in range(4)]
    model = alike(told=False)
    assert lost(model, data)[16] == pytest.approx(unread(model, data), rel=0.1)


def test_too_few_data_refit_nothing() -> None:
    torch.manual_seed(0)
    data = [torch.randn(1, 32, 5, 5)]  # 25 positions for 144 numbers of a sum
    model = alike(told=True)
    assert lost(model, data)[16] == pytest.approx(unread(model, data), rel=1e-4)


def test_a_block_is_lost_with_all_that_it_adds() -> None:
    torch.manual_seed(0)
    image = (3, 16, 16)
    model = prunable.lively(prunable.residual(), *image).eval()
    data, seen = [torch.randn(8, *image) for _ in range(5)], []  # 32 samples are looked at, four entries
    by_width, by_block = changes(model, [], ["1"], {}, data, 1, lambda *stage: seen.append(stage))
    with torch.no_grad():
        x = torch.cat(data[:4])
        gone = model(x) - masked(model, recipe_of(model, [], {}, ["1"]))(x)
    assert by_width == {} and by_block["1"] == pytest.approx(float(gone.square().sum()) / 4, rel=1e-4)
    assert seen == [("measuring losses", 1, 1)]
