"""A recipe applied to a copy of a model, and the proof that nothing else changed.

`cut` slices weights. `masked` leaves every layer as it is and sets to zero the weights by which removed channels are
read: what a layer makes of the others is then exactly what it makes when they are not there. `check` holds the two
against each other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from pykernels.graph.export import mode
from pykernels.ops.errors import reason
from pykernels.optimized import Optimized

from .coupling import is_depthwise
from .recipe import Recipe

__all__ = ["TOLERANCE", "Mismatch", "check", "cut", "dimension", "masked", "refuse"]

TOLERANCE = 1e-5
"""Of the norm of each output, how far the pruned model's may lie from the masked one's."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Mismatch(ValueError):
    """The pruned model does not run, or answers otherwise than the masked one.

    Attributes:
        returned: whether its outputs have other shapes: what was removed is part of the answer.
        unanswered: whether the masked model has no answer to compare with.
        training: whether it does not run, or gives other shapes, in training alone.
    """

    def __init__(self, message: str, returned: bool = False, unanswered: bool = False, training: bool = False) -> None:
        super().__init__(message)
        self.returned, self.unanswered, self.training = returned, unanswered, training


def refuse(model: nn.Module) -> None:
    """What cannot be copied and cut without changing what it means.

    Raises:
        ValueError: it has hooks, parametrizations, or 16-bit weights, or is compiled or lowered already; the message
            names the module.
    """
    for name, module in model.named_modules():
        where = f"model: its module {name!r}" if name else "model: it"
        if hasattr(module, "_orig_mod"):
            raise ValueError(f"{where} is compiled (torch.compile): give the module that it was made of, `_orig_mod`")
        if isinstance(module, (torch.jit.ScriptModule, Optimized)):
            raise ValueError(f"{where} is a {type(module).__name__}: give the nn.Module that it was made of")
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{where} has parametrizations, whose weights are computed: remove them first "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            )
        hooks = [hooks for hooks in _HOOKS if getattr(module, hooks, None)]
        if hooks:
            raise ValueError(
                f"{where} has hooks ({hooks[0]}), which a pruned copy could not keep right: remove them first"
            )
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{where} has weights of {parameter.dtype}: prune the fp32 model and cast the result")
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())} - {"cpu"}
    if devices:
        raise ValueError(
            f"model: it is on {', '.join(sorted(devices))}; latencies are measured on the CPU: move it there"
        )


def cut(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of `model` without the channels and blocks that the recipe removes; gradients are not copied."""
    result = copy.deepcopy(model)
    for parameter in result.parameters():
        parameter.grad = None
    with torch.no_grad():
        for name, axes in recipe["layers"].items():
            for axis, channels in axes.items():
                _slice(result.get_submodule(name), axis, channels["kept"])
    return _without(result, recipe["blocks"])


def masked(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of `model` in which nobody reads the removed channels; dropped blocks hand on their input."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, axes in recipe["layers"].items():
            channels = axes.get("in")
            module: Any = result.get_submodule(name)
            if channels is not None:
                kept = set(channels["kept"])
                gone = torch.tensor([i for i in range(channels["of"]) if i not in kept], dtype=torch.long)
                module.weight.index_fill_(dimension(module, "in"), gone, 0)
    return _without(result, recipe["blocks"])


def check(model: nn.Module, pruned: nn.Module, recipe: Recipe, args: tuple[Any, ...]) -> None:
    """Both run on the example, and on noise of its shapes, and answer alike to `TOLERANCE`; and where the model runs in
    training, so does the pruned one: what only training calls was not traced.

    Raises:
        Mismatch: they do not.
    """
    other = masked(model, recipe)
    generator = torch.Generator().manual_seed(0)
    for inputs in (args, pytree.tree_map(lambda leaf: _noise(leaf, generator), args)):
        try:
            _compare(other, pruned, inputs)
        except Mismatch as mismatch:
            if mismatch.unanswered and inputs is not args:
                continue  # the model cannot take noise
            if mismatch.returned or mismatch.unanswered:
                raise
            try:  # was it rounding?
                double = pytree.tree_map(lambda leaf: leaf.double() if _real(leaf) else leaf, inputs)
                _compare(copy.deepcopy(other).double(), copy.deepcopy(pruned).double(), double)
            except Mismatch:
                raise mismatch from None
    _check_training(other, pruned, args)


def _check_training(expected: nn.Module, pruned: nn.Module, args: tuple[Any, ...]) -> None:
    def double(leaf: Any) -> Any:  # norms behind a global pool train on no batch of one
        return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == 1 else leaf

    with torch.random.fork_rng(devices=[]):
        for inputs in (pytree.tree_map(double, args), args):
            try:
                wanted = _shapes(expected, inputs)
            except Exception:  # it does not train on these inputs
                continue
            try:
                found = _shapes(pruned, inputs)
            except Exception as error:
                raise Mismatch(f"in training, the model stops with {reason(error)}", training=True) from error
            if wanted != found:
                raise Mismatch("in training, the model returns the channels", training=True)
            return


def _shapes(model: nn.Module, inputs: tuple[Any, ...]) -> list[Any]:
    """Of what the model returns in training."""
    with mode(model, True), torch.no_grad(), _state_kept(model):
        return [x.shape for x in pytree.tree_leaves(model(*inputs)) if isinstance(x, torch.Tensor)]


def _compare(expected: nn.Module, pruned: nn.Module, inputs: tuple[Any, ...]) -> None:
    with mode(expected, False), mode(pruned, False), torch.no_grad(), _state_kept(expected), _state_kept(pruned):
        try:
            wanted = pytree.tree_leaves(expected(*inputs))
        except Exception as error:
            raise Mismatch(f"the model itself does not run: {reason(error)}", unanswered=True) from error
        try:
            found = pytree.tree_leaves(pruned(*inputs))
        except Exception as error:  # the model's own forward runs in there
            raise Mismatch(f"without some channels the model's forward stops with {reason(error)}") from error
    if len(wanted) != len(found):
        raise Mismatch("without some channels the model returns another number of tensors", returned=True)
    for a, b in zip(wanted, found, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            continue
        if a.shape != b.shape:
            raise Mismatch(f"the model returns the channels: {list(a.shape)} became {list(b.shape)}", returned=True)
        if not a.is_floating_point():
            continue
        if not a.isfinite().all():
            raise Mismatch("the model's answer is not finite", unanswered=True)
        distance = float((a - b).double().norm() / a.double().norm().clamp_min(1e-30))
        if not distance <= TOLERANCE:
            raise Mismatch(f"pruned and masked model differ by {distance:.1e} of the answer's norm")


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Buffers that a call changes are put back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            if buffer.shape == before[name].shape:
                buffer.copy_(before[name])


def _real(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _noise(leaf: Any, generator: torch.Generator) -> Any:
    return torch.randn(leaf.shape, generator=generator).to(leaf) if _real(leaf) else leaf


def _without(model: nn.Module, blocks: list[str]) -> nn.Module:
    for block in blocks:
        parent, _, name = block.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    return model


def dimension(module: nn.Module, axis: str) -> int:
    """Of the weight, the dimension along which an axis lies."""
    transposed = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
    return int((axis == "in") != transposed)


def _slice(module: Any, axis: str, kept: list[int]) -> None:
    """Keep these channels of a layer, in place."""
    index, count = torch.tensor(kept, dtype=torch.long), len(kept)
    if is_depthwise(module):
        module.in_channels = module.out_channels = module.groups = count
        _select(module, "weight", 0, index)
        _select(module, "bias", 0, index)
        return
    conv, linear = isinstance(module, nn.modules.conv._ConvNd), isinstance(module, nn.Linear)
    _select(module, "weight", dimension(module, axis) if conv or linear else 0, index)
    if axis == "out":
        for name in ("bias", "running_mean", "running_var"):
            _select(module, name, 0, index)
    kind = "channels" if conv else "features"
    name = f"{axis}_{kind}" if conv or linear else "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
    setattr(module, name, count)


def _select(module: nn.Module, name: str, dimension: int, index: torch.Tensor) -> None:
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    chosen = tensor.detach().index_select(dimension, index)
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(chosen, tensor.requires_grad))
    else:
        module._buffers[name] = chosen
