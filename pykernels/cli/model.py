"""The model that a command is given, and inputs for it from a folder."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from torch.export.passes import move_to_device_pass

from pykernels import from_onnx
from pykernels.cli.errors import fail
from pykernels.cuda import registry

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "InputShape",
    "Mean",
    "Model",
    "Std",
    "bar",
    "columns",
    "device_of",
    "hush",
    "inputs_in",
    "load_model",
    "load_with_example",
    "named",
    "shapes_of",
]

IMAGENET_MEAN, IMAGENET_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
TENSORS = {".pt", ".npy"}

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="An exported program (.pt2), an ONNX file (.onnx), or module:callable or file.py:callable that returns an "
        "nn.Module.",
    ),
]
InputShape = Annotated[
    str, typer.Option(help="Shape of the example input, batch first: 1,3,224,224. Several inputs: separate with ';'.")
]
Mean = Annotated[str, typer.Option(help="Per channel, of images scaled to 0..1.")]
Std = Annotated[str, typer.Option(help="Per channel, of images scaled to 0..1.")]


def hush() -> None:
    """Keep the terminal for our own words: torchao, when imported, logs each CUDA library that did not load."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def columns() -> tuple[ProgressColumn, ...]:
    """Of the bar."""
    return (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def bar(progress: Progress, task: TaskID, what: str) -> Callable[[str, int, int], None]:
    """A callback ``(stage, done, total)`` that moves the bar of `task` and names the stage behind `what`."""

    def show(stage: str, done: int, total: int) -> None:
        progress.update(task, description=f"{what}: {stage}", completed=done, total=total)

    return show


def shapes_of(text: str) -> list[list[int]]:
    """The shapes that --input-shape names."""
    shapes = [_numbers("--input-shape", part, int) for part in text.split(";")]
    if any(size < 1 for shape in shapes for size in shape):
        fail("--input-shape: sizes are whole numbers of at least 1")
    return shapes


def device_of(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f"--device: {name!r} is no device; cpu, cuda, cuda:0, cuda:1 ... are")
    complaint = registry.unusable(device)
    if complaint is not None:
        fail(f"--device: {name} cannot be used: {complaint}")
    return device


def load_model(name: str, device: torch.device) -> torch.nn.Module:
    """The network, on `device`."""
    if name.endswith(".onnx"):
        try:
            return from_onnx.load(name).to(device)
        except (ImportError, OSError, ValueError) as error:
            fail(f"MODEL: {error}")
    if name.endswith(".pt2"):
        if not pathlib.Path(name).is_file():
            fail(f"MODEL: there is no file {name}")
        return move_to_device_pass(torch.export.load(name), device).module()
    factory = named("MODEL", name, "a .pt2 or .onnx file")
    found = factory if isinstance(factory, torch.nn.Module) else factory()
    if not isinstance(found, torch.nn.Module):
        fail(f"MODEL: {name} returned {type(found).__name__}, not an nn.Module")
    return found.to(device)


def load_with_example(
    name: str, input_shape: str | None, device: torch.device
) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The network on `device`, and random inputs of the shapes that --input-shape gives, or an ONNX file declares."""
    if input_shape is None and not name.endswith(".onnx"):
        fail(f"--input-shape: {name} needs the shape of an example, 1,3,224,224 say")
    shapes = None if input_shape is None else shapes_of(input_shape)
    network = load_model(name, device)
    source = from_onnx.source_of(network)
    if source is None:
        dtype = next((t.dtype for t in network.parameters() if t.is_floating_point()), torch.float32)
        return network, tuple(torch.randn(shape).to(device, dtype) for shape in shapes or [])
    try:
        return network, from_onnx.example_of(source, shapes)
    except ValueError as error:
        fail(f"--input-shape: {error}")


def named(option: str, name: str, otherwise: str | None = None) -> Any:
    """What a name stands for: module:attribute, or file.py:attribute.

    Args:
        option: that it was given to.
        otherwise: what it could have been instead, for the message.
    """
    module_name, separator, attribute = name.rpartition(":")
    if not separator or not attribute or not module_name:
        words = f"neither {otherwise} nor module:callable" if otherwise else "no module:callable"
        fail(f"{option}: {name!r} is {words}")
    path = pathlib.Path(module_name)
    sys.path.insert(0, str(pathlib.Path.cwd()))  # a file of the user's own, as `python -m` would find it
    if path.suffix == ".py":
        if not path.is_file():
            fail(f"{option}: there is no file {path}")
        sys.path.insert(0, str(path.parent.resolve()))
        module_name = path.stem
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, RuntimeError) as error:
        fail(f"{option}: {name}: {error}")


def inputs_in(
    option: str, folder: pathlib.Path, samples: int, shape: list[int], mean: str, std: str
) -> Iterator[torch.Tensor]:
    """The folder's images as fp32 [1, 3, H, W], prepared as torchvision's networks are fed; its tensors as they are."""
    if not folder.is_dir():
        fail(f"{option}: {folder} is not a folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES | TENSORS)[:samples]
    if not files:
        fail(f"{option}: {folder} holds no image and no .pt or .npy file")
    for file in files:
        yield _tensor(option, file, shape) if file.suffix in TENSORS else _image(option, file, shape, mean, std)


def _tensor(option: str, file: pathlib.Path, shape: list[int]) -> torch.Tensor:
    if file.suffix == ".npy":
        import numpy

        found: Any = torch.from_numpy(numpy.load(file, allow_pickle=False))
    else:
        found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, torch.Tensor) or list(found.shape[1:]) != shape[1:]:
        fail(f"{option}: {file} must hold one tensor of shape [N, {', '.join(map(str, shape[1:]))}]")
    return found


def _image(option: str, file: pathlib.Path, shape: list[int], mean: str, std: str) -> torch.Tensor:
    try:
        import numpy
        from PIL import Image
    except ImportError:
        fail(f"{option}: images need pillow: pip install pillow")
    if len(shape) != 4 or shape[1] != 3:
        fail(f"{option}: images need --input-shape N,3,H,W")
    height, width = shape[2:]
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    scale = (
        max(height / image.height, width / image.width) * 256 / 224
    )  # the border that classifiers are trained to lose
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255)
    prepared = (pixels - torch.tensor(_numbers("--mean", mean, float))) / torch.tensor(_numbers("--std", std, float))
    return prepared.permute(2, 0, 1)[None].contiguous()


def _numbers(option: str, text: str, kind: type[Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        fail(f"{option}: {text!r} is not a list of numbers separated by commas")
