"""normalize: softmax and layer norm in fp32, rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.softmax(x.float(), dim).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
