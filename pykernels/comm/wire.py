"""Bytes between ranks: encode, send, reduce, decode. All that is exchanged through a dense codec goes through here.

An average over W ranks goes: encode (with the worker residual) -> all-to-all of the shards -> sum of the W shards,
division by W, encode again (with the shard residual) -> all-gather -> decode. A reduce-scatter ends after the first
exchange: decode, sum and divide. A message from one rank to another is encode -> send -> decode.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from pykernels.comm.collectives import all_gather, all_to_all
from pykernels.comm.lanes import Way
from pykernels.comm.layout import Layout
from pykernels.comm.stats import Meter
from pykernels.ops import compress

CHECK_BYTES = 4  # CRC-32 at the end of each shard


class Wire:
    """A layout of records, and how this rank fills them.

    Sections of `codec` are encoded with residuals and stochastic rounding, where these are given; others plainly.

    Args:
        layout: where records lie, in what is sent and in what it stands for.
        codec: of the compressed section.
        name: of what travels, for messages.
        worker: fp32, residual of what this rank encodes first; as large as it.
        shards: by section, fp32 residuals of what this rank averages for all.
        stochastic: round at random.
        checksum: a CRC-32 ends each shard; the layout has room for it.
    """

    def __init__(
        self,
        layout: Layout,
        codec: str,
        name: str = "a message",
        *,
        worker: torch.Tensor | None = None,
        shards: Sequence[torch.Tensor | None] | None = None,
        stochastic: bool = False,
        checksum: bool = False,
    ) -> None:
        self.layout, self.codec, self.name = layout, codec, name
        self.worker = worker
        self.shards = list(shards) if shards is not None else [None] * len(layout.sections)
        self.stochastic, self.checksum = stochastic, checksum

    def encode(self, source: torch.Tensor, payload: torch.Tensor, seed: int = 0, shard: bool = False) -> None:
        """Fill `payload`, uint8 [payload_bytes], with the records of `source`; or one `shard` of [shard_bytes]."""
        for section in self.layout.sections:
            mine = section.codec == self.codec
            compress.compress_encode(
                source,
                self.worker if mine else None,
                payload,
                section.shard_segments if shard else section.segments,
                section.codec,
                section.block,
                stochastic=mine and self.stochastic,
                seed=seed,
            )
        if self.checksum:
            _seal(payload, self.layout.shard_bytes)

    def reduce(self, received: torch.Tensor, payload: torch.Tensor, factor: float, seed: int = 0) -> None:
        """Fill `payload`, uint8 [shard_bytes], with `factor` times the sum of all ranks' shards, encoded again."""
        shards = self._shards(received, "the shard of")
        for section, residual in zip(self.layout.sections, self.shards, strict=True):
            compress.compress_reduce(
                shards,
                residual,
                payload,
                section.shard_segments,
                section.codec,
                section.block,
                factor,
                stochastic=section.codec == self.codec and self.stochastic,
                seed=seed,
            )
        if self.checksum:
            _seal(payload, self.layout.shard_bytes)

    def decode_shards(self, received: torch.Tensor, outputs: Sequence[torch.Tensor], factor: float) -> None:
        """Write `factor` times the sum of all ranks' shards into `outputs`, one a section."""
        shards = self._shards(received, "the shard of")
        for section, output in zip(self.layout.sections, outputs, strict=True):
            compress.compress_decode(shards, output, section.shard_segments, section.codec, section.block, factor)

    def decode(self, payload: torch.Tensor, output: torch.Tensor) -> None:
        """The inverse of ``encode``."""
        if self.checksum:
            self._shards(payload, "the average of")
        for section in self.layout.sections:
            compress.compress_decode(payload.view(1, -1), output, section.segments, section.codec, section.block)

    def _shards(self, received: torch.Tensor, what: str) -> torch.Tensor:
        shards = received.view(self.layout.world, self.layout.shard_bytes)
        if self.checksum:
            _verify(shards, f"{what} {self.name}")
        return shards

    def functional_average(self, source: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """The average over the ranks, of `source`'s shape: collectives that a compiler can trace, new memory."""
        world = self.layout.world
        sent = source.new_zeros(self.layout.payload_bytes, dtype=torch.uint8)
        self.encode(source, sent)
        received = functional.wait_tensor(functional.all_to_all_single(sent, None, None, group))
        reduced = source.new_zeros(self.layout.shard_bytes, dtype=torch.uint8)
        self.reduce(received, reduced, 1.0 / world)
        gathered = functional.wait_tensor(functional.all_gather_tensor(reduced, 0, group))
        averaged = torch.empty_like(source)
        self.decode(gathered, averaged)
        return averaged


class Exchange:
    """A wire between ranks with its memory, which stays from step to step.

    Args:
        wire: what goes over it.
        device: of the memory.
        capacity: bytes of `sent`, if more than the wire's own.
    """

    def __init__(self, wire: Wire, device: torch.device, capacity: int = 0) -> None:
        self.wire = wire
        size = wire.layout.payload_bytes
        self.sent, self.received = (
            torch.zeros(n, dtype=torch.uint8, device=device) for n in (max(size, capacity), size)
        )
        self.payload = self.sent[:size]

    @cached_property
    def reduced(self) -> torch.Tensor:
        """uint8 [shard_bytes]: the average of this rank's shard."""
        return self.sent.new_zeros(self.wire.layout.shard_bytes)

    def all_reduce(
        self,
        source: torch.Tensor,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        meter: Meter,
        seed: Callable[[int], int] = lambda encoding: 0,
        factor: float | None = None,
    ) -> Way:
        """Leave in ``payload`` what all ranks will decode: `factor` times the sum, the average if None.

        Args:
            source: as the layout counts its elements.
            groups: of the exchange and of the gathering, which run at the same time for different buckets.
            meter: of the times.
            seed: of the first and of the second encoding (0, 1).
        """
        with meter.timed("encode"):
            self.wire.encode(source, self.payload, seed(0))
        yield "exchange", all_to_all(self.received, self.payload, groups[0])
        with meter.timed("reduce"):
            share = 1.0 / self.wire.layout.world if factor is None else factor
            self.wire.reduce(self.received, self.reduced, share, seed(1))
        yield "gather", all_gather(self.payload, self.reduced, groups[1])

    def reduce_scatter(
        self,
        source: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        factor: float,
        group: dist.ProcessGroup,
        meter: Meter,
        phases: tuple[str, str, str] = ("encode", "exchange", "decode"),
        seed: int = 0,
    ) -> Way:
        """Write `factor` times the sum of what all ranks have for this one into `outputs`, one a section."""
        encode, exchange, decode = phases
        with meter.timed(encode):
            self.wire.encode(source, self.payload, seed)
        yield exchange, all_to_all(self.received, self.payload, group)
        with meter.timed(decode):
            self.wire.decode_shards(self.received, outputs, factor)


def draw(*words: object) -> int:
    """A seed of its own for each sequence of words."""
    return zlib.crc32(repr(words).encode()) | zlib.crc32(repr(words[::-1]).encode()) << 31


def _seal(payload: torch.Tensor, shard_bytes: int) -> None:
    """Write each shard's CRC-32 behind it."""
    for shard in payload.view(-1, shard_bytes).numpy():
        shard[-CHECK_BYTES:] = list(zlib.crc32(shard[:-CHECK_BYTES]).to_bytes(CHECK_BYTES, "little"))


def _verify(shards: torch.Tensor, what: str) -> None:
    for rank, shard in enumerate(shards.numpy()):
        if zlib.crc32(shard[:-CHECK_BYTES]) != int.from_bytes(shard[-CHECK_BYTES:].tobytes(), "little"):
            raise RuntimeError(f"pykernels: {what} that came from rank {rank} is damaged: its checksum does not match")
