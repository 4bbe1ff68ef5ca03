"""What this installation runs on: the facts that `pykernels doctor`, the demo and the benchmarks print."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

import pykernels
from pykernels.cuda import registry
from pykernels.ops import _load
from pykernels.ops.names import ISAS
from pykernels.tune.cores import cpu_name

__all__ = ["Machine", "OpSupport", "machine", "op_support"]


@dataclass(frozen=True)
class Machine:
    """The processor, torch and the kernels chosen for them.

    Attributes:
        cpu: the processor's name as the system tells it.
        cores: logical processors this process may use.
        threads: threads torch (and so every op of ours) uses for one call.
        torch: torch's version.
        isa: the build of the CPU kernels in force, or None without the library.
        isas: each build of the CPU kernels and whether this processor can run it; empty without the library.
        isa_reason: why `isa` is in force, as words.
        build: compiler, sanitizers and emulated isas of the libraries; empty without them.
        cpu_error: why the CPU ops are not there, or None.
        cuda_error: why there are no CUDA ops, or None.
        cuda_library_error: why the CUDA library, which makes some of them faster, is not loaded, or None.
    """

    cpu: str
    cores: int
    threads: int
    torch: str
    isa: str | None
    isas: dict[str, bool]
    isa_reason: str
    build: dict[str, str]
    cpu_error: str | None
    cuda_error: str | None
    cuda_library_error: str | None

    def __str__(self) -> str:
        isa = self.isa or "no CPU library"
        return f"{self.cpu}, {self.threads} threads, {isa}, torch {self.torch}, pykernels {pykernels.__version__}"


@dataclass(frozen=True)
class OpSupport:
    """One op of ``torch.ops.pykernels``: where it runs and whether gradients pass through it."""

    name: str
    cpu: bool
    cuda: bool
    gradients: bool


def machine() -> Machine:
    """Read the facts now (the isa may be set and threads changed while a process runs)."""
    try:
        from pykernels import _host
    except ImportError:
        host: Any = None
    else:
        host = _host
    isa, reason = None, "the CPU library is not loaded"
    if host is not None and _load.CPU_ERROR is None:
        isa = torch.ops.pykernels._isa()
        chosen, complaint = host.choose_isa()
        if complaint:
            reason = f"{complaint}; this is the best of this CPU"
        elif isa != chosen:
            reason = "set by the running program"
        elif os.environ.get("PYKERNELS_ISA"):
            reason = "named by PYKERNELS_ISA"
        else:
            reason = "the best of this CPU"
    return Machine(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        isa=isa,
        isas={name: bool(host.isas()[name]) for name in ISAS} if host else {},
        isa_reason=reason,
        build=dict(host.build()) if host else {},
        cpu_error=_load.CPU_ERROR,
        cuda_error=registry.error(),
        cuda_library_error=_load.CUDA_ERROR,
    )


def op_support() -> list[OpSupport]:
    """Every public op, by name, as the dispatcher knows it. Empty without the CPU library.

    An op whose CUDA implementation could not run here, since Triton is missing, counts as having none.
    """
    if _load.CPU_ERROR is not None:
        return []
    dispatcher, cuda = torch._C, registry.error() is None
    names = {name.split(".")[0] for name in dispatcher._dispatch_get_all_op_names() if name.startswith("pykernels::")}

    def has(name: str, key: str) -> bool:
        return bool(dispatcher._dispatch_has_kernel_for_dispatch_key(name, key))

    return [
        OpSupport(name.removeprefix("pykernels::"), has(name, "CPU"), cuda and has(name, "CUDA"), has(name, "Autograd"))
        for name in sorted(names)
        if not name.startswith("pykernels::_")
    ]
