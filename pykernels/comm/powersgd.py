"""The PowerSGD hook: each gradient matrix as a product of two thin ones.

Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization". With
the average M of the ranks' gradients (plus residuals), one step of subspace iteration from the last step's Q:

    P = orthonormal(M Q)      all-reduce of the ranks' M Q
    Q = M^T P                 all-reduce of the ranks' M^T P
    the average is taken as P Q^T, the residual of a rank is its M - P Q^T

The products of all buckets travel in one message each: two collectives a step, whatever the number of buckets. The
matrices P are orthonormalized together, by a batched Cholesky factorization of their Gram matrices in fp64.

A resumed run equals an uninterrupted one to rounding, not to the bit: the order of an all-reduce's sums depends on
where a number stands in the message, and DDP's first step after a start has other buckets than its later ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket

from pykernels.comm.collectives import all_reduce
from pykernels.comm.lanes import Averaged, Way, promise
from pykernels.comm.layout import Run
from pykernels.comm.state import CommState


@dataclass
class Matrix:
    """A gradient as rows x columns, at `first` in its bucket."""

    key: str
    first: int
    rows: int
    columns: int
    rank: int


@dataclass
class Slot:
    """What a bucket keeps: its matrices, what else is in it as (first, elements), and residual + gradient in fp32."""

    matrices: list[Matrix]
    others: list[tuple[int, int]]
    worker: torch.Tensor
    total: torch.Tensor


@dataclass
class Pending:
    """The buckets of a step that wait for the last one."""

    buffers: list[torch.Tensor] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    futures: list[Averaged] = field(default_factory=list)
    products: list[torch.Tensor] = field(default_factory=list)  # P of every matrix, then what is not compressed


class PowerSGDState(CommState):
    """Products of thin matrices instead of gradient matrices: r * (n + m) numbers instead of n * m.

    The arguments of :class:`CommState`, and

    Args:
        rank: columns of P and Q.
        min_compression: matrices that would not shrink by more than this factor travel as fp32.
        start_step: plain averages before this step, while gradients change most.
        seed: of the first Q, the same on every rank.

    Raises:
        ValueError: an argument out of range.
    """

    codec = "powersgd"

    def __init__(
        self,
        *args: Any,
        rank: int = 4,
        min_compression: float = 2.0,
        start_step: int = 10,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if rank < 1:
            raise ValueError(f"pykernels: rank must be at least 1, not {rank}")
        if min_compression < 1.0:
            raise ValueError(f"pykernels: min_compression must be at least 1, not {min_compression}")
        if start_step < 0:
            raise ValueError(f"pykernels: start_step must not be negative, not {start_step}")
        super().__init__(*args, **kwargs)
        self.approximation_rank = rank
        self.min_compression = min_compression
        self.start_step = start_step
        self.seed = seed
        self._q: dict[str, torch.Tensor] = {}  # fp32 [columns, rank] by parameter, equal on all ranks
        self._pending = Pending()

    def extra_state(self) -> dict[str, Any]:
        return {"q": {key: q.cpu().clone() for key, q in self._q.items()}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._q = {key: q.clone() for key, q in state["q"].items()}

    def new_slot(self, bucket: GradBucket, runs: list[Run]) -> Slot:
        options = f"powersgd, rank {self.approximation_rank}, min_compression {self.min_compression}, {self.start_step}"
        self.agree(f"bucket {bucket.index()}", options, runs)
        buffer = bucket.buffer()
        matrices, others = [], []
        for run, parameter in zip(runs, bucket.parameters(), strict=True):
            rows = parameter.shape[0] if parameter.dim() else 1
            columns = run.numel // max(1, rows)
            rank = min(self.approximation_rank, rows, columns)
            if run.exempt or rank * (rows + columns) * self.min_compression >= run.numel:
                others.append((run.first, run.numel))
                continue
            matrices.append(Matrix(run.key, run.first, rows, columns, rank))
            if run.key not in self._q:
                generator = torch.Generator().manual_seed(self.seed + len(self._q))
                self._q[run.key] = torch.randn(columns, rank, generator=generator)
            self._q[run.key] = self._q[run.key].to(buffer.device)
        worker = self.feedback.attach_worker(runs, buffer.numel(), buffer.device)
        return Slot(matrices, others, worker, torch.empty_like(worker))

    def average(self, bucket: GradBucket) -> Averaged:
        buffer = bucket.buffer()
        future, checked = promise(buffer.device)
        slot: Slot = self.slot(bucket)
        pending = self._pending
        with self._lanes.side_stream(buffer.device), self._meter.timed("encode"):
            torch.add(slot.worker, buffer, out=slot.total)
            if self.step >= self.start_step:
                pending.products += [_view(slot.total, m) @ self._q[m.key] for m in slot.matrices]
        pending.buffers.append(buffer)
        pending.slots.append(slot)
        pending.futures.append(future)
        if bucket.is_last():
            self._pending = Pending()
            with self._lanes.side_stream(buffer.device):
                done = self._lanes.run(buffer, self.way(bucket.index(), buffer, pending))
                done.add_done_callback(lambda finished: _settle(pending, finished))
        return checked

    def _sent(self, pending: Pending, numel: int) -> None:
        sent = 2 * (self.world - 1) / self.world
        self._meter.sent(sent * sum(buffer.nbytes for buffer in pending.buffers), sent * 4 * numel)

    def way(self, index: int, buffer: torch.Tensor, slot: Pending) -> Way:
        """That of all buckets of a step."""
        return self._all(slot) if self.step < self.start_step else self._products(slot)

    def _all(self, pending: Pending) -> Way:
        """Before start_step: everything as it is; residuals, still zero or restored, are sent, too."""
        message = torch.cat([slot.total for slot in pending.slots])
        self._sent(pending, message.numel())
        yield "exchange", all_reduce(message, self.group)
        with self._meter.timed("decode"):
            good = message.isfinite().all()
            parts = message.div_(self.world).split([slot.total.numel() for slot in pending.slots])
            for buffer, slot, part in zip(pending.buffers, pending.slots, parts, strict=True):
                buffer.copy_(part)
                slot.worker.mul_(~good)

    def _products(self, pending: Pending) -> Way:
        plain = [slot.total[first : first + n] for slot in pending.slots for first, n in slot.others]
        shapes = [p.shape for p in pending.products]
        message = torch.cat([*(p.flatten() for p in pending.products), *plain])
        yield "exchange", all_reduce(message, self.group)
        with self._meter.timed("reduce"):
            sizes = [shape.numel() for shape in shapes]
            parts = message.split([*sizes, *(part.numel() for part in plain)])
            ps = [part.view(shape) for part, shape in zip(parts, shapes, strict=False)]
            orthonormalize(ps)
            matrices = [(slot, m) for slot in pending.slots for m in slot.matrices]
            qs = [_view(slot.total, m).t() @ p for (slot, m), p in zip(matrices, ps, strict=True)]
            thin = torch.cat([q.flatten() for q in qs]) if qs else message.new_empty(0)
        self._sent(pending, message.numel() + thin.numel())
        yield "gather", all_reduce(thin, self.gather_group)
        with self._meter.timed("decode"):
            self._decode(pending, ps, parts[len(ps) :], thin)

    def _decode(
        self, pending: Pending, ps: list[torch.Tensor], plain: tuple[torch.Tensor, ...], thin: torch.Tensor
    ) -> None:
        thin.div_(self.world)
        good = thin.isfinite().all()  # NaN and infinity of any rank reach every rank
        begin = place = other = 0
        for buffer, slot in zip(pending.buffers, pending.slots, strict=True):
            for m in slot.matrices:
                size = m.columns * m.rank
                q = thin[begin : begin + size].view(m.columns, m.rank)
                total = _view(slot.total, m)
                average = ps[place] @ q.t()
                self._q[m.key] = torch.where(good, q, self._q[m.key])
                left = _view(slot.worker, m)
                left.copy_(torch.where(good, total - average, left))
                _view(buffer, m).copy_(average)
                begin, place = begin + size, place + 1
            for first, n in slot.others:
                buffer[first : first + n] = plain[other] / self.world
                other += 1


def _settle(pending: Pending, finished: Averaged) -> None:
    """Give each bucket its future, or all of them what went wrong."""
    try:
        finished.value()
    except Exception as error:  # of any kind: DDP must see it
        for future in pending.futures:
            future.set_exception(error)  # type: ignore[arg-type]  # torch annotates it with the result's type
        return
    for buffer, future in zip(pending.buffers, pending.futures, strict=True):
        future.set_result(buffer)


def _view(flat: torch.Tensor, m: Matrix) -> torch.Tensor:
    return flat[m.first : m.first + m.rows * m.columns].view(m.rows, m.columns)


def orthonormalize(matrices: list[torch.Tensor]) -> None:
    """Make the columns of each matrix [n, r] orthonormal, in place: Cholesky QR in fp64, those of equal r together.

    What a rank-deficient matrix lacks stays (nearly) zero. A matrix with a NaN or an infinity becomes NaN.
    """
    for r in {m.shape[1] for m in matrices}:
        group = [m for m in matrices if m.shape[1] == r]
        double = [m.double() for m in group]
        gram = torch.stack([m.t() @ m for m in double])
        trace = gram.diagonal(dim1=1, dim2=2).sum(1)
        good = trace.isfinite()
        eye = torch.eye(r, dtype=gram.dtype, device=gram.device)
        gram = torch.where(good[:, None, None], gram, eye)
        ridge = torch.where(good & (trace > 0), trace * 1e-12, 1.0)
        lower = torch.linalg.cholesky_ex(gram + ridge[:, None, None] * eye).L
        lower = torch.where(good[:, None, None], lower, torch.nan)
        for m, wide, factor in zip(group, double, lower, strict=True):
            m.copy_(torch.linalg.solve_triangular(factor.t(), wide, upper=True, left=False))
