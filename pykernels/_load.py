"""Finds and loads the ops libraries. Importing pykernels never fails for a missing library: the first call does, and says why."""

from __future__ import annotations

import pathlib

import torch

import pykernels


def library_path(name: str) -> pathlib.Path | None:
    """The file of the ops library `name` in this installation, or None."""
    for folder in pykernels.__path__:
        path = pathlib.Path(folder) / f"{name}.so"
        if path.exists():
            return path
    return None


def load(name: str) -> str | None:
    """Load one ops library; None when it is loaded, else the reason, as a sentence the user can act on."""
    path = library_path(name)
    if path is None:
        return (
            f"{name}.so is not in {', '.join(pykernels.__path__)}: install a wheel, or build it with "
            "`pip install --no-build-isolation -e .` in a checkout"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < (2, 10):
            return f"{path} needs torch 2.10 or newer; this is torch {torch.__version__}"
        return f"{path} could not be loaded beside torch {torch.__version__}: {error}"
    return None


CPU_ERROR: str | None = load("pykernels_cpu")
