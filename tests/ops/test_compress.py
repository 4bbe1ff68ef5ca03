"""The dense codecs of gradients: on every isa the bytes and the residuals of the oracle, to the bit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pykernels import reference
from pykernels.ops import compress
from pykernels.ops.compress import CODECS, record_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [32, 64, 96, 1024, 4128]
SCALED = [name for name, codec in CODECS.items() if codec.header]
every_codec = pytest.mark.parametrize("codec", CODECS)


def layout(counts: list[int], codec: str, block: int, gap: int = 3) -> tuple[torch.Tensor, int, int]:
    """Segments of so many elements, with gaps between them and before and behind: segments, elements, bytes."""
    rows, first, byte = [], gap, 4 * gap
    for n in counts:
        rows.append((first, n, byte))
        first += n + gap
        byte += -(-n // block) * record_bytes(codec, block) + 4 * gap
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3), first, byte


def one_segment(n: int, codec: str, block: int) -> tuple[torch.Tensor, int, int]:
    return layout([n], codec, block, gap=0)


def gradients(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of many magnitudes, with zeros, numbers half way between two codes, and numbers near the dtype's limits."""
    x = torch.randn(n) * 10.0 ** torch.randint(-6, 2, (n,))
    x[torch.rand(n) < 0.1] = 0.0
    x[torch.rand(n) < 0.02] = -0.0
    return x.to(dtype)


def bits(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous().view(torch.uint8)


def same_bits(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(bits(actual), bits(expected), rtol=0, atol=0)


def run(function: Callable[..., None], *arguments: object) -> tuple[object, ...]:
    """The arguments as the function leaves copies of them."""
    copies = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    function(*copies)
    return copies


def agree(op: str, *arguments: object) -> tuple[object, ...]:
    """The arguments as the op leaves them, which is how the oracle does, bit for bit but for the signs of NaNs."""
    actual = run(getattr(compress, op), *arguments)
    expected = run(getattr(reference, op), *arguments)
    for a, e in zip(actual, expected, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(e, torch.Tensor):
            if a.is_floating_point():
                assert torch.equal(a.isnan(), e.isnan())
                a, e = a.nan_to_num(0.0, math.inf, -math.inf), e.nan_to_num(0.0, math.inf, -math.inf)
            same_bits(a, e)
    return actual


# ---- the oracle's bytes ----------------------------------------------------------------------------------------------
@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    block=st.sampled_from(BLOCKS),
    counts=st.lists(st.integers(0, 3000), min_size=0, max_size=4),
    ranks=st.integers(1, 3),
    stochastic=st.booleans(),
    with_residual=st.booleans(),
    number=st.integers(-(2**63), 2**63 - 1),
)
def test_every_op_makes_the_oracles_bits(
    isa: str,
    codec: str,
    dtype: torch.dtype,
    block: int,
    counts: list[int],
    ranks: int,
    stochastic: bool,
    with_residual: bool,
    number: int,
) -> None:
    torch.manual_seed(number % 1000)
    stochastic = stochastic and CODECS[codec].stochastic
    segments, elements, size = layout(counts, codec, block)
    residual = torch.randn(elements) * 0.01 if with_residual else None
    shards = []
    for _ in range(ranks):
        empty = torch.full((size,), 0xA5, dtype=torch.uint8)
        _, _, payload, *_ = agree(
            "compress_encode", gradients(elements, dtype), residual, empty, segments, codec, block, stochastic, number
        )
        shards.append(payload)
    wide = torch.zeros(ranks, size + 12, dtype=torch.uint8)
    wide[:, :size] = torch.stack(shards)
    payloads = wide[:, :size]  # rows lie apart
    out, weights = torch.full((elements,), 7.0, dtype=dtype), torch.randn(ranks)
    agree("compress_decode", payloads, out, segments, codec, block, 0.37)
    agree("compress_decode", payloads, out, segments, codec, block, 0.37, weights)
    agree("compress_reduce", payloads, residual, payload, segments, codec, block, 0.37, stochastic, number)


@every_codec
def test_awkward_records(isa: str, codec: str) -> None:
    """Zeros, denormals, the largest numbers, infinities and NaNs, each in a record of its own and in a short one."""
    block = 64
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    values = [0.0, -0.0, 1e-45, -1e-40, tiny, 126 * tiny, 127 * tiny, 129 * tiny, -33000 * tiny, huge, -huge, huge / 2,
              65504.0, 65519.9, 65520.0, math.inf, -math.inf, math.nan, -math.nan, 448.0, 464.0, 2.0**-9, 2.0**-10,
              0.017578125, 3.3961775e38]  # fmt: skip
    rows = []
    for value in values:
        rows.append(torch.full((block,), value))  # all of them
        rows.append(torch.cat([torch.tensor([value]), torch.randn(block - 1)]))  # one among ordinary numbers
        rows.append(torch.linspace(-1, 1, block) * value)
    x = torch.cat(rows)
    assert x.numel() > 4000
    for counts in ([x.numel()], [block - 9] * (x.numel() // block)):
        segments, elements, size = layout(counts, codec, block, gap=0)
        empty = torch.zeros(size, dtype=torch.uint8)
        for residual in (None, torch.zeros(elements), torch.randn(elements) * 1e-3):
            for stochastic in (False, True)[: 1 + CODECS[codec].stochastic]:
                _, left, payload, *_ = agree(
                    "compress_encode", x[:elements], residual, empty, segments, codec, block, stochastic, 3
                )
                assert left is None or left.isfinite().all()
                agree("compress_decode", payload[None], torch.zeros(elements), segments, codec, block)
                both = torch.stack([payload, payload])
                weights = torch.tensor([0.0, -3.0])
                agree("compress_decode", both, torch.zeros(elements), segments, codec, block, 1.0, weights)
                agree("compress_reduce", both, residual, empty, segments, codec, block, 0.5, stochastic, 3)


@every_codec
def test_weights_multiply_what_is_decoded(isa: str, codec: str) -> None:
    """Decoded into tensors of their own, multiplied, added in order, every step rounded to fp32: the same bits."""
    block, ranks = 96, 5
    segments, elements, size = one_segment(3000, codec, block)
    payloads, weights = torch.zeros(ranks, size, dtype=torch.uint8), torch.tensor([0.3, 1e-3, -2.0, 0.0, 1 / 3])
    total = None
    for payload, weight in zip(payloads, weights, strict=True):
        compress.compress_encode(gradients(elements), None, payload, segments, codec, block)
        decoded = torch.zeros(elements)
        compress.compress_decode(payload[None], decoded, segments, codec, block)
        total = weight * decoded if total is None else total + weight * decoded
    out = torch.zeros(elements)
    compress.compress_decode(payloads, out, segments, codec, block, weights=weights)
    same_bits(out, total)


@pytest.mark.parametrize("codec", SCALED)
def test_any_bytes_decode_as_the_oracle_decodes_them(isa: str, codec: str) -> None:
    block = 256
    segments, elements, size = one_segment(512 * block, codec, block)
    payload = torch.randint(0, 256, (1, size), dtype=torch.uint8)
    agree("compress_decode", payload, torch.zeros(elements), segments, codec, block, 1.5)


@pytest.mark.parametrize("codec", ["bf16", "fp16"])
def test_every_number_of_16_bits_decodes_to_itself(isa: str, codec: str) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(
        getattr(torch, {"bf16": "bfloat16", "fp16": "half"}[codec])
    )
    segments, elements, _ = one_segment(2**16, codec, 1024)
    out = torch.zeros(elements)
    compress.compress_decode(numbers.view(torch.uint8)[None], out, segments, codec, 1024)
    torch.testing.assert_close(out, numbers.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_segments_over_several_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        counts = [1, 200_000, 5, 33, 70_000, 0, 64, 1023, 1025, 131_072]
        segments, elements, size = layout(counts, "int8", 64)
        x, residual = gradients(elements), torch.randn(elements) * 0.01
        empty = torch.zeros(size, dtype=torch.uint8)
        _, _, payload, *_ = agree("compress_encode", x, residual, empty, segments, "int8", 64)
        both, out = torch.stack([payload] * 2), torch.zeros(elements)
        agree("compress_decode", both, out, segments, "int8", 64, 0.5)
        agree("compress_decode", both, out, segments, "int8", 64, 0.5, torch.tensor([0.7, 0.2]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0, 1, 5])
def test_a_large_output_is_that_of_its_parts(isa: str, dtype: torch.dtype, first: int) -> None:
    """Outputs this large are written past the caches, in whole vectors at aligned addresses; parts of them are not."""
    codec, block, parts = "int8", 1024, 4
    records = (28 << 20) // dtype.itemsize // block // parts
    step, size = records * block, records * record_bytes(codec, block)
    payload = torch.randint(0, 256, (1, parts * size), dtype=torch.uint8)
    payload.view(-1, record_bytes(codec, block))[:, :4] = torch.tensor([0.25]).view(torch.uint8)
    rows = torch.tensor([(first + i * step, step - (i == parts - 1) * 77, i * size) for i in range(parts)])
    whole, pieces = (torch.full((first + parts * step,), 7.0, dtype=dtype) for _ in range(2))
    compress.compress_decode(payload, whole, rows, codec, block)
    for row in rows:
        compress.compress_decode(payload, pieces, row[None], codec, block)
    assert torch.equal(whole, pieces)
    assert (whole[first : first + step] != 7.0).any()


# ---- what the numbers mean -------------------------------------------------------------------------------------------
BOUNDS = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8": 16 / 448, "bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 0.0}


@pytest.mark.parametrize("codec", BOUNDS)
def test_an_error_is_at_most_half_a_step(isa: str, codec: str) -> None:
    block = 128
    segments, n, size = one_segment(5000, codec, block)
    x, out = torch.randn(n), torch.zeros(n)
    payload = torch.zeros(size, dtype=torch.uint8)
    compress.compress_encode(x, None, payload, segments, codec, block)
    compress.compress_decode(payload[None], out, segments, codec, block)
    largest = torch.nn.functional.pad(x.abs(), (0, -n % block)).view(-1, block).amax(1).repeat_interleave(block)[:n]
    assert ((out - x).abs() <= BOUNDS[codec] * largest * (1 + 1e-5)).all()


@every_codec
def test_the_residual_and_what_was_sent_are_the_gradient(isa: str, codec: str) -> None:
    segments, n, size = one_segment(3000, codec, 96)
    x, residual, out = torch.randn(n), torch.zeros(n), torch.zeros(n)
    payload = torch.zeros(size, dtype=torch.uint8)
    compress.compress_encode(x, residual, payload, segments, codec, 96)
    compress.compress_decode(payload[None], out, segments, codec, 96)
    torch.testing.assert_close(out + residual, x, rtol=1e-6, atol=1e-6)


@every_codec
def test_error_feedback_telescopes(codec: str) -> None:
    """Over 10,000 steps, all that was sent and what is left add up to all gradients, to rounding."""
    steps, block = 10_000, 32
    segments, n, size = one_segment(block * 2 - 5, codec, block)
    torch.manual_seed(1)
    residual, out, payload = torch.zeros(n), torch.empty(n), torch.zeros(size, dtype=torch.uint8)
    sent, given_ = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    largest = 0.0
    for _ in range(steps):
        g = torch.randn(n) + 0.1
        compress.compress_encode(g, residual, payload, segments, codec, block)
        compress.compress_decode(payload[None], out, segments, codec, block)
        sent += out
        given_ += g
        largest = max(largest, residual.abs().max().item(), out.abs().max().item())
    # A step rounds v once and v - d once: by at most half an ulp of the largest number about.
    assert (sent + residual - given_).abs().max().item() <= steps * largest * 2.0**-23
    assert residual.abs().max().item() < 100  # bounded, though 10,000 gradients went through it


@pytest.mark.parametrize("codec", [name for name, c in CODECS.items() if c.stochastic])
def test_stochastic_rounding_is_unbiased(isa: str, codec: str) -> None:
    block, rounds = 128, 4000
    segments, n, size = one_segment(block, codec, block)
    x = torch.linspace(-1, 1, n)
    payload, out = torch.zeros(size, dtype=torch.uint8), torch.empty(n)
    total, squares = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for seed in range(rounds):
        compress.compress_encode(x, None, payload, segments, codec, block, True, seed)
        compress.compress_decode(payload[None], out, segments, codec, block)
        total += out
        squares += out.double() ** 2
    mean = total / rounds
    deviation = ((squares / rounds - mean**2).clamp_min(0) / rounds).sqrt()
    error = (mean - x).abs()
    assert (error <= 5 * deviation + 1e-6).all()  # every element: 5 sigma, 128 of them
    z = ((mean - x).sum() / deviation.square().sum().sqrt()).item()
    assert abs(z) < 4
    assert deviation.max() > 0


def test_stochastic_rounding_depends_on_seed_and_position_alone() -> None:
    block = 32
    size = record_bytes("int4", block)
    far = torch.tensor([[0, block, 0], [block, block, size]])
    x = torch.linspace(-1, 1, block)
    payloads = {}
    for seed in (0, 1, 2**40, -1):
        payload = torch.zeros(2 * size, dtype=torch.uint8)
        compress.compress_encode(x.repeat(2), None, payload, far, "int4", block, True, seed)
        again = torch.zeros(2 * size, dtype=torch.uint8)
        compress.compress_encode(x.repeat(2), None, again, far, "int4", block, True, seed)
        assert torch.equal(payload, again)
        assert not torch.equal(payload[:size], payload[size:])  # equal numbers at other positions
        payloads[seed] = payload
    assert len({bytes(p.numpy()) for p in payloads.values()}) == len(payloads)


@every_codec
def test_a_bad_gradient_never_enters_the_residual(isa: str, codec: str) -> None:
    block = 64
    segments, n, size = one_segment(4 * block - 3, codec, block)
    residual, payload = torch.zeros(n), torch.zeros(size, dtype=torch.uint8)
    compress.compress_encode(torch.randn(n), residual, payload, segments, codec, block)
    for bad in (math.inf, -math.inf, math.nan):
        x, before, out = torch.randn(n), residual.clone(), torch.zeros(n)
        x[block + 5] = bad
        compress.compress_encode(x, residual, payload, segments, codec, block)
        compress.compress_decode(payload[None], out, segments, codec, block)
        assert residual.isfinite().all()
        assert not out[block + 5].isfinite()  # the others can see that something was wrong
        unsent = slice(block, 2 * block) if CODECS[codec].header else slice(block + 5, block + 6)
        assert torch.equal(residual[unsent], before[unsent])
        assert out[:block].isfinite().all()
    compress.compress_encode(torch.randn(n), residual, payload, segments, codec, block)
    compress.compress_decode(payload[None], out, segments, codec, block)
    assert out.isfinite().all()  # and the next step is an ordinary one


def test_the_table_is_that_of_the_oracle() -> None:
    for name, codec in CODECS.items():
        assert record_bytes(name, 96) == reference.record_bytes(name, 96) == codec.header + 96 * codec.bits // 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        CODECS["int8"].bits = 7  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"codec must be one of int8, int4, .*, not 'int3'"):
        record_bytes("int3", 32)
    with pytest.raises(ValueError, match=r"block must be a multiple of 32 in \[32, 32768\], not 33"):
        record_bytes("int8", 33)


# ---- bad input -------------------------------------------------------------------------------------------------------
def arguments(op: str, **changed: object) -> dict[str, object]:
    segments, n, size = one_segment(100, "int8", 32)
    payload = torch.zeros(size, dtype=torch.uint8)
    common: dict[str, object] = {"segments": segments, "codec": "int8", "block": 32}
    own: dict[str, dict[str, object]] = {
        "compress_encode": {"x": torch.zeros(n), "residual": torch.zeros(n), "payload": payload},
        "compress_decode": {"payloads": payload.repeat(2, 1), "out": torch.zeros(n)},
        "compress_reduce": {
            "payloads": payload.repeat(2, 1), "residual": torch.zeros(n), "payload": payload, "factor": 0.5,
        },
    }  # fmt: skip
    return {**own[op], **common, **changed}


BYTES = torch.zeros(200, dtype=torch.uint8)
OPS = ["compress_encode", "compress_decode", "compress_reduce"]
ROWS = {
    "outside, before": [[-1, 2, 0]],
    "outside, behind": [[99, 2, 0]],
    "negative": [[5, -1, 0]],
    "overflow": [[2**62, 2**62, 0]],
    "overflow of the sum": [[100, 2**63 - 1, 0]],
    "between words": [[0, 32, 2]],
    "negative byte": [[0, 32, -4]],
    "behind the payload": [[0, 100, 4]],
    "far behind": [[0, 1, 2**63 - 4]],
    "the second": [[0, 32, 0], [90, 11, 36]],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_segment_outside_is_refused(op: str, rows: list[list[int]]) -> None:
    given_ = arguments(op, segments=torch.tensor(rows))
    written = {name: t.clone() for name, t in given_.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(RuntimeError, match=rf"{op}: segments\[{len(rows) - 1}\] = \(.*\) (must|takes)"):
        getattr(compress, op)(**given_)
    for name, before in written.items():
        assert torch.equal(given_[name], before)


BAD = [
    (
        "compress_encode",
        {"codec": "int3"},
        "codec must be one of int8, int4, int2, onebit, fp8, bf16, fp16, fp32, not 'int3'",
    ),
    ("compress_decode", {"codec": ""}, "codec must be one of"),
    ("compress_encode", {"block": 33}, r"block must be a multiple of 32 in \[32, 32768\], not 33"),
    ("compress_decode", {"block": 65536}, "block must be"),
    ("compress_reduce", {"block": 0}, "block must be"),
    (
        "compress_encode",
        {"codec": "fp8", "stochastic": True},
        "stochastic rounding is for int8, int4 and int2, not fp8",
    ),
    ("compress_reduce", {"codec": "onebit", "stochastic": True}, "stochastic rounding is for"),
    (
        "compress_encode",
        {"x": torch.zeros(100, dtype=torch.float64)},
        "x must be float32, bfloat16 or float16, not float64",
    ),
    ("compress_encode", {"x": torch.zeros(10, 10).t()}, "x must be contiguous"),
    ("compress_decode", {"out": torch.zeros(100, dtype=torch.int32)}, "out must be float32, bfloat16 or float16"),
    ("compress_decode", {"out": torch.zeros(200)[::2]}, "out must be contiguous"),
    ("compress_encode", {"residual": torch.zeros(99)}, "residual must have as many elements as x, 100, not 99"),
    ("compress_encode", {"residual": torch.zeros(100).bfloat16()}, "residual must be float32, not bfloat16"),
    ("compress_encode", {"residual": torch.zeros(200)[::2]}, "residual must be contiguous"),
    ("compress_reduce", {"residual": torch.zeros(10, 10)}, r"residual must be flat, not of shape \[10, 10\]"),
    ("compress_encode", {"payload": BYTES.view(torch.int8)}, "payload must be uint8, not int8"),
    ("compress_encode", {"payload": BYTES.view(2, 100)}, "payload must have 1 dimensions"),
    ("compress_encode", {"payload": BYTES[::2]}, "the bytes of payload must be contiguous"),
    ("compress_encode", {"payload": BYTES[1:]}, "payload must begin at a multiple of 4 bytes"),
    ("compress_decode", {"payloads": BYTES}, "payloads must have 2 dimensions"),
    ("compress_decode", {"payloads": BYTES.view(2, 100).t()}, "the bytes of payloads must be contiguous"),
    ("compress_decode", {"payloads": BYTES[:0].view(0, 200)}, "payloads must have a row for each rank"),
    (
        "compress_decode",
        {"payloads": torch.zeros(2, 145, dtype=torch.uint8)},
        "payloads must begin at a multiple of 4 bytes, and",
    ),
    (
        "compress_reduce",
        {"payload": BYTES[:140]},
        r"segments\[0\] .* more than are left in payload, which has 140 bytes",
    ),
    ("compress_decode", {"weights": torch.ones(3)}, "weights must have a number for each row of payloads, 2, not 3"),
    ("compress_decode", {"weights": torch.ones(0)}, "weights must have a number for each row of payloads, 2, not 0"),
    ("compress_decode", {"weights": torch.ones(2).double()}, "weights must be float32, not float64"),
    ("compress_decode", {"weights": torch.ones(1, 2)}, r"weights must be flat, not of shape \[1, 2\]"),
    ("compress_decode", {"weights": torch.ones(4)[::2]}, "weights must be contiguous"),
    ("compress_encode", {"segments": torch.zeros(1, 3)}, "segments must be int64, not float32"),
    (
        "compress_encode",
        {"segments": torch.zeros(3, dtype=torch.int64)},
        r"segments must have shape \[segments, 3\], not \[3\]",
    ),
    ("compress_decode", {"segments": torch.zeros(3, 4, dtype=torch.int64)[:, :3]}, "segments must be contiguous"),
]


@pytest.mark.parametrize(("op", "changed", "message"), BAD, ids=[f"{op} {message}" for op, _, message in BAD])
def test_bad_input_is_named(op: str, changed: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        getattr(compress, op)(**arguments(op, **changed))


@pytest.mark.parametrize("op", OPS)
def test_nothing_to_do_is_done(op: str) -> None:
    getattr(compress, op)(**arguments(op, segments=torch.zeros(0, 3, dtype=torch.int64)))
    getattr(compress, op)(**arguments(op, segments=torch.tensor([[100, 0, 144], [0, 0, 0]])))


def test_reduce_without_residual_has_segments_of_any_position() -> None:
    given_ = arguments("compress_reduce", residual=None, segments=torch.tensor([[2**40, 100, 0]]))
    compress.compress_reduce(**given_)


@given(
    rows=st.lists(
        st.tuples(
            *[st.one_of(st.integers(-8, 300), st.integers(-(2**63), 2**63 - 1), st.integers(2**63 - 300, 2**63 - 1))]
            * 3
        ),
        max_size=3,
    ),
    elements=st.integers(0, 300),
    size=st.integers(0, 300),
    codec=st.sampled_from(list(CODECS)),
    block=st.sampled_from([32, 64, 32768]),
)
def test_any_segments_are_refused_or_coded(
    rows: list[tuple[int, int, int]], elements: int, size: int, codec: str, block: int
) -> None:
    """Whatever the numbers are: an error that names the segment, or the oracle's bytes."""
    segments = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    inside = all(
        0 <= first <= elements and 0 <= n <= elements - first and 0 <= byte <= size and byte % 4 == 0
        and byte + -(-n // block) * record_bytes(codec, block) <= size
        for first, n, byte in rows
    )  # fmt: skip
    apart = sorted((byte, byte + -(-n // block) * record_bytes(codec, block)) for _, n, byte in rows if n)
    if inside and any(a[1] > b[0] for a, b in itertools.pairwise(apart)):
        return  # overlapping segments are the caller's mistake, and harmless
    x, residual = torch.randn(elements), torch.zeros(elements)
    payload, out = torch.zeros(size, dtype=torch.uint8), torch.zeros(elements)
    calls = [
        ("compress_encode", (x, residual, payload, segments, codec, block)),
        ("compress_decode", (payload[None], out, segments, codec, block)),
        ("compress_reduce", (payload[None], residual, payload.clone(), segments, codec, block, 1.0)),
    ]
    for op, values in calls:
        if inside:
            agree(op, *values)
        else:
            with pytest.raises(RuntimeError, match=rf"{op}: segments\[\d\]"):
                getattr(compress, op)(*values)
