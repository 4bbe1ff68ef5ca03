"""Typed public functions over torch.ops.pykernels, one module a family, which also registers shapes and gradients."""

from pykernels.ops import compress, conv, linear, normalize, plan, pointwise, pool, quantize, sparse, upsample

__all__ = [
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
