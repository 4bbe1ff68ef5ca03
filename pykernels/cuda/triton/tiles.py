"""What the launchers of the codecs share: checked arguments, and a bucket's segments cut into one tile a program.

A kernel reads where its tile lies from a table on the device, so that all segments of a bucket are one launch. The
table is made and uploaded once for a segments tensor and lives as long as that does.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from pykernels.ops.dtypes import REAL_NAMES, REAL_WORDS

__all__ = ["Tiles", "check", "check_flat", "check_real", "cut", "fail", "on", "power_of_two", "real", "stride_of"]


@dataclass(frozen=True)
class Tiles:
    """The tiles of one segments tensor.

    Attributes:
        table: int64 [tiles, 4] on the device: a tile's first element, elements, first byte, and the first element's
            rank among all elements of the segments. Without bytes they ascend; with bytes the even tiles, those of a
            first element and a number of elements that are multiples of 16, come before the others.
        even: how many even tiles there are; without bytes not counted, 0.
        segments: int64 [S, 2] on the device: each segment's first element and its rank.
        count: how many tiles.
        numel: elements of all segments.
        last: one past the last element of any segment.
        last_byte: one past the last byte of any segment's records.
        vector: a power of two up to 16 that divides first element and number of elements of every tile but the even.
        aligned: a power of two up to 16 that divides every tile's first byte, and the bytes of a record.
    """

    table: torch.Tensor
    even: int
    segments: torch.Tensor
    count: int
    numel: int
    last: int
    last_byte: int
    vector: int
    aligned: int

    @functools.cached_property
    def parts(self) -> list[tuple[torch.Tensor, int]]:
        """Rows of the table, and their `vector`: a launch each, so that odd segments slow down only themselves."""
        halves = ((self.table[: self.even], 16), (self.table[self.even :], self.vector))
        return [(rows, vector) for rows, vector in halves if rows.shape[0]]


_cache: Any = WeakTensorKeyDictionary()


def cut(op: str, segments: torch.Tensor, device: torch.device, rows: int, block: int, record: int) -> Tiles:
    """Cut `segments` (int64 [S, 3] on the CPU) into tiles of `rows` records of `block` elements and `record` bytes.

    Without bytes (`record` 0) the segments' third column means nothing. The answer is kept until `segments` is written
    to or dies. Raises RuntimeError, naming `op`, for bad segments.
    """
    check(segments.device.type == "cpu", op, "segments must be on the CPU, where their sizes can be read")
    check(segments.dtype == torch.int64, op, f"segments must be int64, not {_name(segments.dtype)}")
    good = segments.dim() == 2 and segments.shape[1] == 3 and segments.is_contiguous()
    check(good, op, f"segments must be contiguous, of shape [S, 3], not {list(segments.shape)}")
    if segments.is_inference():  # changes of an inference tensor are not counted
        return _cut(op, segments, device, rows, block, record)
    known = _cache.setdefault(segments, {})
    key = (segments._version, device, rows, block, record)
    if key not in known:
        for old in [k for k in known if k[0] != segments._version]:
            del known[old]
        known[key] = _cut(op, segments, device, rows, block, record)
    tiles: Tiles = known[key]
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        tiles.table.record_stream(stream)
        tiles.segments.record_stream(stream)
    return tiles


def _cut(op: str, segments: torch.Tensor, device: torch.device, rows: int, block: int, record: int) -> Tiles:
    if record == 0:
        segments = segments * torch.tensor([1, 1, 0])
    sane = bool(((segments >= 0) & (segments < 2**60)).all())
    check(sane, op, "segments must not be negative, nor beyond what a tensor can hold")
    first, n, begin = segments[segments[:, 1] > 0].unbind(1)
    if record == 0:
        check(bool((first[1:] >= (first + n)[:-1]).all()), op, "segments must ascend and not overlap")
    check(bool((begin % 4 == 0).all()), op, "segments: the first byte must be a multiple of 4")
    size = rows * block
    counts = (n + size - 1) // size
    owner = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    before = counts.cumsum(0) - counts
    place = torch.arange(owner.numel()) - before[owner]  # of a tile in its segment
    rank = n.cumsum(0) - n
    table = torch.stack(
        [
            first[owner] + place * size,
            (n[owner] - place * size).clamp(max=size),
            begin[owner] + place * rows * record,
            rank[owner] + place * size,
        ],
        dim=1,
    )
    even = torch.zeros(owner.numel(), dtype=torch.bool) if record == 0 else (table[:, :2] % 16 == 0).all(1)
    odd = table[~even, :2].flatten()
    records = (n + block - 1) // block
    return Tiles(
        table=torch.cat([table[even], table[~even]]).to(device),
        even=int(even.sum()),
        segments=torch.stack([first, rank], dim=1).to(device),
        count=owner.numel(),
        numel=int(n.sum()),
        last=int((first + n).max()) if n.numel() else 0,
        last_byte=int((begin + records * record).max()) if n.numel() else 0,
        vector=power_of_two(*odd.unique().tolist()),
        aligned=power_of_two(*begin.tolist(), record),
    )


def power_of_two(*numbers: int) -> int:
    """The largest power of two up to 16 that divides all numbers."""
    bits = 16
    for number in numbers:
        bits |= number
    return bits & -bits


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launch on this device, whichever is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def fail(op: str, what: str) -> NoReturn:
    raise RuntimeError(f"pykernels: {op}: {what}")


def check(condition: bool, op: str, what: str) -> None:
    if not condition:
        fail(op, what)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_flat(op: str, name: str, t: torch.Tensor, like: torch.Tensor, dtype: torch.dtype) -> None:
    """Contiguous and of this dtype, on the device of `like`."""
    check(t.device == like.device, op, f"{name} must be on {like.device}, not on {t.device}")
    check(t.dtype == dtype, op, f"{name} must be {_name(dtype)}, not {_name(t.dtype)}")
    check(t.is_contiguous(), op, f"{name} must be contiguous")
    check(t.data_ptr() % 4 == 0, op, f"{name} must begin at a multiple of 4 bytes")


def check_real(op: str, name: str, t: torch.Tensor) -> None:
    check(t.dtype in REAL_NAMES, op, f"{name} must be {REAL_WORDS}, not {_name(t.dtype)}")
    check(t.is_contiguous(), op, f"{name} must be contiguous")


def real(t: torch.Tensor) -> tuple[torch.Tensor, str]:
    """What a kernel gets for real numbers, and their kind; bf16 goes as its bits."""
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t), REAL_NAMES[t.dtype]


def stride_of(op: str, payloads: torch.Tensor, like: torch.Tensor) -> int:
    """Bytes from one row of `payloads`, uint8 [ranks, bytes], to the next."""
    check(payloads.device == like.device, op, f"payloads must be on {like.device}, not on {payloads.device}")
    check(payloads.dtype == torch.uint8, op, f"payloads must be uint8, not {_name(payloads.dtype)}")
    good = payloads.dim() == 2 and (payloads.shape[1] < 2 or payloads.stride(1) == 1)
    check(good, op, f"payloads must be [ranks, bytes] with contiguous rows, not {list(payloads.shape)}")
    check(payloads.shape[0] > 0, op, "payloads must have at least one row")
    stride = payloads.stride(0) if payloads.shape[0] > 1 and payloads.numel() else 0
    check(stride % 4 == 0, op, f"payloads must have rows that begin at multiples of 4 bytes, not {stride} bytes apart")
    check(payloads.data_ptr() % 4 == 0, op, "payloads must begin at a multiple of 4 bytes")
    return stride
