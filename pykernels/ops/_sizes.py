"""Sizes as torch's layers take them, one number for every dimension or one for each, and layouts of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["layout", "spread"]


def spread(value: int | Sequence[int], count: int = 2) -> list[int]:
    """`value` for each of `count` dimensions; a sequence of one stands for its number, a longer one for itself."""
    values = [value] if isinstance(value, (int, torch.SymInt)) else list(value)
    return values * count if len(values) == 1 else values


def layout(x: torch.Tensor) -> torch.memory_format:
    """channels_last, or contiguous, which wins where the strides fit both: what an op makes of images that lie like
    `x`."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
