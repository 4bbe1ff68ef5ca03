"""`optimize`: a PyTorch model in, the same network on our kernels out; `load` reads what `Optimized.save` wrote."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
import zipfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pykernels.cuda import registry
from pykernels.cuda.graphs import CudaGraphs
from pykernels.graph.capture import Captured, capture, plain, prepare
from pykernels.graph.export import dynamic_batch_shapes, example_for_export
from pykernels.network.devices import device_of, follow, to_device
from pykernels.network.emit_fx import lower
from pykernels.network.report import Report, bytes_of
from pykernels.ops.dtypes import STORED

__all__ = ["Optimized", "load", "optimize"]

_PRECISIONS = ("fp32", *STORED, "int8")
_FORMAT = 1
_EXTRA = "pykernels.json"


class Optimized(nn.Module):
    """A network lowered to our kernels. Call it as the model was called; it is for inference only.

    Inputs and outputs have the dtypes, shapes and nesting of the original model's. ``report()`` tells what was done,
    ``save(path)`` writes one file that `load` reads without the model's Python code.

    It runs where its weights are: ``to(device)`` packs them again for another kind of device. On a CUDA device a call
    replays a CUDA graph, captured at the first call with inputs of these shapes, strides and dtypes (the 8 kinds used
    last are kept). Not so while gradients are recorded, inside a capture of the caller's, or in compiled code.

    Attributes:
        program: the lowered graph, from flat inputs to a flat tuple of outputs.
        dynamic: whether the batch size may differ from the example's.
        cuda_graph: whether calls on a CUDA device replay CUDA graphs; may be set.
    """

    def __init__(
        self,
        program: fx.GraphModule,
        report: Report,
        in_spec: pytree.TreeSpec,
        out_spec: pytree.TreeSpec,
        example: list[Any],
        dynamic: bool,
    ) -> None:
        super().__init__()
        self.program = program
        self.dynamic = dynamic
        self.cuda_graph = True
        self._graphs: CudaGraphs | None = None
        self._report = report
        self._in_spec = in_spec
        self._out_spec = out_spec
        self._example = [torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in example]
        # The ordinary case, tensors in and one tensor out, costs no pytree work a call.
        args, kwargs = pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
        self._flat = not kwargs and list(args) == list(range(in_spec.num_leaves))
        self._single = out_spec.is_leaf()
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer."""
        if not kwargs and self._flat:
            outputs = self._run(*args)
        else:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if spec != self._in_spec:
                raise ValueError(f"inputs are nested as {spec}, the model was optimized for {self._in_spec}")
            outputs = self._run(*leaves)
        return outputs[0] if self._single else pytree.tree_unflatten(outputs, self._out_spec)

    def _run(self, *inputs: Any) -> Any:
        if not self.cuda_graph or self._report.device == "cpu" or torch.compiler.is_compiling():
            return self.program(*inputs)
        if self._graphs is None:
            self._graphs = CudaGraphs(self.program)
        return self._graphs(*inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> Optimized:
        super()._apply(fn, recurse)
        device = follow(self.program)
        self._example = to_device(self._example, device)
        self._report = self._report.on(device)
        self._report.bytes_after = bytes_of(self.program.buffers())
        self._graphs = None
        return self

    def train(self, mode: bool = True) -> Optimized:
        """Only ``train(False)`` is possible: packed weights cannot be trained."""
        if mode:
            raise RuntimeError("an optimized network is for inference; train the original model and optimize it again")
        return super().train(False)

    def report(self) -> Report:
        """What was fused, what stayed with torch and why, and the size of the weights; printable."""
        return self._report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to one file (a ``torch.export`` archive), the same on every machine and from every device.

        What is on a CUDA device is packed again for the CPU in a copy; `load` packs it for the device that it names.
        """
        here, cpu = self.program, torch.device("cpu")
        if self._report.device != "cpu":
            here = copy.deepcopy(here).to(cpu)
            follow(here)
        args = tuple(to_device(self._example, cpu))
        shapes = dynamic_batch_shapes(args, {}) if self.dynamic else None
        with torch.no_grad():
            program = torch.export.export(here, args, dynamic_shapes=shapes, strict=False)
        extra = {
            "format": _FORMAT,
            "dynamic": self.dynamic,
            "in_spec": pytree.treespec_dumps(self._in_spec),
            "out_spec": pytree.treespec_dumps(self._out_spec),
            "report": self._report.on(cpu).to_json(),
        }
        # A file object: torch wants names to end in .pt2. Under another name at first: a failure leaves what was there.
        partial = f"{os.fspath(path)}.partial"
        try:
            with open(partial, "wb") as file:
                torch.export.save(program, file, extra_files={_EXTRA: json.dumps(extra)})
            os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)


def optimize(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | torch.Tensor,
    precision: str = "fp32",
    calibration: Iterable[Any] | None = None,
    dynamic_batch: bool = True,
    example_kwargs: dict[str, Any] | None = None,
    cuda_graph: bool = True,
) -> Optimized:
    """Rewrite a model onto our kernels: batch norm folded, activations and residual adds fused, weights packed.

    The model itself is not changed, and is exported in evaluation mode whatever its mode is. The result is where the
    model is, on the CPU or on a CUDA device; example and calibration inputs are moved there.

    Args:
        model: the network, or for int8 also a converted PT2E graph module with quantize/dequantize calls.
        example_inputs: positional inputs of one call (a lone tensor stands for a tuple of one); shapes other than the
            batch size are those the result will accept.
        precision: ``fp32`` (the dtypes that the model has); ``bf16`` or ``fp16`` (weights and activations between
            inputs and outputs of the model's dtype); or ``int8`` (8-bit weights and activations, see docs/optimize.md).
        calibration: for int8: inputs to observe the ranges of activations with, each a tensor or a tuple of positional
            inputs. Without it ranges come from synthetic inputs; the report says so, and accuracy suffers.
        dynamic_batch: accept any batch size (dimension 0). When export cannot, the report says why and the size is
            fixed.
        example_kwargs: keyword inputs of one call.
        cuda_graph: on a CUDA device, replay calls as CUDA graphs.

    Returns:
        An `Optimized` module that is called like `model`.

    Raises:
        ValueError: unknown `precision`, `calibration` given for a precision that has no use for it, or a model on
            several devices or on one that our ops do not run on.
        NotExportable: torch.export cannot capture the model; `pykernels.swap` works on any module.
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"precision: {precision!r} is none of {', '.join(_PRECISIONS)}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: an nn.Module is needed, not {type(model).__name__}")
    if calibration is not None and precision != "int8":
        raise ValueError(f"calibration: only int8 is calibrated, precision is {precision!r}")
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    kwargs = dict(example_kwargs or {})
    device = device_of(model, (args, kwargs))
    args, kwargs = to_device((args, kwargs), device)
    edges = None
    if precision == "int8" and not _quantized(model):
        edges = _sixteen_bits(model)
        captured = _quantize(model, args, kwargs, calibration, dynamic_batch, edges)
    else:
        captured = capture(model, args, kwargs, dynamic_batch)
    prepare(captured)
    program, report = lower(captured.module, precision, edges)
    if precision != "int8" or not _quantized(model):
        report.bytes_before = bytes_of((*model.parameters(), *model.buffers()))
    report.notes = [*captured.notes, *report.notes]
    result = Optimized(program, report, captured.in_spec, captured.out_spec, captured.example, captured.dynamic)
    result.cuda_graph = cuda_graph
    return result


def _quantized(model: nn.Module) -> bool:
    return isinstance(model, fx.GraphModule) and any("quantized_decomposed" in str(n.target) for n in model.graph.nodes)


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
    dynamic: bool,
    edges: torch.dtype | None,
) -> Captured:
    """Quantize with our recipe, then capture the Q/DQ graph. A model of 16-bit floats is quantized as an fp32 one."""
    from pykernels.quantization import recipes

    if kwargs:
        raise ValueError("example_kwargs: int8 takes positional inputs only")
    if edges is not None:
        model, args = copy.deepcopy(model).float(), _cast(args, torch.float32)
        calibration = None if calibration is None else (_cast(sample, torch.float32) for sample in calibration)
    converted = recipes.quantize(model, args, calibration, dynamic_batch=dynamic)
    record = converted.meta[recipes.RECORD]
    module, in_spec, out_spec = plain(converted)
    if record.dynamic:
        (args, _), _ = example_for_export(args, {})
    example = pytree.tree_leaves((args, {}))
    example = example if edges is None else _cast(example, edges)
    return Captured(module, in_spec, out_spec, example, record.dynamic, list(record.notes))


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Optimized:
    """Read a network that `Optimized.save` wrote, onto `device`. The model's own Python code is not needed.

    Raises:
        RuntimeError: our ops do not run on `device`.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or not one of ours.
    """
    path, device = os.fspath(path), torch.device(device)
    complaint = registry.unusable(device)
    if complaint is not None:
        raise RuntimeError(f"device: {device} cannot be used: {complaint}")
    if not os.path.exists(path):
        raise FileNotFoundError(f"path: {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"path: {path} is truncated or was not written by pykernels")
    extra = {_EXTRA: ""}
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} fails its checksum")
        program = _read(path, extra)
        if not extra[_EXTRA]:
            raise ValueError("it is a torch.export archive without the part that pykernels adds")
        facts = json.loads(extra[_EXTRA])
        if facts["format"] != _FORMAT:
            raise ValueError(f"its format {facts['format']} is not {_FORMAT}: another version of pykernels wrote it")
        report = Report.from_json(facts["report"])
        in_spec, out_spec = pytree.treespec_loads(facts["in_spec"]), pytree.treespec_loads(facts["out_spec"])
        dynamic = bool(facts["dynamic"])
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"path: {path} cannot be loaded: {error}") from error
    module, _, _ = plain(program.module())
    example = pytree.tree_leaves(program.example_inputs)
    return Optimized(module, report, in_spec, out_spec, example, dynamic).to(device)


def _read(path: str, extra: dict[str, Any]) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with open(path, "rb") as file:
                return torch.export.load(file, extra_files=extra)
        except Exception as error:  # torch's reader checks little: a foreign archive fails wherever it first differs
            raise ValueError(f"torch.export cannot read it: {type(error).__name__}: {error}") from error
