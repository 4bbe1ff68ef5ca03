"""Batch norms and activations that the layer before them computes in evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx, nn

from pykernels.nn._chain import Follower


class Norm(Follower):
    """A batch norm that a kernel folds into its weights."""

    def forward(self, x: Any) -> Any:
        """Its input where the head has done the work, else as torch has it."""
        if isinstance(x, fx.Proxy) and not self.training:  # torch's own forward asks a symbol for its rank
            symbol: Any = x
            norm: Any = self  # beside this class its heirs have a batch norm of torch's
            return F.batch_norm(
                symbol, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        return super().forward(x)


class BatchNorm1d(Norm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, folded into the weights of the convolution before it in evaluation."""

    original = nn.BatchNorm1d


class BatchNorm2d(Norm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, folded into the weights of the convolution before it in evaluation."""

    original = nn.BatchNorm2d


class Activation(Follower):
    """An activation that a kernel applies before it stores its result; `kernel_name` is what the ops call it."""

    kernel_name: ClassVar[str]


class ReLU(Activation, nn.ReLU):
    """`torch.nn.ReLU`, applied by the layer before it in evaluation."""

    original, kernel_name = nn.ReLU, "relu"


class ReLU6(Activation, nn.ReLU6):
    """`torch.nn.ReLU6`, applied by the layer before it in evaluation."""

    original, kernel_name = nn.ReLU6, "relu6"


class Hardswish(Activation, nn.Hardswish):
    """`torch.nn.Hardswish`, applied by the layer before it in evaluation."""

    original, kernel_name = nn.Hardswish, "hardswish"


class Hardsigmoid(Activation, nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid`, applied by the layer before it in evaluation."""

    original, kernel_name = nn.Hardsigmoid, "hardsigmoid"


class SiLU(Activation, nn.SiLU):
    """`torch.nn.SiLU`, applied by the layer before it in evaluation."""

    original, kernel_name = nn.SiLU, "silu"


class Sigmoid(Activation, nn.Sigmoid):
    """`torch.nn.Sigmoid`, applied by the layer before it in evaluation."""

    original, kernel_name = nn.Sigmoid, "sigmoid"


class GELU(Activation, nn.GELU):
    """`torch.nn.GELU` (exact, not the tanh approximation), applied by the layer before it in evaluation."""

    original, kernel_name = nn.GELU, "gelu"


class Tanh(Activation, nn.Tanh):
    """`torch.nn.Tanh`, applied by the layer before it in evaluation."""

    original, kernel_name = nn.Tanh, "tanh"


# Applied twice they do what they do once, so several layers may compute the same module (see `Chain`).
SHAREABLE: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6)
ACTIVATIONS: dict[type[nn.Module], type[Activation]] = {
    cls.original: cls for cls in (ReLU, ReLU6, Hardswish, Hardsigmoid, SiLU, Sigmoid, GELU, Tanh)
}
BY_NAME: dict[str, type[Activation]] = {cls.kernel_name: cls for cls in ACTIVATIONS.values()}
NORMS: dict[type[nn.Module], type[Follower]] = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d}
