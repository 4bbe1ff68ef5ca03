"""Typed public functions over torch.ops.pykernels, one module a family."""
