"""Modules of `torch.nn` that run our kernels in evaluation and torch's own code in training.

Each is a subclass with the same parameters, names and hooks, so `state_dict`, optimizers and checkpoints do not notice.
`pykernels.swap` turns the modules of a model into these in place.
"""

from __future__ import annotations

from pykernels.nn.conv import Conv1d, Conv2d, ConvBNReLU, Int8Conv1d, Int8Conv2d
from pykernels.nn.linear import Int8Linear, Linear
from pykernels.nn.pool import AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, MaxPool2d

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "Conv1d",
    "Conv2d",
    "ConvBNReLU",
    "Int8Conv1d",
    "Int8Conv2d",
    "Int8Linear",
    "Linear",
    "MaxPool2d",
]
