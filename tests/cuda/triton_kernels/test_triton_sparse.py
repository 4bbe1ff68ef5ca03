"""The sparse codecs in Triton, interpreted: the oracle's payloads and residuals, to the bit, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from interpreter import Interpreter, list_candidates

from pykernels import reference
from pykernels.cuda.registry import KERNELS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N = 9001  # more than two tiles
ONE = torch.tensor([[3, N - 10, 0]])
SEVERAL = torch.tensor([[0, 700, 1], [900, 0, 0], [1000, 5500, 0], [8000, 1001, 7]])


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but for which NaN a NaN is."""
    assert actual.dtype == expected.dtype
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = (t.nan_to_num(0.0, math.inf, -math.inf).view(torch.uint8) for t in (actual, expected))
    assert torch.equal(actual, expected)


def agree(interpret: Interpreter, op: str, *arguments: Any) -> list[Any]:
    """The arguments as the kernels leave them, which is how the oracle does."""
    actual = interpret(KERNELS[op], op, *arguments)
    expected = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(reference, op)(*expected)
    for a, e in zip(actual, expected, strict=True):
        if isinstance(a, torch.Tensor):
            same(a, e)
    return expected


def top(interpret: Interpreter, x: torch.Tensor, segments: torch.Tensor, k: int, **how: Any) -> torch.Tensor:
    """Encode; the payload."""
    velocity = torch.randn(x.numel()) if how.get("momentum") else None
    residual = how.get("residual", torch.randn(x.numel()) * 0.1)
    payload = torch.full((8 * k + 4,), 0xA5, dtype=torch.uint8)
    rest = (segments, k, how.get("threshold", 0.0), how.get("momentum", 0.0))
    left = agree(interpret, "sparse_encode", x, residual, velocity, payload, *rest)
    sent: torch.Tensor = left[3]
    return sent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segments", [ONE, SEVERAL], ids=["one", "several"])
def test_top_k_is_the_oracles(interpret: Interpreter, dtype: torch.dtype, segments: torch.Tensor) -> None:
    k = 90
    x = torch.randn(N).to(dtype)
    payloads = torch.stack([top(interpret, x, segments, k), top(interpret, x.roll(1), segments, k, momentum=0.9)])
    for rows in (payloads, payloads[:1]):  # the ranks send some of the same positions
        agree(interpret, "sparse_decode", rows, torch.randn(N).to(dtype), k, 0.3)


@pytest.mark.parametrize("k", [0, 1, N - 11, N - 10, N + 5])
def test_as_many_as_there_are(interpret: Interpreter, k: int) -> None:
    top(interpret, torch.randn(N), ONE, k)


@pytest.mark.parametrize("threshold", [0.5, 3.0, 100.0, math.inf])
def test_thresholds(interpret: Interpreter, threshold: float) -> None:
    payload = top(interpret, torch.randn(N), SEVERAL, 1500, threshold=threshold)
    agree(interpret, "sparse_decode", payload[None], torch.zeros(N), 1500)


def test_among_equals_the_first(interpret: Interpreter) -> None:
    zeros = torch.zeros(N)
    for x in (torch.ones(N), zeros, torch.randint(-2, 3, (N,)).float()):
        top(interpret, x, SEVERAL, 4200, residual=zeros)


def test_neighbouring_magnitudes(interpret: Interpreter) -> None:
    """They differ in their last digit only, so that every histogram decides."""
    bits = torch.tensor(1.0).view(torch.int32) + torch.randint(0, 100, (N,), dtype=torch.int32)
    x = bits.view(torch.float32) * torch.randn(N).sign()
    for k in (5, 3000):
        top(interpret, x, ONE, k, residual=torch.zeros(N))


def test_what_is_not_finite_comes_first_and_stays_outside(interpret: Interpreter) -> None:
    x = torch.randn(N)
    x[torch.tensor([5, 3000])] = math.inf
    x[4100] = -math.inf
    x[torch.tensor([77, 8100])] = math.nan
    for k in (3, 50):
        top(interpret, x, SEVERAL, k)
        top(interpret, x, SEVERAL, k, momentum=0.5)


def test_no_segment_sends_nothing(interpret: Interpreter) -> None:
    top(interpret, torch.randn(N), torch.empty(0, 3, dtype=torch.int64), 4)


class TestListed:
    """Few are sent: a sample says which magnitudes are listed, and the digits are counted in the list."""

    @staticmethod
    def agree(interpret: Interpreter, *arguments: Any, slack: int = 4096, made: bool = True) -> None:
        actual, lists = interpret.apply(list_candidates, 1024, slack, arguments)
        assert lists == made
        expected = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        reference.sparse_encode(*expected)
        for a, e in zip(actual, expected, strict=True):
            if isinstance(a, torch.Tensor):
                same(a, e)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("segments", [ONE, SEVERAL], ids=["one", "several"])
    def test_it_is_the_oracles(self, interpret: Interpreter, dtype: torch.dtype, segments: torch.Tensor) -> None:
        for k, momentum in ((90, 0.0), (3, 0.9), (700, 0.0)):
            x, residual = torch.randn(N).to(dtype), torch.randn(N) * 0.1
            velocity = torch.randn(N) if momentum else None
            payload = torch.zeros(8 * k, dtype=torch.uint8)
            self.agree(interpret, x, residual, velocity, payload, segments, k, 0.0, momentum)

    @pytest.mark.parametrize("threshold", [0.5, 3.0, 100.0, math.inf])
    def test_thresholds(self, interpret: Interpreter, threshold: float) -> None:
        payload = torch.zeros(8 * 300, dtype=torch.uint8)
        self.agree(interpret, torch.randn(N), torch.zeros(N), None, payload, SEVERAL, 300, threshold)

    def test_what_is_not_finite_and_ties(self, interpret: Interpreter) -> None:
        x = torch.randint(-3, 4, (N,)).float()
        x[torch.tensor([5, 3000, 8100])] = torch.tensor([math.inf, -math.inf, math.nan])
        for k in (2, 50, 800):
            payload = torch.zeros(8 * k, dtype=torch.uint8)
            self.agree(interpret, x, torch.zeros(N), None, payload, SEVERAL, k, slack=N)

    @pytest.mark.parametrize("slack", [-300, 4096], ids=["no room", "room"])
    def test_a_list_that_has_no_room_is_not_used(self, interpret: Interpreter, slack: int) -> None:
        """The sample, of which each tile has as many, meets the large ones too often."""
        x = torch.randn(N) * 1e-3
        x[8000:] = torch.randn(N - 8000) * 100
        payload = torch.zeros(8 * 90, dtype=torch.uint8)
        self.agree(interpret, x, torch.zeros(N), None, payload, SEVERAL, 90, slack=slack)

    def test_too_few_candidates(self, interpret: Interpreter) -> None:
        """Large numbers fill a small segment: its tile is one of five, its elements are 3 of 7204."""
        segments = torch.tensor([[0, 3, 0], [900, 7201, 0]])
        x = torch.rand(N) * 0.5
        x[:3] = 1000.0
        payload = torch.zeros(8 * 40, dtype=torch.uint8)
        self.agree(interpret, x, torch.zeros(N), None, payload, segments, 40)

    def test_where_many_are_sent_no_list_is_made(self, interpret: Interpreter) -> None:
        for k in (0, 2000):
            payload = torch.zeros(8 * k, dtype=torch.uint8)
            self.agree(interpret, torch.randn(N), torch.zeros(N), None, payload, ONE, k, made=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_random_k_is_the_oracles(interpret: Interpreter, dtype: torch.dtype, residual: bool) -> None:
    for segments, k, seed in ((ONE, 1500, 3), (SEVERAL, 77, -(2**63)), (SEVERAL, 7201, 2**40 + 1), (ONE, 0, 0)):
        x = torch.randn(N).to(dtype)
        x[1200] = math.nan
        kept = torch.randn(N) if residual else None
        left = agree(interpret, "randomk_encode", x, kept, torch.full((k + 1,), 7.0), segments, k, seed)
        agree(interpret, "randomk_decode", left[2], torch.ones(N, dtype=dtype), segments, k, seed, 0.3)


def damaged(entry: int, position: int) -> torch.Tensor:
    positions = torch.tensor([1, 5, 9, 0xFFFFFFFF]).to(torch.uint32)
    positions.view(torch.int32)[entry] = torch.tensor(position).to(torch.uint32).view(torch.int32)
    return torch.cat([positions.view(torch.uint8), torch.ones(4).view(torch.uint8)])[None]


@pytest.mark.parametrize(
    ("entry", "position", "says"),
    [(2, 64, "lies outside of out"), (2, 0xFFFFFFFE, "lies outside of out"), (2, 5, "do not ascend"),
     (0, 0xFFFFFFFF, "do not ascend"), (3, 2, "do not ascend")],
)  # fmt: skip
def test_damaged_payloads_stop_the_kernel(interpret: Interpreter, entry: int, position: int, says: str) -> None:
    interpret("sparse", "sparse_decode", damaged(2, 9), torch.zeros(64), 4)
    with pytest.raises(Exception, match=says):
        interpret("sparse", "sparse_decode", damaged(entry, position), torch.zeros(64), 4)


X, F = torch.zeros(64), torch.zeros(64)
BYTES, TABLE = torch.zeros(64, dtype=torch.uint8), torch.tensor([[0, 64, 0]])


@pytest.mark.parametrize(
    ("op", "arguments", "says"),
    [
        ("sparse_encode", (X.double(), F, None, BYTES, TABLE, 8), "x must be float32, bfloat16 or float16"),
        ("sparse_encode", (X, F[1:], None, BYTES, TABLE, 8), "residual must have as many elements as x, 64, not 63"),
        ("sparse_encode", (X, F, F.half(), BYTES, TABLE, 8), "velocity must be float32"),
        ("sparse_encode", (X, F, None, BYTES, TABLE, 9), "payload must have 72 bytes for k = 9, not 64"),
        ("sparse_encode", (X, F, None, BYTES, TABLE, -1), "k must lie in"),
        ("sparse_encode", (X, F, None, BYTES, TABLE, 8, -1.0), "threshold must be 0 or a positive number, not -1.0"),
        ("sparse_encode", (X, F, None, BYTES, TABLE, 8, math.nan), "threshold must be 0 or a positive number"),
        ("sparse_encode", (X, F, F, BYTES, TABLE, 8, 0.0, math.inf), "momentum must be a number"),
        ("sparse_encode", (X, F, None, BYTES, TABLE, 8, 0.0, 0.5), "momentum is that of velocity"),
        ("sparse_encode", (X, F, None, BYTES, TABLE + 1, 8), "segments end at element 66, but x has 64"),
        ("sparse_encode", (X, F, None, BYTES, TABLE.repeat(2, 1), 8), "segments must ascend and not overlap"),
        ("sparse_decode", (BYTES, F, 8), r"payloads must be \[ranks, bytes\]"),
        ("sparse_decode", (BYTES[None], F, 9), "payloads must have rows of 72 bytes for k = 9, not 64"),
        ("sparse_decode", (BYTES[None], F, -9), "k must lie in"),
        ("sparse_decode", (BYTES[None], F.int(), 8), "out must be float32"),
        ("randomk_encode", (X, F.half(), F, TABLE, 8, 0), "residual must be float32"),
        ("randomk_encode", (X, F, F, TABLE, 65, 0), r"k must lie in \[0, 64\]"),
        ("randomk_encode", (X, F, F[:7], TABLE, 8, 0), "values must have 8 elements, not 7"),
        ("randomk_decode", (F, X, TABLE, -1, 0), "k must lie in"),
        ("randomk_decode", (F.half(), X, TABLE, 8, 0), "values must be float32"),
        ("randomk_decode", (F, X, TABLE + 1, 8, 0), "segments end at element 66, but out has 64"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(interpret: Interpreter, op: str, arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(RuntimeError, match=f"pykernels: {op}: {says}"):
        interpret(KERNELS[op], op, *arguments)
