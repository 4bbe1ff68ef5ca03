"""Operators as they were before an opset, where more than the place of an argument has changed since."""

from __future__ import annotations

from typing import Any

import torch

from pykernels.from_onnx import pointwise
from pykernels.from_onnx.layers import batch_normalization
from pykernels.from_onnx.resize import resize
from pykernels.from_onnx.table import Refused, operator

__all__: list[str] = []


@operator("Clip", before=11)
def clip(x: torch.Tensor, **ends: float) -> torch.Tensor:
    """Attributes min and max."""
    return pointwise.clip(x, ends.get("min"), ends.get("max"))


@operator("Softmax", before=13)
def softmax(x: torch.Tensor, *, axis: int = 1) -> torch.Tensor:
    """Over all dimensions from `axis` on."""
    return _over_the_rest(torch.softmax, x, axis)


@operator("LogSoftmax", before=13)
def log_softmax(x: torch.Tensor, *, axis: int = 1) -> torch.Tensor:
    return _over_the_rest(torch.log_softmax, x, axis)


def _over_the_rest(function: Any, x: torch.Tensor, axis: int) -> Any:
    axis = axis + x.dim() if axis < 0 else axis
    if axis == x.dim() - 1:
        return function(x, axis)
    return function(x.flatten(axis), axis).reshape(x.shape)


@operator("Resize", "Upsample", before=11, known="scales")
def upsample(x: torch.Tensor, scales: list[float], *, mode: str = "nearest") -> torch.Tensor:
    """Where an element comes from is its place over the scale."""
    return resize(x, None, scales, coordinate_transformation_mode="asymmetric", mode=mode, nearest_mode="floor")


@operator("BatchNormalization", before=9)
def batch_normalization_of_all(x: torch.Tensor, *parameters: torch.Tensor, spatial: int = 1, **how: Any) -> Any:
    if not spatial:
        raise Refused("a mean for each element")
    return batch_normalization(x, *parameters, **how)
