"""The integer program: as good as trying everything, on tables made up."""

from __future__ import annotations

import itertools
import random

import pytest

from pykernels.precision.choose import StepCost, Table, ValueCost

pytest.importorskip("highspy")


def some_table(seed: int, count: int = 8) -> Table:
    """A random network: every step reads one or two of the last values, some only follow in int8."""
    pick = random.Random(seed)

    def value(keeps: bool) -> ValueCost:
        error, *seconds = (pick.random() for _ in range(4))
        return ValueCost(error / 10, *seconds, float_reader=pick.random() < 0.2, keeps=keeps)

    steps, values = [], [value(False)]
    for place in range(count):
        reads = {pick.randrange(max(0, len(values) - 3), len(values)) for _ in range(pick.choice([1, 1, 2]))}
        follows, last = pick.random() < 0.3, place == count - 1
        seconds = (1 + 3 * pick.random(), 2 * pick.random())
        writes = None if last else len(values)
        steps.append(StepCost(seconds, pick.random() / 5, tuple(sorted(reads)), writes, follows, follows))
        values += [] if last else [value(follows)]
    return Table(steps, values)


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all_assignments(seed: int) -> None:
    table = some_table(seed)
    every = [a for a in itertools.product((False, True), repeat=len(table.steps)) if table.allowed(a)]
    for limit in (0.05, 0.3, 1.0, None):
        found = table.solve(limit)
        assert table.allowed(found)
        assert limit is None or table.error(found) <= limit * (1 + 1e-6)
        best = min(table.seconds(a) for a in every if limit is None or table.error(a) <= limit)
        assert table.seconds(found) == pytest.approx(best)


def test_conversions_can_cost_more_than_int8_saves() -> None:
    quick_alone = [StepCost((2.0, 1.0), reads=(0,), writes=1), StepCost((1.0, 9.0), reads=(1,))]
    dear = Table(quick_alone, [ValueCost(quantize=1.5), ValueCost()])
    cheap = Table(quick_alone, [ValueCost(quantize=0.5), ValueCost()])
    assert dear.solve() == [False, False] and cheap.solve() == [True, False]


def test_one_conversion_serves_all_readers() -> None:
    steps = [StepCost((2.0, 1.0), reads=(0,)), StepCost((2.0, 1.0), reads=(0,))]
    table = Table(steps, [ValueCost(quantize=1.5)])
    assert table.solve() == [True, True]
    assert table.seconds([True, True]) == pytest.approx(3.5)
    assert table.seconds([True, False]) == pytest.approx(4.5)


def test_a_value_is_rounded_once_whoever_reads_it() -> None:
    steps = [StepCost((2.0, 1.0), 0.01, (0,)), StepCost((2.0, 1.0), 0.02, (0,))]
    table = Table(steps, [ValueCost(error=0.1)])
    assert table.error([True, False]) == pytest.approx(0.11)
    assert table.error([True, True]) == pytest.approx(0.13)


def test_a_step_that_only_moves_bytes_rounds_nothing_again() -> None:
    steps = [
        StepCost((2.0, 1.0), reads=(0,), writes=1),
        StepCost((1.0, 0.5), reads=(1,), writes=2, follows=True, only_bytes=True),
        StepCost((2.0, 1.0), reads=(2,)),
    ]
    table = Table(steps, [ValueCost(0.01), ValueCost(0.02), ValueCost(0.04, keeps=True)])
    assert table.error([True, True, True]) == pytest.approx(0.03)
    assert table.error([False, False, True]) == pytest.approx(0.04)
    assert table.without([True, True, True], 0) == [False, False, True]
    assert table.without([True, True, True], 2) == [True, False, False]


def test_the_same_table_gives_the_same_choice() -> None:
    same = Table([StepCost((2.0, 1.0), 0.1) for _ in range(8)], [])
    assert same.solve(0.45) == same.solve(0.45)
    assert sum(same.solve(0.45)) == 4
