"""Where a network is, and lowered networks that move: packed weights are laid out differently on CUDA devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pykernels.cuda import registry
from pykernels.ops.packed import repack

__all__ = ["device_of", "follow", "graph_device", "to_device"]


def device_of(model: nn.Module, inputs: Any) -> torch.device:
    """The device of the model's parameters (without any, of its buffers, else of `inputs`), where it will run.

    Raises:
        ValueError: there are several, or our ops do not run on it.
    """
    for tensors in (model.parameters(), model.buffers(), pytree.tree_leaves(inputs)):
        devices = {t.device for t in tensors if isinstance(t, torch.Tensor)}
        if devices:
            break
    else:
        return torch.device("cpu")
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model: it is on several devices, {found}; one network is optimized for one device")
    (device,) = devices
    complaint = registry.complaint(device)
    if complaint is not None:
        raise ValueError(f"model: it is on {device}, and {complaint}")
    return device


def to_device(tree: Any, device: torch.device) -> Any:
    """`tree`, every tensor in it on `device`."""
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def graph_device(module: fx.GraphModule) -> torch.device:
    """Where the constants of a graph are; of a graph without any, its example inputs."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")


def follow(program: fx.GraphModule) -> torch.device:
    """Mend a lowered graph whose buffers were moved: weights packed for another device are packed again for theirs,
    and calls that name a device name this one. Returns it.

    Only sizes are looked at, unless weights must be packed again.
    """
    device = graph_device(program)
    for name in sorted(_packed(program.graph.nodes)):
        packed = program.get_buffer(name)
        if (packed.numel() % 64 == 16) != (packed.device.type == "cuda"):  # see pykernels/ops/packed.py
            program._buffers[name] = repack(packed, packed.device)
    changed = False
    for node in program.graph.nodes:
        if any(
            isinstance(leaf, torch.device) and leaf != device for leaf in pytree.tree_leaves((node.args, node.kwargs))
        ):
            args, kwargs = pytree.tree_map(
                lambda leaf: device if isinstance(leaf, torch.device) else leaf, (node.args, dict(node.kwargs))
            )
            node.args, node.kwargs, changed = args, kwargs, True
    if changed:
        program.recompile()
    return device


def _packed(nodes: Iterable[fx.Node]) -> set[str]:
    """Buffers that our ops read as packed weights."""
    found = set()
    for node in nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "pykernels":
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.name == "packed" and isinstance(value, fx.Node) and value.op == "get_attr":
                    found.add(str(value.target))
    return found
