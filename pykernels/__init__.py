"""PyTorch models several times faster on the hardware at hand: hand-written kernels, model surgery, int8."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# These two register what an op is besides its kernels.
import pykernels.cuda.registry
import pykernels.ops  # noqa: F401
from pykernels.compress import Compressed, compress
from pykernels.distil import distill
from pykernels.nn.swap import swap
from pykernels.optimize import optimize
from pykernels.optimized import Optimized, load
from pykernels.prune import Pruned, prune
from pykernels.tune import Instances, Setup, tune

__all__ = [
    "Compressed",
    "Instances",
    "Optimized",
    "Pruned",
    "Setup",
    "__version__",
    "compress",
    "distill",
    "load",
    "optimize",
    "prune",
    "swap",
    "tune",
]


def __getattr__(name: str) -> Any:
    """``pk.comm`` and ``pk.parallel``, which import torch.distributed, when they are first used."""
    if name in ("comm", "parallel"):
        return importlib.import_module(f"pykernels.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
