"""Networks that are hard to prune, one difficulty each; every width that can be cut is above 16."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.networks import Function


def conv(before: int, after: int, kernel: int = 3, **options: object) -> nn.Sequential:
    """Convolution, batch norm, relu."""
    padding = kernel // 2
    layer = nn.Conv2d(before, after, kernel, padding=padding, bias=False, **options)  # type: ignore[arg-type]
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


class Residual(nn.Module):
    """`relu(x + f(x))`, twice convolved."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first = conv(width, inner)
        self.second = nn.Sequential(nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.second(self.first(x)))


def residual() -> nn.Module:
    return nn.Sequential(conv(3, 32), Residual(32, 48), Residual(32, 64), head(32))


def concatenation() -> nn.Module:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        y = torch.cat([m.a(x), x, m.b(x)], 1)
        return m.head(m.after(torch.cat([y, m.c(y)], 1)))

    return Function(
        forward, stem=conv(3, 20), a=conv(20, 24), b=conv(20, 40, 1), c=conv(84, 33), after=conv(117, 32), head=head(32)
    )


def concatenation_and_sum() -> nn.Module:
    """What two layers make side by side, a third makes as a whole."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        return m.head(F.relu(torch.cat([m.a(x), m.b(x)], 1) + m.c(x)))

    return Function(forward, stem=conv(3, 20), c=conv(20, 64), a=conv(20, 24), b=conv(20, 40), head=head(64))


def depthwise() -> nn.Module:
    """An inverted residual with squeeze and excitation."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        y = m.wise(m.expand(x))
        y = y * torch.sigmoid(m.excite(F.relu(m.squeeze(y.mean((2, 3), keepdim=True)))))
        return m.head(x + m.project(y))

    return Function(
        forward, stem=conv(3, 24), expand=conv(24, 72, 1), wise=conv(72, 72, groups=72), squeeze=nn.Conv2d(72, 18, 1),
        excite=nn.Conv2d(18, 72, 1), project=nn.Conv2d(72, 24, 1), head=head(24),
    )  # fmt: skip


def depthwise_of_one() -> nn.Module:
    """A convolution of one channel in one group, before and between ordinary ones."""
    return nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1, groups=1), conv(1, 32), nn.Conv2d(32, 1, 1), nn.Conv2d(1, 24, 3), head(24)
    )


def depthwise_first() -> nn.Module:
    """A depthwise convolution of the image itself, whose channels nobody can take away."""
    return nn.Sequential(nn.Conv2d(20, 20, 3, groups=20), nn.Conv2d(20, 32, 1), nn.ReLU(), head(32))


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 32), conv(32, 32, groups=4), conv(32, 48), conv(48, 32), head(32))


def grouped_as_if_depthwise() -> nn.Module:
    """As many groups as output channels, but each reads two: no depthwise convolution."""
    return nn.Sequential(conv(3, 64), conv(64, 32, groups=32), conv(32, 48), conv(48, 20), head(20))


def depthwise_multiplied() -> nn.Module:
    return nn.Sequential(conv(3, 32), conv(32, 64, groups=32), conv(64, 48), conv(48, 20), head(20))


def shared() -> nn.Module:
    """One layer at three places, with a sum around it."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        return m.head(m.after(x + m.block(m.block(m.block(x)))))

    return Function(forward, stem=conv(3, 32), block=conv(32, 32), after=conv(32, 40), head=head(40))


def flattened() -> nn.Module:
    """A linear layer over what 3 x 4 pixels of each channel become."""
    return nn.Sequential(
        conv(3, 24),
        conv(24, 40),
        nn.AdaptiveAvgPool2d((3, 4)),
        nn.Flatten(),
        nn.Linear(40 * 12, 36),
        nn.ReLU(),
        nn.Linear(36, 5),
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        conv(3, 32),
        nn.ConvTranspose2d(32, 48, 2, 2),
        nn.BatchNorm2d(48),
        nn.PReLU(48),
        conv(48, 24),
        nn.PReLU(),
        nn.Conv2d(24, 2, 1),
    )


def normalized() -> nn.Module:
    """Layer norm and group norm over channels, which therefore stay."""
    return nn.Sequential(
        conv(3, 32), nn.Conv2d(32, 48, 1), nn.GroupNorm(4, 48), conv(48, 40), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(40, 24), nn.LayerNorm(24), nn.Linear(24, 30), nn.ReLU(), nn.Linear(30, 5),
    )  # fmt: skip


def tied() -> nn.Module:
    """Two layers with one weight."""
    model = nn.Sequential(conv(3, 32), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), conv(32, 40), head(40))
    model[3].weight = model[1].weight
    return model


def returned() -> nn.Module:
    """Features beside the answer."""

    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = m.features(m.stem(x))
        return m.head(x), x

    return Function(forward, stem=conv(3, 32), features=conv(32, 48), head=head(48))


def scaled() -> nn.Module:
    """A parameter of its own beside the layers."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.after, self.head = conv(3, 32), conv(32, 40), head(40)
            self.scale = nn.Parameter(torch.rand(1, 32, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.after(self.stem(x) * self.scale))

    return Scaled()


class Attention(nn.Module):
    """A ViT's block; the number of heads and their size stand in forward as they are."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, 4, 12).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)) * 12**-0.5).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(n, t, 48))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def attention() -> nn.Module:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.block(m.patches(x).flatten(2).transpose(1, 2)).mean(1))

    return Function(forward, patches=nn.Conv2d(3, 48, 4, 4), block=Attention(), head=nn.Linear(48, 5))


def written_size() -> nn.Module:
    """A view of a constant size in forward."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.head(F.adaptive_avg_pool2d(m.features(m.stem(x)), 2).view(-1, 40 * 4))

    return Function(forward, stem=conv(3, 32), features=conv(32, 40), head=nn.Linear(160, 5))


def shuffled() -> nn.Module:
    """Channels that change places, as in ShuffleNet."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.after(F.channel_shuffle(m.stem(x), 2)))

    return Function(forward, stem=conv(3, 32), after=conv(32, 40), head=head(40))


def auxiliary() -> nn.Module:
    """A second head that is called in training alone, as in GoogLeNet."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = m.stem(x)
        answer = m.head(m.after(x))
        return (answer, m.aside(x)) if m.training else answer

    return Function(forward, stem=conv(3, 32), after=conv(32, 40), head=head(40), aside=head(32))


def recurrent() -> nn.Module:
    """A GRU and the cell of an LSTM between convolutions and linear layers."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.second(m.first(x)).mean(2).transpose(1, 2)
        y, _ = m.gru(y)
        hidden, _ = m.cell(y[:, 0])
        hidden, _ = m.cell(y[:, -1], (hidden, hidden))
        return m.out(F.relu(m.up(hidden)))

    return Function(
        forward, first=conv(3, 32), second=conv(32, 40), gru=nn.GRU(40, 12, 2, batch_first=True, bidirectional=True),
        cell=nn.LSTMCell(24, 24), up=nn.Linear(24, 36), out=nn.Linear(36, 5),
    )  # fmt: skip


class FrozenNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d: all that it has are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def frozen() -> nn.Module:
    layers = nn.Conv2d(3, 32, 3), FrozenNorm(32), nn.ReLU(), nn.Conv2d(32, 40, 3), FrozenNorm(40), nn.ReLU()
    return nn.Sequential(*layers, head(40))


def untraceable() -> nn.Module:
    """Units with channel shuffles of the kind that torch-pruning does not get through, as in ShuffleNetV2."""

    def shuffle(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

    def wider(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return shuffle(torch.cat([m.beside(x), m.branch(x)], 1))

    def alike(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, 1)
        return shuffle(torch.cat([one, m.branch(two)], 1))

    def branch(width: int) -> nn.Module:
        return nn.Sequential(conv(width, 36, 1), conv(36, 36, groups=36), conv(36, 20, 1))

    first = Function(wider, beside=nn.Sequential(conv(12, 12, groups=12), conv(12, 20, 1)), branch=branch(12))
    units = nn.Sequential(first, Function(alike, branch=branch(20)), Function(alike, branch=branch(20)))
    return nn.Sequential(conv(3, 12), units, conv(40, 40, 1), head(40))


def restless() -> nn.Module:
    """Dropout that does not end with training."""
    return nn.Sequential(conv(3, 32), Function(lambda m, x: F.dropout(x, 0.3)), conv(32, 40), head(40))


def lively(model: nn.Module, *shape: int) -> nn.Module:
    """Batch norms with statistics of data and weights that are not 1 and 0; evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, *shape))
    return model.eval()
