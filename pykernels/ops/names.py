"""The names that C++ and Python share, with what both must know of each: names.json, of which CMake makes a header too.

What an entry does stands where it is implemented: activations in csrc/cpu/isa/math.h, codecs in csrc/cpu/compress, both
in pykernels/cuda/triton and pykernels/reference. The order of a list is that of the enumeration in C++.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

__all__ = [
    "ACTIVATIONS",
    "BY_ATEN",
    "CODECS",
    "DTYPES",
    "ELEMENTS",
    "ISAS",
    "PLAN_STEPS",
    "REALS",
    "Activation",
    "Codec",
    "words",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Activation:
    """A function that kernels apply to their results.

    Attributes:
        name: as the ops take it.
        aten: the ATen op that it is, say "aten.hardswish"; none for "none".
        module: the class of torch.nn that it is, say "Hardswish".
    """

    name: str
    aten: str | None = None
    module: str | None = None


@dataclass(frozen=True)
class Codec:
    """What a codec's records look like.

    Attributes:
        name: as the ops take it.
        bits: of an element's code.
        header: bytes before the codes of a record: those of the scale, or 0.
        stochastic: whether it knows stochastic rounding.
    """

    name: str
    bits: int
    header: int
    stochastic: bool


def words(names: Iterable[str], between: str = ", ") -> str:
    """ "a, b, c" for an error message, with `between` before the last."""
    *others, last = names
    return between.join([", ".join(others), last])


def _dtype(name: str, dtype: str) -> str:
    return dtype


_LISTS: dict[str, list[dict[str, Any]]] = json.loads((pathlib.Path(__file__).parent / "names.json").read_text())


def _read(key: str, entry: Callable[..., T]) -> Mapping[str, T]:
    return MappingProxyType({row["name"]: entry(**row) for row in _LISTS[key]})


# Builds of the CPU kernels, the better ones later.
ISAS: tuple[str, ...] = tuple(row["name"] for row in _LISTS["isas"])
ACTIVATIONS: Mapping[str, Activation] = _read("activations", Activation)
BY_ATEN = {known.aten: known.name for known in ACTIVATIONS.values() if known.aten}
CODECS: Mapping[str, Codec] = _read("codecs", Codec)
# Of real numbers, and of packed weights: what kernels call them, and torch's name of the dtype.
REALS: Mapping[str, str] = _read("reals", _dtype)
ELEMENTS: Mapping[str, str] = _read("elements", _dtype)
# Of the values of a plan, and the kinds of its steps, each by its number.
DTYPES: Mapping[str, str] = _read("dtypes", _dtype)
PLAN_STEPS: tuple[str, ...] = tuple(row["name"] for row in _LISTS["plan_steps"])
