"""Batch norms and activations that the layer before them computes in evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx, nn

from pykernels.nn._chain import Follower
from pykernels.ops import names


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


def _activation(known: names.Activation) -> type[Activation]:
    """The subclass of the class of torch.nn that `known` is."""
    original = getattr(nn, known.module or "")
    doc = f"`torch.nn.{known.module}`, applied by the layer before it in evaluation."
    body = {"__doc__": doc, "__module__": __name__, "original": original, "kernel_name": known.name}
    return type(original.__name__, (Activation, original), body)


# Applied twice they do what they do once, so several layers may compute the same module (see `Chain`).
SHAREABLE: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6)
BY_NAME: dict[str, type[Activation]] = {
    known.name: _activation(known) for known in names.ACTIVATIONS.values() if known.module
}
globals().update({cls.__name__: cls for cls in BY_NAME.values()})  # where pickle looks for them
ACTIVATIONS: dict[type[nn.Module], type[Activation]] = {cls.original: cls for cls in BY_NAME.values()}
NORMS: dict[type[nn.Module], type[Follower]] = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d}
