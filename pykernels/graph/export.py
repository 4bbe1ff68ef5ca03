"""From a model to a `torch.export` program with a dynamic batch size, for quantization and surgery alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pykernels.ops.errors import reason

__all__ = ["Exported", "NotExportable", "example_for_export", "export", "mode", "shapes_like"]


class NotExportable(RuntimeError):
    """torch cannot capture the model as one functional graph; ``pykernels.swap`` needs no graph."""


@dataclass(frozen=True)
class Exported:
    """An exported program, the inputs it was exported with, whether its batch size may change, and remarks."""

    program: torch.export.ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic: bool
    notes: list[str] = field(default_factory=list)


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    training: bool = False,
) -> Exported:
    """Capture `model` in evaluation (or training), whatever its mode is; strictly where the plain way fails.

    Args:
        model: any module; it is not changed.
        args, kwargs: inputs of one call.
        dynamic_batch: leave the batch size free. Where the model fixes it, so does the program, and a note says why.
        dynamic_shapes: as for ``torch.export``, in place of the batch size alone; then there is no second choice.
        training: capture the model in training mode.

    Raises:
        NotExportable: every way of capturing failed; the message names torch's reason.
    """
    kwargs = dict(kwargs or {})
    notes: list[str] = []
    attempts: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = [(args, kwargs, dynamic_shapes)]
    if dynamic_shapes is None and dynamic_batch:
        (wide, wide_kwargs), shapes = example_for_export(args, kwargs)
        if shapes is None:
            notes.append("no tensor input with a batch dimension: shapes are fixed")
        else:
            attempts.insert(0, (wide, wide_kwargs, shapes))
    failure: Exception | None = None
    with mode(model, training), torch.set_grad_enabled(training and torch.is_grad_enabled()):
        for example, named, shapes in attempts:
            if failure is not None:
                notes.append(f"the batch size is fixed: export with a dynamic one failed ({reason(failure)})")
                failure = None
            for strict in (False, True):
                try:
                    program = torch.export.export(model, example, named or None, dynamic_shapes=shapes, strict=strict)
                except Exception as error:  # the model's own forward runs in there, and may raise anything
                    failure = failure or error  # of the plain way: what it says is about the model
                else:
                    return Exported(program, example, named, shapes is not None, notes)
    assert failure is not None
    raise NotExportable(
        f"torch.export cannot capture {type(model).__name__} as one graph: {reason(failure)}\n{_suggested(failure)}"
        "pykernels.swap(model) works module by module and needs no graph."
    ) from failure


def _suggested(failure: Exception) -> str:
    """What torch proposes in place of the given dynamic shapes, as lines of a message."""
    _, heading, fixes = str(failure).partition("Suggested fixes:")
    return f"{heading}{fixes.rstrip()}\n" if heading else ""


def example_for_export(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Any | None]:
    """Inputs and dynamic shapes that let export see the batch as a size of its own.

    Export specializes sizes 0 and 1, so a batch of one is doubled. The batch is dimension 0 of the first tensor input;
    every tensor input of the same first size shares it. Shapes are None when no input has a batch dimension.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    if not sizes:
        return (args, kwargs), None

    def double(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == 1 else leaf

    if sizes[0] == 1:
        args, kwargs = pytree.tree_map(double, (args, kwargs))
    return (args, kwargs), _batch_shapes(args, kwargs)


def _batch_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
    """``dynamic_shapes`` for torch.export: dimension 0 of every tensor input that shares the first one's batch size."""
    leaves = pytree.tree_leaves((args, kwargs))
    batched = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    if not batched:
        return None
    batched = [leaf for leaf in batched if leaf.shape[0] == batched[0].shape[0]]
    batch = torch.export.Dim("batch")
    shapes = torch.export.ShapesCollection()  # by tensor: a tuple would have no place for names and *args
    for leaf in batched:
        shapes[leaf] = {0: batch}
    return shapes


def shapes_like(module: fx.GraphModule) -> Any:
    """``dynamic_shapes`` that leave free, in each input of a plain graph, the sizes that are symbols there."""
    shapes: list[Any] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            sizes = value.shape if isinstance(value, torch.Tensor) else ()
            free = {d: torch.export.Dim.AUTO for d, size in enumerate(sizes) if not isinstance(size, int)}
            shapes.append(free or None)
    return tuple(shapes) if any(shapes) else None


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module of `model` in training or in evaluation, each back in its own mode afterwards.

    The attribute is set, ``train()`` is not called: exported graph modules refuse it.
    """
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = training
    try:
        yield
    finally:
        for module, was in before:
            module.training = was
