"""Real photographs for the demo and the benchmarks: a folder of them, or the 20 inside the package ``foolbox``.

foolbox is not imported, its files are read: nothing is downloaded at run time.

A photograph is prepared as EfficientNet-Lite0 (`pykernels.bench.zoo`) was trained to see it: short side 256 (bicubic),
the centre 224x224, ``(x - 127) / 128`` per channel, RGB, NCHW fp32.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SHORT_SIDE = 256
CROP = 224
INSTALL_HINT = "pip install 'pykernels[demo]'"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


@dataclass(frozen=True)
class Photographs:
    """Prepared photographs: ``images`` fp32 [N, 3, 224, 224], ``labels`` int64 [N], ``files`` N paths."""

    images: torch.Tensor
    labels: torch.Tensor
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def normalized(self) -> Photographs:
        """The same as torchvision's networks were trained to see them: in [0, 1], less ImageNet's mean, over its
        standard deviation."""
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (self.images * 128.0 + 127.0) / 255.0
        return replace(self, images=(pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))

    def batches(self, size: int = 10) -> list[torch.Tensor]:
        """The images in batches of at most ``size``, as calibration wants them."""
        return list(self.images.split(size))


def load_photograph(file: Path | str) -> torch.Tensor:
    """Read one photograph as the network sees it: fp32 [3, 224, 224], values in about [-1, 1]."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    scale = SHORT_SIDE / min(width, height)
    size = (round(width * scale), round(height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - CROP) // 2, (size[1] - CROP) // 2
    pixels = np.asarray(image.crop((left, top, left + CROP, top + CROP)), dtype=np.float32)
    return torch.from_numpy((pixels - 127.0) / 128.0).permute(2, 0, 1).contiguous()


def load_folder(folder: Path | str, limit: int | None = None) -> Photographs:
    """Read a folder of photographs whose file names start with the class index (``281_tabby.jpg``).

    Raises:
        FileNotFoundError: ``folder`` does not exist or holds no photograph.
        ValueError: a file name does not start with a class index.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: {folder} is not a directory")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"folder: {folder} holds no photograph ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return _load(files[:limit], re.compile(r"^(\d+)(?:_|$)"))


def load_foolbox_photographs(limit: int | None = None) -> Photographs:
    """The 20 labelled ImageNet photographs inside the package ``foolbox``, in the package's order."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the photographs come with the package foolbox: {INSTALL_HINT}")
    files = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
    if not files:
        raise FileNotFoundError(f"the installed foolbox carries no ImageNet photographs: {INSTALL_HINT}")
    return _load(files[:limit], re.compile(r"^imagenet_\d+_(\d+)$"))


def _load(files: list[Path], label_pattern: re.Pattern[str]) -> Photographs:
    labels = []
    for file in files:
        found = label_pattern.match(file.stem)
        if found is None:
            raise ValueError(f"{file.name}: the file name must give the class index, like 281_tabby.jpg")
        labels.append(int(found.group(1)))
    return Photographs(torch.stack([load_photograph(file) for file in files]), torch.tensor(labels), tuple(files))
