"""The CUDA implementations of ops, which are Triton kernels: registered here, but imported at their first call."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from pykernels.ops import _load
from pykernels.ops.errors import reason

__all__ = ["KERNELS", "UNMEASURED", "complaint", "error", "implementation", "runs", "unusable"]

UNMEASURED = (
    "CUDA: ops and networks checked on an H100 on 2026-11-26; what changed since has run on no GPU; no speed claimed "
    "(docs/benchmarks/gpu)"
)
INSTALL = "pip install 'pykernels[gpu]'"
# Which file of pykernels/cuda/triton has the op's launcher.
KERNELS = {
    "int8_mm": "linear",
    "int8_linear": "linear",
    "linear": "linear",
    "conv2d": "conv",
    "qconv2d": "conv",
    "conv_bn_act": "conv",
    "linear_pack": "pack",
    "int8_linear_pack": "pack",
    "conv2d_pack": "pack",
    "qconv2d_pack": "pack",
    "compress_encode": "compress",
    "compress_decode": "compress",
    "compress_reduce": "compress",
    "sparse_encode": "topk",
    "sparse_decode": "sparse",
    "randomk_encode": "sparse",
    "randomk_decode": "sparse",
    "quantize_per_tensor": "quantize",
    "dequantize_per_tensor": "quantize",
    "quantize_per_channel": "quantize",
    "dequantize_per_channel": "quantize",
    "quantize_per_token": "quantize",
    "dequantize_per_token": "quantize",
    "quantize_per_block": "quantize",
    "dequantize_per_block": "quantize",
    "qadd": "arithmetic",
    "qmul": "arithmetic",
    "qcat": "arithmetic",
    "qlookup": "arithmetic",
    "add": "pointwise",
    "activate": "pointwise",
    "leaky_relu": "pointwise",
    "attention": "attention",
    "softmax": "normalize",
    "layer_norm": "normalize",
    "upsample_nearest2d": "upsample",
    "upsample_bilinear2d": "upsample",
    "interleave": "upsample",
    "max_pool2d": "pool",
    "max_pool2d_with_indices": "pool",
    "adaptive_max_pool2d": "pool",
    "adaptive_max_pool2d_with_indices": "pool",
    "avg_pool2d": "pool",
    "adaptive_avg_pool2d": "pool",
    "qavg_pool2d": "pool",
    "qadaptive_avg_pool2d": "pool",
}


def error() -> str | None:
    """Why there are no CUDA ops here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: {INSTALL}"
    return None


def complaint(device: torch.device) -> str | None:
    """Why our ops do not run on tensors of `device`, or None."""
    if device.type not in ("cpu", "cuda"):
        return "our kernels are for the CPU and for CUDA devices"
    return _ERROR if device.type == "cuda" else None


def unusable(device: torch.device) -> str | None:
    """`complaint`, or why this machine has no such device."""
    found = complaint(device)
    if found is None and device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            found = f"torch finds {count} CUDA device{'' if count == 1 else 's'} here"
    return found


def runs(op: str) -> str:
    """What computes the op on CUDA devices, in words."""
    if op in ("int8_linear", "qconv2d") and _load.CUDA_ERROR is None:
        return "CUTLASS or Triton, by shape"
    if KERNELS.get(op) in ("attention", "upsample", "normalize"):
        return "ATen"
    return {"linear": "cuBLAS through ATen", "conv2d": "cuDNN through ATen"}.get(op, "Triton")


def implementation(op: str) -> Callable[..., Any]:
    """A function that calls the launcher of `op`; without Triton it says what to install."""

    def call(*args: object, **kwargs: object) -> Any:
        try:
            module = importlib.import_module(f"pykernels.cuda.triton.{KERNELS[op]}")
        except ImportError as failure:
            raise RuntimeError(f"pykernels: {op} on CUDA needs Triton ({reason(failure)}): {INSTALL}") from failure
        return getattr(module, op)(*args, **kwargs)

    return call


_ERROR = error()  # found out once: `complaint` is asked at every call of a swapped module
if _load.CPU_ERROR is None and torch.version.cuda is not None:
    for _op in KERNELS:
        torch.library.impl(f"pykernels::{_op}", "cuda", implementation(_op))
