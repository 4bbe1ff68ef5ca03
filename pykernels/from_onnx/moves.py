"""ONNX's operators that move elements, and that make tensors of sizes."""

from __future__ import annotations

import math
from typing import Any

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
def constant_of_shape(shape: list[Any], *, value: torch.Tensor | None = None) -> torch.Tensor:
    number, dtype = (0.0, torch.float32) if value is None else (value.reshape(-1)[0].item(), value.dtype)
    return torch.full(bounded(shape), number, dtype=dtype)


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
    if mode not in modes or first < 2:
        raise Refused(f"mode {mode} of dimensions {sorted(sides)}")
    return F.pad(x, flat, mode=modes[mode])


@operator("Resize", known="roi scales sizes")
def resize(
    x: torch.Tensor,
    roi: Any = None,
    scales: list[float] | None = None,
    sizes: list[Any] | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> torch.Tensor:
    """Images and lines, by the ways that torch has, too."""
    rank, given = x.dim(), scales if scales else sizes
    if given is None or keep_aspect_ratio_policy != "stretch" or exclude_outside:
        raise Refused("keep_aspect_ratio_policy, exclude_outside, or neither scales nor sizes")
    axes = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    wanted: list[Any] = [1.0] * rank if scales else list(x.shape)
    for axis, number in zip(axes, given, strict=True):
        wanted[axis] = number
    if any(a != b for a, b in zip(wanted[:2], [1.0, 1.0] if scales else x.shape[:2], strict=True)):
        raise Refused("batch or channels are resized")
    way = coordinate_transformation_mode
    half = way == "half_pixel" or (way == "pytorch_half_pixel" and (scales or all(size != 1 for size in wanted[2:])))
    how: dict[str, Any] = {"scale_factor": wanted[2:]} if scales else {"size": wanted[2:]}
    if mode == "nearest" and _as_torch_rounds(way, nearest_mode, wanted[2:] if scales else None):
        return F.interpolate(x, mode="nearest", **how)
    if mode == "nearest" and half and nearest_mode == "round_prefer_ceil":
        return F.interpolate(x, mode="nearest-exact", **how)
    names = {"linear": {3: "linear", 4: "bilinear", 5: "trilinear"}, "cubic": {4: "bicubic"}}.get(mode, {})
    if rank in names and (half or way == "align_corners") and cubic_coeff_a == -0.75:
        flags = {"align_corners": way == "align_corners", "antialias": bool(antialias)}
        return F.interpolate(x, mode=names[rank], **flags, **how)
    raise Refused(f"mode {mode}, {way}, {nearest_mode} of {rank} dimensions")


def _as_torch_rounds(way: str, nearest_mode: str, scales: list[float] | None) -> bool:
    """Whether the nearest element is ``floor(i / scale)``."""
    if way == "asymmetric" and nearest_mode == "floor":
        return True
    if scales is None or any(scale != int(scale) for scale in scales):
        return False
    if way in ("half_pixel", "pytorch_half_pixel"):
        return nearest_mode in ("round_prefer_floor", "round_prefer_ceil")
    return way == "asymmetric" and nearest_mode == "round_prefer_floor" and max(scales) <= 2
