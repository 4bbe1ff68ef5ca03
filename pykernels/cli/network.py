"""The saved network that a command is given, and inputs for it."""

from __future__ import annotations

import pathlib
import re
from typing import Annotated

import torch
import typer

import pykernels
from pykernels.cli.errors import fail

__all__ = ["Network", "inputs_like", "load"]

Network = Annotated[
    pathlib.Path, typer.Argument(metavar="NETWORK", help="A file that `pykernels optimize` or `save` wrote.")
]


def load(path: pathlib.Path) -> pykernels.Optimized:
    try:
        return pykernels.load(path)
    except (OSError, ValueError) as error:
        fail(f"NETWORK: {str(error).removeprefix('path: ')}")


def inputs_like(
    fast: pykernels.Optimized, batch: int | None = None, size: str | None = None
) -> tuple[torch.Tensor, ...]:
    """Flat inputs like the example's, of another batch size, or another height and width, on request."""
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", size or "1x1")
    if match is None:
        fail(f"--size: {size!r} is not a height and a width: 224x224 is")
    if None in fast.example:
        fail("NETWORK: some of its inputs are no tensors; call plan(inputs) of the loaded network from Python")
    example = [(dtype, list(shape)) for dtype, shape in filter(None, fast.example)]
    if size is not None and all(len(shape) != 4 for _, shape in example):
        fail("--size: the network has no input of four dimensions")
    inputs = []
    for dtype, shape in example:
        if batch is not None and shape:
            shape[0] = batch
        if size is not None and len(shape) == 4:
            shape[2:] = [int(match[1]), int(match[2])]
        # Numbers that are no floats may be places in something: 0 is one.
        inputs.append(torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype))
    return tuple(inputs)
