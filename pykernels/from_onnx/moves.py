"""ONNX's operators that move elements, and that make tensors of sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pykernels.from_onnx import sizes
from pykernels.from_onnx.table import Refused, operator

__all__ = ["bounded"]

_MOST = 2**28
"""Elements of a tensor that a file may ask for by a number alone."""


def bounded(shape: list[Any]) -> list[Any]:
    """The shape, where it is no larger than that."""
    if all(isinstance(size, int) for size in shape) and math.prod(shape) > _MOST:
        raise Refused(f"a tensor of sizes {shape}")
    return shape


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@operator("Reshape", known="shape")
def reshape(x: torch.Tensor, shape: list[Any], *, allowzero: int = 0) -> torch.Tensor:
    if not allowzero:
        shape = [x.shape[d] if isinstance(size, int) and size == 0 else size for d, size in enumerate(shape)]
    return x.reshape(shape)


@operator("Flatten")
def flatten(x: torch.Tensor, *, axis: int = 1) -> torch.Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return torch.flatten(x, 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def transpose(x: torch.Tensor, *, perm: list[int] | None = None) -> torch.Tensor:
    perm = perm if perm is not None else list(range(x.dim()))[::-1]
    moved = [d for d, source in enumerate(perm) if d != source]
    # two that change places are said so: channel shuffles are found by it
    return x.transpose(*moved) if len(moved) == 2 else x.permute(perm)


@operator("Squeeze", known="axes")
def squeeze(x: torch.Tensor, axes: Any = None) -> torch.Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_listed(axes)))


@operator("Unsqueeze", known="axes")
def unsqueeze(x: torch.Tensor, axes: Any) -> torch.Tensor:
    rank = x.dim() + len(_listed(axes))
    for axis in sorted(axis % rank for axis in _listed(axes)):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(*values: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.cat(values, axis)


@operator("Split", known="split", several=True)
def split(
    x: torch.Tensor, split: list[Any] | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int
) -> tuple[torch.Tensor, ...]:
    if split is None:
        each = (x.shape[axis] + outputs - 1) // outputs
        split = [each] * (outputs - 1)
        split.append(x.shape[axis] - each * (outputs - 1))
    return torch.split(x, split, axis)


@operator("Slice", known="starts ends axes steps")
def slice_(
    x: torch.Tensor, starts: list[Any], ends: list[Any], axes: list[int] | None = None, steps: list[int] | None = None
) -> torch.Tensor:
    axes, steps = list(range(len(starts))) if axes is None else axes, [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis % x.dim()
        if step < 0:
            if not isinstance(x.shape[axis], int):
                raise Refused("steps backwards over a free size")
            index = list(range(*slice(start, end, step).indices(x.shape[axis])))
            x = torch.index_select(x, axis, torch.tensor(index, dtype=torch.int64))
        else:
            x = x[(slice(None),) * axis + (slice(start, end, step),)]
    return x


@operator("Gather", numbers=True)
def gather(x: torch.Tensor, indices: Any, *, axis: int = 0) -> torch.Tensor:
    axis = axis % x.dim()
    if isinstance(indices, list):
        indices = sizes.tensor(indices)
    if not isinstance(indices, torch.Tensor):
        return x.select(axis, indices)
    return x[(slice(None),) * axis + (indices.long(),)]


@operator("GatherElements")
def gather_elements(x: torch.Tensor, indices: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    return torch.gather(x, axis, indices)


@operator("GatherND")
def gather_nd(x: torch.Tensor, indices: torch.Tensor, *, batch_dims: int = 0) -> torch.Tensor:
    """Indices [..., k] of the k dimensions behind those of the batch."""
    rank = indices.dim() - 1
    batch = [torch.arange(x.shape[d]).reshape(-1, *[1] * (rank - 1 - d)) for d in range(batch_dims)]
    return x[(*batch, *indices.long().unbind(-1))]


@operator("ScatterND")
def scatter_nd(
    x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, reduction: str = "none"
) -> torch.Tensor:
    if reduction not in ("none", "add"):
        raise Refused(f"reduction {reduction}")
    return torch.index_put(x, indices.long().unbind(-1), updates, accumulate=reduction == "add")


@operator("ScatterElements")
def scatter_elements(
    x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, axis: int = 0, reduction: str = "none"
) -> torch.Tensor:
    indices = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    if reduction == "none":
        return torch.scatter(x, axis, indices, updates)
    ways = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    if reduction not in ways:
        raise Refused(f"reduction {reduction}")
    return torch.scatter_reduce(x, axis, indices, updates, ways[reduction])


@operator("OneHot", known="depth")
def one_hot(indices: torch.Tensor, depth: Any, values: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    """`values` are off and on."""
    count = int(_listed(depth)[0])
    bounded([count, *indices.shape])
    axis = axis % (indices.dim() + 1)
    places = torch.arange(count).reshape(-1, *[1] * (indices.dim() - axis))
    wanted = torch.where(indices < 0, indices + count, indices).unsqueeze(axis)
    return torch.where(wanted == places, values[1], values[0])


@operator("Expand", known="shape")
def expand(x: torch.Tensor, shape: list[Any]) -> torch.Tensor:
    rank = max(x.dim(), len(shape))
    old, new = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(shape)) + list(shape)
    return x.expand(bounded([size if wanted == 1 else wanted for size, wanted in zip(old, new, strict=True)]))


@operator("Tile", known="repeats")
def tile(x: torch.Tensor, repeats: list[Any]) -> torch.Tensor:
    bounded([size * count for size, count in zip(x.shape, repeats, strict=True)])
    return x.repeat(repeats)


@operator("DepthToSpace")
def depth_to_space(x: torch.Tensor, *, blocksize: int, mode: str = "DCR") -> torch.Tensor:
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    y = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@operator("SpaceToDepth")
def space_to_depth(x: torch.Tensor, *, blocksize: int) -> torch.Tensor:
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@operator("Trilu", known="k")
def triangle(x: torch.Tensor, k: Any = 0, *, upper: int = 1) -> torch.Tensor:
    return (torch.triu if upper else torch.tril)(x, _listed(k)[0])


@operator("Range", known="start limit delta")
def range_(start: Any, limit: Any, delta: Any) -> torch.Tensor:
    if all(isinstance(value, (int, float)) for value in (start, limit, delta)):
        bounded([math.ceil((limit - start) / delta)])
    real = any(isinstance(value, (float, torch.SymFloat)) for value in (start, limit, delta))
    return torch.arange(start, limit, delta, dtype=torch.float32 if real else torch.int64)


@operator("ConstantOfShape", known="shape")
def constant_of_shape(shape: list[Any], *, value: Any, dtype: torch.dtype) -> torch.Tensor:
    """The reader has taken the number out of the file's tensor."""
    return torch.full(bounded(shape), value, dtype=dtype)


@operator("Pad", known="pads value axes")
def pad(
    x: torch.Tensor, pads: list[Any], value: Any = None, axes: list[int] | None = None, *, mode: str = "constant"
) -> Any:
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    count = len(axes)
    sides = {axis: (pads[i], pads[i + count]) for i, axis in enumerate(axes)}
    first = min((axis for axis, pair in sides.items() if pair != (0, 0)), default=x.dim())
    flat = [side for axis in range(x.dim() - 1, first - 1, -1) for side in sides.get(axis, (0, 0))]
    if not flat:
        return x
    if mode == "constant":
        return F.pad(x, flat, value=_listed(value)[0] if value is not None else 0)
    modes = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in modes:
        raise Refused(f"mode {mode}")
    flat += [0] * (2 * (x.dim() - 2) - len(flat))  # torch pads all dimensions of an image or none
    if len(flat) in (2 * x.dim() - 4, 2 * x.dim() - 2) and 2 <= len(flat) <= 6 and min(flat) >= 0:
        return F.pad(x, flat, mode=modes[mode])
    for axis, (before, after) in sides.items():
        if (before, after) != (0, 0):
            x = torch.index_select(x, axis, _outside(x.shape[axis], before, after, mode))
    return x


def _outside(size: Any, before: int, after: int, mode: str) -> torch.Tensor:
    """The elements of a dimension with those that stand for the ones beyond its ends."""
    if not isinstance(size, int):
        raise Refused(f"mode {mode} of a free size")
    bounded([before + size + after])
    i, turn = np.arange(-before, size + after), max(2 * size - 2, 1)  # a reflection comes back
    found = {
        "edge": lambda: i.clip(0, size - 1),
        "reflect": lambda: np.minimum(i % turn, turn - i % turn) if size > 1 else i * 0,
        "wrap": lambda: i % size,
    }[mode]()
    return torch.tensor(found, dtype=torch.int64)


@operator("GridSample")
def grid_sample(
    x: torch.Tensor, grid: torch.Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> torch.Tensor:
    modes = {"linear": "bilinear", "cubic": "bicubic"}  # named so since opset 20
    return F.grid_sample(x, grid, modes.get(mode, mode), padding_mode, bool(align_corners))
