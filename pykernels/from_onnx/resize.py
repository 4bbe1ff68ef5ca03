"""ONNX's Resize: torch's interpolation where the two agree, else axis by axis with indices and weights of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pykernels.from_onnx.moves import bounded
from pykernels.from_onnx.table import Refused, operator

__all__ = ["resize"]

Array = npt.NDArray[Any]


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
    rank, given = x.dim(), scales if scales else sizes
    if given is None or keep_aspect_ratio_policy != "stretch":
        raise Refused("keep_aspect_ratio_policy, or neither scales nor sizes")
    axes = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    wanted: list[Any] = [1.0] * rank if scales else list(x.shape)
    for axis, number in zip(axes, given, strict=True):
        wanted[axis] = number
    kept = [1.0] * rank if scales else list(x.shape)
    changed = [axis for axis in range(rank) if wanted[axis] != kept[axis]]
    way = coordinate_transformation_mode
    if way == "tf_crop_and_resize":
        raise Refused(f"coordinate_transformation_mode {way}")
    if changed and changed[0] > 1:
        how: dict[str, Any] = {"scale_factor": wanted[2:]} if scales else {"size": wanted[2:]}
        half = way == "half_pixel" or (way == "pytorch_half_pixel" and (scales or all(n != 1 for n in wanted[2:])))
        if mode == "nearest" and _as_torch_rounds(way, nearest_mode, _factors(x, scales, wanted)):
            return F.interpolate(x, mode="nearest", **how)
        if mode == "nearest" and half and nearest_mode == "round_prefer_ceil":
            return F.interpolate(x, mode="nearest-exact", **how)
        names = {"linear": {3: "linear", 4: "bilinear", 5: "trilinear"}, "cubic": {4: "bicubic"}}.get(mode, {})
        plain = cubic_coeff_a == -0.75 and not exclude_outside
        if rank in names and (half or way == "align_corners") and plain:
            flags = {"align_corners": way == "align_corners", "antialias": bool(antialias)}
            return F.interpolate(x, mode=names[rank], **flags, **how)
    if antialias:
        raise Refused(f"antialias of mode {mode}, {way}")
    for axis in changed:
        x = _along(x, axis, wanted[axis], bool(scales), way, (mode, nearest_mode, cubic_coeff_a, bool(exclude_outside)))
    return x


def _factors(x: torch.Tensor, scales: list[float] | None, wanted: list[Any]) -> list[Any] | None:
    """How many times larger each dimension becomes, where that is known and no fraction."""
    if scales:
        found = wanted[2:]
    elif all(isinstance(size, int) for size in (*x.shape[2:], *wanted[2:])):
        found = [after / before for before, after in zip(x.shape[2:], wanted[2:], strict=True)]
    else:
        return None
    return found if all(factor == int(factor) for factor in found) else None


def _as_torch_rounds(way: str, nearest_mode: str, factors: list[Any] | None) -> bool:
    """Whether the nearest element is ``floor(i / scale)``."""
    if way == "asymmetric" and nearest_mode == "floor":
        return True
    if factors is None:
        return False
    if way in ("half_pixel", "pytorch_half_pixel"):
        return nearest_mode in ("round_prefer_floor", "round_prefer_ceil")
    if way == "tf_half_pixel_for_nn":
        return nearest_mode == "floor"
    return way == "asymmetric" and nearest_mode == "round_prefer_floor" and max(factors) <= 2


def _along(
    x: torch.Tensor, axis: int, wanted: Any, scaled: bool, way: str, how: tuple[str, str, float, bool]
) -> torch.Tensor:
    """One dimension resized: each element is a sum of weighted ones."""
    before = x.shape[axis]
    if not isinstance(before, int) or not isinstance(wanted, (int, float)):
        raise Refused(f"mode {how[0]}, {way}, {how[1]} of a free size")
    after = math.floor(before * wanted) if scaled else int(wanted)
    bounded([size for size in (*x.shape[:axis], after, *x.shape[axis + 1 :]) if isinstance(size, int)])
    places = _places(way, before, after, wanted if scaled else after / before)
    y: Any = None
    for index, weight in _taps(places, before, *how):
        part = torch.index_select(x, axis, torch.tensor(index.astype(np.int64)))
        if weight is not None:
            part = part * torch.tensor(weight, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1 - axis))
        y = part if y is None else y + part
    return y


# In NumPy: constants of the network, whatever traces it.


def _places(way: str, before: int, after: int, scale: float) -> Array:
    """Where in the input each element of the output lies, as ONNX's document of Resize has it."""
    i = np.arange(after, dtype=np.float32)
    if way in ("half_pixel", "half_pixel_symmetric") or (way == "pytorch_half_pixel" and after > 1):
        shift = before / 2 * (1 - after / (scale * before)) if way == "half_pixel_symmetric" else 0.0
        return (i + np.float32(0.5)) / np.float32(scale) - np.float32(0.5 - shift)
    if way == "align_corners":
        return i * np.float32((before - 1) / max(after - 1, 1))
    if way == "tf_half_pixel_for_nn":
        return (i + np.float32(0.5)) / np.float32(scale)
    if way == "pytorch_half_pixel":
        return np.zeros_like(i)
    if way == "asymmetric":
        return i / np.float32(scale)
    raise Refused(f"coordinate_transformation_mode {way}")


def _taps(
    places: Array, size: int, mode: str, nearest_mode: str, a: float, exclude_outside: bool
) -> list[tuple[Array, Array | None]]:
    """Which elements each place reads, and their weights."""
    if mode == "nearest":
        if nearest_mode not in _ROUNDED:
            raise Refused(f"nearest_mode {nearest_mode}")
        return [(_ROUNDED[nearest_mode](places).clip(0, size - 1), None)]
    if mode == "linear":
        places = places.clip(0, size - 1)
    first = np.floor(places)
    rest = places - first
    if mode == "linear":
        found = [(0, 1 - rest), (1, rest)]
    elif mode == "cubic":
        found = [(k, _cubic(np.abs(rest - k), a)) for k in (-1, 0, 1, 2)]
    else:
        raise Refused(f"mode {mode}")
    if exclude_outside:
        found = [(k, np.where((first + k < 0) | (first + k >= size), 0, weight)) for k, weight in found]
        total = np.sum([weight for _, weight in found], 0)
        found = [(k, weight / total) for k, weight in found]
    return [((first + k).clip(0, size - 1), weight) for k, weight in found]


_ROUNDED: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda places: np.ceil(places - np.float32(0.5)),
    "round_prefer_ceil": lambda places: np.floor(places + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _cubic(distance: Array, a: float) -> Array:
    """The kernel of cubic convolution; `a` is its slope at 1."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
