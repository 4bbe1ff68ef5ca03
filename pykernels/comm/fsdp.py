"""The codecs under ``fully_shard`` (FSDP2): its reduce-scatter, or the all-reduce between replicas (HSDP).

FSDP2 hands a parameter group's gradients to the reduce-scatter as one tensor [ranks, n], whose row r is everything that
rank r will own: part r of each parameter, one after another, padded to equal sizes. So the parameters in it are known,
and each is encoded by itself, those of one dimension as fp32::

    encode the rows (with the worker residual) -> all-to-all -> decode, sum and divide into the output

There is one lossy step, where DistributedDataParallel has two. The price of error feedback is memory: the residual is
fp32 and as large as the unsharded gradients, on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from pykernels.comm.bucket import FlatBucket
from pykernels.comm.dense import DenseState, row_key
from pykernels.comm.fsdp_gather import Gathers
from pykernels.comm.layout import Run
from pykernels.comm.state import CommState, Exempt, one_dimensional


@dataclass
class Group:
    """A parameter group of FSDP2.

    Attributes:
        index: in the order of the model's modules.
        module: that holds it.
        names: of its parameters, in their order in the reduce-scatter.
        parameters: one a name; meta tensors of the shapes that a rank owns, padding included.
        runs: where they lie in a row.
        shards, replicated: the process group it is sharded over; whether FSDP also all-reduces it (HSDP).
    """

    index: int
    module: FSDPModule
    names: list[str]
    parameters: list[torch.Tensor]
    runs: list[Run]
    shards: dist.ProcessGroup
    replicated: bool

    @property
    def numel(self) -> int:
        """Elements of a row."""
        return sum(run.numel for run in self.runs)

    def check(self, numel: int) -> None:
        """Raise unless a row of `numel` elements holds all of the group's parameters."""
        if numel != self.numel:
            raise RuntimeError(
                f"pykernels: the gradients of {', '.join(self.names[:3])}{' ...' * (len(self.names) > 3)} have {numel} "
                f"elements a rank, the parameters {self.numel}: some had no gradient, and FSDP2 does not say which. "
                "Use every parameter in each step, or, where torch has it, set_reduce_scatter_unused_params(True)"
            )


class ReduceScatter:
    """What ``FSDPModule.set_custom_reduce_scatter`` takes (torch's ``ReduceScatter`` interface)."""

    def __init__(self, state: DenseState, group: Group) -> None:
        self._state, self._group = state, group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor from the ordinary allocator."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce in the order of the current stream; FSDP2 has put its own there, so ``async_op`` is not needed."""
        if async_op:
            raise ValueError("pykernels: async_op: this reduce-scatter overlaps by streams, call it without")
        self._group.check(output_tensor.numel())
        factor = _factor(op, self._state.world)
        self._state.reduce_scatter(self._group.index, output_tensor, input_tensor, self._group.runs, factor)


def _factor(op: Any, world: int) -> float:
    """What a sum must be multiplied by to be what `op` means."""
    if op == dist.ReduceOp.SUM:
        return 1.0
    if op == dist.ReduceOp.AVG:
        return 1.0 / world
    if op == dist.ReduceOp.PREMUL_SUM:
        return float(op.__getstate__()[1])
    raise ValueError(f"pykernels: op: {op} cannot be compressed, only a sum or an average")


def _param_groups(model: FSDPModule) -> Iterator[tuple[FSDPModule, Any]]:
    """FSDP2's objects for all parameter groups, with the modules that hold them."""
    assert isinstance(model, torch.nn.Module)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                if group is not None and group.fsdp_params:
                    yield module, group


def _prefixes(model: Any) -> dict[int, str]:
    """What the names of a module's parameters begin with, by the module's id."""
    return {id(module): f"{name}." if name else "" for name, module in model.named_modules()}


def _parameters(
    group: Any, prefixes: dict[int, str], exempt: Exempt, trained: bool
) -> tuple[list[torch.Tensor], list[Run]]:
    """The parameters of a group, or those that are trained, as meta tensors of what a rank owns, padding included, and
    where they lie in its row."""
    parameters, runs, first = [], [], 0
    for parameter in group.fsdp_params:
        if trained and not parameter.sharded_param.requires_grad:
            continue
        where = parameter._module_info
        name = prefixes[id(where.module)] + where.param_name
        shape = parameter.padded_sharded_param_size
        whole = torch.empty(parameter._orig_size, dtype=parameter.sharded_param.dtype, device="meta")
        parameters.append(torch.empty(shape, dtype=whole.dtype, device="meta"))
        runs.append(Run(name, first, math.prod(shape), exempt(name, whole)))
        first += math.prod(shape)
    return parameters, runs


def _groups(model: FSDPModule, exempt: Exempt) -> Iterator[Group]:
    prefixes, index = _prefixes(model), 0
    for module, group in _param_groups(model):
        parameters, runs = _parameters(group, prefixes, exempt, trained=True)
        if not runs:
            continue
        mesh = group.mesh_info
        if not hasattr(mesh, "shard_process_group"):
            raise ValueError(f"pykernels: model: {runs[0].key} is replicated, not sharded: use DDP for that")
        replicated = hasattr(mesh, "replicate_process_group")
        names = [run.key for run in runs]
        yield Group(index, module, names, parameters, runs, group._reduce_scatter_process_group, replicated)
        index += 1


def gathers(model: FSDPModule, codec: str, block: int = 256, exempt: Exempt = one_dimensional) -> Gathers:
    """Compress the all-gather of every parameter group; arguments and errors as of `Gathers`."""
    prefixes = _prefixes(model)
    found = [
        (module, group, _parameters(group, prefixes, exempt, trained=False)[1])
        for module, group in _param_groups(model)
    ]
    return Gathers(model, found, codec, block)


def _reduce_shards(model: FSDPModule, groups: list[Group], make: type[CommState], options: dict[str, Any]) -> CommState:
    """Compress the reduce-scatter."""
    if not issubclass(make, DenseState):
        raise ValueError(
            f"pykernels: codec: {make.codec} cannot reduce and scatter; a dense codec can, or give replicas= to "
            "compress between replicas"
        )
    world = dist.get_world_size(groups[0].shards)
    named: Any = [
        (row_key(name, row), parameter)
        for group in groups
        for name, shape in zip(group.names, group.parameters, strict=True)
        for row, parameter in ((row, torch.empty_like(shape)) for row in range(world))
    ]
    exempt = {row_key(run.key, row): run.exempt for group in groups for run in group.runs for row in range(world)}
    state = make(groups[0].shards, named, exempt=lambda name, _: exempt[name], **options)
    state.connect()
    for group in groups:
        scatter: Any = ReduceScatter(state, group)  # has the interface of a private class of torch
        group.module.set_custom_reduce_scatter(scatter)
    return state


def _average_replicas(
    groups: list[Group], make: type[CommState], replicas: dist.ProcessGroup, options: dict[str, Any]
) -> CommState:
    """Reduce and scatter as FSDP2 does, then average the shard over the replicas, compressed."""
    if make.codec == "auto":
        raise ValueError("pykernels: codec: auto chooses for the buckets of DDP, not for shards: name a codec")
    named: Any = [pair for group in groups for pair in zip(group.names, group.parameters, strict=True)]
    exempt = {run.key: run.exempt for group in groups for run in group.runs}
    state = make(replicas, named, exempt=lambda name, _: exempt[name], **options)
    state.connect()
    order: dict[int, int] = {}  # of the groups, as the first backward pass meets them

    def hook_of(group: Group) -> Any:
        def average(shard: torch.Tensor) -> None:
            group.check(shard.numel())
            index = order.setdefault(group.index, len(order))
            gradients = [
                shard[run.first : run.first + run.numel].view(parameter.shape)
                for run, parameter in zip(group.runs, group.parameters, strict=True)
            ]
            last = index == len(groups) - 1
            state(FlatBucket(index, shard, group.parameters, gradients, last).as_grad_bucket()).wait()

        return average

    for group in groups:
        group.module.set_all_reduce_hook(hook_of(group))
    return state


def register_sharded(
    model: FSDPModule,
    make: type[CommState],
    *,
    replicas: dist.ProcessGroup | None = None,
    exempt: Exempt = one_dimensional,
    **options: Any,
) -> CommState:
    """What :func:`pykernels.comm.register` does with a model that ``fully_shard`` was applied to.

    Args:
        model: already sharded, all of it over one process group.
        make: class of the codec's state.
        replicas: the ranks that hold the same shard on other hosts. Given, gradients are reduced and scattered inside a
            host as FSDP2 does, uncompressed, and the shards averaged over `replicas` through the codec. Shard the model
            on the mesh's inner dimension alone: on a 2-D mesh FSDP2 runs the all-reduce itself.
        exempt: ``exempt(name, parameter)`` says what travels as fp32; it sees meta tensors of the unsharded shapes.
        options: of the codec's state.

    Raises:
        RuntimeError: this torch has no ``set_custom_reduce_scatter``.
        ValueError: no parameter to reduce, several process groups, a 2-D mesh, a codec that cannot.
    """
    if not hasattr(model, "set_custom_reduce_scatter"):
        raise RuntimeError(
            f"pykernels: torch {torch.__version__} cannot replace the reduce-scatter of fully_shard "
            "(FSDPModule.set_custom_reduce_scatter): use a newer torch"
        )
    groups = list(_groups(model, exempt))
    if not groups:
        raise ValueError("pykernels: model has no sharded parameter that requires a gradient")
    if len({id(group.shards) for group in groups}) > 1:
        raise ValueError("pykernels: model is sharded over several process groups: register its parts one by one")
    if any(group.replicated for group in groups):
        raise ValueError(
            "pykernels: model is sharded on a 2-D mesh, whose all-reduce FSDP2 runs itself: apply "
            "fully_shard(..., mesh=mesh['shard']) and give replicas=mesh['replicate'].get_group()"
        )
    if replicas is not None:
        return _average_replicas(groups, make, replicas, options)
    return _reduce_shards(model, groups, make, options)
