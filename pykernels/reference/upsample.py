"""upsample: neighbours by their indices, and blends of four in fp32, every step rounded."""

from __future__ import annotations

import torch


def _scale(size: int, out: int, factor: float | None) -> torch.Tensor:
    exact = 1.0 / factor if factor else None
    return torch.tensor(size, dtype=torch.float32) / out if exact is None else torch.tensor(exact, dtype=torch.float32)


def _sizes(x: torch.Tensor, size: list[int], factors: list[float]) -> list[tuple[int, int, float | None]]:
    """Of each direction the input's size, the output's, and the factor that was given."""
    wanted = size or [int(x.shape[2 + d] * factor) for d, factor in enumerate(factors)]
    return [(x.shape[2 + d], wanted[d], factors[d] if factors else None) for d in (0, 1)]


def _nearest(size: int, out: int, factor: float | None) -> torch.Tensor:
    place = torch.arange(out)
    if out in (size, 2 * size):
        return place // (out // size)
    return (place.float() * _scale(size, out, factor)).floor().long().clamp(0, size - 1)


def upsample_nearest2d(x: torch.Tensor, output_size: list[int], scale_factors: list[float]) -> torch.Tensor:
    rows, columns = (_nearest(*sizes) for sizes in _sizes(x, output_size, scale_factors))
    return x[:, :, rows][:, :, :, columns]


def _between(size: int, out: int, factor: float | None, align_corners: bool) -> tuple[torch.Tensor, ...]:
    """The places before and after, and the weights of both."""
    place = torch.arange(out, dtype=torch.float32)
    if align_corners:
        place = place * (torch.tensor(size - 1, dtype=torch.float32) / (out - 1) if out > 1 else 0.0)
    elif out != size:
        place = (_scale(size, out, factor) * (place + 0.5) - 0.5).clamp(min=0.0)
    first = place.long().clamp(max=size - 1)
    weight = (place - first.float()).clamp(0.0, 1.0)
    return first, (first + 1).clamp(max=size - 1), 1.0 - weight, weight


def upsample_bilinear2d(
    x: torch.Tensor, output_size: list[int], align_corners: bool, scale_factors: list[float]
) -> torch.Tensor:
    (top, bottom, t0, t1), (left, right, s0, s1) = (
        _between(*sizes, align_corners) for sizes in _sizes(x, output_size, scale_factors)
    )
    above, below = x[:, :, top].float(), x[:, :, bottom].float()
    above = s0 * above[..., left] + s1 * above[..., right]
    below = s0 * below[..., left] + s1 * below[..., right]
    y = t0[:, None] * above + t1[:, None] * below
    return (y if x.dtype.is_floating_point else torch.round(y)).to(x.dtype)


def interleave(x: torch.Tensor, stride: list[int], crop: list[int], groups: int) -> torch.Tensor:
    n, channels, h, w = x.shape
    phases = x.reshape(n, groups, *stride, channels // (groups * stride[0] * stride[1]), h, w)
    whole = phases.permute(0, 1, 4, 5, 2, 6, 3).reshape(n, -1, h * stride[0], w * stride[1])
    left, right, top, bottom = crop
    return whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]
