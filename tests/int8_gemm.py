"""The int8 GEMM of the CUDA library: calls that cover it, and its answer from the oracle, wherever it runs.

Used by the emulated device of the tests and by `make gpu-check`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from pykernels.reference.quantize import ACTIVATIONS, requantize

DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
ORDERS = (None, "before", "after")


def arguments(
    m: int, n: int, k: int, dtype: torch.dtype, order: str | None, activation: str, device: str = "cpu"
) -> dict[str, Any]:
    """Those of `_cuda_int8_gemm` but for `out` and `config`: random, with rows of their own scales where m + n is even."""
    byte = not dtype.is_floating_point
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    rows = (m + n) % 2 == 0
    residual = torch.randn(m, n, device=device).mul(40 if byte else 1).clamp(0, 100).to(dtype)
    return {
        "a": torch.randint(0, 256, (m, k), dtype=torch.uint8, device=device),
        "b": b,
        "column_scale": torch.rand(n, device=device) * 1e-3 + 1e-4,
        "column_sum": b.sum(1, dtype=torch.int32),
        "bias": torch.randn(n, device=device),
        "row_scale": torch.rand(m, device=device) + 0.01 if rows else None,
        "row_zero_point": torch.randint(0, 256, (m,), dtype=torch.int32, device=device) if rows else None,
        "x_scale": 0.37,
        "x_zero_point": 131,
        "out_scale": 0.11,
        "out_zero_point": 5 if byte else 0,
        "activation": activation,
        "residual": residual if order else None,
        "residual_scale": 0.07,
        "residual_zero_point": 9 if byte else 0,
        "residual_order": order or "before",
    }


def calls(sizes: list[tuple[int, int, int]], swapped: bool) -> Iterator[tuple[Any, ...]]:
    """Every size by dtype and order of the residual, the activations in turn. Swapped configurations take no residual."""
    spread = itertools.cycle(ACTIVATIONS)
    for (m, n, k), dtype, order in itertools.product(sizes, DTYPES, ORDERS[:1] if swapped else ORDERS):
        yield m, n, k, dtype, order, next(spread)


def _activated(f: torch.Tensor, activation: str) -> torch.Tensor:
    """By the CPU library, whose source the kernels share: torch's own exp, tanh and erf are other approximations."""
    column = f.reshape(-1, 1)
    packed = torch.ops.pykernels.linear_pack(torch.ones(1, 1), None)
    return torch.ops.pykernels.linear(column, packed, 1, activation).reshape(f.shape)


def expected(given: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, to the bit: exact sums, and torch operations, each of which rounds by itself."""
    given = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    a, b, r = given["a"], given["b"], given["residual"]
    zero = given["row_zero_point"][:, None] if given["row_zero_point"] is not None else given["x_zero_point"]
    scale = given["row_scale"][:, None] if given["row_scale"] is not None else torch.tensor(given["x_scale"])
    acc = ((a.double() - zero) @ b.double().t()).to(torch.int32)
    f = acc.float() * (scale.float() * given["column_scale"])
    f = f + given["bias"]
    if r is not None and not r.is_floating_point():
        r = (r.int() - given["residual_zero_point"]).float() * torch.tensor(given["residual_scale"])
    if r is not None and given["residual_order"] == "before":
        f = f + r.float()
    f = _activated(f, given["activation"])
    if r is not None and given["residual_order"] == "after":
        f = f + r.float()
    return requantize(f, given["out_scale"], given["out_zero_point"], dtype)
