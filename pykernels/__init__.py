"""PyTorch models several times faster on the hardware at hand: hand-written kernels, model surgery, int8."""

from __future__ import annotations

__version__ = "0.1.0"

from pykernels.ops import _load as _load

from pykernels import _fake as _fake  # isort: skip  (needs the library)
from pykernels import _autograd as _autograd  # isort: skip
import pykernels.cuda.registry  # noqa: F401  # isort: skip
from pykernels.optimize import Optimized, load, optimize  # isort: skip
from pykernels.nn.swap import swap  # isort: skip

__all__ = ["Optimized", "__version__", "load", "optimize", "swap"]
