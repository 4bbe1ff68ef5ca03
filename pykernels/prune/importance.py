"""What removing a unit does to the network's answer: estimated from gradients, or from weights alone.

A removed channel is one that nobody reads any more, so to first order its removal changes an objective by the sum of
weight times gradient over the weights that read it. The squares of these numbers are averaged (Molchanov et al.,
Importance Estimation for Neural Network Pruning, 2019).

The objective, where there are labels, is the loss. Without labels the model's own answers would be perfect ones, and
the gradient of any distance to them is zero; what is wanted is its curvature. So random signs e are drawn and
e . outputs is differentiated: the mean of its squared changes is the squared change of the outputs (Hutchinson's
estimate), of classifiers the squared change of the logits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pykernels.graph.export import mode

from .coupling import Group
from .entries import at_entry, read_entry
from .moments import fits
from .surgery import dimension

__all__ = ["DRAWS", "Importance", "Loss", "by_input", "magnitude", "parts", "scalar", "taylor"]

Loss = Callable[[Any, Any], torch.Tensor]
Progress = Callable[[str, int, int], None]

DRAWS = 4
"""Random signs a batch, where there are no labels."""
SAMPLES = 8
"""Of a batch with labels so many samples at a time: over many, the gradients of a trained network cancel."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_WIDEST = 8192  # outputs of a layer whose curvature is kept as a matrix


@dataclass
class Importance:
    """What is lost by removing something; numbers of one objective, comparable with one another.

    Attributes:
        units: of each group, by its name, fp64 [units].
        curvature: of layers that read units, by their names, the second moments of the objective's gradients at their
            outputs, summed over samples and positions: fp64 [out, out]. Of those that can be fitted alone.
        objective: what the numbers are of, in words.
        batches: how many entries of the data were seen.
    """

    units: dict[str, torch.Tensor]
    curvature: dict[str, torch.Tensor] = field(default_factory=dict)
    objective: str = ""
    batches: int = 0


def magnitude(model: nn.Module, groups: Sequence[Group]) -> Importance:
    """Of each unit the share that its weights have of the squared weights of each layer that reads it, added up."""
    gather, shares = _Gather(groups), {}
    for name in gather.readers:
        squares = by_input(model.get_submodule(name)).detach().double().square().sum(1)
        shares[name] = squares / squares.sum().clamp_min(1e-30)
    return Importance(gather(shares), objective="the share of the squared weights that read it")


def taylor(
    model: nn.Module,
    groups: Sequence[Group],
    data: Iterable[Any],
    inputs: int,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> Importance:
    """First-order estimates over `data`, see above.

    Args:
        model: a copy whose gradients may be used; it is run in evaluation.
        data: entries as `read_entry` takes them. Integer labels [N] beside an answer [N, classes] are taken for
            classes, and the objective is cross entropy; other labels are not read without a `loss`.
        inputs: how many inputs a call has.
        loss: called as ``loss(answer, label)``, gives a scalar.

    Raises:
        ValueError: there are no data, the gradients are not finite, or a `loss` is given and no labels.
        TypeError: an entry does not fit.
    """
    gather = _Gather(groups)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in gather.readers}
    units = {group.name: torch.zeros(len(group.units), dtype=torch.float64) for group in groups}
    curvature: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    passes, batches, objective = 0, 0, ""
    entries = len(data) if isinstance(data, Sized) else 0
    model.requires_grad_(True)
    with (
        mode(model, False),
        torch.enable_grad(),
        _made(model, [name for name, layer in layers.items() if fits(layer) and len(layer.weight) <= _WIDEST]) as made,
    ):
        for number, entry in enumerate(data):
            args, label = read_entry(entry, inputs, number)
            if loss is not None and label is None:
                raise ValueError(f"loss: entry {number} of data has no label to give it")
            for part, target in [(args, label)] if label is None else parts(args, label, SAMPLES):
                made.clear()
                with at_entry(number):
                    answer = model(*part)
                    objective, found = scalar(answer, target, loss)
                if found is not None and not found.requires_grad:
                    raise ValueError("loss: what it gives has no gradient")
                scalars = _drawn(answer, generator) if found is None else [found]
                weights: list[torch.Tensor] = [layer.weight for layer in layers.values()]
                sources = [*weights, *made.values()]
                for place, total in enumerate(scalars):
                    last = place + 1 == len(scalars)
                    changes = torch.autograd.grad(total, sources, retain_graph=not last, allow_unused=True)
                    gradients = [torch.zeros_like(a) if g is None else g for a, g in zip(sources, changes, strict=True)]
                    columns = {
                        name: (by_input(layer, layer.weight * g)).detach().double().sum(1)
                        for (name, layer), g in zip(layers.items(), gradients, strict=False)
                    }
                    for name, change in gather(columns).items():
                        units[name] += change.square()
                    for name, g in zip(made, gradients[len(weights) :], strict=True):
                        rows = (g.movedim(1, -1) if isinstance(layers[name], nn.Conv2d) else g).flatten(0, -2)
                        curvature[name] = curvature.get(name, torch.zeros(())) + (rows.t() @ rows).double()
                    passes += 1
            batches = number + 1
            if progress is not None:
                progress("weighing channels", batches, max(entries, batches))
    if not passes:
        raise ValueError("data: it is empty; give a loader that yields inputs, or importance='magnitude'")
    for name, total in units.items():
        if not total.isfinite().all():
            raise ValueError(f"data: the gradients at {name!r} are not finite")
    return Importance(
        {name: total / passes for name, total in units.items()},
        {name: moments / passes for name, moments in curvature.items()},
        objective,
        batches,
    )


def by_input(layer: nn.Module, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The weights of a layer, or as many numbers, by the channel that they read: [in, others]."""
    tensor: torch.Tensor = layer.weight if weight is None else weight  # type: ignore[assignment]
    return tensor.movedim(dimension(layer, "in"), 0).flatten(1)


class _Gather:
    """From numbers of the input channels of layers to numbers of units: the sum over their slots."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.places: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
        for group in groups:
            found: dict[str, list[tuple[int, int]]] = defaultdict(list)
            for number, unit in enumerate(group.units):
                for slot in unit:
                    if slot.axis == "in":
                        found[slot.layer].append((number, slot.channel))
            pairs = {name: torch.tensor(places).t() for name, places in found.items()}
            self.places.append({name: (pair[0], pair[1]) for name, pair in pairs.items()})
        self.readers = list(dict.fromkeys(name for places in self.places for name in places))

    def __call__(self, numbers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for group, places in zip(self.groups, self.places, strict=True):
            total = torch.zeros(len(group.units), dtype=torch.float64)
            for name, (units, channels) in places.items():
                total.index_add_(0, units, numbers[name][channels])
            found[group.name] = total
        return found


@contextmanager
def _made(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What layers gave in the call before, by their names."""
    found: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            found[name] = output
            return output.clone()  # what comes behind may write into it

        return hook

    handles = [model.get_submodule(name).register_forward_hook(remember(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def parts(args: tuple[Any, ...], label: Any, size: int) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """So many samples at a time, where all tensors have the batch first; else all."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, label)) if isinstance(leaf, torch.Tensor)]
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in leaves}
    count = next(iter(sizes), None)
    if len(sizes) != 1 or count is None or count <= size:
        yield args, label
        return
    for begin in range(0, count, size):
        yield pytree.tree_map(
            lambda leaf, at=slice(begin, begin + size): leaf[at] if isinstance(leaf, torch.Tensor) else leaf,
            (args, label),
        )


def scalar(answer: Any, label: Any, loss: Loss | None) -> tuple[str, torch.Tensor | None]:
    """The objective in words, and what it is; None where it is the change of the answer itself."""
    if loss is not None:
        found = loss(answer, label)
        if not isinstance(found, torch.Tensor) or found.dim():
            raise ValueError("it must give a scalar tensor")
        return "the loss that was given", found
    outputs = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
    if isinstance(label, torch.Tensor) and label.dtype in _INTEGERS and len(outputs) == 1:
        (output,) = outputs
        if output.dim() == 2 and label.shape == output.shape[:1]:
            return "cross entropy with the labels", F.cross_entropy(output, label.long())
    return "the squared change of the outputs", None


def _drawn(answer: Any, generator: torch.Generator) -> list[torch.Tensor]:
    """Sums of the outputs with random signs."""
    outputs = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not outputs:
        raise ValueError("model: no output of it depends on its weights in a way that can be differentiated")
    scalars = []
    for _ in range(DRAWS):
        signs = [torch.randint(0, 2, y.shape, generator=generator).to(y) * 2 - 1 for y in outputs]
        scalars.append(sum(((y * e).sum() for y, e in zip(outputs, signs, strict=True)), torch.zeros(())))
    return scalars
