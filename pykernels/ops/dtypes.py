"""The dtypes that our kernels take for real numbers, and what the names of precisions store them in."""

from __future__ import annotations

import torch

from pykernels.ops import names

__all__ = ["ANY_WORDS", "REALS", "REAL_NAMES", "REAL_WORDS", "STORED"]

# What kernels call each.
REAL_NAMES: dict[torch.dtype, str] = {getattr(torch, dtype): name for name, dtype in names.REALS.items()}
REALS = tuple(REAL_NAMES)
# What a bad argument must be: a real number, or that or a byte.
REAL_WORDS = names.words(names.REALS.values(), " or ")
ANY_WORDS = names.words([*names.REALS.values(), "uint8", "int8"], " or ")
# Precisions of 16-bit weights and activations; sums are fp32. The others keep the dtypes that they find.
STORED = {name: dtype for dtype, name in REAL_NAMES.items() if dtype.itemsize == 2}
