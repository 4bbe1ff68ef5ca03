"""What a loader yields: the inputs of a call, and a label that may follow."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["read_entry"]


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
