"""``torch.compile(model, backend="pykernels")``: the lowering as a Dynamo backend.

``options={"precision": "bf16"}`` or ``"fp16"`` computes in 16-bit floats. A converted PT2E model (quantize/dequantize
calls in its graph) runs in int8 whatever the precision says. Each graph that Dynamo captures is lowered at its first
call, when the weights are at hand; if a parameter is changed afterwards (``load_state_dict``, an optimizer step) it is
lowered again. Graphs that must record gradients (packed weights cannot be trained) or that write into their inputs or
into buffers run as they are. On a CUDA device ``mode="reduce-overhead"``, or ``options={"cuda_graph": True}``, replays
each graph as a CUDA graph.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pykernels.cuda.graphs import CudaGraphs
from pykernels.graph.alias import writes
from pykernels.graph.capture import Captured, canonicalize, flat_leaves, make_functional
from pykernels.network.assemble import assemble
from pykernels.network.emit_fx import emit_fx
from pykernels.network.report import Report, bytes_of
from pykernels.ops.dtypes import STORED

__all__ = ["pykernels"]

_OPTIONS = ("precision", "cuda_graph", "on_report")
_PRECISIONS = ("fp32", *STORED)
_MODES = {None: False, "default": False, "reduce-overhead": True}  # which of them asks for CUDA graphs


def pykernels(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's, for the CPU or the CUDA device that its weights are on.

    Args:
        module: the graph; parameters and buffers are among its inputs.
        example_inputs: what Dynamo saw (not read: the graph is lowered on the inputs of the first call).
        options: ``precision``, ``"fp32"`` (default), ``"bf16"`` or ``"fp16"``; ``cuda_graph``, whether calls on a CUDA
            device are replayed (default: as `mode` says); ``on_report``, called with each graph's `Report`.
        mode: torch.compile's: ``"default"``, or ``"reduce-overhead"`` for CUDA graphs. torch.compile takes a mode or
            options, not both.

    Raises:
        ValueError: an unknown option, precision or mode.
    """
    options = dict(options or {})
    extra = [*unknown, *(name for name in options if name not in _OPTIONS)]
    if extra:
        raise ValueError(f"options: {', '.join(extra)} unknown; known: {', '.join(_OPTIONS)}")
    precision = options.get("precision", "fp32")
    if precision not in _PRECISIONS:
        known = ", ".join(_PRECISIONS)
        raise ValueError(f"options: precision {precision!r} is none of {known} (int8: compile a PT2E model)")
    if mode not in _MODES:
        raise ValueError(f"mode: {mode!r} is neither default nor reduce-overhead")
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = [_weight_path(node) for node in placeholders]
    return _Compiled(module, names, precision, options.get("cuda_graph", _MODES[mode]), options.get("on_report"))


def _weight_path(node: fx.Node) -> str | None:
    """The path of a parameter or buffer in the user's model; None for true inputs. Dynamo marks fixed addresses."""
    if "_dynamo_static_input_type" not in (node.meta.get("tensor_dict") or {}):
        return None
    argument = node.meta.get("grapharg")
    path = re.findall(r"\['([^']+)'\]", str(getattr(getattr(argument, "source", None), "name", "")))
    return ".".join(path[1:] if path[:1] in (["self"], ["fn"]) else path) or node.name


KEPT = 8  # lowered programs of one graph: Dynamo shares it among the instances of a class


@dataclass(frozen=True)
class _Lowered:
    """A program, and the weights that it was made of: these tensors in these versions."""

    program: Callable[..., Any] | None  # None: the graph writes, and runs as it is
    weights: tuple[weakref.ref[torch.Tensor], ...]
    versions: tuple[int, ...]

    def of(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether these are the weights, unchanged. An id alone may have come to another tensor since."""
        return all(
            known() is weight and version == _version(weight)
            for known, weight, version in zip(self.weights, weights, self.versions, strict=True)
        )


class _Compiled:
    """A graph of Dynamo's that is lowered when first called, for each set of weights, and again when one changed."""

    def __init__(
        self,
        module: fx.GraphModule,
        weight_paths: list[str | None],
        precision: str,
        cuda_graph: bool,
        on_report: Callable[[Report], None] | None,
    ) -> None:
        self.module = module
        self.precision = precision
        self.cuda_graph = cuda_graph
        self.on_report = on_report
        self.weights = {position: path for position, path in enumerate(weight_paths) if path is not None}
        self.inputs = [position for position, path in enumerate(weight_paths) if path is None]
        self._lowered: OrderedDict[tuple[int, ...], _Lowered] = OrderedDict()  # by the ids of the weights
        self._lock = threading.Lock()
        self.plain = False  # whether the graph writes, and so stays as it is

    def __call__(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            warnings.warn(
                "pykernels: gradients are recorded, so this graph runs in plain torch; call it under torch.no_grad()",
                stacklevel=2,
            )
            return self.module(*arguments)
        if self.plain:
            return self.module(*arguments)
        weights = [arguments[position] for position in self.weights]
        key = tuple(map(id, weights))
        found = self._lowered.get(key)
        if found is None or not found.of(weights):
            found = self._lower_once(key, weights, arguments)
        if found.program is None:
            return self.module(*arguments)
        return found.program(*[arguments[position] for position in self.inputs])

    def _lower_once(self, key: tuple[int, ...], weights: Sequence[torch.Tensor], arguments: Sequence[Any]) -> _Lowered:
        """One thread lowers, the others wait for what it made."""
        with self._lock:
            found = self._lowered.get(key)
            if found is None or not found.of(weights):
                versions = tuple(map(_version, weights))
                found = _Lowered(self.lower(arguments), tuple(map(weakref.ref, weights)), versions)
                self._lowered[key] = found
                while len(self._lowered) > KEPT:
                    self._lowered.popitem(last=False)
        return found

    def lower(self, arguments: Sequence[Any]) -> Callable[..., Any] | None:
        """Trace the graph to ATen with its weights as constants, then lower it; None when it writes."""
        # Buffers may be written, and tracing runs the writes: parameters are never.
        weights = {
            position: value.detach() if isinstance(value := arguments[position], torch.nn.Parameter) else value.clone()
            for position in self.weights
        }

        written = False

        def run(*inputs: Any) -> Any:
            nonlocal written
            given = iter(inputs)
            values = [weights[p] if p in weights else next(given) for p in range(len(arguments))]
            before = [_version(x) for x in inputs if isinstance(x, torch.Tensor)]
            outputs = self.module(*values)
            written |= before != [_version(x) for x in inputs if isinstance(x, torch.Tensor)]
            return outputs

        example = [arguments[position] for position in self.inputs]
        # What is left of the context of a compilation in progress must not reach this trace.
        with torch.no_grad(), torch._guards.tracing(None):
            traced = make_fx(run, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)(*example)
            state = any(value.op == "get_attr" for node in traced.graph.nodes for value in writes(node))
            if written or state:  # what is lowered returns new values, and writes nothing
                what = "its inputs" if written else "buffers of the model"
                if self.on_report is not None:
                    note = f"runs in plain torch: it writes into {what}"
                    self.on_report(Report(precision=self.precision, notes=[note]))
                self.plain = True
                return None
            self._name_weights(traced, weights)
            module, out_spec = flat_leaves(traced)
            in_spec = pytree.tree_structure((tuple(example), {}))
            captured = Captured(module, in_spec, out_spec, example, True)
            make_functional(captured)
            network = assemble(canonicalize(captured.module, example), self.precision)
            program, report = emit_fx(network).program, Report.of(network)
            report.bytes_before = bytes_of(weights.values())
            report.bytes_after = bytes_of(program.buffers())
        if self.on_report is not None:
            self.on_report(report)
        if not self.cuda_graph:
            return _with_structure(program, out_spec)
        graphs = CudaGraphs(program)  # which runs the program itself where it is not on a CUDA device
        return lambda *inputs: pytree.tree_unflatten(list(graphs(*inputs)), out_spec)

    def _name_weights(self, traced: fx.GraphModule, weights: dict[int, torch.Tensor]) -> None:
        """Note on every call that reads a weight whose it is, for names in the report."""
        paths = {weight.data_ptr(): self.weights[position] for position, weight in weights.items()}
        for node in traced.graph.nodes:
            if node.op != "get_attr" or not isinstance(getattr(traced, str(node.target), None), torch.Tensor):
                continue
            path = paths.get(getattr(traced, str(node.target)).data_ptr())
            for user in node.users if path else ():
                user.meta.setdefault("nn_module_stack", {"": (str(path).rpartition(".")[0], "")})


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _with_structure(program: fx.GraphModule, out_spec: pytree.TreeSpec) -> fx.GraphModule:
    """Dynamo reads outputs nested as the graph nests them, a flat tuple nearly always."""
    output = next(node for node in program.graph.nodes if node.op == "output")
    output.args = (pytree.tree_unflatten(list(output.args[0]), out_spec),)
    program.recompile()
    return program
