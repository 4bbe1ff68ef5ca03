"""The dense gradient codecs: compress_encode, compress_decode and compress_reduce.

pykernels/reference/compress.py specifies every step, and the bytes are the same. A program takes a tile, some whole
records of one segment, and keeps it in registers, so that memory is passed over once. The codes of a record lie in
planes (byte j holds the elements j + p * width): a tile is a tuple of planes [rows, span], `span` the width filled up
to a power of two, so that a byte's codes meet in one thread.

Every product and sum is to be rounded by itself: the kernels are launched without FMA contraction and divide by div_rn.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton import tiles
from pykernels.cuda.triton.draw import halves, key_of, mix
from pykernels.cuda.triton.reals import (
    INFINITY,
    MAGNITUDE,
    bf16_bits,
    bf16_number,
    bits_of,
    is_finite,
    load_real,
    number_of,
    store_real,
)
from pykernels.cuda.triton.tiles import check, check_flat
from pykernels.ops.compress import record_bytes
from pykernels.ops.names import CODECS, words

__all__ = ["compress_decode", "compress_encode", "compress_reduce", "constants"]

MAX_BLOCK = 32768
TILE = 2048  # elements that a program takes at least
OPTIONS = {"enable_fp_fusion": False}
# The greatest code, where codes stand for multiples of the scale; an integer where they are.
_CODECS = words(CODECS)
_STOCHASTIC = words((codec.name for codec in CODECS.values() if codec.stochastic), " and ")
LEVELS: dict[str, float] = {"int8": 127, "int4": 7, "int2": 1, "fp8": 448.0}

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds half to even, for numbers up to 2^22
ROUNDER_BITS = tl.constexpr(0x4B400000)
STEPS = tl.constexpr(32767.0)  # means are sums of whole steps, so that the order of the sum cannot matter
TINY = tl.constexpr(2.0**-126)
NAN = tl.constexpr(0x7FC00000)
SIGN = tl.constexpr(-(2**31))


@triton.jit
def _round(t):
    """int32, half to even, for abs(t) up to 2^22."""
    return bits_of(t + ROUNDER) - ROUNDER_BITS


@triton.jit
def _to_e4m3(t):
    """fp32 up to 448 to the bits of e4m3fn, half to even; int32. Below 2^-6 there are steps of 2^-9.

    Adding 2^20 times the power of two below t rounds to eighth parts of that power, and counts them.
    """
    bits = bits_of(t)
    power = tl.maximum(bits & INFINITY, 121 << 23)
    total = bits_of(tl.abs(t) + number_of(power + (20 << 23)))
    code = (power >> 20) + (total - power) - ((20 << 23) + (121 << 3))
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _from_e4m3(code):
    """Shifted to where fp32 has them, the bits are 2^-120 times the number, whether that is denormal or not."""
    v = number_of(((code << 24) >> 4) & (SIGN | 0x07F00000)) * (2.0**120)
    return tl.where(tl.abs(v) > 448.0, number_of(tl.full(v.shape, NAN, tl.int32)), v)


@triton.jit
def _value(code, scale, CODEC: tl.constexpr):
    """What a code (int32; the integers signed) stands for."""
    if CODEC == "onebit":
        return tl.where(code != 0, -scale, scale)
    elif CODEC == "fp8":
        return _from_e4m3(code) * scale
    else:
        return code.to(tl.float32) * scale


@triton.jit
def _code(v, scale, inverse, place, key, CODEC: tl.constexpr, LEVEL: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The code, int32, of v in a record of this scale; the integers are signed."""
    if CODEC == "onebit":
        return (v < 0.0).to(tl.int32)
    else:
        t = v * inverse
        if CODEC == "fp8":
            return _to_e4m3(tl.minimum(tl.maximum(t, -LEVEL), LEVEL))
        else:
            if STOCHASTIC:
                q = _round(t)
                q -= (q.to(tl.float32) > t).to(tl.int32)
                draw = (mix(key ^ (place.to(tl.uint32) * 0x9E3779B9)) >> 8).to(tl.float32) * (2.0**-24)
                q += (draw < t - q.to(tl.float32)).to(tl.int32)
            else:
                q = _round(t)
            return tl.minimum(tl.maximum(q, -LEVEL), LEVEL)


@triton.jit
def _scale_of(
    vs, top, elements, MEAN: tl.constexpr, CODEC: tl.constexpr, LEVEL: tl.constexpr, PLANES: tl.constexpr
):  # fmt: skip
    """fp32 [rows, 1] of the planes `vs`, whose records hold `elements` numbers, the greatest of them `top`."""
    if MEAN:
        scale = tl.math.div_rn(top, tl.full(top.shape, STEPS, tl.float32))
        none = scale < TINY
        inverse = tl.math.div_rn(tl.full(top.shape, 1.0, tl.float32), tl.where(none, 1.0, scale))
        steps = _round(tl.abs(vs[0]) * inverse)
        for p in tl.static_range(1, PLANES):
            steps += _round(tl.abs(vs[p]) * inverse)
        sums = tl.where(none, 0, tl.sum(steps, axis=1, keep_dims=True))
        scale = scale * tl.math.div_rn(sums.to(tl.float32), elements.to(tl.float32))
        if CODEC == "int2":
            scale = scale * 1.5
        return tl.where(none, 0.0, scale)
    else:
        return tl.math.div_rn(top, tl.full(top.shape, LEVEL, tl.float32))


@triton.jit
def _number_code(v, CODEC: tl.constexpr):
    """v as the number that stands in the record: at most the greatest finite one, NaNs the positive quiet one."""
    if CODEC == "bf16":
        most = number_of(tl.full(v.shape, 0x7F7F0000, tl.int32))
        return bf16_bits(tl.where(is_finite(v), tl.minimum(tl.maximum(v, -most), most), v))
    elif CODEC == "fp16":
        bounded = tl.where(is_finite(v), tl.minimum(tl.maximum(v, -65504.0), 65504.0), v)
        bits = bounded.to(tl.float16).to(tl.uint16, bitcast=True)
        return tl.where(v == v, bits, 0x7E00).to(tl.uint16)
    else:
        return tl.where(v == v, bits_of(v), NAN)


@triton.jit
def _number_value(code, CODEC: tl.constexpr):
    if CODEC == "bf16":
        return bf16_number(code)
    elif CODEC == "fp16":
        return code.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return number_of(code)


@triton.jit
def _number_pointer(payload, CODEC: tl.constexpr):
    if CODEC == "fp32":
        return payload.to(tl.pointer_type(tl.int32))
    else:
        return payload.to(tl.pointer_type(tl.uint16))


@triton.jit
def _read_tile(table, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """(first element, elements, first byte) of this program's tile."""
    row = table + tl.program_id(0).to(tl.int64) * 4
    first = tl.multiple_of(tl.load(row), VECTOR)
    count = tl.multiple_of(tl.load(row + 1).to(tl.int32), VECTOR)
    return first, count, tl.multiple_of(tl.load(row + 2), ALIGNED)


@triton.jit
def _decode_tile(
    payload, row, j, there, exists,
    CODEC: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """The planes, fp32, of the records that begin at `payload`."""
    if BITS > 8:
        code = tl.load(_number_pointer(payload, CODEC) + row * BLOCK + j, mask=exists, other=0)
        return (_number_value(code, CODEC),)
    else:
        scale = tl.load((payload + row * RECORD).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
        codes = tl.load(payload + (row * RECORD + 4) + j, mask=exists, other=0).to(tl.int32)
        values = ()
        for p in tl.static_range(PLANES):
            if CODEC == "fp8":
                code = codes
            elif CODEC == "onebit":
                code = (codes >> p) & 1
            else:
                code = (codes << (32 - (p + 1) * BITS)) >> (32 - BITS)
            values += (_value(code, scale, CODEC),)
        return values


@triton.jit
def _encode_tile(
    vs, payload, first, count, row, j, there, exists, seed_low, seed_high,
    CODEC: tl.constexpr, BITS: tl.constexpr, LEVEL: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, RECORD: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Write the planes `vs`, zero behind the segment's end, to the records at `payload`; return what is decoded."""
    if BITS > 8:
        code = _number_code(vs[0], CODEC)
        tl.store(_number_pointer(payload, CODEC) + row * BLOCK + j, code, mask=exists)
        return (_number_value(code, CODEC),)
    else:
        top = bits_of(vs[0]) & MAGNITUDE  # as integers: NaN is above infinity, infinity above all numbers
        for p in tl.static_range(1, PLANES):
            top = tl.maximum(top, bits_of(vs[p]) & MAGNITUDE)
        top = tl.max(top, axis=1, keep_dims=True)
        bad = top >= INFINITY
        elements = tl.minimum(tl.maximum(count - row * BLOCK, 1), BLOCK)
        MEAN: tl.constexpr = CODEC == "onebit" or (CODEC == "int2" and not STOCHASTIC)
        scale = _scale_of(vs, number_of(tl.where(bad, 0, top)), elements, MEAN, CODEC, LEVEL, PLANES)
        none = scale < TINY
        inverse = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(none, 1.0, scale))
        scale = tl.where(none, 0.0, scale)
        scale = number_of(tl.where(bad, NAN, bits_of(scale)))
        key = key_of(first + row * BLOCK, seed_low, seed_high) if STOCHASTIC else row
        packed = tl.zeros(vs[0].shape, tl.int32)
        values = ()
        for p in tl.static_range(PLANES):
            code = _code(vs[p], scale, inverse, p * WIDTH + j, key, CODEC, LEVEL, STOCHASTIC)
            code = tl.where(none, 0, code)  # bad records have no scale either
            packed |= (code & ((1 << BITS) - 1)) << (p * BITS)
            values += (_value(code, scale, CODEC),)
        tl.store((payload + row * RECORD).to(tl.pointer_type(tl.float32)), scale, mask=there)
        tl.store(payload + (row * RECORD + 4) + j, packed.to(tl.uint8), mask=exists)
        return values


@triton.jit
def _keep_errors(vs, values, residual, place, count, exists, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """The residual becomes v - d; where that is not finite it stays as it was.

    It is read again, mostly from the L1 cache: kept in registers, it would make large records spill.
    """
    for p in tl.static_range(PLANES):
        error = vs[p] - values[p]
        mask = exists & (place + p * WIDTH < count)
        kept = tl.load(residual + (place + p * WIDTH), mask=mask, other=0.0)
        tl.store(residual + (place + p * WIDTH), tl.where(is_finite(error), error, kept), mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _encode(
    x, residual, payload, table, seed_low, seed_high,
    REAL: tl.constexpr, STOCHASTIC: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr, CODEC: tl.constexpr,
    BITS: tl.constexpr, LEVEL: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    first, count, begin = _read_tile(table, VECTOR, ALIGNED)
    row = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, SPAN)[None, :]
    there = row * BLOCK < count
    exists = there & (j < WIDTH)
    place = row * BLOCK + j
    x += first
    vs = ()
    for p in tl.static_range(PLANES):
        mask = exists & (place + p * WIDTH < count)
        v = load_real(x + (place + p * WIDTH), mask, REAL)
        if residual is not None:
            v = v + tl.load(residual + first + (place + p * WIDTH), mask=mask, other=0.0)
        vs += (v,)
    values = _encode_tile(
        vs, payload + begin, first, count, row, j, there, exists, seed_low, seed_high,
        CODEC, BITS, LEVEL, PLANES, WIDTH, BLOCK, RECORD, STOCHASTIC,
    )  # fmt: skip
    if residual is not None:
        _keep_errors(vs, values, residual + first, place, count, exists, WIDTH, PLANES)


@triton.jit
def _weighted(values, weights, rank, PLANES: tl.constexpr):
    if weights is None:
        return values
    else:
        weight = tl.load(weights + rank)
        products = ()
        for p in tl.static_range(PLANES):
            products += (weight * values[p],)
        return products


@triton.jit
def _sum_tiles(
    payloads, weights, stride, ranks, row, j, there, exists,
    CODEC: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr, RECORD: tl.constexpr,
    ALIGNED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """((d0 + d1) + ...) of the records at payloads + rank * stride, each times its rank's weight, if there are weights;
    UNROLL ranks' codes are asked for together."""
    total = _decode_tile(payloads, row, j, there, exists, CODEC, BITS, PLANES, BLOCK, RECORD)
    total = _weighted(total, weights, 0, PLANES)
    stride = tl.multiple_of(tl.cast(stride, tl.int64), ALIGNED)
    for rank in tl.range(1, ranks, loop_unroll_factor=UNROLL):
        payloads += stride
        values = _decode_tile(payloads, row, j, there, exists, CODEC, BITS, PLANES, BLOCK, RECORD)
        values = _weighted(values, weights, rank, PLANES)
        sums = ()
        for p in tl.static_range(PLANES):
            sums += (total[p] + values[p],)
        total = sums
    return total


@triton.jit
def _decode(
    payloads, weights, out, table, stride, ranks, factor,
    REAL: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr, CODEC: tl.constexpr, BITS: tl.constexpr,
    PLANES: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    first, count, begin = _read_tile(table, VECTOR, ALIGNED)
    row = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, SPAN)[None, :]
    there = row * BLOCK < count
    exists = there & (j < WIDTH)
    total = _sum_tiles(
        payloads + begin, weights, stride, ranks, row, j, there, exists, CODEC, BITS, PLANES, BLOCK, RECORD, ALIGNED, 1
    )
    out += first
    for p in tl.static_range(PLANES):
        place = row * BLOCK + j + p * WIDTH
        store_real(out + place, total[p] * factor, exists & (place < count), REAL)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _reduce(
    payloads, residual, payload, table, stride, ranks, factor, seed_low, seed_high,
    STOCHASTIC: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr, CODEC: tl.constexpr, BITS: tl.constexpr,
    LEVEL: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    first, count, begin = _read_tile(table, VECTOR, ALIGNED)
    row = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, SPAN)[None, :]
    there = row * BLOCK < count
    exists = there & (j < WIDTH)
    place = row * BLOCK + j
    # As many as need no more registers than what is behind it; of int2 and 1-bit codes a byte is work enough.
    TOGETHER: tl.constexpr = 3 if CODEC == "int8" or CODEC == "int4" else (2 if CODEC == "fp8" else 1)
    total = _sum_tiles(
        payloads + begin, None, stride, ranks, row, j, there, exists, CODEC, BITS, PLANES, BLOCK, RECORD, ALIGNED,
        TOGETHER,
    )  # fmt: skip
    vs = ()
    for p in tl.static_range(PLANES):
        mask = exists & (place + p * WIDTH < count)
        v = total[p] * factor
        if residual is not None:
            v = v + tl.load(residual + first + (place + p * WIDTH), mask=mask, other=0.0)
        vs += (tl.where(mask, v, 0.0),)
    values = _encode_tile(
        vs, payload + begin, first, count, row, j, there, exists, seed_low, seed_high,
        CODEC, BITS, LEVEL, PLANES, WIDTH, BLOCK, RECORD, STOCHASTIC,
    )  # fmt: skip
    if residual is not None:
        _keep_errors(vs, values, residual + first, place, count, exists, WIDTH, PLANES)


# ---- launchers ----


def constants(codec: str, block: int) -> dict[str, Any]:
    """The compile-time arguments that say what a record and a tile are."""
    bits = CODECS[codec].bits
    planes = 8 // bits if bits < 8 else 1
    width = block // planes
    span = triton.next_power_of_2(width)
    return {
        "CODEC": codec,
        "BITS": bits,
        "PLANES": planes,
        "WIDTH": width,
        "SPAN": span,
        "ROWS": max(1, TILE // (span * planes)),
        "BLOCK": block,
        "RECORD": record_bytes(codec, block),
    }


def options(shape: dict[str, Any]) -> dict[str, Any]:
    """How to launch: 16 elements a thread, up to 1024 threads (blocks above 16384 elements spill registers)."""
    elements = shape["ROWS"] * shape["SPAN"] * shape["PLANES"]
    return {"num_warps": max(4, min(32, elements // 512)), **OPTIONS}


def _check_codec(op: str, codec: str, block: int, stochastic: bool = False) -> None:
    check(codec in CODECS, op, f"codec must be one of {_CODECS}, not '{codec}'")
    good = block % 32 == 0 and 32 <= block <= MAX_BLOCK
    check(good, op, f"block must be a multiple of 32 in [32, {MAX_BLOCK}], not {block}")
    good = not stochastic or CODECS[codec].stochastic
    check(good, op, f"stochastic rounding is for {_STOCHASTIC}, not {codec}")


def _cut(op: str, segments: torch.Tensor, device: torch.device, shape: dict[str, Any]) -> tiles.Tiles:
    return tiles.cut(op, segments, device, shape["ROWS"], shape["BLOCK"], shape["RECORD"])


def _check_ends(op: str, found: tiles.Tiles, name: str, numel: int, payload: str, size: int) -> None:
    check(found.last <= numel, op, f"segments end at element {found.last}, but {name} has {numel}")
    check(found.last_byte <= size, op, f"segments end at byte {found.last_byte}, but {payload} has {size}")


def compress_encode(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    payload: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    stochastic: bool = False,
    seed: int = 0,
) -> None:
    """Encode `x + residual` into `payload`, leave in `residual` what was not sent: see `pykernels.ops.compress`."""
    op = "compress_encode"
    _check_codec(op, codec, block, stochastic)
    tiles.check_real(op, "x", x)
    if residual is not None:
        check_flat(op, "residual", residual, x, torch.float32)
        same = residual.numel() == x.numel()
        check(same, op, f"residual must have as many elements as x, {x.numel()}, not {residual.numel()}")
    check_flat(op, "payload", payload, x, torch.uint8)
    shape = constants(codec, block)
    found = _cut(op, segments, x.device, shape)
    _check_ends(op, found, "x", x.numel(), "payload", payload.numel())
    if found.count == 0:
        return
    numbers, kind = tiles.real(x)
    with tiles.on(x.device):
        for table, vector in found.parts:
            _encode[(table.shape[0],)](
                numbers, residual, payload, table, *halves(seed), REAL=kind, STOCHASTIC=stochastic,
                LEVEL=LEVELS.get(codec), VECTOR=vector, ALIGNED=found.aligned, **shape, **options(shape),
            )  # fmt: skip


def compress_decode(
    payloads: torch.Tensor,
    out: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    factor: float = 1.0,
    weights: torch.Tensor | None = None,
) -> None:
    """`out[segment] = factor * sum over ranks`, of the payloads [ranks, bytes]: see `pykernels.ops.compress`."""
    op = "compress_decode"
    _check_codec(op, codec, block)
    tiles.check_real(op, "out", out)
    stride = tiles.stride_of(op, payloads, out)
    shape = constants(codec, block)
    found = _cut(op, segments, out.device, shape)
    _check_ends(op, found, "out", out.numel(), "a row of payloads", payloads.shape[1])
    if weights is not None:
        check_flat(op, "weights", weights, out, torch.float32)
        good = weights.shape == payloads.shape[:1]
        check(good, op, f"weights must be [{payloads.shape[0]}], a number for each row, not {list(weights.shape)}")
    if found.count == 0:
        return
    numbers, kind = tiles.real(out)
    with tiles.on(out.device):
        for table, vector in found.parts:
            _decode[(table.shape[0],)](
                payloads, weights, numbers, table, stride, payloads.shape[0], factor, REAL=kind, VECTOR=vector,
                ALIGNED=tiles.power_of_two(found.aligned, stride), **shape, **options(shape),
            )  # fmt: skip


def compress_reduce(
    payloads: torch.Tensor,
    residual: torch.Tensor | None,
    payload: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    factor: float,
    stochastic: bool = False,
    seed: int = 0,
) -> None:
    """Encode `factor * sum over ranks + residual` again, into `payload`: see `pykernels.ops.compress`."""
    op = "compress_reduce"
    _check_codec(op, codec, block, stochastic)
    check_flat(op, "payload", payload, payload, torch.uint8)
    stride = tiles.stride_of(op, payloads, payload)
    shape = constants(codec, block)
    found = _cut(op, segments, payload.device, shape)
    if residual is not None:
        check_flat(op, "residual", residual, payload, torch.float32)
    numel = found.last if residual is None else residual.numel()
    _check_ends(op, found, "residual", numel, "payload", min(payload.numel(), payloads.shape[1]))
    if found.count == 0:
        return
    with tiles.on(payload.device):
        for table, vector in found.parts:
            _reduce[(table.shape[0],)](
                payloads, residual, payload, table, stride, payloads.shape[0], factor, *halves(seed),
                STOCHASTIC=stochastic, LEVEL=LEVELS.get(codec), VECTOR=vector,
                ALIGNED=tiles.power_of_two(found.aligned, stride), **shape, **options(shape),
            )  # fmt: skip
