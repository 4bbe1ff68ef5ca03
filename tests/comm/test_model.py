"""The cost model: by hand where it can be worked out by hand, by its bounds elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykernels.comm.layout import Run, lay_out
from pykernels.comm.model import Cost, Link, Speed, Times, predict, sent_bytes, step_seconds

GIGABIT = 1.25e8
RUNS = [Run("matrix", 0, 100_000, False), Run("bias", 100_000, 300, True)]


def test_a_network_costs_latencies_and_bytes() -> None:
    link = Link.between(8, GIGABIT, 1e-3)
    assert link.all_to_all.of(GIGABIT) == pytest.approx(1.001)
    assert link.all_gather.of(GIGABIT) == pytest.approx(1.007)
    assert link.all_reduce.of(GIGABIT) == pytest.approx(1.014)


def test_ranks_of_a_host_share_its_link() -> None:
    link = Link.between(8, GIGABIT, 0.0, ranks_per_host=4)
    # Of 7 parts 4 leave the host, and 4 ranks send them; a ring leaves it once.
    assert link.all_to_all.per_byte == pytest.approx(16 / 7 / GIGABIT)
    assert link.all_gather.per_byte == pytest.approx(1 / GIGABIT)
    alone = Link.between(4, GIGABIT, 1e-3, ranks_per_host=4)
    assert alone.all_to_all.of(1e9) == alone.all_reduce.of(1e9) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1.0, 0.0), "world must be at least 2"),
        ((4, 0.0, 0.0), "bandwidth must be above 0"),
        ((4, 1.0, -1.0), "latency must not be below 0"),
        ((4, 1.0, 0.0, 3), "ranks_per_host must divide world"),
        ((4, 1.0, 0.0, 0), "ranks_per_host must divide world"),
    ],
)
def test_a_network_that_cannot_be_is_refused(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Link.between(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 3, 64])
def test_bytes_are_those_of_the_layout(world: int) -> None:
    assert sent_bytes("fp32", RUNS, 0, world) == pytest.approx(2 * (world - 1) / world * 4 * 100_300)
    assert sent_bytes("int8", RUNS, 256, world) == 2 * (world - 1) * lay_out(RUNS, "int8", 256, world, 0).shard_bytes


def test_a_bucket_takes_its_phases() -> None:
    link = Link(Cost(1.0, 1e-6), Cost(2.0, 2e-6), Cost(3.0, 3e-6))
    run = [Run("x", 0, 1024, False)]
    part = 2 * (4 + 256)  # two of four records go to the other rank
    times = predict("int8", run, 256, 2, link, Speed(1e-3, 2e-3, 3e-3))
    assert times.encode == pytest.approx(1.024)
    assert times.exchange == pytest.approx(1.0 + 1e-6 * _aligned(part))
    assert times.reduce == pytest.approx(2.048)
    assert times.gather == pytest.approx(2.0 + 2e-6 * _aligned(part))
    assert times.decode == pytest.approx(3.072)
    assert times.total == pytest.approx(1.024 + 2.048 + 3.072 + times.wire)
    plain = predict("fp32", run, 0, 2, link, Speed(1e-3))
    assert plain == Times(pytest.approx(1.024), pytest.approx(3.0 + 3e-6 * 4096))  # type: ignore[arg-type]


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def test_slow_links_want_int8_and_fast_ones_fp32() -> None:
    speeds = {"fp32": Speed(1e-10), "bf16": Speed(4e-10, 4e-10, 2e-10), "int8": Speed(5e-10, 5e-10, 2e-10)}

    def best(bandwidth: float) -> str:
        link = Link.between(4, bandwidth, 1e-6)
        return min(speeds, key=lambda codec: predict(codec, RUNS, 256, 4, link, speeds[codec]).total)

    assert best(GIGABIT / 10) == best(GIGABIT) == "int8"
    assert best(100 * GIGABIT) == "fp32"


def test_buckets_overlap_as_the_hooks_let_them() -> None:
    one = Times(encode=1.0, exchange=10.0, reduce=2.0, gather=10.0, decode=1.0)
    assert step_seconds([one]) == pytest.approx(24.0)
    # Encoded at 1 and 2. Wire: exchange 1-11, exchange 11-21 (the first gather is ready at 13, after it was ready),
    # gather 21-31, gather 31-41; the last decode ends at 42.
    assert step_seconds([one, one]) == pytest.approx(42.0)
    # Backward fills them at 50 and 101, so that the second has the wire for itself: 101 + 1 + 10 + 2 + 10 + 1.
    assert step_seconds([one, one], compute=100.0) == pytest.approx(125.0)
    assert step_seconds([Times(0.0, 3.0)] * 2, compute=100.0) == pytest.approx(103.0)


phases = st.floats(0.0, 10.0)
times = st.builds(Times, phases, phases, phases, phases, phases)


@given(st.lists(times, min_size=1, max_size=6), st.floats(0.0, 50.0))
def test_a_step_takes_no_less_than_its_parts_and_no_more_than_their_sum(buckets: list[Times], compute: float) -> None:
    taken = step_seconds(buckets, compute)
    assert taken <= compute + sum(bucket.total for bucket in buckets) + 1e-9
    assert taken >= sum(bucket.wire for bucket in buckets) - 1e-9
    assert taken >= compute + sum(bucket.encode for bucket in buckets) - 1e-9
