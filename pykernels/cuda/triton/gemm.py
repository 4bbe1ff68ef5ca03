"""The int8 GEMM of linear layers and 1x1 convolutions: out = epilogue(a [M, K] @ b [N, K].T), with exact s32 sums.

a is int8, or uint8 that becomes int8 by flipping the sign bit; its zero point is then 128 less. K is contiguous in both
operands, zero-padded to a multiple of 16, and rows begin at multiples of 16 bytes. What follows the sums, in fp32 and
without contraction, is epilogue.finish_sums.

Programs stay and take tile after tile, in an order that lets those at work together share operands in the L2 cache.
From sm_90 on tiles come by TMA, before by asynchronous copies. Where tiles are fewer than multiprocessors, several
programs divide a tile's K, and a second kernel adds up what they found: integers, so no order can matter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pykernels.cuda import tables
from pykernels.cuda.triton import library, short_k, tiles
from pykernels.cuda.triton.arguments import KINDS, as_bits, ceil_div, inverse, single
from pykernels.cuda.triton.epilogue import OPTIONS, finish_sums
from pykernels.cuda.triton.pack import Packed

__all__ = [
    "GROUP",
    "NUMBERS",
    "Config",
    "Epilogue",
    "add_parts",
    "by_formula",
    "config",
    "gemm",
    "machine",
    "measured",
    "place_tile",
    "rows16",
    "split_of",
    "store_tile",
]

STAND_IN = (90, 4)  # what the CPU is taken for, in the interpreter: 10 * major + minor, and multiprocessors
GROUP = 8  # rows of tiles that are at work together
SLICE = tl.constexpr(4096)  # results whose epilogue is computed at once: more fill the registers
# Numbers whose value must not choose the machine code.
NUMBERS = ["M", "x_zero_point", "residual_zero_point", "zero_point"]


@triton.jit
def _accumulate(
    a, b, tile_m, tile_n, first, last, M, N, K, lda, ldb,
    FLIP: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """s32 [BM, BN]: the products of one tile over [first, last) of K. Rows beyond the end get anything."""
    acc = tl.zeros((BM, BN), tl.int32)
    if TMA:
        for k in range(first, last, BK):  # beyond the end TMA reads zeros, and b's make them count nothing
            x = a.load([tile_m * BM, k])
            w = b.load([tile_n * BN, k])
            if FLIP:
                x = (x ^ 0x80).to(tl.int8, bitcast=True)
            acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    else:
        m = tl.minimum(tile_m * BM + tl.arange(0, BM), M - 1).to(tl.int64)
        n = tl.minimum(tile_n * BN + tl.arange(0, BN), N - 1).to(tl.int64)
        j = tl.arange(0, BK)
        a += m[:, None] * lda + (first + j)[None, :]
        b += n[None, :] * ldb + (first + j)[:, None]
        for k in range(first, last, BK):
            there = j < K - k
            x = tl.load(a, mask=there[None, :], other=0)
            w = tl.load(b, mask=there[:, None], other=0)
            if FLIP:
                x = (x ^ 0x80).to(tl.int8, bitcast=True)
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
            a += BK
            b += BK
    return acc


@triton.jit
def _halves(acc):
    """The left and the right half of a tile's columns."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _slices(acc, COUNT: tl.constexpr):
    """A tile's columns in COUNT slices, a power of two: a tuple."""
    if COUNT == 1:
        return (acc,)
    else:
        left, right = _halves(acc)
        return _slices(left, COUNT // 2) + _slices(right, COUNT // 2)


@triton.jit
def place_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of the tile of this number: GROUP rows of tiles at a time, column by column."""
    begin = tile // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - begin, GROUP)
    place = tile % (GROUP * tiles_n)
    return begin + place % rows, place // rows


@triton.jit
def store_tile(
    acc, m, first, part, channel, M, N, OC, out, residual, sums, scales, biases, row_scale, row_zero_point, x_scale,
    x_zero_point, residual_scale, residual_zero_point, inverse, zero_point,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, AFTER: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What the sums `acc` of rows `m` and columns from `first` on come to; with SPLIT > 1 they are stored themselves.

    Column n < N is output channel `channel` + n of OC. `out` is [M, OC], or s32 [SPLIT, M, OC], `part` the first index.
    """
    COUNT: tl.constexpr = (acc.shape[0] * acc.shape[1] + SLICE - 1) // SLICE  # Triton 3.6 knows no constexpr cdiv
    WIDTH: tl.constexpr = acc.shape[1] // COUNT
    slices = _slices(acc, COUNT)
    for i in tl.static_range(COUNT):
        n = first + i * WIDTH + tl.arange(0, WIDTH)
        at = m.to(tl.int64)[:, None] * OC + (channel + n)[None, :]
        if SPLIT > 1:
            target = out + tl.cast(part, tl.int64) * M * OC
            tl.store(target + at, slices[i], mask=(m < M)[:, None] & (n < N)[None, :])
        else:
            finish_sums(
                slices[i], m, channel + n, m < M, n < N, at, out, residual, sums, scales, biases, row_scale,
                row_zero_point, x_scale, x_zero_point, residual_scale, residual_zero_point, inverse, zero_point,
                ACTIVATION, RESIDUAL, AFTER, OUT,
            )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _gemm(
    a, b, out, residual, sums, scales, biases, row_scale, row_zero_point, M, N, K, lda, ldb, x_scale, x_zero_point,
    residual_scale, residual_zero_point, inverse, zero_point,
    FLIP: tl.constexpr, TMA: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, AFTER: tl.constexpr,
    OUT: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """With SPLIT > 1 `out` is s32 [SPLIT, M, N]: the sums of each part of K."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    depth = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    for work in range(tl.program_id(0), tiles_m * tiles_n * SPLIT, tl.num_programs(0)):
        part = work % SPLIT
        tile_m, tile_n = place_tile(work // SPLIT, tiles_m, tiles_n, GROUP)
        first = part * depth
        acc = _accumulate(
            a, b, tile_m, tile_n, first, tl.minimum(first + depth, K), M, N, K, lda, ldb, FLIP, TMA, BM, BN, BK
        )
        store_tile(
            acc, tile_m * BM + tl.arange(0, BM), tile_n * BN, part, 0, M, N, N, out, residual, sums, scales, biases,
            row_scale, row_zero_point, x_scale, x_zero_point, residual_scale, residual_zero_point, inverse, zero_point,
            ACTIVATION, RESIDUAL, AFTER, OUT, SPLIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _add_parts(
    parts, out, residual, sums, scales, biases, row_scale, row_zero_point, M, N, x_scale, x_zero_point,
    residual_scale, residual_zero_point, inverse, zero_point,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, AFTER: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The epilogue of the sum over `parts`, s32 [SPLIT, M, N]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    acc = tl.load(parts + at, mask=mask, other=0)
    for part in tl.static_range(1, SPLIT):
        acc += tl.load(parts + (tl.cast(M, tl.int64) * N * part + at), mask=mask, other=0)
    finish_sums(
        acc, m, n, m < M, n < N, at, out, residual, sums, scales, biases, row_scale, row_zero_point, x_scale,
        x_zero_point, residual_scale, residual_zero_point, inverse, zero_point, ACTIVATION, RESIDUAL, AFTER, OUT,
    )  # fmt: skip


# ---- launchers ----


@dataclass(frozen=True)
class Config:
    """How a GEMM is cut up.

    Attributes:
        bm, bn, bk: rows, columns and depth of a tile.
        warps, stages: of a program; stages are tiles of both operands in shared memory at once.
        resident: programs that one multiprocessor holds.
        split: programs that divide the K of one tile.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    resident: int
    split: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, **OPTIONS}


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """10 * major + minor of the device's compute capability, and its multiprocessors."""
    if device.type != "cuda":
        return STAND_IN
    facts = torch.cuda.get_device_properties(device)
    return 10 * facts.major + facts.minor, facts.multi_processor_count


def split_of(tile: Config, processors: int, m: int, n: int, k: int, groups: int = 1) -> int:
    """How many programs divide a tile's K: as many as the multiprocessors ask for, each part at least four steps."""
    count, steps, split = groups * ceil_div(m, tile.bm) * ceil_div(n, tile.bn), ceil_div(k, tile.bk), 1
    while split < 8 and split * count <= processors and steps >= 8 * split:
        split *= 2
    return split


@functools.lru_cache(4096)
def measured(tile: tuple[int, ...]) -> Config:
    """Of a row of pykernels/cuda/tuned."""
    return Config(*tile)


def config(arch: int, processors: int, m: int, n: int, k: int, adds: bool = False) -> Config:
    """The one that the architecture's table gives, or by formula where it has measured nothing like this.

    `adds`: a residual. Beside 128 x 256 sums that mma holds, Triton 3.8 finds no registers for one.
    """
    found = tables.tile("gemm", m, n, k, arch)
    c = by_formula(arch, processors, m, n, k) if found is None else measured(found)
    return replace(c, bn=c.bn // 2) if adds and arch < 90 and c.bm * c.bn > 128 * 128 else c


@functools.lru_cache(4096)
def by_formula(arch: int, processors: int, m: int, n: int, k: int, groups: int = 1) -> Config:
    """The largest tile of which `groups` products [m, k] x [k, n] have enough for every multiprocessor.

    A byte that comes in is used in BM or BN multiply-adds: small tiles wait for the L2 cache, large ones leave
    multiprocessors idle. 128 x 256 is what 8 warps hold in registers (128 accumulators a thread) beside the operands.
    With 128 x 128, wgmma, which reads its operands from shared memory, leaves registers for a second program that
    multiplies while the first stores. Up to 64 rows it is the weights' way that counts: narrow tiles, deep in K.
    """
    wgmma = arch == 90  # with 227 KiB of shared memory; elsewhere tiles must fit 99 KiB
    deep = 128 if wgmma else 64
    narrow = max(16, triton.next_power_of_2(min(n, 64)))
    if m <= 64:
        found = Config(max(16, triton.next_power_of_2(m)), narrow, 2 * deep, 4, 3, 2)
    else:
        candidates = [
            Config(128, 256, deep, 8, 4 if wgmma else 3, 1),
            Config(128, 128, deep, 8, 3, 2 if wgmma else 1),
            Config(64, 128, deep, 4, 4, 2),
            Config(64, narrow, deep, 4, 4, 3),
        ]
        fit = [c for c in candidates if c.bn <= max(narrow, triton.next_power_of_2(n))]
        enough = [c for c in fit if groups * ceil_div(m, c.bm) * ceil_div(n, c.bn) >= processors]
        found = (enough or fit[-1:])[0]
    return replace(found, split=split_of(found, processors, m, n, k, groups))


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the s32 sums.

    Attributes:
        weights: sums, scales and biases of the output channels; None for an int32 output.
        sums: those of an int32 output; None for a zero point of 0.
        activation: a name in pykernels.ops.names.ACTIVATIONS.
        x_scale, x_zero_point: of x as it was given: shifted here where it is uint8.
        row_scale, row_zero_point: fp32 and int32, one a row, instead of those two.
        residual: like the output, in its memory format; residual_scale, residual_zero_point where it is 8 bit.
        after: add it after the activation.
        out_scale, out_zero_point: of an 8-bit output.
    """

    weights: Packed | None = None
    sums: torch.Tensor | None = None
    activation: str = "none"
    x_scale: float = 1.0
    x_zero_point: int = 0
    row_scale: torch.Tensor | None = None
    row_zero_point: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    residual_scale: float = 1.0
    residual_zero_point: int = 0
    after: bool = False
    out_scale: float = 1.0
    out_zero_point: int = 0

    def arguments(self, out: torch.Tensor, flip: bool) -> dict[str, Any]:
        """What the kernels take, but for out; `flip`: x is uint8."""
        w, r = self.weights, self.residual
        return {
            "residual": None if r is None else as_bits(r),
            "sums": self.sums if w is None else w.sums,
            "scales": None if w is None else w.scales,
            "biases": None if w is None else w.biases,
            "row_scale": self.row_scale,
            "row_zero_point": self.row_zero_point,
            "x_scale": single(self.x_scale),
            "x_zero_point": self.x_zero_point - (128 if flip else 0),
            "residual_scale": single(self.residual_scale),
            "residual_zero_point": self.residual_zero_point,
            "inverse": inverse(self.out_scale),
            "zero_point": self.out_zero_point,
            "ACTIVATION": self.activation,
            "RESIDUAL": None if r is None else KINDS[r.dtype],
            "AFTER": self.after,
            "OUT": KINDS[out.dtype],
        }


def rows16(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [rows, K padded with zeros], its rows at multiples of 16 bytes: itself where they are."""
    k = x.shape[-1]
    rows = x.reshape(x.numel() // k if k else x.shape[:-1].numel(), k)
    aligned = k % 16 == 0 and k > 0 and rows.data_ptr() % 16 == 0
    if aligned and rows.stride(1) == 1 and rows.stride(0) % 16 == 0:
        return rows
    missing = -k % 16 if k else 16
    return F.pad(rows, (0, missing)) if missing else rows.clone(memory_format=torch.contiguous_format)


def gemm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> None:
    """out = epilogue(a @ b.T).

    Args:
        a: [M, K], uint8 or int8, as `rows16` leaves it; b: [N, K], int8, contiguous, K as a's.
        out: M * N elements, row after row; a residual alike.
    """
    m, k = a.shape
    n = b.shape[0]
    if m == 0 or n == 0:
        return
    arch, processors = machine(a.device)
    if library.int8_gemm(a, b, out, epilogue, arch):
        return
    flip = a.dtype == torch.uint8
    arguments = epilogue.arguments(out, flip)
    takes = tables.short_k(m, n, k, epilogue.residual is not None, arch) is not False
    if takes and short_k.fits(arch, processors, m, n, k) and short_k.can(arguments):
        short_k.launch(a, b, out, flip, processors, arguments)
        return
    c = config(arch, processors, m, n, k, epilogue.residual is not None)
    tma = arch >= 90
    operands: tuple[Any, Any] = (a, b)
    if tma:
        operands = (
            TensorDescriptor(a, [m, k], [a.stride(0), 1], [c.bm, c.bk]),
            TensorDescriptor(b, [n, k], [b.stride(0), 1], [c.bn, c.bk]),
        )
    count = ceil_div(m, c.bm) * ceil_div(n, c.bn) * c.split
    parts = torch.empty((c.split, m, n), dtype=torch.int32, device=a.device) if c.split > 1 else None
    with tiles.on(a.device):
        _gemm[(min(count, processors * c.resident),)](
            *operands, as_bits(out) if parts is None else parts, M=m, N=n, K=k, lda=a.stride(0), ldb=b.stride(0),
            FLIP=flip, TMA=tma, SPLIT=c.split, GROUP=GROUP, BM=c.bm, BN=c.bn, BK=c.bk, **arguments, **c.options,
        )  # fmt: skip
        if parts is not None:
            add_parts(parts, out, arguments)


def add_parts(parts: torch.Tensor, out: torch.Tensor, arguments: dict[str, Any]) -> None:
    """The epilogue of the sum over `parts`, int32 [split, M, N], on the current device."""
    split, m, n = parts.shape
    bm, bn = 4, 256
    _add_parts[(ceil_div(m, bm), ceil_div(n, bn))](
        parts, as_bits(out), M=m, N=n, SPLIT=split, BM=bm, BN=bn, **arguments, num_warps=4, **OPTIONS
    )
