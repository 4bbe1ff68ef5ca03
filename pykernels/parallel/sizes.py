"""Calls of a network with other sizes than the example's, which show how everything in it follows from its free sizes.

A network says which dimensions of its inputs are free, not which of them are one size. That is tried: dimensions of
one size in the example belong together unless the network takes another size for some of them alone, and for the others
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from pykernels.optimized import Optimized

__all__ = ["Calls", "calls"]

Place = tuple[int, int]  # an input and its dimension


class Calls(NamedTuple):
    """Attributes:
    inputs: flat inputs of the example's call; of calls with one free size after the other changed; of one with all.
    sizes: the free sizes of each of them.
    """

    inputs: list[list[torch.Tensor]]
    sizes: list[list[int]]


def calls(network: Optimized, given: Sequence[torch.Tensor] | None) -> Calls:
    """Calls that the network takes; `given` is the first, by default of the example's shapes.

    Raises:
        ValueError: an input is no tensor, the network does not take `given`, or no other size of one that is free.
    """
    for name, known in zip(network.input_names, network.example, strict=True):
        if known is None:
            raise ValueError(f"network: the input {name} is no tensor")
    if given is not None and len(given) != len(network.example):
        raise ValueError(f"inputs: {len(network.example)} tensors are needed, not {len(given)}")
    trial = _Trial(network, given)
    found = [(places, trial.others(places)) for places in trial.together()]
    for places, others in found:
        if not others:
            value, dim = places[0]
            size, name = trial.first[value].shape[dim], network.input_names[value]
            raise ValueError(f"network: of dimension {dim} of the input {name} no other size than {size} was taken")
    start = [trial.size(places) for places, _ in found]
    alone = [[*start[:k], others[0], *start[k + 1 :]] for k, (_, others) in enumerate(found)]
    sizes = [start, *alone, *([[others[-1] for _, others in found]] if found else [])]
    changes = [dict(zip((tuple(places) for places, _ in found), row, strict=True)) for row in sizes]
    inputs = [trial.first, *(trial.inputs(change) for change in changes[1:])]
    if (why := trial.refused(inputs[-1])) is not None:
        raise ValueError(f"network: it does not take its free sizes together as {sizes[-1]}: {why}")
    return Calls(inputs, sizes)


class _Trial:
    """Whether a network takes other sizes."""

    def __init__(self, network: Optimized, given: Sequence[torch.Tensor] | None) -> None:
        assert network.planned is not None
        self.free, self.program = network.free, network.planned.program
        self.first = list(given) if given is not None else [_made(*known) for known in network.example if known]
        if (why := self.refused(self.first)) is not None:
            raise ValueError(f"inputs: the network does not take them: {why}")

    def refused(self, inputs: Sequence[torch.Tensor]) -> str | None:
        """Why the network does not take `inputs`; None if it does."""
        try:
            with torch.no_grad():
                self.program(*inputs)
        except Exception as error:  # whatever a call of torch's raises
            return f"{type(error).__name__}: {error}"
        return None

    def size(self, places: Sequence[Place]) -> int:
        value, dim = places[0]
        return self.first[value].shape[dim]

    def inputs(self, change: dict[tuple[Place, ...], int]) -> list[torch.Tensor]:
        """The first call's, with other sizes in some places."""
        shapes = [list(x.shape) for x in self.first]
        for places, size in change.items():
            for value, dim in places:
                shapes[value][dim] = size
        return [
            x if list(x.shape) == shape else _made(x.dtype, shape) for x, shape in zip(self.first, shapes, strict=True)
        ]

    def others(self, places: Sequence[Place], most: int = 2) -> list[int]:
        """At most so many other sizes that these places can have together."""
        found: list[int] = []
        for size in _candidates(self.size(places)):
            if len(found) < most and self.refused(self.inputs({tuple(places): size})) is None:
                found.append(size)
        return found

    def together(self) -> list[list[Place]]:
        """The places of each free size."""
        groups: dict[int, list[Place]] = {}
        for value, free in enumerate(self.free):
            for dim in free:
                groups.setdefault(self.first[value].shape[dim], []).append((value, dim))
        found = []
        for rest in groups.values():
            by_dim: dict[int, list[Place]] = {}
            for place in rest:
                by_dim.setdefault(place[1], []).append(place)
            for some in (*([place] for place in rest), *by_dim.values()):
                others = [place for place in rest if place not in some]
                # Either without the other: a mask of more rows than the batch may be taken, a batch of more than the
                # mask is not.
                apart = others and set(some) <= set(rest)
                if apart and self.others(some, 1) and self.others(others, 1):
                    found.append(some)
                    rest = others
            found.append(rest)
        return found


def _candidates(size: int) -> Iterator[int]:
    """Other sizes that a network might take which does not take them all; 1 and 0 are special to torch."""
    for other in (size + 1, 2 * size + 3, size - 1, 2 * size, size // 2, size + 8, size - 8, size + 32, size - 32):
        if other > 1 and other != size:
            yield other


def _made(dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Numbers that are no floats may be places in something: 0 is one."""
    return torch.randn(list(shape)).to(dtype) if dtype.is_floating_point else torch.zeros(list(shape), dtype=dtype)
