"""A small network of all that is chosen, and one with a layer that 8 bits do not suit; timing that needs no clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from pykernels.precision import auto, timing
from pykernels.precision.mixture import Mixture

LAYERS = ("stem", "inner", "outer", "down", "wide", "head")


class Small(nn.Module):
    """Convolutions with activations and a residual sum, pools, a linear layer: [N, 3, 16, 16] -> [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.inner, self.outer = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.pool = nn.MaxPool2d(2)
        self.down, self.wide = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.pool((x + self.outer(self.inner(x).relu())).relu())
        x = nn.functional.hardswish(self.down(x))
        return self.head(nn.functional.hardswish(self.wide(x)).mean((2, 3)))


def small() -> tuple[nn.Module, list[torch.Tensor]]:
    """The network, and calibration inputs."""
    torch.manual_seed(0)
    return Small().eval(), [torch.randn(8, 3, 16, 16) for _ in range(4)]


def with_outliers() -> tuple[nn.Module, list[torch.Tensor]]:
    """The same, in which one layer's first input channel has weights a hundred times as large and values a hundredth:
    8 bits of one scale hold neither. Behind a curve, nothing can be moved from one layer to the other."""
    model, inputs = small()
    with torch.no_grad():
        model.wide.weight[:, 0] *= 100
        model.down.weight[0] /= 100
        model.down.bias[0] = 0
    return model, inputs


@contextmanager
def halved(int8: float = 1.0, calls: Sequence[float] | None = None) -> Iterator[None]:
    """A step takes two microseconds in float and `int8` in int8, a conversion a tenth.

    Args:
        calls: seconds of whole calls, in the order of the networks that hold the budget; by default by the number of
            bytes of their weights, the fewer the better.
    """

    def measure(mixture: Mixture, inputs: Any, edges: Any) -> timing.Times:
        some = [1e-7] * len(mixture.values)
        return timing.Times([(2e-6, 1e-6 * int8)] * len(mixture.steps), some, some, some)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "measure", measure)
        patch.setattr(auto.Search, "_seconds", lambda search, networks: _counted(networks, calls))
        yield


def _counted(networks: Sequence[Any], calls: Sequence[float] | None) -> list[float]:
    if calls is not None:
        return list(calls[: len(networks)])
    return [1e-9 * sum(b.numel() * b.element_size() for b in n.program.buffers()) for n in networks]
