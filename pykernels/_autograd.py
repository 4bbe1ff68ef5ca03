"""Gradients of the float ops, written in aten so that they compile, export and differentiate again.

The int8 ops and the ops on packed weights are inference ops: they have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from pykernels.ops import _load

aten = torch.ops.aten


def activation_backward(name: str, grad: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The gradient at the argument `u` of the activation `name`, given the gradient at its value."""
    if name == "none":
        return grad
    if name == "relu":
        return aten.threshold_backward(grad, u, 0)
    if name == "relu6":
        return aten.hardtanh_backward(grad, u, 0.0, 6.0)
    if name == "hardswish":
        return aten.hardswish_backward(grad, u)
    if name == "hardsigmoid":
        return aten.hardsigmoid_backward(grad, u)
    if name == "silu":
        return aten.silu_backward(grad, u)
    if name == "gelu":
        return aten.gelu_backward(grad, u)
    if name == "sigmoid":
        return aten.sigmoid_backward(grad, torch.sigmoid(u))
    if name == "tanh":
        return aten.tanh_backward(grad, torch.tanh(u))
    raise ValueError(f"activation: '{name}' has no gradient here")


def _sum_to_channels(t: torch.Tensor) -> torch.Tensor:
    return t.sum((0, 2, 3))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, mean, var, gamma, beta, eps = inputs[:8]
    stride, padding, dilation, groups, activation, residual, order = inputs[8:]
    ctx.save_for_backward(x, weight, bias, mean, var, gamma, beta, residual if order == "before" else None)
    ctx.eps, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = eps, stride, padding, dilation, groups
    ctx.activation, ctx.residual_dtype = activation, None if residual is None else residual.dtype
    ctx.residual_after = order == "after"


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Of y = act(z * a + shift + r), z = conv(x, w) + b, a = gamma / sqrt(var + eps): z is computed again, not stored.

    Batch norm is the affine map of its fixed statistics, which get no gradient. Sums over pixels are in fp32.
    """
    x, weight, bias, mean, var, gamma, beta, residual = ctx.saved_tensors
    left, right, top, bottom = ctx.padding
    symmetric = left == right and top == bottom
    padded = x if symmetric else F.pad(x, [left, right, top, bottom])
    padding = [top, left] if symmetric else [0, 0]
    z = torch.convolution(padded, weight, bias, ctx.stride, padding, ctx.dilation, False, [0, 0], ctx.groups).float()

    column = (1, -1, 1, 1)
    inverse = torch.rsqrt(var.float() + ctx.eps)
    normal = (z - mean.float().view(column)) * inverse.view(column)
    u = normal
    if gamma is not None:
        u = u * gamma.float().view(column)
    if beta is not None:
        u = u + beta.float().view(column)
    if residual is not None:
        u = u + residual.float()
    grad_u = activation_backward(ctx.activation, grad.float(), u)

    given = len(ctx.needs_input_grad)  # the dispatcher leaves out trailing arguments that are at their defaults
    needs = (*ctx.needs_input_grad, *[False] * (15 - given))
    grad_gamma = _sum_to_channels(grad_u * normal).to(gamma.dtype) if needs[5] else None
    grad_beta = _sum_to_channels(grad_u).to(beta.dtype) if needs[6] else None
    grad_residual = None
    if needs[13]:
        grad_residual = (grad if ctx.residual_after else grad_u).to(ctx.residual_dtype)
    grad_x = grad_weight = grad_bias = None
    if needs[0] or needs[1] or needs[2]:
        scale = inverse if gamma is None else inverse * gamma.float()
        grad_z = grad_u * scale.view(column)
        if needs[2]:
            grad_bias = _sum_to_channels(grad_z).to(bias.dtype)
        if needs[0] or needs[1]:
            grad_x, grad_weight, _ = aten.convolution_backward(
                grad_z.to(x.dtype), padded, weight, None, ctx.stride, padding, ctx.dilation, False, [0, 0], ctx.groups,
                [needs[0], needs[1], False],
            )  # fmt: skip
            if grad_x is not None and not symmetric:
                grad_x = grad_x[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    gradients = (grad_x, grad_weight, grad_bias, None, None, grad_gamma, grad_beta, *[None] * 6, grad_residual, None)
    return gradients[:given]


def with_gradient(op: str, backward: Any, setup: Any) -> None:
    """Give the op of the CPU library a gradient; nothing when the library is not there."""
    if _load.CPU_ERROR is None:
        torch.library.register_autograd(f"pykernels::{op}", backward, setup_context=setup)


with_gradient("conv_bn_act", _backward, _setup)

# ---- pool ----
# The ops that return no indices save none: their gradient finds them again, at the cost of one more forward pass.


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.x_arguments = inputs[1:]
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
    else:
        ctx.save_for_backward(inputs[0])


def _max_pool_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    arguments = ctx.x_arguments
    indices = rest[0] if rest else torch.ops.pykernels.max_pool2d_with_indices(x.detach(), *arguments)[1]
    return aten.max_pool2d_with_indices_backward(grad, x, *arguments, indices), *[None] * len(arguments)


def _adaptive_max_pool_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    indices = rest[0] if rest else torch.ops.pykernels.adaptive_max_pool2d_with_indices(x.detach(), *ctx.x_arguments)[1]
    return aten.adaptive_max_pool2d_backward(grad, x, indices), None


def _avg_pool_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor = ctx.x_arguments
    grad_x = aten.avg_pool2d_backward(
        grad, x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor[0] if divisor else None
    )
    return grad_x, *[None] * len(ctx.x_arguments)


def _adaptive_avg_pool_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return aten._adaptive_avg_pool2d_backward(grad, ctx.saved_tensors[0]), None


with_gradient("max_pool2d", _max_pool_backward, _setup_pool)
with_gradient("max_pool2d_with_indices", _max_pool_backward, _setup_pool)
with_gradient("adaptive_max_pool2d", _adaptive_max_pool_backward, _setup_pool)
with_gradient("adaptive_max_pool2d_with_indices", _adaptive_max_pool_backward, _setup_pool)
with_gradient("avg_pool2d", _avg_pool_backward, _setup_pool)
with_gradient("adaptive_avg_pool2d", _adaptive_avg_pool_backward, _setup_pool)

__all__: Sequence[str] = ("activation_backward", "with_gradient")
