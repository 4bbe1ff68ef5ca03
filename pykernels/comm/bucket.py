"""Any flat tensor as a bucket of gradients, for what averages something else than DistributedDataParallel's buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch._C._distributed_c10d import GradBucket


class FlatBucket:
    """Has the methods of ``dist.GradBucket`` that hooks use, over tensors of our own.

    Args:
        index: of the bucket in a step; 0 comes first.
        buffer: 1-D, contiguous; a hook averages it in place.
        parameters: what the state's names are kept by.
        gradients: views of `buffer`, one a parameter.
        last: no other bucket follows in this step.
    """

    def __init__(
        self,
        index: int,
        buffer: torch.Tensor,
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        last: bool,
    ) -> None:
        self._index, self._buffer, self._last = index, buffer, last
        self._parameters, self._gradients = list(parameters), list(gradients)

    def index(self) -> int:
        return self._index

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def parameters(self) -> list[torch.Tensor]:
        return self._parameters

    def gradients(self) -> list[torch.Tensor]:
        return self._gradients

    def is_last(self) -> bool:
        return self._last

    def as_grad_bucket(self) -> GradBucket:
        """Itself, for the type checker: hooks are written for torch's class, which Python cannot construct."""
        return cast(GradBucket, self)
