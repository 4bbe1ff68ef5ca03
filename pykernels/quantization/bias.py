"""Biases that bring a quantized layer nearest to what the fp32 network computes.

Bias correction after Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction": each
output channel is moved to where it comes nearest to the fp32 network's over the calibration samples, after the
activation that follows: below a ReLU nobody sees what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from pykernels.graph.nodes import argument, constant, is_call, only_user
from pykernels.network.match import CURVES

__all__ = ["add_to_bias", "bias_shift", "curve_behind"]


def bias_shift(
    exact: list[torch.Tensor], inexact: list[torch.Tensor], channel: int, curve: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What must be added to each channel of `inexact` for `curve` of it to be nearest to that of `exact`.

    One step of Gauss and Newton: of a sum sum_i (f(a_i) - f(b_i + s))^2 it is the mean of the differences, each counted
    by how much f changes there. Samples differ, so a mean of few is off by chance; correcting that would add the chance
    of these samples to all others: the part of its square that its own variance explains is taken off (positive-part
    James-Stein).
    """
    gains, sizes = [], []
    for a, b in zip(exact, inexact, strict=True):
        value = curve(b)
        step = 1e-3 * b.square().mean().sqrt().clamp_min(1e-20)
        slope = (curve(b + step) - value) / step
        gain, size = slope * (curve(a) - value), slope.square()
        rows = (0, channel % a.ndim)
        others = [d for d in range(a.ndim) if d not in rows]
        gains.append(gain.double().sum(others) if others else gain.double())
        sizes.append(size.double().sum(others) if others else size.double())
    gain, size = torch.cat(gains), torch.cat(sizes)  # [samples, channels]
    total = size.sum(0).clamp_min(1e-300)
    shift = gain.sum(0) / total
    chance = ((gain - shift * size) / total).square().sum(0) * len(gain) / max(len(gain) - 1, 1)
    return (shift * (1 - chance / shift.square().clamp_min(1e-300)).clamp_min(0.0)).float()


def curve_behind(node: Node) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of one tensor that alone reads a layer, else the identity."""
    user = only_user(node)
    if user is None or not is_call(user, *CURVES) or user.all_input_nodes != [node]:
        return lambda x: x
    return lambda x: user.target(x, *user.args[1:], **user.kwargs)


def add_to_bias(model: GraphModule, node: Node, shift: torch.Tensor) -> None:
    """Give a layer a constant bias, higher by `shift` [channels] than the one that it has."""
    bias = constant(model, argument(node, "bias"))
    name = f"{node.name}_corrected_bias"
    model.register_buffer(name, shift if bias is None else bias + shift)
    with model.graph.inserting_before(node):
        corrected = model.graph.get_attr(name)
    old = node.args[2] if len(node.args) > 2 else None
    corrected.meta = dict(old.meta) if isinstance(old, Node) else {}
    node.args = (*node.args[:2], corrected, *node.args[3:])
    if isinstance(old, Node) and not old.users:
        model.graph.erase_node(old)
