"""attention, see pykernels/ops/attention.py: ATen's kernels, which are good ones, behind our checks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pykernels.cuda.triton.arguments import check_device, check_real_dtype, name
from pykernels.cuda.triton.tiles import check

__all__ = ["attention"]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    op = "attention"
    for argument, t in (("query", query), ("key", key), ("value", value)):
        check_real_dtype(op, argument, t.dtype)
        check_device(op, argument, t, query)
        check(t.dim() == 4, op, f"{argument} must have 4 dimensions, not shape {list(t.shape)}")
        check(t.dtype == query.dtype, op, f"{argument} is {name(t.dtype)}, but query is {name(query.dtype)}")
        words = f"{argument} of shape {list(t.shape)} has not the images of query {list(query.shape)}"
        check(t.shape[0] == query.shape[0], op, words)
    (_, heads, _, depth), share = query.shape, key.shape[1]
    check(key.shape[3] == depth, op, f"key of shape {list(key.shape)} has not the depth of query {list(query.shape)}")
    words = f"value of shape {list(value.shape)} has not the heads and keys of key {list(key.shape)}"
    check(value.shape[1:3] == key.shape[1:3], op, words)
    fits = heads == share or (share > 0 and heads % share == 0)
    check(fits, op, f"query has {heads} heads, no multiple of key's {share}")
    check(mask is None or not causal, op, "causal and a mask exclude one another")
    if mask is not None:
        check_device(op, "mask", mask, query)
        left_out = mask.dtype in (torch.bool, torch.uint8)
        words = f"mask must be bool, uint8 or of query's dtype, not {name(mask.dtype)}"
        check(left_out or mask.dtype == query.dtype, op, words)
        spread = [*query.shape[:3], key.shape[2]]
        sizes = spread[4 - mask.dim() :] if 1 <= mask.dim() <= 4 else []
        fits = bool(sizes) and mask.shape[-1] == sizes[-1]
        fits = fits and all(size in (1, whole) for size, whole in zip(mask.shape, sizes, strict=True))
        words = f"mask of shape {list(mask.shape)} does not spread over {spread}, whose last size it must have"
        check(fits, op, words)
        mask = mask != 0 if left_out else mask
    y = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=heads != share
    )
    return y.transpose(1, 2).contiguous().transpose(1, 2)
