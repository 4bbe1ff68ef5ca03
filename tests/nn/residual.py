"""A small residual network for the tests of swap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A residual block written like torchvision's: one ReLU object called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Net(nn.Module):
    """Stem, residual block, a functional activation, pools, dropout and a head of two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True)
        )
        self.block = Block(8)
        self.mix = nn.Conv2d(8, 16, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pool(self.block(self.stem(x)))
        y = F.relu(self.mix(y))
        return self.head(torch.flatten(self.squeeze(y), 1))


def trained(net: nn.Module | None = None, steps: int = 3) -> nn.Module:
    """A network whose batch norms have seen data."""
    net = Net() if net is None else net
    net.train()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
        for _ in range(steps):
            net(torch.randn(4, 3, 16, 16))
    return net.eval()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


X = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)
