"""A network with plans in it: what it holds on to, and what its plans do, as a table."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from pykernels.ops.plan import describe_plan, profile_plan

__all__ = ["PlanReport", "PlanRow", "Planned"]

WEIGHTS = "weights"
# Addresses of weights that are gone. A finalizer can run in the middle of a trace, where no op may be called: the next
# network forgets the plans of those before it.
_released: list[int] = []


class Planned:
    """A graph with calls of `torch.ops.pykernels.run_plan` over the constants of another, the graph of ops.

    Attributes:
        program: from flat inputs to a flat tuple of outputs; its buffer ``weights`` is the memory of all constants.
        labels: of each plan, by the name of its buffer, what its steps stand for.
    """

    def __init__(self, program: fx.GraphModule, labels: dict[str, list[str]], places: Mapping[str, int]) -> None:
        self.program = program
        self.labels = labels
        self._places = dict(places)
        self._watch()

    @property
    def weights(self) -> torch.Tensor:
        """1-D uint8."""
        return self.program.get_buffer(WEIGHTS)

    def attach(self, ops: nn.Module, weights: torch.Tensor) -> bool:
        """Read other weights from now on, those of the graph of ops; whether they lie as the plans expect."""
        if places(ops, weights) != self._places:
            return False
        if weights.data_ptr() != self.weights.data_ptr():
            self.program._buffers[WEIGHTS] = weights
            self._watch()
        return True

    @classmethod
    def read(cls, program: fx.GraphModule, labels: Any, ops: nn.Module) -> Planned:
        """From the parts of a saved network.

        Raises:
            ValueError: they do not fit one another.
        """
        plans = [node.args[0] for node in program.graph.nodes if _is_plan(node)]
        names = {plan.target for plan in plans if isinstance(plan, fx.Node) and plan.op == "get_attr"}
        weights = program._buffers.get(WEIGHTS)
        if not isinstance(labels, dict) or set(labels) != names or len(names) != len(plans) or weights is None:
            raise ValueError("its plans are not those that it is said to have")
        for texts in labels.values():
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError("the labels of its plans are no texts")
        return cls(program, labels, places(ops, weights))

    def detached(self) -> Planned:
        """A copy without weights, for pickle; `attach` gives it some."""
        program = fx.GraphModule(self.program, self.program.graph)
        program._buffers = {name: tensor.clone() for name, tensor in program._buffers.items() if name != WEIGHTS}
        program._buffers[WEIGHTS] = torch.empty(0, dtype=torch.uint8)
        return Planned(program, self.labels, self._places)

    def describe(self, inputs: Sequence[Any], rounds: int = 0) -> PlanReport:
        """What the plans do with these flat inputs; with `rounds`, so many calls of each, and of all, are timed."""
        report = PlanReport(weight_bytes=self.weights.numel())
        for node in self.program.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and not _is_plan(node) and not _of_sizes(node):
                report.left.append(str(node.target))
        for name, (plan, given) in calls_of_plans(self, inputs).items():
            _describe(report, self.labels[name], plan, self.weights, given, rounds)
        if rounds:
            with torch.no_grad():
                report.call_seconds = statistics.median(self._seconds(inputs) for _ in range(rounds))
        return report

    def _seconds(self, inputs: Sequence[Any]) -> float:
        start = time.perf_counter()
        self.program(*inputs)
        return time.perf_counter() - start

    def _watch(self) -> None:
        """What was made ready is forgotten with the weights that it was made ready over."""
        while _released:
            torch.ops.pykernels._forget_plans(_released.pop())
        weakref.finalize(self.program, _released.append, self.weights.data_ptr())


def calls_of_plans(planned: Planned, inputs: Sequence[Any]) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """The plans that a call with these flat inputs runs, by the names of their buffers, and what each reads."""
    found: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    class Reader(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            if _is_plan(node):
                plan, _, given = self.fetch_args_kwargs_from_env(node)[0][:3]
                found[str(node.args[0].target)] = (plan, given)
            return super().run_node(node)

    with torch.no_grad():
        Reader(planned.program).run(*inputs)
    return found


def places(ops: nn.Module, weights: torch.Tensor) -> dict[str, int]:
    """Where the constants of a graph begin in `weights`; those elsewhere, state, are left out."""
    storage = weights.untyped_storage()._cdata
    return {
        name: buffer.storage_offset() * buffer.element_size()
        for name, buffer in ops.named_buffers(remove_duplicate=False)
        if buffer.untyped_storage()._cdata == storage
    }


@dataclass
class PlanRow:
    """What one kernel call over all threads does.

    Attributes:
        step: what it is part of: the module of the model, and the operators.
        kernel: in words.
        shape: of the step's result.
        dtype: of what it reads.
        tasks: how many pieces threads take; with `by_image`, images.
        bytes: read and written, weights included, of all images.
        operations: multiplications and additions, of products; else 0.
        by_image: each image goes through all such kernel calls on one thread before the next; they come first.
        seconds: the median of the rounds, if it was timed; with `by_image`, the part of the time of all such rows that
            threads spent on it.
    """

    step: str
    kernel: str
    shape: tuple[int, ...]
    dtype: str
    tasks: int
    bytes: int
    operations: int
    by_image: bool = False
    seconds: float | None = None

    @property
    def pieces(self) -> str:
        """What threads take."""
        return f"{self.tasks} images" if self.by_image else str(self.tasks)


@dataclass
class PlanReport:
    """The plans of a network with inputs of one kind of shape.

    Attributes:
        rows: in the order of execution.
        left: the calls between the plans that are torch's.
        plans: how many plans there are.
        isa, threads: what they were made ready for.
        arena_bytes: memory for what lies between the steps, reused by those that do not live at once; largest plan.
        least_arena_bytes: what no placement could do without.
        weight_bytes: of all constants.
        call_seconds: the median of whole calls, what is torch's between the plans included, if they were timed.
    """

    rows: list[PlanRow] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    plans: int = 0
    isa: str = ""
    threads: int = 0
    arena_bytes: int = 0
    least_arena_bytes: int = 0
    weight_bytes: int = 0
    call_seconds: float | None = None

    @property
    def seconds(self) -> float | None:
        """Of all kernels, if they were timed."""
        found = [row.seconds for row in self.rows if row.seconds is not None]
        return sum(found) if found else None

    def __str__(self) -> str:
        timed = self.seconds is not None
        head = ("step", "kernel", "shape", "MOP", "MB", "tasks", *(("us", "GOP/s", "GB/s") if timed else ()))
        table = [head, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        calls = f"{len(self.left)} call{'s' * (len(self.left) != 1)} of torch's"
        between = f", {self.plans} plan{'s' * (self.plans != 1)} with {calls} between" if self.left else ""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        lines.append(f"{len(self.rows)} kernel calls{between}; {self.isa}, {threads}")
        lines.append(
            f"weights {self.weight_bytes / 1e6:.2f} MB, between the steps {self.arena_bytes / 1e6:.2f} MB "
            f"(at least {self.least_arena_bytes / 1e6:.2f})"
        )
        if timed:
            lines.append(f"kernels {1e3 * (self.seconds or 0):.3f} ms, whole call {1e3 * (self.call_seconds or 0):.3f}")
        return "\n".join(lines)

    @staticmethod
    def _cells(row: PlanRow) -> tuple[str, ...]:
        shape = "x".join(map(str, row.shape))
        cells = (row.step, row.kernel, shape, f"{row.operations / 1e6:.1f}", f"{row.bytes / 1e6:.2f}", row.pieces)
        if row.seconds is None:
            return cells
        seconds = max(row.seconds, 1e-9)
        rate = f"{row.operations / seconds / 1e9:.0f}" if row.operations else ""
        return (*cells, f"{1e6 * row.seconds:.1f}", rate, f"{row.bytes / seconds / 1e9:.1f}")


def _describe(
    report: PlanReport,
    labels: Sequence[str],
    plan: torch.Tensor,
    weights: torch.Tensor,
    inputs: list[torch.Tensor],
    rounds: int,
) -> None:
    """Add what one plan does to the report of all."""
    found = describe_plan(plan, weights, inputs)
    times = [None] * len(found["drivers"])
    if rounds:
        profile_plan(plan, weights, inputs, 3)  # warm
        times = [1e-9 * t for t in profile_plan(plan, weights, inputs, rounds).median(0).values.tolist()]
    report.plans += 1
    report.isa, report.threads = found["isa"], found["threads"]
    report.arena_bytes = max(report.arena_bytes, found["arena_bytes"])
    report.least_arena_bytes = max(report.least_arena_bytes, found["least_arena_bytes"])
    for driver, seconds in zip(found["drivers"], times, strict=True):
        step = driver.pop("step")
        outside = step >= len(labels)  # what brings outputs into their layout
        shape = () if outside else tuple(found["values"][len(inputs) + step])
        report.rows.append(PlanRow("output" if outside else labels[step], shape=shape, seconds=seconds, **driver))


def _is_plan(node: fx.Node) -> bool:
    return node.target is torch.ops.pykernels.run_plan.default


def _of_sizes(node: fx.Node) -> bool:
    return "sym_size" in str(node.target)
