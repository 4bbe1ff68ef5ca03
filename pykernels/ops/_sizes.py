"""Sizes as torch's layers take them: one number for every dimension, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["spread"]


def spread(value: int | Sequence[int], count: int = 2) -> list[int]:
    """`value` for each of `count` dimensions; a sequence of one stands for its number, a longer one for itself."""
    values = [value] if isinstance(value, (int, torch.SymInt)) else list(value)
    return values * count if len(values) == 1 else values
