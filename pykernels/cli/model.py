"""A model that a command is given by name, and the bar that is shown while it is optimized."""

from __future__ import annotations

import importlib
import pathlib
import runpy
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
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

from pykernels.cli.errors import fail

__all__ = ["bar", "columns", "load_model"]


def columns() -> tuple[ProgressColumn, ...]:
    """Of the bar."""
    return (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def bar(progress: Progress, task: TaskID, what: str) -> Callable[[str, int, int], None]:
    """A callback ``(stage, done, total)`` that moves the bar of `task` and names the stage behind `what`."""

    def show(stage: str, done: int, total: int) -> None:
        progress.update(task, description=f"{what}: {stage}", completed=done, total=total)

    return show


def load_model(name: str, device: torch.device) -> torch.nn.Module:
    """The network, on `device`."""
    if name.endswith(".pt2"):
        if not pathlib.Path(name).is_file():
            fail(f"MODEL: there is no file {name}")
        return move_to_device_pass(torch.export.load(name), device).module()
    module_name, separator, attribute = name.partition(":")
    if not separator or not attribute:
        fail(f"MODEL: {name!r} is neither a .pt2 file nor module:callable nor file.py:callable")
    sys.path.insert(0, str(pathlib.Path.cwd()))  # a file of the user's own, as `python -m` would find it
    try:
        file = module_name.endswith(".py")
        module = SimpleNamespace(**runpy.run_path(module_name)) if file else importlib.import_module(module_name)
        factory = getattr(module, attribute)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        fail(f"MODEL: {name}: {error}")
    found = factory if isinstance(factory, torch.nn.Module) else factory()
    if not isinstance(found, torch.nn.Module):
        fail(f"MODEL: {name} returned {type(found).__name__}, not an nn.Module")
    return found.to(device)
