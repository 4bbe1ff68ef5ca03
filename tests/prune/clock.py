"""A clock that counts: what a kernel takes follows from its operations and bytes, whatever else the machine does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from pykernels.network.plan import timing
from pykernels.ops.plan import describe_plan


def counted(plan: torch.Tensor, weights: torch.Tensor, inputs: Sequence[torch.Tensor], rounds: int = 1) -> torch.Tensor:
    """As `profile_plan`: [rounds, drivers], nanoseconds."""
    drivers = describe_plan(plan, weights, inputs)["drivers"]
    return torch.tensor([[500 + d["operations"] // 20 + d["bytes"] // 10 for d in drivers]] * rounds)


@contextmanager
def ticking() -> Iterator[None]:
    """Latencies are counted, not measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "profile_plan", counted)
        patch.setattr(timing, "between_seconds", lambda planned, given, _: 1e-6 * len(planned.describe(given).left))
        yield
