"""The search: calibrate, time, weigh, choose, check, mend; then the quickest network that holds the budget.

1. All uniform networks are made, and held against the budget on the calibration inputs.
2. Every step is timed in float and in int8, and every conversion (`timing`).
3. What int8 costs in accuracy is estimated for every step and value (`sensitivity`).
4. An integer program chooses (`choose`). Its errors are scaled by what the int8 network was measured to make of them.
   Agreement and accuracy follow from errors by no formula: for them the limit of the error is halved until it holds.
5. The chosen network is fitted to the calibration inputs, lowered, and held against the budget. While it fails, what
   makes most error for each second that it saves becomes float.
6. It is timed in turn with the uniform networks that hold the budget; the quickest is the answer.

What was chosen before can be made again (`Search.follow`): steps 1, and the network of step 5.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from pykernels.graph.capture import Captured
from pykernels.network.plan.timing import quiet_seconds
from pykernels.network.report import Chosen
from pykernels.ops.dtypes import STORED
from pykernels.quantization.recipes import Calibrated

from . import sensitivity, timing
from .budget import Budget, Kept, Reference
from .choose import StepCost, Table, ValueCost
from .mixture import Fitted, Mixture

__all__ = ["Search", "costs"]

_ROUNDS, _TURNS = 20, 3  # of the last comparison
_HALVINGS = 12  # of the error, where the budget is not about it
_LINEAR = 0.5  # relative errors above this do not add up


class Search:
    """One search.

    Args:
        calibrated: the model with quantizers.
        lower: from a graph and a precision to a network on our kernels; the graph is changed.
        inputs: flat inputs of the call that is timed.
        edges: as `assemble` takes it.
        progress: as for `pykernels.optimize`.
    """

    def __init__(
        self,
        calibrated: Calibrated,
        lower: Callable[[Captured, str], Any],
        inputs: Sequence[Any],
        edges: torch.dtype | None,
        budget: Budget,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.calibrated, self.mixture = calibrated, Mixture(calibrated)
        self.lower, self.inputs, self.edges, self.budget = lower, inputs, edges, budget
        self.progress = progress
        self.samples = [tuple(self._cast(x) for x in sample) for sample in calibrated.samples]

    def run(self, plain: Captured) -> Any:
        """The quickest network that holds the budget; `plain` is the model without quantizers."""
        networks = {name: self._lowered(plain, plain.module, name) for name in ("fp32", *STORED)}
        self.reference = Reference(networks["fp32"], self.samples, self.calibrated.captured.in_spec, self.budget)
        everything = [True] * len(self.mixture.steps)
        refined = self._refined(everything)
        fitted = self.mixture.fitted(refined)
        networks["int8"] = self._eight_bits(refined)
        kept = {name: self.reference.keeps(network) for name, network in networks.items()}
        times = timing.measure(self.mixture, self.inputs, self.edges)
        weighed = sensitivity.measure(self.mixture, fitted, self.progress)
        self.table = costs(self.mixture, times, weighed)
        scale = self._scale(everything, kept["int8"])
        own = {name: (weight, weighed.biases[name]) for name, (weight, _) in fitted.items()}
        chosen = everything if self.reference.holds(kept["int8"]) else self._first(scale, own)
        if chosen == everything and self.table.solve() != everything:  # float is quicker somewhere
            chosen = self._solve(None if self.budget.error is None else self.budget.error**2 / scale)
        if any(chosen) and not all(chosen):
            networks["mixed"], kept["mixed"], chosen = self._mended(chosen)
        assignments = {"mixed": chosen, "int8": everything}
        return self._quickest(networks, kept, assignments)

    def follow(self, precisions: Mapping[str, str]) -> Any:
        """The network in which steps have these precisions, by name: all that can run in int8, and no others.

        Raises:
            ValueError: the model has other steps, or a precision is neither ``int8`` nor ``fp32``.
        """
        names = [step.name for step in self.mixture.steps]
        for name in sorted(set(precisions) ^ set(names)):
            what = "has also" if name in names else "has no step"
            raise ValueError(f"precision: it is for another model: this one {what} {name!r}")
        wrong = {step: value for step, value in precisions.items() if value not in ("int8", "fp32")}
        if wrong:
            step, value = next(iter(wrong.items()))
            raise ValueError(f"precision: of step {step!r} it is {value!r}, neither 'int8' nor 'fp32'")
        int8 = [precisions[name] == "int8" for name in names]
        network = self._eight_bits(self._refined(int8))
        report = network.report()
        report.precision = "int8" if all(int8) else "mixed" if any(int8) else "fp32"
        report.chosen += [Chosen(s.name, s.what, s.where, precisions[s.name]) for s in self.mixture.steps]
        return network

    # --- networks ---

    def _cast(self, x: Any) -> Any:
        """A calibration input as the model takes it."""
        floats = isinstance(x, torch.Tensor) and x.is_floating_point() and self.edges is not None
        return x.to(self.edges) if floats else x

    def _refined(self, int8: Sequence[bool]) -> GraphModule:
        graph = self.mixture.graph({place for place, chosen in enumerate(int8) if chosen})
        self.calibrated.refine(graph, self.progress)
        return graph

    def _eight_bits(self, graph: GraphModule) -> Any:
        """The network of a graph with quantizers."""
        found = self.calibrated.captured
        notes, example = self.calibrated.record.all_notes, [self._cast(x) for x in found.example]
        return self._lowered(dataclasses.replace(found, notes=notes, example=example), graph, "int8")

    def _lowered(self, captured: Captured, graph: GraphModule, precision: str) -> Any:
        return self.lower(dataclasses.replace(captured, module=copy.deepcopy(graph)), precision)

    # --- choices ---

    def _scale(self, int8: Sequence[bool], kept: Kept) -> float:
        """Measured over expected squared error of the int8 network, as long as errors are small enough to add up."""
        expected = self.table.error(int8)
        return kept.error**2 / expected if max(expected**0.5, kept.error) < _LINEAR and expected else 1.0

    def _solve(self, limit: float | None) -> list[bool]:
        return self.table.solve(limit)

    def _first(self, scale: float, own: Fitted) -> list[bool]:
        """The assignment to begin with."""
        whole = self.table.error([True] * len(self.mixture.steps))
        limit = whole if self.budget.error is None else min(whole, self.budget.error**2 / scale)
        if self.budget.agreement is None and self.budget.drop is None:
            return self._solve(limit)
        low, high = 0, _HALVINGS  # the fewest halvings that hold: above `low`, at most `high`
        best = [False] * len(self.mixture.steps)
        while low < high:
            middle = (low + high) // 2
            found = self._solve(limit / 2**middle)
            graph = self.mixture.graph({place for place, chosen in enumerate(found) if chosen}, own)
            if self.reference.holds(self.reference.keeps(self._eight_bits(graph))):
                best, high = found, middle
            else:
                low = middle + 1
        return best

    def _mended(self, chosen: list[bool]) -> tuple[Any, Kept, list[bool]]:
        """The network of an assignment, or of what is left of it when it holds the budget."""
        while True:
            network = self._eight_bits(self._refined(chosen))
            kept = self.reference.keeps(network)
            if self.reference.holds(kept) or not any(chosen):
                return network, kept, chosen
            expected = self.table.error(chosen)
            part = 0.5 if self.budget.error is None else min(0.9, (self.budget.error / kept.error) ** 2)
            while any(chosen) and self.table.error(chosen) > part * expected:
                chosen = self._without_worst(chosen)

    def _without_worst(self, chosen: list[bool]) -> list[bool]:
        """The assignment without the step that makes most error for each second that it saves."""
        seconds, error = self.table.seconds(chosen), self.table.error(chosen)

        def worth(after: list[bool]) -> float:
            return (error - self.table.error(after)) / max(self.table.seconds(after) - seconds, 1e-12)

        return max((self.table.without(chosen, i) for i in range(len(chosen)) if chosen[i]), key=worth)

    def _quickest(self, networks: dict[str, Any], kept: dict[str, Kept], assignments: dict[str, list[bool]]) -> Any:
        holding = [name for name in networks if self.reference.holds(kept[name])]
        taken = dict(zip(holding, self._seconds([networks[name] for name in holding]), strict=True))
        name = min(taken, key=taken.__getitem__)
        network, report = networks[name], networks[name].report()
        report.precision = name
        int8 = assignments.get(name, [False] * len(self.mixture.steps))
        self._tell(report, name, int8, kept, taken)
        return network

    def _seconds(self, networks: Sequence[Any]) -> list[float]:
        """Of calls, the networks in turn."""
        return quiet_seconds([network.planned for network in networks], self.inputs, _ROUNDS, _TURNS)

    # --- the report ---

    def _tell(
        self, report: Any, name: str, int8: Sequence[bool], kept: Mapping[str, Kept], taken: Mapping[str, float]
    ) -> None:
        table, count = self.table, sum(int8)
        report.notes.append(f"precision auto, {self.budget}: {name}, {count} of {len(int8)} steps in int8")
        if count:
            error, seconds = table.error(int8) ** 0.5, table.seconds(int8)
            report.notes.append(f"expected: error {error:.4f}, steps and conversions {1e3 * seconds:.3f} ms")
        for other in sorted(kept, key=lambda entry: taken.get(entry, float("inf"))):
            result = f"{1e3 * taken[other]:.3f} ms a call" if other in taken else "over the budget"
            report.notes.append(f"measured, {other}: {kept[other]}, {result}")
        for place, (step, cost) in enumerate(zip(self.mixture.steps, table.steps, strict=True)):
            error = cost.error + sum(table.values[value].error for value in step.reads)
            precision = "int8" if int8[place] else "fp32" if name == "mixed" else name
            report.chosen.append(Chosen(step.name, step.what, step.where, precision, error, *cost.seconds))


def costs(mixture: Mixture, times: timing.Times, weighed: sensitivity.Sensitivity) -> Table:
    """What was timed and weighed, as the table that is chosen from."""
    steps = [
        StepCost(seconds, error, tuple(step.reads), step.writes, step.follows, step.only_bytes)
        for step, seconds, error in zip(mixture.steps, times.steps, weighed.steps, strict=True)
    ]
    values = [
        ValueCost(error, to_bytes, to_float, wider, value.float_reader, value.keeps)
        for value, error, to_bytes, to_float, wider in zip(
            mixture.values, weighed.values, times.quantize, times.dequantize, times.as_float, strict=True
        )
    ]
    return Table(steps, values)
