"""The networks of the end-to-end tests: those of the benchmarks on small images, and a small U-Net."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from pykernels.bench import zoo


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


# name -> how to make it and the smallest image that still exercises every layer
ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (partial(zoo.build, "resnet18"), 64),
    "resnet50": (partial(zoo.build, "resnet50"), 64),
    "mobilenet_v2": (partial(zoo.build, "mobilenet_v2"), 64),
    "mobilenet_v3_small": (partial(zoo.build, "mobilenet_v3_small"), 64),
    "efficientnet_lite0": (zoo.efficientnet_lite0, 64),
    "vgg11_bn": (partial(zoo.build, "vgg11_bn", num_classes=10), 32),
    "squeezenet1_1": (partial(zoo.build, "squeezenet1_1"), 64),
    "densenet121": (partial(zoo.build, "densenet121"), 32),
    "googlenet": (partial(zoo.build, "googlenet", aux_logits=True, init_weights=False, transform_input=True), 64),
    "shufflenet_v2_x0_5": (partial(zoo.build, "shufflenet_v2_x0_5"), 64),
    "unet": (UNet, 32),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A network of the zoo, or another one of torchvision's, in evaluation mode, and a batch of two for it."""
    make, size = ZOO.get(name, (partial(zoo.build, name), 64))
    torch.manual_seed(seed)
    model = make()
    if name == "vgg11_bn":  # 25088 x 4096 weights would make this test about memory
        model.avgpool, model.classifier[0] = nn.AdaptiveAvgPool2d((2, 2)), nn.Linear(512 * 4, 64)
        model.classifier[3], model.classifier[6] = nn.Linear(64, 64), nn.Linear(64, 10)
    if name != "efficientnet_lite0":  # which is trained
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.uniform_(module.bias, 0.0, 0.5)  # most units active, as in trained networks
        zoo.settle(model, torch.randn(16, 3, size, size))
    return model, torch.randn(2, 3, size, size)
