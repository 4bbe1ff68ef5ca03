"""Convolution, batch norm and activation in one op on plain tensors."""

from __future__ import annotations

import torch

__all__ = ["conv_bn_relu"]


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
        x: [N, C, H, W], float32 or bfloat16, any layout.
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
        _pair(stride),
        sides(padding),
        _pair(dilation),
        groups,
        activation,
        residual,
        residual_order,
    )


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


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
