"""Damaged and hostile files of saved networks, as many as one likes: none may crash or hang a reader, or be believed.

    python -m tests.network.fuzz_file --count 100000 --seconds 600
    python -m tests.network.fuzz_file --first 4711 --count 1         # one case again

A case is a number: it chooses a small network, and what is changed in the file of it. Most changes get their checksums
repaired, so that what is behind the checksums is tried. What still loads is called, on zeros, with memory limited: any
exception will do there, a signal will not. Cases run in children of this process, a few hundred in each.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import resource
import signal
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import pykernels as pk
from pykernels import optimized
from pykernels.network.plan import format as plan_format
from pykernels.network.saved import file

BATCH = 250  # cases of a child
LIMIT = 20  # seconds of a case
MEMORY = 4 << 30  # bytes that a child may take beyond what this process has


class Pictures(nn.Module):
    """Convolution, pool, concatenation, normalization, resizing, a region, state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        y = F.relu(self.a(x))
        y = torch.cat([F.max_pool2d(y, 2), F.interpolate(self.b(y), (4, 4), mode="bilinear")], 1)
        y = torch.cond(y.sum() > 0, lambda y: y.cos(), lambda y: y.sin(), (y,))
        return {"scores": self.last(F.group_norm(y, 2).mean((2, 3))), "map": y}


class Words(nn.Module):
    """Embedding, recurrence, attention, a free size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
        y, _ = self.lstm(self.embed(ids))
        y = y.view(y.shape[0], y.shape[1], 2, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2)
        return self.out(y) * scale, [y.topk(2, -1).values]


def networks() -> list[tuple[pk.Optimized, tuple[Any, ...], dict[str, Any]]]:
    """Small networks, and what to call them with."""
    torch.manual_seed(0)
    x, ids = torch.zeros(1, 3, 8, 8), torch.zeros(2, 5, dtype=torch.int64)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return [
        (pk.optimize(Pictures(), x, dynamic_batch=False), (x,), {}),
        (pk.optimize(Words(), {"ids": ids}), (), {"ids": ids}),
        (pk.optimize(plain, x, "bf16"), (x,), {}),
        (pk.optimize(plain, x, "int8", [torch.randn(2, 3, 8, 8)]), (x,), {}),
    ]


class Parts:
    """A file taken apart, to be changed and put together again with checksums that hold."""

    def __init__(self, data: bytes) -> None:
        _, _, _, count, _, _, _ = file.HEADER.unpack(data[: file.HEADER.size])
        at = file.HEADER.size + count
        self.content = json.loads(data[file.HEADER.size : at])
        self.storages: list[bytes] = []
        for size, _ in self.content["storages"]:
            end = at + size + -size % 64
            self.storages.append(data[at:end])
            at = end

    def text(self) -> bytes:
        """The JSON part."""
        table = self.content.get("storages") if isinstance(self.content, dict) else None
        for entry, part in zip(table if isinstance(table, list) else [], self.storages, strict=False):
            if isinstance(entry, list) and len(entry) == 2:
                entry[1] = zlib.crc32(part)
        return json.dumps(self.content).encode()

    def together(self, text: bytes | None = None) -> bytes:
        """The file; `text` stands for another JSON part."""
        text = self.text() if text is None else text
        text += b" " * (-len(text) % 64)
        body = b"".join(self.storages)
        return file.header(text, file.HEADER.size + len(text) + len(body)) + text + body


NUMBERS = [0, 1, -1, 2, 3, 7, 64, 2**15, -(2**63), *(2**n for n in (31, 32, 40, 62, 63, 64)), 2**31 - 1, 2**63 - 1]
REALS = [0.0, -1.0, 1e-30, 0.5, 3.0, 1e30, 1e300, math.inf, math.nan]
NAMES = ["", "a", "self", "torch", "forward", "graph", "_buffers", "__class__", "é", "x): import os #", "None", "a.b"]
KINDS = ["dtype", "device", "layout", "memory_format", "float", "tuple", "slice", "complex", "dict", "node", "x"]
WORDS = ["float32", "bool", "quint8", "cuda", "cpu", "nan", "channels_last", "strided", "sparse_coo", "x" * 9999]
_TARGETS = """
    aten.from_file.default aten.set_.source_Storage aten.resize_.default aten.empty.memory_format aten.relu.default
    aten.add.Tensor aten.as_strided.default aten.view.dtype aten.copy_.default aten.cat.default aten.mul.Tensor
    aten.index.Tensor aten.reshape.default aten.sum.default aten.conv2d.default aten.expand.default aten.slice.Tensor
    aten.scaled_dot_product_attention.default aten.lstm.input aten.group_norm.default aten.max_pool2d.default
    pykernels.conv2d.default pykernels.qconv2d.default pykernels.linear.default pykernels.int8_linear.default
    pykernels.qlookup.default pykernels.qcat.default pykernels.qadd.default pykernels._set_isa.default
    pykernels.quantize_per_tensor.default pykernels.dequantize_per_tensor.default pykernels.compress_encode.default
    operator.getitem operator.mul operator.pow os.system builtins.eval higher_order.cond math.floor
"""
TARGETS = _TARGETS.split()


def value(r: random.Random) -> Any:
    """Something that may stand in JSON, likely where it must not."""
    kinds: list[Callable[[], Any]] = [
        lambda: r.choice(NUMBERS),
        lambda: r.choice(NAMES),
        lambda: r.choice(TARGETS),
        lambda: r.choice([None, True, False, [], {}, [[]], 1.5, -0.0, 1e308, 10**30]),
        lambda: {"node": r.choice([*range(12), *NUMBERS])},
        lambda: {r.choice(KINDS): r.choice(WORDS)},
        lambda: {r.choice(KINDS): [value(r) for _ in range(r.randrange(4))]},
        lambda: [value(r) for _ in range(r.randrange(4))],
        lambda: json.loads("[" * 60 + "]" * 60),
    ]
    return r.choice(kinds)()


def spots(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in JSON, as what contains it and its key or index."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], (dict, list)):
                pending.append(node[key])
    return found


def change(tree: Any, r: random.Random) -> None:
    """Change one place in JSON."""
    places = spots(tree)
    holder, key = r.choice(places)
    other, there = r.choice(places)
    kind = r.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[r.randrange(len(holder))]))
    elif kind == 2:
        holder[key] = copy.deepcopy(other[there])
    elif kind == 3 and type(holder[key]) is int:
        holder[key] += r.choice([-1, 1, 64, -64])
    else:
        holder[key] = value(r)


def numbers(parts: Parts, r: random.Random) -> bytes:
    """The tables of tensors and storages, and what holds numbers in nodes."""
    table = parts.content[r.choice(["tensors", "storages", "tensors"])]
    places = [(h, k) for h, k in spots(table) if type(h[k]) is int]
    for _ in range(r.randrange(1, 3)):
        holder, key = r.choice(places)
        holder[key] = r.choice([*NUMBERS, *range(8), max(0, holder[key] - 1), holder[key] + 1, holder[key] * 2])
    return parts.together()


def structure(parts: Parts, r: random.Random) -> bytes:
    for _ in range(r.choice([1, 1, 1, 2, 5])):
        change(parts.content, r)
    return parts.together()


def calls(parts: Parts, r: random.Random) -> bytes:
    """Other functions and arguments."""
    nodes = parts.content["graphs"]["program"]["nodes"]
    for _ in range(r.randrange(1, 4)):
        node = r.choice(nodes)
        if r.random() < 0.4:
            node[2] = r.choice([*TARGETS, *(other[2] for other in nodes)])
        elif node[3]:
            holder, key = r.choice(spots(node[3]))
            holder[key] = value(r) if r.random() < 0.5 else copy.deepcopy(r.choice(r.choice(nodes)[3] or [0]))
    return parts.together()


def text(parts: Parts, r: random.Random) -> bytes:
    """Bytes of the JSON part."""
    raw = bytearray(parts.text())
    for _ in range(r.randrange(1, 5)):
        raw[r.randrange(len(raw))] = (
            r.choice(b'[]{}",:0123456789-eE\x00\xff \\u') if r.random() < 0.8 else r.randrange(256)
        )
    return parts.together(bytes(raw))


def weights(parts: Parts, r: random.Random) -> bytes:
    """Bytes and words of the storages, headers of packed weights among them."""
    index = r.randrange(len(parts.storages))
    raw = bytearray(parts.storages[index])
    for _ in range(r.randrange(1, 8) if raw else 0):
        if r.random() < 0.5:
            raw[r.randrange(len(raw))] = r.randrange(256)
        else:
            at = r.randrange(0, len(raw) - 7, 8)
            raw[at : at + 8] = struct.pack("<q", max(-(2**63), min(2**63 - 1, r.choice(NUMBERS))))
    parts.storages[index] = bytes(raw)
    return parts.together()


def plans(parts: Parts, r: random.Random) -> bytes:
    """Words of a plan, with a hash that fits."""
    index = r.choice([i for i, part in enumerate(parts.storages) if part.startswith(plan_format.MAGIC)])
    words = list(struct.unpack(f"<{len(parts.storages[index]) // 8}q", parts.storages[index]))
    count = words[2]
    for _ in range(r.randrange(1, 4)):
        place = r.randrange(4, count)
        near, real = words[place] + r.choice([-1, 1]), struct.unpack("<q", struct.pack("<d", r.choice(REALS)))[0]
        words[place] = r.choice([r.choice(NUMBERS), r.randrange(300), near, real, words[r.randrange(4, count)]])
    words = [max(-(2**63), min(2**63 - 1, word)) for word in words]
    body = struct.pack(f"<{count - 4}q", *words[4:count])
    head, padding = parts.storages[index][:24], parts.storages[index][8 * count :]
    parts.storages[index] = head + struct.pack("<Q", plan_format.hash_of(body)) + body + padding
    return parts.together()


def raw(parts: Parts, r: random.Random) -> bytes:
    """Any byte, checksums left as they were: always refused."""
    data = bytearray(parts.together())
    data[r.randrange(len(data))] ^= r.randrange(1, 256)
    return bytes(data)


def length(parts: Parts, r: random.Random) -> bytes:
    """Truncated, or with something behind: always refused."""
    data = parts.together()
    return data[: r.randrange(len(data))] if r.random() < 0.7 else data + bytes(r.choice([1, 64, 4096]))


def head(parts: Parts, r: random.Random) -> bytes:
    """Numbers of the header, its checksum repaired: always refused but for what changes nothing."""
    data = bytearray(parts.together())
    data[r.randrange(8, 60)] = r.randrange(256)
    data[60:64] = zlib.crc32(data[:60]).to_bytes(4, "little")
    return bytes(data)


CHANGES = [
    structure,
    structure,
    calls,
    calls,
    calls,
    numbers,
    numbers,
    text,
    weights,
    weights,
    plans,
    plans,
    raw,
    length,
    head,
]


class Fuzz:
    """The seeds, and what became of the cases: `outcomes` counts, `findings` names what must not be."""

    def __init__(self) -> None:
        self.inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.files: list[bytes] = []
        self.outcomes: Counter[str] = Counter()
        self.findings: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            for fast, args, kwargs in networks():
                fast.save(Path(folder) / "net.pk")
                self.files.append((Path(folder) / "net.pk").read_bytes())
                self.inputs.append((args, kwargs))

    def case(self, number: int) -> tuple[str, bytes, int]:
        """How case `number` is changed, its file, and of which network."""
        r = random.Random(number)
        index, kind = r.randrange(len(self.files)), r.choice(CHANGES)
        return kind.__name__, kind(Parts(self.files[index]), r), index

    def outcome(self, number: int) -> str:
        """Load case `number`, call it; how that ended. What begins with ``finding`` must not be."""
        kind, data, index = self.case(number)
        try:
            net = optimized._network(*file.parse(bytearray(data)))
        except ValueError:
            return "refused"
        except Exception as error:
            return f"finding: case {number} ({kind}): load raises {type(error).__name__}: {error}"[:300]
        if kind in ("raw", "length") and data != self.files[index]:
            return f"finding: case {number} ({kind}): it loads"
        args, kwargs = self.inputs[index]
        try:
            with torch.no_grad():
                net(*args, **kwargs)
                net.program(*args, *kwargs.values())  # the graph of ops, built now
            str(net.report())
        except Exception as error:
            return f"loaded, call raises {type(error).__name__}"
        return "loaded, runs"

    def run(self, first: int, count: int, seconds: float) -> int:
        """Cases from `first` on; how many there was time for."""
        end, at = time.monotonic() + seconds, first
        while at < first + count and time.monotonic() < end:
            at += self._batch(at, min(BATCH, first + count - at))
        return at - first

    def _batch(self, first: int, count: int) -> int:
        """Run cases in a child; a child that dies is a finding, and the rest is run in another."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            self._child(first, count, writer)
        os.close(writer)
        with os.fdopen(reader) as lines:
            told = [line.rstrip("\n") for line in lines]
        _, status = os.waitpid(child, 0)
        for line in told:
            self.outcomes[line.split(":")[0]] += 1
            if line.startswith("finding"):
                self.findings.append(line)
        if len(told) == count:
            return count
        number, by = first + len(told), signal.Signals(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None
        slow = by is signal.SIGALRM
        self.outcomes["slow" if slow else "finding"] += 1
        if not slow:  # a network may be asked to compute for long; only memory is what it must not touch
            self.findings.append(f"finding: case {number} ({self.case(number)[0]}): dies of {by or status}")
        return len(told) + 1

    def _child(self, first: int, count: int, writer: int) -> None:
        with open("/proc/self/statm") as sizes:
            now = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            for number in range(first, first + count):
                signal.alarm(LIMIT)
                os.write(writer, (self.outcome(number).replace("\n", " ") + "\n").encode())
        finally:
            os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--count", type=int, default=10_000, help="how many cases")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args()
    torch.set_num_threads(1)  # children of a process with threads would wait for them
    fuzz = Fuzz()
    done = fuzz.run(options.first, options.count, options.seconds)
    for line in fuzz.findings:
        print(line)
    print(f"{done} cases: " + ", ".join(f"{count} {outcome}" for outcome, count in fuzz.outcomes.most_common()))
    return 1 if fuzz.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
