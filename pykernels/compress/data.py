"""What is learned from and judged by: entries of loaders, held to the shapes of the example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pykernels.precision.budget import Budget, Reference
from pykernels.prune.entries import check_repeatable, read_entry

__all__ = ["Judge", "Loader", "hold_out", "is_classes", "take"]

ENOUGH = 256
"""Samples of the training data that channels are weighed and ranges observed with, where there are no other data."""
HELD = 4
"""Of so many entries one is held out, where answers are judged by agreement."""


class Loader:
    """An endless pass over a loader, which each iteration goes on with; every entry is held to the example.

    Args:
        loader: yields inputs, each a tensor or a tuple of inputs that a label may follow.
        argument: what it is called in messages.
        example: the inputs of one call.

    Raises:
        ValueError: it is an iterator, which can be read once only.
    """

    def __init__(self, loader: Iterable[Any], argument: str, example: Sequence[Any]) -> None:
        check_repeatable(loader, argument)
        self.loader, self.argument, self.example = loader, argument, tuple(example)
        self._rest: Iterator[Any] | None = None
        self._read = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self._rest is None:
                self._rest, self._read = iter(self.loader), 0
            for entry in self._rest:
                self.check(entry, self._read)
                self._read += 1
                yield entry
            if not self._read:
                raise ValueError(f"{self.argument}: it is empty")
            self._rest = None

    def once(self) -> Iterator[Any]:
        """One pass from the start."""
        for number, entry in enumerate(self.loader):
            self.check(entry, number)
            yield entry

    def check(self, entry: Any, number: int) -> None:
        """Raises:
        TypeError: the entry is neither a tensor nor a sequence of so many inputs.
        ValueError: its inputs differ from the example's in more than the batch size.
        """
        args, _ = read_entry(entry, len(self.example), number, self.argument)
        for place, (x, like) in enumerate(zip(args, self.example, strict=True)):
            if not isinstance(like, torch.Tensor):
                continue
            if not isinstance(x, torch.Tensor) or x.dtype != like.dtype or x.shape[1:] != like.shape[1:]:
                found = f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
                raise ValueError(
                    f"{self.argument}: input {place} of entry {number} is {found}, the example's {like.dtype} "
                    f"{list(like.shape)}; only the batch size may differ"
                )


def take(loader: Loader, samples: int | None = None) -> list[Any]:
    """The entries of one pass, or as many as hold so many samples.

    Raises:
        ValueError: there are none.
    """
    found, count = [], 0
    for entry in loader.once():
        found.append(entry)
        count += _rows(entry)
        if samples is not None and count >= samples:
            break
    if not found:
        raise ValueError(f"{loader.argument}: it is empty")
    return found


def hold_out(entries: Sequence[Any], argument: str) -> tuple[list[Any], list[Any]]:
    """Entries to fit to, and others to judge by: the last of every `HELD`, of two or three the last.

    Raises:
        ValueError: there is one only.
    """
    if len(entries) < 2:
        raise ValueError(
            f"{argument}: it has one entry. Without validate, answers are judged on entries that nothing is fitted to, "
            "so two at least are needed: give smaller batches, or validate"
        )
    step = min(HELD, len(entries))
    held = [entry for place, entry in enumerate(entries) if place % step == step - 1]
    return [entry for place, entry in enumerate(entries) if place % step != step - 1], held


def _rows(entry: Any) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(entry) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return leaves[0].shape[0] if leaves else 1


def is_classes(answer: Any) -> bool:
    """Whether the first float tensor of an answer is [N, C, ...], C above 1."""
    leaves = [x for x in pytree.tree_leaves(answer) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return bool(leaves) and leaves[0].dim() >= 2 and leaves[0].shape[1] > 1


class Judge:
    """How good a network is, the higher the better.

    Attributes:
        measure: in a word: accuracy (by `validate`), agreement (the share of answers with the original's largest
            class), or likeness (1 - |y - y0| / |y0|, where answers are no classes).
        samples: how many it is judged by; None where `validate` knows.
    """

    def __init__(
        self, validate: Callable[[Any], float] | None, original: Any, example: Sequence[Any], held: Sequence[Any]
    ) -> None:
        self.validate, self.samples = validate, None
        self.measure = "accuracy"
        if validate is None:
            with torch.no_grad():
                classes = is_classes(original(*example))
            self.measure = "agreement" if classes else "likeness"
            self.samples = sum(map(_rows, held))
            samples = [tuple(pytree.tree_leaves(read_entry(entry, len(example), 0)[0])) for entry in held]
            spec = pytree.tree_structure((tuple(example), {}))
            budget = Budget(agreement=1.0) if classes else Budget(error=1.0)
            self.reference = Reference(original, samples, spec, budget)

    def __call__(self, network: Any) -> float:
        """Raises:
        ValueError: `validate` gives no finite number.
        """
        if self.validate is None:
            kept = self.reference.keeps(network)
            return 1.0 - kept.error if kept.agreement is None else kept.agreement
        found = self.validate(network)
        try:
            value = float(found)
        except (TypeError, ValueError):
            raise ValueError(f"validate: it returned {type(found).__name__}, not a number") from None
        if not math.isfinite(value):
            raise ValueError(f"validate: it returned {value}")
        return value
