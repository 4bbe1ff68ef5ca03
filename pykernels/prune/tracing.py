"""What torch-pruning traces: a model, or where it stops the modules of one, each by itself."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pykernels.graph.export import mode
from pykernels.ops.errors import reason

__all__ = ["Piece", "is_frozen_norm", "traced"]

_RECURRENT = (nn.RNNBase, nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_TIMES_WIDEST = 4  # as many channels as that of the widest layer: more are no group
_FROZEN = ("weight", "bias", "running_mean", "running_var")


def is_frozen_norm(module: nn.Module) -> bool:
    """A batch norm all of whose tensors are buffers, as torchvision's FrozenBatchNorm2d."""
    own = dict(module.named_buffers(recurse=False))
    if not set(_FROZEN) <= set(own) or any(True for _ in module.parameters()):
        return False
    return own["weight"].dim() == 1 and len({own[name].shape for name in _FROZEN}) == 1


class Piece(NamedTuple):
    """A model, or a module of it, that torch-pruning can trace.

    Attributes:
        groups: torch-pruning's, each with all channels of the layer that it was asked of.
        returned: why channels stay that it returns.
    """

    groups: list[Any]
    returned: str


def traced(model: nn.Module, args: tuple[Any, ...], names: Mapping[nn.Module, str]) -> list[Piece]:
    """The whole model; where torch-pruning stops, one piece without groups that says why, and in the same way the
    modules that it calls, each by itself: what they hand on stays, what is within them can still go.

    Raises:
        ValueError: nothing of it can be traced.
    """
    try:
        return [Piece(_torch_pruning(model, args), "the model returns them")]
    except Exception as error:  # of torch-pruning
        stopped = f"torch-pruning cannot trace {type(model).__name__}: {reason(error)}"
    pieces = [Piece([], stopped)]
    pending = [model]
    while pending:
        whole = pending.pop()
        for child, inputs in _called_once(whole, model, args):
            try:
                groups = _torch_pruning(child, inputs)
                pieces.append(Piece(groups, f"{names[child]} returns them, and {stopped}"))
            except Exception:
                pending.append(child)
    if len(pieces) == 1:
        raise ValueError(f"model: {stopped}")
    return pieces


def _called_once(whole: nn.Module, model: nn.Module, args: tuple[Any, ...]) -> list[tuple[nn.Module, tuple[Any, ...]]]:
    """Children of `whole` that are no layers themselves and are called once a call of `model`, with their inputs."""
    found: dict[nn.Module, list[tuple[Any, ...]]] = defaultdict(list)

    def remember(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[module].append(inputs if not named else ())

    handles = [
        child.register_forward_pre_hook(remember, with_kwargs=True)
        for child in whole.children()
        if any(True for _ in child.children())
    ]
    try:
        with mode(model, False), torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return [(child, calls[0]) for child, calls in found.items() if len(calls) == 1 and calls[0]]


def _torch_pruning(model: nn.Module, args: tuple[Any, ...]) -> list[Any]:
    """torch-pruning's groups, each with all channels of the layer that it was asked of."""
    import torch_pruning

    model.requires_grad_(True)
    leaves = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    with torch.enable_grad(), warnings.catch_warnings(), _recurrent_as_one(model), _bounded(model):
        warnings.simplefilter("ignore")  # about parameters and operations that it does not know; they are checked here
        graph = torch_pruning.DependencyGraph().build_dependency(
            model, leaves, customized_pruners=_more_kinds(model), verbose=False
        )
        return list(graph.get_all_groups())


@contextmanager
def _bounded(model: nn.Module) -> Iterator[None]:
    """No group has far more channels than the widest layer: at the reshapes of attention in windows torch-pruning
    multiplies them again and again, for hours, and what it says then is wrong."""
    from torch_pruning.dependency.index_mapping import _FlattenIndexMapping as Flatten

    most = _TIMES_WIDEST * max((max(p.shape[:2]) for p in model.parameters() if p.dim()), default=1)
    multiply = Flatten.__call__

    def bounded(self: Any, channels: Sequence[Any]) -> Any:
        if not self.reverse and len(channels) * self._stride > most:
            raise OverflowError("channels multiply at its reshapes")
        return multiply(self, channels)

    Flatten.__call__ = bounded
    try:
        yield
    finally:
        Flatten.__call__ = multiply


def _more_kinds(model: nn.Module) -> dict[type[nn.Module], Any]:
    """Modules that torch-pruning does not know, by their kinds, with what tells it their channels."""
    from torch_pruning.pruner import function

    class FrozenNorm(function.BatchnormPruner):
        def get_out_channels(self, layer: Any) -> int:
            return len(layer.weight)

        def get_in_channels(self, layer: Any) -> int:
            return len(layer.weight)

    frozen = {type(module) for module in model.modules() if is_frozen_norm(module)}
    return dict.fromkeys(_RECURRENT, function.LSTMPruner()) | dict.fromkeys(frozen, FrozenNorm())


class _AsOne(torch.autograd.Function):
    """A function of tensors as one node of autograd, which nothing goes back through."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        return function(*tensors)


@contextmanager
def _recurrent_as_one(model: nn.Module) -> Iterator[None]:
    """Calls of recurrent layers are one node each: torch-pruning loses its way in what they are made of."""
    layers = [module for module in model.modules() if isinstance(module, _RECURRENT)]

    def replaced(layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        def as_one(*args: Any, **kwargs: Any) -> Any:
            given, spec = pytree.tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(given) if isinstance(leaf, torch.Tensor)]
            specs = []

            def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                inputs: list[Any] = list(given)
                for place, tensor in zip(places, tensors, strict=False):  # behind them are parameters
                    inputs[place] = tensor
                again, named = pytree.tree_unflatten(inputs, spec)
                found, made = pytree.tree_flatten(forward(*again, **named))
                specs.append(made)
                return tuple(found)

            found = _AsOne.apply(call, *(given[place] for place in places), *layer.parameters())
            return pytree.tree_unflatten(list(found), specs[0])

        return as_one

    for layer in layers:
        layer.forward = replaced(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
