"""Tensor parallelism of torch with compressed collectives: linear layers split by columns and by rows.

Parameters are sharded as DTensors by torch's own styles, so checkpoints are theirs. The layers then compute on local
tensors, and what they exchange goes through :mod:`pykernels.comm.functional`. With x replicated, or split along a
dimension d (sequences)::

    columns   x -> (its gradient is summed over the ranks)    or gathered along d    -> x W[rank].T + b[rank]
    rows      x[rank] W[:, rank].T -> summed over the ranks   or summed, scattered along d    -> + b

Shoeybi et al., "Megatron-LM"; Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from pykernels.comm.functional import LEAST, all_gather, all_reduce, reduce_scatter
from pykernels.nn.linear import Int8Linear
from pykernels.parallel.int8 import split_columns, split_rows

STYLES = ("colwise", "rowwise")


@dataclass(frozen=True)
class Ranks:
    """How the ranks of a layer exchange: codec, name of the process group, and what the collectives are told."""

    codec: str
    group: str
    block: int
    least: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(x, self.codec, self.group, block=self.block, least=self.least)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return all_gather(x, self.codec, self.group, dim=dim, block=self.block, least=self.least)

    def reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return reduce_scatter(x, self.codec, self.group, dim=dim, block=self.block, least=self.least)


class Copy(torch.autograd.Function):
    """What is the same on all ranks goes into something that differs: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codec: str, group: str, block: int, least: int) -> torch.Tensor:
        ctx.rest = codec, group, block, least
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return Ranks(*ctx.rest).all_reduce(gradients[0]), None, None, None, None


class Sum(torch.autograd.Function):
    """The sum of what the ranks have is the same on all of them, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codec: str, group: str, block: int, least: int) -> torch.Tensor:
        return Ranks(codec, group, block, least).all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0], None, None, None, None


class _Split(nn.Linear):
    """A linear layer of which this rank has a part: its parameters are DTensors."""

    ranks: Ranks
    outside: int | None  # the dimension that what comes in (columns) or goes out (rows) is split along; None: whole

    def _local(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight: Any = self.weight
        bias: Any = self.bias
        return weight.to_local(), None if bias is None else bias.to_local()

    def _rest(self) -> tuple[str, str, int, int]:
        return self.ranks.codec, self.ranks.group, self.ranks.block, self.ranks.least


class ColumnLinear(_Split):
    """Some of a layer's outputs, of all of its inputs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self._local()
        if self.outside is None:
            whole: torch.Tensor = Copy.apply(input, *self._rest())
        else:
            whole = self.ranks.all_gather(input, self.outside)
        return nn.functional.linear(whole, weight, bias)


class RowLinear(_Split):
    """All of a layer's outputs, of some of its inputs, summed over the ranks."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self._local()
        part = nn.functional.linear(input, weight)
        if self.outside is None:
            whole: torch.Tensor = Sum.apply(part, *self._rest())
            return whole if bias is None else whole + bias
        whole = self.ranks.reduce_scatter(part, self.outside)
        # each rank adds it to other tokens, so that its gradient is the sum of theirs
        return whole if bias is None else whole + Copy.apply(bias, *self._rest())


def _outside(layout: Placement, what: str) -> int | None:
    if isinstance(layout, Replicate):
        return None
    if isinstance(layout, Shard) and layout.dim >= 0:
        return layout.dim
    raise ValueError(f"pykernels: {what} must be Replicate() or Shard(d) of a dimension from the front, not {layout}")


def _become(
    kind: type[_Split], module: nn.Module, mesh: DeviceMesh, outside: int | None, codec: str, block: int, least: int
) -> None:
    if type(module) is not nn.Linear:
        raise ValueError(f"pykernels: only nn.Linear is split with compressed collectives, not {type(module).__name__}")
    group = _group(mesh)
    module.__class__ = kind
    split: Any = module
    split.outside = outside
    split.ranks = Ranks(codec, group, block, least)


def _group(mesh: DeviceMesh) -> str:
    if mesh.ndim != 1:
        raise ValueError(f"pykernels: mesh must have one dimension, not {mesh.ndim}: give mesh['name']")
    return mesh.get_group().group_name


def _whole(outside: int | None, what: str) -> None:
    if outside is not None:
        raise ValueError(f"pykernels: {what} of an int8 layer must be Replicate(), not Shard({outside})")


class CompressedColwise(ColwiseParallel):
    """``ColwiseParallel`` of an ``nn.Linear`` on local tensors, whose collectives are compressed; or, for inference, of
    an `pykernels.nn.Int8Linear`.

    Args:
        input_layouts: Replicate() (default), or Shard(d), of which the whole is gathered.
        codec, block, least: as of :func:`pykernels.comm.all_reduce`.

    Raises:
        ValueError: another layout; the output is split along its last dimension.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        codec: str = "int8",
        block: int = 256,
        least: int = LEAST,
    ) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts)
        if self.output_layouts[0] != Shard(-1):
            raise ValueError(f"pykernels: output_layouts must be Shard(-1) by columns, not {self.output_layouts[0]}")
        self._outside = _outside(self.input_layouts[0], "input_layouts")
        self._rest = codec, block, least

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, Int8Linear):
            _whole(self._outside, "input_layouts")
            return split_columns(module, device_mesh)
        _become(ColumnLinear, module, device_mesh, self._outside, *self._rest)
        return distribute_module(module, device_mesh, self._partition_linear_fn)


class CompressedRowwise(RowwiseParallel):
    """``RowwiseParallel`` of an ``nn.Linear`` on local tensors, whose collectives are compressed; or, for inference, of
    an `pykernels.nn.Int8Linear`.

    Args:
        output_layouts: Replicate() (default), or Shard(d): summed and scattered.
        codec, block, least: as of :func:`pykernels.comm.all_reduce`.

    Raises:
        ValueError: another layout; the input is split along its last dimension.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        codec: str = "int8",
        block: int = 256,
        least: int = LEAST,
    ) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts)
        if self.input_layouts[0] != Shard(-1):
            raise ValueError(f"pykernels: input_layouts must be Shard(-1) by rows, not {self.input_layouts[0]}")
        self._outside = _outside(self.output_layouts[0], "output_layouts")
        self._rest = codec, block, least

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, Int8Linear):
            _whole(self._outside, "output_layouts")
            codec, block, least = self._rest
            return split_rows(module, device_mesh, Ranks(codec, _group(device_mesh), block, least))
        _become(RowLinear, module, device_mesh, self._outside, *self._rest)
        return distribute_module(module, device_mesh, self._partition_linear_fn)


def tensor_parallel(
    plan: Mapping[str, str | ParallelStyle], codec: str = "int8", *, block: int = 256, least: int = LEAST
) -> dict[str, ParallelStyle]:
    """A plan for torch's ``parallelize_module`` whose collectives are compressed.

    Args:
        plan: by name of the module "colwise", "rowwise", or a style of torch's. ``ColwiseParallel`` and
            ``RowwiseParallel`` are replaced, with their layouts; other styles stay as they are.
        codec, block, least: as of :func:`pykernels.comm.all_reduce`.

    Raises:
        ValueError: an unknown style, a layout that is not compressed.
    """
    options: dict[str, Any] = {"codec": codec, "block": block, "least": least}
    found: dict[str, ParallelStyle] = {}
    for name, style in plan.items():
        if isinstance(style, str) and style not in STYLES:
            raise ValueError(f"pykernels: plan: {name} must be one of {', '.join(STYLES)} or a style, not {style!r}")
        layouts: dict[str, Any] = {}
        if isinstance(style, ColwiseParallel | RowwiseParallel):
            layouts = {"input_layouts": style.input_layouts[0], "output_layouts": style.output_layouts[0]}
        if style == "colwise" or isinstance(style, ColwiseParallel):
            found[name] = CompressedColwise(**layouts, **options)
        elif style == "rowwise" or isinstance(style, RowwiseParallel):
            found[name] = CompressedRowwise(**layouts, **options)
        else:
            assert isinstance(style, ParallelStyle)
            found[name] = style
    return found
