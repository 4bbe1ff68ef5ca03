"""What each step takes in float and in int8, and what conversions between them take, on our kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from pykernels.graph.capture import canonicalize
from pykernels.graph.qdq import QParams
from pykernels.network.assemble import assemble
from pykernels.network.buffers import consolidate
from pykernels.network.emit_fx import emit_fx
from pykernels.network.plan.emit import emit_plan
from pykernels.network.plan.planned import Planned
from pykernels.network.plan.timing import between_seconds, step_seconds
from pykernels.network.step import Layer, Network, Step, Value

from .mixture import Mixture

__all__ = ["Times", "measure"]

_ROUNDS = 20
_TURNS = 3  # times that the networks are timed in turn
_SOME = QParams(0.1, 128, 0, 255, torch.uint8)  # what 8 bits stand for makes no difference to the time


@dataclass
class Times:
    """Seconds.

    Attributes:
        steps: of each step in float, and in int8.
        quantize, dequantize: of each value to 8 bits and back.
        as_float: of each value what its int8 producer takes longer to write floats.
    """

    steps: list[tuple[float, float]]
    quantize: list[float]
    dequantize: list[float]
    as_float: list[float]


def measure(mixture: Mixture, inputs: Sequence[Any], edges: torch.dtype | None) -> Times:
    """Time all steps in the float and in the int8 network, and conversions by themselves.

    Args:
        inputs: flat inputs of one call.
        edges: as `assemble` takes it.

    Raises:
        ValueError: no step of the model can be planned.
    """
    everything = range(len(mixture.steps))
    networks = [_network(mixture, mixture.graph(chosen), edges) for chosen in ((), everything)]
    alone = _alone(mixture, networks[1], inputs)
    runs = [(_planned(network), inputs) for network in networks]
    runs.append((_planned(alone), [_zeros(value) for value in alone.inputs]))
    least: list[dict[str, float]] = [{} for _ in runs]
    for _ in range(_TURNS):
        for (planned, given), known in zip(runs, least, strict=True):
            for label, seconds in step_seconds(planned, given, _ROUNDS).items():
                known[label] = min(seconds, known.get(label, seconds))
    found = []
    for (planned, given), network, known in zip(runs, networks, least, strict=False):
        times = [known.get(_label(place), 0.0) for place in everything]
        # What has no kernel of ours here is among the calls between the plans.
        labels = {step.label for step in network.live()}
        missing = [place for place in everything if _label(place) in labels - set(known)]
        between = between_seconds(planned, given, _ROUNDS) if missing else 0.0
        for place in missing:
            times[place] = between / len(missing)
        found.append(times)
    alone_times, count = least[2], len(mixture.values)
    narrow, wide = ([alone_times.get(f"{kind} {v}", 0.0) for v in range(count)] for kind in ("bytes", "floats"))
    return Times(
        list(zip(*found, strict=True)),
        [alone_times[f"quantize {v}"] for v in range(count)],
        [alone_times[f"dequantize {v}"] for v in range(count)],
        [max(0.0, b - a) for a, b in zip(narrow, wide, strict=True)],
    )


def _label(place: int) -> str:
    return f"step {place}"


def _network(mixture: Mixture, module: GraphModule, edges: torch.dtype | None) -> Network:
    """The network of a graph, its steps labelled by those of the mixture."""
    owner = {name: place for place, step in enumerate(mixture.steps) for name in step.nodes}
    network = assemble(canonicalize(module, mixture.calibrated.captured.example), "int8", edges)
    for step in network.steps:
        places = [owner[node.name] for node in step.nodes if node.name in owner]
        conversion = step.kind in ("quantize", "dequantize", "cast")
        step.where, step.what = "", _label(places[0]) if places and not conversion else "other"
    return network


def _planned(network: Network) -> Planned:
    emitted = emit_fx(network)
    planned = emit_plan(network, emitted, consolidate(emitted.program))
    if planned is None:
        raise ValueError("model: nothing of it runs on our kernels, so there is nothing to choose")
    return planned


def _alone(mixture: Mixture, int8: Network, inputs: Sequence[Any]) -> Network:
    """A network of conversions, of every value, and of the layers that write some, in 8 bits and in floats."""
    import sympy

    sizes: dict[Any, int] = {}
    for given, x in zip(int8.inputs, inputs, strict=True):
        sizes.update(zip(given.shape or (), x.shape if isinstance(x, torch.Tensor) else (), strict=True))

    def known(value: Value, name: str, quantization: QParams | None) -> Value:
        """A value of the example's sizes, from nowhere."""
        shape = tuple(int(sympy.sympify(size).subs(sizes)) for size in value.shape or ())
        dtype = torch.float32 if quantization is None else quantization.dtype
        return Value(name, shape, dtype, value.layout, quantization)

    made: dict[str, Value] = {}
    layers: dict[int, Step] = {}
    nodes = {node.name: node for node in mixture.calibrated.captured.module.graph.nodes}
    placeholders = [name for name, node in nodes.items() if node.op == "placeholder"]
    made.update(zip(placeholders, int8.inputs, strict=True))
    for step in int8.steps:
        made.update((node.name, step.outputs[0]) for node in step.nodes if step.outputs)
        if isinstance(step.details, Layer) and step.out is not None and step.what.startswith("step "):
            place = mixture.steps[int(step.what.removeprefix("step "))].writes
            if place is not None:
                layers[place] = step
    sources: list[Value] = []
    steps: list[Step] = []

    def add(step: Step, what: str, reads: list[Value], out: QParams | None, result: Value) -> None:
        made = known(result, f"y{len(steps)}", out)
        steps.append(dataclasses.replace(step, where="", what=what, inputs=reads, outputs=[made], out=out))
        sources.extend(reads)

    for place, value in enumerate(mixture.values):
        base, node = made[value.name], nodes[value.name]
        for kind, before, after in (("quantize", None, _SOME), ("dequantize", _SOME, None)):
            if not steps:  # the first step of a plan wakes the threads: it is not counted
                add(Step(kind, [node], []), "first", [known(base, "first", before)], after, base)
            add(Step(kind, [node], []), f"{kind} {place}", [known(base, f"{kind}{place}", before)], after, base)
    for place, step in layers.items():
        for kind, out in (("bytes", step.out), ("floats", None)):
            reads = [known(x, f"{kind}{place}_{i}", x.quantization) for i, x in enumerate(step.inputs)]
            add(step, f"{kind} {place}", reads, out, step.outputs[0])
    return Network(sources, steps, [step.outputs[0] for step in steps], "int8", int8.device)


def _zeros(value: Value) -> torch.Tensor:
    shape = [int(size) for size in value.shape or ()]
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.zeros(shape, dtype=value.dtype).to(memory_format=layout)
