"""An ONNX file as a checked message and tensors; weights that lie outside the file must lie in its folder.

Nobody trusts the file: what protobuf, ONNX's own checker and we find wrong with it is a ValueError that names it.
"""

from __future__ import annotations

import importlib
import math
import pathlib
from typing import Any

import numpy as np
import torch

__all__ = ["OPSETS", "dtype_of", "read", "require", "tensor_of"]

OPSETS = range(7, 29)
"""The versions of ONNX's operators that are understood."""

_DTYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
_MOST = 1 << 48  # elements: more are no tensor's, and torch counts in 64 bits
_DATA = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data", "raw_data")


def require(module: str = "onnx") -> Any:
    """The package `onnx`, or a module of it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("ONNX files need the package onnx: pip install 'pykernels[onnx]'") from error


def read(path: pathlib.Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The file's ModelProto with its functions inlined, and its initializers, whose bytes the message has no more.

    Raises:
        ImportError: onnx is not installed.
        ValueError: it is no valid ONNX model, of operators of other versions than `OPSETS`, or it names data outside
            its folder.
        OSError: it cannot be read.
    """
    onnx = require()
    content = path.read_bytes()
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as error:  # whichever implementation of protobuf there is has an exception of its own
        raise ValueError(f"not an ONNX model: {error}") from error
    tensors = {}
    for tensor in model.graph.initializer:
        tensors[tensor.name] = tensor_of(tensor, path.parent)
        for field in (*_DATA, "dims", "external_data", "data_location"):
            tensor.ClearField(field)
        tensor.dims.append(0)
    del model.graph.value_info[:]  # nobody reads what files say of values, so they need not say it right
    for value in model.graph.output:
        value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"not a valid ONNX model: {' '.join(str(error).split())}") from error
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if versions.get("ai.onnx") not in OPSETS:
        understood = f"{OPSETS[0]} to {OPSETS[-1]} are understood, and onnx.version_converter changes it"
        raise ValueError(f"its operators are of opset {versions.get('ai.onnx')}: {understood}")
    if model.functions:
        model = require("onnx.inliner").inline_local_functions(model)
    return model, tensors


def dtype_of(kind: int, name: str) -> torch.dtype:
    """A TensorProto.DataType as torch's.

    Raises:
        ValueError: torch's CPU ops have no such dtype, or there is none; the message begins with `name`.
    """
    names = require().TensorProto.DataType
    word = names.Name(kind) if kind in names.values() else str(kind)
    if word not in _DTYPES:
        raise ValueError(f"{name}: tensors of {word} are not understood")
    return _DTYPES[word]


def tensor_of(tensor: Any, folder: pathlib.Path) -> torch.Tensor:
    """A TensorProto's values, mapped where they lie in a file of their own.

    Raises:
        ValueError: sizes and bytes do not agree, the dtype is not understood, or a file outside `folder` is named.
    """
    onnx = require()
    name, shape = tensor.name or "a constant", list(tensor.dims)
    dtype = dtype_of(tensor.data_type, name)
    if any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) > _MOST:  # zeros hide the others
        raise ValueError(f"{name}: its sizes are {shape}")
    length = math.prod(shape) * dtype.itemsize
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        data = _external(tensor, name, folder, length)
    elif tensor.HasField("raw_data"):
        data = np.frombuffer(tensor.raw_data, np.uint8)
    else:
        try:
            found = onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # NumPy's and ONNX's, of a message that nobody has checked yet
            raise ValueError(f"{name}: {error}") from error
        found = found.astype(np.float32) if dtype is torch.bfloat16 else found
        return torch.from_numpy(np.ascontiguousarray(found)).to(dtype).reshape(shape).clone()
    if data.nbytes != length:
        raise ValueError(f"{name}: {data.nbytes} bytes for {dtype} of sizes {shape}")
    if not length:
        return torch.empty(shape, dtype=dtype)
    owned = data if data.flags.writeable else data.copy()
    values = torch.from_numpy(owned).view(torch.uint8)
    if dtype is torch.bool:
        return (values != 0).reshape(shape)
    aligned = values if values.data_ptr() % dtype.itemsize == 0 else values.clone()
    return aligned.view(dtype).reshape(shape)


def _external(tensor: Any, name: str, folder: pathlib.Path, length: int) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in a file beside the model, mapped copy on write."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        offset, count = int(entries.get("offset", 0)), int(entries.get("length", length))
    except ValueError as error:
        raise ValueError(f"{name}: external data: {error}") from error
    inside = folder.resolve()
    try:
        file = (inside / location).resolve()
        there = location != "" and file.is_relative_to(inside) and file.is_file()
    except (OSError, RuntimeError, ValueError):  # links in a circle, names with zeros
        there = False
    if not there:
        raise ValueError(f"{name}: its external data is {location!r}, which is no file in the model's folder")
    if offset < 0 or count != length or offset + count > file.stat().st_size:
        raise ValueError(f"{name}: {count} bytes at {offset} of {location!r} for a tensor of {length} bytes")
    if not count:
        return np.empty(0, np.uint8)
    return np.memmap(file, np.uint8, "c", offset, (count,))
