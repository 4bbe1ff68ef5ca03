"""Which channels must go together: torch-pruning's dependency graph, read once and kept as plain data.

torch-pruning traces the model through autograd and says, for a channel that one layer makes, which slices of which
other layers belong to it. Only that is taken from it; what is removed, and how, is decided and done here. What it says
is never trusted: `surgery.check` compares every cut with the masked model.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from pykernels.graph.export import mode
from pykernels.ops.errors import reason

from .tracing import is_frozen_norm, traced

__all__ = ["PANEL", "Coupling", "Group", "Slot", "couple", "is_depthwise", "width"]

PANEL = 16
"""Columns of the kernels' panels: a layer of 17 channels costs what one of 32 does."""


class Slot(NamedTuple):
    """One channel of one layer.

    Attributes:
        layer: name of the module in the model.
        axis: ``out`` for channels that it makes (norms and depthwise convolutions have only these), ``in`` for
            channels that it reads and sums over.
        channel: its number.
    """

    layer: str
    axis: str
    channel: int


@dataclass
class Group:
    """Channels that are interchangeable for a choice of width: each is a unit of slots that go together, and all units
    have slots in the same layers.

    Attributes:
        name: of the first layer that makes them.
        units: the slots of each; `units[i]` go or stay together.
        axes: (layer, axis) pairs that the units have slots in.
    """

    name: str
    units: list[tuple[Slot, ...]]
    axes: tuple[tuple[str, str], ...]

    @property
    def widths(self) -> list[int]:
        """What its width may become: multiples of `PANEL`, and as it is."""
        return [*range(PANEL, len(self.units), PANEL), len(self.units)]


@dataclass
class Coupling:
    """What of a model can be pruned.

    Attributes:
        groups: in the order of the model's layers.
        left: layers whose channels stay, by name, and why.
    """

    groups: list[Group]
    left: dict[str, str] = field(default_factory=dict)


def is_depthwise(module: nn.Module) -> bool:
    """One filter a channel. A convolution of one channel is none: it can be read either way, and is an ordinary one."""
    return (
        isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )  # fmt: skip


def width(module: nn.Module, axis: str) -> int:
    """How many channels a layer has.

    Raises:
        ValueError: no channels of such a module can be removed.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels if axis == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if axis == "out" else module.in_features
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    if is_frozen_norm(module):
        return len(module.weight)  # type: ignore[arg-type]
    raise ValueError(f"it is a {type(module).__name__}, whose channels cannot be removed")


def couple(model: nn.Module, args: tuple[Any, ...], keep: Iterable[str] = ()) -> Coupling:
    """Trace `model` and find its groups.

    Args:
        model: a copy that may be changed: it is left in evaluation, and its parameters recording gradients.
        args: inputs of one call.
        keep: names of modules that go on making all their channels, with all that is inside of them.

    Raises:
        ModuleNotFoundError: torch-pruning is not installed.
        ValueError: the model does not run on these inputs, or torch-pruning cannot trace it.
    """
    if importlib.util.find_spec("torch_pruning") is None:
        raise ModuleNotFoundError(
            "pruning needs torch-pruning: pip install 'pykernels[compress]', or torch-pruning==1.6.1 with --no-deps"
        )
    with mode(model, False), torch.no_grad():
        try:
            model(*args)
        except Exception as error:  # the model's own forward
            raise ValueError(f"example_inputs: the model does not run on them: {reason(error)}") from error
    names = {module: name for name, module in model.named_modules()}
    kept = tuple(keep)
    unknown = [name for name in kept if name not in names.values()]
    if unknown:
        raise ValueError(f"keep: the model has no module {', '.join(map(repr, unknown))}")
    stay = {name for name in names.values() if any(name == k or name.startswith(f"{k}.") for k in kept)}
    reasons = {(name, axis): why for name, why in _shared_parameters(model).items() for axis in ("in", "out")}
    reasons |= {(name, "out"): "it is in keep" for name in stay}
    parents: dict[Slot, Slot] = {}
    bad: list[tuple[Slot, str, str]] = []  # a slot whose unit stays, the layer that is to blame, why
    pieces = traced(model, args, names)
    for found, returned in ((found, piece.returned) for piece in pieces for found in piece.groups):
        first: dict[int, Slot] = {}  # of each channel of the layer that the group is asked of, a slot
        blame: dict[int, tuple[str, str]] = {}
        for item in found:
            module, axis = item.dep.target.module, _axis(item.dep)
            name = names.get(module, "") if isinstance(module, nn.Module) else ""
            complaint = _complaint(module, axis, returned)
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                if complaint is not None:
                    blame.setdefault(root, (name, complaint))
                if name and not _one_slope(module):  # else nothing that has channels
                    slot = Slot(name, "out" if is_depthwise(module) else axis, int(index))
                    _join(parents, first.setdefault(root, slot), slot)
        bad += [(first[root], *why) for root, why in blame.items() if root in first]
    unmet = pieces[0].returned if len(pieces) > 1 else "in evaluation it is not called, as far as torch-pruning traces"
    return _groups(model, parents, bad, reasons, unmet)


def _axis(dep: Any) -> str:
    return "out" if dep.handler.__name__ == "prune_out_channels" else "in"


def _complaint(module: Any, axis: str, returned: str) -> str | None:
    """Why channels of this layer must stay; operations without weights are modules of torch-pruning's own."""
    if isinstance(module, nn.Parameter):
        return "a parameter of the model's own meets them"
    if type(module).__name__ == "_OutputOp":
        return returned
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not is_depthwise(module):
        return f"a convolution of {module.groups} groups reads or makes them"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return f"{type(module).__name__} normalizes over them, so the others would change"
    if type(module).__module__.startswith("torch_pruning"):
        return None
    try:
        width(module, axis)
    except ValueError as error:
        return str(error)
    return None


def _one_slope(module: nn.Module) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Layers that share a tensor with another layer: cut apart they would no longer."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    found = {}
    for names in owners.values():
        for name in names:
            if len(names) > 1:
                others = ", ".join(other for other in names if other != name)
                found[name] = f"it shares a parameter with {others or 'itself'}"
    return found


def _join(parents: dict[Slot, Slot], a: Slot, b: Slot) -> None:
    parents.setdefault(a, a)
    parents.setdefault(b, b)
    a, b = _root(parents, a), _root(parents, b)
    if a != b:
        parents[b] = a


def _root(parents: dict[Slot, Slot], slot: Slot) -> Slot:
    while parents[slot] != slot:
        parents[slot] = parents[parents[slot]]
        slot = parents[slot]
    return slot


def _groups(
    model: nn.Module,
    parents: dict[Slot, Slot],
    bad: list[tuple[Slot, str, str]],
    reasons: Mapping[Any, str],
    unmet: str,
) -> Coupling:
    """Units of equal axes as groups; those that must stay as reasons, of layers that were not met `unmet`."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    units: dict[Slot, list[Slot]] = defaultdict(list)
    for slot in parents:
        units[_root(parents, slot)].append(slot)
    complaints: dict[Slot, str] = {}
    for slot, layer, complaint in bad:
        complaints.setdefault(_root(parents, slot), f"{layer}: {complaint}" if layer else complaint)
    gathered: dict[tuple[tuple[str, str], ...], list[tuple[Slot, ...]]] = defaultdict(list)
    met = {slot.layer for slot in parents}
    left = {
        name: unmet
        for name, module in model.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        and not any(name == other or name.startswith(f"{other}.") for other in met)
    }
    for root, slots in units.items():
        slots.sort(key=lambda slot: (order[slot.layer], slot.axis != "out", slot.channel))
        owners = list(dict.fromkeys(s.layer for s in slots if s.axis == "out" and not _passes(model, s)))
        makers = [name for name in owners if not is_depthwise(model.get_submodule(name))]
        why = complaints.get(root)
        for slot in slots:
            found = reasons.get((slot.layer, slot.axis))
            why = why or (f"{slot.layer}: {found}" if found is not None else None)
        if why is None and not makers:
            why = "no layer of the model makes them"
        if why is None and not any(slot.axis == "in" for slot in slots):
            why = "no layer with weights reads them: they are the model's answer"
        if why is not None:
            for name in owners:
                left.setdefault(name, why)
            continue
        gathered[tuple(dict.fromkeys((slot.layer, slot.axis) for slot in slots))].append(tuple(slots))
    groups: list[Group] = []
    taken: set[str] = set()
    for axes, members in gathered.items():
        members.sort(key=lambda unit: unit[0].channel)
        makers = [s.layer for s in members[0] if s.axis == "out" and not _passes(model, s)]
        if len(members) <= PANEL:
            for name in makers:
                left.setdefault(name, f"{len(members)} channels of it, and kernels work on {PANEL} at a time")
            continue
        names = [name for name in makers if name not in taken]
        name = names[0] if names else f"{makers[0]}#{len(taken)}"  # a part of its channels: others are another group
        taken.add(name)
        groups.append(Group(name, members, axes))
    groups.sort(key=lambda group: order[group.axes[0][0]])
    for layer, axis in (pair for group in groups for pair in group.axes):
        if axis == "out":
            left.pop(layer, None)
    return Coupling(groups, dict(sorted(left.items(), key=lambda entry: order[entry[0]])))


def _passes(model: nn.Module, slot: Slot) -> bool:
    """Whether the layer hands channels on and makes none: norms and PReLU."""
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
    layer = model.get_submodule(slot.layer)
    return isinstance(layer, kinds) or is_frozen_norm(layer)
