"""What the tests of hooks train: a small network on random numbers, the same for every rank and run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, 300), nn.ReLU(), nn.Linear(300, 70), nn.ReLU(), nn.Linear(70, 10))


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(16, 50, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def backward(model: nn.Module, rank: int, step: int) -> None:
    x, y = batch(rank, step)
    nn.functional.cross_entropy(model(x), y).backward()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]


def same_everywhere(tensors: list[torch.Tensor]) -> bool:
    """Whether all ranks hold the same bits."""
    mine = torch.cat([t.flatten() for t in tensors]).view(torch.int32)
    most, least = mine.clone(), mine.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool((most == least).all())


def relative(found: list[torch.Tensor], expected: list[torch.Tensor], matrices: bool) -> float:
    """The largest relative error, of the matrices or of the vectors."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if (b.dim() >= 2) == matrices]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def train(model: nn.Module, rank: int, steps: range) -> None:
    """Plain gradient descent."""
    for step in steps:
        model.zero_grad()
        backward(model, rank, step)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
