"""Arguments of the launchers, checked as csrc/common/stable.h does on the CPU, in its words; dense layouts; fp32."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from pykernels.cuda.triton.tiles import check
from pykernels.ops.dtypes import REAL_NAMES, REAL_WORDS, REALS
from pykernels.ops.names import ACTIVATIONS, words

BYTES = (torch.uint8, torch.int8)
# What a kernel calls a dtype.
KINDS = {
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int32: "int32",
    **REAL_NAMES,
}

_ACTIVATIONS = words(ACTIVATIONS)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_device(op: str, argument: str, t: torch.Tensor, like: torch.Tensor) -> None:
    check(t.device == like.device, op, f"{argument} must be on {like.device}, not on {t.device}")


def check_real_dtype(op: str, argument: str, dtype: torch.dtype) -> None:
    check(dtype in REALS, op, f"{argument} must be {REAL_WORDS}, not {name(dtype)}")


def check_byte_dtype(op: str, argument: str, dtype: torch.dtype) -> None:
    check(dtype in BYTES, op, f"{argument} must be uint8 or int8, not {name(dtype)}")


def check_dim(op: str, argument: str, t: torch.Tensor, dim: int) -> None:
    check(t.dim() == dim, op, f"{argument} must have {dim} dimensions, not shape {list(t.shape)}")


def check_scale(op: str, argument: str, scale: float) -> None:
    """Finite and positive, and so is its reciprocal in fp32."""
    good = single(scale) > 0 and np.isfinite(single(scale)) and 0 < inverse(scale) < np.inf
    check(good, op, f"{argument} must be a positive number that fp32 holds, not {scale:g}")


def check_zero_point(op: str, argument: str, zero_point: int, dtype: torch.dtype) -> None:
    low, high = limits(dtype)
    good = low <= zero_point <= high
    check(good, op, f"{argument} must lie in [{low}, {high}] for {name(dtype)}, not {zero_point}")


def check_activation(op: str, activation: str) -> None:
    check(activation in ACTIVATIONS, op, f"activation must be one of {_ACTIVATIONS}, not '{activation}'")


def check_pair(op: str, argument: str, pair: Sequence[int], least: int) -> None:
    check(len(pair) == 2, op, f"{argument} must have 2 numbers, not {len(pair)}")
    for number in pair:
        good = least <= number < 2**31
        check(good, op, f"{argument} must be at least {least} and below 2^31, not {number}")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def limits(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the greatest value of uint8 or int8."""
    return (0, 255) if dtype == torch.uint8 else (-128, 127)


@functools.lru_cache(4096)
def single(number: float) -> float:
    """Rounded to fp32, as the CPU's ops take their scales. Infinity beyond its range."""
    with np.errstate(over="ignore"):
        return float(np.float32(number))


@functools.lru_cache(4096)
def inverse(scale: float) -> float:
    """1 / scale, both in fp32."""
    with np.errstate(over="ignore", divide="ignore"):
        return float(np.float32(1) / np.float32(scale))


def is_channels_last(t: torch.Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def is_dense(t: torch.Tensor) -> bool:
    """Elements fill their memory without holes or overlaps, in whatever order of the dimensions."""
    if t.is_contiguous() or is_channels_last(t):
        return True
    filled = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride != filled:
            return False
        filled *= size
    return True


def dense(t: torch.Tensor) -> torch.Tensor:
    """t itself, or a dense copy in the order of its strides: what an expanded, overlapping or strided input becomes."""
    return t if is_dense(t) else torch.empty_like(t).copy_(t)


def in_layout_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """b, whose shape broadcasts to that of the dense tensor a, in the layout of a."""
    same = a.shape == b.shape and all(
        size == 1 or i == j for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
    return b if same else torch.empty_like(a, dtype=b.dtype).copy_(b)


def as_bits(t: torch.Tensor) -> torch.Tensor:
    """What a kernel gets for a tensor: bf16 as its bits, see reals.py."""
    return t.view(torch.uint16) if t.dtype == torch.bfloat16 else t
