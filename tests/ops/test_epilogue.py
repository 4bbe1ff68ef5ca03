"""The integer epilogue at its edges: what no network has, and every isa must answer alike."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pykernels import reference

ops = torch.ops.pykernels

K, N = 20, 37
EXTREMES = (0.0, math.nan, math.inf, -math.inf, 3.0e38, -1.5, 6.2)


def linear(x: torch.Tensor, bias: torch.Tensor, x_scale: float, out_scale: float, dtype: torch.dtype, act: str) -> None:
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    scale = torch.rand(N) * 0.1 + 1e-3
    packed = ops.int8_linear_pack(weight, scale, bias)
    zero = 3 if x.dtype is torch.uint8 else -5
    out_zero = 131 if dtype is torch.uint8 else -7
    given = {"x_scale": x_scale, "x_zero_point": zero, "out_scale": out_scale, "out_zero_point": out_zero}
    given |= {"out_dtype": dtype, "activation": act}
    actual = ops.int8_linear(x, packed, N, **given)
    assert torch.equal(actual, reference.int8_linear(x, weight, scale, bias, **given))


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize(("x_dtype", "dtype"), list(itertools.product((torch.uint8, torch.int8), repeat=2)), ids=str)
def test_biases_and_scales_beyond_reason(isa: str, x_dtype: torch.dtype, dtype: torch.dtype, act: str) -> None:
    torch.manual_seed(0)
    low = 0 if x_dtype is torch.uint8 else -128
    x = torch.randint(low, low + 256, (13, K), dtype=x_dtype)
    x[0] = 3 if x_dtype is torch.uint8 else -5  # all zeros: sums are 0
    bias = torch.tensor(EXTREMES).repeat(6)[:N].clone()
    for x_scale, out_scale in ((0.02, 0.1), (1e30, 1e-30), (1e-30, 1e30), (0.5, 1e-6)):
        linear(x, bias, x_scale, out_scale, dtype, act)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("residual", [torch.uint8, torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [16, 21])
@pytest.mark.parametrize("groups", ["dense", "depthwise"])
def test_residuals_of_every_kind(isa: str, groups: str, channels: int, residual: torch.dtype, order: str) -> None:
    """Whole panels finish in registers, others in memory; depthwise layers have kernels of their own."""
    torch.manual_seed(1)
    depthwise = groups == "depthwise"
    c = channels if depthwise else 8
    x = torch.randint(0, 256, (2, c, 9, 7), dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, (channels, 1 if depthwise else c, 3, 3), dtype=torch.int8)
    scale, bias = torch.rand(channels) * 0.01 + 1e-4, torch.randn(channels)
    packed = ops.qconv2d_pack(weight, scale, bias, channels if depthwise else 1)
    low = -128 if residual is torch.int8 else 0
    r = torch.randint(low, low + 256, (2, channels, 9, 7)).to(residual).to(memory_format=torch.channels_last)
    for dtype, act, r_scale in itertools.product((torch.uint8, torch.int8), ("none", "relu6", "silu"), (0.03, 1e30)):
        given = {"x_scale": 0.02, "x_zero_point": 7, "out_scale": 0.05, "out_zero_point": 11, "out_dtype": dtype}
        given |= {"activation": act, "residual": r, "residual_order": order}
        given |= {"residual_scale": r_scale, "residual_zero_point": low + 9}
        where = [[1, 1], [1, 1, 1, 1], [1, 1], channels if depthwise else 1]
        actual = ops.qconv2d(x, packed, channels, [3, 3], *where, **given)
        expected = reference.qconv2d(x, weight, scale, bias, *where, **given)
        far = (actual.int() - expected.int()).abs().max()
        assert far <= (act == "silu")  # whose exponential is the kernels' own
