"""A saved network: one flat file, mapped into memory. Nothing in it is executed, and what it says is not trusted.

::

    header    64 bytes: magic, version, crc32 and bytes of the JSON part, bytes of the file, zeros, crc32 of the header
    JSON      {"graphs": {name: graph}, "facts": {...}, "storages": [[bytes, crc32], ...],
              "tensors": [[storage, dtype, shape, strides, offset], ...]}, spaces to a multiple of 64 bytes
    storages  one after the other, each zero-padded to a multiple of 64 bytes, which its checksum covers

Numbers are little-endian; offsets and strides count elements. A storage is written once, however many tensors of
however many graphs lie in it. Checksums find accidents. They are no defence: what follows from a number is checked
whether or not they hold.

A reader maps the storages private, copy on write. So processes that load one file share its pages, and what a network
writes (its state) is its own. Like every mapped file it must not be truncated while it is in use; to replace it by
another one, as `write` does, is safe.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from pykernels.network.buffers import ALIGNMENT, whole
from pykernels.network.saved import graph_json
from pykernels.network.saved.literals import DTYPES, expect

__all__ = ["VERSION", "read", "write"]

MAGIC = b"PKNET\r\n\x1a"  # as PNG's: a transfer that takes it for text damages it visibly
VERSION = 3
HEADER = struct.Struct("<8sIIQQ28sI")
_MOST_JSON = 2**24  # bytes: twenty times what a network of ten thousand calls takes
_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
_DIMENSIONS = 64  # torch's own limit


def _padding(size: int) -> int:
    return -size % ALIGNMENT


# --- write ---


class _Tensors:
    """Tensors by their numbers, and the storages they lie in."""

    def __init__(self) -> None:
        self.entries: list[list[Any]] = []
        self.storages: list[torch.UntypedStorage] = []
        self._numbers: dict[int, int] = {}  # of tensors, by id
        self._places: dict[int, int] = {}  # of storages
        self._alive: list[torch.Tensor] = []

    def number(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._numbers:
            if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
                raise ValueError(f"a buffer is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
            if tensor.is_conj() or tensor.is_neg():
                tensor = tensor.resolve_conj().resolve_neg()
            storage = tensor.untyped_storage()
            if storage._cdata not in self._places:
                self._places[storage._cdata] = len(self.storages)
                self.storages.append(storage)
            place, shape, strides = self._places[storage._cdata], list(tensor.shape), list(tensor.stride())
            self._numbers[id(tensor)] = len(self.entries)
            self._alive.append(tensor)
            self.entries.append([place, _DTYPES[tensor.dtype], shape, strides, tensor.storage_offset()])
        return self._numbers[id(tensor)]


def write(path: str | os.PathLike[str], graphs: Mapping[str, fx.GraphModule], facts: dict[str, Any]) -> None:
    """Write `graphs`, on the CPU, and `facts`, which are JSON. What was at `path` stays until the file is whole.

    Raises:
        ValueError: something in a graph cannot be saved; the message names it.
        OSError: the file cannot be written.
    """
    tensors = _Tensors()
    content: dict[str, Any] = {
        "graphs": {name: graph_json.dump(graph, tensors.number) for name, graph in graphs.items()}
    }
    parts = [memoryview(whole(storage).numpy()) for storage in tensors.storages]
    sums = [zlib.crc32(bytes(_padding(part.nbytes)), zlib.crc32(part)) for part in parts]
    content["facts"], content["tensors"] = facts, tensors.entries
    content["storages"] = [[part.nbytes, crc] for part, crc in zip(parts, sums, strict=True)]
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * _padding(len(text))
    if len(text) > _MOST_JSON:
        raise ValueError(f"the network is too large to be saved: its description takes {len(text)} bytes")
    size = HEADER.size + len(text) + sum(part.nbytes + _padding(part.nbytes) for part in parts)
    # Under another name at first: a failure leaves what was there.
    partial = f"{os.fspath(path)}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(header(text, size))
            file.write(text)
            for part in parts:
                file.write(part)
                file.write(bytes(_padding(part.nbytes)))
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def header(text: bytes, size: int) -> bytes:
    """The header of a file of `size` bytes with the JSON part `text`."""
    facts = HEADER.pack(MAGIC, VERSION, zlib.crc32(text), len(text), size, bytes(28), 0)[:-4]
    return facts + zlib.crc32(facts).to_bytes(4, "little")


# --- read ---


def read(path: str | os.PathLike[str]) -> tuple[dict[str, graph_json.Unbuilt], dict[str, Any]]:
    """The graphs and facts that `write` wrote. Buffers lie in the mapped file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another version, not one of ours, or says what cannot be. Nothing of it was run.
        OSError: it cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe is refused, not waited for
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size < HEADER.size:
            raise ValueError("it is truncated, or was not written by pykernels")
        memory = mmap.mmap(file, status.st_size, access=mmap.ACCESS_COPY)
    finally:
        os.close(file)
    return parse(memory)


def parse(memory: mmap.mmap | bytearray) -> tuple[dict[str, graph_json.Unbuilt], dict[str, Any]]:
    """The graphs and facts in the bytes of a file, writable ones, which the graphs' buffers lie in.

    Raises:
        ValueError: they are none.
    """
    content, begin = _content(memory)
    try:
        storages = _storages(memory, begin, expect(content["storages"], list, "storages"))
        tensors = [_tensor(entry, storages) for entry in expect(content["tensors"], list, "tensors")]
        graphs = {
            name: graph_json.parse(graph, tensors) for name, graph in expect(content["graphs"], dict, "graphs").items()
        }
        return graphs, expect(content["facts"], dict, "facts")
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error


def _content(memory: mmap.mmap | bytearray) -> tuple[dict[str, Any], int]:
    """The JSON part, and where the storages begin."""
    head = bytes(memory[: HEADER.size])
    if len(head) < HEADER.size or head[: len(MAGIC)] != MAGIC:
        raise ValueError("it is truncated, or this version of pykernels did not write it")
    _, version, crc, count, size, _, _ = HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(f"its format {version} is not {VERSION}: another version of pykernels wrote it")
    if zlib.crc32(head[:-4]) != int.from_bytes(head[-4:], "little"):
        raise ValueError("its header fails its checksum")
    begin = HEADER.size + count
    if size != len(memory) or begin > size or count % ALIGNMENT:
        raise ValueError(f"it is truncated: {len(memory)} bytes of {size}")
    if count > _MOST_JSON:
        raise ValueError(f"its description takes {count} bytes, more than {_MOST_JSON}")
    text = bytes(memory[HEADER.size : begin])
    if zlib.crc32(text) != crc:
        raise ValueError("its description fails its checksum")
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("its description is nested too deeply") from error
    return expect(content, dict, "its description"), begin


def _no_constant(name: str) -> None:
    raise ValueError(f"its description has {name}, which is no JSON")


def _storages(memory: mmap.mmap | bytearray, begin: int, entries: list[Any]) -> list[torch.UntypedStorage]:
    storages = []
    with memoryview(memory) as view:
        for number, entry in enumerate(entries):
            count, crc = _numbers(entry, "a storage", 2)
            end = begin + count + _padding(count)
            if end > len(view):
                raise ValueError(f"storage {number} ends beyond the file")
            with view[begin:end] as part:
                if zlib.crc32(part) != crc:
                    raise ValueError(f"storage {number} fails its checksum")
            data = torch.empty(0, dtype=torch.uint8)
            if count:
                data = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=begin)
            storages.append(data.untyped_storage())
            begin = end
        if begin != len(view):
            raise ValueError(f"{len(view) - begin} bytes follow its last storage")
    return storages


def _numbers(content: Any, what: str, count: int | None = None) -> list[int]:
    """A list of numbers that are not negative and have 63 bits at most."""
    found: list[int] = expect(content, list, what)
    if count is not None and len(found) != count:
        raise ValueError(f"{what} has {len(found)} numbers, not {count}")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in found):
        raise ValueError(f"{what} has something other than numbers from 0 to 2**63")
    return found


def _tensor(entry: Any, storages: list[torch.UntypedStorage]) -> torch.Tensor:
    if len(expect(entry, list, "a tensor")) != 5:
        raise ValueError("a tensor has a storage, a dtype, a shape, strides and an offset")
    place, name, shape, strides, offset = entry
    _numbers([place, offset], "a tensor")
    _numbers(shape, "a shape")
    _numbers(strides, "strides", len(shape))
    if place >= len(storages) or type(name) is not str or name not in DTYPES or len(shape) > _DIMENSIONS:
        raise ValueError(f"a tensor is {name!r}, of {len(shape)} dimensions, in storage {place} of {len(storages)}")
    storage, dtype = storages[place], DTYPES[name]
    room, most = storage.nbytes() // dtype.itemsize, 1
    for size in shape:
        most *= max(size, 1)
        if most >= 2**56:
            raise ValueError(f"a tensor of {shape} has too many elements")
    elements = 0 if 0 in shape else most
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1 if elements else 0
    if offset + span > room or elements > room or max(strides, default=0) > max(room, most):
        raise ValueError(f"a tensor of {shape}, strides {strides}, at {offset} leaves its storage of {room} elements")
    if dtype is torch.bool and elements:  # other bytes than 0 and 1 are undefined in C++
        held = whole(storage)[offset : offset + span]
        if int(held.max()) > 1:
            raise ValueError("a tensor of truth values has others than 0 and 1")
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)
