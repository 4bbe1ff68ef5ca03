"""The exact top-k gradient codec, sparse_encode: the elements of largest magnitude, as reference/compress.py says.

The smallest magnitude that is sent, and how many equal ones, are found by a radix select on the 31 bits of abs(v), from
the top: four histograms, each of the elements that agree with the digits found so far. The tiles' counts, added up in
order, say where each tile writes.

The elements that are counted are few, where few are sent: a sample says which magnitude rather more than k elements
reach (as csrc/cpu/compress/topk.cpp does), and one pass over memory lists those. Where the sample misled (fewer than k
are listed, or more than there is room for) the histograms and the counts go over memory, five passes instead of none.
The answer depends neither on the sample nor on the order in which programs run. v is computed anew in each pass.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl

from pykernels.cuda.triton import tiles
from pykernels.cuda.triton.draw import key_of
from pykernels.cuda.triton.gemm import machine
from pykernels.cuda.triton.reals import MAGNITUDE, bits_of, is_finite, load_real
from pykernels.cuda.triton.sparse import EMPTY_ENTRY, ENTRIES, OPTIONS, TILE, check_like, check_real, cut, tile_at
from pykernels.cuda.triton.tiles import check, check_flat

__all__ = ["sparse_encode"]

SEND_OPTIONS = {"enable_fp_fusion": False, "num_warps": 16}  # with 8 it takes 162 registers
SHIFTS = (23, 15, 7, 0)  # of the digits, 8 bits each and 7 the last
FEWEST = 2**16  # elements from which a sample is drawn
SHARE = 8  # at most one of so many is sent where a list is made
SAMPLE = 2**15  # elements of a sample, or a 32nd of all
DRAWN = 256  # of them, by a program
LISTED = 128  # of a tile's entries in a list, at once
NO_LIST = (0, 0, -1)
SLACK = 2**16  # entries of a list, beside four for each element that is sent

ALL = tl.constexpr(-1)  # instead of digits: everything is sent
NOTHING = tl.constexpr(0x7FFFFFFF)
BINS = tl.constexpr(4096)  # of the sample's magnitudes: exponent and four bits
BIN_SHIFT = tl.constexpr(19)
EVERY = tl.constexpr(0x7FFFFFFF)  # elements at the cut: all that a tile has


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


@triton.jit(do_not_specialize=["count", "size"])
def _sample(
    x, residual, velocity, table, count, bins, size, momentum,
    REAL: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """bins: a histogram of the magnitudes of `size` elements, as many of each tile, at places drawn by their number."""
    j = tl.program_id(0).to(tl.int64) * DRAWN + tl.arange(0, DRAWN)
    exists = j < size
    t = tl.where(exists, j, 0) * count // size
    first = tl.load(table + t * 4)
    place = (key_of(j, tl.cast(0, tl.int32), tl.cast(0, tl.int32)).to(tl.int64) * tl.load(table + t * 4 + 1)) >> 32
    v, _ = _read(x, residual, velocity, first, place, exists, momentum, REAL)
    tl.atomic_add(bins + ((bits_of(v) & MAGNITUDE) >> BIN_SHIFT), tl.full([DRAWN], 1, tl.int32), exists, "relaxed")


@triton.jit(do_not_specialize=["count", "rank", "room", "threshold"])
def _list(
    x, residual, velocity, table, count, bins, state, spans, listing, rank, room, threshold, momentum,
    REAL: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What reaches the `rank`-th greatest magnitude of the sample: `listing` [2, room] has the values v and their
    places in their tile, a tile's own one after another, the tiles in any order.

    spans[tile] = where its own begin, how many they are; state[10] = how many all are, state[11] = what they reach.
    """
    places = listing + room
    bin = BINS - 1 - tl.arange(0, BINS)
    counts = tl.load(bins + bin)
    reached = tl.cumsum(counts, axis=0)
    least = tl.sum(tl.where((reached >= rank) & (reached - counts < rank), bin, 0), axis=0) << BIN_SHIFT
    least = tl.maximum(least, threshold)
    if tl.program_id(0) == 0:
        tl.store(state + 11, least.to(tl.int64))
    for t in range(tl.program_id(0), count, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        first, place, exists = tile_at(table, tile, VECTOR, TILE)
        v, _ = _read(x, residual, velocity, first, place, exists, momentum, REAL)
        magnitude = bits_of(v) & MAGNITUDE
        listed = exists & (magnitude >= least)
        many = tl.sum(listed.to(tl.int32), axis=0)
        begin = tl.atomic_add(state + 10, many.to(tl.int64), sem="relaxed")
        entry = tl.cumsum(listed.to(tl.int32), axis=0) - 1
        listed = listed & (begin + many <= room)
        tl.store(listing + begin + entry, bits_of(v), mask=listed)
        tl.store(places + begin + entry, place, mask=listed)
        tl.store(spans + tile * 2, begin)
        tl.store(spans + tile * 2 + 1, many.to(tl.int64))


@triton.jit
def _listed(state, k, room, threshold):
    """(whether all that may be sent is in the list, how long it is)."""
    many = tl.load(state + 10)
    enough = (many >= k) | (tl.load(state + 11) == threshold)
    return enough & (many <= room), many


@triton.jit(do_not_specialize=["count", "k", "room", "threshold"])
def _count_digits(
    x, residual, velocity, table, count, histograms, state, listing, k, room, threshold, momentum,
    LEVEL: tl.constexpr, SHIFT: tl.constexpr, ABOVE: tl.constexpr, REAL: tl.constexpr, VECTOR: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """histograms[LEVEL] of the digit in the bits from SHIFT up to ABOVE; state[LEVEL] = (digits above, need)."""
    use_list, many = _listed(state, k, room, threshold)
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
    turns = tl.where(use_list, (many + TILE - 1) // TILE, count)
    for t in range(tl.program_id(0), turns, tl.num_programs(0)):
        if use_list:
            entry = tl.cast(t, tl.int64) * TILE + tl.arange(0, TILE)
            counted = entry < many
            magnitude = tl.load(listing + entry, mask=counted, other=0) & MAGNITUDE
        else:
            first, place, exists = tile_at(table, tl.cast(t, tl.int64), VECTOR, TILE)
            v, _ = _read(x, residual, velocity, first, place, exists, momentum, REAL)
            magnitude = bits_of(v) & MAGNITUDE
            counted = exists & (magnitude >= threshold)
        if LEVEL > 0:
            counted = counted & ((magnitude >> ABOVE) == digits.to(tl.int32))
        digit = (magnitude >> SHIFT) & ((1 << (ABOVE - SHIFT)) - 1)
        counts += tl.histogram(digit, 256, mask=counted)
    tl.atomic_add(histograms + LEVEL * 256 + tl.arange(0, 256), counts, mask=counts != 0, sem="relaxed")


@triton.jit
def _select(magnitude, exists, threshold, cut):
    """(which are above the cut, which are at it)."""
    enough = exists & (magnitude >= threshold)
    return enough & (magnitude > cut), enough & (magnitude == cut)


@triton.jit(do_not_specialize=["k", "room", "threshold"])
def _count_tile(
    x, residual, velocity, table, histograms, state, totals, spans, listing, k, room, threshold, momentum,
    REAL: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """totals[tile] = how many elements are above the cut, how many at it; state[4] = (cut, how many at it to send)."""
    cut, ties = _refine(histograms + 3 * 256, tl.load(state + 6), tl.load(state + 7), 128)
    cut = tl.where(tl.cast(k, tl.int64) == 0, NOTHING, cut)
    if tl.program_id(0) == 0:
        tl.store(state + 8, cut)
        tl.store(state + 9, ties)
    t = tl.program_id(0).to(tl.int64)
    use_list, _many = _listed(state, k, room, threshold)
    if use_list:
        begin = tl.load(spans + t * 2)
        many = tl.load(spans + t * 2 + 1).to(tl.int32)
        all_above = tl.zeros([CHUNK], tl.int32)
        all_equal = tl.zeros([CHUNK], tl.int32)
        for done in range(0, many, CHUNK):
            entry = done + tl.arange(0, CHUNK)
            magnitude = tl.load(listing + begin + entry, mask=entry < many, other=0) & MAGNITUDE
            above, equal = _select(magnitude, entry < many, threshold, cut.to(tl.int32))
            all_above += above.to(tl.int32)
            all_equal += equal.to(tl.int32)
        tl.store(totals + t * 2, tl.sum(all_above, axis=0))
        tl.store(totals + t * 2 + 1, tl.sum(all_equal, axis=0))
    else:
        first, place, exists = tile_at(table, t, VECTOR, TILE)
        v, _ = _read(x, residual, velocity, first, place, exists, momentum, REAL)
        above, equal = _select(bits_of(v) & MAGNITUDE, exists, threshold, cut.to(tl.int32))
        tl.store(totals + t * 2, tl.sum(above.to(tl.int32), axis=0))
        tl.store(totals + t * 2 + 1, tl.sum(equal.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["count", "k"])
def _place_tiles(payload, totals, state, count, k, CHUNK: tl.constexpr):
    """totals[tile] = where it writes, how many elements at the cut it may send (EVERY: all that it has); the entries
    left over are empty."""
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
        left = tl.maximum(ties - equal_before, 0)
        tl.store(row + 1, tl.where(left >= here_equal, EVERY, left), mask=exists)
        above += tl.sum(here, axis=0)
        equal += tl.sum(here_equal, axis=0)
    entries = payload.to(tl.pointer_type(tl.int32))
    k = tl.cast(k, tl.int64)
    for begin in range(above + tl.minimum(equal, ties), k, CHUNK):
        entry = begin + place
        tl.store(entries + entry, tl.full([CHUNK], -1, tl.int32), mask=entry < k)  # EMPTY
        tl.store(entries + k + entry, tl.zeros([CHUNK], tl.int32), mask=entry < k)


@triton.jit(do_not_specialize=["k", "room", "threshold"])
def _send(
    x, residual, velocity, payload, table, state, totals, k, room, threshold, momentum,
    REAL: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write what remains of a tile, and its entries unless `_send_listed` does."""
    t = tl.program_id(0).to(tl.int64)
    first, place, exists = tile_at(table, t, VECTOR, TILE)
    v, moved = _read(x, residual, velocity, first, place, exists, momentum, REAL)
    above, equal = _select(bits_of(v) & MAGNITUDE, exists, threshold, tl.load(state + 8).to(tl.int32))
    use_list, _many = _listed(state, k, room, threshold)
    allowed = tl.load(totals + t * 2 + 1)
    if use_list & ((allowed == 0) | (allowed == EVERY)):
        sent = above | (equal & (allowed > 0))
    else:
        rank = tl.cumsum(equal.to(tl.int32), axis=0)  # from 1
        sent = above | (equal & (rank <= allowed))
        counted = sent.to(tl.int32)
        begin = payload.to(tl.pointer_type(tl.uint32)) + tl.load(totals + t * 2)
        entry = tl.cumsum(counted, axis=0) - counted
        tl.store(begin + entry, (first + place).to(tl.uint32), mask=sent)
        tl.store((begin + k).to(tl.pointer_type(tl.float32)) + entry, v, mask=sent)
    good = is_finite(v)
    residual += first
    kept = tl.load(residual + place, mask=exists, other=0.0)
    tl.store(residual + place, tl.where(good, tl.where(sent, 0.0, v), kept), mask=exists)
    if velocity is not None:
        velocity += first
        kept = tl.load(velocity + place, mask=exists, other=0.0)
        tl.store(velocity + place, tl.where(good, tl.where(sent, 0.0, moved), kept), mask=exists)


@triton.jit(do_not_specialize=["k", "room", "threshold"])
def _send_listed(payload, table, state, totals, spans, listing, k, room, threshold, CHUNK: tl.constexpr):
    """Write the entries of a tile from the list, where it sends all or none of its elements at the cut."""
    t = tl.program_id(0).to(tl.int64)
    use_list, _many = _listed(state, k, room, threshold)
    allowed = tl.load(totals + t * 2 + 1)
    if use_list & ((allowed == 0) | (allowed == EVERY)):
        cut = tl.load(state + 8).to(tl.int32)
        first = tl.load(table + t * 4)
        own = listing + tl.load(spans + t * 2)
        many = tl.load(spans + t * 2 + 1).to(tl.int32)
        begin = payload.to(tl.pointer_type(tl.uint32)) + tl.load(totals + t * 2)
        values = (begin + k).to(tl.pointer_type(tl.int32))
        done = 0
        for from_ in range(0, many, CHUNK):
            entry = from_ + tl.arange(0, CHUNK)
            v = tl.load(own + entry, mask=entry < many, other=0)
            above, equal = _select(v & MAGNITUDE, entry < many, threshold, cut)
            sent = above | (equal & (allowed > 0))
            counted = sent.to(tl.int32)
            to = done + tl.cumsum(counted, axis=0) - counted
            place = tl.load(own + room + entry, mask=sent, other=0)
            tl.store(begin + to, (first + place).to(tl.uint32), mask=sent)
            tl.store(values + to, v, mask=sent)
            done += tl.sum(counted, axis=0)


# ---- launchers ----


def _programs(device: torch.device, count: int) -> int:
    """Programs that share the tiles of a histogram, so that each writes its bins once."""
    return min(count, 4 * machine(device)[1])


def plan_of(numel: int, k: int) -> tuple[int, int, int]:
    """(size of the sample, rank in it of the magnitude that is listed, entries that there is room for).

    Of size 0 where no list is made; it then has room for less than nothing, so that none is looked at.

    Four standard deviations more than k's share of the sample, so that hardly ever too few are listed.
    """
    size = min(SAMPLE, numel // 32)
    if k == 0 or numel < FEWEST or SHARE * k > numel:
        return NO_LIST
    expected = k * size / numel
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    return (size, rank, min(numel, 4 * k + SLACK)) if rank < size else NO_LIST


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
    check_real(op, "x", x)
    check_like(op, "residual", residual, x)
    if velocity is not None:
        check_like(op, "velocity", velocity, x)
    check(0 <= k < EMPTY_ENTRY, op, f"k must lie in [0, 2^32 - 2], not {k}")
    check(threshold >= 0.0, op, f"threshold must be 0 or a positive number, not {threshold}")
    check(bool(np.isfinite(np.float32(momentum))), op, f"momentum must be a number that fp32 holds, not {momentum}")
    check(velocity is not None or momentum == 0.0, op, "momentum is that of velocity, which is not given")
    check_flat(op, "payload", payload, x, torch.uint8)
    check(payload.numel() >= 8 * k, op, f"payload must have {8 * k} bytes for k = {k}, not {payload.numel()}")
    found = cut(op, segments, "x", x)
    numbers, kind = tiles.real(x)
    least = int(np.float32(threshold).view(np.int32))
    source = (numbers, residual, velocity)
    how = {"REAL": kind, "VECTOR": found.vector, "TILE": TILE}
    size, rank, room = plan_of(found.numel, k)
    with tiles.on(x.device):
        # Histograms, 4 of 256 bins, and the sample's; state, two int64 a level and six more; two int64 a tile, twice.
        parts = [512, BINS.value // 2, 12, 2 * found.count, 2 * found.count]
        scratch = torch.zeros(sum(parts), dtype=torch.int64, device=x.device)
        histograms, bins, state, totals, spans = scratch.split(parts)
        histograms, bins = histograms.view(torch.int32), bins.view(torch.int32)
        listing = torch.empty(2 * max(room, 0), dtype=torch.int32, device=x.device)
        programs = (_programs(x.device, found.count),)
        if size:
            _sample[(triton.cdiv(size, DRAWN),)](
                *source, found.table, found.count, bins, size, momentum, DRAWN=DRAWN, REAL=kind, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
            _list[programs](
                *source, found.table, found.count, bins, state, spans, listing, rank, room, least, momentum, **how,
                **OPTIONS,
            )  # fmt: skip
        if found.count:
            for level, shift in enumerate(SHIFTS):
                _count_digits[programs](
                    *source, found.table, found.count, histograms, state, listing, k, room, least, momentum,
                    LEVEL=level, SHIFT=shift, ABOVE=SHIFTS[level - 1] if level else 31, **how, **OPTIONS,
                )  # fmt: skip
            _count_tile[(found.count,)](
                *source, found.table, histograms, state, totals, spans, listing, k, room, least, momentum, CHUNK=LISTED,
                **how, **OPTIONS,
            )  # fmt: skip
        _place_tiles[(1,)](payload, totals, state, found.count, k, CHUNK=ENTRIES)
        if found.count:
            _send[(found.count,)](
                *source, payload, found.table, state, totals, k, room, least, momentum, **how, **SEND_OPTIONS
            )
        if size:
            _send_listed[(found.count,)](
                payload, found.table, state, totals, spans, listing, k, room, least, CHUNK=LISTED, num_warps=1
            )
