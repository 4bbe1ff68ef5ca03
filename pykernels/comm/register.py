"""One line for a user of DDP: ``handle = comm.register(ddp_model, "int8")``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pykernels.comm.auto import AutoState
from pykernels.comm.dense import DENSE, DenseState
from pykernels.comm.fsdp import gathers, register_sharded
from pykernels.comm.fsdp_gather import Gathers
from pykernels.comm.plain import Fp32State
from pykernels.comm.powersgd import PowerSGDState
from pykernels.comm.sparse import RandomKState, TopKState
from pykernels.comm.state import PYTHON_REDUCER, CommState, hook
from pykernels.comm.stats import Stats
from pykernels.comm.two_level import TwoLevelState

OTHERS: tuple[type[CommState], ...] = TopKState, RandomKState, PowerSGDState, Fp32State, AutoState
HOOKS: dict[str, type[CommState]] = {**DENSE, **{kind.codec: kind for kind in OTHERS}}


class Handle:
    """A registered hook: its statistics and what a checkpoint must hold of it.

    Attributes:
        state: the hook's state.
    """

    def __init__(self, state: CommState) -> None:
        self.state = state

    def stats(self) -> Stats:
        """Bytes on the wire, ratio, times by phase and residual norms, since the beginning."""
        return self.state.stats()

    def state_dict(self) -> dict[str, Any]:
        """Residuals and counters of this rank. Every rank has its own: save one file a rank."""
        return self.state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; see :meth:`CommState.load_state_dict` for other numbers of ranks."""
        self.state.load_state_dict(state)


# What is registered elsewhere: modules that extend `register` when they are imported, by the classes they do it for.
ELSEWHERE = {"torch.distributed.pipelining.stage._PipelineStageBase": "pykernels.parallel.pipeline"}


@singledispatch
def register(model: Any, *args: Any, **options: Any) -> Any:
    """Compress what `model` sends between ranks; every rank calls it at the same point, once a model.

    ``register(model, codec="int8", ranks_per_host=None, **options)`` for a model that is wrapped in
    DistributedDataParallel: :func:`register_replicated`; ``register(model, codec="int8", replicas=None,
    gather=None, **options)`` after ``fully_shard``: :func:`pykernels.comm.fsdp.register_sharded`, and with ``gather``
    the all-gather of weights (:mod:`pykernels.comm.fsdp_gather`); ``register(stage, forward="int8",
    backward="int8")`` for a stage of a pipeline: :func:`pykernels.parallel.register_stage`.

    Returns:
        A handle to take statistics from, and to save and restore.

    Raises:
        TypeError: `model` is none of these; an option the codec does not have.
        ValueError: an unknown codec, or an option out of range.
        RuntimeError: `model` has a hook already.
    """
    for kind in type(model).__mro__:
        if (module := ELSEWHERE.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            importlib.import_module(module)
            return register.dispatch(type(model))(model, *args, **options)
    raise TypeError(
        f"pykernels: model must be a DistributedDataParallel, not {type(model).__name__}: wrap it first, apply "
        "fully_shard, or give a stage of a pipeline"
    )


def _state_of(codec: str) -> type[CommState]:
    if codec not in HOOKS:
        raise ValueError(f"pykernels: codec must be one of {', '.join(HOOKS)}, not {codec!r}")
    return HOOKS[codec]


class ShardedHandle(Handle):
    """That of a model that ``fully_shard`` was applied to.

    Attributes:
        gathers: of its compressed all-gathers; None where they are torch's.
    """

    def __init__(self, state: CommState, gathers: Gathers | None) -> None:
        super().__init__(state)
        self.gathers = gathers

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.gathers is not None:
            self.gathers.forget()  # the weights were loaded, too


@register.register
def _(
    model: FSDPModule,
    codec: str = "int8",
    *,
    gather: str | None = None,
    gather_block: int = 256,
    ranks_per_host: None = None,
    **options: Any,
) -> ShardedHandle:
    if ranks_per_host is not None:
        raise ValueError("pykernels: ranks_per_host: only for DDP; with fully_shard give replicas= a process group")
    state = register_sharded(model, _state_of(codec), **options)
    chosen = {name: value for name, value in options.items() if name == "exempt"}
    return ShardedHandle(state, None if gather is None else gathers(model, gather, gather_block, **chosen))


@register.register
def register_replicated(
    model: DistributedDataParallel, codec: str = "int8", *, ranks_per_host: int | None = None, **options: Any
) -> Handle:
    """Compress the gradients of a DDP model.

    Works with gradients in fp32, bf16 and fp16, on CPUs (gloo) and GPUs (NCCL), with ``no_sync``, ``join``,
    ``find_unused_parameters``, ``static_graph`` and automatic mixed precision.

    Args:
        model: not yet trained with another hook.
        codec: one of ``HOOKS``.
        ranks_per_host: average in fp32 inside a host of so many consecutive ranks, and through a dense codec between
            hosts only.
        options: of the codec's state, e.g. ``error_feedback=False`` or ``block=128``; see its class.
    """
    make = _state_of(codec)
    if ranks_per_host is not None:
        if not issubclass(make, DenseState):
            raise ValueError(f"pykernels: ranks_per_host: only with a dense codec, not {codec}")
        if model._use_python_reducer:
            raise ValueError(f"pykernels: ranks_per_host: not in a compiled backward pass: {PYTHON_REDUCER}")
        make = TwoLevelState
        options = {**options, "codec": codec, "ranks_per_host": ranks_per_host}
    if codec == "auto":
        options.setdefault("device", next(model.parameters()).device)
    state = make(model.process_group, model.module.named_parameters(), **options)
    state.connect()
    if model._use_python_reducer and state.world > 1:
        state.prepare_traced()
    model.register_comm_hook(state, hook)
    return Handle(state)
