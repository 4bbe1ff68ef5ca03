"""Interleaved timing on calls whose cost a fake clock sets."""

from __future__ import annotations

import pytest

from pykernels.bench.timing import Timing, interleave


class Clock:
    """A watch that only moves when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call(self, name: str, *costs: float):
        left = list(costs)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_each_call_is_measured_by_its_own_cost():
    clock = Clock()
    fast, slow = interleave(
        [clock.call("fast", 0.01), clock.call("slow", 0.03)], rounds=5, clock=clock, sleep=clock.sleep
    )
    assert fast.median == pytest.approx(0.01)
    assert slow.median == pytest.approx(0.03)
    assert len(fast.samples) == len(slow.samples) == 5


def test_calls_alternate_within_a_round_and_take_turns_in_going_first():
    clock = Clock()
    interleave([clock.call("a", 0.01), clock.call("b", 0.01)], rounds=3, clock=clock, sleep=clock.sleep)
    rounds = clock.calls[2:]  # after the one each that finds the number of repeats
    assert rounds == ["a", "a", "b", "b", "b", "b", "a", "a", "a", "a", "b", "b"]


def test_a_short_call_is_repeated_until_the_sample_is_long_enough():
    clock = Clock()
    (taken,) = interleave([clock.call("short", 1e-4)], rounds=3, clock=clock, sleep=clock.sleep)
    assert taken.median == pytest.approx(1e-4)
    assert len(clock.calls) == 1 + 3 * (1 + 20)  # 2 ms of samples


def test_the_budget_ends_the_rounds_but_three_are_always_made():
    clock = Clock()
    (taken,) = interleave([clock.call("slow", 1.0)], rounds=50, seconds=0.0, clock=clock, sleep=clock.sleep)
    assert len(taken.samples) == 3


def test_one_disturbed_round_moves_neither_median_nor_best():
    taken = Timing((1.0, 1.0, 9.0, 1.0, 1.1))
    assert taken.median == 1.0
    assert taken.best == 1.0
    assert Timing((1.0, 1.0, 1.0, 1.0)).spread == 0.0
    assert Timing((1.0, 2.0, 3.0, 4.0)).spread > 0.2


def test_rounds_below_one_are_refused():
    with pytest.raises(ValueError, match="rounds"):
        interleave([lambda: None], rounds=0)
