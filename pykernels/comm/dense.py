"""Hooks for the dense codecs: int8, int4, int2, 1-bit, fp8, bf16, fp16.

A bucket of n gradients on W ranks goes: encode (with the worker residual) -> all-to-all of the shards -> sum of the W
shards, division by W, encode again (with the shard residual) -> all-gather -> decode. Every rank decodes the same
bytes, the owner of a shard its own as well, so the ranks' models stay equal to the bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket

from pykernels.comm import traced
from pykernels.comm.collectives import all_gather, all_to_all
from pykernels.comm.lanes import Step
from pykernels.comm.layout import Layout, Run, lay_out, lay_out_rows
from pykernels.comm.state import PYTHON_REDUCER, CommState
from pykernels.ops import compress

CHECK_BYTES = 4  # CRC-32 at the end of each shard


@dataclass
class Slot:
    """What a bucket keeps from step to step: nothing is allocated once it is there."""

    layout: Layout
    runs: list[Run]
    worker: torch.Tensor | None  # fp32 [numel]
    shards: list[torch.Tensor | None]  # by section, fp32 [shard_numel]
    sent: torch.Tensor  # uint8 [world * shard_bytes]: what goes to the others, then what came from all
    received: torch.Tensor  # the same size: everyone's share of my shard
    reduced: torch.Tensor  # uint8 [shard_bytes]


@dataclass
class Scatter:
    """What a reduce-scatter keeps from step to step. Its messages are made anew, for memory's sake."""

    layout: Layout
    runs: list[Run]
    worker: torch.Tensor | None  # fp32 [world * n]


class DenseState(CommState):
    """State of the hook of a dense codec; the arguments of :class:`CommState`, and

    Args:
        error_feedback: keep what the codec lost and add it to the next gradient.
        stochastic: round at random, without bias (int8, int4, int2).
        seed: of the stochastic rounding; ranks draw differently from the same seed.
        block: gradients that share a scale, a multiple of 32.
        checksum: end each message with a CRC-32, so that a damaged one is detected (CPU only).

    Raises:
        ValueError: a codec that cannot round stochastically is asked to; int2 with both stochastic rounding and error
            feedback, which amplify each other.
    """

    default_block = 256
    default_feedback = True

    def __init__(
        self,
        *args: Any,
        error_feedback: bool | None = None,
        stochastic: bool = False,
        seed: int = 0,
        block: int | None = None,
        checksum: bool = False,
        **kwargs: Any,
    ) -> None:
        if stochastic and not compress.CODECS[self.codec].stochastic:
            able = ", ".join(codec.name for codec in compress.CODECS.values() if codec.stochastic)
            raise ValueError(f"pykernels: stochastic: {self.codec} cannot; {able} can")
        self.error_feedback = self.default_feedback if error_feedback is None else error_feedback
        if stochastic and self.codec == "int2" and self.error_feedback:
            raise ValueError(
                "pykernels: stochastic: int2 then errs by more than it sends, which error feedback would add up: give "
                "error_feedback=False"
            )
        self.block = self.default_block if block is None else block
        if self.block <= 0 or self.block % 32 or self.block > 32768:
            raise ValueError(f"pykernels: block must be a multiple of 32 up to 32768, not {self.block}")
        super().__init__(*args, **kwargs)
        self.stochastic = stochastic
        self.seed = seed
        self.checksum = checksum
        self._slots: dict[int, Slot] = {}
        self._scatters: dict[int, Scatter] = {}
        self._scattered: set[int] = set()  # in this step
        self._traced: dict[torch.Tensor, traced.Part] = {}

    def forget_buckets(self) -> None:
        self._slots.clear()
        self._scatters.clear()
        if self._traced:
            self.prepare_traced()

    def forget_bucket(self, index: int) -> None:
        """Drop what was made for one bucket."""
        self._slots.pop(index, None)

    def _slot(self, bucket: GradBucket) -> Slot:
        runs = self.runs(bucket)
        slot = self._slots.get(bucket.index())
        if slot is None or slot.runs != runs:
            slot = self._slots[bucket.index()] = self._new_slot(bucket, runs)
        return slot

    def _new_slot(self, bucket: GradBucket, runs: list[Run]) -> Slot:
        device = bucket.buffer().device
        history = self._agree_on(f"bucket {bucket.index()}", runs, device)
        layout = lay_out(runs, self.codec, self.block, self.world, self.rank, CHECK_BYTES if self.checksum else 0)
        worker: torch.Tensor | None = None
        shards: list[torch.Tensor | None] = [None] * len(layout.sections)
        if self.error_feedback:
            worker = self.feedback.attach_worker(runs, bucket.buffer().numel(), device)
            group = self.group if history else None
            shards = [
                self.feedback.attach_shard(runs, section.pieces, section.shard_numel, device, group)
                if section.codec == self.codec
                else None
                for section in layout.sections
            ]
        size = layout.payload_bytes
        sent, received, reduced = (
            torch.zeros(n, dtype=torch.uint8, device=device) for n in (size, size, layout.shard_bytes)
        )
        return Slot(layout, runs, worker, shards, sent, received, reduced)

    def _agree_on(self, what: str, runs: Sequence[Run], device: torch.device) -> bool:
        options = f"{self.codec}, block {self.block}, checksum {self.checksum}"
        if self.checksum and device.type != "cpu":
            raise ValueError(f"pykernels: checksum: only for gradients on the CPU, these are on {device}")
        return self.agree(
            what, [options, *((run.key, run.numel, run.exempt) for run in runs)], vote=self.feedback.has_history
        )

    def _draw(self, bucket: int, stage: int) -> int:
        """A seed of its own for each step, bucket, rank and stage."""
        words = (self.seed, self.step, bucket, self.rank, stage)
        return zlib.crc32(repr(words).encode()) | zlib.crc32(repr(words[::-1]).encode()) << 31

    def _encode(
        self, index: int, layout: Layout, source: torch.Tensor, worker: torch.Tensor | None, payload: torch.Tensor
    ) -> None:
        with self._meter.timed("encode"):
            for section in layout.sections:
                mine = section.codec == self.codec
                compress.compress_encode(
                    source,
                    worker if mine else None,
                    payload,
                    section.segments,
                    section.codec,
                    section.block,
                    stochastic=mine and self.stochastic,
                    seed=self._draw(index, 0) if self.stochastic else 0,
                )
            if self.checksum:
                _seal(payload, layout.shard_bytes)

    def average(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer, index = bucket.buffer(), bucket.index()
        slot = self._slot(bucket)
        layout = slot.layout
        shard_bytes, others = layout.shard_bytes, self.world - 1
        self._meter.sent(2 * others / self.world * buffer.nbytes, 2 * others * shard_bytes)
        factor = 1.0 / self.world

        def encode() -> Step:
            self._encode(index, layout, buffer, slot.worker, slot.sent)
            work = all_to_all(slot.received, slot.sent, self.group)
            return lambda: reduce(work)

        def reduce(work: dist.Work) -> Step:
            with self._meter.timed("exchange"):
                work.wait()
            with self._meter.timed("reduce"):
                if self.checksum:
                    _verify(slot.received, shard_bytes, f"the shard of bucket {index}")
                shards = slot.received.view(self.world, shard_bytes)
                for section, residual in zip(layout.sections, slot.shards, strict=True):
                    mine = section.codec == self.codec
                    compress.compress_reduce(
                        shards,
                        residual,
                        slot.reduced,
                        section.shard_segments,
                        section.codec,
                        section.block,
                        factor,
                        stochastic=mine and self.stochastic,
                        seed=self._draw(index, 1) if self.stochastic else 0,
                    )
                if self.checksum:
                    _seal(slot.reduced, shard_bytes)
            work = all_gather(slot.sent, slot.reduced, self.gather_group)
            return lambda: decode(work)

        def decode(work: dist.Work) -> None:
            with self._meter.timed("gather"):
                work.wait()
            with self._meter.timed("decode"):
                if self.checksum:
                    _verify(slot.sent, shard_bytes, f"the average of bucket {index}")
                payload = slot.sent.view(1, -1)
                for section in layout.sections:
                    compress.compress_decode(payload, buffer, section.segments, section.codec, section.block)

        with self._lanes.side_stream(buffer.device):
            return self._lanes.run(buffer, encode)

    def prepare_traced(self) -> None:
        for option in ("stochastic", "checksum", "_grad_scaler"):
            if getattr(self, option):
                raise ValueError(
                    f"pykernels: {option.strip('_')}: not in a compiled backward pass, which repeats the same "
                    f"operations in each step: {PYTHON_REDUCER}"
                )
        assert self._names is not None
        runs = {p: Run(name, 0, p.numel(), self._exempt(name, p)) for p, name in self._names.items() if p.requires_grad}
        device = next(iter(runs)).device
        history = self._agree_on("the model", list(runs.values()), device)
        feedback = self.feedback if self.error_feedback else None
        self._traced = traced.prepare(runs, self.codec, self.block, self.group, feedback, history)
        self.feedback.has_history = True

    def average_traced(self, gradient: torch.Tensor, parameter: torch.nn.Parameter) -> None:
        traced.average(gradient, self._traced[parameter], self.group, self.world)

    def _scatter(self, index: int, source: torch.Tensor, runs: list[Run]) -> Scatter:
        scatter = self._scatters.get(index)
        if scatter is None or scatter.runs != runs:
            self._agree_on(f"reduce-scatter {index}", runs, source.device)
            layout = lay_out_rows(runs, self.codec, self.block, self.world, CHECK_BYTES if self.checksum else 0)
            worker = None
            if self.error_feedback:
                row = layout.numel // self.world
                everywhere = [
                    Run(row_key(run.key, r), r * row + run.first, run.numel, run.exempt)
                    for r in range(self.world)
                    for run in runs
                ]
                worker = self.feedback.attach_worker(everywhere, layout.numel, source.device)
            scatter = self._scatters[index] = Scatter(layout, runs, worker)
        return scatter

    def reduce_scatter(
        self, index: int, output: torch.Tensor, source: torch.Tensor, runs: list[Run], factor: float
    ) -> None:
        """``output = factor * sum over ranks`` of their row of `source` that is for this rank.

        Waits for the wire: on a CPU the thread, on a GPU the current stream. Every rank calls it in the same order.

        Args:
            index: which of the tensors that are reduced in a step; one that comes again begins a new step.
            output: [n], fp32, bf16 or fp16.
            source: [world * n], row after row, of the same dtype.
            runs: the parameters in a row, of n elements together.
            factor: 1 / ranks for an average.
        """
        if not self._scattered or index in self._scattered:
            self._begin_step()
            self._scattered.clear()
        self._scattered.add(index)
        scatter = self._scatter(index, source, runs)
        layout, others = scatter.layout, self.world - 1
        if layout.numel != source.numel() or source.numel() != self.world * output.numel():
            raise ValueError(
                f"pykernels: source must have {layout.numel} elements and output {layout.numel // self.world}, not "
                f"{source.numel()} and {output.numel()}"
            )
        self._meter.sent(others / self.world * source.nbytes, others * layout.shard_bytes)
        sent, received = (torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=source.device) for _ in range(2))
        self._encode(index, layout, source, scatter.worker, sent)
        with self._meter.timed("exchange"):
            all_to_all(received, sent, self.group).wait()
        with self._meter.timed("decode"):
            if self.checksum:
                _verify(received, layout.shard_bytes, f"the shard of reduce-scatter {index}")
            shards = received.view(self.world, layout.shard_bytes)
            for section in layout.sections:
                compress.compress_decode(shards, output, section.shard_segments, section.codec, section.block, factor)


def row_key(name: str, row: int) -> str:
    """What the residual of the part of a parameter that goes to one rank is called."""
    return f"{name}[{row}]"


def _seal(payload: torch.Tensor, shard_bytes: int) -> None:
    """Write each shard's CRC-32 behind it."""
    for shard in payload.view(-1, shard_bytes).numpy():
        shard[-CHECK_BYTES:] = list(zlib.crc32(shard[:-CHECK_BYTES]).to_bytes(CHECK_BYTES, "little"))


def _verify(payload: torch.Tensor, shard_bytes: int, what: str) -> None:
    for rank, shard in enumerate(payload.view(-1, shard_bytes).numpy()):
        if zlib.crc32(shard[:-CHECK_BYTES]) != int.from_bytes(shard[-CHECK_BYTES:].tobytes(), "little"):
            raise RuntimeError(f"pykernels: {what} that came from rank {rank} is damaged: its checksum does not match")


class Int8State(DenseState):
    codec = "int8"


class Int4State(DenseState):
    codec = "int4"


class Int2State(DenseState):
    codec = "int2"


class OneBitState(DenseState):
    codec = "onebit"
    default_block = 1024


class Fp8State(DenseState):
    codec = "fp8"


class Bf16State(DenseState):
    codec = "bf16"
    default_feedback = False


class Fp16State(DenseState):
    codec = "fp16"
    default_feedback = False
