"""How long a network with plans takes: its steps, and what is torch's between the plans."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pykernels.network.plan.planned import Planned, calls_of_plans
from pykernels.ops.plan import describe_plan, profile_plan

__all__ = ["between_seconds", "call_seconds", "quiet_seconds", "record_seconds", "step_seconds"]


def step_seconds(planned: Planned, inputs: Sequence[Any], rounds: int) -> dict[str, float]:
    """The seconds of each step of the plans, by its label: the quickest of `rounds`; what brings outputs into their
    layout, and what is torch's between the plans, under ''.

    Args:
        inputs: flat inputs of one call.
    """
    found: dict[str, float] = defaultdict(float)
    for name, times in record_seconds(planned, inputs, rounds).items():
        for label, seconds in zip([*planned.labels[name], ""], times, strict=True):
            found[label] += seconds
    found[""] += between_seconds(planned, inputs, rounds)
    return dict(found)


def record_seconds(planned: Planned, inputs: Sequence[Any], rounds: int) -> dict[str, list[float]]:
    """Of each plan, by its name, the seconds of its records in order, and of what brings outputs into their layout: the
    quickest of `rounds`."""
    found = {}
    for name, (plan, given) in calls_of_plans(planned, inputs).items():
        drivers = describe_plan(plan, planned.weights, given)["drivers"]
        times = profile_plan(plan, planned.weights, given, rounds)
        whole = times[(times >= 0).all(1)]  # now and then a step of microseconds is seen to end before it began
        least = (whole if len(whole) else times.clamp_min(0)).min(0).values.tolist()
        found[name] = [0.0] * (len(planned.labels[name]) + 1)
        for driver, nanoseconds in zip(drivers, least, strict=True):
            found[name][min(driver["step"], len(found[name]) - 1)] += 1e-9 * nanoseconds
    return found


def between_seconds(planned: Planned, inputs: Sequence[Any], rounds: int) -> float:
    """The seconds of what is torch's, between the plans: the quickest of `rounds`, call by call."""
    return sum(call_seconds(planned, inputs, rounds if planned.describe(inputs).left else 0).values())


def call_seconds(planned: Planned, inputs: Sequence[Any], rounds: int) -> dict[fx.Node, float]:
    """The seconds of each call that is not a plan's: the quickest of `rounds`."""
    least: dict[fx.Node, float] = {}

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            start = time.perf_counter()
            result = super().run_node(node)
            taken = time.perf_counter() - start
            if node.op == "call_function" and node.target is not torch.ops.pykernels.run_plan.default:
                least[node] = min(taken, least.get(node, taken))
            return result

    watch = Watch(planned.program)
    with torch.no_grad():
        for _ in range(rounds):
            watch.run(*inputs)
    return least


def quiet_seconds(networks: Sequence[Planned], inputs: Sequence[Any], rounds: int, turns: int) -> list[float]:
    """Seconds of a call of each on a quiet machine: of each step the quickest of many rounds, the networks in turn.

    Whole calls would not do: others at work on the machine disturb one of tens of milliseconds nearly always, and a
    step rarely.
    """
    least: list[dict[str, float]] = [{} for _ in networks]
    for _ in range(turns):
        for planned, known in zip(networks, least, strict=True):
            for label, seconds in step_seconds(planned, inputs, rounds).items():
                known[label] = min(seconds, known.get(label, seconds))
    return [sum(known.values()) for known in least]
