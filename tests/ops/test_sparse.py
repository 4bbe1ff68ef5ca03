"""The sparse codecs of gradients: on every isa and any number of threads the oracle's bits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pykernels import reference
from pykernels.ops import sparse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNUSED = 2**32 - 1
BIG = 300_000  # enough for a sample to be taken, and for several runs on every thread


def layout(counts: list[int], gap: int = 3) -> tuple[torch.Tensor, int]:
    """Segments of so many elements, with gaps between them and before and behind: segments, elements."""
    rows, first = [], gap
    for n in counts:
        rows.append((first, n, 0))
        first += n + gap
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3), first


def whole(n: int) -> torch.Tensor:
    return torch.tensor([[0, n, 0]])


def gradients(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of many magnitudes, with zeros and many ties."""
    x = torch.randn(n) * 10.0 ** torch.randint(-6, 2, (n,))
    ties = torch.rand(n) < 0.2
    x[ties] = torch.randint(-3, 4, (int(ties.sum()),)).float()
    x[torch.rand(n) < 0.02] = -0.0
    return x.to(dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


def agree(op: str, *arguments: object) -> list[object]:
    """The arguments as the op leaves copies of them, which is how the oracle does, bit for bit."""
    results = []
    for functions in (sparse, reference):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        getattr(functions, op)(*copies)
        results.append(copies)
    for a, e in zip(*results, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(e, torch.Tensor):
            assert torch.equal(bits(a), bits(e)), f"{(bits(a) != bits(e)).sum()} bytes differ"
    return results[0]


def payload_of(k: int) -> torch.Tensor:
    return torch.full((8 * k + 12,), 0xA5, dtype=torch.uint8)


def entries(payload: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions and values that are in use."""
    positions, values = payload[: 4 * k].view(torch.uint32).long(), payload[4 * k : 8 * k].view(torch.float32)
    used = positions != UNUSED
    return positions[used], values[used]


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ---- the oracle's bits -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    counts=st.lists(st.integers(0, 9000), max_size=4),
    share=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.7, 1.0, 1.3]),
    threshold=st.sampled_from([0.0, -0.0, 1e-3, 1.0, 50.0, math.inf]),
    momentum=st.sampled_from([None, 0.0, 0.9]),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_the_largest_elements_are_the_oracles(
    isa: str,
    dtype: torch.dtype,
    counts: list[int],
    share: float,
    threshold: float,
    momentum: float | None,
    ranks: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    segments, n = layout(counts)
    k = math.ceil(share * sum(counts))
    payloads = []
    for _ in range(ranks):
        x, residual = gradients(n, dtype), gradients(n)
        velocity = None if momentum is None else gradients(n)
        done = agree("sparse_encode", x, residual, velocity, payload_of(k), segments, k, threshold, momentum or 0.0)
        payloads.append(done[3])
    agree("sparse_decode", torch.stack(payloads), gradients(n, dtype), k, 0.37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    counts=st.lists(st.integers(0, 9000), max_size=4),
    share=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.7, 1.0]),
    with_residual=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_random_elements_are_the_oracles(
    isa: str, dtype: torch.dtype, counts: list[int], share: float, with_residual: bool, seed: int
) -> None:
    torch.manual_seed(seed % 1000)
    segments, n = layout(counts)
    k = int(share * sum(counts))
    residual = gradients(n) if with_residual else None
    values = agree("randomk_encode", gradients(n, dtype), residual, torch.zeros(k + 2), segments, k, seed)[2]
    agree("randomk_decode", values, gradients(n, dtype), segments, k, seed, 1.7)


def inputs() -> dict[str, torch.Tensor]:
    """Large gradients of many kinds, those too that a sample says nothing true of."""
    layers = torch.randn(BIG) * torch.tensor([1e-5, 1.0, 1e-2, 30.0]).repeat_interleave(BIG // 4)
    few = torch.zeros(BIG)
    few[::1000] = torch.randn(BIG // 1000)
    bad = torch.randn(BIG)
    bad[torch.randint(0, BIG, (1000,))] = math.nan
    bad[torch.randint(0, BIG, (1000,))] = math.inf
    mostly_bad = torch.where(torch.rand(BIG) < 0.9, math.nan, 1.0)
    return {
        "normal": torch.randn(BIG),
        "heavy tails": torch.randn(BIG) / torch.rand(BIG) ** 2,
        "layers": layers,
        "sorted": torch.linspace(-1, 3, BIG),
        "equal": torch.full((BIG,), -0.5),
        "two values": torch.where(torch.rand(BIG) < 0.02, 2.0, 1.0),
        "zeros": torch.zeros(BIG),
        "few": few,
        "denormal": torch.randn(BIG) * 1e-42,
        "not finite": bad,
        "mostly NaN": mostly_bad,
        "all NaN": torch.full((BIG,), math.nan),
    }


@pytest.mark.parametrize("kind", inputs())
def test_large_gradients(isa: str, threads: int, kind: str) -> None:
    x = inputs()[kind]
    segments = torch.tensor([[0, 100_001, 0], [100_001, 7, 0], [100_100, BIG - 100_103, 0]])
    residual = torch.randn(BIG) * 0.01 * x.abs().nan_to_num(1.0, 1.0)
    for k in (1, 300, 3000, BIG // 3, BIG):
        agree("sparse_encode", x, residual, None, payload_of(k), segments, k)
    agree("sparse_encode", x, residual, x.flip(0), payload_of(3000), segments, 3000, 0.0, 0.9)
    for threshold in (0.1, 3.0):
        agree("sparse_encode", x, residual, None, payload_of(BIG), segments, BIG, threshold)
        agree("sparse_encode", x, residual, None, payload_of(20), segments, 20, threshold)


def test_a_sample_that_misleads(isa: str, threads: int) -> None:
    """The elements that a sample may draw are all small, or all large."""
    for value in (0.0, 7.0):
        x = torch.randn(BIG)
        drawn = reference.compress._drawn(whole(BIG), BIG // 8, 0)
        x[drawn] = value
        for k in (10, 3000):
            agree("sparse_encode", x, torch.zeros(BIG), None, payload_of(k), whole(BIG), k)


def test_many_threads_decode_alike(isa: str, threads: int) -> None:
    k = 20_000
    payloads = []
    for rank in range(3):
        used = k - 7000 * rank
        payload = payload_of(k)
        reference.sparse_encode(
            torch.randn(BIG) * torch.linspace(0, 1 + rank, BIG), torch.zeros(BIG), None, payload, whole(BIG), k
        )
        payload[4 * used : 4 * k] = 0xFF
        payloads.append(payload)
    for dtype in DTYPES:
        agree("sparse_decode", torch.stack(payloads), torch.randn(BIG).to(dtype), k, 1 / 3)


def test_random_elements_on_many_threads(isa: str, threads: int) -> None:
    segments = torch.tensor([[0, 100_001, 0], [100_001, 7, 0], [100_100, BIG - 100_103, 0]])
    for k in (0, 1, 17, 3000, BIG // 2, BIG - 95):
        x, residual = torch.randn(BIG), torch.randn(BIG)
        x[:: BIG // 50] = math.nan
        values = agree("randomk_encode", x, residual, torch.zeros(k), segments, k, 5)[2]
        agree("randomk_decode", values, torch.ones(BIG), segments, k, 5, 0.5)


# ---- what it means ---------------------------------------------------------------------------------------------------
def test_the_largest_are_sent_and_the_others_kept(isa: str) -> None:
    x, k = torch.randn(5000), 50
    payload, residual, out = payload_of(k), torch.zeros(5000), torch.zeros(5000)
    sparse.sparse_encode(x, residual, None, payload, whole(5000), k)
    positions, values = entries(payload, k)
    assert torch.equal(positions, x.abs().topk(k).indices.sort().values)
    assert torch.equal(values, x[positions])
    sparse.sparse_decode(payload[None], out, k)
    assert torch.equal(out + residual, x)


def test_among_equals_the_first_are_sent(isa: str) -> None:
    x = torch.ones(70_000)
    x[40_000] = 2.0
    payload = payload_of(100)
    sparse.sparse_encode(x, torch.zeros_like(x), None, payload, whole(70_000), 100)
    assert entries(payload, 100)[0].tolist() == [*range(99), 40_000]


def test_a_threshold_sends_fewer(isa: str) -> None:
    x = torch.tensor([0.5, -3.0, 1.0, 0.99, -1.0])
    payload, residual = payload_of(4), torch.zeros(5)
    sparse.sparse_encode(x, residual, None, payload, whole(5), 4, threshold=1.0)
    positions, values = entries(payload, 4)
    assert (positions.tolist(), values.tolist()) == ([1, 2, 4], [-3.0, 1.0, -1.0])
    assert residual.tolist() == [0.5, 0.0, 0.0, x[3].item(), 0.0]


def test_momentum_correction_sends_what_sgd_with_momentum_adds_up(isa: str) -> None:
    """What was sent plus what is kept are the sums of velocities, as long as an element was never sent."""
    n, k, momentum = 2000, 5, 0.9
    residual, velocity = torch.zeros(n), torch.zeros(n)
    plain, total, sent = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.bool)
    for _ in range(4):
        x = torch.randn(n)
        plain = momentum * plain + x
        total += plain
        payload = payload_of(k)
        sparse.sparse_encode(x, residual, velocity, payload, whole(n), k, momentum=momentum)
        positions, _ = entries(payload, k)
        sent[positions] = True
        assert (velocity[positions] == 0).all() and (residual[positions] == 0).all()
    torch.testing.assert_close(residual[~sent], total[~sent])
    torch.testing.assert_close(velocity[~sent], plain[~sent])


def test_error_feedback_sends_everything_in_time(isa: str) -> None:
    n, k = 1000, 100
    x, residual, out = torch.rand(n) + 0.5, torch.zeros(n), torch.zeros(n)
    steps = 60
    for _ in range(steps):
        payload = payload_of(k)
        sparse.sparse_encode(x, residual, None, payload, whole(n), k)
        sparse.sparse_decode(payload[None], out, k)
    torch.testing.assert_close(out + residual, steps * x)
    assert (out > 0).all()


def test_every_element_is_drawn_alike() -> None:
    """Over many seeds: each element at least once, and their counts as a uniform choice makes them (chi-square)."""
    n, k, rounds = 1003, 59, 4000
    counts = torch.zeros(n)
    for seed in range(rounds):
        out = torch.empty(n)
        sparse.randomk_decode(torch.ones(k), out, whole(n), k, seed)
        assert int(out.sum()) == k
        counts += out
    assert counts.min() > 0
    begin = torch.arange(k + 1) * n // k
    span = (begin[1:] - begin[:-1]).repeat_interleave(begin[1:] - begin[:-1])
    expected = rounds / span
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = n - k
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom), chi2


def test_strata_are_drawn_independently_of_each_other() -> None:
    """The places drawn in neighbouring strata and under neighbouring seeds are uncorrelated."""
    span, k, rounds = 16, 64, 500
    places = torch.empty(rounds, k)
    for seed in range(rounds):
        out = torch.empty(span * k)
        sparse.randomk_decode(torch.ones(k), out, whole(span * k), k, seed)
        places[seed] = out.view(k, span).argmax(1).float()
    centred = (places - places.mean()) / places.std()
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(product.mean().item()) * math.sqrt(product.numel()) < 4


# ---- payloads of other machines --------------------------------------------------------------------------------------
def good_payloads(n: int, k: int, ranks: int = 2) -> torch.Tensor:
    payloads = torch.stack([payload_of(k) for _ in range(ranks)])
    for payload in payloads:
        sparse.sparse_encode(torch.randn(n), torch.zeros(n), None, payload, whole(n), k)
    return payloads


def refuses(payloads: torch.Tensor, n: int, k: int, message: str) -> None:
    out = torch.ones(n)
    with pytest.raises(RuntimeError, match=message):
        sparse.sparse_decode(payloads, out, k)
    assert (out == 1.0).all()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 37, 98, 99])
def test_positions_that_do_not_ascend_are_refused(isa: str, rank: int, at: int) -> None:
    payloads = good_payloads(5000, 100)
    positions = payloads[rank, :400].view(torch.uint32).long()
    neighbour = at + 1 if at < 99 else at - 1
    for wrong in (positions[neighbour].clone(), torch.tensor(UNUSED if at < 99 else 0)):
        damaged = payloads.clone()
        damaged[rank, 4 * at : 4 * at + 4] = wrong.to(torch.uint32).view(1).view(torch.uint8)
        refuses(damaged, 5000, 100, rf"payloads\[{rank}\] must hold ascending positions")


def test_positions_outside_are_refused(isa: str) -> None:
    payloads = good_payloads(5000, 100)
    last = int(payloads[1, 396:400].view(torch.uint32).long())
    sparse.sparse_decode(payloads, torch.zeros(5000), 100)
    refuses(payloads[1:], last, 100, rf"payloads\[0\] holds position {last}, but out has {last} elements")
    payloads[0, 396:400] = torch.tensor([UNUSED - 1]).to(torch.uint32).view(torch.uint8)
    refuses(payloads, 5000, 100, rf"payloads\[0\] holds position {UNUSED - 1}, but out has 5000 elements")


@given(seed=st.integers(0, 10_000), damage=st.integers(1, 40), k=st.integers(0, 200), n=st.integers(0, 3000))
def test_damaged_payloads_are_refused_or_add_inside(isa: str, seed: int, damage: int, k: int, n: int) -> None:
    """Any bytes at all: an error and nothing written, or what the oracle adds; never a write outside `out`."""
    generator = torch.Generator().manual_seed(seed)
    payloads = good_payloads(n, k)
    where = torch.randint(0, max(1, payloads.numel()), (damage,), generator=generator)
    payloads.view(-1)[where] = torch.randint(0, 256, (damage,), generator=generator, dtype=torch.uint8)
    around = torch.full((n + 2000,), 5.0)
    out = around[1000 : 1000 + n]
    positions = payloads[:, : 4 * k].contiguous().view(torch.uint32).long()
    unused = positions == UNUSED
    rising = (positions[:, 1:] > positions[:, :-1]) | unused[:, 1:]
    sound = bool(rising.all()) and bool(((positions < n) | unused).all())
    if sound:
        expected = out.clone()
        reference.sparse_decode(payloads, expected, k, 0.5)
        sparse.sparse_decode(payloads, out, k, 0.5)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    else:
        with pytest.raises(RuntimeError, match=r"payloads\[\d\] (must hold ascending|holds position)"):
            sparse.sparse_decode(payloads, out, k, 0.5)
        assert (out == 5.0).all()
    assert (around[:1000] == 5.0).all() and (around[1000 + n :] == 5.0).all()


# ---- bad input -------------------------------------------------------------------------------------------------------
GOOD: dict[str, dict[str, object]] = {
    "sparse_encode": {
        "x": torch.ones(100), "residual": torch.zeros(100), "velocity": None, "payload": torch.zeros(80).byte(),
        "segments": whole(100), "k": 10, "threshold": 0.0, "momentum": 0.0,
    },
    "sparse_decode": {"payloads": torch.full((1, 80), 255).byte(), "out": torch.zeros(100), "k": 10},
    "randomk_encode": {
        "x": torch.ones(100), "residual": torch.zeros(100), "values": torch.zeros(10), "segments": whole(100), "k": 10,
        "seed": 0,
    },
    "randomk_decode": {
        "values": torch.zeros(10), "out": torch.zeros(100), "segments": whole(100), "k": 10, "seed": 0,
    },
}  # fmt: skip
BAD: list[tuple[str, dict[str, object], str]] = [
    ("sparse_encode", {"x": torch.ones(100).double()}, "x must be float32, bfloat16 or float16, not float64"),
    ("sparse_encode", {"x": torch.ones(200)[::2]}, "x must be contiguous"),
    ("sparse_encode", {"x": torch.ones(1).expand(2**32 - 1)}, "x must be contiguous"),
    ("sparse_encode", {"residual": torch.zeros(99)}, "residual must have as many elements as x, 100, not 99"),
    ("sparse_encode", {"residual": torch.zeros(100).half()}, "residual must be float32, not float16"),
    ("sparse_encode", {"residual": torch.zeros(200)[::2]}, "residual must be contiguous"),
    ("sparse_encode", {"velocity": torch.zeros(99)}, "velocity must have as many elements as x, 100, not 99"),
    ("sparse_encode", {"velocity": torch.zeros(100).bfloat16()}, "velocity must be float32, not bfloat16"),
    ("sparse_encode", {"payload": torch.zeros(79).byte()}, "payload must have 8 bytes for each of k = 10"),
    ("sparse_encode", {"payload": torch.zeros(80)}, "payload must be uint8, not float32"),
    ("sparse_encode", {"payload": torch.zeros(83).byte()[3:]}, "payload must begin at a multiple of 4"),
    ("sparse_encode", {"k": -1}, "k must lie in [0, 2^32 - 2], not -1"),
    ("sparse_encode", {"threshold": -1.0}, "threshold must be 0 or a positive number, not -1"),
    ("sparse_encode", {"threshold": math.nan}, "threshold must be 0 or a positive number, not nan"),
    ("sparse_encode", {"momentum": 0.9}, "momentum is that of velocity, which is not given"),
    ("sparse_encode", {"momentum": math.nan, "velocity": torch.zeros(100)}, "momentum must be a number"),
    ("sparse_encode", {"segments": whole(100).int()}, "segments must be int64, not int32"),
    ("sparse_encode", {"segments": torch.tensor([0, 100, 0])}, "segments must have shape [segments, 3]"),
    ("sparse_encode", {"segments": whole(101)}, "segments[0] = (0, 101, ...) must lie inside x"),
    ("sparse_encode", {"segments": torch.tensor([[-1, 5, 0]])}, "segments[0] = (-1, 5, ...) must lie"),
    ("sparse_encode", {"segments": torch.tensor([[1, 2**63 - 1, 0]])}, "must lie inside x"),
    ("sparse_encode", {"segments": torch.tensor([[9, 5, 0], [13, 1, 0]])}, "segments[1] = (13, 1, ...) must"),
    ("sparse_decode", {"payloads": torch.zeros(80).byte()}, "payloads must have 2 dimensions"),
    ("sparse_decode", {"payloads": torch.zeros(0, 80).byte()}, "payloads must have a row for each rank"),
    ("sparse_decode", {"payloads": torch.zeros(1, 79).byte()}, "payloads must have rows of 8 bytes for each"),
    ("sparse_decode", {"payloads": torch.zeros(2, 81).byte()}, "payloads must begin at a multiple of 4"),
    ("sparse_decode", {"out": torch.zeros(100).int()}, "out must be float32, bfloat16 or float16, not int32"),
    ("sparse_decode", {"out": torch.zeros(10, 20).t()}, "out must be contiguous"),
    ("sparse_decode", {"k": -3}, "k must lie in [0, 2^32 - 2], not -3"),
    ("randomk_encode", {"k": 101}, "k must lie in [0, elements of the segments = 100], not 101"),
    ("randomk_encode", {"k": -1}, "k must lie in [0, elements of the segments = 100], not -1"),
    ("randomk_encode", {"values": torch.zeros(9)}, "values must have at least k = 10 elements, not 9"),
    ("randomk_encode", {"values": torch.zeros(10).half()}, "values must be float32, not float16"),
    ("randomk_encode", {"values": torch.zeros(20)[::2]}, "values must be contiguous"),
    ("randomk_encode", {"residual": torch.zeros(101)}, "residual must have as many elements as x, 100, not 101"),
    ("randomk_decode", {"out": torch.zeros(100).long()}, "out must be float32, bfloat16 or float16, not int64"),
    ("randomk_decode", {"segments": whole(101)}, "segments[0] = (0, 101, ...) must lie inside out"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "wrong", "message"), BAD, ids=[f"{op} {' '.join(wrong)} {i}" for i, (op, wrong, _) in enumerate(BAD)]
)
def test_bad_input_names_the_argument(op: str, wrong: dict[str, object], message: str) -> None:
    function = getattr(sparse, op)
    function(**GOOD[op])
    with pytest.raises(RuntimeError, match=rf"pykernels: {op}: .*{re.escape(message)}"):
        function(**{**GOOD[op], **wrong})


def test_more_elements_than_positions_are_refused() -> None:
    """Nothing of so large a tensor is touched, so that no memory is taken."""
    huge = torch.empty(2**32 - 1, dtype=torch.bfloat16)
    with pytest.raises(
        RuntimeError, match=r"sparse_decode: out must have fewer than 2\^32 - 1 elements, not 4294967295"
    ):
        sparse.sparse_decode(torch.full((1, 8), 255).byte(), huge, 1)
    with pytest.raises(RuntimeError, match=r"randomk_encode: x must have fewer than 2\^32 - 1 elements"):
        sparse.randomk_encode(huge, None, torch.zeros(1), whole(5), 1, 0)
