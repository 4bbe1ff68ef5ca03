"""Weights to int8."""

from __future__ import annotations

import torch


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric s8 per output channel (dimension 0): q in [-127, 127] and fp32 scale [channels], w ~ q * scale."""
    weight = weight.float()
    extreme = weight.flatten(1).abs().amax(1) if weight.numel() else weight.new_zeros(weight.shape[0])
    scale = (extreme / 127).clamp_min(torch.finfo(torch.float32).tiny * 2**20)  # its reciprocal is finite
    column = scale.view(-1, *[1] * (weight.dim() - 1))
    return torch.round(weight / column).clamp(-127, 127).to(torch.int8), scale
