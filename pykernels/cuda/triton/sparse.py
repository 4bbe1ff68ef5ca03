"""The sparse gradient codecs: sparse_encode, sparse_decode, randomk_encode and randomk_decode.

pykernels/reference/compress.py specifies every step. sparse_encode is a radix select on the 31 bits of abs(v), from the
top: four histograms, each of the elements that agree with the digits found so far, give the smallest magnitude that is
sent and how many equal ones; the tiles' counts, added up in order, say where each tile writes. v is computed anew in
each of the six passes over memory. Nothing depends on the order in which programs run.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from pykernels.cuda.triton import tiles
from pykernels.cuda.triton.draw import halves, key_of
from pykernels.cuda.triton.reals import MAGNITUDE, bits_of, is_finite, load_real, store_real
from pykernels.cuda.triton.tiles import check, check_flat

__all__ = ["randomk_decode", "randomk_encode", "sparse_decode", "sparse_encode"]

TILE = 4096
OPTIONS = {"enable_fp_fusion": False, "num_warps": 8}
SEND_OPTIONS = {"enable_fp_fusion": False, "num_warps": 16}  # with 8 it takes 162 registers
ENTRIES = 1024  # of a payload, to a program
SHIFTS = (23, 15, 7, 0)  # of the digits, 8 bits each and 7 the last
EMPTY_ENTRY = 0xFFFFFFFF

EMPTY = tl.constexpr(EMPTY_ENTRY)
ALL = tl.constexpr(-1)  # instead of digits: everything is sent
NOTHING = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _tile(table, t, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """(first element, places in the tile, which of them exist)."""
    first = tl.multiple_of(tl.load(table + t * 4), VECTOR)
    count = tl.multiple_of(tl.load(table + t * 4 + 1).to(tl.int32), VECTOR)
    place = tl.arange(0, TILE)
    return first, place, place < count


@triton.jit
def _read(x, residual, velocity, first, place, mask, momentum, REAL: tl.constexpr):
    """(v, what moved the residual) at a tile's places."""
    moved = load_real(x + first + place, mask, REAL)
    if velocity is not None:
        moved = momentum * tl.load(velocity + first + place, mask=mask, other=0.0) + moved
    return tl.load(residual + first + place, mask=mask, other=0.0) + moved, moved


@triton.jit
def _refine(histogram, digits, need, RADIX: tl.constexpr):
    """(digits, need) with one digit more, of which `histogram` [256] counts the elements; need is how many of them."""
    digit = 255 - tl.arange(0, 256)
    counts = tl.load(histogram + digit).to(tl.uint32, bitcast=True).to(tl.int64)
    reached = tl.cumsum(counts, axis=0)
    before = reached - counts
    here = (reached >= need) & (before < need)
    found = tl.sum(here.to(tl.int32), axis=0) > 0
    last = tl.sum(tl.where(here, digit, 0), axis=0)
    need = tl.sum(tl.where(here, need - before, 0), axis=0)
    return tl.where(found, digits * RADIX + last, ALL), need


@triton.jit(do_not_specialize=["count", "k", "threshold"])
def _count_digits(
    x, residual, velocity, table, count, histograms, state, k, threshold, momentum,
    LEVEL: tl.constexpr, SHIFT: tl.constexpr, ABOVE: tl.constexpr, REAL: tl.constexpr, VECTOR: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """histograms[LEVEL] of the digit in the bits from SHIFT up to ABOVE; state[LEVEL] = (digits above, need)."""
    if LEVEL == 0:
        digits = tl.cast(0, tl.int64)
        need = tl.cast(k, tl.int64)
    else:
        before = state + LEVEL * 2 - 2
        digits, need = _refine(histograms + (LEVEL - 1) * 256, tl.load(before), tl.load(before + 1), 256)
    if tl.program_id(0) == 0:
        tl.store(state + LEVEL * 2, digits)
        tl.store(state + LEVEL * 2 + 1, need)
    counts = tl.zeros([256], tl.int32)
    for t in range(tl.program_id(0), count, tl.num_programs(0)):
        first, place, exists = _tile(table, tl.cast(t, tl.int64), VECTOR, TILE)
        v, _ = _read(x, residual, velocity, first, place, exists, momentum, REAL)
        magnitude = bits_of(v) & MAGNITUDE
        counted = exists & (magnitude >= threshold)
        if LEVEL > 0:
            counted = counted & ((magnitude >> ABOVE) == digits.to(tl.int32))
        digit = (magnitude >> SHIFT) & ((1 << (ABOVE - SHIFT)) - 1)
        counts += tl.histogram(digit, 256, mask=counted)
    tl.atomic_add(histograms + LEVEL * 256 + tl.arange(0, 256), counts, mask=counts != 0, sem="relaxed")


@triton.jit
def _select(v, exists, threshold, cut):
    """(which are above the cut, which are at it)."""
    magnitude = bits_of(v) & MAGNITUDE
    enough = exists & (magnitude >= threshold)
    return enough & (magnitude > cut), enough & (magnitude == cut)


@triton.jit(do_not_specialize=["k", "threshold"])
def _count_tile(
    x, residual, velocity, table, histograms, state, totals, k, threshold, momentum,
    REAL: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """totals[tile] = how many elements are above the cut, how many at it; state[4] = (cut, how many at it to send)."""
    cut, ties = _refine(histograms + 3 * 256, tl.load(state + 6), tl.load(state + 7), 128)
    cut = tl.where(tl.cast(k, tl.int64) == 0, NOTHING, cut)
    if tl.program_id(0) == 0:
        tl.store(state + 8, cut)
        tl.store(state + 9, ties)
    t = tl.program_id(0).to(tl.int64)
    first, place, exists = _tile(table, t, VECTOR, TILE)
    v, _ = _read(x, residual, velocity, first, place, exists, momentum, REAL)
    above, equal = _select(v, exists, threshold, cut.to(tl.int32))
    tl.store(totals + t * 2, tl.sum(above.to(tl.int32), axis=0))
    tl.store(totals + t * 2 + 1, tl.sum(equal.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["count", "k"])
def _place_tiles(payload, totals, state, count, k, CHUNK: tl.constexpr):
    """totals[tile] = where it writes, how many elements at the cut it may send; the entries left over are empty."""
    ties = tl.load(state + 9)
    above = tl.cast(0, tl.int64)
    equal = tl.cast(0, tl.int64)
    place = tl.arange(0, CHUNK)
    for begin in range(0, count, CHUNK):
        row = totals + (tl.cast(begin, tl.int64) + place) * 2
        exists = begin + place < count
        here = tl.load(row, mask=exists, other=0)
        here_equal = tl.load(row + 1, mask=exists, other=0)
        above_before = above + tl.cumsum(here, axis=0) - here
        equal_before = equal + tl.cumsum(here_equal, axis=0) - here_equal
        tl.debug_barrier()  # what follows overwrites what was read
        tl.store(row, above_before + tl.minimum(equal_before, ties), mask=exists)
        tl.store(row + 1, tl.maximum(ties - equal_before, 0), mask=exists)
        above += tl.sum(here, axis=0)
        equal += tl.sum(here_equal, axis=0)
    entries = payload.to(tl.pointer_type(tl.int32))
    k = tl.cast(k, tl.int64)
    for begin in range(above + tl.minimum(equal, ties), k, CHUNK):
        entry = begin + place
        tl.store(entries + entry, tl.full([CHUNK], -1, tl.int32), mask=entry < k)  # EMPTY
        tl.store(entries + k + entry, tl.zeros([CHUNK], tl.int32), mask=entry < k)


@triton.jit(do_not_specialize=["k", "threshold"])
def _send(
    x, residual, velocity, payload, table, state, totals, k, threshold, momentum,
    REAL: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the entries of a tile, and what remains of it."""
    t = tl.program_id(0).to(tl.int64)
    first, place, exists = _tile(table, t, VECTOR, TILE)
    v, moved = _read(x, residual, velocity, first, place, exists, momentum, REAL)
    above, equal = _select(v, exists, threshold, tl.load(state + 8).to(tl.int32))
    rank = tl.cumsum(equal.to(tl.int32), axis=0)  # from 1
    sent = above | (equal & (rank <= tl.load(totals + t * 2 + 1)))
    counted = sent.to(tl.int32)
    entry = tl.load(totals + t * 2) + (tl.cumsum(counted, axis=0) - counted)
    tl.store(payload.to(tl.pointer_type(tl.uint32)) + entry, (first + place).to(tl.uint32), mask=sent)
    tl.store(payload.to(tl.pointer_type(tl.float32)) + tl.cast(k, tl.int64) + entry, v, mask=sent)
    good = is_finite(v)
    residual += first
    kept = tl.load(residual + place, mask=exists, other=0.0)
    tl.store(residual + place, tl.where(good, tl.where(sent, 0.0, v), kept), mask=exists)
    if velocity is not None:
        velocity += first
        kept = tl.load(velocity + place, mask=exists, other=0.0)
        tl.store(velocity + place, tl.where(good, tl.where(sent, 0.0, moved), kept), mask=exists)


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
    first, place, exists = _tile(table, tl.program_id(0).to(tl.int64), VECTOR, TILE)
    old = tl.load(residual + first + place, mask=exists, other=0.0)
    v = load_real(x + first + place, exists, REAL) + old
    tl.store(residual + first + place, tl.where(is_finite(v), v, old), mask=exists)


@triton.jit
def _clear(out, table, REAL: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    first, place, exists = _tile(table, tl.program_id(0).to(tl.int64), VECTOR, TILE)
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


def _cut(op: str, segments: torch.Tensor, name: str, t: torch.Tensor) -> tiles.Tiles:
    found = tiles.cut(op, segments, t.device, 1, TILE, 0)
    check(found.last <= t.numel(), op, f"segments end at element {found.last}, but {name} has {t.numel()}")
    return found


def _check_real(op: str, name: str, t: torch.Tensor) -> None:
    tiles.check_real(op, name, t)
    check(t.numel() < EMPTY_ENTRY, op, f"{name} must have fewer than 2^32 - 1 elements, not {t.numel()}")


def _check_like(op: str, name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    check_flat(op, name, t, x, torch.float32)
    check(t.numel() == x.numel(), op, f"{name} must have as many elements as x, {x.numel()}, not {t.numel()}")


def _programs(device: torch.device, count: int) -> int:
    """Programs that share the tiles of a histogram, so that each writes its bins once."""
    most = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return min(count, most)


def sparse_encode(
    x: torch.Tensor,
    residual: torch.Tensor,
    velocity: torch.Tensor | None,
    payload: torch.Tensor,
    segments: torch.Tensor,
    k: int,
    threshold: float = 0.0,
    momentum: float = 0.0,
) -> None:
    """The elements of largest magnitude: see `pykernels.ops.sparse`."""
    op = "sparse_encode"
    _check_real(op, "x", x)
    _check_like(op, "residual", residual, x)
    if velocity is not None:
        _check_like(op, "velocity", velocity, x)
    check(0 <= k < EMPTY_ENTRY, op, f"k must lie in [0, 2^32 - 2], not {k}")
    check(threshold >= 0.0, op, f"threshold must be 0 or a positive number, not {threshold}")
    check(bool(np.isfinite(np.float32(momentum))), op, f"momentum must be a number that fp32 holds, not {momentum}")
    check(velocity is not None or momentum == 0.0, op, "momentum is that of velocity, which is not given")
    check_flat(op, "payload", payload, x, torch.uint8)
    check(payload.numel() >= 8 * k, op, f"payload must have {8 * k} bytes for k = {k}, not {payload.numel()}")
    found = _cut(op, segments, "x", x)
    numbers, kind = tiles.real(x)
    least = int(np.float32(threshold).view(np.int32))
    source = (numbers, residual, velocity)
    how = {"REAL": kind, "VECTOR": found.vector, "TILE": TILE}
    with tiles.on(x.device):
        # Histograms, 4 of 256 bins; state, of two int64 a level; the tiles' totals, two int64 each.
        scratch = torch.zeros(512 + 10 + 2 * found.count, dtype=torch.int64, device=x.device)
        histograms, state, totals = scratch[:512].view(torch.int32), scratch[512:522], scratch[522:]
        if found.count:
            for level, shift in enumerate(SHIFTS):
                _count_digits[(_programs(x.device, found.count),)](
                    *source, found.table, found.count, histograms, state, k, least, momentum,
                    LEVEL=level, SHIFT=shift, ABOVE=SHIFTS[level - 1] if level else 31, **how, **OPTIONS,
                )  # fmt: skip
            _count_tile[(found.count,)](
                *source, found.table, histograms, state, totals, k, least, momentum, **how, **OPTIONS
            )  # fmt: skip
        _place_tiles[(1,)](payload, totals, state, found.count, k, CHUNK=ENTRIES)
        if found.count:
            _send[(found.count,)](
                *source, payload, found.table, state, totals, k, least, momentum, **how, **SEND_OPTIONS
            )


def sparse_decode(payloads: torch.Tensor, out: torch.Tensor, k: int, factor: float = 1.0) -> None:
    """Add what the ranks sent to `out`: see `pykernels.ops.sparse`.

    A position outside of `out`, or out of order, is a device-side assertion, as in torch's own indexing.
    """
    op = "sparse_decode"
    _check_real(op, "out", out)
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
    _check_real(op, "x", x)
    if residual is not None:
        _check_like(op, "residual", residual, x)
    check_flat(op, "values", values, x, torch.float32)
    found = _cut(op, segments, "x", x)
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
    _check_real(op, "out", out)
    check_flat(op, "values", values, out, torch.float32)
    found = _cut(op, segments, "out", out)
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
