"""Small labelled images that need no download at run time, and a small network for them.

Fashion-MNIST (Xiao et al.) where Debian's package ``dataset-fashion-mnist`` is installed, otherwise the handwritten
digits that come with scikit-learn.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

PACKAGE = "dataset-fashion-mnist"


@dataclass(frozen=True)
class Images:
    """Images and labels to learn from, and others to be judged by.

    Attributes:
        name: of the data set.
        train, test: fp32 [N, 1, height, width], zero mean and unit variance over the training images.
        train_labels, test_labels: int64 [N], 0 to 9.
        mirrors: a mirrored image has the same label.
        epochs: how often a small network sees all of them until it is good at them.
    """

    name: str
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    mirrors: bool
    epochs: int

    def subset(self, count: int) -> Images:
        """The same with the first `count` training images only: they are in no particular order."""
        return replace(self, train=self.train[:count], train_labels=self.train_labels[:count])

    def augment(self, batch: torch.Tensor, shift: int | None = None) -> torch.Tensor:
        """Each image [N, 1, H, W] shifted by up to `shift` pixels (None: an eighth of its size) and perhaps mirrored,
        by torch's generator."""
        count, _, height, width = batch.shape
        pad = height // 8 if shift is None else shift
        padded = nn.functional.pad(batch, (pad, pad, pad, pad), value=float(self.train[0].min()))
        up, left = torch.randint(0, 2 * pad + 1, (2, count, 1))
        rows, columns = up + torch.arange(height), left + torch.arange(width)
        if self.mirrors:
            columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def load(name: str = "auto", folder: Path | None = None) -> Images:
    """``fashion-mnist``, ``digits``, or the first of them that is here (``auto``).

    Args:
        folder: where Fashion-MNIST's four files are, if not where Debian's package puts them (without root,
            ``apt-get download`` and ``dpkg -x`` put them anywhere).

    Raises:
        FileNotFoundError: Fashion-MNIST is asked for by name and not installed.
        ValueError: another name.
    """
    if name not in ("auto", "fashion-mnist", "digits"):
        raise ValueError(f"name must be auto, fashion-mnist or digits, not {name!r}")
    found = {} if folder is None else {file.name: file for file in folder.rglob("*-ubyte.gz")}
    files = {} if name == "digits" else found or _installed_files()
    if name == "fashion-mnist" and not files:
        where = "installed" if folder is None else f"in {folder}"
        raise FileNotFoundError(f"Fashion-MNIST is not {where}: apt-get install {PACKAGE}")
    return _fashion_mnist(files) if files else _digits()


def _installed_files() -> dict[str, Path]:
    """The package's data files by name; none if it, or Debian's package manager, is not here."""
    if shutil.which("dpkg") is None:
        return {}
    listing = subprocess.run(["dpkg", "-L", PACKAGE], capture_output=True, text=True)
    if listing.returncode:
        return {}
    return {Path(line).name: Path(line) for line in listing.stdout.splitlines() if line.endswith("-ubyte.gz")}


def _idx(file: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, 8 (unsigned byte), the number of sizes, sizes, data."""
    data = gzip.decompress(file.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is not an IDX file of bytes")
    sizes = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)


def _fashion_mnist(files: dict[str, Path]) -> Images:
    train, labels, test, test_labels = (
        _idx(files[f"{part}-{kind}-ubyte.gz"]) for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )
    return _prepared("Fashion-MNIST", train, labels, test, test_labels, mirrors=True, epochs=1)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8)
    order = np.random.default_rng(0).permutation(len(pixels))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    seen, unseen = (pixels[train], labels[train]), (pixels[test], labels[test])
    return _prepared("scikit-learn's digits", *seen, *unseen, mirrors=False, epochs=15)


def _prepared(
    name: str,
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    mirrors: bool,
    epochs: int,
) -> Images:
    mean, deviation = float(train.mean()), float(train.std())
    seen, unseen = (
        torch.from_numpy((pixels.astype(np.float32) - mean) / deviation)[:, None] for pixels in (train, test)
    )
    known, asked = (torch.from_numpy(some.astype(np.int64)) for some in (labels, test_labels))
    return Images(name, seen, known, unseen, asked, mirrors, epochs)


class Block(nn.Module):
    """Two 3x3 convolutions and a way past them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.past = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        return (y + self.past(x)).relu()


class ResNet(nn.Module):
    """A residual network of eight layers for one-channel images; `width` channels in its first stage, 10 classes."""

    def __init__(self, width: int = 32, stem_stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stem_stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 1, height, width]."""
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


def network(images: Images, width: int = 32) -> ResNet:
    """The network for these images: images of 8x8 are not halved at once."""
    return ResNet(width, stem_stride=2 if images.train.shape[-1] > 16 else 1)


class Head(nn.Module):
    """Logits [N, 10] of what the last block answers."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean((2, 3)))


def cut(net: ResNet, stages: int) -> list[nn.Sequential]:
    """The network as that many parts, each with about as many of its layers.

    Raises:
        ValueError: more stages than layers.
    """
    layers = [nn.Sequential(net.stem, net.norm, nn.ReLU()), *net.blocks, Head(net.head)]
    if stages > len(layers):
        raise ValueError(f"{stages} stages are more than the network's {len(layers)} layers")
    ends = [round(len(layers) * (stage + 1) / stages) for stage in range(stages)]
    return [nn.Sequential(*layers[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def between(parts: list[nn.Sequential], example: torch.Tensor) -> list[torch.Tensor]:
    """What goes into each part, and out of the last one, if `example` goes into the first: stages are told.

    Asked by itself, torch would find out by a training pass over memory that nobody has written, which batch norms
    would remember.
    """
    found = [example]
    for part in parts:
        found.append(part.eval()(found[-1]).detach().requires_grad_())
        part.train()
    return found
