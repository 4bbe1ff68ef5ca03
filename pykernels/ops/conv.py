"""Convolutions over packed weights, floats and int8, for inference; `conv_bn_relu` on plain tensors, with gradient.

``x`` is [N, C, H, W] in any layout; channels_last is used as it is, another layout is converted once. Results are
channels_last. ``padding`` is one number, (height, width), or (left, right, top, bottom). Bad arguments raise
``RuntimeError`` with the argument's name. A 1-D convolution is a 2-D one of height 1: `conv1d`.
"""

from __future__ import annotations

import torch

from pykernels.ops._sizes import spread

__all__ = ["conv1d", "conv2d", "conv2d_pack", "conv_bn_relu", "qconv2d", "qconv2d_pack"]


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
        activation: none, relu, relu6, hardswish, hardsigmoid, silu, sigmoid, gelu or tanh.
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
        activation: none, relu, relu6, hardswish, hardsigmoid, silu, sigmoid, gelu (erf) or tanh.
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
