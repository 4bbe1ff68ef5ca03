"""Layer norms that are written out become one step; what only looks like one does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import pykernels as pk
from tests.networks import ops

SCALE, SHIFT = torch.randn(8), torch.randn(8)


def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean, and the mean square of what differs from it."""
    mean = x.mean(-1, keepdim=True)
    return mean, (x - mean).pow(2).mean(-1, keepdim=True)


def plain(x: torch.Tensor) -> torch.Tensor:
    mean, variance = parts(x)
    return (x - mean) / torch.sqrt(variance + 1e-5)


def by_product(x: torch.Tensor) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean((2,), keepdim=True)
    return SCALE * (torch.rsqrt(variance + 1e-5) * centred) + SHIFT


def of_tensorflow(x: torch.Tensor) -> torch.Tensor:
    mean, variance = parts(x)
    factor = torch.reciprocal(torch.sqrt(variance + 1e-5)) * SCALE
    return x * factor + (SHIFT - mean * factor)


class Norm(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "function", [plain, lambda x: plain(x) * SCALE, lambda x: SHIFT + plain(x) * SCALE, by_product, of_tensorflow],
    ids=["plain", "scale", "scale and shift", "by a product", "of TensorFlow"],
)  # fmt: skip
def test_a_layer_norm_that_is_written_out(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(3, 5, 8)
    fast = pk.optimize(Norm(function), (x,))
    assert ops(fast) == ["pykernels.layer_norm"]
    torch.testing.assert_close(fast(x), function(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x - x.mean(1, keepdim=True)) / torch.sqrt((x - x.mean(1, keepdim=True)).pow(2).mean(1, True) + 1e-5),
        lambda x: (x - x.amax(-1, keepdim=True)) / torch.sqrt(parts(x)[1] + 1e-5),
        lambda x: (x.relu() - x.relu().mean(-1, keepdim=True)) / torch.sqrt(parts(x)[1] + 1e-5),
        lambda x: (x - parts(x)[0]) / torch.sqrt((x - parts(x)[0]).pow(3).mean(-1, keepdim=True).abs() + 1e-5),
    ],
    ids=["another dimension", "not the mean", "of another value", "not the square"],
)
def test_what_is_no_layer_norm_stays(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(3, 5, 8)
    fast = pk.optimize(Norm(function), (x,))
    assert "pykernels.layer_norm" not in ops(fast)
    torch.testing.assert_close(fast(x), function(x), atol=1e-5, rtol=1e-5)


def test_a_scale_of_another_shape_is_no_part_of_it() -> None:
    scale = torch.randn(5, 1)
    x = torch.randn(3, 5, 8)
    fast = pk.optimize(Norm(lambda x: plain(x) * scale), (x,))
    assert "pykernels.layer_norm" in ops(fast)
    torch.testing.assert_close(fast(x), plain(x) * scale, atol=1e-5, rtol=1e-5)
