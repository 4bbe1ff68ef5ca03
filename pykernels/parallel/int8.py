"""Int8 linear layers of `pykernels.swap`, split by columns and by rows for inference.

By columns each rank has some outputs: their weights, scales and the scale of the input are those of the whole layer, so
they have its bits. By rows each rank multiplies some inputs exactly, in 8 bits with scales of their own, and the sums,
in fp32, go through the codec; the bias is added once. All ranks get the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from pykernels.nn.linear import Int8Linear

if TYPE_CHECKING:
    from pykernels.parallel.tensor import Ranks

__all__ = ["ColumnInt8Linear", "RowInt8Linear", "plain", "split_columns", "split_rows"]


class _Split(Int8Linear):
    """A part of a layer: its parameters are plain tensors, in inference alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.chain.ready(x):
            raise RuntimeError(
                "pykernels: an int8 layer that is split runs in evaluation alone, on inputs of its weights' dtype"
            )
        return super().forward(x)


class ColumnInt8Linear(_Split):
    """Some of a layer's outputs, of all of its inputs."""


class RowInt8Linear(_Split):
    """All of a layer's outputs, of some of its inputs, summed over the ranks."""

    rank_group: Ranks
    whole_bias: torch.Tensor | None

    def run(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """The layer."""
        y = self.rank_group.all_reduce(super().run(x, packed))
        return y if self.whole_bias is None else y + self.whole_bias


def _take(layer: Any, mesh: DeviceMesh, dim: int, kind: type[_Split]) -> slice:
    """Make a layer this rank's part along a dimension of its weight; which one."""
    if layer.training:
        raise ValueError("pykernels: an int8 layer is split for inference: call eval() first")
    size, world = layer.weight.shape[dim], mesh.size()
    if size % world:
        what = "inputs" if dim else "outputs"
        raise ValueError(f"pykernels: {size} {what} of an int8 layer are not as many for each of {world} ranks")
    mine = slice(mesh.get_local_rank() * (size // world), (mesh.get_local_rank() + 1) * (size // world))
    layer.__class__ = kind
    weight = layer.weight.detach()
    layer.weight = nn.Parameter((weight[:, mine] if dim else weight[mine]).clone(), requires_grad=False)
    return mine


def plain(given: bool, made: bool, local: bool) -> None:
    """Refuse what an int8 layer cannot do, by the name of the argument of its style."""
    for what, fits in (("input_layouts", given), ("output_layouts", made), ("use_local_output", local)):
        if not fits:
            raise ValueError(f"pykernels: {what} of an int8 layer must be the default of its style")


def split_columns(layer: Int8Linear, mesh: DeviceMesh) -> Int8Linear:
    """The layer with this rank's outputs; its activation stays.

    Raises:
        ValueError: the layer is in training, or the ranks do not divide its outputs.
    """
    mine = _take(layer, mesh, 0, ColumnInt8Linear)
    layer.out_features = layer.weight.shape[0]
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[mine].clone(), requires_grad=False)
    return layer


def split_rows(layer: Int8Linear, mesh: DeviceMesh, ranks: Ranks) -> Int8Linear:
    """The layer with this rank's inputs, of which the sums are exchanged by `ranks`.

    Raises:
        ValueError: as `split_columns`, of its inputs; an activation belongs to the layer, which would come before the
            sum.
    """
    if layer.activation_name != "none":
        raise ValueError(f"pykernels: {layer.activation_name} belongs to an int8 layer that is split by rows")
    _take(layer, mesh, 1, RowInt8Linear)
    split: Any = layer
    split.in_features = layer.weight.shape[1]
    split.rank_group = ranks
    bias = None if layer.bias is None else layer.bias.detach().clone()
    split.bias = None
    split.register_buffer("whole_bias", bias)
    return layer
