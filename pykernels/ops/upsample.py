"""Images of other sizes: upsampling by neighbours or between them, and the phases of a transposed convolution.

``x`` [N, C, H, W] is float32, bfloat16, float16, uint8 or int8. The output has the layout of ``x``, channels_last or
contiguous (which wins where the strides fit both). 8-bit tensors keep their scale and zero point. None has a gradient.
Bad arguments raise ``RuntimeError`` with the argument's name. Results are the same bits on every isa.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.ops._register import fake
from pykernels.ops._sizes import layout, spread

__all__ = ["interleave", "upsample_bilinear2d", "upsample_nearest2d"]


def upsample_nearest2d(
    x: torch.Tensor, size: int | Sequence[int] | None = None, scale_factor: float | Sequence[float] | None = None
) -> torch.Tensor:
    """Each place has the value of its neighbour ``floor(place * H / size)``, as ``F.interpolate(mode="nearest")``.

    One of ``size`` (height, width) and ``scale_factor`` is given; a single number stands for both directions.
    """
    out: torch.Tensor = torch.ops.pykernels.upsample_nearest2d(x, *_wanted(size, scale_factor))
    return out


def upsample_bilinear2d(
    x: torch.Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
) -> torch.Tensor:
    """The four neighbours blended in fp32, as ``F.interpolate(mode="bilinear")``.

    Bytes are blended as they are, since weights add up to one, and rounded half to even: what is between two real
    numbers of one scale has that scale.
    """
    sizes, factors = _wanted(size, scale_factor)
    out: torch.Tensor = torch.ops.pykernels.upsample_bilinear2d(x, sizes, align_corners, factors)
    return out


def interleave(
    x: torch.Tensor, stride: int | Sequence[int], crop: Sequence[int] = (0, 0, 0, 0), groups: int = 1
) -> torch.Tensor:
    """What a convolution computed phase by phase, at the places of a transposed convolution of this stride.

    ``x`` [N, groups * sh * sw * C, H, W] holds phase ``(i, j)`` of channel ``c`` of group ``g`` in channel
    ``((g * sh + i) * sw + j) * C + c``; it goes to ``[n, g * C + c, y * sh + i, x * sw + j]`` of
    [N, groups * C, H * sh, W * sw], of which ``crop`` (left, right, top, bottom) is cut off.
    """
    out: torch.Tensor = torch.ops.pykernels.interleave(x, spread(stride), list(crop), groups)
    return out


def _wanted(size: int | Sequence[int] | None, factor: float | Sequence[float] | None) -> tuple[list[int], list[float]]:
    sizes = [] if size is None else spread(size)
    factors = [] if factor is None else [factor] * 2 if isinstance(factor, (int, float)) else list(factor)
    return sizes, [float(number) for number in factors]


# ---- shapes ----


def _resized(x: torch.Tensor, channels: int, size: Sequence[int]) -> torch.Tensor:
    return torch.empty((x.shape[0], channels, *size), dtype=x.dtype, device=x.device, memory_format=layout(x))


def _scaled(size: int, factor: float) -> int:
    return size * int(factor) if float(factor).is_integer() else torch.sym_int(size * factor)


@fake("upsample_nearest2d", "upsample_bilinear2d")
def _(x: torch.Tensor, output_size: list[int], scale_factors: list[float]) -> torch.Tensor:
    torch._check(x.dim() == 4, lambda: f"pykernels: x must have 4 dimensions, not shape {list(x.shape)}")
    size = output_size or [_scaled(x.shape[2 + d], factor) for d, factor in enumerate(scale_factors)]
    return _resized(x, x.shape[1], size)


@fake("interleave")
def _(x: torch.Tensor, stride: list[int], crop: list[int]) -> torch.Tensor:
    torch._check(x.dim() == 4, lambda: f"pykernels: x must have 4 dimensions, not shape {list(x.shape)}")
    size = [x.shape[2 + d] * stride[d] - crop[2 - 2 * d] - crop[3 - 2 * d] for d in (0, 1)]
    return _resized(x, x.shape[1] // (stride[0] * stride[1]), size)
