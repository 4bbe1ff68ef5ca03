"""Transposed convolutions as ordinary ones: each phase of the stride is a convolution of the input with its own taps.

Output ``q * s + r - padding`` of a transposed convolution with stride ``s`` is a sum over ``x[q - t]`` with the taps
``r + t * s`` of the kernel. So one convolution with ``ceil(k / s)`` taps computes all phases ``r`` as channels, and
`pykernels.interleave` puts them in their places. Activations follow the convolution, which takes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pykernels.graph.nodes import arguments, aten, constant, facts, is_call, only_user, replace, set_constant
from pykernels.ops._sizes import spread
from pykernels.ops.dtypes import REALS
from pykernels.ops.names import BY_ATEN

__all__ = ["untranspose"]


def untranspose(module: fx.GraphModule) -> None:
    """Rewrite the transposed convolutions of images whose weights and geometry are constant."""
    for node in list(module.graph.nodes):
        if is_call(node, "aten.conv_transpose2d"):
            _rewrite(module, node)


def _rewrite(module: fx.GraphModule, node: fx.Node) -> None:
    values, known, given = arguments(node), facts(node), facts(node.args[0])
    weight = constant(module, values["weight"])
    bias = None if values["bias"] is None else constant(module, values["bias"])
    if weight is None or known is None or given is None or len(given.shape) != 4 or known.dtype not in REALS:
        return
    if values["bias"] is not None and bias is None:
        return
    sizes = [spread(values[name]) for name in ("stride", "padding", "output_padding", "dilation")]
    if not all(isinstance(size, int) for pair in sizes for size in pair) or max(sizes[0]) > 64:
        return
    stride, padding, output_padding, dilation = sizes
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    taps = [-(-k // s) for k, s in zip(reach, stride, strict=True)]
    # Of each direction: zeros before and behind the input, and what is cut off before and behind the result.
    before = [t - 1 - p // s for t, p, s in zip(taps, padding, stride, strict=True)]
    beyond = [k + extra - p for k, extra, p in zip(reach, output_padding, padding, strict=True)]
    behind = [(rest - 1) // s for rest, s in zip(beyond, stride, strict=True)]
    if min(*before, *behind) < 0:
        return
    (top, left), (bottom, right) = (
        [p % s for p, s in zip(padding, stride, strict=True)],
        [(b + 1) * s - rest for b, rest, s in zip(behind, beyond, stride, strict=True)],
    )
    groups = int(values["groups"])
    graph, source = module.graph, values["input"]
    pad = before if before == behind else [0, 0]
    if before != behind:
        with graph.inserting_before(node):
            source = graph.call_function(
                aten.constant_pad_nd.default, (source, [before[1], behind[1], before[0], behind[0]], 0)
            )
        source.meta = _origin(node)
    new = [set_constant(module, node, _phases(weight, dilation, stride, groups), node.name + "_weight"), None]
    if bias is not None:
        each = bias.view(groups, 1, -1).expand(groups, stride[0] * stride[1], -1).reshape(-1)
        new[1] = set_constant(module, node, each, node.name + "_bias")
    node.meta = {**_origin(node), "spelled": "conv_transpose2d"}
    replace(node, aten.conv2d.default, (source, *new, [1, 1], pad, [1, 1], groups))
    if stride == [1, 1] and [left, right, top, bottom] == [0] * 4:
        return
    last, user = node, only_user(node)
    if user is not None and str(getattr(user.target, "overloadpacket", "")) in BY_ATEN:
        last = user
    with graph.inserting_after(last):
        placed = graph.call_function(
            torch.ops.pykernels.interleave.default, (last, stride, [left, right, top, bottom], groups)
        )
    last.replace_all_uses_with(placed, delete_user_cb=lambda reader: reader is not placed)
    placed.meta = {key: value for key, value in _origin(last).items() if key != "spelled"}
    last.meta = _origin(last)


def _phases(weight: torch.Tensor, dilation: list[int], stride: list[int], groups: int) -> torch.Tensor:
    """[C, O / g, kh, kw] of a transposed convolution -> [g * sh * sw * O / g, C / g, th, tw] of an ordinary one."""
    ins, outs, *kernel = weight.shape
    taps = [-(-(d * (k - 1) + 1) // s) for d, k, s in zip(dilation, kernel, stride, strict=True)]
    spaced = weight.new_zeros(ins, outs, taps[0] * stride[0], taps[1] * stride[1])
    (dy, dx), (kh, kw) = dilation, kernel
    spaced[:, :, : dy * (kh - 1) + 1 : dy, : dx * (kw - 1) + 1 : dx] = weight
    parts = spaced.view(groups, ins // groups, outs, taps[0], stride[0], taps[1], stride[1]).flip(3, 5)
    return parts.permute(0, 4, 6, 2, 1, 3, 5).reshape(-1, ins // groups, *taps).contiguous()


def _origin(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key != "val"}
