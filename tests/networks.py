"""Small networks that hold one thing each, and how surgery is watched on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import pykernels as pk


class Function(nn.Module):
    """A function as a module, with the layers it uses as submodules."""

    def __init__(self, function: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.function(self, *inputs)


class Mixed(nn.Module):
    """Residual, squeeze-excite, concatenation, depthwise, a mean head: what a small mobile network is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)
        )
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.expand = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = F.hardswish(self.depthwise(x))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.expand(y) + x)
        y = torch.cat([y, F.max_pool2d(y, 3, 1, 1)], 1)
        return self.head(F.dropout(y.mean((2, 3)), 0.5, self.training))


def lively(model: nn.Module, *shape: int) -> nn.Module:
    """Give batch norms statistics of data, then evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(torch.randn(8, *shape))
    return model.eval()


def what(fast: pk.Optimized) -> list[str]:
    """The groups of a report, in order: ``conv2d + relu``."""
    return [entry.what for entry in fast.report().fused]


def ops(fast: pk.Optimized) -> list[str]:
    """The calls of the lowered graph, in order, ours as ``pykernels.name``."""
    return [str(n.target.overloadpacket) for n in fast.program.graph.nodes if hasattr(n.target, "overloadpacket")]


def close(fast: nn.Module, model: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The answers agree to a relative error in the norm."""
    with torch.no_grad():
        expected, answer = model(*inputs), fast(*inputs)
    assert answer.shape == expected.shape and answer.dtype == expected.dtype
    error = (answer - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}"
