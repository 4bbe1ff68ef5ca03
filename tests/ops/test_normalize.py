"""Softmax and layer norm: torch's answers, the same bits on every isa."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pykernels import reference
from pykernels.ops import normalize
from pykernels.ops.dtypes import REALS

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert got.is_contiguous()


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (3, 7), (2, 3, 16), (2, 197), (1, 1000), (2, 2, 3, 70)])
def test_softmax_is_the_oracles(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x in (
        torch.randn(shape).to(dtype) * 5,
        (torch.randn(shape[::-1]).to(dtype) * 5).permute(*range(len(shape))[::-1]),
    ):
        for dim in range(-len(shape), len(shape)):
            close(normalize.softmax(x, dim), reference.softmax(x, dim))


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (3, 7), (2, 3, 16), (2, 197), (1, 1000)])
def test_layer_norm_is_the_oracles(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    for parameters in ((weight, bias), (weight, None), (None, bias), (None, None)):
        close(normalize.layer_norm(x, *parameters, 1e-5), reference.layer_norm(x, *parameters, 1e-5))


def test_answers_are_the_same_bits_on_every_isa(isa: str) -> None:
    x = torch.randn(3, 5, 203)
    calls = [lambda: normalize.softmax(x, -1), lambda: normalize.softmax(x, 1), lambda: normalize.layer_norm(x)]
    got = [call() for call in calls]
    torch.ops.pykernels._set_isa("scalar")
    for a, call in zip(got, calls, strict=True):
        assert torch.equal(a, call())


def test_a_row_with_a_nan_is_nan_and_infinities_are_torchs(isa: str) -> None:
    x = torch.zeros(5, 40)
    x[0, 39], x[1, 3], x[2, 17], x[3] = torch.nan, torch.nan, torch.inf, -torch.inf
    x[4, :20] = -torch.inf
    close(normalize.softmax(x, -1), F.softmax(x, -1))
    close(normalize.softmax(x.t(), 0), F.softmax(x.t(), 0).contiguous())


def test_no_elements() -> None:
    assert normalize.softmax(torch.empty(0, 3)).shape == (0, 3)
    assert normalize.softmax(torch.empty(3, 0)).shape == (3, 0)
    assert normalize.layer_norm(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be float32, bfloat16 or float16, not int64", lambda: normalize.softmax(torch.arange(3))),
        (r"dim must lie in \[-2, 1\]", lambda: normalize.softmax(torch.zeros(2, 2), 2)),
        ("x must be float32, bfloat16 or float16, not float64", lambda: normalize.layer_norm(torch.zeros(3).double())),
        ("x must have a dimension", lambda: normalize.layer_norm(torch.zeros(()))),
        (r"weight must be float32 of shape \[3\]", lambda: normalize.layer_norm(torch.zeros(3), torch.zeros(4))),
        (
            r"bias must be float32 of shape \[3\], not float16",
            lambda: normalize.layer_norm(torch.zeros(3), None, torch.zeros(3).half()),
        ),
    ],
)
def test_bad_arguments_are_named(message: str, call) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
