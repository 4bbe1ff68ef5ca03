"""What benchmarks.comm.pipeline times: a stage of a network, and what goes in and is asked at the ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pykernels.bench import zoo

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
VOCABULARY = 1000


@dataclass
class Part:
    """Of a rank.

    Attributes:
        module: its stage.
        x, target: of all chunks together, for the first and the last stage.
        given: what a chunk of the stage's input is like.
    """

    module: nn.Module
    x: torch.Tensor
    target: torch.Tensor
    given: torch.Tensor
    loss: Loss


class _Handed(torch.autograd.Function):
    """Activations that were made before, whatever comes in, and gradients that were."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, parameter: torch.Tensor, made: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradient = gradient
        return made.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient.clone(), None, None, None


class Stub(nn.Module):
    """A stage that costs two copies. Its parameter makes torch ask for gradients."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))
        self.made, self.gradient = (torch.randn(shape) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Handed.apply(x, self.parameter, self.made, self.gradient)


def stub(rank: int, world: int, given: Any) -> Part:
    torch.manual_seed(rank)
    shape = (given.batch, given.tokens, given.width)
    x = torch.randn(given.batch * given.chunks, given.tokens, given.width)
    return Part(Stub(shape), x, x, torch.randn(shape), lambda output, target: output.mean())


def _cut(units: list[nn.Module], rank: int, world: int, x: torch.Tensor, target: torch.Tensor, chunks: int) -> Part:
    """As many units for each rank, and the loss of classes."""
    ends = [len(units) * n // world for n in range(world + 1)]
    with torch.no_grad():
        given = nn.Sequential(*units[: ends[rank]])(x[: len(x) // chunks])
    module = nn.Sequential(*units[ends[rank] : ends[rank + 1]])

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())

    return Part(module, x, target, given, loss)


def transformer(rank: int, world: int, given: Any) -> Part:
    """A small language model: embedding, `--layers` encoder layers, head."""
    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(given.width, 4, 4 * given.width, 0.0, batch_first=True, norm_first=True)
        for _ in range(given.layers)
    ]
    units = [nn.Embedding(VOCABULARY, given.width), *layers, nn.Linear(given.width, VOCABULARY)]
    x, target = (torch.randint(VOCABULARY, (given.batch * given.chunks, given.tokens)) for _ in range(2))
    return _cut(units, rank, world, x, target, given.chunks)


def resnet50(rank: int, world: int, given: Any) -> Part:
    """Its 16 blocks cost about the same each."""
    torch.manual_seed(0)
    net: Any = zoo.network("resnet50").train()
    blocks = [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
    units = [
        nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, blocks[0]),
        *blocks[1:-1],
        nn.Sequential(blocks[-1], net.avgpool, nn.Flatten(), net.fc),
    ]
    images = given.batch * given.chunks
    x, target = torch.randn(images, 3, given.size, given.size), torch.randint(1000, (images,))
    return _cut(units, rank, world, x, target, given.chunks)


MODELS: dict[str, Callable[[int, int, Any], Part]] = {"stub": stub, "transformer": transformer, "resnet50": resnet50}
