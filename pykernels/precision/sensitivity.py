"""What quantizing each step, and each value, adds to the error of the network's answer.

To first order an answer y moves by J d when a value inside moves by d, J being the derivative of y by that value. For
v of random signs, E[(v' J d)^2] = |J d|^2 (Hutchinson's estimator of a squared norm), and one backward pass gives v' J
for all values at once. d is no model: it is what the layer's int8 weights and the value's rounding really do to the
calibration samples. Samples are independent, so each of them counts as a draw of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Interpreter, Node

from pykernels.graph.nodes import argument, constant, is_call
from pykernels.quantization.refine import CONVOLUTIONS, bias_shift

from .mixture import Fitted, Mixture

__all__ = ["Sensitivity", "measure"]

_SAMPLES = 32
_AT_ONCE = 8  # samples: all values of these are held, thrice
_DRAWS = 8  # of signs, for each group of samples


@dataclass
class Sensitivity:
    """Relative squared errors of the answer.

    Attributes:
        steps: of each step's int8 weights, its bias corrected for them.
        values: of each value's rounding to 8 bits.
        biases: of each layer, corrected for what its own weights do.
    """

    steps: list[float]
    values: list[float]
    biases: dict[str, torch.Tensor]


def measure(mixture: Mixture, fitted: Fitted, progress: Callable[[str, int, int], None] | None = None) -> Sensitivity:
    """Estimate all errors from the calibration samples, spread over all of them.

    Args:
        fitted: int8 weights of each layer.

    Raises:
        ValueError: the network has no float output that depends on its inputs.
    """
    batches = _batches(mixture)
    float_graph, eight = mixture.graph(()), mixture.calibrated.captured.module
    nodes = {node.name: node for node in float_graph.graph.nodes}
    scales = {node.name: node for node in eight.graph.nodes}
    layers = [step for step in mixture.steps if step.layer]
    watched = [nodes[step.name] for step in layers] + [nodes[value.name] for value in mixture.values]
    quantizers = [scales[value.quantizer] for value in mixture.values]
    weights = {}
    for step in layers:
        dequantize = scales[step.name].args[1]
        weights[nodes[step.name]] = dequantize.target(fitted[step.name][0], *_parameters(eight, dequantize))
    shifts = _shifts(float_graph, weights, batches)
    generator = torch.Generator().manual_seed(0)
    found, whole = torch.zeros(len(watched), dtype=torch.float64), 0.0
    for number, batch in enumerate(batches):
        if progress is not None:
            progress("weighing steps", number, len(batches))
        runner = _Recorder(float_graph, set(watched))
        with torch.enable_grad():
            answers = [a for a in runner.run(*batch) if isinstance(a, torch.Tensor) and a.requires_grad]
        if not answers:
            raise ValueError("model: no float output depends on its inputs, so there is no error to keep small")
        whole += sum(float(a.detach().double().square().sum()) for a in answers)
        with torch.no_grad():
            moved = [_moved_by_weight(runner, node, weights[node], shifts[node]) for node in weights]
            for quantize, node in zip(quantizers, watched[len(layers) :], strict=True):
                value = runner.seen[node].detach()
                codes = quantize.target(value, *_parameters(eight, quantize))
                back = torch.ops.quantized_decomposed.dequantize_per_tensor.default
                moved.append(back(codes, *_parameters(eight, quantize)) - value)
        rows = answers[0].shape[0] if answers[0].dim() else 1
        for draw in range(_DRAWS):
            signs = [torch.randint(0, 2, a.shape, generator=generator).to(a) * 2 - 1 for a in answers]
            gradients = torch.autograd.grad(
                answers,
                [runner.seen[node] for node in watched],
                signs,
                retain_graph=draw + 1 < _DRAWS,
                allow_unused=True,
            )
            for place, (gradient, change) in enumerate(zip(gradients, moved, strict=True)):
                if gradient is not None:
                    terms = (gradient * change).double()
                    apart = terms.dim() > 0 and terms.shape[0] == rows
                    found[place] += (terms.reshape(rows, -1).sum(1) if apart else terms.sum()).square().sum() / _DRAWS
    errors = [float(error) / max(whole, 1e-300) for error in found]
    by_name = {step.name: error for step, error in zip(layers, errors, strict=False)}
    biases = {}
    for step in layers:
        node = nodes[step.name]
        bias = constant(float_graph, argument(node, "bias"))
        biases[step.name] = shifts[node] if bias is None else bias + shifts[node]
    return Sensitivity([by_name.get(step.name, 0.0) for step in mixture.steps], errors[len(layers) :], biases)


def _batches(mixture: Mixture) -> list[tuple[Any, ...]]:
    """Some samples from all over the data, in small groups where the batch size is free."""
    samples = mixture.calibrated.samples
    cut: list[tuple[Any, ...]] = []
    for sample in samples:
        sizes = {x.shape[0] for x in sample if isinstance(x, torch.Tensor) and x.dim()}
        if mixture.calibrated.captured.dynamic and len(sizes) == 1 and max(sizes) > _AT_ONCE:
            parts = [x.split(_AT_ONCE) for x in sample]
            cut += list(zip(*parts, strict=True))
        else:
            cut.append(sample)
    rows = [next((x.shape[0] for x in s if isinstance(x, torch.Tensor) and x.dim()), 1) for s in cut]
    count = min(len(cut), max(1, round(_SAMPLES * len(cut) / sum(rows))))
    return [cut[i * len(cut) // count] for i in range(count)]


class _Recorder(Interpreter):
    """Runs the graph and keeps some of its values, with gradients."""

    def __init__(self, module: torch.fx.GraphModule, watched: set[Node]) -> None:
        super().__init__(module)
        self.watched = watched
        self.wanted = watched | {read for node in watched for read in node.all_input_nodes}
        self.seen: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.watched and not result.requires_grad:  # an input
            result = result.detach().requires_grad_()
        if n in self.wanted:
            self.seen[n] = result
        return result


def _shifts(
    float_graph: torch.fx.GraphModule, weights: dict[Node, torch.Tensor], batches: Sequence[tuple[Any, ...]]
) -> dict[Node, torch.Tensor]:
    """What must be added to each layer's bias for what its own int8 weights do, as far as the samples tell."""
    means: dict[Node, list[torch.Tensor]] = {node: [] for node in weights}

    class Compare(Interpreter):
        def run_node(self, n: Node) -> Any:
            if n in weights:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                change = n.target(args[0], weights[n] - args[1], None, *args[3:], **kwargs)
                others = [d for d in range(change.dim()) if d not in (0, _channel(n) % change.dim())]
                means[n].append(change.mean(others) if others else change)
            return super().run_node(n)

    with torch.no_grad():
        for batch in batches:
            Compare(float_graph).run(*batch)
    shifts = {}
    for node, parts in means.items():
        mean = torch.cat(parts)
        shifts[node] = bias_shift([torch.zeros_like(mean)], [mean], -1, lambda x: x)
    return shifts


def _moved_by_weight(runner: _Recorder, node: Node, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """How a layer's result moves when its weight is int8."""
    args = [runner.seen[a] if isinstance(a, Node) else a for a in node.args]
    change = node.target(args[0], weight - args[1], None, *args[3:], **node.kwargs)
    shape = [1] * change.dim()
    shape[_channel(node)] = -1
    return change + shift.reshape(shape)


def _channel(layer: Node) -> int:
    return 1 if is_call(layer, *CONVOLUTIONS) else -1


def _parameters(module: torch.fx.GraphModule, quantize: Node) -> list[Any]:
    """The arguments of a quantize or dequantize call behind its tensor."""
    return [constant(module, a) if isinstance(a, Node) else a for a in quantize.args[1:]]
