"""The hook that compresses nothing: what the others are compared with, and what ``auto`` takes on fast links."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket

from pykernels.comm.collectives import all_reduce
from pykernels.comm.state import CommState


class Fp32State(CommState):
    """State of the plain all-reduce; the arguments of :class:`CommState`. Gradients travel in their own dtype."""

    codec = "fp32"

    def average(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        sent = 2 * (self.world - 1) / self.world * buffer.nbytes
        self._meter.sent(sent, sent)
        buffer.mul_(1.0 / self.world)  # before the sum, as DistributedDataParallel does: fp16 would overflow
        averaged: Any = all_reduce(buffer, self.group).get_future()
        future: torch.futures.Future[torch.Tensor] = averaged.then(lambda done: done.value()[0])
        return future

    def forget_bucket(self, index: int) -> None:
        """There is nothing to drop."""

    def forget_buckets(self) -> None:
        pass
