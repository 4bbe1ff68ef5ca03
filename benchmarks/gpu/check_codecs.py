"""The gradient codecs on a GPU: are the bytes those of the oracle, and how near are they to the speed of a copy?

    python -m benchmarks.gpu.check_codecs [--elements 67108864] [--rounds 50]

Leaves with status 1 when a byte differs. Times are the best of all rounds, in CUDA graphs, beside a copy of as many
bytes as each call must read and write.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.timing import Case, require_gpu, show
from pykernels import reference
from pykernels.ops.compress import CODECS, record_bytes

RANKS = 4
Calls = dict[str, Callable[[], Any]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def to_device(value: Any) -> Any:
    """Segments stay where they are."""
    return value.cuda() if isinstance(value, torch.Tensor) and value.dtype != torch.int64 else value


def agrees(op: str, *arguments: Any) -> bool:
    """Whether the op leaves all its arguments on the GPU as the oracle leaves them on the CPU; NaNs are all alike."""
    actual = [to_device(a) for a in arguments]
    expected = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(torch.ops.pykernels, op)(*actual)
    getattr(reference, op)(*expected)
    for a, e in zip(actual, expected, strict=True):
        if not isinstance(e, torch.Tensor) or e.dtype == torch.int64:
            continue
        a = a.cpu()
        if e.is_floating_point():
            if not torch.equal(a.isnan(), e.isnan()):
                return False
            a, e = a.nan_to_num(0.0), e.nan_to_num(0.0)
        if not torch.equal(a.contiguous().view(torch.uint8), e.contiguous().view(torch.uint8)):
            return False
    return True


def awkward(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Of all magnitudes, denormals among them, with zeros, ties, and a few numbers that are not finite."""
    x = torch.randn(n) * 10.0 ** torch.randint(-6, 3, (n,))
    x[n // 2 : n // 2 + 999] *= 1e-38
    x = torch.where(torch.rand(n) < 0.3, torch.randint(-9, 9, (n,)) * 0.5, x)
    x[torch.tensor([77, n // 3])] = torch.inf
    x[n // 4] = torch.nan
    return x.to(dtype)


def check_dense(codec: str) -> bool:
    good = True
    for dtype, block, stochastic in [(d, b, s) for d in DTYPES for b in (32, 96, 256, 16384) for s in (False, True)]:
        if stochastic and not CODECS[codec].stochastic:
            continue
        counts = [5, 20_001, 4096, 16_000]
        rows, first, byte = [], 3, 8
        for n in counts:
            rows.append((first, n, byte))
            first, byte = first + n + 3, byte + -(-n // block) * record_bytes(codec, block) + 4
        segments = torch.tensor(rows)
        x, residual = awkward(first, dtype), torch.randn(first) * 0.01
        how = (segments, codec, block)
        payload = torch.zeros(byte // 4 * 4, dtype=torch.uint8)
        good &= agrees("compress_encode", x, residual, payload, *how, stochastic, -5)
        good &= agrees("compress_encode", x, None, payload, *how, stochastic, 2**40)
        reference.compress_encode(x, None, payload, *how, stochastic, 1)
        payloads = torch.stack([payload] * 3)
        out, weights = torch.zeros(first, dtype=dtype), torch.tensor([0.3, 1e-3, -2.0])
        good &= agrees("compress_decode", payloads, out, *how, 0.37)
        good &= agrees("compress_decode", payloads, out, *how, 0.37, weights)
        good &= agrees("compress_reduce", payloads, residual, payload, *how, 0.37, stochastic, 9)
    return good


def check_sparse() -> bool:
    good, n = True, 200_001
    segments = torch.tensor([[3, 100_000, 0], [100_500, 5, 0], [120_000, 80_001, 0]])
    for dtype in DTYPES:
        x = awkward(n, dtype).nan_to_num(9.0)  # which NaN a sent NaN is, is not specified
        residual, velocity = torch.randn(n) * 0.01, torch.randn(n)
        for k, threshold in ((0, 0.0), (1, 0.0), (2000, 0.0), (2000, 50.0), (190_000, 0.0)):
            payload = torch.zeros(8 * k, dtype=torch.uint8)
            good &= agrees("sparse_encode", x, residual, None, payload, segments, k, threshold)
            good &= agrees("sparse_encode", x, residual, velocity, payload, segments, k, threshold, 0.9)
            reference.sparse_encode(x, residual.clone(), None, payload, segments, k, threshold)
            good &= agrees("sparse_decode", torch.stack([payload] * 3), torch.randn(n).to(dtype), k, 0.37)
            values = torch.zeros(min(k, 180_000))
            good &= agrees("randomk_encode", x, residual, values, segments, values.numel(), 7)
            good &= agrees("randomk_decode", values, torch.randn(n).to(dtype), segments, values.numel(), 7, 0.37)
    return good


def cases(n: int, device: str = "cuda") -> Iterator[Case]:
    """Each codec's ops on `n` fp32 elements beside a copy of as many bytes as they must read and write."""
    ops = torch.ops.pykernels
    segments = torch.tensor([[0, n, 0]])

    def case(
        codec: str, op: str, moved: int, make: Callable[[], Callable[[], Any]], also: Callable[[], Calls] = dict
    ) -> Case:
        def rivals() -> Calls:
            source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            return {"pykernels": make(), "copy": lambda: target.copy_(source), **also()}

        return Case({"codec": codec, "op": op, "MB": round(moved / 1e6)}, rivals, repeat=3)

    def numbers() -> torch.Tensor:
        return torch.randn(n, device=device)

    def encode(size: int, *how: Any) -> Callable[[], Any]:
        x, residual = numbers(), torch.zeros(n, device=device)
        payload = torch.zeros(size, dtype=torch.uint8, device=device)
        return lambda: ops.compress_encode(x, residual, payload, *how)

    def encoded(ranks: int, size: int, *how: Any) -> torch.Tensor:
        shards = torch.zeros(ranks, size, dtype=torch.uint8, device=device)
        for shard in shards:
            ops.compress_encode(numbers(), None, shard, *how)
        return shards

    def decode(size: int, *how: Any) -> Callable[[], Any]:
        shards, out = encoded(1, size, *how), torch.zeros(n, device=device)
        return lambda: ops.compress_decode(shards, out, *how)

    def reduce(size: int, *how: Any) -> Callable[[], Any]:
        shards, residual = encoded(RANKS, size, *how), torch.zeros(n, device=device)
        payload = torch.zeros(size, dtype=torch.uint8, device=device)
        return lambda: ops.compress_reduce(shards, residual, payload, *how, 1 / RANKS)

    def largest(k: int) -> Callable[[], Any]:
        x, residual = numbers(), torch.zeros(n, device=device)
        entries = torch.zeros(8 * k, dtype=torch.uint8, device=device)
        return lambda: ops.sparse_encode(x, residual, None, entries, segments, k)

    def torchs_largest(k: int) -> Calls:
        x = numbers()
        return {"torch.topk(x.abs(), k)": lambda: torch.topk(x.abs(), k)}

    for codec in CODECS:
        block = 1024 if codec == "onebit" else 256
        size = -(-n // block) * record_bytes(codec, block)
        how = (size, segments, codec, block)
        yield case(codec, "encode, error feedback", 12 * n + size, functools.partial(encode, *how))
        yield case(codec, "decode", 4 * n + size, functools.partial(decode, *how))
        yield case(codec, f"reduce {RANKS} ranks", 8 * n + (RANKS + 1) * size, functools.partial(reduce, *how))
    k = n // 100
    yield case("top-k 1 %", "encode, error feedback", 12 * n + 8 * k, functools.partial(largest, k),
               functools.partial(torchs_largest, k))  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--elements", type=int, default=2**26, help="of the tensor that is timed")
    arguments.add_argument("--rounds", type=int, default=50, help="of which the best counts")
    given = arguments.parse_args()
    require_gpu("check_codecs")
    torch.manual_seed(0)
    console = Console()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    wrong = [codec for codec in CODECS if not check_dense(codec)]
    wrong += [] if check_sparse() else ["sparse"]
    console.print(f"bytes differ from the oracle's: {', '.join(wrong)}" if wrong else "all bytes are the oracle's")
    show("gradient codecs", [case.measure(given.rounds) for case in cases(given.elements)])
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
