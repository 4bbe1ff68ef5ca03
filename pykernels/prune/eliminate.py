"""Which channels the others make up for best: of each group the units, in the order in which they go, and what is lost.

A layer of weights W that reads channels of the second moments G can be refitted when channels B are taken away; with
the inverse I of the moments of those that are left, its output then changes, in the least squares, by the weights

    W' - W = -W[:, B] I[B, B]^-1 I[B, :]      I' = I - I[:, B] I[B, B]^-1 I[B, :]

(the optimal brain surgeon of Hassibi & Stork, 1993; of channels as in Kurtic et al., ZipLM, 2023). What that does to
the objective is told by the second moments H of its gradients at the layer's output, which are taken to have nothing
to do with the inputs (Martens & Grosse, K-FAC, 2015): the squared change is

    sum over H * (W[:, B] I[B, B]^-1 W[:, B]^T)

The units that cost least of this go first, and all is weighed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .coupling import PANEL, Group
from .moments import ROOM, Moments, observed, room
from .recipe import recipe_of
from .surgery import cut

__all__ = ["eliminate", "steps"]

Progress = Callable[[str, int, int], None]
_TELLS = 1e-3  # of the largest loss: with less gone, what is measured is next to nothing, and tells nothing of more
_NEAR = 2  # times as many units as go at once are looked at for them


def eliminate(
    model: nn.Module,
    groups: Sequence[Group],
    curvature: Mapping[str, torch.Tensor],
    rest: Iterable[Any],
    held: Sequence[Any],
    inputs: int,
    trial: Callable[[nn.Module], float],
    progress: Progress | None = None,
) -> dict[str, tuple[list[int], dict[int, float]]]:
    """Of each group its units, those that stay longest first, and by width what is lost, in the unit of `trial`.

    The order comes from all data. What is lost is looked at at about a quarter, a half and three quarters of the units,
    with weights that are fitted to `rest`, for the inputs of `held`; between, it follows what all data tell. At three
    quarters (at fewer, where channels are dead or there twice) it is measured, by `trial`, and the others are in
    proportion.

    Groups are left out where a layer that reads them cannot be fitted, or the data are too few for it.

    Args:
        groups: of channels.
        curvature: of layers, by their names, the second moments [out, out] of the objective's gradients.
        rest, held: entries as `read_entry` takes them.
        inputs: how many inputs a call has.
        trial: from a pruned model to what is lost with it.
        progress: called as ``progress("weighing layers", done, total)``.
    """
    done, seen = {}, 0
    for bunch in _bunches(model, [g for g in groups if all(name in curvature for name in _readers(g))]):
        names = dict.fromkeys(name for group in bunch for name in _readers(group))
        fitted, others = (dict(observed(model, names, data, inputs)) for data in (rest, held))
        for group in bunch:
            read = _readers(group)
            whole = {name: fitted[name] + others[name] for name in read if name in fitted}
            if len(whole) == len(read) and all(found.suffice(found.channels) for found in whole.values()):
                order, lost = _ordered(group, [_Reader.of(n, group, m, curvature[n]) for n, m in whole.items()])
                recipes = {w: recipe_of(model, [group], {group.name: order[:w]}) for w in steps(group)}
                found: dict[int, float] = {}
                for width, recipe in recipes.items():
                    kept = {name: recipe["layers"][name]["in"]["kept"] for name in read}
                    found[width] = sum(fitted[n].left(kept[n], others[n], curvature[n]) for n in read)
                tried = max(width for width, some in found.items() if some >= _TELLS * max(found.values()))
                small = cut(model, recipes[tried])
                for name in read:
                    axes = recipes[tried]["layers"][name]
                    fitted[name].refit(small.get_submodule(name), axes["in"]["kept"], axes.get("out", {}).get("kept"))
                scale = trial(small) / max(found[tried], 1e-30)
                factors = [some / max(lost[width], 1e-30) for width, some in found.items()]
                by = scale * np.interp(list(lost), list(found), factors)
                done[group.name] = order, {w: x * float(f) for (w, x), f in zip(lost.items(), by, strict=True)}
            seen += 1
            if progress is not None:
                progress("weighing layers", seen, len(groups))
    return done


def steps(group: Group) -> list[int]:
    """Widths at which is looked what is lost: about a quarter, a half and three quarters."""
    widths = group.widths[:-1]
    return sorted({widths[len(widths) * quarter // 4] for quarter in (1, 2, 3)})


def _readers(group: Group) -> list[str]:
    return list(dict.fromkeys(slot.layer for slot in group.units[0] if slot.axis == "in"))


def _bunches(model: nn.Module, groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups whose layers' moments fit into memory together; of one that does not fit, it alone."""
    bunch: list[Group] = []
    taken = 0
    for group in groups:
        size = 2 * sum(room(model.get_submodule(name)) for name in _readers(group))  # of rest and of held
        if bunch and taken + size > ROOM:
            yield bunch
            bunch, taken = [], 0
        bunch.append(group)
        taken += size
    if bunch:
        yield bunch


def _ordered(group: Group, readers: Sequence[_Reader]) -> tuple[list[int], dict[int, float]]:
    left, gone = list(range(len(group.units))), []
    lost, total = {len(left): 0.0}, 0.0
    for width in reversed(group.widths[:-1]):
        # Units go one by one, each weighed without those that went before it, but of the cheapest at first alone: what
        # that takes does not grow with the layer.
        near = _costs(readers).argsort(stable=True)[: _NEAR * PANEL].tolist()
        parts, places = [reader.part(near) for reader in readers], []
        for _ in range(len(left) - width):
            least = int(_costs(parts).argmin())
            total += sum(part.remove([least]) for part in parts)
            places.append(near.pop(least))
        for reader in readers:
            reader.remove(places)
        gone += [left[place] for place in places]
        left = [unit for place, unit in enumerate(left) if place not in set(places)]
        lost[width] = total
    return left + gone[::-1], lost


def _costs(readers: Sequence[_Reader]) -> torch.Tensor:
    return torch.stack([reader.costs() for reader in readers]).sum(0)


class _Reader:
    """A layer that reads a group: of the units that are left weights [out, units * numbers, others], the inverse of
    their moments, and the curvature [out, out]."""

    def __init__(
        self, weight: torch.Tensor, inverse: torch.Tensor, curvature: torch.Tensor, units: int, size: int
    ) -> None:
        self.weight, self.inverse, self.curvature = weight, inverse, curvature
        self.units, self.size = units, size  # numbers that a unit has

    @classmethod
    def of(cls, name: str, group: Group, moments: Moments, curvature: torch.Tensor) -> _Reader:
        channels = [[s.channel for s in unit if s.layer == name and s.axis == "in"] for unit in group.units]
        known = {channel for unit in channels for channel in unit}
        order = [c for unit in channels for c in unit] + [c for c in range(moments.channels) if c not in known]
        return cls(*moments.inverted(order), curvature, len(channels), len(channels[0]) * moments.taps)

    def part(self, places: Sequence[int]) -> _Reader:
        """Of some of its units, the others staying."""
        columns = (torch.tensor(places)[:, None] * self.size + torch.arange(self.size)).flatten()
        inverse = self.inverse[columns[:, None], columns]
        return _Reader(self.weight[:, columns], inverse, self.curvature, len(places), self.size)

    def costs(self) -> torch.Tensor:
        """The squared change without each unit, the others refitted: [units]."""
        shape, length = (self.units, self.size), self.units * self.size
        mine = self.inverse[:length, :length].unflatten(0, shape).unflatten(2, shape)
        inner = torch.linalg.inv(mine.diagonal(dim1=0, dim2=2).movedim(2, 0))  # [units, size, size]
        weight = self.weight[:, :length]
        bent = self.curvature @ weight
        weight, bent = (w.unflatten(1, shape).movedim(1, 0) for w in (weight, bent))  # [units, out, size]
        return (weight.mT @ bent * inner).sum((1, 2))

    def remove(self, places: Sequence[int]) -> float:
        """Take units away, and return the squared change."""
        stays = torch.ones(self.units, self.size, dtype=torch.bool)
        stays[list(places)] = False
        gone = (~stays).flatten().nonzero().flatten()
        rest = torch.cat([stays.flatten(), torch.ones(self.weight.shape[1] - stays.numel(), dtype=torch.bool)])
        inner, weight = torch.linalg.inv(self.inverse[gone[:, None], gone]), self.weight[:, gone]
        change = inner @ self.inverse[gone][:, rest]
        self.weight = self.weight[:, rest] - weight @ change
        self.inverse = self.inverse[rest][:, rest] - self.inverse[rest][:, gone] @ change
        self.units -= len(places)
        return float((weight.mT @ self.curvature @ weight * inner).sum())
