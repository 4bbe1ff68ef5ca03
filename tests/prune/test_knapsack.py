"""The search: the least loss within a budget, against trying everything."""

from __future__ import annotations

import itertools

import pytest
import torch

from pykernels.prune.knapsack import Choice, State, Unreachable, solve


def choice(name: str, width: int, scale: float, block: str | None = None) -> Choice:
    worth = scale * torch.rand(width, dtype=torch.float64).sort().values
    least = torch.cat([torch.zeros(1, dtype=torch.float64), worth.cumsum(0)])
    return Choice(name, {w: float(least[width - w]) for w in range(16, width + 1, 16)}, block)


def chain(state: State) -> float:
    """Layers in a row, each of which costs a constant and the product of what it reads and makes."""
    widths = [3, *state.widths.values(), 10]
    return sum(50 + a * b for a, b in itertools.pairwise(widths))


def best(choices: list[Choice], budget: float) -> float:
    lost = []
    for widths in itertools.product(*(c.lost for c in choices)):
        if chain(State({c.name: w for c, w in zip(choices, widths, strict=True)})) <= budget:
            lost.append(sum(c.lost[w] for c, w in zip(choices, widths, strict=True)))
    return min(lost)


@pytest.mark.parametrize("part", [0.9, 0.7, 0.5, 0.25])
@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_best_of_all(part: float, seed: int) -> None:
    torch.manual_seed(seed)
    choices = [choice(name, 128, scale) for name, scale in (("a", 1.0), ("b", 3.0), ("c", 0.5), ("d", 2.0))]
    full = State({c.name: c.full for c in choices})
    budget = part * chain(full)
    found = solve(choices, {}, chain, budget)
    assert chain(found) <= budget
    lost = sum(c.lost[found.widths[c.name]] for c in choices)
    assert lost <= 1.1 * best(choices, budget)


def test_a_step_of_the_latency_is_seen() -> None:
    """A layer that costs the same from 33 to 64 channels keeps 64, or 32."""
    choices = [choice("a", 64, 1.0), choice("b", 64, 1.0)]

    def seconds(state: State) -> float:
        return sum(float(-(-w // 32)) for w in state.widths.values())

    found = solve(choices, {}, seconds, 3.0)
    assert sorted(found.widths.values()) == [32, 64]


@pytest.mark.parametrize("worth, goes", [(0.01, True), (1e6, False)])
def test_a_block_goes_if_it_is_worth_little(worth: float, goes: bool) -> None:
    choices = [choice("stream", 64, 1.0), choice("inner", 64, 1.0, "block")]

    def seconds(state: State) -> float:
        inner = 0 if "block" in state.dropped else state.widths["stream"] * state.widths["inner"]
        return 1000 + 10 * state.widths["stream"] + inner

    full = State({c.name: c.full for c in choices})
    found = solve(choices, {"block": worth}, seconds, 0.6 * seconds(full))
    assert (found.dropped == {"block"}) is goes
    assert seconds(found) <= 0.6 * seconds(full)
    if goes:
        assert found.widths["stream"] == 64  # what the block took was enough


def test_what_cannot_be_reached_says_how_far_it_came() -> None:
    choices = [choice("a", 64, 1.0)]
    with pytest.raises(Unreachable) as error:
        solve(choices, {}, lambda state: 100.0 + state.widths["a"], 80.0)
    assert error.value.least == 116


def test_where_wider_layers_seem_quicker_and_changes_do_not_add_up() -> None:
    """Of two layers the next width is slower; narrow ones are quick enough, though a step back misses the budget."""
    part = {64: 1.0, 48: 1.02, 32: 0.965, 16: 0.88}

    def seconds(state: State) -> float:
        return part[state.widths["a"]] * part[state.widths["b"]]

    found = solve([choice("a", 64, 1.0), choice("b", 64, 1.0)], {}, seconds, 0.928)
    assert seconds(found) <= 0.928
    with pytest.raises(Unreachable, match=r"0\.77\d* is the least"):
        solve([choice("a", 64, 1.0), choice("b", 64, 1.0)], {}, seconds, 0.7)
