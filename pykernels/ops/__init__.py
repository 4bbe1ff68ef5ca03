"""Typed public functions over torch.ops.pykernels, one module a family, which also registers shapes and gradients."""

from pykernels.ops import (
    attention,
    compress,
    conv,
    linear,
    normalize,
    plan,
    pointwise,
    pool,
    quantize,
    sparse,
    upsample,
)

__all__ = [
    "attention",
    "compress",
    "conv",
    "linear",
    "normalize",
    "plan",
    "pointwise",
    "pool",
    "quantize",
    "sparse",
    "upsample",
]
