"""A lowered int8 network beside its simulation, one op at a time, each given the simulation's own integers.

In a free run one value rounded the other way is many a few layers on. Here nothing adds up: a difference belongs to the
op it is found at, and is judged by how close to a tie the exact result lies, the chain of torch calls in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pykernels.graph.capture import canonicalize, capture
from pykernels.graph.nodes import is_call
from pykernels.graph.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE
from pykernels.network import Report, assemble
from pykernels.network.emit_fx import Emitter


@dataclass(frozen=True)
class Step:
    """One 8-bit value of the lowered graph: how many numbers, how many differ, by how many steps at most, and how far
    from a tie the exact result of those is at most (0.5 is the middle between two ties)."""

    name: str
    values: int
    differing: int
    most: int
    from_tie: float


class Walk:
    """Lowers `simulated`, a converted PT2E graph, and walks through both on `x`.

    Attributes:
        steps: every 8-bit value of the lowered graph.
        answer_error: relative error of the lowered answer, computed from the simulation's last integers.
        program, report: the lowered graph, from flat inputs to a flat tuple, and its report.
    """

    def __init__(self, simulated: fx.GraphModule, x: torch.Tensor) -> None:
        captured = capture(simulated, (x,))
        source = canonicalize(captured.module, captured.example)
        network = assemble(source, "int8")
        emitter = Emitter(network)
        self.program, self.report = emitter.run(), Report.of(network)
        self.steps: list[Step] = []
        named = {node.name: node for node in source.graph.nodes}
        values = [value for step in network.live() for value in step.outputs if value.quantization is not None]
        holds = {emitter.nodes[value]: (named[value.name], value.quantization) for value in values}
        with torch.no_grad():
            recorder = _Recorder(source, garbage_collect_values=False)
            (expected,) = recorder.run(x)
            assert torch.equal(expected, simulated(x)), "what is lowered is no longer the simulation"
            (answer,) = _Guided(self.program, recorder.values, holds, self.steps).run(x)
        self.answer_error = float((answer - expected).norm() / expected.norm())


class _Recorder(fx.Interpreter):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        self.values[node] = super().run_node(node)
        return self.values[node]


class _Guided(fx.Interpreter):
    """Runs the lowered graph, compares every 8-bit value with the simulation's, and goes on with the latter."""

    def __init__(
        self, module: fx.GraphModule, expected: dict[fx.Node, Any], holds: dict[fx.Node, Any], steps: list[Step]
    ) -> None:
        super().__init__(module)
        self.expected, self.holds, self.steps = expected, holds, steps

    def run_node(self, node: fx.Node) -> Any:
        got = super().run_node(node)
        if not isinstance(got, torch.Tensor) or got.dtype not in (torch.uint8, torch.int8) or node.op == "get_attr":
            return got
        assert node in self.holds, f"{node.name} stands for no value of the simulation"
        source, parameters = self.holds[node]
        codes = self.expected[source]
        if codes.is_floating_point():  # only moved since its dequantize
            codes = torch.round(codes.double() / parameters.scale + parameters.zero_point).to(got.dtype)
        apart = (got.int() - codes.int()).abs()
        differs = apart > 0
        from_tie = 0.0
        if differs.any():
            steps = _exact(source, self.expected, {}) if is_call(source, QUANTIZE) else codes.double()
            from_tie = float((steps - steps.floor() - 0.5).abs()[differs].max())
        self.steps.append(Step(node.name, got.numel(), int(differs.sum()), int(apart.max()), from_tie))
        return torch.empty_like(got).copy_(codes)


def _exact(node: fx.Node, values: dict[fx.Node, Any], known: dict[fx.Node, Any]) -> Any:
    """What `node` computes in float64 from the integers it depends on; a quantize is not rounded."""
    if node in known:
        return known[node]
    args, kwargs = node.args, node.kwargs
    if node.op != "call_function":
        found = values[node]
        found = found.double() if isinstance(found, torch.Tensor) and found.is_floating_point() else found
    elif is_call(node, QUANTIZE):
        found = _exact(args[0], values, known) / args[1] + args[2]
    elif is_call(node, DEQUANTIZE):
        found = (values[args[0]].double() - args[2]) * args[1]
    elif is_call(node, DEQUANTIZE_CHANNEL):
        codes = values[args[0]].double()
        found = codes * values[args[1]].double().view(-1, *[1] * (codes.dim() - 1))
    else:
        args, kwargs = fx.map_arg((args, dict(kwargs)), lambda n: _exact(n, values, known))
        found = node.target(*args, **kwargs)
    known[node] = found
    return found
