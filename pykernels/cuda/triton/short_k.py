"""The int8 GEMM of layers of a short K, such as 1x1 convolutions of 64 to 256 channels, on sm_90: bytes in, bytes out.

Such layers write more than they multiply: 256 outputs a pixel for 64 inputs. So what each output costs beside its
products is kept to little more than the epilogue's own arithmetic (epilogue.scaled): a program keeps its columns'
weights in shared memory, and their factors and addends in registers, and goes down the rows; tiles of rows come by TMA
several ahead, and leave by TMA while the next one multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pykernels.cuda.triton import tiles
from pykernels.cuda.triton.arguments import ceil_div
from pykernels.cuda.triton.epilogue import OPTIONS, folded, scaled

__all__ = ["Short", "can", "fits", "launch", "short_of"]

LONGEST = 256  # K
FEWEST_TILES = 3  # of a program
BYTE_KINDS = ("uint8", "int8")


@triton.jit(do_not_specialize=["M", "x_zero_point", "residual_zero_point", "zero_point"])
def _gemm_short(
    a, b, out, residual, sums, scales, biases, M, N, x_scale, x_zero_point, residual_scale, residual_zero_point,
    inverse, zero_point,
    FLIP: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """a [M, K], b [N, K], out and residual [M, N] are descriptors; the rest is gemm.py's."""
    tiles_n = tl.cdiv(N, BN)
    first = tl.program_id(0) % tiles_n * BN
    n = first + tl.arange(0, BN)
    scale = tl.load(scales + n, mask=n < N, other=0.0) * x_scale
    bias = tl.load(biases + n, mask=n < N, other=0.0)
    multiplier, addend, factor, low, high = folded(
        scale, bias, residual_scale, residual_zero_point, inverse, zero_point, ACTIVATION, RESIDUAL, OUT
    )
    shift = tl.zeros([BN], tl.int32)
    if sums is not None:
        shift = x_zero_point * tl.load(sums + n, mask=n < N, other=0)
    w = b.load([first, 0])
    rows = tl.cdiv(M, BM)
    for tile in tl.range(tl.program_id(0) // tiles_n, rows, tl.num_programs(0) // tiles_n, num_stages=STAGES):
        x = a.load([tile * BM, 0])
        if FLIP:
            x = (x ^ 0x80).to(tl.int8, bitcast=True)
        acc = tl.dot(x, w.T, out_dtype=tl.int32) - shift[None, :]
        r = None
        if RESIDUAL is not None:
            r = residual.load([tile * BM, first])
        q = scaled(acc, r, multiplier[None, :], addend[None, :], factor, low, high, RESIDUAL, OUT)
        out.store([tile * BM, first], q)


# ---- launcher ----


@dataclass(frozen=True)
class Short:
    """How it is cut up: a tile's rows and columns, warps, stages, programs that a multiprocessor holds."""

    bm: int
    bn: int
    warps: int
    stages: int
    resident: int


def short_of(k: int) -> Short:
    """64 columns, whose factors and addends are 32 registers a thread; as many tiles of rows as shared memory holds."""
    return Short(128, 64, 4, 4, 3) if k <= 128 else Short(128, 64, 4, 3, 2)


def fits(arch: int, processors: int, m: int, n: int, k: int) -> bool:
    """Whether it is made for a product: K is short, no longer than a row of the output, and rows are many."""
    c = short_of(k)
    columns, programs = ceil_div(n, c.bn), processors * c.resident
    enough = ceil_div(m, c.bm) * columns >= FEWEST_TILES * programs
    return arch == 90 and k <= min(n, LONGEST) and n % 16 == 0 and columns <= programs and enough


def can(arguments: dict[str, Any]) -> bool:
    """Whether all that follows the sums is linear, and of bytes; `arguments` are those of _gemm."""
    linear = arguments["ACTIVATION"] in ("none", "relu", "relu6") and arguments["row_scale"] is None
    residual = arguments["residual"]
    bytes_in = residual is None or (arguments["RESIDUAL"] in ("uint8", "int8") and residual.data_ptr() % 16 == 0)
    return linear and bytes_in and not (residual is not None and arguments["AFTER"]) and arguments["OUT"] in BYTE_KINDS


def launch(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, flip: bool, processors: int, arguments: dict[str, Any]
) -> None:
    """As gemm.gemm, where it fits and can."""
    (m, k), n = a.shape, b.shape[0]
    c, depth = short_of(k), max(32, triton.next_power_of_2(k))
    columns = ceil_div(n, c.bn)
    programs = min(ceil_div(m, c.bm), processors * c.resident // columns) * columns
    taken = {name: value for name, value in arguments.items() if name in _gemm_short.arg_names}
    residual = taken.pop("residual")

    def rows(t: torch.Tensor) -> TensorDescriptor:
        return TensorDescriptor(t.as_strided((m, n), (n, 1)), [m, n], [n, 1], [c.bm, c.bn])

    with tiles.on(a.device):
        _gemm_short[(programs,)](
            TensorDescriptor(a, [m, k], [a.stride(0), 1], [c.bm, depth]),
            TensorDescriptor(b, [n, k], [b.stride(0), 1], [c.bn, depth]),
            rows(out), None if residual is None else rows(residual), M=m, N=n, FLIP=flip, BM=c.bm, BN=c.bn, BK=depth,
            STAGES=c.stages, **taken, num_warps=c.warps, **OPTIONS,
        )  # fmt: skip
