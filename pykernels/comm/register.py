"""One line for a user of DDP: ``handle = comm.register(ddp_model, "int8")``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pykernels.comm import hooks
from pykernels.comm.auto import AutoState
from pykernels.comm.dense import (
    Bf16State,
    DenseState,
    Fp8State,
    Fp16State,
    Int2State,
    Int4State,
    Int8State,
    OneBitState,
)
from pykernels.comm.fsdp import register_sharded
from pykernels.comm.plain import Fp32State
from pykernels.comm.powersgd import PowerSGDState
from pykernels.comm.sparse import RandomKState, TopKState
from pykernels.comm.state import PYTHON_REDUCER, CommState
from pykernels.comm.stats import Stats
from pykernels.comm.two_level import TwoLevelState

HOOKS: dict[str, tuple[type[CommState], Callable[..., Any]]] = {
    "int8": (Int8State, hooks.int8_hook),
    "int4": (Int4State, hooks.int4_hook),
    "int2": (Int2State, hooks.int2_hook),
    "onebit": (OneBitState, hooks.onebit_hook),
    "fp8": (Fp8State, hooks.fp8_hook),
    "bf16": (Bf16State, hooks.bf16_hook),
    "fp16": (Fp16State, hooks.fp16_hook),
    "topk": (TopKState, hooks.topk_hook),
    "randomk": (RandomKState, hooks.randomk_hook),
    "powersgd": (PowerSGDState, hooks.powersgd_hook),
    "fp32": (Fp32State, hooks.fp32_hook),
    "auto": (AutoState, hooks.auto_hook),
}


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


def register(
    model: DistributedDataParallel | FSDPModule,
    codec: str = "int8",
    *,
    ranks_per_host: int | None = None,
    **options: Any,
) -> Handle:
    """Compress the gradients that `model` sends between ranks.

    Every rank calls it at the same point, once a model. Works with gradients in fp32, bf16 and fp16, on CPUs (gloo) and
    GPUs (NCCL), with ``no_sync``, ``join``, ``find_unused_parameters``, ``static_graph`` and automatic mixed precision.

    Args:
        model: wrapped in DistributedDataParallel and not yet trained with another hook, or sharded by ``fully_shard``
            (FSDP2; see :func:`pykernels.comm.fsdp.register_sharded` for what differs).
        codec: one of ``HOOKS``.
        ranks_per_host: average in fp32 inside a host of so many consecutive ranks, and through a dense codec between
            hosts only.
        options: of the codec's state, e.g. ``error_feedback=False`` or ``block=128``; see its class.

    Returns:
        A handle to take statistics from, and to save and restore.

    Raises:
        TypeError: `model` is neither; an option the codec does not have.
        ValueError: an unknown codec, or an option out of range.
        RuntimeError: `model` has a hook already.
    """
    if not isinstance(model, DistributedDataParallel | FSDPModule):
        raise TypeError(
            f"pykernels: model must be a DistributedDataParallel, not {type(model).__name__}: wrap it first, or apply "
            "fully_shard"
        )
    if codec not in HOOKS:
        raise ValueError(f"pykernels: codec must be one of {', '.join(HOOKS)}, not {codec!r}")
    make, hook = HOOKS[codec]
    if isinstance(model, FSDPModule):
        if ranks_per_host is not None:
            raise ValueError("pykernels: ranks_per_host: only for DDP; with fully_shard give replicas= a process group")
        return Handle(register_sharded(model, make, **options))
    if ranks_per_host is not None:
        if not issubclass(make, DenseState):
            raise ValueError(f"pykernels: ranks_per_host: only with a dense codec, not {codec}")
        if model._use_python_reducer:
            raise ValueError(f"pykernels: ranks_per_host: not in a compiled backward pass: {PYTHON_REDUCER}")
        make, hook = TwoLevelState, hooks.two_level_hook
        options = {**options, "codec": codec, "ranks_per_host": ranks_per_host}
    if codec == "auto":
        options.setdefault("device", next(model.parameters()).device)
    state = make(model.process_group, model.module.named_parameters(), **options)
    if model._use_python_reducer and state.world > 1:
        state.prepare_traced()
    model.register_comm_hook(state, hook)
    return Handle(state)
