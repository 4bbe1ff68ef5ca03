"""``torch.compile(model, backend="pykernels")``: the lowering as a Dynamo backend.

``options={"precision": "bf16"}`` computes in bfloat16. A converted PT2E model (quantize/dequantize calls in its graph)
runs in int8 whatever the precision says. Each graph that Dynamo captures is lowered at its first call, when the weights
are at hand; if a parameter is changed afterwards (``load_state_dict``, an optimizer step) it is lowered again. Graphs
that must record gradients run as they are: packed weights cannot be trained.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pykernels.surgery.capture import Captured, flat_leaves, prepare
from pykernels.surgery.lower import lower
from pykernels.surgery.report import Report

__all__ = ["pykernels"]

_OPTIONS = ("precision", "on_report")


def pykernels(
    module: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | None = None, **unknown: Any
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's, for the CPU or the CUDA device that its weights are on.

    Args:
        module: the graph; parameters and buffers are among its inputs.
        example_inputs: what Dynamo saw (not read: the graph is lowered on the inputs of the first call).
        options: ``precision``, ``"fp32"`` (default) or ``"bf16"``; ``on_report``, called with each graph's `Report`.

    Raises:
        ValueError: an unknown option or precision.
    """
    options = dict(options or {})
    extra = [*unknown, *(name for name in options if name not in _OPTIONS)]
    if extra:
        raise ValueError(f"options: {', '.join(extra)} unknown; known: {', '.join(_OPTIONS)}")
    precision = options.get("precision", "fp32")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"options: precision {precision!r} is neither fp32 nor bf16 (int8: compile a PT2E model)")
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = [_weight_path(node) for node in placeholders]
    return _Compiled(module, names, precision, options.get("on_report"))


def _weight_path(node: fx.Node) -> str | None:
    """The path of a parameter or buffer in the user's model; None for true inputs. Dynamo marks fixed addresses."""
    if "_dynamo_static_input_type" not in (node.meta.get("tensor_dict") or {}):
        return None
    argument = node.meta.get("grapharg")
    path = re.findall(r"\['([^']+)'\]", str(getattr(getattr(argument, "source", None), "name", "")))
    return ".".join(path[1:] if path[:1] in (["self"], ["fn"]) else path) or node.name


class _Compiled:
    """A graph of Dynamo's that is lowered when first called, and again when a weight changed."""

    def __init__(
        self,
        module: fx.GraphModule,
        weight_paths: list[str | None],
        precision: str,
        on_report: Callable[[Report], None] | None,
    ) -> None:
        self.module = module
        self.precision = precision
        self.on_report = on_report
        self.weights = {position: path for position, path in enumerate(weight_paths) if path is not None}
        self.inputs = [position for position, path in enumerate(weight_paths) if path is None]
        self.program: fx.GraphModule | None = None
        self.state: list[tuple[int, int]] = []

    def __call__(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            warnings.warn(
                "pykernels: gradients are recorded, so this graph runs in plain torch; call it under torch.no_grad()",
                stacklevel=2,
            )
            return self.module(*arguments)
        state = [(id(arguments[position]), _version(arguments[position])) for position in self.weights]
        if self.program is None or state != self.state:
            self.program, self.state = self.lower(arguments), state
        return self.program(*[arguments[position] for position in self.inputs])

    def lower(self, arguments: Sequence[Any]) -> fx.GraphModule:
        """Trace the graph to ATen with its weights as constants, then lower it."""
        weights = {position: arguments[position].detach() for position in self.weights}

        def run(*inputs: Any) -> Any:
            given = iter(inputs)
            values = [weights[p] if p in weights else next(given) for p in range(len(arguments))]
            return self.module(*values)

        example = [arguments[position] for position in self.inputs]
        # What is left of the context of a compilation in progress must not reach this trace.
        with torch.no_grad(), torch._guards.tracing(None):
            traced = make_fx(run, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)(*example)
            self._name_weights(traced, weights)
            module, out_spec = flat_leaves(traced)
            in_spec = pytree.tree_structure((tuple(example), {}))
            program, report = lower(prepare(Captured(module, in_spec, out_spec, example, True)), self.precision)
        if self.on_report is not None:
            self.on_report(report)
        return _with_structure(program, out_spec)

    def _name_weights(self, traced: fx.GraphModule, weights: dict[int, torch.Tensor]) -> None:
        """Note on every call that reads a weight whose it is, for names in the report."""
        paths = {weight.data_ptr(): self.weights[position] for position, weight in weights.items()}
        for node in traced.graph.nodes:
            if node.op != "get_attr" or not isinstance(getattr(traced, str(node.target), None), torch.Tensor):
                continue
            path = paths.get(getattr(traced, str(node.target)).data_ptr())
            for user in node.users if path else ():
                user.meta.setdefault("nn_module_stack", {"": (str(path).rpartition(".")[0], None)})


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _with_structure(program: fx.GraphModule, out_spec: pytree.TreeSpec) -> fx.GraphModule:
    """Dynamo reads outputs nested as the graph nests them, a flat tuple nearly always."""
    output = next(node for node in program.graph.nodes if node.op == "output")
    output.args = (pytree.tree_unflatten(list(output.args[0]), out_spec),)
    program.recompile()
    return program
