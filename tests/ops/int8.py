"""Inputs for the ops on bytes: numbers, codes, layouts, and what the same answer means."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

BYTES = [torch.uint8, torch.int8]
REALS = [torch.float32, torch.bfloat16, torch.float16]
LOW = {torch.uint8: 0, torch.int8: -128}

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).flatmap(
    lambda head: st.integers(1, 70).map(lambda last: (*head, last))
)
scales = st.floats(2.0**-13, 8.0, width=32)
seeds = st.integers(0, 2**31)


def zero_points(dtype: torch.dtype) -> st.SearchStrategy[int]:
    return st.integers(LOW[dtype], LOW[dtype] + 255)


def reals(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def codes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    low = LOW[dtype]
    return torch.randint(low, low + 256, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _reversed(x: torch.Tensor) -> torch.Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "permuted": _reversed,
    "transposed": lambda x: x.transpose(0, -1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "offset": lambda x: F.pad(x, (1, 1))[..., 1:-1],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
    "overlapping": lambda x: x.reshape(-1).as_strided((x.numel() // 2, 2), (1, 1)),
}
layouts = st.sampled_from(list(LAYOUTS))


def assert_same(got: torch.Tensor, expected: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """The same bits, and the strides of torch.empty_like(like)."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    if like is not None:
        assert got.stride() == torch.empty_like(like).stride()


EMPTY = [(0,), (0, 5), (5, 0), (2, 0, 3, 3), (2, 3, 0, 4)]
