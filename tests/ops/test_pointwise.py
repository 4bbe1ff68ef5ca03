"""Pointwise functions of real numbers: torch's answers, the same bits on every isa, for every layout."""

from __future__ import annotations

import pytest
import torch
from int8 import LAYOUTS

from pykernels import reference
from pykernels.ops import names, pointwise
from pykernels.ops.dtypes import REALS

# Where kernels have an exp and an erf of their own; hardswish and gelu round in another order than torch's.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
ACTIVATIONS = [name for name in names.ACTIVATIONS if name != "none"]
LAYOUT_NAMES = ["contiguous", "channels_last", "permuted", "strided"]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape) * 3
    for value in (torch.nan, torch.inf, -torch.inf, -0.0, 3e38, 1e-42):
        x[torch.rand(shape) < 0.01] = value
    return x.to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor, like: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.stride() == torch.empty_like(like).stride()
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_the_oracles(isa: str, activation: str, dtype: torch.dtype) -> None:
    for layout in LAYOUT_NAMES:
        x = LAYOUTS[layout](torch.randn(2, 19, 7, 5).to(dtype) * 3)
        close(pointwise.activate(x, activation), reference.activate(x, activation), like=x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_answers_are_the_same_bits_on_every_isa_and_nans_stay(isa: str, activation: str) -> None:
    x = numbers(1001)
    got = pointwise.activate(x, activation), pointwise.add(x, x.flip(0), activation), pointwise.leaky_relu(x, 0.1)
    torch.ops.pykernels._set_isa("scalar")
    expected = pointwise.activate(x, activation), pointwise.add(x, x.flip(0), activation), pointwise.leaky_relu(x, 0.1)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert got[0][x.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("slope", [0.01, 0.2, -1.5, 0.0])
def test_leaky_relu_is_torchs(isa: str, slope: float, dtype: torch.dtype) -> None:
    for layout in LAYOUT_NAMES:
        x = LAYOUTS[layout](numbers(2, 19, 7, 5, dtype=dtype))
        got = pointwise.leaky_relu(x, slope)
        for expected in (reference.leaky_relu(x, slope), torch.nn.functional.leaky_relu(x, slope)):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert got.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_a_sum_and_its_activation(isa: str, activation: str, gate: bool, dtype: torch.dtype) -> None:
    for layout in LAYOUT_NAMES:
        a = LAYOUTS[layout](torch.randn(2, 19, 7, 5).to(dtype))
        b = torch.randn(*a.shape[:2], 1, 1) if gate else torch.randn(a.shape)
        b = b.to(dtype)
        close(pointwise.add(a, b, activation), reference.add(a, b, activation), like=a)


def test_no_elements(isa: str) -> None:
    x = torch.empty(2, 0, 3, 3)
    for got in (pointwise.add(x, x), pointwise.activate(x, "silu"), pointwise.leaky_relu(x)):
        assert got.shape == x.shape


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be float32, bfloat16 or float16, not int64", lambda: pointwise.activate(torch.arange(3), "relu")),
        ("activation must be one of none, relu", lambda: pointwise.activate(torch.zeros(3), "swish")),
        ("x must be float32, bfloat16 or float16, not uint8", lambda: pointwise.leaky_relu(torch.zeros(3).byte())),
        ("b must be float32 as a is, not bfloat16", lambda: pointwise.add(torch.zeros(3), torch.zeros(3).bfloat16())),
        (r"b must have the shape of a, \[3\]", lambda: pointwise.add(torch.zeros(3), torch.zeros(1))),
        ("activation must be one of none, relu", lambda: pointwise.add(torch.zeros(3), torch.zeros(3), "swish")),
    ],
)
def test_bad_arguments_are_named(message: str, call) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
