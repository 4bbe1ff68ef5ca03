"""The dense codecs in Triton, interpreted: the oracle's bytes and residuals, to the bit, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from interpreter import Interpreter, encode_by_changing_segments

from pykernels import reference
from pykernels.cuda.triton import tiles
from pykernels.ops.compress import CODECS, record_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_codec = pytest.mark.parametrize("codec", CODECS)


def layout(counts: list[int], codec: str, block: int, gap: int = 3) -> tuple[torch.Tensor, int, int]:
    """Segments of so many elements, with gaps between them and before and behind: segments, elements, bytes."""
    rows, first, byte = [], gap, 4 * gap
    for n in counts:
        rows.append((first, n, byte))
        first += n + gap
        byte += -(-n // block) * record_bytes(codec, block) + 4 * gap
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3), first, byte


def gradients(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of many magnitudes, with zeros, both signs of them, and small whole numbers (codes half way between two)."""
    x = torch.randn(n) * 10.0 ** torch.randint(-6, 2, (n,))
    x = torch.where(torch.rand(n) < 0.3, torch.randint(-9, 9, (n,)) * 0.5, x)
    x[torch.rand(n) < 0.1] = -0.0
    return x.to(dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but for which NaN a NaN is in what is no payload."""
    assert actual.dtype == expected.dtype
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = (t.nan_to_num(0.0, math.inf, -math.inf).view(torch.uint8) for t in (actual, expected))
    wrong = (actual != expected).nonzero().flatten()
    assert wrong.numel() == 0, f"{wrong.numel()} bytes differ, the first at {wrong[:5].tolist()}"


def agree(interpret: Interpreter, op: str, *arguments: Any) -> list[Any]:
    """The arguments as the kernel leaves them, which is how the oracle does."""
    actual = interpret("compress", op, *arguments)
    expected = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(reference, op)(*expected)
    for a, e in zip(actual, expected, strict=True):
        if isinstance(a, torch.Tensor):
            same(a, e)
    return expected


def agree_through_all(
    interpret: Interpreter, x: torch.Tensor, codec: str, block: int, counts: list[int], **how: Any
) -> None:
    """Encode by three ranks, decode and reduce."""
    gap, residual = how.get("gap", 3), how.get("residual", True)
    stochastic, seed = how.get("stochastic", False), how.get("seed", 7)
    segments, elements, size = layout(counts, codec, block, gap)
    shards = []
    for rank in range(3):
        kept = torch.randn(elements) * 0.01 if residual else None
        empty = torch.full((size,), 0xA5, dtype=torch.uint8)
        given = x[:elements].roll(rank)
        left = agree(interpret, "compress_encode", given, kept, empty, segments, codec, block, stochastic, seed)
        shards.append(left[2])
    payloads = torch.stack(shards)
    out = torch.full((elements,), 7.0, dtype=x.dtype)
    agree(interpret, "compress_decode", payloads, out, segments, codec, block, 0.37)
    agree(interpret, "compress_decode", payloads[:1], out, segments, codec, block)
    agree(interpret, "compress_decode", payloads, out, segments, codec, block, 0.37, torch.tensor([0.3, 1e-3, -2.0]))
    kept = torch.randn(elements) * 0.01 if residual else None
    empty = torch.full((size,), 0xA5, dtype=torch.uint8)
    agree(interpret, "compress_reduce", payloads, kept, empty, segments, codec, block, 0.37, stochastic, seed)


@every_codec
@pytest.mark.parametrize(
    ("dtype", "block", "residual"),
    [(torch.float32, 96, True), (torch.bfloat16, 256, False), (torch.float16, 32, True)],  # 96: no power of two
    ids=str,
)
def test_every_op_makes_the_oracles_bits(
    interpret: Interpreter, codec: str, dtype: torch.dtype, block: int, residual: bool
) -> None:
    """Several segments of odd sizes, one longer than a tile, one empty."""
    agree_through_all(interpret, gradients(4000, dtype), codec, block, [5, 2 * block, 0, 2277], residual=residual)


@every_codec
def test_aligned_segments_take_the_wide_loads(interpret: Interpreter, codec: str) -> None:
    agree_through_all(interpret, gradients(4096), codec, 128, [3072, 1024], gap=0)


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if codec.stochastic])
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 5, -(2**63), 2**63 - 1])
def test_stochastic_rounding_draws_the_oracles_numbers(interpret: Interpreter, codec: str, seed: int) -> None:
    agree_through_all(interpret, gradients(2200), codec, 64, [2100, 50], stochastic=True, seed=seed)


@every_codec
def test_a_record_as_large_as_can_be(interpret: Interpreter, codec: str) -> None:
    segments, elements, size = layout([32_900], codec, 32768)
    x, residual, payload = gradients(elements), torch.randn(elements), torch.zeros(size, dtype=torch.uint8)
    left = agree(interpret, "compress_encode", x, residual, payload, segments, codec, 32768)
    agree(interpret, "compress_decode", left[2][None], torch.zeros(elements), segments, codec, 32768)


@every_codec
def test_awkward_records(interpret: Interpreter, codec: str) -> None:
    """Zeros, denormals, the ends of the range, infinities and NaNs, in records of their own, one of them short."""
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    block = 32
    records = [
        torch.zeros(block),
        -torch.zeros(block),
        torch.full((block,), 1e-45),
        torch.randn(block) * tiny,
        torch.randn(block) * tiny * 200,
        torch.randn(block) * tiny * 40_000,
        torch.linspace(-huge, huge, block),
        torch.full((block,), huge),
        torch.randn(block).index_fill(0, torch.tensor([3]), math.inf),
        torch.randn(block).index_fill(0, torch.tensor([31]), -math.inf),
        torch.randn(block).index_fill(0, torch.tensor([0, 7]), math.nan),
        torch.arange(block) * 0.5,  # half way between codes
        torch.linspace(-448, 448, block),
        torch.linspace(-1, 1, block) * 70_000,
        torch.randn(5),
    ]
    x = torch.cat(records)
    segments = torch.tensor([[0, x.numel(), 0]])
    size = len(records) * record_bytes(codec, block)
    kept = torch.where(torch.rand(x.numel()) < 0.5, 0.0, torch.randn(x.numel()) * 1e-3)
    for residual in (None, kept):
        payload = torch.zeros(size, dtype=torch.uint8)
        left = agree(interpret, "compress_encode", x, residual, payload, segments, codec, block)
        payloads = torch.stack([left[2], left[2]])
        for dtype in DTYPES if residual is None else ():
            out = torch.zeros(x.numel(), dtype=dtype)
            agree(interpret, "compress_decode", payloads, out, segments, codec, block, 0.5)
        agree(interpret, "compress_reduce", payloads, residual, payload, segments, codec, block, 0.5)


def test_every_fp8_code_is_the_oracles(interpret: Interpreter) -> None:
    """All fp8 numbers, and all halves between them, both signs; then all 256 codes decoded."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([torch.nextafter(between, torch.tensor(end)) for end in (-1e9, 1e9)])
    x = torch.cat([numbers, -numbers, between, -between, near, -near])
    x = torch.cat([torch.full((len(x), 1), 448.0), x[:, None], torch.zeros(len(x), 30)], 1).flatten()  # scale 1
    segments = torch.tensor([[0, x.numel(), 0]])
    payload = torch.zeros(x.numel() // 32 * 36, dtype=torch.uint8)
    agree(interpret, "compress_encode", x, torch.zeros_like(x), payload, segments, "fp8", 32)
    codes = torch.cat([torch.tensor([1.0]).view(torch.uint8), torch.arange(256, dtype=torch.uint8)])
    agree(interpret, "compress_decode", codes[None], torch.zeros(256), torch.tensor([[0, 256, 0]]), "fp8", 256)


def test_segments_that_were_written_to_are_read_again(interpret: Interpreter) -> None:
    x = torch.randn(64)
    tables = [torch.tensor([[first, 32, 0]]) for first in (0, 32, 16)]
    for payload, table in zip(interpret.apply(encode_by_changing_segments, x, tables, 36), tables, strict=True):
        expected = torch.zeros(36, dtype=torch.uint8)
        reference.compress_encode(x, None, expected, table, "int8", 32)
        same(payload, expected)


GOOD: dict[str, Any] = {
    "x": torch.zeros(64), "residual": torch.zeros(64), "payload": torch.zeros(72, dtype=torch.uint8),
    "payloads": torch.zeros(2, 72, dtype=torch.uint8), "out": torch.zeros(64), "segments": torch.tensor([[0, 64, 0]]),
    "codec": "int8", "block": 32, "factor": 1.0, "stochastic": False, "weights": torch.ones(2),
}  # fmt: skip
NAMES = {
    "compress_encode": ["x", "residual", "payload", "segments", "codec", "block", "stochastic"],
    "compress_decode": ["payloads", "out", "segments", "codec", "block", "factor", "weights"],
    "compress_reduce": ["payloads", "residual", "payload", "segments", "codec", "block", "factor", "stochastic"],
}


BAD = [
    ("x", torch.zeros(64, dtype=torch.float64), "x must be float32, bfloat16 or float16, not float64"),
    ("x", torch.zeros(64, 2)[:, 0], "x must be contiguous"),
    ("out", torch.zeros(64, dtype=torch.int32), "out must be float32"),
    ("residual", torch.zeros(64).half(), "residual must be float32"),
    ("residual", torch.zeros(63), "residual"),
    ("payload", torch.zeros(72), "payload must be uint8"),
    ("payload", torch.zeros(71, dtype=torch.uint8), "payload has 71"),
    ("payload", torch.zeros(80, dtype=torch.uint8)[1:], "payload must begin at a multiple of 4"),
    ("payloads", torch.zeros(2, 71, dtype=torch.uint8), "payloads must have rows"),
    ("payloads", torch.zeros(1, 71, dtype=torch.uint8), "has 71"),
    ("payloads", torch.zeros(0, 72, dtype=torch.uint8), "at least one row"),
    ("payloads", torch.zeros(72, dtype=torch.uint8), r"payloads must be \[ranks, bytes\]"),
    ("weights", torch.ones(3), r"weights must be \[2\], a number for each row, not \[3\]"),
    ("weights", torch.ones(2, 1), r"weights must be \[2\], a number for each row, not \[2, 1\]"),
    ("weights", torch.ones(2).half(), "weights must be float32"),
    ("segments", torch.tensor([[0, 65, 0]]), "segments end at"),
    ("segments", torch.tensor([[-1, 32, 0]]), "segments must not be negative"),
    ("segments", torch.tensor([[0, 2**62, 0]]), "segments must not be negative, nor beyond"),
    ("segments", torch.tensor([[0, 32, 2]]), "first byte must be a multiple of 4"),
    ("segments", torch.tensor([[0, 32]]), r"of shape \[S, 3\]"),
    ("segments", torch.tensor([[0.0, 32.0, 0.0]]), "segments must be int64"),
    ("codec", "int3", "codec must be one of int8, int4, int2, onebit, fp8, bf16, fp16, fp32, not 'int3'"),
    ("block", 33, "block must be a multiple of 32"),
    ("block", 65536, "block must be a multiple of 32"),
]


@pytest.mark.parametrize(
    ("op", "name", "value", "says"),
    [
        pytest.param(op, name, value, says, id=f"{op}-{name}-{i}")
        for op, names in NAMES.items()
        for i, (name, value, says) in enumerate(BAD)
        if name in names
    ],
)
def test_bad_arguments_are_named(interpret: Interpreter, op: str, name: str, value: Any, says: str) -> None:
    arguments = [value if argument == name else GOOD[argument] for argument in NAMES[op]]
    with pytest.raises(RuntimeError, match=f"pykernels: {op}: .*{says}"):
        interpret("compress", op, *arguments)


def test_only_integers_are_rounded_stochastically(interpret: Interpreter) -> None:
    arguments = [{**GOOD, "codec": "fp8", "stochastic": True}[name] for name in NAMES["compress_encode"]]
    with pytest.raises(RuntimeError, match="stochastic rounding is for int8, int4 and int2, not fp8"):
        interpret("compress", "compress_encode", *arguments)


def test_tiles_of_odd_segments_are_launched_by_themselves(interpret: Interpreter) -> None:
    """Those that are multiples of 16 keep their wide loads; the bytes are the same."""
    rows, byte = [], 0
    for first, n in ((0, 4096 + 37), (4144, 5000), (9161, 64), (9232, 2048 + 16)):
        rows.append((first, n, byte))
        byte += -(-n // 32) * record_bytes("int8", 32)
    segments = torch.tensor(rows)
    found = tiles.cut("an op", segments, torch.device("cpu"), 64, 32, record_bytes("int8", 32))
    (even, wide), (odd, narrow) = found.parts
    assert (even.shape[0], wide, narrow) == (6, 16, 1) and even.shape[0] + odd.shape[0] == found.count == 9
    assert (even[:, :2] % 16 == 0).all() and (odd[:, :2] % 16 != 0).any(1).all()
    agree(interpret, "compress_encode", gradients(11_296), torch.randn(11_296), torch.zeros(byte, dtype=torch.uint8),
          segments, "int8", 32)  # fmt: skip
    without_bytes = tiles.cut("an op", segments, torch.device("cpu"), 1, 4096, 0)
    assert without_bytes.even == 0 and [vector for _, vector in without_bytes.parts] == [1]
    assert (without_bytes.table[1:, 0] > without_bytes.table[:-1, 0]).all()
