"""Networks whose answer is an image, or several: what segmentation, detection and medical imaging run, made small."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def conv(before: int, after: int, kernel: int = 3, stride: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A convolution with batch norm and an activation."""
    layer = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), act())


class UNet(nn.Module):
    """Two levels down and up again: a transposed convolution with batch norm, and a bilinear upsampling."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv(3, width), conv(width, width))
        self.down2 = nn.Sequential(conv(width, 2 * width), conv(2 * width, 2 * width))
        self.bottom = nn.Sequential(conv(2 * width, 4 * width), conv(4 * width, 4 * width))
        self.up2 = nn.Sequential(nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.merge2 = nn.Sequential(conv(4 * width, 2 * width), conv(2 * width, 2 * width))
        self.up1 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.merge1 = nn.Sequential(conv(3 * width, width), conv(width, width))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] with H and W divisible by 4 -> [N, 2, H, W]."""
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.bottom(F.max_pool2d(second, 2))
        y = self.merge2(torch.cat([self.up2(y), second], 1))
        return self.head(self.merge1(torch.cat([self.up1(y), first], 1)))


class Stage(nn.Module):
    """As in YOLO: half of the channels go through residual blocks, and all pieces are joined."""

    def __init__(self, before: int, after: int, shortcut: bool = True) -> None:
        super().__init__()
        self.half = after // 2
        self.enter, self.leave = conv(before, after, 1, act=nn.SiLU), conv(3 * self.half, after, 1, act=nn.SiLU)
        self.block = nn.Sequential(*(conv(self.half, self.half, act=nn.SiLU) for _ in range(2)))
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.enter(x).chunk(2, 1)
        c = self.block(b)
        return self.leave(torch.cat([a, b, b + c if self.shortcut else c], 1))


class Pyramid(nn.Module):
    """A YOLO-like backbone, pools of three sizes (SPPF), and a neck upwards and down again (FPN, PAN)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.stem = conv(3, width, stride=2, act=nn.SiLU)
        self.stages = nn.ModuleList(Stage(size, size) for size in sizes)
        self.downs = nn.ModuleList(conv(size, 2 * size, stride=2, act=nn.SiLU) for size in sizes[:2])
        self.squeeze, self.spread = conv(sizes[2], width, 1, act=nn.SiLU), conv(4 * width, sizes[2], 1, act=nn.SiLU)
        self.up2, self.up1 = Stage(sizes[2] + sizes[1], sizes[1], False), Stage(sizes[1] + sizes[0], sizes[0], False)
        self.down1, self.down2 = (
            conv(sizes[0], sizes[0], stride=2, act=nn.SiLU),
            conv(sizes[1], sizes[1], stride=2, act=nn.SiLU),
        )
        self.out2, self.out3 = Stage(sizes[0] + sizes[1], sizes[1], False), Stage(sizes[1] + sizes[2], sizes[2], False)
        self.heads = nn.ModuleList(nn.Conv2d(size, 6, 1) for size in sizes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, 3, H, W] with H and W divisible by 8 -> three maps of 6 channels."""
        p1 = self.stages[0](self.stem(x))
        p2 = self.stages[1](self.downs[0](p1))
        y = self.squeeze(self.stages[2](self.downs[1](p2)))
        pools = [y]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        p3 = self.spread(torch.cat(pools, 1))
        p2 = self.up2(torch.cat([F.interpolate(p3, scale_factor=2.0, mode="nearest"), p2], 1))
        p1 = self.up1(torch.cat([F.interpolate(p2, scale_factor=2.0, mode="nearest"), p1], 1))
        p2 = self.out2(torch.cat([self.down1(p1), p2], 1))
        p3 = self.out3(torch.cat([self.down2(p2), p3], 1))
        return tuple(head(p) for head, p in zip(self.heads, (p1, p2, p3), strict=True))
