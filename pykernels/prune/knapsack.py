"""What to keep: the least loss of importance within a latency, over widths and dropped blocks.

With everything else as it is, a group at another width costs some seconds more or less: a multiple-choice knapsack,
solved by merging fronts of what cannot be bettered (the dynamic program over (cost, loss), one entry a bucket of 1/2000
of the latency). Layers belong to two groups each, so the seconds of several changes do not simply add up: the budget
is lowered in steps, widths move by a quarter of themselves at most, and every step is weighed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "State", "Unreachable", "solve"]

_BUCKETS = 2000
_STEP = 0.1  # of the whole latency: how far the budget is lowered at once
_POLISH = 12  # times that the widths move, at most, once the budget is met
_OPTIONS = 9  # widths of a group that are weighed at once


class Unreachable(ValueError):
    """No choice is quick enough.

    Attributes:
        least: the latency that was reached.
    """

    def __init__(self, least: float) -> None:
        super().__init__(f"{least} is the least that can be reached")
        self.least = least


@dataclass(frozen=True)
class Choice:
    """A group.

    Attributes:
        lost: by width, what is lost; the last is the full width and loses nothing.
        block: the block that it is inside of, or None.
    """

    name: str
    lost: Mapping[int, float]
    block: str | None = None

    @property
    def full(self) -> int:
        return max(self.lost)


@dataclass
class State:
    """Widths by group, and blocks that are dropped."""

    widths: dict[str, int]
    dropped: frozenset[str] = frozenset()

    def but(self, name: str, width: int) -> State:
        return State({**self.widths, name: width}, self.dropped)

    def without(self, block: str) -> State:
        return State(self.widths, self.dropped | {block})

    def having(self, block: str) -> State:
        return State(self.widths, self.dropped - {block})


@dataclass
class _Front:
    """Choices of which none is both cheaper and better than another, by rising cost."""

    cost: NDArray[np.float64]
    lost: NDArray[np.float64]
    picks: list[dict[str, Any]] = field(default_factory=list)


def solve(
    choices: Sequence[Choice],
    blocks: Mapping[str, float],
    seconds: Callable[[State], float],
    budget: float,
) -> State:
    """The state of least loss that takes no longer than `budget`.

    Args:
        blocks: what is lost with each block.
        seconds: the latency of a state.
        budget: in the unit of `seconds`.

    Raises:
        Unreachable: there is none.
    """
    state = State({choice.name: choice.full for choice in choices})
    whole = now = seconds(state)
    best: tuple[float, State] | None = None
    polished = 0
    while polished < _POLISH:
        target = max(budget, now - _STEP * whole)
        after = _move(state, choices, blocks, seconds, target, now, fine=now <= budget)
        then = seconds(after)
        if then > budget and (after == state or then >= now - 1e-4 * whole):
            if best is not None:
                break
            after = _move(state, choices, blocks, seconds, 0.0, now, fine=True)
            then = seconds(after)
            if then >= now - 1e-4 * whole:
                raise Unreachable(now)
        if then <= budget:
            polished += 1
            lost = _lost(after, choices, blocks)
            if best is not None and lost >= best[0]:
                break
            best = lost, after
        state, now = after, then
    assert best is not None
    return best[1]


def _lost(state: State, choices: Sequence[Choice], blocks: Mapping[str, float]) -> float:
    kept = sum(c.lost[state.widths[c.name]] for c in choices if c.block not in state.dropped)
    return kept + sum(blocks[block] for block in state.dropped)


def _move(
    state: State,
    choices: Sequence[Choice],
    blocks: Mapping[str, float],
    seconds: Callable[[State], float],
    target: float,
    now: float,
    fine: bool,
) -> State:
    """The best state near `state`, as far as changes add up."""
    size = max(now, target) / _BUCKETS
    total = _Front(np.zeros(1), np.zeros(1), [{}])
    inside: dict[str, _Front] = {}
    for choice in choices:
        gone = choice.block is not None and choice.block in state.dropped
        widths = [state.widths[choice.name]] if gone else _near(choice, state.widths[choice.name], fine)
        costs = [0.0 if gone else seconds(state.but(choice.name, width)) - now for width in widths]
        front = _front(
            np.array(costs), np.array([choice.lost[w] for w in widths]), [{choice.name: w} for w in widths], size
        )
        if choice.block in blocks and choice.block is not None:
            before = inside.get(choice.block)
            inside[choice.block] = front if before is None else _merge(before, front, size)
        else:
            total = _merge(total, front, size)
    for block, lost in blocks.items():
        kept = inside.get(block, _Front(np.zeros(1), np.zeros(1), [{}]))
        gone = block in state.dropped
        restored = seconds(state.having(block)) - now if gone else 0.0
        dropped = 0.0 if gone else seconds(state.without(block)) - now
        front = _front(
            np.append(kept.cost + restored, dropped),
            np.append(kept.lost, lost),
            [*kept.picks, {block: None}],
            size,
        )
        total = _merge(total, front, size)
    fits = int(np.searchsorted(total.cost, target - now, side="right")) - 1
    picks = total.picks[max(fits, 0)]
    widths_now = {**state.widths, **{name: width for name, width in picks.items() if width is not None}}
    return State(widths_now, frozenset(name for name, width in picks.items() if width is None))


def _near(choice: Choice, width: int, fine: bool) -> list[int]:
    """Widths not too far from this one: the next ones, or a few within a quarter of it."""
    widths = sorted(choice.lost)
    at = widths.index(width)
    reach = _OPTIONS // 2
    if not fine:
        near = [i for i, w in enumerate(widths) if abs(w - width) <= max(width, 64) / 4]
        reach = max(at - near[0], near[-1] - at, 1)
    low, high = max(0, at - reach), min(len(widths) - 1, at + reach)
    places = {round(place) for place in np.linspace(low, high, min(_OPTIONS, high - low + 1))}
    return [widths[place] for place in sorted(places | {at})]


def _merge(a: _Front, b: _Front, size: float) -> _Front:
    cost, lost = (a.cost[:, None] + b.cost).ravel(), (a.lost[:, None] + b.lost).ravel()
    chosen = _undominated(cost, lost, size)
    picks = [{**a.picks[i], **b.picks[j]} for i, j in (divmod(int(k), len(b.cost)) for k in chosen)]
    return _Front(cost[chosen], lost[chosen], picks)


def _front(cost: NDArray[np.float64], lost: NDArray[np.float64], picks: list[dict[str, Any]], size: float) -> _Front:
    chosen = _undominated(cost, lost, size)
    return _Front(cost[chosen], lost[chosen], [picks[int(k)] for k in chosen])


def _undominated(cost: NDArray[np.float64], lost: NDArray[np.float64], size: float) -> NDArray[np.int64]:
    """Which entries no other one betters, by rising cost; of those in one bucket the one that loses least."""
    order = np.lexsort((lost, cost))
    least = np.minimum.accumulate(lost[order])
    better = np.append(True, least[1:] < least[:-1])
    order = order[better]
    bucket = np.floor(cost[order] / size)
    last = np.append(bucket[1:] != bucket[:-1], True)
    last[0] = True  # the cheapest of all is the way out of a budget that is too small
    return order[last]
