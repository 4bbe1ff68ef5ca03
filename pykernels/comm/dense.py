"""States of the dense codecs: int8, int4, int2, 1-bit, fp8, bf16, fp16.

A bucket of n gradients on W ranks is averaged as :mod:`pykernels.comm.wire` says. Every rank decodes the same bytes,
the owner of a shard its own as well, so the ranks' models stay equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket

from pykernels.comm.lanes import Way, walk
from pykernels.comm.layout import Layout, Run, check_block, lay_out, lay_out_rows
from pykernels.comm.state import PYTHON_REDUCER, CommState
from pykernels.comm.wire import CHECK_BYTES, Exchange, Wire, draw
from pykernels.ops import compress


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
    factor: float | None = None  # of the ranks' sum; None: their average

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
        check_block(self.block)
        super().__init__(*args, **kwargs)
        self.stochastic = stochastic
        self.seed = seed
        self.checksum = checksum
        self._scatters: dict[int, tuple[list[Run], Wire]] = {}
        self._scattered: set[int] = set()  # in this step
        self._traced: dict[torch.Tensor, Wire] = {}

    def forget_buckets(self) -> None:
        super().forget_buckets()
        self._scatters.clear()
        if self._traced:
            self.prepare_traced()

    def new_slot(self, bucket: GradBucket, runs: list[Run]) -> Any:
        device = bucket.buffer().device
        name = f"bucket {bucket.index()}"
        history = self._agree_on(name, runs, device)
        return Exchange(self._wire(name, runs, bucket.buffer().numel(), device, history), device)

    def _wire(self, name: str, runs: list[Run], numel: int, device: torch.device, history: bool) -> Wire:
        """How `runs` among `numel` elements go to be averaged by all ranks. A collective if there is a `history`."""
        layout = lay_out(runs, self.codec, self.block, self.world, self.rank, CHECK_BYTES if self.checksum else 0)
        worker = self.feedback.attach_worker(runs, numel, device) if self.error_feedback else None
        group = self.group if history else None
        shards = [
            self.feedback.attach_shard(runs, section.pieces, section.shard_numel, device, group)
            if self.error_feedback and section.codec == self.codec
            else None
            for section in layout.sections
        ]
        return self._over(layout, name, worker, shards)

    def _over(
        self,
        layout: Layout,
        name: str,
        worker: torch.Tensor | None,
        shards: Sequence[torch.Tensor | None] | None = None,
    ) -> Wire:
        return Wire(
            layout,
            self.codec,
            name,
            worker=worker,
            shards=shards,
            stochastic=self.stochastic,
            checksum=self.checksum,
        )

    def _agree_on(self, what: str, runs: Sequence[Run], device: torch.device) -> bool:
        if self.checksum and device.type != "cpu":
            raise ValueError(f"pykernels: checksum: only for gradients on the CPU, these are on {device}")
        return self.agree(what, self.options(), runs, vote=self.feedback.has_history)

    def options(self) -> str:
        """What all ranks must agree on."""
        return f"{self.codec}, block {self.block}, checksum {self.checksum}"

    def _draw(self, bucket: int, stage: int) -> int:
        """A seed of its own for each step, bucket, rank and stage."""
        if not self.stochastic:
            return 0
        return draw(self.seed, self.step, bucket, self.rank, stage)

    def way(self, index: int, buffer: torch.Tensor, slot: Any) -> Way:
        exchange: Exchange = slot
        others = self.world - 1
        self._meter.sent(2 * others / self.world * buffer.nbytes, 2 * others * exchange.wire.layout.shard_bytes)
        groups, seed = (self.group, self.gather_group), partial(self._draw, index)
        yield from exchange.all_reduce(buffer, groups, self._meter, seed, self.factor)
        with self._meter.timed("decode"):
            exchange.wire.decode(exchange.payload, buffer)

    def prepare_traced(self) -> None:
        for option in ("stochastic", "checksum", "_grad_scaler"):
            if getattr(self, option):
                raise ValueError(
                    f"pykernels: {option.strip('_')}: not in a compiled backward pass, which repeats the same "
                    f"operations in each step: {PYTHON_REDUCER}"
                )
        runs = {p: Run(name, 0, p.numel(), self._exempt(name, p)) for p, name in self._names.items() if p.requires_grad}
        device = next(iter(runs)).device
        history = self._agree_on("the model", list(runs.values()), device)
        self._traced = {p: self._wire(run.key, [run], run.numel, p.device, history) for p, run in runs.items()}
        self.feedback.has_history = True

    def average_traced(self, gradient: torch.Tensor, parameter: torch.nn.Parameter) -> None:
        gradient.copy_(self._traced[parameter].functional_average(gradient.contiguous(), self.group))

    def _scatter(self, index: int, source: torch.Tensor, runs: list[Run]) -> Wire:
        kept = self._scatters.get(index)
        if kept is None or kept[0] != runs:
            name = f"reduce-scatter {index}"
            self._agree_on(name, runs, source.device)
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
            kept = self._scatters[index] = runs, self._over(layout, name, worker)
        return kept[1]

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
        wire = self._scatter(index, source, runs)
        layout, others = wire.layout, self.world - 1
        if layout.numel != source.numel() or source.numel() != self.world * output.numel():
            raise ValueError(
                f"pykernels: source must have {layout.numel} elements and output {layout.numel // self.world}, not "
                f"{source.numel()} and {output.numel()}"
            )
        self._meter.sent(others / self.world * source.nbytes, others * layout.shard_bytes)
        outputs = [output] * len(layout.sections)
        exchange = Exchange(wire, source.device)  # its messages are made anew, for memory's sake
        walk(
            exchange.reduce_scatter(source, outputs, factor, self.group, self._meter, seed=self._draw(index, 0)),
            self._meter,
        )


def row_key(name: str, row: int) -> str:
    """What the residual of the part of a parameter that goes to one rank is called."""
    return f"{name}[{row}]"


class Int8State(DenseState):
    """8-bit integers and a scale for every 256 gradients: a quarter of the bytes."""

    codec = "int8"


class Int4State(DenseState):
    """4-bit integers and a scale for every 256 gradients: an eighth of the bytes."""

    codec = "int4"


class Int2State(DenseState):
    """-1, 0 or 1 and a scale for every 256 gradients: a fifteenth of the bytes."""

    codec = "int2"


class OneBitState(DenseState):
    """Signs and a scale for every 1024 gradients: a thirty-first of the bytes."""

    codec = "onebit"
    default_block = 1024


class Fp8State(DenseState):
    """8-bit floats (e4m3) and a scale for every 256 gradients: a quarter of the bytes, small gradients kept better."""

    codec = "fp8"


class Bf16State(DenseState):
    """bfloat16 on the wire, sums in fp32: half of the bytes."""

    codec = "bf16"
    default_feedback = False


class Fp16State(DenseState):
    """float16 on the wire, at most 65504, sums in fp32: half of the bytes."""

    codec = "fp16"
    default_feedback = False


DENSE: dict[str, type[DenseState]] = {
    kind.codec: kind for kind in (Bf16State, Fp16State, Fp8State, Int8State, Int4State, Int2State, OneBitState)
}
