"""A plan as words of 64 bits: what csrc/cpu/plan/format.h reads, and what `tune` changes in it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from pykernels.ops import names

__all__ = ["DTYPES", "UNTUNED", "Program", "Record", "decode", "encode", "weights_of"]

MAGIC, VERSION = b"PKPLAN01", 1
KINDS = {name: number for number, name in enumerate(names.PLAN_STEPS)}
DTYPES = {getattr(torch, dtype): number for number, dtype in enumerate(names.DTYPES.values())}
_BYTES = {number: dtype.itemsize for dtype, number in DTYPES.items()}
UNTUNED = (0, 0, 0)  # the last numbers of a layer: rows, block, splits; see Tiling in csrc/cpu/tile/driver.h


@dataclass
class Record:
    """A step: its kind, the values it reads, and what is known of it, as csrc/cpu/plan/builder.h reads it."""

    kind: str
    inputs: list[int]
    numbers: list[int] = field(default_factory=list)
    reals: list[float] = field(default_factory=list)


@dataclass
class Program:
    """A plan.

    Attributes:
        weight_bytes: of the tensor that its constants stand in.
        inputs: dtype (by its number) and number of dimensions of each.
        records: values are numbered, inputs first, then what each record yields.
        outputs: value, and whether it is channels_last.
        isa, threads: what layers were tuned for: the place of the isa in `names.ISAS` plus one; 0, 0 for nothing.
    """

    weight_bytes: int
    inputs: list[tuple[int, int]]
    records: list[Record]
    outputs: list[tuple[int, bool]]
    isa: int = 0
    threads: int = 0


def encode(program: Program) -> torch.Tensor:
    """1-D uint8."""
    words = [program.weight_bytes, program.isa, program.threads, len(program.inputs)]
    for dtype, dims in program.inputs:
        words += [dtype, dims]
    words.append(len(program.records))
    for record in program.records:
        words.append(KINDS[record.kind])
        for numbers in (record.inputs, record.numbers, [_bits(real) for real in record.reals]):
            words += [len(numbers), *numbers]
    words.append(len(program.outputs))
    for value, channels_last in program.outputs:
        words += [value, int(channels_last)]
    body = struct.pack(f"<{len(words)}q", *words)
    head = struct.pack("<8sqqQ", MAGIC, VERSION, len(words) + 4, hash_of(body))
    return torch.frombuffer(bytearray(head + body), dtype=torch.uint8).clone()


def decode(plan: torch.Tensor) -> Program:
    """What `encode` wrote; nothing is checked."""
    words = iter(struct.unpack(f"<{plan.numel() // 8 - 4}q", bytes(plan[32:].tolist())))
    weight_bytes, isa, threads = next(words), next(words), next(words)
    inputs = [(next(words), next(words)) for _ in range(next(words))]
    records = []
    for _ in range(next(words)):
        kind = names.PLAN_STEPS[next(words)]
        operands, numbers, reals = _list(words), _list(words), _list(words)
        records.append(Record(kind, operands, numbers, [_real(bits) for bits in reals]))
    outputs = [(next(words), bool(next(words))) for _ in range(next(words))]
    return Program(weight_bytes, inputs, records, outputs, isa, threads)


def weights_of(record: Record) -> tuple[int, int] | None:
    """Where what a step reads of the weights begins, and its bytes; None where it reads nothing of them. The place is
    the first of its numbers."""
    if record.kind in ("conv2d", "linear"):
        return record.numbers[0], record.numbers[1]
    if record.kind == "qlookup":
        return record.numbers[0], 256
    if record.kind == "constant":
        place, dtype, *sizes = record.numbers
        return place, math.prod(sizes) * _BYTES[dtype]
    return None


def hash_of(body: bytes) -> int:
    """FNV-1a by words of 8 bytes."""
    found = 1469598103934665603
    for (word,) in struct.iter_unpack("<Q", body):
        found = (found ^ word) * 1099511628211 % 2**64
    return found


def _list(words: Iterator[int]) -> list[int]:
    return [next(words) for _ in range(next(words))]


def _bits(real: float) -> int:
    return int.from_bytes(struct.pack("<d", real), "little", signed=True)


def _real(bits: int) -> float:
    found: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return found
