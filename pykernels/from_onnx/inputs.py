"""What a graph of an ONNX file is called with: as the file declares it, and whether its operators take that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pykernels.from_onnx.table import Refused, refusals
from pykernels.ops.errors import reason

__all__ = ["Declared", "Source", "check", "example_of", "source_of"]


class Declared(NamedTuple):
    """An input as the file declares it; a size that is free is its name, or "?"."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


class Source(NamedTuple):
    """Where a graph comes from."""

    file: str | os.PathLike[str]
    inputs: list[Declared]

    @property
    def free_batch(self) -> bool:
        """Whether the file leaves the batch size, dimension 0 of the first input, free."""
        return any(isinstance(size, str) for one in self.inputs[:1] for size in one.shape[:1])

    @property
    def apart(self) -> list[Declared]:
        """Inputs whose dimension 0 is a number, not the batch. Free sizes of other names may mean the same."""
        return [one for one in self.inputs if one.shape and isinstance(one.shape[0], int)]


def source_of(model: nn.Module) -> Source | None:
    """The file that `load` made this graph of; None of any other model."""
    return model.meta.get("onnx") if isinstance(model, fx.GraphModule) else None


def example_of(source: Source, shapes: Sequence[Sequence[int]] | None = None) -> tuple[torch.Tensor, ...]:
    """Random inputs of `shapes`, or of the sizes that the file declares, two or three where the batch size is free.

    Raises:
        ValueError: there are not as many shapes as inputs, or none and the file leaves another size free, too.
    """
    found = "; ".join(map(str, source.inputs))
    if shapes is None:
        if any(isinstance(size, str) for declared in source.inputs for size in declared.shape[1:]):
            raise ValueError(f"{source.file} leaves sizes free, so an example is needed: {found}")
        free = 3 if any(declared.shape[0] == 2 for declared in source.apart) else 2
        shapes = [[free if isinstance(size, str) else size for size in declared.shape] for declared in source.inputs]
    if len(shapes) != len(source.inputs):
        raise ValueError(f"{len(shapes)} shapes for {source.file}, which takes {found}")
    return tuple(_values(list(shape), one.dtype) for shape, one in zip(shapes, source.inputs, strict=True))


def _values(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    # Numbers that are no floats may be places in something: 0 is one.
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def check(model: nn.Module, source: Source, args: tuple[Any, ...], kwargs: dict[str, Any], batch: bool) -> None:
    """Whether the file's operators take these inputs; nothing is computed.

    Args:
        batch: the inputs will be told by their sizes to share a batch, which then must be no size of other inputs.

    Raises:
        ValueError: an input is none of the file's, of another dtype, or of another size where the file has one; or an
            operator is used in a way that is not understood, or cannot take what it gets.
    """
    assert isinstance(model, fx.GraphModule)
    names = [node.target for node in model.graph.nodes if node.op == "placeholder"]
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names) or set(given) != set(names) or len(given) != len(args) + len(kwargs):
        raise ValueError(f"example_inputs: {source.file} takes {'; '.join(map(str, source.inputs))}")
    for declared, name in zip(source.inputs, names, strict=True):
        x = given[name]
        if not isinstance(x, torch.Tensor) or x.dtype != declared.dtype or not _fits(declared, list(x.shape)):
            what = f"{x.dtype} of sizes {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"example_inputs: {source.file} declares {declared}, and it is {what}")
    size = given[names[0]].shape[0] if source.free_batch else None
    for declared in source.apart if batch and size is not None else []:
        if given[names[source.inputs.index(declared)]].shape[0] == size:
            raise ValueError(
                f"example_inputs: {source.file}: the batch of {size} is the size of {declared}, too, which is no "
                "batch in the file; take another, or give dynamic_shapes"
            )
    refused = _tried(model, given)
    if refused:
        raise ValueError(f"{source.file}: not understood: {refusals(refused)}")


def _fits(declared: Declared, shape: list[int]) -> bool:
    return len(shape) == len(declared.shape) and all(
        isinstance(wanted, str) or wanted == size for wanted, size in zip(declared.shape, shape, strict=True)
    )


def _tried(model: fx.GraphModule, given: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Run the graph on fake tensors: of each node that fails operator, name, reason. What reads it is passed over."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values: dict[fx.Node, Any] = {}
    refused = []
    with mode, torch.no_grad():
        for node in model.graph.nodes:
            if node.op == "placeholder":
                values[node] = mode.from_tensor(given[node.target])
            elif node.op == "get_attr":
                values[node] = mode.from_tensor(getattr(model, node.target))
            elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    values[node] = node.target(*args, **kwargs)
                except Exception as error:  # ours, and torch's of anything
                    why = str(error) if isinstance(error, Refused) else reason(error)
                    refused.append((*node.meta.get("onnx", (node.name, node.name)), why))
    return refused
