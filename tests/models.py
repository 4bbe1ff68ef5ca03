"""The networks of the end-to-end tests: torchvision's definitions with random but lively weights, and a small U-Net.

Random initial weights make activations vanish or explode with depth, so every batch norm first sees a few batches in
training mode: its statistics then describe the data, and each layer's output keeps a useful spread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_library: torch.library.Library | None = None


def torchvision_models() -> Any:
    """torchvision.models, also beside a CPU-only torch that torchvision's own binary does not fit."""
    global _library
    try:
        import torchvision.models
    except RuntimeError:  # its operators are missing; its Python definitions need only their names
        _library = torch.library.Library("torchvision", "DEF")
        forward = ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"]
        for name in ["nms", "qnms", *forward, *(f"_{name}_backward" for name in forward)]:
            _library.define(f"{name}(Tensor x) -> Tensor")
        import torchvision.models
    return torchvision.models


class UNet(nn.Module):
    """Two levels down, a transposed convolution and a nearest upsampling up again, skips by concatenation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = self.block(3, width), self.block(width, 2 * width)
        self.bottom = self.block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = self.block(4 * width, 2 * width)
        self.up1 = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge1 = self.block(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)
        self.pool = nn.MaxPool2d(2)

    @staticmethod
    def block(before: int, after: int) -> nn.Sequential:
        """Two convolutions with batch norm and relu."""
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [
                nn.Conv2d(channels, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] with H and W divisible by 4 -> [N, 2, H, W]."""
        first = self.down1(x)
        second = self.down2(self.pool(first))
        y = self.bottom(self.pool(second))
        y = self.merge2(torch.cat([self.up2(y), second], 1))
        return self.head(self.merge1(torch.cat([self.up1(y), first], 1)))


def _efficientnet_lite0() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0")


def _torchvision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision_models(), name)(weights=None, **arguments)


# name -> how to make it and the smallest image that still exercises every layer
ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_torchvision("resnet18"), 64),
    "resnet50": (_torchvision("resnet50"), 64),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), 64),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), 64),
    "efficientnet_lite0": (_efficientnet_lite0, 64),
    "vgg11_bn": (_torchvision("vgg11_bn", num_classes=10), 32),
    "squeezenet1_1": (_torchvision("squeezenet1_1"), 64),
    "densenet121": (_torchvision("densenet121"), 32),
    "googlenet": (_torchvision("googlenet", aux_logits=True, init_weights=False, transform_input=True), 64),
    "shufflenet_v2_x0_5": (_torchvision("shufflenet_v2_x0_5"), 64),
    "unet": (UNet, 32),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A network of the zoo in evaluation mode, and a batch of two for it."""
    make, size = ZOO[name]
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        if name == "vgg11_bn":  # 25088 x 4096 weights would make this test about memory
            model.avgpool, model.classifier[0] = nn.AdaptiveAvgPool2d((2, 2)), nn.Linear(512 * 4, 64)
            model.classifier[3], model.classifier[6] = nn.Linear(64, 64), nn.Linear(64, 10)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.uniform_(module.bias, 0.0, 0.5)  # most units active, as in trained networks
                module.momentum = None  # the running statistics are the plain mean of what is seen
        model.train()
        for _ in range(2):
            model(torch.randn(8, 3, size, size))
    return model.eval(), torch.randn(2, 3, size, size)
