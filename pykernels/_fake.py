"""Shape functions of the ops: what torch.compile and torch.export see instead of a kernel.

Each follows its op's section in csrc/schema.cpp. They must be right for contiguous and channels_last inputs and for symbolic
sizes, so they compute with sizes only and never read a packed tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from pykernels import _load

F = TypeVar("F", bound=Callable[..., object])


def fake(name: str) -> Callable[[F], F]:
    """Register the decorated shape function of the op `name`; without the library there is no op to register it for."""

    def register(function: F) -> F:
        if _load.CPU_ERROR is None:
            torch.library.register_fake(f"pykernels::{name}", function)
        return function

    return register


# ---- quantize: outputs keep the dense layout of their (first) input, as torch.empty_like does ----


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


def _per_row(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=dtype)


@fake("quantize_per_tensor")
@fake("dequantize_per_tensor")
def _(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    return _like(x, dtype)


@fake("quantize_per_channel")
@fake("dequantize_per_channel")
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, dtype: torch.dtype) -> torch.Tensor:
    return _like(x, dtype)


@fake("quantize_per_token")
def _(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _like(x, dtype), _per_row(x, torch.float32), _per_row(x, torch.int32)


@fake("dequantize_per_token")
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _like(x, dtype)


@fake("quantize_per_block")
def _(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(x, torch.int8), x.new_empty(((x.numel() + block_size - 1) // block_size,), dtype=torch.float32)


@fake("dequantize_per_block")
def _(x: torch.Tensor, scale: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    return _like(x, dtype)


@fake("qadd")
@fake("qmul")
def _(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: float,
    a_zero_point: int,
    b_scale: float,
    b_zero_point: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
    activation: str = "none",
) -> torch.Tensor:
    return _like(a, out_dtype)


@fake("qcat")
def _(
    xs: list[torch.Tensor],
    scales: list[float],
    zero_points: list[int],
    dim: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    first = xs[0]
    size = list(first.shape)
    size[dim] = sum(x.shape[dim] for x in xs)
    channels_last = (
        first.dim() == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=out_dtype, device=first.device, memory_format=layout)


@fake("qlookup")
def _(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return _like(x, table.dtype)
