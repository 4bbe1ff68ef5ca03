"""Which configuration runs a shape: tables of pykernels/cuda/tuned, one file an architecture.

A table is written on a GPU by `python -m benchmarks.gpu.tune`. For each op of the CUDA library, `int8_gemm`,
`int8_conv` and `int8_few_channels`, it maps widths, "NxK", to rows of the largest M and the name of a configuration, or
"triton", in ascending order; the last has no largest M. A shape takes the width nearest to its own and the first row
that holds its M. Of a convolution M are the pixels of the output, N its channels and K the taps times the channels of
the input. "triton short K" is Triton's kernel for such products (triton/short_k.py); where nothing near was measured it
takes what it is made for, and so does `int8_few_channels`.

`triton` has the same of Triton's kernels: `gemm`, and `conv`, whose channels are padded. A row's second part is a tile
as numbers: rows, columns and depth, warps, stages, programs a multiprocessor, parts of K. A shape whose N and K are not
near any that was measured has no tile here, and takes that of gemm.by_formula. `candidates` are what the tuner tries,
without the parts of K.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from pykernels.ops import _load

__all__ = [
    "architecture",
    "configurations",
    "disabled",
    "forced",
    "int8_conv",
    "int8_few_channels",
    "int8_gemm",
    "runs",
    "short_k",
    "table",
    "tile",
]

FOLDER = pathlib.Path(__file__).parent / "tuned"
TRITON = "triton"
SHORT_K = "triton short K"
# The library's ops refuse longer sums, which s32 may not hold: csrc/cuda/gemm/op.cpp.
MAX_K = (2**31 - 1) // (255 * 128)
# The largest kernel and the output channels a warp of the configurations for few channels: csrc/cuda/conv.
FEW_CHANNELS = {(size, width): f"sm80 {size}x{size} by {width}" for size in (3, 5, 7) for width in (32, 16)}
NEAR = 2.0  # the most that N and K may differ together, in powers of two, from those a tile was measured for
_disabled = False
_forced: tuple[int, ...] | str | None = None


@contextlib.contextmanager
def forced(tile: tuple[int, ...] | str) -> Iterator[None]:
    """Give every shape to Triton's kernels and this tile, or to `SHORT_K`, meanwhile, in all threads: for
    measurements."""
    global _forced
    before, _forced = _forced, tile
    try:
        with disabled():
            yield
    finally:
        _forced = before


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Leave every shape to Triton's kernels meanwhile, in all threads: for measurements."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


def architecture(capability: tuple[int, int]) -> str | None:
    """The name of the table for a compute capability, or None where no kernel of the library was made for it."""
    if capability == (8, 9):
        return "sm89"
    return {8: "sm80", 9: "sm90"}.get(capability[0])


@functools.cache
def table(name: str) -> dict[str, Any]:
    """The table of an architecture, as JSON has it."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


@functools.cache
def configurations(op: str) -> dict[str, tuple[int, int]]:
    """Index and needed compute capability (times 10) of every configuration of an op in the loaded library, by name."""
    if _load.CUDA_ERROR is not None:
        return {}
    lines = getattr(torch.ops.pykernels, f"_cuda_{op}_configs")().splitlines()
    return {name: (i, int(arch)) for i, (name, arch) in enumerate(line.split(",") for line in lines)}


def _distance(width: str, n: int, k: int) -> float:
    measured_n, measured_k = map(int, width.split("x"))
    return abs(math.log2(measured_n / n)) + abs(math.log2(measured_k / k))


def choose(rules: dict[str, list[tuple[int | None, str]]], m: int, n: int, k: int, residual: bool) -> str:
    """The name that an op's part of a table gives a shape. Swapped configurations take no residual."""
    rows = rules[min(rules, key=lambda width: _distance(width, n, k))]
    fits = (name for most, name in rows if most is None or m <= most)
    return next(name for name in fits if not (residual and name.endswith("swapped")))


def runs(needed: int, capability: tuple[int, int]) -> bool:
    """Whether a configuration that needs a capability (times 10) runs on a device: those of 9.0 run nowhere else."""
    return needed <= 10 * capability[0] + capability[1] and (needed != 90 or capability == (9, 0))


@functools.lru_cache(maxsize=4096)
def _index(op: str, m: int, n: int, k: int, residual: bool, capability: tuple[int, int]) -> int | None:
    name = architecture(capability)
    rules = None if name is None else table(name).get(op)
    if rules is None:
        return None
    index, needed = configurations(op).get(choose(rules, m, n, k, residual), (None, 0))
    return index if runs(needed, capability) else None


def _chosen(
    op: str,
    m: int,
    n: int,
    k: int,
    out_dtype: torch.dtype,
    residual: torch.dtype | None,
    capability: tuple[int, int],
) -> int | None:
    if _disabled or _load.CUDA_ERROR is not None:
        return None
    if m == 0 or n == 0 or k % 16 or k > MAX_K or n % 4 or n * out_dtype.itemsize % 16:
        return None
    return _index(op, m, n, k, residual is not None, capability) if _adds(residual, out_dtype) else None


def _adds(residual: torch.dtype | None, out: torch.dtype) -> bool:
    """Whether the library's epilogue adds a residual of this dtype, or none."""
    return residual is None or residual == out or (residual.itemsize, out.itemsize) == (1, 1)


def int8_gemm(
    m: int, n: int, k: int, out_dtype: torch.dtype, residual: torch.dtype | None, capability: tuple[int, int]
) -> int | None:
    """The argument `config` of `torch.ops.pykernels._cuda_int8_gemm` for u8 [m, k] times s8 [n, k].

    None where Triton's kernel is to run: the library is not loaded, holds nothing for this shape, or the table says so.
    """
    return _chosen("int8_gemm", m, n, k, out_dtype, residual, capability)


def int8_conv(
    m: int,
    n: int,
    channels: int,
    taps: int,
    out_dtype: torch.dtype,
    residual: torch.dtype | None,
    capability: tuple[int, int],
) -> int | None:
    """Likewise of `torch.ops.pykernels._cuda_int8_conv`, for m pixels of n channels from taps of u8 channels."""
    if channels % 16:
        return None
    return _chosen("int8_conv", m, n, taps * channels, out_dtype, residual, capability)


def few_channels_fit(kernel: tuple[int, int], n: int) -> list[str]:
    """The configurations for few channels that run a kernel of these sizes and n output channels, the first one best.

    Kernels of 7 x 7 at most, by the smallest that holds them; n a multiple of 16.
    """
    if n % 16 or max(kernel) > 7:
        return []
    size = next(size for size in (3, 5, 7) if max(kernel) <= size)
    widths = (32, 16) if n % 32 == 0 else (16, 32)
    return [FEW_CHANNELS[size, width] for width in widths]


@functools.lru_cache(maxsize=4096)
def _few_channels(m: int, n: int, kernel: tuple[int, int], channels: int, capability: tuple[int, int]) -> int | None:
    name = architecture(capability)
    fit = few_channels_fit(kernel, n)
    if name is None or not fit:
        return None
    rules, k = table(name).get("int8_few_channels", {}), kernel[0] * kernel[1] * channels
    measured = None if _near(rules, n, k) is None else choose(rules, m, n, k, False)
    if measured == TRITON:
        return None
    index, needed = configurations("int8_few_channels").get(measured if measured in fit else fit[0], (None, 0))
    return index if runs(needed, capability) else None


def int8_few_channels(
    m: int,
    n: int,
    channels: int,
    kernel: tuple[int, int],
    out_dtype: torch.dtype,
    residual: torch.dtype | None,
    capability: tuple[int, int],
) -> int | None:
    """Likewise of `torch.ops.pykernels._cuda_int8_few_channels`, for m pixels of n channels."""
    if _disabled or _load.CUDA_ERROR is not None or m == 0 or not _adds(residual, out_dtype):
        return None
    return _few_channels(m, n, kernel, channels, capability)


def _near(rules: dict[str, Any], n: int, k: int) -> str | None:
    """The width nearest to a shape's, unless it is far."""
    width = min(rules, key=lambda width: _distance(width, n, k), default=None)
    return None if width is None or _distance(width, n, k) > NEAR else width


@functools.lru_cache(maxsize=4096)
def _tile(kind: str, m: int, n: int, k: int, arch: int) -> tuple[int, ...] | None:
    name = architecture(divmod(arch, 10))
    rules = {} if name is None else table(name)["triton"][kind]
    width = _near(rules, n, k)
    if width is None:
        return None
    return next(tuple(found) for most, found in rules[width] if most is None or m <= most)


def tile(kind: str, m: int, n: int, k: int, arch: int) -> tuple[int, ...] | None:
    """The tile measured for Triton's `kind` of kernel, "gemm" or "conv", on compute capability `arch` / 10, or None."""
    return _forced if isinstance(_forced, tuple) else _tile(kind, m, n, k, arch)


@functools.lru_cache(maxsize=4096)
def _short_k(m: int, n: int, k: int, residual: bool, arch: int) -> bool | None:
    name = architecture(divmod(arch, 10))
    rules = table(name)["int8_gemm"] if name is not None and table(name)["device"] else {}
    return None if _near(rules, n, k) is None else choose(rules, m, n, k, residual) == SHORT_K


def short_k(m: int, n: int, k: int, residual: bool, arch: int) -> bool | None:
    """Whether a product was measured to be fastest by `SHORT_K`; None where nothing near it was measured."""
    return _short_k(m, n, k, residual, arch) if _forced is None else _forced == SHORT_K
