"""How far an objective moves on data that nothing was fitted to: what a removal costs is measured, not believed.

Weights fitted to few data promise too much: on 100 photographs the last layers of a MobileNetV2 seem to make up for a
quarter of their channels, and on others they do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pykernels.graph.export import mode

from .entries import read_entry
from .importance import Loss, parts, scalar

__all__ = ["Rest", "Trial", "held_out"]

_EVERY = 4  # one entry of so many is held out
_SAMPLES = 32  # that are held out, at most
_AT_ONCE = 8


def held_out(data: Iterable[Any], batches: int) -> tuple[Rest, list[Any]]:
    """Entries to fit to, and the first of those to judge by: every fourth; of two or three the last; one is both.

    Args:
        data: read once here, and again at each pass over the entries to fit to.
        batches: how many entries it has.
    """
    step, held, count = min(_EVERY, batches), [], 0
    for number, entry in enumerate(data):
        if number % step == step - 1 and count < _SAMPLES:
            held.append(entry)
            sizes = [x.shape[0] for x in pytree.tree_leaves(entry) if isinstance(x, torch.Tensor) and x.dim()]
            count += sizes[0] if sizes else 1
    return Rest(data, step), held


class Rest:
    """The entries of some data that are not held out."""

    def __init__(self, data: Iterable[Any], step: int) -> None:
        self.data, self.step = data, step

    def __iter__(self) -> Iterator[Any]:
        for number, entry in enumerate(self.data):
            if self.step == 1 or number % self.step != self.step - 1:
                yield entry


class Trial:
    """The mean squared change of the objective, of classes' answers without labels of the answers themselves.

    Args:
        model: the whole model.
        entries: that are held out, as `read_entry` takes them.
        inputs: how many inputs a call has.
        loss: as of `taylor`.
    """

    def __init__(self, model: nn.Module, entries: Iterable[Any], inputs: int, loss: Loss | None) -> None:
        self.loss = loss
        self.parts: list[tuple[tuple[Any, ...], Any]] = []
        count = 0
        for number, entry in enumerate(entries):
            for part in parts(*read_entry(entry, inputs, number), _AT_ONCE):
                if count < _SAMPLES:
                    self.parts.append(part)
                    count += _AT_ONCE
        self.answers = list(self._answers(model))

    def __call__(self, pruned: nn.Module) -> float:
        changes = [
            sum(float((a - b).double().square().sum()) for a, b in zip(before, after, strict=True))
            for before, after in zip(self.answers, self._answers(pruned), strict=True)
        ]
        return sum(changes) / len(changes)

    def _answers(self, model: nn.Module) -> Iterator[list[torch.Tensor]]:
        with mode(model, False), torch.no_grad():
            for args, label in self.parts:
                answer = model(*args)
                _, found = scalar(answer, label, self.loss)
                leaves = pytree.tree_leaves(answer) if found is None else [found]
                yield [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
