"""Which ATen calls of an exported graph our int8 kernels can run, and in which role.

The tables are the quantizer's whole knowledge of ATen. A call plays one of these roles:

* *heavy*: convolution or linear, the reason to quantize at all;
* *activation*: fused behind a heavy call when :func:`fusable_activation` names it, else one table lookup;
* *arithmetic*: add, mul, cat and average pooling, which read and write int8 with scales of their own;
* *pass-through*: moves or selects values without changing them, so its output keeps its input's scale.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

aten = torch.ops.aten

CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding})
LINEARS = frozenset({aten.linear.default})
HEAVY = CONVOLUTIONS | LINEARS

BATCH_NORMS = frozenset({aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default})

# In-place call -> its functional twin; the first argument is the tensor written to.
FUNCTIONAL = {
    aten.relu_.default: aten.relu.default,
    aten.relu6_.default: aten.relu6.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.silu_.default: aten.silu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.tanh_.default: aten.tanh.default,
    aten.gelu_.default: aten.gelu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.mish_.default: aten.mish.default,
    aten.clamp_.default: aten.clamp.default,
    aten.clamp_min_.default: aten.clamp_min.default,
    aten.clamp_max_.default: aten.clamp_max.default,
    aten.dropout_.default: aten.dropout.default,
    aten.feature_dropout_.default: aten.feature_dropout.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
}

DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})

# Functions of one number at a time: on int8 each is a 256-entry table.
ELEMENTWISE = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.silu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.gelu.default,
        aten.leaky_relu.default,
        aten.elu.default,
        aten.mish.default,
        aten.softplus.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
    }
)

MAX_POOLS = frozenset({aten.max_pool2d.default})
AVERAGE_POOLS = frozenset({aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default})

# Calls whose result may share its input's memory.
VIEWS = frozenset(
    {
        aten.flatten.using_ints,
        aten.view.default,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.permute.default,
        aten.transpose.int,
        aten.contiguous.default,
        aten.alias.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
    }
)

# Calls that copy, reorder or select values: exact on the int8 bytes themselves.
PASS_THROUGH = (
    VIEWS
    | MAX_POOLS
    | frozenset(
        {
            aten.clone.default,
            aten.flip.default,
            aten.pixel_shuffle.default,
            aten.pixel_unshuffle.default,
            aten.channel_shuffle.default,
            aten.upsample_nearest2d.default,
            aten.upsample_nearest2d.vec,
        }
    )
)

# Calls that return several pieces of their input, read through ``getitem``.
SPLITS = frozenset(
    {aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.unbind.int}
)


def is_call(node: object, targets: frozenset[object]) -> bool:
    """True for an ``fx.Node`` that calls one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def argument(node: Node, index: int, name: str, default: object = None) -> object:
    """The argument of a call given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def fusable_activation(node: Node) -> str | None:
    """The kernels' name of the activation that ``node`` computes, or None when it must be a table lookup."""
    target = node.target
    if target in (aten.relu6.default,):
        return "relu6"
    if target in (aten.hardtanh.default, aten.clamp.default):
        default = (-1.0, 1.0) if target is aten.hardtanh.default else (None, None)
        names = ("min_val", "max_val") if target is aten.hardtanh.default else ("min", "max")
        low, high = (argument(node, 1 + i, names[i], default[i]) for i in range(2))
        return {(0, 6): "relu6", (0, None): "relu"}.get((low, high))
    if target is aten.clamp_min.default:
        return "relu" if argument(node, 1, "min") == 0 else None
    if target is aten.gelu.default:
        return "gelu" if argument(node, 1, "approximate", "none") == "none" else None
    return {
        aten.relu.default: "relu",
        aten.hardswish.default: "hardswish",
        aten.hardsigmoid.default: "hardsigmoid",
        aten.silu.default: "silu",
        aten.sigmoid.default: "sigmoid",
        aten.tanh.default: "tanh",
    }.get(target)


def is_global_mean(node: Node) -> bool:
    """``x.mean((2, 3))`` of a 4-D tensor, with or without ``keepdim``: global average pooling."""
    if not is_call(node, frozenset({aten.mean.dim})):
        return False
    shape = shape_of(node.args[0])
    dims = argument(node, 1, "dim")
    if shape is None or len(shape) != 4 or not isinstance(dims, list | tuple):
        return False
    return sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]


def is_zero_pad(node: Node) -> bool:
    """Constant padding with 0, which int8 holds exactly (the zero point)."""
    if is_call(node, frozenset({aten.constant_pad_nd.default})):
        return argument(node, 2, "value", 0) == 0
    if is_call(node, frozenset({aten.pad.default})):
        return argument(node, 2, "mode", "constant") == "constant" and argument(node, 3, "value") in (None, 0)
    return False


def is_pass_through(node: Node) -> bool:
    """True when the output holds only values of the input (or exact zeros)."""
    if is_call(node, frozenset({operator.getitem})):
        return is_call(node.args[0], SPLITS)
    return is_call(node, PASS_THROUGH) or is_zero_pad(node)


def is_view(node: Node) -> bool:
    """True when the result may be a view of the first argument."""
    if is_call(node, frozenset({operator.getitem})):
        return is_call(node.args[0], SPLITS)
    return is_call(node, VIEWS | SPLITS)


def is_average(node: Node) -> bool:
    """Average pooling of a 4-D tensor in any of its spellings."""
    if is_call(node, AVERAGE_POOLS):
        shape = shape_of(node.args[0])
        return shape is not None and len(shape) == 4
    return is_global_mean(node)


def shape_of(value: object) -> tuple[object, ...] | None:
    """The (possibly symbolic) shape that export recorded for a node, or None."""
    recorded = value.meta.get("val") if isinstance(value, Node) else None
    return tuple(recorded.shape) if isinstance(recorded, torch.Tensor) else None


def same_shape(a: object, b: object) -> bool:
    """True when two nodes surely have the same shape; symbolic sizes must be the same expression."""
    first, second = shape_of(a), shape_of(b)
    return first is not None and second is not None and [str(s) for s in first] == [str(s) for s in second]


def is_channel_gate(gate: object, gated: object) -> bool:
    """``gate`` [N, C, 1, 1] against ``gated`` [N, C, H, W]: squeeze-and-excitation's multiplication."""
    small, large = shape_of(gate), shape_of(gated)
    if small is None or large is None or len(small) != 4 or len(large) != 4:
        return False
    return [str(s) for s in small] == [str(large[0]), str(large[1]), "1", "1"]


def is_float_tensor(value: object) -> bool:
    """True when a node carries a fp32 tensor."""
    recorded = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(recorded, torch.Tensor) and recorded.dtype == torch.float32
