"""`optimize`: a PyTorch model in, the same network on our kernels out."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pykernels import from_onnx
from pykernels.graph.capture import Captured, canonicalize, capture
from pykernels.graph.qdq import has_quantizers
from pykernels.network.assemble import assemble
from pykernels.network.buffers import consolidate
from pykernels.network.devices import device_of, to_device
from pykernels.network.emit_fx import emit_fx
from pykernels.network.plan.emit import emit_plan
from pykernels.network.report import Report, bytes_of
from pykernels.ops.dtypes import STORED
from pykernels.optimized import Optimized

__all__ = ["inputs_of_call", "optimize"]

_PRECISIONS = ("fp32", *STORED, "int8", "auto")


def optimize(
    model: nn.Module | str | os.PathLike[str],
    example_inputs: tuple[Any, ...] | torch.Tensor | Mapping[str, Any] | None = None,
    precision: str | Mapping[str, str] = "fp32",
    calibration: Iterable[Any] | None = None,
    dynamic_batch: bool = True,
    example_kwargs: Mapping[str, Any] | None = None,
    cuda_graph: bool = True,
    dynamic_shapes: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
    tune: bool = False,
    budget: Mapping[str, float] | None = None,
    validate: Callable[[Optimized], float] | None = None,
) -> Optimized:
    """Rewrite a model onto our kernels: batch norm folded, activations and residual adds fused, weights packed.

    The model itself is not changed, and is exported in evaluation mode whatever its mode is. The result is where the
    model is, on the CPU or on a CUDA device; example and calibration inputs are moved there. Buffers that a call of the
    model changes (a counter, a cache) are state of the result's own from then on; the report names them.

    Args:
        model: the network, or for int8 also a converted PT2E graph module with quantize/dequantize calls; or the path
            of an ONNX file (docs/optimize.md).
        example_inputs: positional inputs of one call (a lone tensor stands for a tuple of one), or a dictionary of
            keyword inputs; sizes other than those left free are those the result will accept. Without them an ONNX
            file's own sizes are taken.
        precision: ``fp32`` (the dtypes that the model has); ``bf16`` or ``fp16`` (weights and activations between
            inputs and outputs of the model's dtype); ``int8`` (8-bit weights and activations, see docs/optimize.md); or
            ``auto``: the quickest on this machine's CPU that holds `budget`, int8 and fp32 chosen step by step. Of a
            network that was made so, ``report().choice`` says again what was chosen: give it with the same
            `calibration` and nothing is searched for.
        calibration: for int8, auto and choices: inputs to observe the ranges of activations with, each a tensor, a
            tuple of positional inputs, a dictionary of keyword inputs, or ``(args, kwargs)``. Without it int8 takes
            ranges from synthetic inputs; the report says so, and accuracy suffers. The others need it.
        dynamic_batch: accept any batch size (dimension 0). When export cannot, the report says why and the size is
            fixed.
        example_kwargs: keyword inputs of one call.
        cuda_graph: on a CUDA device, replay calls as CUDA graphs.
        dynamic_shapes: which sizes are free, as ``torch.export.export`` takes it, in place of the batch size alone:
            ``{"input_ids": {0: Dim("batch"), 1: Dim("length")}}``. A free size must not be 1 in the example.
        progress: called as ``progress(stage, done, total)`` in the long parts: calibrating and refining int8,
            tuning.
        tune: on the CPU, time ways to cut each layer into tiles and tasks on the example (`Optimized.tune`).
        budget: for auto: what may be lost of the float network's answers to the calibration inputs. ``error``: the
            relative error ``|y - y0| / |y0|`` of all float outputs; ``agreement``: the share of answers with the same
            largest class (of the first output, dimension 1); both may be given; or ``drop``: how much lower `validate`
            may be. By default ``{"error": 0.1}``.
        validate: for a budget of ``drop``: from a network, called as the model is, to its accuracy, higher is better.

    Returns:
        An `Optimized` module that is called like `model`.

    Raises:
        ValueError: unknown `precision`, `calibration`, `budget` or `validate` given for a precision that has no use for
            it, a malformed `budget`, no `example_inputs` where they are needed, an ONNX file that is not understood or
            does not take them, ``auto`` without `calibration` or for a model that is quantized or not on the CPU,
            steps of another model, or a model on several devices or on one that our ops do not run on.
        ImportError: ``auto`` without highspy, which the extra ``compress`` installs; an ONNX file without onnx.
        OSError: an ONNX file cannot be read.
        TypeError: an entry of `calibration` does not fit the inputs.
        NotExportable: torch.export cannot capture the model; `pykernels.swap` works on any module.
    """
    by_step = precision == "auto" or isinstance(precision, Mapping)
    if not by_step and precision not in _PRECISIONS:
        raise ValueError(f"precision: {precision!r} is none of {', '.join(_PRECISIONS)}")
    if not isinstance(model, (nn.Module, str, os.PathLike)):
        raise ValueError(f"model: an nn.Module or the path of an ONNX file is needed, not {type(model).__name__}")
    if calibration is not None and not by_step and precision != "int8":
        raise ValueError(f"calibration: only int8 and auto are calibrated, precision is {precision!r}")
    if precision != "auto" and (budget is not None or validate is not None):
        name = "budget" if budget is not None else "validate"
        raise ValueError(f"{name}: only precision 'auto' has a use for it, precision is {precision!r}")
    if isinstance(model, Optimized):
        raise ValueError("model: it is optimized already: give the nn.Module that it was made of")
    model = model if isinstance(model, nn.Module) else from_onnx.load(model)
    source = from_onnx.source_of(model)
    if example_inputs is None and example_kwargs is None:
        if source is None:
            raise ValueError("example_inputs: inputs of one call are needed")
        example_inputs = from_onnx.example_of(source)
    args, kwargs = inputs_of_call(() if example_inputs is None else example_inputs, example_kwargs)
    device = device_of(model, (args, kwargs))
    args, kwargs = to_device((args, kwargs), device)
    if source is not None:
        from_onnx.check(model, source, args, kwargs, batch=dynamic_batch and dynamic_shapes is None)
        dynamic_batch = dynamic_batch and source.free_batch
    sizes: dict[str, Any] = {"dynamic_batch": dynamic_batch, "dynamic_shapes": dynamic_shapes}
    edges = _sixteen_bits(model) if (by_step or precision == "int8") and not has_quantizers(model) else None
    if isinstance(precision, Mapping):
        result = _search(model, args, kwargs, calibration, edges, sizes, (None, None), progress).follow(precision)
    elif precision == "auto":
        search = _search(model, args, kwargs, calibration, edges, sizes, (budget, validate), progress)
        result = search.run(capture(model, args, kwargs, **sizes))
    else:
        if precision == "int8" and not has_quantizers(model):
            captured = _quantize(model, args, kwargs, calibration, edges, sizes, progress)
        else:
            captured = capture(model, args, kwargs, **sizes)
        result = _lower(model, captured, precision, edges, (args, kwargs))
    result.cuda_graph = cuda_graph
    if tune and result.planned is not None:
        result.tune(tuple(pytree.tree_leaves((args, kwargs))), progress=progress)
    return result


def _lower(
    model: nn.Module, captured: Captured, precision: str, edges: torch.dtype | None, inputs: tuple[Any, Any]
) -> Optimized:
    """A captured graph on our kernels; the graph is changed.

    Args:
        model: what it was captured from.
        edges: as `assemble` takes it.
        inputs: of the example call, positional and keyword ones.
    """
    before = bytes_of((*captured.module.parameters(), *captured.module.buffers()))
    canonicalize(captured.module, captured.example)
    network = assemble(captured.module, precision, edges)
    emitted, report = emit_fx(network), Report.of(network)
    program, planned = emitted.program, None
    if network.device.type == "cpu":
        planned = emit_plan(network, emitted, consolidate(program))
    report.bytes_before = before if has_quantizers(model) else bytes_of((*model.parameters(), *model.buffers()))
    report.bytes_after = bytes_of(program.buffers())
    report.notes = list(captured.notes)
    free, leaves = _free(captured.module), pytree.tree_leaves(inputs)
    example = [(leaf.dtype, list(leaf.shape)) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    return Optimized(program, report, captured.in_spec, captured.out_spec, free, example, planned)


def inputs_of_call(example: Any, named: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a call that is given as `optimize` takes one."""
    if isinstance(example, Mapping):
        return (), {**example, **(named or {})}
    return (example,) if isinstance(example, torch.Tensor) else tuple(example), dict(named or {})


def _free(module: fx.GraphModule) -> list[list[int]]:
    """Of each input of a captured graph the dimensions whose sizes may vary."""
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    shapes = [value.shape if isinstance(value, torch.Tensor) else () for value in values]
    return [[d for d, size in enumerate(shape) if not isinstance(size, int)] for shape in shapes]


def _sixteen_bits(model: nn.Module) -> torch.dtype | None:
    """bfloat16 or float16 where all floats of the model are that, else None."""
    dtypes = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(STORED.values()) else None


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    """`tree`, every float tensor in it as `dtype`."""
    return pytree.tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, tree
    )


def _quantize(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calibration: Iterable[Any] | None,
    edges: torch.dtype | None,
    sizes: dict[str, Any],
    progress: Callable[[str, int, int], None] | None,
) -> Captured:
    """Quantize with our recipe: a graph with quantizers. A model of 16-bit floats is quantized as an fp32 one."""
    from pykernels.quantization import recipes

    model, args, kwargs, calibration = _in_fp32(model, args, kwargs, calibration, edges)
    calibrated = recipes.calibrate_captured(model, args, kwargs, calibration, **sizes, progress=progress)
    captured, record = calibrated.finished(progress)
    captured.notes = record.all_notes
    captured.example = captured.example if edges is None else _cast(captured.example, edges)
    return captured


def _in_fp32(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calibration: Iterable[Any] | None,
    edges: torch.dtype | None,
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Iterable[Any] | None]:
    """A model of 16-bit floats, `edges`, in fp32, with its inputs; any other as it is."""
    if edges is None:
        return model, args, kwargs, calibration
    args, kwargs = _cast((args, kwargs), torch.float32)
    samples = None if calibration is None else (_cast(sample, torch.float32) for sample in calibration)
    return copy.deepcopy(model).float(), args, kwargs, samples


def _search(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calibration: Iterable[Any] | None,
    edges: torch.dtype | None,
    sizes: dict[str, Any],
    budget: tuple[Any, Any],
    progress: Callable[[str, int, int], None] | None,
) -> Any:
    """What finds networks in which each step has a precision of its own; `budget` with what validates it."""
    from pykernels.precision.budget import Budget

    wanted = Budget.read(*budget)
    if calibration is None:
        raise ValueError("calibration: precision by step needs inputs like those of production")
    if has_quantizers(model):
        raise ValueError("model: it is quantized already, so there is nothing to choose; lower it with 'int8'")
    if device_of(model, (args, kwargs)).type != "cpu":
        raise ValueError("model: precisions by step are of plans, which run on the CPU; move the model there")
    from pykernels.precision.auto import Search
    from pykernels.quantization import recipes

    given = (args, kwargs)
    plain, args, kwargs, calibration = _in_fp32(model, args, kwargs, calibration, edges)
    calibrated = recipes.calibrate_captured(plain, args, kwargs, calibration, **sizes, progress=progress)
    return Search(
        calibrated,
        lower=lambda graph, precision: _lower(model, graph, precision, edges, given),
        inputs=pytree.tree_leaves(given),
        edges=edges,
        budget=wanted,
        progress=progress,
    )
