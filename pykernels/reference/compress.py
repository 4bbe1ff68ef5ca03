"""compress: gradients to the bytes that go on the wire, and back, with error feedback.

**Dense codecs.** A payload is a run of records; a record holds `block` elements. `segments`, int64 [S, 3], says which
elements of the flat tensor go where: `(first element, elements, first byte of the payload)`; every segment begins a new
record, and its last record is filled with zeros. Per record, with `v = float(x) + residual` in fp32:

| codec | header | code of v | decoded d |
| --- | --- | --- | --- |
| int8, int4 | scale = max abs(v) / L, fp32 | round(v * (1/scale)) in [-L, L], L = 127, 7 | code * scale |
| int2 | scale = 1.5 * mean abs(v), fp32 | round(v * (1/scale)) in [-1, 1] | code * scale |
| fp8 | scale = max abs(v) / 448, fp32 | e4m3fn(v * (1/scale)) | code * scale |
| onebit | scale = mean abs(v), fp32 | v < 0 | -scale if code else scale |
| bf16, fp16, fp32 | none | v in that dtype, at most its largest finite | code |

and the new residual is `v - d`. Codes of fewer than 8 bits lie in planes: byte j of the B code bytes holds the elements
j + p*B, p = 0, 1, ..., the p-th from its least significant bits up. Stochastic rounding (int8, int4, int2) rounds up
where a hash of (seed, position) falls below the fraction, and is unbiased: int2 then takes scale = max abs(v).

- A scale below the smallest normal number is 0, and so are all codes: the record decodes to 0, v stays in the residual.
- A record with an infinity or a NaN has a NaN scale and codes 0: it decodes to NaN. Without a header the elements alone
  are concerned (NaNs become the positive quiet one). Wherever v - d is not finite, the residual stays as it was.

**Sparse codecs.** `sparse_encode` sends the elements of largest magnitude, `randomk_encode` elements at positions that
every rank draws alike, so that only values need to travel.

Every step is a single fp32 operation (no FMA) or an exact integer one, so that every isa and every GPU makes the same
bytes. Like the ops, the functions write into their arguments.
"""

from __future__ import annotations

import torch

from pykernels.ops.names import CODECS

__all__ = [
    "compress_decode",
    "compress_encode",
    "compress_reduce",
    "randomk_decode",
    "randomk_encode",
    "record_bytes",
    "sparse_decode",
    "sparse_encode",
]

LEVELS = {"int8": 127.0, "int4": 7.0, "int2": 1.0, "fp8": 448.0}
_FLOATS = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STEPS = 32767.0  # means of abs(v) are sums of whole steps of max/32767, so that the order of the sum cannot matter
_TINY = torch.finfo(torch.float32).tiny
EMPTY = 0xFFFFFFFF  # the index of an unused entry of a sparse payload


def has_scale(codec: str) -> bool:
    return CODECS[codec].header > 0


def record_bytes(codec: str, block: int) -> int:
    """Bytes of a record: the header, if the codec has one, and `block` codes."""
    return CODECS[codec].header + block * CODECS[codec].bits // 8


def _mix(h: torch.Tensor) -> torch.Tensor:
    """The 32-bit mixer lowbias32 (C. Wellons, "Prospecting for hash functions"), on int64 that hold 32 bits."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & 0xFFFFFFFF
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & 0xFFFFFFFF  # below 2^63 before the mask
    return h ^ (h >> 16)


def _key(position: torch.Tensor, seed: int) -> torch.Tensor:
    """A 32-bit key of a 64-bit position and a 64-bit seed."""
    seed &= 0xFFFFFFFFFFFFFFFF
    h = _mix((position & 0xFFFFFFFF) ^ _mix(position >> 32))
    return _mix((seed & 0xFFFFFFFF) ^ _mix((seed >> 32) ^ h))


def _uniform(first: int, rows: int, block: int, seed: int) -> torch.Tensor:
    """fp32 [rows, block] in [0, 1): hash(key of the record's first position, place in the record) / 2^24."""
    key = _key(first + block * torch.arange(rows), seed)[:, None]
    place = (torch.arange(block) * 0x9E3779B9) & 0xFFFFFFFF
    return (_mix(key ^ place) >> 8).float() * 2.0**-24


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, block] codes below 2^bits to [rows, block * bits / 8] bytes, in planes."""
    planes = codes.view(codes.shape[0], 8 // bits, -1).int()
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)[None, :, None]
    return (planes << shifts).sum(1).to(torch.uint8)


def _unpack(data: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_pack`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)[None, :, None]
    return ((data.int()[:, None] >> shifts) & (2**bits - 1)).flatten(1).to(torch.uint8)


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


def _encode_records(
    v: torch.Tensor, count: torch.Tensor, codec: str, stochastic: bool, first: int, seed: int
) -> torch.Tensor:
    """fp32 [rows, block], zeros behind `count` [rows] elements, to the records, uint8 [rows, record_bytes]."""
    if not has_scale(codec):
        dtype = _FLOATS[codec]
        most = torch.finfo(dtype).max
        codes = torch.where(v.isfinite(), v.clamp(-most, most), v).to(dtype).float()
        codes = torch.where(v.isfinite(), codes.clamp(-most, most), v)  # rounding may have reached infinity
        return _bytes(codes.to(dtype).masked_fill(v.isnan(), torch.nan))  # NaNs convert to various ones
    bad = ~v.isfinite().all(1, keepdim=True)
    v = torch.where(bad, 0.0, v)
    top = v.abs().amax(1, keepdim=True)
    mean = codec == "onebit" or (codec == "int2" and not stochastic)
    level = _STEPS if mean else LEVELS[codec]
    scale = top / level
    small = scale < _TINY
    if mean:
        steps = torch.where(small, 0.0, torch.round(v.abs() * (1.0 / scale))).to(torch.int64).sum(1, keepdim=True)
        scale = scale * (steps.float() / count[:, None].float())
        if codec == "int2":
            scale = scale * 1.5
    small |= scale < _TINY
    t = torch.where(small, 0.0, v * (1.0 / scale))
    bits = CODECS[codec].bits
    if codec == "onebit":
        codes = _pack((v < 0).to(torch.uint8), 1)
    elif codec == "fp8":
        codes = _bytes(t.clamp(-LEVELS[codec], LEVELS[codec]).to(torch.float8_e4m3fn))
    else:
        if stochastic:
            low = t.floor()
            q = low + (_uniform(first, v.shape[0], v.shape[1], seed) < t - low).float()
        else:
            q = t.round()
        q = q.clamp(-LEVELS[codec], LEVELS[codec]).to(torch.int32)
        codes = _pack((q & (2**bits - 1)).to(torch.uint8), bits)
    scale = torch.where(small, 0.0, scale)
    codes = torch.where(small | bad, 0, codes)
    return torch.cat([_bytes(torch.where(bad, torch.nan, scale)), codes], 1)


def _decode_records(records: torch.Tensor, codec: str) -> torch.Tensor:
    """Records, uint8 [rows, record_bytes], to fp32 [rows, block]."""
    if not has_scale(codec):
        return records.contiguous().view(_FLOATS[codec]).float()
    scale = records[:, :4].contiguous().view(torch.float32)
    codes = records[:, 4:].contiguous()
    if codec == "fp8":
        return codes.view(torch.float8_e4m3fn).float() * scale
    bits = CODECS[codec].bits
    q = _unpack(codes, bits)
    if codec == "onebit":
        return torch.where(q == 1, -scale, scale)
    shift = 8 - bits  # sign extension
    return (((q << shift).view(torch.int8)) >> shift).float() * scale


def _rows(n: int, block: int) -> int:
    return -(-n // block)


def _encode_into(
    v: torch.Tensor,
    residual: torch.Tensor | None,
    payload: torch.Tensor,
    codec: str,
    block: int,
    stochastic: bool,
    first: int,
    seed: int,
) -> None:
    """fp32 `v`, a segment, into the records at the beginning of `payload`; `residual` lies like `v`."""
    n, rows = v.numel(), _rows(v.numel(), block)
    padded = torch.zeros(rows * block)
    padded[:n] = v
    count = torch.full((rows,), block)
    if n % block:
        count[-1] = n % block
    records = _encode_records(padded.view(rows, block), count, codec, stochastic, first, seed)
    payload[: records.numel()] = records.flatten()
    if residual is not None:
        error = v - _decode_records(records, codec).flatten()[:n]
        residual.copy_(torch.where(error.isfinite(), error, residual))


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
    """Encode `x + residual` into `payload` (uint8) and leave in `residual` (fp32, as large as x) what was not sent."""
    flat = x.view(-1)
    for first, n, begin in segments.tolist():
        if n == 0:
            continue
        kept = None if residual is None else residual.view(-1)[first : first + n]
        v = flat[first : first + n].float()
        v = v if kept is None else v + kept
        _encode_into(v, kept, payload[begin:], codec, block, stochastic, first, seed)


def _sum(
    payloads: torch.Tensor,
    begin: int,
    n: int,
    codec: str,
    block: int,
    factor: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """factor * (((d0 + d1) + d2) + ...), in fp32, of one segment of every rank's payload; with weights, of w * d."""
    size = _rows(n, block) * record_bytes(codec, block)
    shards = [_decode_records(p[begin : begin + size].view(_rows(n, block), -1), codec) for p in payloads]
    if weights is not None:
        shards = [weight * shard for weight, shard in zip(weights, shards, strict=True)]
    total = shards[0]
    for shard in shards[1:]:
        total = total + shard
    return total.flatten()[:n] * torch.tensor(factor, dtype=torch.float32)


def compress_decode(
    payloads: torch.Tensor,
    out: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    factor: float = 1.0,
    weights: torch.Tensor | None = None,
) -> None:
    """`out[segment] = factor * sum over ranks`, of the payloads [ranks, bytes], in the order of the ranks.

    `weights`, fp32 [ranks], multiply what each rank sent, before the sum.
    """
    for first, n, begin in segments.tolist():
        if n:
            total = _sum(payloads, begin, n, codec, block, factor, weights)
            out.view(-1)[first : first + n] = total.to(out.dtype)


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
    """Encode `factor * sum over ranks + residual` again, into `payload`; segments count elements of `residual`."""
    for first, n, begin in segments.tolist():
        if n == 0:
            continue
        v = _sum(payloads, begin, n, codec, block, factor)
        kept = None if residual is None else residual[first : first + n]
        v = v if kept is None else v + kept
        _encode_into(v, kept, payload[begin:], codec, block, stochastic, first, seed)


def _positions(segments: torch.Tensor) -> torch.Tensor:
    """The positions of all elements of the segments, one after another."""
    return torch.cat([torch.arange(first, first + n) for first, n, _ in segments.tolist()] or [torch.empty(0).long()])


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
    """The elements of largest magnitude: at most k of them, each of at least `threshold`; among equals the first.

    v = residual + float(x), or with momentum correction (Lin et al., "Deep Gradient Compression") velocity = momentum *
    velocity + float(x) and v = residual + velocity. The payload, 8k bytes, is k uint32 positions in x, ascending, and k
    fp32 values; entries that are not used have position 0xFFFFFFFF and value 0, and stand last. The residual becomes 0
    where an element was sent (the velocity as well) and v elsewhere. Magnitudes compare as the bits of abs(v): NaN is
    above infinity. Where v is not finite, residual and velocity stay as they were, sent or not.
    """
    at = _positions(segments)
    g, kept = x.view(-1)[at].float(), residual.view(-1)[at]
    moved = g if velocity is None else torch.tensor(momentum) * velocity.view(-1)[at] + g
    v = kept + moved
    magnitude = v.abs().view(torch.int32)
    enough = magnitude >= torch.tensor(threshold, dtype=torch.float32).view(torch.int32)
    order = torch.argsort(torch.where(enough, magnitude, -1), descending=True, stable=True)[:k]
    chosen = order[enough[order]].sort().values
    indices = torch.full((k,), EMPTY, dtype=torch.int64)
    values = torch.zeros(k)
    indices[: chosen.numel()] = at[chosen]
    values[: chosen.numel()] = v[chosen]
    payload[: 4 * k] = _bytes(indices.to(torch.uint32))
    payload[4 * k : 8 * k] = _bytes(values)
    good = v.isfinite()
    left = v.clone()
    left[chosen] = 0.0
    residual.view(-1)[at] = torch.where(good, left, kept)
    if velocity is not None:
        moved = moved.clone()
        moved[chosen] = 0.0
        velocity.view(-1)[at] = torch.where(good, moved, velocity.view(-1)[at])


def sparse_decode(payloads: torch.Tensor, out: torch.Tensor, k: int, factor: float = 1.0) -> None:
    """`out[position] += factor * value` (fp32) for each entry of the payloads [ranks, 8k], rank after rank."""
    for payload in payloads:
        at = payload[: 4 * k].clone().view(torch.uint32).long()  # rows may begin anywhere, words may not
        values = payload[4 * k : 8 * k].clone().view(torch.float32)
        at, values = at[at != EMPTY], values[at != EMPTY]
        flat = out.view(-1)
        flat[at] = (flat[at].float() + values * torch.tensor(factor, dtype=torch.float32)).to(out.dtype)


def _drawn(segments: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """k positions, one in each of k strata of the segments' elements: begin = j*n // k, drawn by a hash of j."""
    at = _positions(segments)
    n = at.numel()
    j = torch.arange(k + 1)
    begin = j * n // k if k else j
    span = begin[1:] - begin[:-1]
    return at[begin[:-1] + (_key(j[:-1], seed) * span >> 32)]


def randomk_encode(
    x: torch.Tensor, residual: torch.Tensor | None, values: torch.Tensor, segments: torch.Tensor, k: int, seed: int
) -> None:
    """`values` (fp32 [k]) = v = float(x) + residual at k positions that depend on the seed alone.

    The elements are cut into k strata as equal as can be, and one is drawn of each, so k is at most their number. The
    residual becomes 0 where an element was sent, v elsewhere; where v is not finite it stays as it was.
    """
    drawn, at = _drawn(segments, k, seed), _positions(segments)
    flat = x.view(-1)
    if residual is None:
        values[:k] = flat[drawn].float()
        return
    kept = residual.view(-1).clone()
    v = flat.float() + kept
    values[:k] = v[drawn]
    left = v.clone()
    left[drawn] = 0.0
    residual.view(-1)[at] = torch.where(v.isfinite(), left, kept)[at]


def randomk_decode(
    values: torch.Tensor, out: torch.Tensor, segments: torch.Tensor, k: int, seed: int, factor: float = 1.0
) -> None:
    """`out` = factor * value at the drawn positions, 0 at the segments' other elements."""
    flat = out.view(-1)
    flat[_positions(segments)] = 0.0
    flat[_drawn(segments, k, seed)] = (values[:k] * torch.tensor(factor, dtype=torch.float32)).to(out.dtype)
