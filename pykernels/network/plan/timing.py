"""How long a network with plans takes: its steps, what is torch's between the plans, and whole calls."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from pykernels.network.plan.planned import Planned, calls_of_plans
from pykernels.ops.plan import describe_plan, profile_plan

__all__ = ["between_seconds", "call_seconds", "step_seconds"]


def step_seconds(planned: Planned, inputs: Sequence[Any], rounds: int) -> dict[str, float]:
    """The seconds of each step of the plans, by its label: the quickest of `rounds`; what brings outputs into their
    layout under ''.

    Args:
        inputs: flat inputs of one call.
    """
    found: dict[str, float] = defaultdict(float)
    for name, (plan, given) in calls_of_plans(planned, inputs).items():
        labels = planned.labels[name]
        drivers = describe_plan(plan, planned.weights, given)["drivers"]
        times = profile_plan(plan, planned.weights, given, rounds).min(0).values.tolist()
        for driver, nanoseconds in zip(drivers, times, strict=True):
            step = driver["step"]
            found[labels[step] if step < len(labels) else ""] += 1e-9 * nanoseconds
    return dict(found)


def between_seconds(planned: Planned, inputs: Sequence[Any], rounds: int) -> float:
    """The seconds of what is torch's, between the plans: the quickest of `rounds`, call by call."""
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
        for _ in range(rounds if planned.describe(inputs).left else 0):
            watch.run(*inputs)
    return sum(least.values())


def call_seconds(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The seconds of each call: the quickest of `rounds`, in which they are called in turn."""
    least = [float("inf")] * len(calls)
    for number in range(rounds):
        for place in range(len(calls)):
            i = (place + number) % len(calls)  # nobody always runs behind the same neighbour
            calls[i]()  # not counted: it brings code and weights back into the caches
            start = time.perf_counter()
            calls[i]()
            least[i] = min(least[i], time.perf_counter() - start)
    return least
