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
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

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
        left_float: nodes that stay fp32, by name, with the reason.
        refined: layers whose rounding and bias were fitted to the calibration inputs.
        notes: what a user should know, one sentence each.
    """

    method: str
    samples: int = 0
    data_free: bool = False
    groups: int = 0
    left_float: dict[str, str] = field(default_factory=dict)
    refined: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_graph(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    *,
    dynamic_shapes: Any = None,
    training: bool = False,
) -> GraphModule:
    """Capture ``model`` as a graph of ATen calls.

    With ``dynamic_shapes=None`` the first dimension of every tensor input is exported as one dynamic batch when the
    model allows it, and as it stands in ``example_inputs`` when it does not. Strict capture is the second choice, for
    models that the plain one cannot trace.

    Raises:
        ValueError: ``example_inputs`` holds no tensor.
        Exception: what ``torch.export`` raises when every way of capturing failed.
    """
    if isinstance(model, ExportedProgram):
        return model.module()
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not any(isinstance(x, torch.Tensor) for x in inputs):
        raise ValueError("example_inputs: expected a tuple holding at least one tensor, such as (x,)")
    attempts: list[tuple[tuple[Any, ...], Any]] = []
    if dynamic_shapes is not None:
        attempts.append((inputs, dynamic_shapes))
    else:
        batch = Dim("batch")
        tensors = [isinstance(x, torch.Tensor) and x.ndim > 1 for x in inputs]
        if len({x.shape[0] for x, tensor in zip(inputs, tensors, strict=True) if tensor}) == 1:
            # A batch of one would be taken for a constant.
            widened = tuple(
                torch.cat([x, x]) if tensor and x.shape[0] == 1 else x
                for x, tensor in zip(inputs, tensors, strict=True)
            )
            attempts.append((widened, tuple({0: batch} if tensor else None for tensor in tensors)))
        attempts.append((inputs, None))
    was_training = model.training
    model.train(training)
    failure: Exception | None = None
    try:
        for arguments, shapes in attempts:
            for strict in (False, True):
                try:
                    exported = export(model, arguments, dynamic_shapes=shapes, strict=strict)
                except Exception as error:  # torch.export fails in many ways; the last one is reported
                    failure = error
                else:
                    return exported.module()
    finally:
        model.train(was_training)
    assert failure is not None
    raise failure


def quantize(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | torch.Tensor,
    calibration: Iterable[Any] | None = None,
    *,
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
        dynamic_shapes: as for ``torch.export``; None exports a dynamic batch when the model allows one.
        keep_float: names of graph nodes to leave in fp32.
        refine: choose weights and biases layer by layer to reproduce the fp32 network on the calibration inputs
            (GPTQ rounding and bias correction, see ``refine``) instead of rounding each weight by itself. Halves the
            error for a minute or so of time; skipped without calibration data.

    Returns:
        A graph module with quantize/dequantize nodes; ``meta["pykernels_quantization"]`` tells what was done.

    Raises:
        ValueError: ``example_inputs`` holds no tensor, ``calibration`` is empty or holds NaN or infinity.
        TypeError: an entry of ``calibration`` is not a tensor or a tuple of tensors.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    record = QuantizationRecord("post-training")
    graph = export_graph(model, inputs, dynamic_shapes=dynamic_shapes)
    samples = _generated(inputs, record) if calibration is None else _samples(calibration, len(inputs), record)
    quantizer = Int8Quantizer(keep_float=keep_float)
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for sample in samples:
            prepared(*sample)
    weights = float_weights(prepared)
    converted = convert_pt2e(prepared)
    if refine and not record.data_free:
        record.refined = refine_weights(converted, weights, samples)
    record.groups, record.left_float = len(quantizer.groups), dict(quantizer.left_float)
    converted.meta[RECORD] = record
    return converted


def _samples(calibration: Iterable[Any], count: int, record: QuantizationRecord) -> list[tuple[Any, ...]]:
    samples = []
    for position, item in enumerate(calibration):
        sample = (item,) if isinstance(item, torch.Tensor) else item
        if not isinstance(sample, list | tuple) or len(sample) < count:
            raise TypeError(
                f"calibration: entry {position} is {type(item).__name__}; "
                f"expected a tensor or a tuple of {count} inputs"
            )
        samples.append(tuple(sample[:count]))
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
