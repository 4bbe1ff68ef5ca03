"""Inputs of the tests that interpret, and what the same answer means."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

LOW = {torch.uint8: 0, torch.int8: -128}
FP32, BF16, FP16, U8, S8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, -1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "offset": lambda x: F.pad(x, (1, 1))[..., 1:-1],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
    "overlapping": lambda x: x.reshape(-1).as_strided((x.numel() // 2, 2), (1, 1)),
}


def numbers(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 3.0) -> torch.Tensor:
    """With halves between two codes, infinities, NaNs and both zeros among them."""
    x = torch.randn(shape) * spread
    x = torch.where(torch.rand(shape) < 0.2, torch.randint(-30, 30, shape) * 0.125, x)
    for value in (torch.nan, torch.inf, -torch.inf, -0.0, 3e38, 1e-42):
        x[torch.rand(shape) < 0.01] = value
    return x.to(dtype)


def codes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(LOW[dtype], LOW[dtype] + 256, shape, dtype=dtype)


def same(got: torch.Tensor, expected: torch.Tensor, like: torch.Tensor | None = None) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    if like is not None:
        assert got.stride() == torch.empty_like(like).stride()
