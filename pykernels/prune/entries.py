"""What a call is given: the example, and what a loader yields, the inputs of a call and a label that may follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pykernels.ops.errors import reason

__all__ = ["at_entry", "check_loader", "check_names", "check_repeatable", "read_entry", "read_example"]


def read_example(example_inputs: Any) -> tuple[Any, ...]:
    """The positional inputs of one call; a lone tensor stands for a tuple of one.

    Raises:
        ValueError: they are none.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if not isinstance(example_inputs, (list, tuple)) or not example_inputs:
        raise ValueError(
            "example_inputs: a tensor, or a tuple of the positional inputs of one call, is needed, not "
            f"{'an empty ' if isinstance(example_inputs, (list, tuple)) else ''}{type(example_inputs).__name__}"
        )
    return tuple(example_inputs)


def check_names(names: Any, argument: str) -> tuple[str, ...]:
    """Names of modules.

    Raises:
        ValueError: it is no iterable of strings, or a string itself.
    """
    found = None if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    if found is None or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{argument}: a list of names of modules is needed, not {names!r}")
    return found


def check_repeatable(data: Any, argument: str) -> None:
    """Raises:
    ValueError: it cannot be read several times, or is one entry itself.
    """
    if isinstance(data, Iterator):
        raise ValueError(f"{argument}: an iterator can be read once only; give a loader or a list")
    check_loader(data, argument)


def check_loader(data: Any, argument: str) -> None:
    """Raises:
    ValueError: it is one entry itself, or nothing that can be read.
    """
    if isinstance(data, (torch.Tensor, str, Mapping)) or not isinstance(data, Iterable):
        raise ValueError(f"{argument}: a loader or a list of batches is needed, not one {type(data).__name__}")


def read_entry(entry: Any, inputs: int, number: int, argument: str = "data") -> tuple[tuple[Any, ...], Any]:
    """The inputs of one call, and the label or None.

    Args:
        inputs: how many there are.
        number: of the entry, for the message.
        argument: what the loader is called there.

    Raises:
        TypeError: the entry is neither a tensor nor a sequence of so many inputs.
    """
    if isinstance(entry, torch.Tensor):
        entry = (entry,)
    if not isinstance(entry, (list, tuple)) or len(entry) < inputs:
        raise TypeError(
            f"{argument}: entry {number} is a {type(entry).__name__}; a tensor is needed, or a tuple of {inputs} "
            f"input{'s' * (inputs != 1)} that a label may follow"
        )
    return tuple(entry[:inputs]), entry[inputs] if len(entry) > inputs else None


@contextmanager
def at_entry(number: int) -> Iterator[None]:
    """What the model, or a loss, raises on an entry of the data is an error that names it.

    Raises:
        ValueError: with the first line of what was raised.
    """
    try:
        yield
    except Exception as error:  # the user's own code runs in there
        raise ValueError(f"data: the model, or the loss, fails on entry {number}: {reason(error)}") from error
