"""Weights that make up for what is not read any more: exactly where that can be, never without enough data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.prune import moments
from pykernels.prune.recipe import recipe_of
from pykernels.prune.reconstruct import reconstruct
from tests.prune import prunable


def redundant(second: nn.Module) -> nn.Module:
    """32 channels of which the last 16 are sums of the others, read by `second`."""
    first = nn.Conv2d(3, 32, 1)
    with torch.no_grad():
        mixed = torch.randn(16, 16) / 4
        first.weight[16:] = (mixed @ first.weight[:16].flatten(1)).view(16, 3, 1, 1)
        first.bias[16:] = mixed @ first.bias[:16]
    layers = [first, nn.Flatten(), second] if isinstance(second, nn.Linear) else [first, second]
    return nn.Sequential(*layers).eval()


def halved(model: nn.Module, reader: str, places: int = 1) -> dict[str, object]:
    """The recipe that keeps 16 channels of the first layer."""
    kept = [channel * places + place for channel in range(16) for place in range(places)]
    layers = {"0": {"out": {"of": 32, "kept": list(range(16))}}, reader: {"in": {"of": 32 * places, "kept": kept}}}
    return {**recipe_of(model, [], {}), "layers": layers}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [{"kernel_size": 1}, {"kernel_size": 1, "stride": 2}, {"kernel_size": (3, 2), "padding": 1, "stride": 2}],
)
def test_a_convolution_makes_up_for_channels_that_others_tell(geometry: dict[str, object], bias: bool) -> None:
    model = redundant(nn.Conv2d(32, 8, bias=bias, **geometry))  # type: ignore[arg-type]
    data = [torch.randn(8, 3, 12, 12) for _ in range(3)]
    recipe = halved(model, "1")
    cut = pk.prune(model, (data[0],), recipe=recipe).model
    fitted = pk.prune(model, (data[0],), recipe=recipe, data=data)
    x = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        y = model(x)
        before, after = ((m(x) - y).norm() / y.norm() for m in (cut, fitted.model))
    assert before > 0.1 and after < 0.02 and fitted.report().fitted == ["1"]
    assert "weights were fitted to what was removed in 1 layers" in str(fitted.report())


def test_a_linear_layer_behind_what_was_flattened_does_so_too() -> None:
    model = redundant(nn.Linear(32 * 4, 8))
    data = [torch.randn(64, 3, 2, 2) for _ in range(8)]
    recipe = halved(model, "2", places=4)
    fitted = pk.prune(model, (data[0],), recipe=recipe, data=data).model
    x = torch.randn(4, 3, 2, 2)
    with torch.no_grad():
        assert (fitted(x) - model(x)).norm() < 0.02 * model(x).norm()


def test_what_does_not_fit_into_memory_takes_another_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 8, 1))
    model, kept = nn.Sequential(*layers).eval(), {"of": 32, "kept": list(range(16))}
    cut = {"0": {"out": kept}, "1": {"in": kept, "out": kept}, "2": {"in": kept}}
    recipe = {**recipe_of(model, [], {}), "layers": cut}
    data = [torch.randn(4, 32, 8, 8)]
    once, often = (pk.prune(model, (data[0],), recipe=recipe).model for _ in range(2))
    assert reconstruct(model, once, recipe, data, 1) == ["1", "2"]
    monkeypatch.setattr(moments, "ROOM", 1)
    assert reconstruct(model, often, recipe, data, 1) == ["1", "2"]
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), often.parameters(), strict=True))


def test_few_data_change_nothing() -> None:
    model = redundant(nn.Conv2d(32, 8, 1))
    recipe = halved(model, "1")
    pruned = pk.prune(model, (torch.randn(1, 3, 7, 9),), recipe=recipe).model
    before = pruned[1].weight.clone()
    assert reconstruct(model, pruned, recipe, [torch.randn(1, 3, 7, 9)], 1) == []  # 63 positions, 64 are needed
    assert torch.equal(pruned[1].weight, before)
    assert reconstruct(model, pruned, recipe, [torch.randn(1, 3, 8, 8)], 1) == ["1"]


def test_channels_that_nothing_tells_are_made_up_for_by_nothing() -> None:
    """Independent inputs: the weights of those that are kept stay as they are."""
    model = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.Conv2d(32, 8, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(32).view(32, 32, 1, 1))
    recipe = halved(model, "1")
    data = [torch.randn(16, 32, 32, 32)]
    fitted = pk.prune(model, (data[0],), recipe=recipe, data=data).model
    assert torch.allclose(fitted[1].weight, model[1].weight[:, :16], atol=0.02)


def test_a_whole_network_comes_nearer_to_its_answers() -> None:
    image = (3, 16, 16)
    model = prunable.lively(prunable.residual(), *image).eval()
    kept = {"of": 48, "kept": list(range(32))}
    layers = {"1.first.0": {"out": kept}, "1.first.1": {"out": kept}, "1.second.0": {"in": kept}}
    recipe = {**recipe_of(model, [], {}), "layers": layers}
    x = torch.randn(16, *image)
    pruned = pk.prune(model, (x,), recipe=recipe).model.eval()
    with torch.no_grad():
        before = (pruned(x) - model(x)).norm()
        assert reconstruct(model, pruned, recipe, [torch.randn(32, *image)], 1) == ["1.second.0"]
        assert (pruned(x) - model(x)).norm() < 0.8 * before
