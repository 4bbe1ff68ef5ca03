"""Pointwise functions of real numbers in one pass: add, activate and leaky_relu, see pykernels/ops/pointwise.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton.arguments import (
    KINDS,
    as_bits,
    check_activation,
    check_device,
    check_real_dtype,
    dense,
    in_layout_of,
    name,
)
from pykernels.cuda.triton.epilogue import OPTIONS
from pykernels.cuda.triton.epilogue import activate as activated
from pykernels.cuda.triton.planes import TILE, flat
from pykernels.cuda.triton.reals import load_real, store_real
from pykernels.cuda.triton.tiles import check, on

__all__ = ["activate", "add", "leaky_relu"]


@triton.jit
def _pointwise(
    a, b, out, n, slope, OP: tl.constexpr, ACTIVATION: tl.constexpr, REAL: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    i = flat(TILE)
    f = load_real(a + i, i < n, REAL)
    if OP == "add":
        f = f + load_real(b + i, i < n, REAL)
    if OP == "leaky_relu":
        f = tl.where(f > 0, f, f * slope)
    store_real(out + i, activated(f, ACTIVATION), i < n, REAL)


def _run(op: str, a: torch.Tensor, b: torch.Tensor | None, activation: str = "none", slope: float = 0.0) -> Any:
    a = dense(a)
    out = torch.empty_like(a)
    if a.numel() > 0:
        other = None if b is None else as_bits(in_layout_of(a, b))
        with on(a.device):
            _pointwise[(triton.cdiv(a.numel(), TILE),)](
                as_bits(a), other, as_bits(out), a.numel(), slope, OP=op, ACTIVATION=activation, REAL=KINDS[a.dtype],
                TILE=TILE, **OPTIONS,
            )  # fmt: skip
    return out


def add(a: torch.Tensor, b: torch.Tensor, activation: str = "none") -> torch.Tensor:
    op = "add"
    check_real_dtype(op, "a", a.dtype)
    check_real_dtype(op, "b", b.dtype)
    check_device(op, "b", b, a)
    check(b.dtype == a.dtype, op, f"b must be {name(a.dtype)} as a is, not {name(b.dtype)}")
    check_activation(op, activation)
    fits = a.shape == b.shape or (a.dim() == 4 and b.shape == (*a.shape[:2], 1, 1))
    words = f"b must have the shape of a, {list(a.shape)}, or be [N, C, 1, 1] against [N, C, H, W]"
    check(fits, op, f"{words}, not {list(b.shape)}")
    return _run(op, a, b, activation)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    check_real_dtype("activate", "x", x.dtype)
    check_activation("activate", activation)
    return _run("activate", x, None, activation)


def leaky_relu(x: torch.Tensor, negative_slope: float) -> torch.Tensor:
    check_real_dtype("leaky_relu", "x", x.dtype)
    return _run("leaky_relu", x, None, slope=negative_slope)
