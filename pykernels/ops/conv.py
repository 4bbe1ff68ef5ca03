"""Convolutions over packed weights, floats and int8, for inference; `conv_bn_relu` on plain tensors, with gradient.

``x`` is [N, C, H, W] in any layout; channels_last is used as it is, another layout is converted once. Results are
channels_last. ``padding`` is one number, (height, width), or (left, right, top, bottom). Bad arguments raise
``RuntimeError`` with the argument's name. A 1-D convolution is a 2-D one of height 1: `conv1d`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from pykernels.ops._register import fake, with_gradient
from pykernels.ops._sizes import spread
from pykernels.ops.packed import packed_bytes

__all__ = ["conv1d", "conv2d", "conv2d_pack", "conv_bn_relu", "qconv2d", "qconv2d_pack"]

aten = torch.ops.aten


def conv_bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "relu",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    """act((conv2d(x, weight) + bias - mean) / sqrt(var + eps) * gamma + beta [+ residual]), batch norm in evaluation.

    Differentiable in x, weight, bias, gamma, beta and residual; the running statistics are constants. It folds and
    packs the weights at every call: `pykernels.nn.ConvBNReLU` does so once.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16, any layout.
        weight: [O, C / groups, kh, kw]; bias: [O] or None.
        running_mean, running_var: [O]; gamma, beta: [O] or None for 1 and 0.
        padding: one number, (height, width), or (left, right, top, bottom).
        activation: a name in `pykernels.ops.names.ACTIVATIONS`.
        residual: of the shape of the result, added before or after the activation as `residual_order` says.

    Returns:
        [N, O, H', W'] of x's dtype, channels_last.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or value; the message names it.
        ValueError: padding has neither 1, 2 nor 4 numbers.
    """
    return torch.ops.pykernels.conv_bn_act(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        gamma,
        beta,
        eps,
        spread(stride),
        sides(padding),
        spread(dilation),
        groups,
        activation,
        residual,
        residual_order,
    )


def conv2d_pack(weight: torch.Tensor, bias: torch.Tensor | None = None, groups: int = 1) -> torch.Tensor:
    """Pack float ``weight`` [O, C / groups, kh, kw] (batch norm folded already) and ``bias`` [O]."""
    packed: torch.Tensor = torch.ops.pykernels.conv2d_pack(weight, bias, groups)
    return packed


def conv2d(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    """act(conv2d(x, weight) + bias [+ residual]) with fp32 sums; x of the weights' dtype.

    Args:
        packed: what `conv2d_pack` returned for weights of this `out_channels`, `kernel_size` and `groups`.
        activation: as for `conv_bn_relu`.
        residual: of the result's shape, added before or after the activation as `residual_order` says.
    """
    y: torch.Tensor = torch.ops.pykernels.conv2d(
        x,
        packed,
        out_channels,
        spread(kernel_size),
        spread(stride),
        sides(padding),
        spread(dilation),
        groups,
        activation,
        residual,
        residual_order,
    )
    return y


def conv1d(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str = "none",
) -> torch.Tensor:
    """`conv2d` of x [N, C, L] as an image of height 1; weights packed as [O, C / groups, 1, k]. Returns [N, O, L']."""
    y = conv2d(
        x.unsqueeze(2),
        packed,
        out_channels,
        (1, kernel_size),
        (1, stride),
        (0, padding),
        (1, dilation),
        groups,
        activation,
    )
    return y.squeeze(2)


def qconv2d_pack(
    weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None, groups: int = 1
) -> torch.Tensor:
    """Pack int8 ``weight`` [O, C / groups, kh, kw], scaled by ``weight_scale`` [O] (float32), and real ``bias`` [O]."""
    packed: torch.Tensor = torch.ops.pykernels.qconv2d_pack(weight, weight_scale, bias, groups)
    return packed


def qconv2d(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    x_scale: float,
    x_zero_point: int = 0,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_dtype: torch.dtype = torch.uint8,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    residual_order: str = "before",
) -> torch.Tensor:
    """`conv2d` on int8: exact s32 sums, bias, residual and activation in fp32, requantized in the same pass.

    Args:
        x: uint8 or int8, standing for (x - x_zero_point) * x_scale; padding counts as the real number 0.
        packed: what `qconv2d_pack` returned for weights of this `out_channels`, `kernel_size` and `groups`.
        out_dtype: uint8 or int8 with `out_scale` and `out_zero_point`; or a float dtype without.
        residual: of the result's shape: a float, or 8 bit with `residual_scale` and `residual_zero_point`.
    """
    y: torch.Tensor = torch.ops.pykernels.qconv2d(
        x,
        packed,
        out_channels,
        spread(kernel_size),
        spread(stride),
        sides(padding),
        spread(dilation),
        groups,
        x_scale,
        x_zero_point,
        out_scale,
        out_zero_point,
        out_dtype,
        activation,
        residual,
        residual_scale,
        residual_zero_point,
        residual_order,
    )
    return y


def sides(padding: int | tuple[int, ...]) -> list[int]:
    """(left, right, top, bottom) from one number, (height, width) or all four."""
    if isinstance(padding, int):
        return [padding] * 4
    if len(padding) == 2:
        height, width = padding
        return [width, width, height, height]
    if len(padding) != 4:
        raise ValueError(f"padding must be 1, 2 or 4 numbers, not {tuple(padding)}")
    return list(padding)


# ---- shapes: the result is channels_last whatever the input is ----


@fake("conv2d_pack", "qconv2d_pack")
def _(weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
    return weight.new_empty((packed_bytes(weight, groups),), dtype=torch.uint8)


def _convolved(
    x: torch.Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    n, _, h, w = x.shape
    left, right, top, bottom = padding
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    oh = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
    ow = (w + left + right - dw * (kw - 1) - 1) // sw + 1
    return torch.empty((n, out_channels, oh, ow), dtype=dtype, device=x.device, memory_format=torch.channels_last)


@fake("conv2d")
def _(
    x: torch.Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    return _convolved(x, out_channels, kernel_size, stride, padding, dilation, x.dtype)


@fake("qconv2d")
def _(
    x: torch.Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    return _convolved(x, out_channels, kernel_size, stride, padding, dilation, out_dtype)


@fake("conv_bn_act")
def _(
    x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> torch.Tensor:
    return _convolved(x, weight.shape[0], weight.shape[2:], stride, padding, dilation, x.dtype)


# ---- the gradient of conv_bn_act; ops on packed weights are for inference and have none ----


def _activation_backward(name: str, grad: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
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
    grad_u = _activation_backward(ctx.activation, grad.float(), u)

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


with_gradient("conv_bn_act", _backward, _setup)
