"""conv_bn_act: values against the oracle, gradients against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pykernels import reference
from pykernels.ops.conv import conv_bn_relu

NAMES = ("x", "weight", "bias", "gamma", "beta", "residual")


def inputs(groups: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    made = {
        "x": torch.randn(2, 6, 9, 8),
        "weight": torch.randn(4, 6 // groups, 3, 3) * 0.3,
        "bias": torch.randn(4),
        "gamma": torch.rand(4) + 0.5,
        "beta": torch.randn(4),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


STATISTICS = (torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4))


def composed(t, *, padding, activation, residual=None, order="before", stride=1, dilation=1, groups=1):
    """The same in torch."""
    x = F.pad(t["x"], padding)
    z = F.conv2d(x, t["weight"], t.get("bias"), stride, 0, dilation, groups)
    u = F.batch_norm(z, *STATISTICS, t.get("gamma"), t.get("beta"), False, 0.0, 1e-3)
    if residual is not None and order == "before":
        u = u + residual
    y = reference.ACTIVATIONS[activation](u)
    return y + residual if residual is not None and order == "after" else y


def ours(t, *, padding, activation, residual=None, order="before", stride=1, dilation=1, groups=1):
    return conv_bn_relu(
        t["x"], t["weight"], t.get("bias"), *STATISTICS, t.get("gamma"), t.get("beta"), eps=1e-3, stride=stride,
        padding=tuple(padding), dilation=dilation, groups=groups, activation=activation, residual=residual,
        residual_order=order,
    )  # fmt: skip


def agree(t: dict[str, torch.Tensor], **arguments) -> None:
    leaves = [v for v in (*t.values(), arguments.get("residual")) if v is not None and v.requires_grad]
    expected, actual = composed(t, **arguments), ours(t, **arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(expected)
    for name, a, b in zip(
        NAMES,
        torch.autograd.grad((actual * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=False,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradients_of_every_activation(activation: str) -> None:
    agree(inputs(), padding=[1, 1, 1, 1], activation=activation)


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": [0, 0, 0, 0]},
        {"padding": [2, 1, 0, 1]},
        {"padding": [1, 1, 1, 1], "stride": 2},
        {"padding": [2, 2, 2, 2], "dilation": 2},
        {"padding": [1, 0, 1, 0], "groups": 2},
    ],
)
def test_gradients_of_every_geometry(geometry) -> None:
    agree(inputs(geometry.get("groups", 1)), activation="relu", **geometry)


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_residual_gets_its_gradient(order: str) -> None:
    residual = torch.randn(2, 4, 9, 8, requires_grad=True)
    agree(inputs(), padding=[1, 1, 1, 1], activation="hardswish", residual=residual, order=order)


def test_absent_bias_gamma_and_beta() -> None:
    t = inputs()
    agree({"x": t["x"], "weight": t["weight"]}, padding=[1, 1, 1, 1], activation="relu")


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "gamma", "beta"])
def test_only_what_is_asked_for_gets_a_gradient(wanted: str) -> None:
    t = {name: value.detach().requires_grad_(name == wanted) for name, value in inputs().items()}
    agree(t, padding=[1, 1, 1, 1], activation="silu")


def test_channels_last_and_contiguous_inputs_agree() -> None:
    t = inputs()
    flipped = t | {"x": t["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()}
    results = [ours(v, padding=[1, 1, 1, 1], activation="relu") for v in (t, flipped)]
    for y in results:
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_second_derivatives() -> None:
    def norm_of_gradient(function):
        t = inputs()
        torch.manual_seed(1)
        y = function(t, padding=[1, 1, 1, 1], activation="tanh").square().sum()
        (gradient,) = torch.autograd.grad(y, t["x"], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [t["x"], t["weight"], t["gamma"]])

    torch.manual_seed(3)
    first = norm_of_gradient(ours)
    torch.manual_seed(3)
    for a, b in zip(first, norm_of_gradient(composed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_gradient_compiles() -> None:
    t = inputs()
    step = torch.compile(lambda **v: ours(v, padding=[1, 1, 1, 1], activation="relu").square().sum(), fullgraph=True)
    a = torch.autograd.grad(step(**t), list(t.values()))
    b = torch.autograd.grad(composed(t, padding=[1, 1, 1, 1], activation="relu").square().sum(), list(t.values()))
    for one, two in zip(a, b, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
