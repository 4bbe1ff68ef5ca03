"""Residual blocks that can be dropped: what enters them comes out unless they add something to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pykernels.graph.export import mode

__all__ = ["residual_blocks"]

# Between the sum and the end of a block these may stand: what they give back of the input is the input, or its
# activation, which the block before has mostly applied already. Names of autograd's nodes.
_THROUGH = ("Add", "Relu", "Hardtanh", "Clamp", "Alias", "Clone")


def residual_blocks(model: nn.Module, args: tuple[Any, ...]) -> list[str]:
    """Names of modules that have one input tensor and one output of its shape, which is a sum that the input itself is
    part of; of nested ones the innermost. Each is called once a call of the model.

    Args:
        model: a copy: its parameters are left recording gradients.
    """
    found: dict[str, int] = {}
    entered: dict[str, tuple[Any, tuple[int, ...]]] = {}
    handles = []

    def enter(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any) -> Any:
            if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor) and inputs[0].grad_fn is not None:
                marked = inputs[0].view_as(inputs[0])  # a node of its own: the same tensor may enter several modules
                entered[name] = (marked.grad_fn, tuple(marked.shape))
                return (marked,)
            return None

        return hook

    def leave(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            begin, shape = entered.pop(name, (None, ()))
            alike = isinstance(output, torch.Tensor) and tuple(output.shape) == shape
            found[name] = found.get(name, 0) + (1 if alike and _adds(output.grad_fn, begin) else 2)

        return hook

    for name, module in model.named_modules():
        if name and any(True for _ in module.children()):
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
    model.requires_grad_(True)
    try:
        with mode(model, False), torch.enable_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    blocks = [name for name, _ in model.named_modules() if found.get(name) == 1]
    return [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]


def _adds(node: Any, begin: Any) -> bool:
    """Whether a sum is reached from `node`, and from that sum the input, through pointwise nodes alone."""
    pending, seen = [(node, False)], set()
    while pending:
        at, added = pending.pop()
        if at is None or (at, added) in seen:
            continue
        seen.add((at, added))
        if at is begin:
            if added:
                return True
            continue
        name = at.name()
        if name.startswith(_THROUGH):
            pending += [(before, added or name.startswith("Add")) for before, _ in at.next_functions]
    return False
