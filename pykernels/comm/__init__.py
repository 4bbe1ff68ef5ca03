"""Gradients over slow links: compression codecs with error feedback as hooks of DistributedDataParallel."""

import importlib
from typing import Any

from pykernels.comm.auto import AutoState, AutoStats, Choice
from pykernels.comm.checkpoint import PerRank
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
from pykernels.comm.functional import all_gather, all_reduce, all_to_all, reduce_scatter
from pykernels.comm.local_sgd import DiLoCo, nesterov, plain_average
from pykernels.comm.plain import Fp32State
from pykernels.comm.powersgd import PowerSGDState
from pykernels.comm.register import HOOKS, Handle, register
from pykernels.comm.sparse import RandomKState, TopKState
from pykernels.comm.state import CommState, compress_all, hook, one_dimensional
from pykernels.comm.stats import Stats
from pykernels.comm.two_level import TwoLevelState

# One function, whatever the state: torch's convention wants a hook beside it.
int8_hook = int4_hook = int2_hook = onebit_hook = fp8_hook = bf16_hook = fp16_hook = hook
topk_hook = randomk_hook = powersgd_hook = two_level_hook = fp32_hook = auto_hook = hook

__all__ = [
    "HOOKS",
    "AutoState",
    "AutoStats",
    "Bf16State",
    "Choice",
    "CommState",
    "DenseState",
    "DiLoCo",
    "Fp8State",
    "Fp16State",
    "Fp32State",
    "Handle",
    "Int2State",
    "Int4State",
    "Int8State",
    "OneBitState",
    "PerRank",
    "PowerSGDState",
    "RandomKState",
    "Stats",
    "TopKState",
    "TwoLevelState",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "auto_hook",
    "bf16_hook",
    "compress_all",
    "fp8_hook",
    "fp16_hook",
    "fp32_hook",
    "int2_hook",
    "int4_hook",
    "int8_hook",
    "nesterov",
    "one_dimensional",
    "onebit_hook",
    "plain_average",
    "powersgd_hook",
    "randomk_hook",
    "reduce_scatter",
    "register",
    "topk_hook",
    "two_level_hook",
]


def __getattr__(name: str) -> Any:
    """``comm.tensor_parallel`` of :mod:`pykernels.parallel`, a room above; what needs Flower or torchft."""
    if name == "tensor_parallel":
        from pykernels.parallel import tensor_parallel

        return tensor_parallel
    if name in ("flower", "torchft"):
        return importlib.import_module(f"pykernels.comm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
