"""Structured pruning to a latency: channels and residual blocks are removed by what they cost on our kernels."""

from __future__ import annotations

from .prune import Pruned, prune
from .recipe import Recipe
from .report import Report

__all__ = ["Pruned", "Recipe", "Report", "prune"]
