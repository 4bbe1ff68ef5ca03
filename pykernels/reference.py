"""The oracle: every op in plain torch, written for clarity. Tests and benchmarks import it; nothing else does.

Integer results are exact: kernels agree with them bit for bit, except behind silu, sigmoid, gelu and tanh, where the kernels'
own exp and erf may differ from torch's by a rounding, so a quantized result by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardsigmoid": lambda x: torch.clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0),
    "hardswish": lambda x: x * (torch.clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}

_RANGE = {torch.uint8: (0.0, 255.0), torch.int8: (-128.0, 127.0)}


def requantize(f: torch.Tensor, scale: float | None, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `f` to `dtype`: a cast for floats, else clamp(rint(f * (1/scale)) + zero_point) in fp32, half to even."""
    if dtype not in _RANGE:
        return f.to(dtype)
    assert scale is not None
    low, high = _RANGE[dtype]
    inverse = 1.0 / torch.tensor(scale, dtype=torch.float32)
    return torch.clamp(torch.round(f * inverse) + float(zero_point), low, high).to(dtype)


def dequantize(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """(q - zero_point) * scale in fp32."""
    return (q.to(torch.int32) - zero_point).to(torch.float32) * torch.tensor(scale, dtype=torch.float32)
