"""From a model to a graph with quantize/dequantize nodes, in one call: after training, or with training.

>>> quantized = quantize(model, (x,), calibration=batches)         # post-training
>>> prepared = prepare_qat(model, (x,)); train(prepared); quantized = convert_qat(prepared)

Both return a ``torch.fx.GraphModule`` of ATen and ``quantized_decomposed`` calls. Run as it is, it simulates in fp32
what the int8 kernels compute; ``pykernels.optimize`` lowers it to them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from pykernels.graph.export import export

from .quantizer import Int8Quantizer
from .refine import float_weights
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
    refined: list[str] = field(default_factory=list)
    in_parts: dict[str, int] = field(default_factory=dict)
    unrefined: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
    return captured(
        model, example_inputs, QuantizationRecord(""), dynamic_batch, dynamic_shapes, training=training, stacklevel=3
    )


def captured(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    record: QuantizationRecord,
    dynamic_batch: bool,
    dynamic_shapes: Any,
    *,
    training: bool = False,
    stacklevel: int = 3,
) -> GraphModule:
    """`export_graph`, and what became of the batch size in ``record``."""
    if isinstance(model, ExportedProgram):
        record.dynamic = bool(model.range_constraints)
        return model.module()
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not any(isinstance(x, torch.Tensor) for x in inputs):
        raise ValueError("example_inputs: expected a tuple holding at least one tensor, such as (x,)")
    exported = export(model, inputs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes, training=training)
    record.dynamic = exported.dynamic
    for note in exported.notes:
        record.notes.append(note)
        warnings.warn(note, UserWarning, stacklevel=stacklevel)
    return exported.program.module()


def quantize(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    calibration: Iterable[Any] | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    keep_float: Iterable[str] = (),
    refine: bool = True,
) -> GraphModule:
    """Quantize a trained fp32 model to int8 after training.

    Args:
        model: a module, or its ``ExportedProgram``. The module itself is not changed.
        example_inputs: a tuple of inputs, as for ``torch.export``; a lone tensor stands for a tuple of one.
        calibration: inputs that look like those of production, 50 to 500 samples: an iterable of tensors, or of tuples
            of which the first ``len(example_inputs)`` entries are used (so a loader of ``(image, label)`` serves as it
            is). None: ranges come from generated inputs, with a warning; expect to lose accuracy.
        dynamic_batch: accept any batch size. Where the model fixes it, a warning and the record say why.
        dynamic_shapes: as for ``torch.export``, in place of the batch size alone.
        keep_float: names of graph nodes to leave in fp32.
        refine: choose weights and biases layer by layer to reproduce the fp32 network on the calibration inputs
            (GPTQ rounding and bias correction, see ``refine``) instead of rounding each weight by itself. Halves the
            error for a minute or so of time; skipped without calibration data.

    Returns:
        A graph module with quantize/dequantize nodes; ``meta["pykernels_quantization"]`` tells what was done.

    Raises:
        ValueError: ``example_inputs`` holds no tensor, ``calibration`` is empty or holds NaN or infinity.
        TypeError: an entry of ``calibration`` is not a tensor or a tuple of tensors.
        NotExportable: ``torch.export`` cannot capture the model.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    record = QuantizationRecord("post-training")
    graph = captured(model, inputs, record, dynamic_batch, dynamic_shapes)
    device = next(t.device for t in (*graph.parameters(), *graph.buffers(), *inputs) if isinstance(t, torch.Tensor))
    samples = _generated(inputs, record) if calibration is None else _samples(calibration, len(inputs), record, device)
    quantizer = Int8Quantizer(keep_float=keep_float)
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for sample in samples:
            prepared(*sample)
    weights = float_weights(prepared)
    converted = convert_pt2e(prepared)
    if refine and not record.data_free:
        done = refine_weights(converted, weights, samples)
        record.refined, record.in_parts, record.unrefined = done.refined, done.in_parts, done.unrefined
    record.groups, record.left_float = len(quantizer.groups), dict(quantizer.left_float)
    converted.meta[RECORD] = record
    return converted


def _samples(
    calibration: Iterable[Any], count: int, record: QuantizationRecord, device: torch.device
) -> list[tuple[Any, ...]]:
    """The calibration inputs, on `device`."""
    samples = []
    for position, item in enumerate(calibration):
        sample = (item,) if isinstance(item, torch.Tensor) else item
        if not isinstance(sample, list | tuple) or len(sample) < count:
            raise TypeError(
                f"calibration: entry {position} is {type(item).__name__}; "
                f"expected a tensor or a tuple of {count} inputs"
            )
        samples.append(tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in sample[:count]))
        record.samples += samples[-1][0].shape[0]
    if not samples:
        raise ValueError("calibration: no inputs; give an iterable that yields some, or None")
    return samples


def _generated(inputs: tuple[Any, ...], record: QuantizationRecord) -> list[tuple[Any, ...]]:
    """The example inputs, and noise with their mean and spread: coarse ranges for want of calibration data."""
    note = "no calibration data: ranges come from the example inputs and noise like them, so accuracy will suffer"
    warnings.warn(f"calibration: {note}; give 50 to 500 real inputs", UserWarning, stacklevel=3)
    record.data_free = True
    record.notes.append(note)
    generator = torch.Generator().manual_seed(0)
    samples = [inputs]
    for _ in range(4):
        samples.append(tuple(_noise_like(x, generator) for x in inputs))
    return samples


def _noise_like(x: Any, generator: torch.Generator) -> Any:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.numel() < 2:
        return x
    noise = torch.randn(x.shape, generator=generator).to(x)
    return (noise * x.std() + x.mean()).clamp(x.min(), x.max())
