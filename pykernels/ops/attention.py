"""Scaled dot product attention of real numbers, for inference."""

from __future__ import annotations

import torch

from pykernels.ops._register import fake

__all__ = ["attention"]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """``softmax(query @ key^T * scale + mask) @ value`` in fp32, rounded once; it has no gradient.

    Args:
        query: [N, H, T, D], float32, bfloat16 or float16, with any strides.
        key: [N, G, S, D] of query's dtype; H / G neighbouring heads of query share one of key's.
        value: [N, G, S, Dv] of query's dtype.
        mask: bool or uint8, where 0 leaves a key out, or of query's dtype, which is added; [S], [T, S], [H, T, S] or
            [N, H, T, S], where every size but S may be 1. A query without keys yields zeros.
        causal: query t sees keys 0 to t alone; not beside a mask.
        scale: ``1 / sqrt(D)`` without.

    Returns:
        [N, H, T, Dv] of query's dtype, in memory as [N, T, H, Dv].

    Raises:
        RuntimeError: an argument has a wrong shape or dtype; the message names it.
    """
    out: torch.Tensor = torch.ops.pykernels.attention(query, key, value, mask, causal, scale)
    return out


@fake("attention")
def _(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    images, heads, queries, _ = query.shape
    return query.new_empty((images, queries, heads, value.shape[3])).transpose(1, 2)
