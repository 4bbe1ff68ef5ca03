"""Equalization changes no answer of the fp32 network, and makes int8 answers better where channels differ in size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pykernels.graph.capture import capture
from pykernels.quantization import quantize
from pykernels.quantization.equalize import equalize


def sized(conv: nn.Conv2d) -> nn.Conv2d:
    """Output channels of very different sizes."""
    with torch.no_grad():
        factor = torch.logspace(-1.5, 1.5, conv.out_channels)
        conv.weight *= factor.view(-1, 1, 1, 1)
        if conv.bias is not None:
            conv.bias *= factor
    return conv


class Net(nn.Module):
    def __init__(self, forward: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def chain() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": sized(nn.Conv2d(3, 8, 3)), "b": nn.Conv2d(8, 8, 3, padding=1), "c": nn.Conv2d(8, 4, 1)}


def residuals() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    layers = {name: sized(nn.Conv2d(12, 12, 1)) for name in "bd"}
    return {
        "a": sized(nn.Conv2d(3, 12, 3, 2)), "c": nn.Conv2d(12, 12, 3, padding=1, groups=12), "e": nn.Conv2d(12, 6, 1),
        "f": nn.Conv2d(12, 12, 3, groups=3), **layers,
    }  # fmt: skip


CHANGED: dict[str, tuple[Callable[..., torch.Tensor], dict[str, nn.Module]]] = {
    "a chain": (lambda m, x: m.c(m.b(m.a(x))), chain()),
    "relu": (lambda m, x: m.c(m.b(F.relu(m.a(x)))), chain()),
    "pools": (lambda m, x: m.b(F.avg_pool2d(F.max_pool2d(F.relu(m.a(x)), 3, 1, 1), 2)), chain()),
    "depthwise and grouped readers": (lambda m, x: m.f(F.relu(m.a(x))) + m.c(m.a(x))[:, :, 1:-1, 1:-1], residuals()),
    "no bias": (lambda m, x: m.c(m.a(x)), {"a": sized(nn.Conv2d(3, 8, 3, bias=False)), "c": nn.Conv2d(8, 4, 1)}),
    "a residual stream": (
        lambda m, x: m.e(
            (y := (s := m.a(x)) + m.b(F.relu6(m.c(s)))) + m.d(torch.sigmoid(m.c(y)))
        ),
        residuals(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_fp32_answers_stay(name: str) -> None:
    body, layers = CHANGED[name]
    model, x = Net(body, **layers).eval(), torch.randn(2, 3, 20, 20)
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, (x,), {}).module
    expected = model(x)
    assert equalize(graph, [(x,)])
    torch.testing.assert_close(graph(x)[0], expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


KEPT: dict[str, Callable[..., torch.Tensor]] = {
    "relu6 saturates": lambda m, x: m.b(F.relu6(m.a(x))),
    "a curve": lambda m, x: m.b(F.hardswish(m.a(x))),
    "a result of the network": lambda m, x: m.b(y := m.a(x)) + y,
    "a sum with something else": lambda m, x: m.b(m.a(x) + x.mean()),
    "a sum with an input": lambda m, x: m.b(m.a(x) + F.pad(x, (-1, -1, -1, -1)).repeat(1, 3, 1, 1)[:, :8]),
    "half of a sum": lambda m, x: m.b(torch.add(y := m.a(x), m.b(y), alpha=2)),
    "a product": lambda m, x: m.b(m.a(x) * m.a(x)),
    "a concatenation": lambda m, x: m.c(torch.cat([m.a(x)[:, :4], m.a(x)[:, 4:]], 1)),
    "a shape": lambda m, x: m.b(m.a(x)).flatten(1),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_scale_would_change_is_left_alone(name: str) -> None:
    model, x = Net(KEPT[name], **chain()).eval(), torch.randn(2, 3, 12, 12)
    graph = capture(model, (x,), {}).module
    expected = graph(x)[0]
    changed = equalize(graph, [(x,)])
    torch.testing.assert_close(graph(x)[0], expected, rtol=1e-4, atol=1e-4)
    if name != "a shape":
        assert not changed


def test_an_image_without_a_batch_is_left_alone() -> None:
    model, x = Net(CHANGED["a chain"][0], **chain()).eval(), torch.randn(3, 12, 12)
    assert equalize(capture(model, (x,), {}, dynamic_batch=False).module, [(x,)]) == []


def test_channels_of_one_size_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.ones_like(model[0].weight))
        model[1].weight.copy_(torch.ones_like(model[1].weight))
        model[0].bias.zero_()  # type: ignore[union-attr]
    x = torch.randn(2, 3, 12, 12)
    assert equalize(capture(model, (x,), {}).module, [(x,)]) == []


def test_dead_channels_stay_finite() -> None:
    model, x = Net(CHANGED["relu"][0], **chain()).eval(), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        model.a.weight[2], model.a.bias[2] = 0, 0
        model.b.weight[:, 3] = 0
    graph = capture(model, (x,), {}).module
    assert equalize(graph, [(x,)])
    torch.testing.assert_close(graph(x)[0], model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_int8_answers_come_nearer() -> None:
    """Behind a batch norm whose channels differ, as MobileNetV2's bottlenecks."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)).eval()
    model[1].weight.copy_(torch.logspace(-2, 1, 16))  # type: ignore[union-attr]
    model[2].weight /= torch.logspace(-2, 1, 16).view(1, -1, 1, 1)
    x = torch.randn(4, 8, 16, 16)
    plain, equal = (quantize(model, (x,), [x], refine=refine) for refine in (False, True))
    assert not plain.meta["pykernels_quantization"].equalized
    assert len(equal.meta["pykernels_quantization"].equalized) == 2
    expected = model(x)
    assert (equal(x) - expected).norm() < 0.02 * expected.norm() < 0.1 * (plain(x) - expected).norm()
