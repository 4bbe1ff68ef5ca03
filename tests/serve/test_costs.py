"""What a call costs by rows: which sizes are run, what is cheapest a row, how long it pays to wait for more."""

from __future__ import annotations

import pytest

from pykernels.serve.costs import KINDS, Costs, sizes


@pytest.mark.parametrize("most", [1, 2, 7, 8, 9, 16, 33, 128, 1000])
def test_sizes_ascend_from_one_to_the_most_and_are_few(most: int) -> None:
    found = sizes(most)
    assert found[0] == 1 and found[-1] == most
    assert found == sorted(set(found)) and len(found) <= KINDS


def test_every_size_is_run_where_there_are_few() -> None:
    assert sizes(8) == list(range(1, 9))


def test_rows_between_two_sizes_run_as_the_larger() -> None:
    costs = Costs({1: 1.0, 2: 1.5, 4: 2.0})
    assert [costs.size(rows) for rows in (1, 2, 3, 4)] == [1, 2, 4, 4]
    assert costs.of(3) == 2.0
    assert costs.most == 4


def test_more_rows_than_the_most_cost_what_the_most_does() -> None:
    assert Costs({1: 1.0, 2: 1.5}).of(9) == 1.5


def test_a_size_that_took_longer_than_a_larger_one_was_disturbed() -> None:
    assert Costs({1: 3.0, 2: 1.0, 4: 2.0}).seconds == {1: 1.0, 2: 1.0, 4: 2.0}


def test_the_best_of_several_costs_least_a_row() -> None:
    costs = Costs({1: 1.0, 2: 1.2, 3: 2.7, 4: 2.8})
    assert costs.best([1, 2, 3, 4]) == 1  # 0.6 a row
    assert costs.best([1, 3, 4]) == 2  # 0.7 a row


def test_of_equal_ones_the_largest_is_best() -> None:
    assert Costs({1: 1.0, 2: 2.0, 4: 4.0}).best([1, 2, 4]) == 2


def test_waiting_pays_until_idle_time_has_cost_what_the_batch_saves() -> None:
    costs = Costs({1: 1.0, 2: 1.2})
    assert costs.patience(1, 1) == pytest.approx(0.8)  # (1.2 + 0.8) / 2 rows = 1.0 a row


def test_waiting_never_pays_where_a_batch_saves_nothing_or_is_full() -> None:
    assert Costs({1: 1.0, 2: 2.0, 4: 4.0}).patience(1, 1) == 0.0
    assert Costs({1: 1.0, 2: 1.1}).patience(2, 1) == 0.0
