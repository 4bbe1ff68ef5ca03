"""The hook that compresses nothing: what the others are compared with, and what ``auto`` takes on fast links."""

from __future__ import annotations

import torch

from pykernels.comm.collectives import all_reduce
from pykernels.comm.lanes import Way
from pykernels.comm.state import CommState


class Fp32State(CommState):
    """No compression: the all-reduce that DistributedDataParallel makes without a hook, in the gradients' own dtype.
    The arguments are those of :class:`CommState`."""

    codec = "fp32"

    def way(self, index: int, buffer: torch.Tensor, slot: None) -> Way:
        sent = 2 * (self.world - 1) / self.world * buffer.nbytes
        self._meter.sent(sent, sent)
        buffer.mul_(1.0 / self.world)  # before the sum, as DistributedDataParallel does: fp16 would overflow
        yield "exchange", all_reduce(buffer, self.group)
