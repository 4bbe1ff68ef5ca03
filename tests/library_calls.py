"""Calls that cover the CUDA library's private ops, and their answers from the oracle, wherever they run.

Used by the emulated device of the tests and by `make gpu-check`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pykernels.reference.dot import finish_sums, fma
from pykernels.reference.quantize import ACTIVATIONS, requantize

DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
ORDERS = (None, "before", "after")  # of a residual, or none
Gemm = tuple[int, int, int]  # m, n, k
# Images, output channels, kernel, stride, padding (left, right, top, bottom), dilation.
Conv = tuple[
    tuple[int, int, int, int], int, tuple[int, int], tuple[int, int], tuple[int, int, int, int], tuple[int, int]
]


@dataclass
class Case:
    """One call of a private op.

    Attributes:
        title: in words.
        given: its arguments by name, but for `config`; `out` is to be filled.
        expected: what it is to be filled with, as rows [m, n], on the CPU.
    """

    title: str
    given: dict[str, Any]
    expected: torch.Tensor

    def complaint(self) -> str | None:
        """What is wrong with `out`, or None. A sigmoid below 2^-126 may be one step off (csrc/cuda/vec.h)."""
        out = self.given["out"]
        actual = out.movedim(1, -1).reshape(self.expected.shape).cpu()
        far = (actual.double() - self.expected.double()).abs().nan_to_num(torch.inf)
        wrong = (actual != self.expected) & (far > 2.0**-140)  # silu is up to 2^7 times as far
        if not wrong.any():
            return None
        return f"{int(wrong.sum())} of {far.numel()} elements differ, by {far.max():.3g}"


def _activated(f: torch.Tensor, activation: str) -> torch.Tensor:
    """By the CPU library, whose source the kernels share: torch's own exp, tanh and erf are other approximations."""
    column = f.reshape(-1, 1)
    packed = torch.ops.pykernels.linear_pack(torch.ones(1, 1), None)
    return torch.ops.pykernels.linear(column, packed, 1, activation).reshape(f.shape)


def _finished(acc: torch.Tensor, dtype: torch.dtype, given: dict[str, Any]) -> torch.Tensor:
    """What the oracle makes of exact sums [m, n], on the CPU."""
    given = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    rows, r = given.get("row_scale"), given["residual"]
    scale = torch.tensor(given["x_scale"]) if rows is None else rows[:, None]
    if r is not None:
        r = r.movedim(1, -1).reshape(acc.shape)
    if given["activation"] in ("none", "relu", "relu6"):
        return finish_sums(
            acc.cpu(), given["column_scale"], given["bias"], scale, given["activation"], given["out_scale"],
            given["out_zero_point"], dtype, r, given["residual_scale"], given["residual_zero_point"],
            given["residual_order"],
        )  # fmt: skip
    f = fma(acc.cpu().float(), scale * given["column_scale"], given["bias"])
    if r is not None and not r.is_floating_point():
        r = (r.int() - given["residual_zero_point"]).float() * torch.tensor(given["residual_scale"])
    if r is not None and given["residual_order"] == "before":
        f = f + r.float()
    f = _activated(f, given["activation"])
    if r is not None and given["residual_order"] == "after":
        f = f + r.float()
    return requantize(f, given["out_scale"], given["out_zero_point"], dtype)


def _finishing(out: torch.Tensor, sums: torch.Tensor, order: str | None, activation: str) -> dict[str, Any]:
    """Arguments of an epilogue, drawn; `sums`: of the weights of each column."""
    byte, device = not out.is_floating_point(), out.device
    residual = None
    if order is not None:
        drawn = torch.randn(out.shape, device=device).mul(40 if byte else 1).clamp(0, 100).to(out.dtype)
        residual = torch.empty_like(out).copy_(drawn)
    return {
        "out": out,
        "column_scale": torch.rand(len(sums), device=device) * 1e-3 + 1e-4,
        "column_sum": sums,
        "bias": torch.randn(len(sums), device=device),
        "x_scale": 0.37,
        "out_scale": 0.11,
        "out_zero_point": 5 if byte else 0,
        "activation": activation,
        "residual": residual,
        "residual_scale": 0.07,
        "residual_zero_point": 9 if byte else 0,
        "residual_order": order or "before",
    }


def gemm_case(size: Gemm, dtype: torch.dtype, order: str | None, activation: str, device: str = "cpu") -> Case:
    """Of `_cuda_int8_gemm`, rows with scales and zero points of their own where m + n is even."""
    m, n, k = size
    a = torch.randint(0, 256, (m, k), dtype=torch.uint8, device=device)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    rows = (m + n) % 2 == 0
    row_zero_point = torch.randint(0, 256, (m,), dtype=torch.int32, device=device) if rows else None
    out = torch.empty(m, n, dtype=dtype, device=device)
    given = {
        "a": a,
        "b": b,
        **_finishing(out, b.sum(1, dtype=torch.int32), order, activation),
        "row_scale": torch.rand(m, device=device) + 0.01 if rows else None,
        "row_zero_point": row_zero_point,
        "x_zero_point": 131,
    }
    zero = 131 if row_zero_point is None else row_zero_point[:, None]
    acc = ((a.double() - zero) @ b.double().t()).to(torch.int32)
    return Case(f"{m}x{n}x{k} {dtype} residual {order} {activation}", given, _finished(acc, dtype, given))


def conv_case(size: Conv, dtype: torch.dtype, order: str | None, activation: str, device: str = "cpu") -> Case:
    """Of `_cuda_int8_conv`; without padding the zero point is not 0."""
    images, n, kernel, stride, padding, dilation = size
    c, nhwc = images[1], torch.channels_last
    x = torch.randint(0, 256, images, dtype=torch.uint8, device=device).to(memory_format=nhwc)
    w = torch.randint(-128, 128, (n, c, *kernel), dtype=torch.int8, device=device)
    zero_point = 0 if any(padding) else 131
    real = F.pad(x.double() - zero_point, padding)
    acc = F.conv2d(real, w.double(), None, stride, 0, dilation).round().to(torch.int32)
    given = {
        "x": x,
        "w": w.permute(0, 2, 3, 1).reshape(n, -1).contiguous(),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        **_finishing(
            torch.empty(acc.shape, dtype=dtype, device=device, memory_format=nhwc),
            w.sum((1, 2, 3), dtype=torch.int32),
            order,
            activation,
        ),
        "x_zero_point": zero_point,
    }
    expected = _finished(acc.movedim(1, -1).reshape(-1, n), dtype, given)
    return Case(f"{images} by {w.shape}/{stride} {dtype} residual {order} {activation}", given, expected)


def few_channels_case(size: Conv, dtype: torch.dtype, order: str | None, activation: str, device: str = "cpu") -> Case:
    """Of `_cuda_int8_few_channels`; x is int8 where the output's channels are an odd multiple of 16."""
    images, n, kernel, stride, padding, _ = size
    c, nhwc = images[1], torch.channels_last
    x_dtype, zero_point = (torch.int8, -19) if n % 32 else (torch.uint8, 131)
    x = torch.randint(0, 256, images, dtype=torch.uint8, device=device).to(memory_format=nhwc).view(x_dtype)
    w = torch.randint(-128, 128, (n, c, *kernel), dtype=torch.int8, device=device)
    acc = F.conv2d(F.pad(x.double() - zero_point, padding), w.double(), None, stride).round().to(torch.int32)
    runs = w.permute(0, 2, 3, 1).reshape(n, kernel[0], kernel[1] * c)
    row = max(16, 1 << (kernel[1] * c - 1).bit_length())
    given = {
        "x": x,
        "w": F.pad(runs, (0, row - kernel[1] * c)).reshape(n, -1).contiguous(),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        **_finishing(
            torch.empty(acc.shape, dtype=dtype, device=device, memory_format=nhwc),
            w.sum((1, 2, 3), dtype=torch.int32),
            order,
            activation,
        ),
        "x_zero_point": zero_point,
    }
    expected = _finished(acc.movedim(1, -1).reshape(-1, n), dtype, given)
    return Case(f"{images} {x_dtype} by {w.shape}/{stride} {dtype} residual {order} {activation}", given, expected)


def variants(sizes: Iterable[Any], swapped: bool) -> Iterator[tuple[Any, torch.dtype, str | None, str]]:
    """Sizes by dtypes by residuals, activations in turn. Swapped configurations take no residual."""
    orders = (None,) if swapped else ORDERS
    return (
        (*variant, activation)
        for variant, activation in zip(
            itertools.product(sizes, DTYPES, orders), itertools.cycle(ACTIVATIONS), strict=False
        )
    )
