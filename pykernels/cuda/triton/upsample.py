"""upsample_nearest2d, upsample_bilinear2d and interleave, see pykernels/ops/upsample.py.

No kernels of ours yet: torch's indexing and copies, by the CPU's indices and in its order of operations, so that the
bits are the CPU's.
"""

from __future__ import annotations

import torch

from pykernels.cuda.triton.arguments import BYTES, check_pair, name
from pykernels.cuda.triton.tiles import check
from pykernels.ops._sizes import layout
from pykernels.ops.dtypes import ANY_WORDS, REALS

__all__ = ["interleave", "upsample_bilinear2d", "upsample_nearest2d"]


def _check_image(op: str, x: torch.Tensor) -> None:
    check(x.dtype in (*REALS, *BYTES), op, f"x must be {ANY_WORDS}, not {name(x.dtype)}")
    check(x.dim() == 4, op, f"x must have 4 dimensions, not shape {list(x.shape)}")


def _sizes(op: str, x: torch.Tensor, size: list[int], factors: list[float]) -> list[int]:
    check(bool(size) != bool(factors), op, "either output_size or scale_factors must be given, and not both")
    check(len(size) in (0, 2), op, f"output_size must have 2 numbers, not {len(size)}")
    check(len(factors) in (0, 2), op, f"scale_factors must have 2 numbers, not {len(factors)}")
    found = []
    for d in (0, 1):
        here = x.shape[2 + d]
        check(0 < here <= 2**24, op, f"the height and width of x must lie in [1, 2^24], not {here}")
        wanted = size[d] if size else here * factors[d]
        words = "the height and width of the result must lie in [1, 2^24], not"
        check(1 <= wanted < 2**24 + 1, op, f"{words} {wanted:g}")
        found.append(int(wanted))
    return found


def _places(x: torch.Tensor, out: int) -> torch.Tensor:
    return torch.arange(out, device=x.device, dtype=torch.float32)


def _ratio(size: int, out: int, factor: float | None) -> float:
    """In fp32."""
    exact = torch.tensor(size, dtype=torch.float32) / out if factor is None else torch.tensor(1 / factor)
    return float(exact.float())


def upsample_nearest2d(x: torch.Tensor, output_size: list[int], scale_factors: list[float]) -> torch.Tensor:
    op = "upsample_nearest2d"
    _check_image(op, x)
    y, wanted = x, _sizes(op, x, output_size, scale_factors)
    for d, out in enumerate(wanted):
        size, factor = x.shape[2 + d], scale_factors[d] if scale_factors else None
        ratio = size / out if out in (size, 2 * size) else _ratio(size, out, factor)
        places = (_places(x, out) * ratio).floor().long().clamp(0, size - 1)
        y = y.index_select(2 + d, places)
    return y.contiguous(memory_format=layout(x))


def upsample_bilinear2d(
    x: torch.Tensor, output_size: list[int], align_corners: bool, scale_factors: list[float]
) -> torch.Tensor:
    op = "upsample_bilinear2d"
    _check_image(op, x)
    taps = []
    for d, out in enumerate(_sizes(op, x, output_size, scale_factors)):
        size, factor = x.shape[2 + d], scale_factors[d] if scale_factors else None
        places = _places(x, out)
        if align_corners:
            places = places * (_ratio(size - 1, out - 1, None) if out > 1 else 0.0)
        elif out != size:
            places = (places.add(0.5).mul(_ratio(size, out, factor)).sub(0.5)).clamp(min=0.0)
        first = places.long().clamp(max=size - 1)
        weight = (places - first).clamp(0.0, 1.0)
        taps.append((first, (first + 1).clamp(max=size - 1), 1.0 - weight, weight))
    (top, bottom, t0, t1), (left, right, s0, s1) = taps
    rows = []
    for places in (top, bottom):
        row = x.index_select(2, places)
        first, second = row.index_select(3, left).float() * s0, row.index_select(3, right).float() * s1
        rows.append(first + second)
    y = rows[0] * t0[:, None] + rows[1] * t1[:, None]
    return (y if x.dtype in REALS else y.round()).to(x.dtype).contiguous(memory_format=layout(x))


def interleave(x: torch.Tensor, stride: list[int], crop: list[int], groups: int) -> torch.Tensor:
    op = "interleave"
    _check_image(op, x)
    check_pair(op, "stride", stride, 1)
    check(len(crop) == 4, op, f"crop must have 4 numbers, not {len(crop)}")
    for side in crop:
        check(0 <= side < 2**31, op, f"crop must lie in [0, 2^31), not {side}")
    (n, channels, h, w), (sh, sw) = x.shape, stride
    check(sh <= 64 and sw <= 64, op, "stride must be at most 64")
    fits = groups >= 1 and channels > 0 and channels % (sh * sw) == 0 and channels // (sh * sw) % groups == 0
    check(fits, op, f"x must have channels for {sh * sw} phases of {groups} groups, not {channels}")
    left, right, top, bottom = crop
    for size, step, cut in ((h, sh, top + bottom), (w, sw, left + right)):
        check(size * step >= cut, op, f"crop takes {cut} of {size} times {step}")
    each = channels // (sh * sw * groups)
    whole = x.new_empty((n, groups * each, h * sh, w * sw)).contiguous(memory_format=layout(x))
    phases = x.unflatten(1, (groups, sh, sw, each))
    for i in range(sh):
        for k in range(sw):
            whole[:, :, i::sh, k::sw] = phases[:, :, i, k].flatten(1, 2)
    return whole[:, :, top : h * sh - bottom, left : w * sw - right].contiguous(memory_format=layout(x))
