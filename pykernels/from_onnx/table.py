"""The table of operators: ONNX's name -> a function of torch calls, which `graph` puts into the graph.

A function's positional parameters are the operator's inputs in their order, its keywords the attributes, by the names
that ONNX's documents give them. It runs when the graph is run or exported, so it may ask its tensors for ranks and
sizes, which may be symbols.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

__all__ = ["OLDER", "ON_SIZES", "OPERATORS", "Operator", "Refused", "on_sizes", "operator", "refusals"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Refused(ValueError):
    """Why a node is not understood."""


def refusals(found: Iterable[tuple[str, str, str]]) -> str:
    """What is not understood, from operators, their nodes' names, and why: ``Loop (a, b); Conv (c: auto_pad SAME)``."""
    kinds: dict[str, list[str]] = {}
    for kind, name, why in found:
        kinds.setdefault(kind, []).append(f"{name}: {why}" if why else name)
    return "; ".join(f"{kind} ({', '.join(nodes)})" for kind, nodes in kinds.items())


class Operator(NamedTuple):
    """How an operator is computed.

    Attributes:
        function: as above.
        known: parameters that must be known before data is: lists of numbers, or of sizes.
        numbers: constants of no dimensions are passed as Python's numbers, those of one element as lists of one, and
            sizes as numbers and lists of them.
        several: it answers with a tuple, and takes the number of outputs as ``outputs``.
    """

    function: Callable[..., Any]
    known: frozenset[str]
    numbers: bool
    several: bool

    def parameters(self, count: int) -> list[str]:
        """The names of the first inputs; those of a variable number have one name."""
        found: list[str] = []
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                return (found + [parameter.name] * count)[:count]
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                found.append(parameter.name)
        return found[:count]


OPERATORS: dict[str, Operator] = {}
OLDER: dict[str, tuple[int, Operator]] = {}
"""Operators that were others before an opset, and are of the table above since."""
ON_SIZES: dict[str, Callable[..., Any]] = {}
"""What is computed with sizes before there is data: the same operators on Python's numbers and lists of them."""


def operator(
    *names: str, known: str = "", numbers: bool = False, several: bool = False, before: int | None = None
) -> Callable[[Function], Function]:
    """Enter a function under ONNX's names, for the opsets below `before` where that is given."""

    def enter(function: Function) -> Function:
        entry = Operator(function, frozenset(known.split()), numbers, several)
        for name in names:
            if before is None:
                OPERATORS[name] = entry
            else:
                OLDER[name] = before, entry
        return function

    return enter


def on_sizes(*names: str) -> Callable[[Function], Function]:
    """Enter a function of numbers and lists of numbers under ONNX's names."""

    def enter(function: Function) -> Function:
        for name in names:
            ON_SIZES[name] = function
        return function

    return enter
