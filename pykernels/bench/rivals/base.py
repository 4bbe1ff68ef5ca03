"""The shape that every rival has: `prepare(case)` gives a function of no arguments that does the case's work once."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pykernels.bench.case import Case

Run = Callable[[], Any]
"""Does the work once; its result is a tensor, or an array that `torch.as_tensor` takes."""


class Absent(Exception):
    """This rival cannot take part; the message says why, for the report."""


class Rival(abc.ABC):
    """One way to do a case's work in one precision.

    name: as the tables show it. precision: fp32, bf16 or int8. families: those whose cases it can take.
    """

    name: str
    precision: str
    families: frozenset[str]
    ours = False

    def __init__(self, precision: str) -> None:
        self.precision = precision

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"

    @abc.abstractmethod
    def prepare(self, case: Case) -> Run:
        """Do everything that is done once (convert, compile, pack, calibrate) and return what is done each time.

        Raises:
            Absent: it is not installed, or has no way to do this case.
        """

    def meaning(self, case: Case, output: Any) -> Any:
        """What is held against the oracle: of codecs what the bytes mean, else `output`, which the run returned."""
        return output


def require(module: str, install: str | None = None) -> ModuleType:
    """Import `module`, or raise `Absent` with what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{module} does not import ({error}): pip install {install or module}") from error


def cast(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Floating-point inputs in `dtype`, memory format kept; others as they are."""
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def calibration_parts(case: Case) -> list[torch.Tensor]:
    """The case's calibration in batches of the size that its inputs have."""
    size = case.inputs[0].shape[0]
    return [part.contiguous() for batch in case.calibration for part in batch.split(size) if part.shape[0] == size]


def require_floats(case: Case) -> nn.Module:
    """The case's float module, or `Absent`. (Integers that a network looks up, token ids, are no bytes of a layer.)"""
    if case.model is None or any(x.dtype == torch.uint8 for x in case.inputs):
        raise Absent("the case has no float form")
    return case.model
