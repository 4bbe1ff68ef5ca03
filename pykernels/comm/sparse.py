"""Hooks that send few gradients: the largest ones (top-k), or some drawn at random (random-k).

What is not sent stays in the residual. Aji and Heafield, "Sparse Communication for Distributed Gradient Descent";
momentum correction and warm-up after Lin et al., "Deep Gradient Compression".
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket

from pykernels.comm.collectives import all_gather, all_reduce
from pykernels.comm.feedback import ErrorFeedback
from pykernels.comm.lanes import Way
from pykernels.comm.layout import RAW_BLOCK, Run
from pykernels.comm.state import CommState
from pykernels.ops import compress, sparse

WARMUP_STAGES = 8


@dataclass
class Slot:
    """What a bucket keeps from step to step.

    Attributes:
        segments: int64 [S, 3], the gradients that are selected from.
        raw: int64 [S, 3], the exempt ones: (position in the bucket, elements, byte behind the selection).
        chosen_from, raw_bytes: elements of the former, bytes of the latter.
        worker, velocity: fp32, as large as the bucket.
        message, gathered: made anew whenever k changes.
    """

    segments: torch.Tensor
    raw: torch.Tensor
    chosen_from: int
    raw_bytes: int
    worker: torch.Tensor
    velocity: torch.Tensor | None
    message: torch.Tensor | None = None
    gathered: torch.Tensor | None = None


class SparseState(CommState):
    """What top-k and random-k share.

    The selection is made bucket by bucket. After a checkpoint DDP's first step has other buckets than its later ones,
    so a resumed run may choose others in that step: it loses nothing, but is not the uninterrupted run to the bit. The
    arguments are those of :class:`CommState`, and

    Args:
        ratio: the part of a bucket's gradients that is sent, in (0, 1].
        warmup_steps: over as many steps the ratio falls from 1 to `ratio`, exponentially, in 8 stages.

    Raises:
        ValueError: an argument out of range.
    """

    lanes = 1

    def __init__(self, *args: Any, ratio: float = 0.01, warmup_steps: int = 0, **kwargs: Any) -> None:
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"pykernels: ratio must lie in (0, 1], not {ratio}")
        if warmup_steps < 0:
            raise ValueError(f"pykernels: warmup_steps must not be negative, not {warmup_steps}")
        super().__init__(*args, **kwargs)
        self.ratio = ratio
        self.warmup_steps = warmup_steps
        self.velocity = ErrorFeedback()

    @property
    def current_ratio(self) -> float:
        """The ratio of this step: `ratio` once the warm-up is over."""
        if self.step >= self.warmup_steps:
            return self.ratio
        stage = WARMUP_STAGES * max(0, self.step) // self.warmup_steps
        return float(self.ratio ** ((stage + 1) / (WARMUP_STAGES + 1)))

    def new_slot(self, bucket: GradBucket, runs: list[Run]) -> Slot:
        self.agree(f"bucket {bucket.index()}", f"{self.codec}, {self.options()}", runs)
        buffer = bucket.buffer()
        raw, end = [], 0
        for run in runs:
            if run.exempt:
                raw.append((run.first, run.numel, end))
                end += -(-run.numel // RAW_BLOCK) * RAW_BLOCK * 4
        chosen = [(run.first, run.numel, 0) for run in runs if not run.exempt]
        return Slot(
            torch.tensor(chosen, dtype=torch.int64).reshape(-1, 3),
            torch.tensor(raw, dtype=torch.int64).reshape(-1, 3),
            sum(numel for _, numel, _ in chosen),
            end,
            self.feedback.attach_worker(runs, buffer.numel(), buffer.device),
            self.velocity.attach_worker(runs, buffer.numel(), buffer.device) if self.keeps_velocity else None,
        )

    keeps_velocity = False

    def selected(self, slot: Slot) -> int:
        """How many gradients of a bucket are sent in this step."""
        return min(slot.chosen_from, max(1, round(self.current_ratio * slot.chosen_from)))

    @abstractmethod
    def options(self) -> str:
        """What all ranks must agree on."""

    def rescale(self, factor: float) -> None:
        super().rescale(factor)
        self.velocity.scale(factor)

    def extra_state(self) -> dict[str, Any]:
        return {"velocity": self.velocity.state_dict()["worker"]}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.velocity.load(state["velocity"], {}, False)


class TopKState(SparseState):
    """The largest hundredth (by default) of the gradients: a 50th of the bytes for two ranks, more ranks send more.

    The arguments of :class:`SparseState`, and

    Args:
        threshold: send only gradients (with what is left of earlier ones) of at least this magnitude; 0 for the k
            largest whatever they are.
        momentum: accumulate velocities instead of gradients, for an optimizer that then must have no momentum itself
            (momentum correction); 0 for none.
    """

    codec = "topk"

    def __init__(self, *args: Any, threshold: float = 0.0, momentum: float = 0.0, **kwargs: Any) -> None:
        if not threshold >= 0.0:
            raise ValueError(f"pykernels: threshold must not be negative, not {threshold}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"pykernels: momentum must lie in [0, 1), not {momentum}")
        super().__init__(*args, **kwargs)
        self.threshold = threshold
        self.momentum = momentum
        self.keeps_velocity = momentum > 0.0

    def options(self) -> str:
        return f"ratio {self.ratio}, warmup_steps {self.warmup_steps}, threshold {self.threshold}, {self.momentum}"

    def way(self, index: int, buffer: torch.Tensor, slot: Slot) -> Way:
        k = self.selected(slot)
        size = 8 * k + slot.raw_bytes
        if slot.message is None or slot.message.numel() != size:
            slot.message = torch.zeros(size, dtype=torch.uint8, device=buffer.device)
            slot.gathered = torch.zeros(self.world * size, dtype=torch.uint8, device=buffer.device)
        message, gathered = slot.message, slot.gathered
        assert gathered is not None
        others = self.world - 1
        self._meter.sent(2 * others / self.world * buffer.nbytes, others * size)
        with self._meter.timed("encode"):
            sparse.sparse_encode(
                buffer, slot.worker, slot.velocity, message, slot.segments, k, self.threshold, self.momentum
            )
            compress.compress_encode(buffer, None, message[8 * k :], slot.raw, "fp32", RAW_BLOCK)
        yield "gather", all_gather(gathered, message, self.group)
        with self._meter.timed("decode"):
            payloads = gathered.view(self.world, size)
            buffer.zero_()
            sparse.sparse_decode(payloads[:, : 8 * k], buffer, k, 1.0 / self.world)
            compress.compress_decode(payloads[:, 8 * k :], buffer, slot.raw, "fp32", RAW_BLOCK, 1.0 / self.world)


class RandomKState(SparseState):
    """Gradients at random positions, the same on every rank: with 1 %, a hundredth of the bytes.

    The arguments of :class:`SparseState`, and

    Args:
        seed: of the positions, which all ranks draw alike, so that an all-reduce of the values is all there is to send.
    """

    codec = "randomk"

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def options(self) -> str:
        return f"ratio {self.ratio}, warmup_steps {self.warmup_steps}, seed {self.seed}"

    def way(self, index: int, buffer: torch.Tensor, slot: Slot) -> Way:
        k = self.selected(slot)
        size = 4 * k + slot.raw_bytes
        if slot.message is None or slot.message.numel() != size:
            slot.message = torch.zeros(size, dtype=torch.uint8, device=buffer.device)
        message = slot.message
        values = message.view(torch.float32)
        sent = 2 * (self.world - 1) / self.world
        self._meter.sent(sent * buffer.nbytes, sent * size)
        seed = zlib.crc32(repr((self.seed, self.step, index)).encode())
        with self._meter.timed("encode"):
            sparse.randomk_encode(buffer, slot.worker, values[:k], slot.segments, k, seed)
            compress.compress_encode(buffer, None, message[4 * k :], slot.raw, "fp32", RAW_BLOCK)
        yield "gather", all_reduce(values, self.group)
        with self._meter.timed("decode"):
            sparse.randomk_decode(values[:k], buffer, slot.segments, k, seed, 1.0 / self.world)
            compress.compress_decode(message[None, 4 * k :], buffer, slot.raw, "fp32", RAW_BLOCK, 1.0 / self.world)
