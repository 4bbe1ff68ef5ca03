"""Tensors as they are sent: raw little-endian bytes in row-major order, or lists of numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from pykernels.serve.errors import Invalid
from pykernels.serve.signature import DATATYPES

__all__ = ["from_bytes", "from_list", "to_bytes", "to_list"]

# Requests' bytes are read, never written: networks whose calls write into something are not served.
warnings.filterwarnings("ignore", message="The given buffer is not writable")
_MOST = 1 << 56  # elements, be some sizes 0 or not: strides of more overflow in NumPy and torch
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # as what lists of them are read


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: Any) -> torch.Tensor:
    """An input over the memory of `data`, which is copied only where numbers stand at odd addresses.

    Args:
        name: of the input, for errors.
        datatype: of the Open Inference Protocol.
        data: what supports Python's buffer protocol.

    Raises:
        Invalid: an unknown datatype, a shape that is none, or bytes in another number than they need.
    """
    dtype = _dtype(name, datatype)
    needed = _count(name, shape) * dtype.itemsize
    given = memoryview(data).nbytes
    if given != needed:
        raise Invalid(
            f"input {name!r:.80} of shape {list(shape)} and {datatype} needs {needed} bytes, {given} are given"
        )
    if not needed:
        return torch.empty(list(shape), dtype=dtype)
    if dtype is torch.bool:  # another byte than 0 and 1 would be neither true nor false
        return torch.frombuffer(data, dtype=torch.uint8).view(list(shape)) != 0
    x = torch.frombuffer(data, dtype=torch.uint8)
    if x.data_ptr() % dtype.itemsize:
        x = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return x.view(dtype).view(list(shape))


def from_list(name: str, datatype: str, shape: Sequence[int] | None, data: Any) -> torch.Tensor:
    """An input of numbers in lists, nested or flat.

    Args:
        shape: that of `data` where it is None.

    Raises:
        Invalid: an unknown datatype, a shape that is none, or numbers of another kind, range or count.
    """
    dtype = _dtype(name, datatype)
    wide = _WIDE.get(dtype, dtype)
    kinds = "b" if dtype is torch.bool else "biuf" if dtype.is_floating_point else "iu"
    try:
        found = numpy.asarray(data)
    except (ValueError, OverflowError, RecursionError) as error:
        raise Invalid(f"input {name!r:.80}: its lists differ in length") from error
    if found.dtype.kind not in kinds and found.size:
        wanted = {"b": "true and false", "iu": "whole numbers"}.get(kinds, "numbers")
        raise Invalid(f"input {name!r:.80} of {datatype} must be lists of {wanted}, all as long")
    if kinds == "iu" and found.size:
        limits = torch.iinfo(dtype)
        if int(found.min()) < limits.min or int(found.max()) > limits.max:
            raise Invalid(f"input {name!r:.80} holds numbers that {datatype} does not")
    if shape is not None:
        if _count(name, shape) != found.size:
            raise Invalid(
                f"input {name!r:.80} of shape {list(shape)} needs {_count(name, shape)} numbers, {found.size} are given"
            )
        found = found.reshape(tuple(shape))
    with numpy.errstate(over="ignore"):
        x = torch.from_numpy(found.astype(str(wide).removeprefix("torch."))).to(dtype)
    if (
        kinds == "biuf"
        and found.dtype.kind == "f"
        and not numpy.array_equal(numpy.isfinite(found), x.isfinite().numpy())
    ):
        raise Invalid(f"input {name!r:.80} holds numbers that {datatype} does not")
    return x


def to_bytes(y: torch.Tensor) -> bytes:
    """The raw bytes of an output."""
    return y.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if y.numel() else b""


def to_list(y: torch.Tensor) -> list[Any]:
    """The numbers of an output, flat, in row-major order."""
    return y.reshape(-1).tolist()


def _dtype(name: str, datatype: str) -> torch.dtype:
    if datatype not in DATATYPES:
        raise Invalid(f"input {name!r:.80}: datatype {datatype!r:.80} is none of {', '.join(DATATYPES)}")
    return DATATYPES[datatype]


def _count(name: str, shape: Sequence[int]) -> int:
    if len(shape) > 64 or any(type(size) is not int or not 0 <= size < 1 << 40 for size in shape):
        raise Invalid(f"input {name!r:.80}: shape {list(shape)!s:.80} is none: sizes are whole numbers from 0 on")
    if math.prod(max(size, 1) for size in shape) >= _MOST:
        raise Invalid(f"input {name!r:.80}: shape {list(shape)!s:.80} is too large")
    return math.prod(shape)
