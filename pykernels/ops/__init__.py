"""Typed public functions over torch.ops.pykernels, one module a family, which also registers shapes and gradients."""

from pykernels.ops import compress, conv, linear, plan, pool, quantize, sparse

__all__ = ["compress", "conv", "linear", "plan", "pool", "quantize", "sparse"]
