"""Pooling layers on our kernels in evaluation; in training, and where a gradient is wanted, torch's own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pykernels.cuda import registry
from pykernels.ops import pool as ops
from pykernels.ops.dtypes import REALS


class Pool(nn.Module):
    """What the pools share: when the kernel is used."""

    original: ClassVar[type[nn.Module]]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = REALS

    def ready(self, x: torch.Tensor) -> bool:
        """Whether the kernel computes this call."""
        if self.training or not isinstance(x, torch.Tensor) or registry.complaint(x.device) is not None:
            return False
        if x.dtype not in self.dtypes or x.dim() != 4 or (x.requires_grad and torch.is_grad_enabled()):
            return False
        return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()

    def run(self, x: torch.Tensor) -> Any:
        """The pooling by our kernel."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> Any:
        """In evaluation our kernel, else torch's."""
        return self.run(x) if self.ready(x) else super().forward(x)


class MaxPool2d(Pool, nn.MaxPool2d):
    """`torch.nn.MaxPool2d` on our kernel in evaluation; takes uint8 and int8 there, too."""

    original = nn.MaxPool2d
    dtypes = (*REALS, torch.uint8, torch.int8)

    def run(self, x: torch.Tensor) -> Any:
        """The maximum, with indices if `return_indices`."""
        pool = ops.max_pool2d_with_indices if self.return_indices else ops.max_pool2d
        return pool(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class AvgPool2d(Pool, nn.AvgPool2d):
    """`torch.nn.AvgPool2d` on our kernel in evaluation."""

    original = nn.AvgPool2d

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The average."""
        window = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return ops.avg_pool2d(x, *window, self.divisor_override)


class AdaptiveAvgPool2d(Pool, nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` on our kernel in evaluation; (1, 1) is global pooling."""

    original = nn.AdaptiveAvgPool2d

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The averages of `output_size` windows."""
        return ops.adaptive_avg_pool2d(x, self.output_size)


class AdaptiveMaxPool2d(Pool, nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d` on our kernel in evaluation; takes uint8 and int8 there, too."""

    original = nn.AdaptiveMaxPool2d
    dtypes = (*REALS, torch.uint8, torch.int8)

    def run(self, x: torch.Tensor) -> Any:
        """The maxima of `output_size` windows, with indices if `return_indices`."""
        pool = ops.adaptive_max_pool2d_with_indices if self.return_indices else ops.adaptive_max_pool2d
        return pool(x, self.output_size)
