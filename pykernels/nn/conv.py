"""Convolutions on packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pykernels.nn._chain import Chain, Head
from pykernels.nn._quantize import quantize_weight
from pykernels.nn.follow import BY_NAME, BatchNorm2d
from pykernels.ops._sizes import spread
from pykernels.ops.names import ACTIVATIONS, words


class Conv(Head):
    """What one- and two-dimensional convolutions share: the kernels see [N, C, H, W], a line being H = 1."""

    kernel_size: Any
    stride: Any
    dilation: Any
    groups: int
    out_channels: int
    _reversed_padding_repeated_twice: list[int]
    _conv_forward: Any

    def _geometry(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """kernel_size, stride, padding (left, right, top, bottom) and dilation as the ops take them."""
        sides = list(self._reversed_padding_repeated_twice)  # as torch.nn.functional.pad, also for padding="same"
        flat = self.ranks == (3,)
        lead = [1] if flat else []
        return (
            [*lead, *self.kernel_size],
            [*lead, *self.stride],
            [*sides, 0, 0] if flat else sides,
            [*lead, *self.dilation],
        )

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Weights as `conv2d_pack` lays them out, uint8."""
        return torch.ops.pykernels.conv2d_pack(self._planes(self.stored(weight)), bias, self.groups)

    def run(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """The convolution, its batch norm and its activation."""
        kernel_size, stride, padding, dilation = self._geometry()
        y = torch.ops.pykernels.conv2d(
            self._planes(self.stored(x)), packed, self.out_channels, kernel_size, stride, padding, dilation,
            self.groups, self.activation_name,
        )  # fmt: skip
        y = self._unplane(y)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def plain(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution alone, as torch has it."""
        return self._conv_forward(x, weight, bias)

    def _planes(self, t: torch.Tensor) -> torch.Tensor:
        return t.unsqueeze(2) if t.dim() == 3 else t

    def _unplane(self, t: torch.Tensor) -> torch.Tensor:
        return t.squeeze(2) if self.ranks == (3,) else t


class Conv2d(Conv, nn.Conv2d):
    """`torch.nn.Conv2d` that runs `torch.ops.pykernels.conv2d` on packed weights in evaluation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype: as
        `torch.nn.Conv2d`.
        precision: ``"fp32"`` computes in the dtype of the weights; ``"bf16"`` and ``"fp16"`` round input and weights
            to bfloat16 or float16, sum in fp32 and return the input's dtype.

    Shape: x [N, C, H, W] a float dtype, any layout -> [N, out_channels, H', W'] of the same dtype, channels_last.
    """

    original = nn.Conv2d
    ranks = (4,)

    def __init__(self, *args: Any, precision: str = "fp32", **kwargs: Any):
        super().__init__(*args, **kwargs)
        _check_padding_mode(self)
        self.join(Chain(self), precision)


class Conv1d(Conv, nn.Conv1d):
    """`torch.nn.Conv1d` through the two-dimensional kernels in evaluation. Arguments as `Conv2d`.

    Shape: x [N, C, L] float32, bfloat16 or float16 -> [N, out_channels, L'] of the same dtype.
    """

    original = nn.Conv1d
    ranks = (3,)

    def __init__(self, *args: Any, precision: str = "fp32", **kwargs: Any):
        super().__init__(*args, **kwargs)
        _check_padding_mode(self)
        self.join(Chain(self), precision)


class _Int8Conv(Conv):
    """int8 in evaluation: u8 input by `x_scale` and `x_zero_point`, weights symmetric s8 per output channel."""

    precisions = ("int8",)
    x_scale: float
    x_zero_point: int

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Weights as `qconv2d_pack` lays them out, uint8."""
        q, scale = quantize_weight(weight)
        bias = None if bias is None else bias.float()
        return torch.ops.pykernels.qconv2d_pack(self._planes(q), scale, bias, self.groups)

    def run(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """The convolution, its batch norm and its activation."""
        kernel_size, stride, padding, dilation = self._geometry()
        q = torch.ops.pykernels.quantize_per_tensor(self._planes(x), self.x_scale, self.x_zero_point, torch.uint8)
        y = torch.ops.pykernels.qconv2d(
            q, packed, self.out_channels, kernel_size, stride, padding, dilation, self.groups,
            self.x_scale, self.x_zero_point, None, 0, x.dtype, self.activation_name,
        )  # fmt: skip
        return self._unplane(y)


class Int8Conv2d(_Int8Conv, Conv2d):
    """`torch.nn.Conv2d` in int8 in evaluation: float in, float out, int8 between. Training is torch's own.

    Args:
        in_channels, … dtype: as `torch.nn.Conv2d`.
        x_scale, x_zero_point: of the input as u8, from calibration: x ~ (q - x_zero_point) * x_scale.

    Shape: x [N, C, H, W] a float dtype -> [N, out_channels, H', W'] of the same dtype, channels_last.
    """

    def __init__(self, *args: Any, x_scale: float, x_zero_point: int = 0, **kwargs: Any):
        self.x_scale, self.x_zero_point = x_scale, x_zero_point
        super().__init__(*args, precision="int8", **kwargs)


class Int8Conv1d(_Int8Conv, Conv1d):
    """`torch.nn.Conv1d` in int8 in evaluation. Arguments as `Int8Conv2d`."""

    def __init__(self, *args: Any, x_scale: float, x_zero_point: int = 0, **kwargs: Any):
        self.x_scale, self.x_zero_point = x_scale, x_zero_point
        super().__init__(*args, precision="int8", **kwargs)


class ConvBNReLU(nn.Module):
    """Convolution, batch norm and activation: three modules in training, one kernel in evaluation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as `torch.nn.Conv2d`, but
            `padding` is by default half the dilated kernel, which keeps the size at stride 1, and there is no bias.
        activation: a name in `pykernels.ops.names.ACTIVATIONS`.
        eps, momentum: of the batch norm.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``, see `Conv2d`.

    Shape: x [N, C, H, W] -> [N, out_channels, H', W'], channels_last in evaluation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float = 0.1,
        precision: str = "fp32",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {words(ACTIVATIONS)}, not '{activation}'")
        if padding is None:
            sizes, steps = spread(kernel_size), spread(dilation)
            padding = (steps[0] * (sizes[0] - 1) // 2, steps[1] * (sizes[1] - 1) // 2)
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = BatchNorm2d(out_channels, eps, momentum)
        self.act = nn.Identity() if activation == "none" else BY_NAME[activation]()
        self.conv.join(Chain(self.conv, self.bn, None if activation == "none" else self.act), precision)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """act(bn(conv(x)))."""
        return self.act(self.bn(self.conv(x)))


def _check_padding_mode(module: nn.Module) -> None:
    if module.padding_mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros', not '{module.padding_mode}'")
