"""What a federated client sends: what changed in NumPy arrays, encoded into one payload. Nothing here needs Flower.

Who decodes knows names, shapes and dtypes from what it sent itself: a payload is as many bytes as these take, whatever
they hold. Floats of two dimensions or more travel through the codec and those of one as fp32, but float64 of one as it
is: that is what Flower's mean makes of counters. Arrays of other dtypes travel as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pykernels import _host
from pykernels.comm.stats import Stats
from pykernels.ops.compress import CODECS, record_bytes

Ndarray = np.ndarray[Any, Any]
Arrays = dict[str, Ndarray]

BLOCK, RAW_BLOCK = 256, 32  # elements of a record, where there is a scale and where there is none
FORMAT = "pykernels.1"  # the number counts formats; a payload's is this, a point and the codec
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
    def segments(self) -> Ndarray:
        return np.array([[0, self.numel, 0]], np.int64)

    def encode(self, x: Ndarray, residual: Ndarray | None, payload: Any) -> None:
        assert self.codec is not None
        _host.compress_encode(x.reshape(-1), residual, payload, self.segments, self.codec, self.block)

    def decode(self, payloads: Sequence[Ndarray], weights: Ndarray | None = None) -> Ndarray:
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

    def add(self, before: Ndarray, change: Ndarray) -> Ndarray:
        """`before` and what was decoded, in its dtype."""
        return np.asarray(before.astype(wide(self.dtype)) + change).astype(self.dtype)

    def plain(self, payload: Ndarray) -> Ndarray:
        """The array whose bytes are as they are."""
        return np.frombuffer(payload[self.first : self.first + self.size].tobytes(), self.dtype).reshape(self.shape)


def wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What differences are taken in."""
    return np.promote_types(dtype, np.float32)


def parts_of(arrays: Mapping[str, Ndarray], codec: str) -> list[Part]:
    """Where the arrays lie in a payload of `codec`."""
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


def size_of(parts: list[Part]) -> int:
    """Bytes of a payload."""
    return max((-(-(part.first + part.size) // 4) * 4 for part in parts), default=0)


def check_alike(before: Mapping[str, Ndarray], after: Arrays) -> None:
    """Names and shapes of a reply are those that were sent; dtypes become so, since averages of integers are float64.

    Raises:
        ValueError: they are not, or a dtype would lose something.
    """
    for name in {**before, **after}:
        came, goes = before.get(name), after.get(name)
        if came is None or goes is None or came.shape != goes.shape or not np.can_cast(goes.dtype, came.dtype):
            told, wanted = ("nothing" if x is None else f"{x.dtype} {list(x.shape)}" for x in (goes, came))
            raise ValueError(f"pykernels: {name}: the reply has {told}, {wanted} was sent")
        after[name] = goes.astype(came.dtype, copy=False)


def encode(
    before: Mapping[str, Ndarray], after: Mapping[str, Ndarray], codec: str, residuals: Mapping[str, Ndarray] | None
) -> tuple[Ndarray, Arrays]:
    """The payload of what changed, and what the codec lost of it, by name; `residuals` None: nothing is kept."""
    parts = parts_of(before, codec)
    payload, kept = np.zeros(size_of(parts), np.uint8), Arrays()
    for part in parts:
        place = payload[part.first : part.first + part.size]
        if part.codec is None:
            place[:] = np.frombuffer(after[part.name].tobytes(), np.uint8)
            continue
        change = np.subtract(after[part.name], before[part.name], dtype=wide(part.dtype)).astype(np.float32)
        residual = None
        if residuals is not None and part.codec == codec and codec != "fp32":
            residual = np.zeros(part.numel, np.float32)
            found = residuals.get(part.name)
            if found is not None and found.size == part.numel and found.dtype == np.float32:
                residual[:] = found.reshape(-1)
            kept[part.name] = residual
        part.encode(change, residual, place)
    return payload, kept


@dataclass(frozen=True)
class Update:
    """What a reply holds: the payload, as bytes, and where the arrays lie in it."""

    codec: str
    payload: Ndarray
    parts: list[Part]
    before: Arrays  # what the client was sent

    @classmethod
    def read(cls, form: object, data: bytes, before: Arrays) -> Update:
        """`data` of format `form` from a client that was sent `before`.

        Raises:
            ValueError: it is not what :func:`encode` makes of such arrays.
        """
        codec = str(form).removeprefix(f"{FORMAT}.")
        if form != f"{FORMAT}.{codec}" or codec not in CODECS:
            raise ValueError(
                f"the reply's arrays are of format {form!r:.80}, comm.flower.compress sends {FORMAT}. and a codec"
            )
        parts = parts_of(before, codec)
        if len(data) != size_of(parts):
            raise ValueError(f"the payload has {len(data)} bytes, {codec} of these arrays takes {size_of(parts)}")
        return cls(codec, np.frombuffer(data, np.uint8), parts, before)

    def arrays(self, norm: float | None = None) -> Arrays:
        """What the client would have sent without a codec, but for what that lost.

        Args:
            norm: of all changes together, to which they are clipped: what one client moves is bounded under
                differential privacy, and neither a codec nor its residual keeps to that.

        Raises:
            ValueError: a value is not finite.
        """
        found = Arrays()
        for part in self.parts:
            if part.codec is None:
                array = part.plain(self.payload)
            else:
                array = part.add(self.before[part.name], part.decode([self.payload]))
            if not finite(array):
                raise ValueError(f"{part.name} is not finite")
            found[part.name] = array
        return found if norm is None else _clipped(self.before, found, norm)

    def count(self, stats: Stats) -> None:
        stats.gradient_bytes += sum(array.nbytes for array in self.before.values())
        stats.wire_bytes += self.payload.nbytes


def _clipped(before: Arrays, after: Arrays, norm: float) -> Arrays:
    changes = {name: np.subtract(x, before[name], dtype=wide(x.dtype)) for name, x in after.items()}
    total = math.hypot(*(float(np.linalg.norm(change)) for change in changes.values()))
    if total <= norm:
        return after
    return {
        name: np.asarray(before[name] + change * (norm / total)).astype(before[name].dtype)
        for name, change in changes.items()
    }


def finite(array: Ndarray) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def mean(updates: Sequence[Update], shares: Sequence[float]) -> Arrays | None:
    """What the clients were sent and the weighted mean of what they changed; None: a value is not finite.

    Shares add up to one, so this is the weighted mean of the decoded replies, in one pass over the payloads. What is
    not encoded is averaged as Flower does: integers become float64.
    """
    payloads, weights = [update.payload for update in updates], np.array(shares, np.float32)
    found = Arrays()
    for part in updates[0].parts:
        if part.codec is None:
            array = np.asarray(sum(part.plain(p) * share for p, share in zip(payloads, shares, strict=True)))
        else:
            array = part.add(updates[0].before[part.name], part.decode(payloads, weights))
        if not finite(array):
            return None
        found[part.name] = array
    return found
