"""The sparse gradient codecs sparse_decode, randomk_encode and randomk_decode; sparse_encode is topk.py's.

pykernels/reference/compress.py specifies every step. Nothing depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton import tiles
from pykernels.cuda.triton.draw import halves, key_of
from pykernels.cuda.triton.reals import is_finite, load_real, store_real
from pykernels.cuda.triton.tiles import check, check_flat

__all__ = ["check_like", "check_real", "cut", "randomk_decode", "randomk_encode", "sparse_decode", "tile_at"]

TILE = 4096
OPTIONS = {"enable_fp_fusion": False, "num_warps": 8}
ENTRIES = 1024  # of a payload, to a program
EMPTY_ENTRY = 0xFFFFFFFF

EMPTY = tl.constexpr(EMPTY_ENTRY)


@triton.jit
def tile_at(table, t, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """(first element, places in the tile, which of them exist)."""
    first = tl.multiple_of(tl.load(table + t * 4), VECTOR)
    count = tl.multiple_of(tl.load(table + t * 4 + 1).to(tl.int32), VECTOR)
    place = tl.arange(0, TILE)
    return first, place, place < count


@triton.jit(debug=True, do_not_specialize=["k", "numel"])
def _add_entries(payload, out, numel, k, factor, REAL: tl.constexpr, ENTRIES: tl.constexpr):
    """out[position] += factor * value. A position that cannot be stops the kernel with an assertion."""
    k = tl.cast(k, tl.int64)
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = entry < k
    positions = payload.to(tl.pointer_type(tl.uint32))
    at = tl.load(positions + entry, mask=exists, other=EMPTY).to(tl.int64)
    before = tl.load(positions + (entry - 1), mask=exists & (entry > 0), other=0).to(tl.int64)
    empty = at == EMPTY
    tl.device_assert(empty | (at < numel), "pykernels: sparse_decode: payloads: a position lies outside of out")
    ascending = (entry == 0) | (before < at) | empty
    tl.device_assert(ascending, "pykernels: sparse_decode: payloads: positions do not ascend")
    used = at < numel
    values = payload.to(tl.pointer_type(tl.float32)) + k
    v = tl.load(values + entry, mask=used, other=0.0) * factor
    store_real(out + at, load_real(out + at, used, REAL) + v, used, REAL)


@triton.jit
def _drawn(j, n, k, seed_low, seed_high, segments, count):
    """The position that is drawn in stratum j (int64) of the n elements of `count` segments."""
    begin = j * n // k
    span = (j + 1) * n // k - begin
    rank = begin + ((key_of(j, seed_low, seed_high).to(tl.int64) * span) >> 32)
    owner = tl.zeros_like(j)  # the last segment that begins at or before it
    step = tl.cast(1, tl.int64)
    while step < count:
        step *= 2
    while step > 0:
        candidate = owner + step
        inside = candidate < count
        begins = tl.load(segments + candidate * 2 + 1, mask=inside, other=0)
        owner = tl.where(inside & (begins <= rank), candidate, owner)
        step = step // 2
    return tl.load(segments + owner * 2) + (rank - tl.load(segments + owner * 2 + 1))


@triton.jit(do_not_specialize=["n", "k", "count", "seed_low", "seed_high"])
def _draw_values(
    x, residual, values, segments, n, k, count, seed_low, seed_high,
    REAL: tl.constexpr, CLEAR: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """values[j] = v at the drawn positions; with CLEAR, once the residual is v, 0 where it was sent and finite."""
    n = tl.cast(n, tl.int64)
    k = tl.cast(k, tl.int64)
    j = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = j < k
    at = _drawn(tl.where(exists, j, 0), n, k, seed_low, seed_high, segments, count)
    if CLEAR:
        sent = tl.load(values + j, mask=exists, other=0.0)
        tl.store(residual + at, tl.zeros([ENTRIES], tl.float32), mask=exists & is_finite(sent))
    else:
        v = load_real(x + at, exists, REAL)
        if residual is not None:
            v = v + tl.load(residual + at, mask=exists, other=0.0)
        tl.store(values + j, v, mask=exists)


@triton.jit
def _add_gradients(x, residual, table, REAL: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """The residual becomes v, where that is finite."""
    first, place, exists = tile_at(table, tl.program_id(0).to(tl.int64), VECTOR, TILE)
    old = tl.load(residual + first + place, mask=exists, other=0.0)
    v = load_real(x + first + place, exists, REAL) + old
    tl.store(residual + first + place, tl.where(is_finite(v), v, old), mask=exists)


@triton.jit
def _clear(out, table, REAL: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    first, place, exists = tile_at(table, tl.program_id(0).to(tl.int64), VECTOR, TILE)
    store_real(out + first + place, tl.zeros([TILE], tl.float32), exists, REAL)


@triton.jit(do_not_specialize=["n", "k", "count", "seed_low", "seed_high"])
def _place_values(
    values, out, segments, n, k, count, seed_low, seed_high, factor, REAL: tl.constexpr, ENTRIES: tl.constexpr
):
    """out = factor * value at the drawn positions."""
    n = tl.cast(n, tl.int64)
    k = tl.cast(k, tl.int64)
    j = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = j < k
    at = _drawn(tl.where(exists, j, 0), n, k, seed_low, seed_high, segments, count)
    store_real(out + at, tl.load(values + j, mask=exists, other=0.0) * factor, exists, REAL)


# ---- launchers ----


def cut(op: str, segments: torch.Tensor, name: str, t: torch.Tensor) -> tiles.Tiles:
    found = tiles.cut(op, segments, t.device, 1, TILE, 0)
    check(found.last <= t.numel(), op, f"segments end at element {found.last}, but {name} has {t.numel()}")
    return found


def check_real(op: str, name: str, t: torch.Tensor) -> None:
    tiles.check_real(op, name, t)
    check(t.numel() < EMPTY_ENTRY, op, f"{name} must have fewer than 2^32 - 1 elements, not {t.numel()}")


def check_like(op: str, name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    check_flat(op, name, t, x, torch.float32)
    check(t.numel() == x.numel(), op, f"{name} must have as many elements as x, {x.numel()}, not {t.numel()}")


def sparse_decode(payloads: torch.Tensor, out: torch.Tensor, k: int, factor: float = 1.0) -> None:
    """Add what the ranks sent to `out`: see `pykernels.ops.sparse`.

    A position outside of `out`, or out of order, is a device-side assertion, as in torch's own indexing.
    """
    op = "sparse_decode"
    check_real(op, "out", out)
    tiles.stride_of(op, payloads, out)
    check(0 <= k < EMPTY_ENTRY, op, f"k must lie in [0, 2^32 - 2], not {k}")
    size = payloads.shape[1]
    check(size >= 8 * k, op, f"payloads must have rows of {8 * k} bytes for k = {k}, not {size}")
    if k == 0:
        return
    numbers, kind = tiles.real(out)
    with tiles.on(out.device):
        for payload in payloads:  # one launch a rank: ranks may send the same position, and are added in order
            _add_entries[(triton.cdiv(k, ENTRIES),)](
                payload, numbers, out.numel(), k, factor, REAL=kind, ENTRIES=ENTRIES, enable_fp_fusion=False,
                sanitize_overflow=False,
            )  # fmt: skip


def _check_strata(op: str, k: int, found: tiles.Tiles, values: torch.Tensor) -> None:
    check(0 <= k <= found.numel, op, f"k must lie in [0, {found.numel}], the segments' elements, not be {k}")
    check(values.numel() >= k, op, f"values must have {k} elements, not {values.numel()}")


def randomk_encode(
    x: torch.Tensor, residual: torch.Tensor | None, values: torch.Tensor, segments: torch.Tensor, k: int, seed: int
) -> None:
    """Elements at positions drawn by `seed`: see `pykernels.ops.sparse`."""
    op = "randomk_encode"
    check_real(op, "x", x)
    if residual is not None:
        check_like(op, "residual", residual, x)
    check_flat(op, "values", values, x, torch.float32)
    found = cut(op, segments, "x", x)
    _check_strata(op, k, found, values)
    numbers, kind = tiles.real(x)
    draw = (found.segments, found.numel, k, found.segments.shape[0], *halves(seed))
    how = {"REAL": kind, "ENTRIES": ENTRIES, "enable_fp_fusion": False}
    grid = (triton.cdiv(k, ENTRIES),)
    with tiles.on(x.device):
        if k:
            _draw_values[grid](numbers, residual, values, *draw, CLEAR=False, **how)
        if residual is not None and found.count:
            _add_gradients[(found.count,)](
                numbers, residual, found.table, REAL=kind, VECTOR=found.vector, TILE=TILE, **OPTIONS
            )  # fmt: skip
            if k:
                _draw_values[grid](numbers, residual, values, *draw, CLEAR=True, **how)


def randomk_decode(
    values: torch.Tensor, out: torch.Tensor, segments: torch.Tensor, k: int, seed: int, factor: float = 1.0
) -> None:
    """`factor * value` at the drawn positions, 0 elsewhere in the segments: see `pykernels.ops.sparse`."""
    op = "randomk_decode"
    check_real(op, "out", out)
    check_flat(op, "values", values, out, torch.float32)
    found = cut(op, segments, "out", out)
    _check_strata(op, k, found, values)
    numbers, kind = tiles.real(out)
    draw = (found.segments, found.numel, k, found.segments.shape[0], *halves(seed))
    with tiles.on(out.device):
        if found.count:
            _clear[(found.count,)](numbers, found.table, REAL=kind, VECTOR=found.vector, TILE=TILE, **OPTIONS)
        if k:
            _place_values[(triton.cdiv(k, ENTRIES),)](
                values, numbers, *draw, factor, REAL=kind, ENTRIES=ENTRIES, enable_fp_fusion=False
            )  # fmt: skip
