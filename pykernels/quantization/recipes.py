"""From a model to a graph with quantize/dequantize nodes, in one call: after training, or with training.

>>> quantized = quantize(model, (x,), calibration=batches)         # post-training
>>> prepared = prepare_qat(model, (x,)); train(prepared); quantized = convert_qat(prepared)

Both return a ``torch.fx.GraphModule`` of ATen and ``quantized_decomposed`` calls. Run as it is, it simulates in fp32
what the int8 kernels compute; ``pykernels.optimize`` lowers it to them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from pykernels.graph.alias import writes
from pykernels.graph.capture import Captured, capture, with_pytree
from pykernels.graph.fold import fold_batch_norms, separate_batch_norms
from pykernels.graph.nodes import attribute
from pykernels.network.step import Step

from .equalize import equalize
from .quantizer import Int8Quantizer
from .refine import Progress, float_weights
from .refine import refine as refine_weights

RECORD = "pykernels_quantization"


@dataclass
class QuantizationRecord:
    """What a recipe did, kept in ``graph_module.meta["pykernels_quantization"]`` for reports.

    Attributes:
        method: "post-training" or "quantization-aware training".
        samples: how many calibration samples (rows of the first input) were seen; 0 for training.
        data_free: True when no calibration data was given and ranges come from generated inputs.
        groups: how many kernel calls run in int8 (convolutions and linears with what is fused to them).
        dynamic: whether the graph takes other sizes (of the batch, mostly) than the example's.
        left_float: nodes that stay fp32, by name, with the reason.
        equalized: layers whose channels were scaled to share 8 bits better, by name.
        refined: layers whose rounding and bias were fitted to the calibration inputs.
        in_parts: of these, layers too large to be fitted as a whole, with the number of parts.
        unrefined: layers whose bias alone was fitted, by name, with the reason.
        notes: what a user should know, one sentence each.
    """

    method: str
    samples: int = 0
    data_free: bool = False
    groups: int = 0
    dynamic: bool = False
    left_float: dict[str, str] = field(default_factory=dict)
    equalized: list[str] = field(default_factory=list)
    refined: list[str] = field(default_factory=list)
    in_parts: dict[str, int] = field(default_factory=dict)
    unrefined: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def all_notes(self) -> list[str]:
        """The notes, and why layers were not refined."""
        return [*self.notes, *(f"{name}: {why}" for name, why in self.unrefined.items())]


def export_graph(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    training: bool = False,
) -> GraphModule:
    """Capture ``model`` as a graph of ATen calls.

    Args:
        model: a module, captured in evaluation (or ``training``) whatever its mode is, or its ``ExportedProgram``.
        example_inputs: a tuple of inputs; a lone tensor stands for a tuple of one.
        dynamic_batch: leave the batch size free. Where the model fixes it, so does the graph, with a warning.
        dynamic_shapes: as for ``torch.export``, in place of the batch size alone.

    Raises:
        ValueError: ``example_inputs`` holds no tensor.
        NotExportable: ``torch.export`` cannot capture the model.
    """
    found = capture_noting(
        model, example_inputs, {}, QuantizationRecord(""), dynamic_batch, dynamic_shapes, training=training
    )
    return with_pytree(found.module, found.in_spec, found.out_spec)


def capture_noting(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    example_kwargs: Mapping[str, Any],
    record: QuantizationRecord,
    dynamic_batch: bool,
    dynamic_shapes: Any,
    *,
    training: bool = False,
) -> Captured:
    """The model as a plain graph; what became of the batch size goes into ``record``, and is a warning."""
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves((inputs, dict(example_kwargs)))):
        raise ValueError("example_inputs: expected a tuple holding at least one tensor, such as (x,)")
    found = capture(
        model,
        inputs,
        dict(example_kwargs),
        dynamic_batch=dynamic_batch,
        dynamic_shapes=dynamic_shapes,
        training=training,
    )
    record.dynamic = found.dynamic
    record.notes += found.notes
    for note in found.notes:
        warnings.warn(note, UserWarning, stacklevel=3)
    return found


def quantize(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    calibration: Iterable[Any] | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    keep_float: Iterable[str] = (),
    refine: bool = True,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> GraphModule:
    """Quantize a trained fp32 model to int8 after training.

    Args:
        model: a module, or its ``ExportedProgram``. The module itself is not changed.
        example_inputs: a tuple of inputs, as for ``torch.export``; a lone tensor stands for a tuple of one.
        calibration: inputs that look like those of production, 50 to 500 samples: an iterable of tensors, or of tuples
            of which the first ``len(example_inputs)`` entries are used (so a loader of ``(image, label)`` serves as it
            is), or of dictionaries of keyword inputs; where a model takes both, of ``(args, kwargs)``. None: ranges
            come from generated inputs, with a warning; expect to lose accuracy.
        dynamic_batch: accept any batch size. Where the model fixes it, a warning and the record say why.
        dynamic_shapes: as for ``torch.export``, in place of the batch size alone.
        keep_float: names of graph nodes to leave in fp32.
        refine: choose weights and biases layer by layer to reproduce the fp32 network on the calibration inputs
            (equalization, GPTQ rounding, bias correction, see ``equalize`` and ``refine``) instead of rounding each
            weight by itself. Halves the error for a minute or so of time; skipped without calibration data.
        example_kwargs: keyword inputs of one call.
        progress: called as ``progress(stage, done, total)`` while it calibrates and refines.

    Returns:
        A graph module with quantize/dequantize nodes; ``meta["pykernels_quantization"]`` tells what was done.

    Raises:
        ValueError: ``example_inputs`` holds no tensor, ``calibration`` is empty or holds NaN or infinity.
        TypeError: an entry of ``calibration`` does not fit the inputs.
        NotExportable: ``torch.export`` cannot capture the model.
    """
    calibrated = calibrate_captured(
        model,
        example_inputs,
        example_kwargs or {},
        calibration,
        dynamic_batch=dynamic_batch,
        dynamic_shapes=dynamic_shapes,
        keep_float=keep_float,
        refine=refine,
        progress=progress,
    )
    found, _ = calibrated.finished(progress)
    return with_pytree(found.module, found.in_spec, found.out_spec)


@dataclass
class Calibrated:
    """A model with quantizers, every weight of it at the nearest 8-bit value.

    Attributes:
        captured: the graph, and how it is called.
        steps: what runs in int8; their nodes are those of the graph before the conversion, which kept the names.
        weights: the fp32 weight of each layer, by node name.
        samples: flat inputs of calls.
        state: the buffers that the graph writes, as the model had them.
        to_refine: whether weights and biases are to be fitted.
    """

    captured: Captured
    record: QuantizationRecord
    steps: list[Step]
    weights: dict[str, torch.Tensor]
    samples: list[tuple[Any, ...]]
    state: dict[str, torch.Tensor]
    to_refine: bool

    def finished(self, progress: Progress | None = None) -> tuple[Captured, QuantizationRecord]:
        """The graph with its weights fitted, where they are to be, and what was done."""
        if self.to_refine:
            self.refine(self.captured.module, progress)
        self.captured.module.meta[RECORD] = self.record
        return self.captured, self.record

    def refine(self, graph: GraphModule, progress: Progress | None = None) -> None:
        """Fit weights and biases of a graph, this one or one made of it, in place; the record tells of the last."""
        done, record = refine_weights(graph, self.weights, self.samples, progress), self.record
        record.refined, record.in_parts, record.unrefined = done.refined, done.in_parts, done.unrefined
        self.restore(graph)

    def restore(self, graph: GraphModule) -> None:
        """Put state back: calibration is no call of the user's."""
        for name, tensor in self.state.items():
            graph.get_buffer(name).copy_(tensor)


def calibrate_captured(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    example_kwargs: Mapping[str, Any],
    calibration: Iterable[Any] | None,
    *,
    dynamic_batch: bool,
    dynamic_shapes: Any = None,
    keep_float: Iterable[str] = (),
    refine: bool = True,
    progress: Progress | None = None,
) -> Calibrated:
    """A model with quantizers, its ranges observed, its weights not fitted yet; arguments are those of `quantize`."""
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    record = QuantizationRecord("post-training")
    found = capture_noting(model, inputs, example_kwargs, record, dynamic_batch, dynamic_shapes)
    graph = found.module
    leaves = pytree.tree_leaves((inputs, dict(example_kwargs)))
    device = next(t.device for t in (*graph.parameters(), *graph.buffers(), *leaves) if isinstance(t, torch.Tensor))
    if calibration is None:
        samples = _generated(leaves, record)
    else:
        samples = _samples(calibration, len(inputs), found.in_spec, record, device)
        _check_ranks(samples, leaves)
    state = _state(graph)
    to_refine = refine and not record.data_free
    if to_refine:
        fold_batch_norms(graph)
        record.equalized = equalize(graph, samples)
    else:
        separate_batch_norms(graph)
    quantizer = Int8Quantizer(keep_float=keep_float)
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for number, sample in enumerate(samples, start=1):
            prepared(*sample)
            if progress is not None:
                progress("calibrating", number, len(samples))
    weights = float_weights(prepared)
    found.module = convert_pt2e(prepared)
    record.groups, record.left_float = len(quantizer.layers), dict(quantizer.left_float)
    calibrated = Calibrated(found, record, quantizer.steps, weights, samples, state, to_refine)
    calibrated.restore(found.module)
    return calibrated


def _state(graph: GraphModule) -> dict[str, torch.Tensor]:
    """The buffers that the graph writes, as they are now."""
    written = {value for node in graph.graph.nodes for value in writes(node) if value.op == "get_attr"}
    return {str(node.target): attribute(graph, node).clone() for node in written}


def _samples(
    calibration: Iterable[Any],
    count: int,
    in_spec: pytree.TreeSpec,
    record: QuantizationRecord,
    device: torch.device,
) -> list[tuple[Any, ...]]:
    """The calibration inputs as flat inputs of the graph, on `device`."""
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration: an iterable of inputs is needed, not {type(calibration).__name__}")
    samples = []
    for position, item in enumerate(calibration):
        args, kwargs = _as_call(item, count)
        if args is None:
            raise TypeError(
                f"calibration: entry {position} is {type(item).__name__}; "
                f"expected a tensor, a tuple of {count} inputs or a dictionary of keyword inputs"
            )
        names = list(in_spec.child(1).context)
        try:
            kwargs = {name: kwargs[name] for name in names}
        except KeyError as missing:
            raise TypeError(f"calibration: entry {position} has no keyword input {missing}") from None
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        if isinstance(item, Mapping) and count:
            raise TypeError(
                f"calibration: entry {position} is a dictionary, and the example has {count} positional "
                f"input{'s' * (count != 1)}: give example_inputs as a dictionary, too, or entries as tuples"
            )
        if spec != in_spec:
            raise TypeError(f"calibration: entry {position} is nested as {spec}, the example inputs as {in_spec}")
        samples.append(tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in leaves))
        first = next((x for x in leaves if isinstance(x, torch.Tensor) and x.dim()), None)
        record.samples += 1 if first is None else first.shape[0]
    if not samples:
        raise ValueError("calibration: no inputs; give an iterable that yields some, or None")
    return samples


def _check_ranks(samples: list[tuple[Any, ...]], example: list[Any]) -> None:
    for position, sample in enumerate(samples):
        for place, (x, like) in enumerate(zip(sample, example, strict=True)):
            shapes = [list(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__ for t in (x, like)]
            if len(shapes[0]) != len(shapes[1]):
                raise TypeError(
                    f"calibration: input {place} of entry {position} is {shapes[0]}, the example's {shapes[1]}; an "
                    "entry is a batch, and calibration a list of batches or a loader"
                )


def _as_call(item: Any, count: int) -> tuple[Any, Mapping[str, Any]]:
    """Positional and keyword inputs of an entry; None for the former where it is none."""
    if isinstance(item, torch.Tensor):
        item = (item,)
    if isinstance(item, Mapping):
        return (), item
    if not isinstance(item, list | tuple):
        return None, {}
    if len(item) == 2 and isinstance(item[0], list | tuple) and isinstance(item[1], Mapping):
        return item[0][:count], item[1]
    return (item[:count], {}) if len(item) >= count else (None, {})


def _generated(inputs: list[Any], record: QuantizationRecord) -> list[tuple[Any, ...]]:
    """The example inputs, and noise with their mean and spread: coarse ranges for want of calibration data."""
    note = "no calibration data: ranges come from the example inputs and noise like them, so accuracy will suffer"
    warnings.warn(f"calibration: {note}; give 50 to 500 real inputs", UserWarning, stacklevel=3)
    record.data_free = True
    record.notes.append(note)
    generator = torch.Generator().manual_seed(0)
    samples = [tuple(inputs)]
    for _ in range(4):
        samples.append(tuple(_noise_like(x, generator) for x in inputs))
    return samples


def _noise_like(x: Any, generator: torch.Generator) -> Any:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.numel() < 2:
        return x
    noise = torch.randn(x.shape, generator=generator).to(x)
    return (noise * x.std() + x.mean()).clamp(x.min(), x.max())
