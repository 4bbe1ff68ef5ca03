"""attention in fp32, rounded once."""

from __future__ import annotations

import math

import torch

__all__ = ["attention"]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    share = query.shape[1] // max(key.shape[1], 1)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    keys, values = (t.float().repeat_interleave(share, 1) for t in (key, value))
    scores = query.float() * scale @ keys.transpose(2, 3)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        left_out = mask.dtype in (torch.bool, torch.uint8)
        scores = scores.masked_fill(mask == 0, -math.inf) if left_out else scores + mask.float()
    weights = torch.softmax(scores, 3).masked_fill((scores == -math.inf).all(3, keepdim=True), 0.0)
    return (weights @ values).to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
