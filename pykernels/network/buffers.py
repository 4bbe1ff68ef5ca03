"""The constants of a lowered network in one piece of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from pykernels.graph.alias import writes

__all__ = ["ALIGNMENT", "consolidate", "separate", "whole"]

ALIGNMENT = 64  # bytes: a cache line, and a vector of the widest isa


def whole(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a storage as a 1-D uint8 tensor that shares it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def consolidate(program: fx.GraphModule) -> torch.Tensor:
    """Move the buffers of a program that is on the CPU into one storage, each at a multiple of 64 bytes.

    Buffers keep their dtypes, shapes and strides, and what shared memory shares it afterwards. State (what a call of
    the network writes into) stays in memory of its own: compilers take aliases of what is written for written. Where
    they all lie in one storage already, nothing is moved.

    Returns:
        All bytes of that storage, a 1-D uint8 tensor.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # of each tensor, by id
    tensors: dict[int, torch.Tensor] = {}
    state = _state(program)
    for module in program.modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and tensor.device.type == "cpu" and _storage(tensor) not in state:
                places.setdefault(id(tensor), []).append((module, name))
                tensors[id(tensor)] = tensor
    storages = {_storage(tensor): tensor for tensor in tensors.values()}
    if len(storages) == 1 and all(_begin(tensor) % ALIGNMENT == 0 for tensor in tensors.values()):
        return whole(next(iter(storages.values())).untyped_storage())
    pieces, size = _pieces(tensors.values()), 0
    starts = []
    for _, begin, end in pieces:
        starts.append(size)
        size += -(-(end - begin) // ALIGNMENT) * ALIGNMENT
    result = torch.zeros(size, dtype=torch.uint8)
    for (members, begin, end), start in zip(pieces, starts, strict=True):
        result[start : start + end - begin] = whole(members[0].untyped_storage())[begin:end]
        for tensor in members:
            offset = (start + _begin(tensor) - begin) // tensor.element_size()
            moved = torch.empty(0, dtype=tensor.dtype).set_(
                result.untyped_storage(), offset, tensor.shape, tensor.stride()
            )
            for module, name in places[id(tensor)]:
                module._buffers[name] = moved
    return result


def separate(program: fx.GraphModule) -> fx.GraphModule:
    """A copy of a program whose buffers have storages of their own: undoes `consolidate`.

    Serializers that write the storage of each tensor (pickle, AOTInductor) would else write all of them for each.
    """
    result = fx.GraphModule(program, program.graph)
    copies = {id(tensor): tensor.clone() for tensor in result._buffers.values() if tensor is not None}
    result._buffers.update({name: copies[id(tensor)] for name, tensor in result._buffers.items() if tensor is not None})
    return result


def _state(program: fx.GraphModule) -> set[int]:
    """The storages that calls write into."""
    graphs = [module for module in program.modules() if isinstance(module, fx.GraphModule)]
    written = {
        (graph, str(value.target))
        for graph in graphs
        for node in graph.graph.nodes
        for value in writes(node)
        if value.op == "get_attr"
    }
    return {_storage(graph.get_buffer(name)) for graph, name in written}


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _begin(tensor: torch.Tensor) -> int:
    """Where a tensor begins in its storage, in bytes."""
    return tensor.storage_offset() * tensor.element_size()


def _end(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return _begin(tensor)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _begin(tensor) + (last + 1) * tensor.element_size()


def _pieces(tensors: Any) -> list[tuple[list[torch.Tensor], int, int]]:
    """Tensors that overlap one another, with the bytes of their storage from the first to the last that they hold."""
    pieces: list[tuple[list[torch.Tensor], int, int]] = []
    order = {key: number for number, key in enumerate(dict.fromkeys(map(_storage, tensors)))}
    for tensor in sorted(tensors, key=lambda t: (order[_storage(t)], _begin(t))):
        members, begin, end = pieces[-1] if pieces else ([], 0, 0)
        if members and _storage(members[0]) == _storage(tensor) and _begin(tensor) < end:
            pieces[-1] = ([*members, tensor], begin, max(end, _end(tensor)))
        else:
            # Where tensors of several dtypes overlap, each keeps its alignment.
            pieces.append(([tensor], _begin(tensor), _end(tensor)))
    return [
        (members, begin // (step := max(t.element_size() for t in members)) * step, end)
        for members, begin, end in pieces
    ]
