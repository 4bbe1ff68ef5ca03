"""Tensor parallelism of torch with compressed collectives: linear layers split by columns and by rows.

Parameters are sharded as DTensors by torch's own styles, so checkpoints are theirs. The layers then compute on local
tensors, and what they exchange goes through :mod:`pykernels.comm.functional`. With x replicated, or split along a
dimension d (sequences)::

    columns   x -> (its gradient is summed over the ranks)    or gathered along d    -> x W[rank].T + b[rank]
    rows      x[rank] W[:, rank].T -> summed over the ranks   or summed, scattered along d    -> + b

Shoeybi et al., "Megatron-LM"; Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from pykernels.comm.functional import LEAST, all_gather, all_reduce, check, reduce_scatter
from pykernels.nn.linear import Int8Linear
from pykernels.parallel.int8 import plain, split_columns, split_rows


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


class Gather(torch.autograd.Function):
    """Columns of all ranks, the same on each, and so is their gradient, of which each takes its own."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, size: int, most: int, rank: int, codec: str, group: str, block: int, least: int
    ) -> torch.Tensor:
        """`size` columns, of which all ranks have `most` but the last ones."""
        ctx.first, ctx.size = rank * most, x.shape[-1]
        padded = nn.functional.pad(x, (0, most - x.shape[-1]))
        return Ranks(codec, group, block, least).all_gather(padded, x.dim() - 1)[..., :size].contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0][..., ctx.first : ctx.first + ctx.size], *[None] * 7


@dataclass(frozen=True)
class Edges:
    """How what comes into a split layer and goes out of it lies on the ranks.

    Attributes:
        input: the dimension that the input of columns is split along; None: whole.
        output: the same of the output of rows; of columns None is whole, and -1 as they are.
        local: the output is a tensor, not a DTensor.
    """

    input: int | None
    output: int | None
    local: bool


class _Split(nn.Linear):
    """A linear layer of which this rank has a part: its parameters are DTensors."""

    ranks: Ranks
    edges: Edges

    def _local(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight: Any = self.weight
        bias: Any = self.bias
        return weight.to_local(), None if bias is None else bias.to_local()

    def _mesh(self) -> DeviceMesh:
        weight: Any = self.weight
        mesh: DeviceMesh = weight.device_mesh
        return mesh

    def _rest(self) -> tuple[str, str, int, int]:
        return self.ranks.codec, self.ranks.group, self.ranks.block, self.ranks.least

    def _given(self, y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The output as its style says; `shape` is that of all ranks' together."""
        if self.edges.local:
            return y
        placement = Replicate() if self.edges.output is None else Shard(self.edges.output)
        stride = torch.empty(shape, device="meta").stride()
        mesh = self._mesh()
        return DTensor.from_local(y, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride)


class ColumnLinear(_Split):
    """Some of a layer's outputs, of all of its inputs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self._local()
        if self.edges.input is not None:
            whole = self.ranks.all_gather(_lying(input, self.edges.input), self.edges.input)
        elif isinstance(input, DTensor):
            # what made it whole also sums its gradient
            whole = input.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        else:
            whole = Copy.apply(input, *self._rest())
        y = nn.functional.linear(whole, weight, bias)
        if self.edges.output is None:
            mesh = self._mesh()
            most = -(-self.out_features // mesh.size())
            y = Gather.apply(y, self.out_features, most, mesh.get_local_rank(), *self._rest())
        return self._given(y, (*y.shape[:-1], self.out_features))


class RowLinear(_Split):
    """All of a layer's outputs, of some of its inputs, summed over the ranks."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self._local()
        part = nn.functional.linear(_lying(input, input.dim() - 1), weight)
        shape, along = list(part.shape), self.edges.output
        if along is None:
            whole: torch.Tensor = Sum.apply(part, *self._rest())
        else:
            whole = self.ranks.reduce_scatter(part, along)
        if bias is not None:
            if along is not None:  # each rank adds it to other tokens, so that its gradient is the sum of theirs
                bias = Copy.apply(bias, *self._rest())
            whole = whole + bias.to(whole.dtype)  # under autocast parameters keep theirs
        return self._given(whole, shape)


def _lying(x: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's part of `x`, which is split along `dim`: a tensor is that already, a DTensor is made so."""
    if not isinstance(x, DTensor):
        return x
    if x.shape[dim] % x.device_mesh.size() and dim != x.dim() - 1:
        raise ValueError(
            f"pykernels: {x.shape[dim]} elements along dimension {dim} are not as many for each of "
            f"{x.device_mesh.size()} ranks"
        )
    return x.redistribute(placements=[Shard(dim)]).to_local()


def _dim(layout: Placement, what: str) -> int | None:
    if isinstance(layout, Replicate):
        return None
    if isinstance(layout, Shard) and layout.dim >= 0:
        return layout.dim
    raise ValueError(f"pykernels: {what} must be Replicate() or Shard(d) of a dimension from the front, not {layout}")


def _ranks(mesh: DeviceMesh, codec: str, block: int, least: int) -> Ranks:
    if mesh.ndim != 1:
        raise ValueError(f"pykernels: mesh must have one dimension, not {mesh.ndim}: give mesh['name']")
    return Ranks(codec, mesh.get_group().group_name, block, least)


def _become(kind: type[_Split], module: nn.Module, edges: Edges, ranks: Ranks) -> None:
    if type(module) is not nn.Linear:
        raise ValueError(f"pykernels: only nn.Linear is split with compressed collectives, not {type(module).__name__}")
    module.__class__ = kind
    split: Any = module
    split.edges, split.ranks = edges, ranks


class CompressedColwise(ColwiseParallel):
    """``ColwiseParallel`` of an ``nn.Linear`` on local tensors, whose collectives are compressed; or, for inference, of
    an `pykernels.nn.Int8Linear`. Of an ``nn.Embedding`` it is torch's own.

    Args:
        input_layouts: Replicate() (default), or Shard(d), of which the whole is gathered.
        output_layouts: Shard(-1) (default), or Replicate(): all columns are gathered.
        use_local_output: False makes the output a DTensor, as for ``loss_parallel``. DTensors are taken as inputs, too.
        codec, block, least: as of :func:`pykernels.comm.all_reduce`.

    Raises:
        ValueError: when it is applied: another layout, another kind of module; of an int8 layer any but the defaults.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        codec: str = "int8",
        block: int = 256,
        least: int = LEAST,
    ) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        check(codec, block)
        self._rest = codec, block, least

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, nn.Embedding):
            return super()._apply(module, device_mesh)
        ranks, given, made = _ranks(device_mesh, *self._rest), self.input_layouts[0], self.output_layouts[0]
        if isinstance(module, Int8Linear):
            plain(given == Replicate(), made == Shard(-1), self.use_local_output)
            return split_columns(module, device_mesh)
        if made not in (Shard(-1), Replicate()):
            raise ValueError(f"pykernels: output_layouts must be Shard(-1) or Replicate() by columns, not {made}")
        edges = Edges(_dim(given, "input_layouts"), -1 if made == Shard(-1) else None, self.use_local_output)
        _become(ColumnLinear, module, edges, ranks)
        return distribute_module(module, device_mesh, self._partition_linear_fn)


class CompressedRowwise(RowwiseParallel):
    """``RowwiseParallel`` of an ``nn.Linear`` on local tensors, whose collectives are compressed; or, for inference, of
    an `pykernels.nn.Int8Linear`. Of an ``nn.Embedding`` it is torch's own.

    Args:
        input_layouts: Shard(-1) (default).
        output_layouts: Replicate() (default), or Shard(d): summed and scattered.
        use_local_output: False makes the output a DTensor. DTensors are taken as inputs, too.
        codec, block, least: as of :func:`pykernels.comm.all_reduce`.

    Raises:
        ValueError: when it is applied: another layout, another kind of module; of an int8 layer any but the defaults.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        codec: str = "int8",
        block: int = 256,
        least: int = LEAST,
    ) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        check(codec, block)
        self._rest = codec, block, least

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, nn.Embedding):
            return super()._apply(module, device_mesh)
        ranks, given, made = _ranks(device_mesh, *self._rest), self.input_layouts[0], self.output_layouts[0]
        if isinstance(module, Int8Linear):
            plain(given == Shard(-1), made == Replicate(), self.use_local_output)
            return split_rows(module, device_mesh, ranks)
        if given != Shard(-1):
            raise ValueError(f"pykernels: input_layouts must be Shard(-1) by rows, not {given}")
        _become(RowLinear, module, Edges(-1, _dim(made, "output_layouts"), self.use_local_output), ranks)
        return distribute_module(module, device_mesh, self._partition_linear_fn)


COMPRESSED: dict[Any, Any] = {
    "colwise": CompressedColwise,
    "rowwise": CompressedRowwise,
    ColwiseParallel: CompressedColwise,
    RowwiseParallel: CompressedRowwise,
}


def tensor_parallel(
    plan: Mapping[str, str | ParallelStyle], codec: str = "int8", *, block: int = 256, least: int = LEAST
) -> dict[str, ParallelStyle]:
    """A plan for torch's ``parallelize_module`` whose collectives are compressed.

    Args:
        plan: by name of the module "colwise", "rowwise", or a style of torch's. ``ColwiseParallel`` and
            ``RowwiseParallel`` are replaced, with all that they say; other styles, and what is derived from these two,
            stay as they are.
        codec, block, least: as of :func:`pykernels.comm.all_reduce`.

    Raises:
        ValueError: an unknown style or codec, a block out of range.
    """
    found: dict[str, ParallelStyle] = {}
    for name, style in plan.items():
        said: dict[str, Any] = {}
        if type(style) in COMPRESSED:
            chosen: Any = style
            said = {
                "input_layouts": chosen.input_layouts[0],
                "output_layouts": chosen.output_layouts[0],
                "use_local_output": chosen.use_local_output,
            }
        kind = style if isinstance(style, str) else type(style)
        if kind in COMPRESSED:
            found[name] = COMPRESSED[kind](**said, codec=codec, block=block, least=least)
        elif isinstance(style, ParallelStyle):
            found[name] = style
        else:
            named = ", ".join(known for known in COMPRESSED if isinstance(known, str))
            raise ValueError(f"pykernels: plan: {name} must be one of {named} or a style, not {style!r}")
    return found
