"""What a client answers with: the change of each array as records of a codec, one array's after another's.

Whoever reads knows names, shapes and dtypes from what was sent to the client, so a payload has no sizes of its own: it
is as many bytes as these shapes take, and its type (``stype``) tells the format and the codec. Floats of two dimensions
or more travel through the codec and those of one as fp32, but float64 of one as it is: that is what Flower's mean makes
of counters. Arrays of other dtypes travel as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

from pykernels import _host
from pykernels.comm.stats import Stats
from pykernels.ops.compress import CODECS, record_bytes

Arrays = dict[str, np.ndarray[Any, Any]]

BLOCK, RAW_BLOCK = 256, 32  # elements of a record, where there is a scale and where there is none
FORMAT = "pykernels.1"  # how the payload is serialized: as it is. The number counts formats; a codec's name follows
DTYPES = ("float32", "float16", "float64")  # that are encoded
TOGETHER = 1 << 18  # elements that are decoded at a time, of all payloads


@dataclass(frozen=True)
class Part:
    """Where an array lies in a payload; `codec` None: its bytes as they are."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: str | None
    block: int
    first: int
    size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def segments(self) -> np.ndarray[Any, Any]:
        return np.array([[0, self.numel, 0]], np.int64)

    def encode(self, x: np.ndarray[Any, Any], residual: np.ndarray[Any, Any] | None, payload: Any) -> None:
        assert self.codec is not None
        _host.compress_encode(x.reshape(-1), residual, payload, self.segments, self.codec, self.block)

    def decode(
        self, payloads: Sequence[np.ndarray[Any, Any]], weights: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """fp32 of `shape`: what the payloads hold, added in order, each times its weight; in one pass over them."""
        assert self.codec is not None
        out = np.zeros(self.numel, np.float32)
        record = record_bytes(self.codec, self.block)
        for begin in range(0, self.numel, TOGETHER):
            end = min(begin + TOGETHER, self.numel)
            first, last = (self.first + -(-n // self.block) * record for n in (begin, end))
            rows = np.stack([payload[first:last] for payload in payloads])
            _host.compress_decode(
                rows, out, np.array([[begin, end - begin, 0]]), self.codec, self.block, weights=weights
            )
        return out.reshape(self.shape)

    def add(self, before: np.ndarray[Any, Any], change: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`before` and what was decoded, in its dtype."""
        return np.asarray(before.astype(_wide(self.dtype), copy=False) + change).astype(self.dtype, copy=False)

    def plain(self, payload: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The array whose bytes are as they are."""
        return np.frombuffer(payload[self.first : self.first + self.size].tobytes(), self.dtype).reshape(self.shape)


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What differences are taken in."""
    return np.promote_types(dtype, np.float32)


def lay_out(arrays: Arrays, codec: str) -> list[Part]:
    """Where each of `arrays` lies."""
    found, end = [], 0
    for name, array in arrays.items():
        kind: str | None = None
        block = RAW_BLOCK
        size = array.nbytes
        if array.dtype.name in DTYPES and (array.ndim > 1 or array.itemsize <= 4):
            kind = codec if array.ndim > 1 else "fp32"
            block = BLOCK if CODECS[kind].header else RAW_BLOCK
            size = -(-array.size // block) * record_bytes(kind, block)
        found.append(Part(name, array.shape, array.dtype, kind, block, end, size))
        end += -(-size // 4) * 4  # records lie at multiples of 4 bytes
    return found


def payload_bytes(parts: Sequence[Part]) -> int:
    return max((-(-(part.first + part.size) // 4) * 4 for part in parts), default=0)


def numpy(record: ArrayRecord) -> Arrays:
    """The arrays of a record, contiguous.

    Raises:
        ValueError: it is a payload.
    """
    if any(array.stype.startswith(FORMAT) for array in record.values()):
        raise ValueError("pykernels: compress: the reply has been compressed already: give it once, as a mod")
    return {name: np.asarray(array.numpy(), order="C") for name, array in record.items()}


def encode(
    before: Arrays, after: Arrays, codec: str, residuals: Mapping[str, np.ndarray[Any, Any]] | None
) -> tuple[Array, Arrays]:
    """The payload of what changed from `before` to `after`, and fp32 what it lacks of it.

    Args:
        before, after: of the same names, shapes and dtypes.
        residuals: what earlier payloads lacked, which is added; None: nothing is kept.
    """
    parts = lay_out(before, codec)
    payload = np.zeros(payload_bytes(parts), np.uint8)
    kept: Arrays = {}
    for part in parts:
        place = payload[part.first : part.first + part.size]
        if part.codec is None:
            place[:] = np.frombuffer(after[part.name].tobytes(), np.uint8)
            continue
        change = np.subtract(after[part.name], before[part.name], dtype=_wide(part.dtype)).astype(np.float32)
        residual = None
        if residuals is not None and part.codec == codec and codec != "fp32":
            residual = np.zeros(part.numel, np.float32)
            found = residuals.get(part.name)
            if found is not None and found.size == part.numel and found.dtype == np.float32:
                residual[:] = found.reshape(-1)
            kept[part.name] = residual
        part.encode(change, residual, place)
    sent = Array(dtype="uint8", shape=payload.shape, stype=f"{FORMAT}.{codec}", data=payload.tobytes())
    return sent, kept


@dataclass(frozen=True)
class Update:
    """What a client changed: the payload, as bytes, and where the arrays lie in it."""

    codec: str
    payload: np.ndarray[Any, Any]
    parts: list[Part]
    before: Arrays  # what the client was sent

    def count(self, stats: Stats) -> None:
        """Add its bytes to `stats`: what they stand for, and as they came."""
        stats.gradient_bytes += sum(array.nbytes for array in self.before.values())
        stats.wire_bytes += self.payload.nbytes


def read(data: bytes, stype: str, before: Arrays) -> Update:
    """The answer of a client that was sent `before`.

    Raises:
        ValueError: it is not what :func:`encode` makes of such arrays.
    """
    form, _, codec = stype.rpartition(".")
    if form != FORMAT or codec not in CODECS:
        raise ValueError(
            f"the reply was not compressed by comm.flower.compress, or by an unknown codec: {stype[:64]!r}"
        )
    parts = lay_out(before, codec)
    if len(data) != payload_bytes(parts):
        raise ValueError(f"the payload has {len(data)} bytes, {codec} of these arrays takes {payload_bytes(parts)}")
    return Update(codec, np.frombuffer(data, np.uint8), parts, before)


def _finite(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def decode(update: Update, norm: float | None = None) -> Arrays:
    """The client's arrays.

    Args:
        norm: of all changes together, to which they are clipped: under differential privacy what one client moves is
            bounded, and neither a codec nor its residual keeps to that.

    Raises:
        ValueError: a value is not finite.
    """
    arrays: Arrays = {}
    for part in update.parts:
        if part.codec is None:
            array = part.plain(update.payload)
        else:
            array = part.add(update.before[part.name], part.decode([update.payload]))
        if not _finite(array):
            raise ValueError(f"{part.name} is not finite")
        arrays[part.name] = array
    return arrays if norm is None else _clipped(update.before, arrays, norm)


def _clipped(before: Arrays, after: Arrays, norm: float) -> Arrays:
    changes = {name: np.subtract(x, before[name], dtype=_wide(x.dtype)) for name, x in after.items()}
    total = math.hypot(*(float(np.linalg.norm(change)) for change in changes.values()))
    if total <= norm:
        return after
    return {
        name: np.asarray(before[name] + change * (norm / total)).astype(before[name].dtype)
        for name, change in changes.items()
    }


def clipping_norm(config: Mapping[str, Any]) -> float | None:
    """To which clients were told to clip what they change, if they were."""
    norm = config.get(KEY_CLIPPING_NORM)
    return norm if isinstance(norm, int | float) else None


def mean(updates: Sequence[Update], weights: Sequence[float] | None) -> Arrays | None:
    """What the clients were sent and the weighted mean of what they changed; None: only replies that are decoded one by
    one can tell, since clients were sent different arrays or used different codecs, there are no weights, or a value is
    not finite.

    Shares add up to one, so this is the weighted mean of the decoded replies, in one pass over the payloads. What is
    not encoded is averaged as Flower does: integers become float64.
    """
    total = sum(weights or ())
    if not total or any(u.before is not updates[0].before or u.codec != updates[0].codec for u in updates):
        return None
    shares = [weight / total for weight in weights or ()]
    payloads, factors = [update.payload for update in updates], np.array(shares, np.float32)
    arrays: Arrays = {}
    for part in updates[0].parts:
        if part.codec is None:
            array = np.asarray(sum(part.plain(p) * share for p, share in zip(payloads, shares, strict=True)))
        else:
            array = part.add(updates[0].before[part.name], part.decode(payloads, factors))
        if not _finite(array):
            return None
        arrays[part.name] = array
    return arrays
