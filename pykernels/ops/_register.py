"""What torch.compile, torch.export and autograd know of an op besides its kernels, registered beside its function.

Without the library there is no op to register anything for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from pykernels.ops import _load

__all__ = ["fake", "with_gradient"]

F = TypeVar("F", bound=Callable[..., Any])


def fake(*ops: str) -> Callable[[F], F]:
    """Register the decorated shape function of `ops`: it names the arguments that it needs and gets no others.

    A shape function must be right for contiguous and channels_last inputs and for symbolic sizes, so it computes with
    sizes only and never reads a packed tensor. Its own defaults stand for arguments that a call leaves out,
    or that one of `ops` does not have.
    """

    def register(function: F) -> F:
        if _load.CPU_ERROR is None:
            for op in ops:
                torch.library.register_fake(f"pykernels::{op}", _bound(op, function))
        return function

    return register


def _bound(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as the dispatcher calls it, with the arguments of the op's schema."""
    schema = [argument.name for argument in getattr(torch.ops.pykernels, op).default._schema.arguments]
    wanted = inspect.signature(function).parameters
    places = {name: place for place, name in enumerate(schema) if name in wanted}

    def call(*args: object, **kwargs: object) -> Any:
        given = {name: args[place] for name, place in places.items() if place < len(args)}
        return function(**given, **{name: value for name, value in kwargs.items() if name in places})

    return call


def with_gradient(op: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Give the op a gradient, written in aten so that it compiles, exports and differentiates again."""
    if _load.CPU_ERROR is None:
        torch.library.register_autograd(f"pykernels::{op}", backward, setup_context=setup)
