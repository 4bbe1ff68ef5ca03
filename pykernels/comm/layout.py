"""How a bucket of gradients lies on the wire: which records go to which rank.

A bucket is one flat tensor. Each of its parameters begins a new record, so no block holds two parameters. The records
of all parameters, in order, are cut into one *shard* a rank, equally many records each (the last ones padded).
Parameters that are not compressed travel in a second section of the same message as plain fp32 records, so that a
bucket costs two collectives whatever it holds::

    payload = [shard of rank 0][shard of rank 1] ...      what is sent, and what all ranks have in the end
    shard   = [records of the codec][fp32 records][check]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pykernels.ops.compress import CODECS, record_bytes

LEAST_ROW = 128  # elements: in shorter rows the scales and the padding would weigh
MOST_PADDING = 1 / 64  # of a row
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # that the codecs take
RAW_BLOCK = 32  # fp32 records of 128 bytes: padding costs little where parameters are small


@dataclass(frozen=True)
class Run:
    """Elements of one parameter, one after another in the bucket.

    Attributes:
        key: the parameter's name.
        first: position of its first element in the bucket.
        numel: how many elements.
        exempt: travels as fp32, not through the codec.
    """

    key: str
    first: int
    numel: int
    exempt: bool


@dataclass(frozen=True)
class Piece:
    """Elements of one parameter that one rank owns: `numel` from `offset` in the parameter, at `first` in its shard's
    residual."""

    key: str
    offset: int
    numel: int
    first: int


@dataclass(frozen=True)
class Section:
    """The records of one codec.

    Attributes:
        codec, block: what a record is.
        segments: int64 [S, 3], (position in the bucket, elements, byte in the payload).
        shard_segments: the same for this rank's shard, (position in its residual, elements, byte in the shard).
        shard_numel: elements of a shard, padding included.
        pieces: what this rank owns.
    """

    codec: str
    block: int
    segments: torch.Tensor
    shard_segments: torch.Tensor
    shard_numel: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """The sections of a bucket; `shard_bytes` is what one rank sends to another, `numel` the bucket's elements."""

    sections: tuple[Section, ...]
    numel: int
    world: int
    shard_bytes: int

    @property
    def payload_bytes(self) -> int:
        return self.world * self.shard_bytes


def check_block(block: int, what: str = "block") -> None:
    """Refuse what no record can be as long as, by the argument's name."""
    if not isinstance(block, int) or block <= 0 or block % 32 or block > 32768:
        raise ValueError(f"pykernels: {what} must be a multiple of 32 up to 32768, not {block!r}")


def _align(size: int) -> int:
    return -(-size // 16) * 16


def _section(runs: Sequence[Run], codec: str, block: int, world: int, rank: int, begin: int, stride: int) -> Section:
    size = record_bytes(codec, block)
    shard_records = _shard_records(runs, block, world)
    segments, owned, pieces = [], [], []
    record = 0
    for run in runs:
        done = 0
        while done < run.numel:
            shard, place = divmod(record, shard_records)
            numel = min(run.numel - done, (shard_records - place) * block)
            segments.append((run.first + done, numel, shard * stride + begin + place * size))
            if shard == rank:
                owned.append((place * block, numel, begin + place * size))
                pieces.append(Piece(run.key, done, numel, place * block))
            done += numel
            record += -(-numel // block)
    return Section(codec, block, _table(segments), _table(owned), shard_records * block, tuple(pieces))


def _table(rows: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def _shard_records(runs: Iterable[Run], block: int, world: int) -> int:
    return -(-sum(-(-run.numel // block) for run in runs) // world)


def _kinds(runs: Sequence[Run], codec: str, block: int) -> list[tuple[list[Run], str, int]]:
    """The runs that the codec takes and those that travel as fp32, without empty kinds."""
    compressed, exempt = [run for run in runs if not run.exempt], [run for run in runs if run.exempt]
    return [kind for kind in ((compressed, codec, block), (exempt, "fp32", RAW_BLOCK)) if kind[0]]


def lay_out(runs: Sequence[Run], codec: str, block: int, world: int, rank: int, trailer: int = 0) -> Layout:
    """The layout of a bucket for `rank` of `world`; each shard ends with `trailer` bytes for a check."""
    numel = max((run.first + run.numel for run in runs), default=0)
    kinds = _kinds(runs, codec, block)
    begins, end = [], 0
    for chosen, kind, size in kinds:
        begins.append(end)
        end = _align(end + _shard_records(chosen, size, world) * record_bytes(kind, size))
    stride = end + _align(trailer)
    sections = tuple(
        _section(chosen, kind, size, world, rank, begin, stride)
        for (chosen, kind, size), begin in zip(kinds, begins, strict=True)
    )
    return Layout(sections, numel, world, stride)


def lay_out_rows(runs: Sequence[Run], codec: str, block: int, world: int, trailer: int = 0) -> Layout:
    """The layout of a tensor [world, n] whose row r goes to rank r; `runs` lie alike in every row.

    For a reduce-scatter whose shards are given. ``shard_segments`` say where a decoded row lies in the output; nothing
    is encoded again, so there are no pieces.
    """
    numel = max((run.first + run.numel for run in runs), default=0)
    rows = []
    end = 0
    for chosen, kind, size in _kinds(runs, codec, block):
        mine = []
        for run in chosen:
            mine.append((run.first, run.numel, end))
            end += -(-run.numel // size) * record_bytes(kind, size)
        rows.append((kind, size, mine))
        end = _align(end)
    stride = end + _align(trailer)
    sections = []
    for kind, size, mine in rows:
        everywhere = [(r * numel + at, n, r * stride + byte) for r in range(world) for at, n, byte in mine]
        sections.append(Section(kind, size, _table(everywhere), _table(mine), numel, ()))
    return Layout(tuple(sections), world * numel, world, stride)


def _row_block(row: int, block: int) -> int:
    """Elements of a record where a row of so many has equally long ones, of at most `block`."""
    records = max(1, -(-row // block))
    return min(block, -(-row // (32 * records)) * 32 or 32)


def _padding(row: int, block: int) -> int:
    return -row % _row_block(row, block)


def lay_out_tensor(shape: Sequence[int], codec: str, block: int, world: int = 1) -> Layout:
    """The layout of a contiguous tensor [world, *shape] whose part r is for rank r, or comes from it.

    Records begin at rows: of the last dimension, which holds a token, or of as many of the last ones as it takes to
    have ``LEAST_ROW`` elements that fill their records (a plane of 14 x 14 does not: whole samples then do). A row's
    records are equally long, at most `block`. Where there is no scale rows do not matter. ``shard_segments`` say where
    a decoded part lies in a tensor [*shape].
    """
    numel, row = math.prod(shape), 1
    for dimensions, size in enumerate(reversed(shape)):
        if row >= LEAST_ROW and (dimensions == 1 or _padding(row, block) <= MOST_PADDING * row):
            break
        row *= size
    if not CODECS[codec].header:
        row, block = numel, RAW_BLOCK
    block = _row_block(row, block)
    if row % block == 0:
        row = numel
    size = -(-row // block) * record_bytes(codec, block)
    rows = numel // row if row else 0
    part = [(r * row, row, r * size) for r in range(rows)]
    stride = _align(rows * size) if world > 1 else rows * size
    everywhere = [(r * numel + first, n, r * stride + byte) for r in range(world) for first, n, byte in part]
    section = Section(codec, block, _table(everywhere), _table(part), numel, ())
    return Layout((section,), world * numel, world, stride)
