"""Module surgery in place: the layers of a model become ours without a change to its forward, names or checkpoints.

A module is swapped by giving the same object the class of `pykernels.nn` that subclasses its own: parameters, buffers,
hooks, attributes and every reference to it stay. What happens in training and evaluation is told in `pykernels.nn`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pykernels.cuda import registry
from pykernels.graph.export import mode
from pykernels.network.devices import to_device
from pykernels.network.report import Fused, Left, Report, bytes_of
from pykernels.nn import conv, linear, pool
from pykernels.nn._chain import Chain, Follower, Head, Member
from pykernels.nn.adjacency import Adjacency, adjacency
from pykernels.nn.follow import ACTIVATIONS, NORMS, SHAREABLE
from pykernels.ops.dtypes import REALS, STORED

__all__ = ["swap"]

PRECISIONS = ("fp32", *STORED, "int8")
_CONVS: dict[type[nn.Module], tuple[type[Head], type[Head], type[nn.Module]]] = {
    nn.Conv1d: (conv.Conv1d, conv.Int8Conv1d, nn.BatchNorm1d),
    nn.Conv2d: (conv.Conv2d, conv.Int8Conv2d, nn.BatchNorm2d),
}
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_POOLS: dict[type[nn.Module], type[nn.Module]] = {
    cls.original: cls for cls in (pool.MaxPool2d, pool.AvgPool2d, pool.AdaptiveAvgPool2d, pool.AdaptiveMaxPool2d)
}
# What computes nothing in evaluation needs no account.
_SILENT = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Sequential,
)


def swap(
    model: nn.Module,
    precision: str = "fp32",
    calibration: Iterable[Any] | None = None,
    example_inputs: Any = None,
) -> Report:
    """Swap the layers of `model` for ours, in place.

    `nn.Conv1d`, `nn.Conv2d`, `nn.Linear` and the two-dimensional pools are swapped; batch norms and activations that
    provably follow a convolution or a linear layer, and alone read it, are computed by its kernel; so is a ReLU or
    ReLU6 that serves several layers, in each of its calls that follows one. The model stays the same `nn.Module` with
    the same `state_dict`, hooks and forward; `train()` gives torch's own layers back, `eval()` ours. A model swapped
    before is swapped anew.

    Kernels read packed copies of the weights. A weight that was assigned, changed in place, loaded, or stepped by an
    optimizer is packed again at the next call. A change behind autograd's back, ``p.data.mul_(...)`` or through a NumPy
    view, leaves no trace that a call could look for (``p._version`` and the address stay), so evaluation goes on with
    the old weights: call ``model.eval()`` after it.

    Args:
        model: any module with layers in float32, bfloat16 or float16, on the CPU or a CUDA device. It may be moved
            afterwards: weights are packed again where they are.
        precision: ``"fp32"`` keeps the dtype of the weights; ``"bf16"`` and ``"fp16"`` multiply in bfloat16 or float16
            with fp32 sums; ``"int8"`` makes linear layers int8 with scales per token and, with `calibration`,
            convolutions int8 with static scales. Between modules values keep the dtype of the weights.
        calibration: inputs of the model, each a tensor, a tuple of arguments or a dict of keyword arguments; only int8
            reads them. 100 typical samples are plenty.
        example_inputs: one such input. With it the fused model is compared with the original before `swap` returns.

    Returns:
        What was fused, what was swapped alone, and what stayed with torch and why.

    Raises:
        TypeError: `model` is no module.
        ValueError: `precision` is unknown, or calibration is empty or yields NaN.
        RuntimeError: on `example_inputs` the fused model differs from the original, because its layers are not only
            called as its forward says. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not '{precision}'")
    restore(model)
    report = Report(precision=precision, bytes_before=bytes_of((*model.parameters(), *model.buffers())))
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names.setdefault(id(module), name or type(module).__name__)
    modules = {id(module): module for module in model.modules()}
    found = adjacency(model)
    chains = _chains(modules, found)
    refused = {key: reason for key, module in modules.items() if (reason := _refusal(module))}
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    example_inputs = to_device(example_inputs, device)
    expected = None if example_inputs is None else _evaluate(model, example_inputs)
    ranges = (
        _calibrate(model, modules, refused, calibration, device)
        if precision == "int8" and calibration is not None
        else {}
    )

    plain = precision if precision in STORED else "fp32"
    heads: list[Head] = []
    for key, module in modules.items():
        if type(module) in _LAYERS and key not in refused:
            heads.append(_swap_layer(module, chains.get(key, []), found, modules, plain))
        elif type(module) in _POOLS and key not in refused:
            module.__class__ = _POOLS[type(module)]
    if expected is not None:
        _compare(model, expected, example_inputs, precision)
    if precision == "int8":
        for head in heads:
            _make_int8(head, ranges.get(id(head)))
        floats = [names[id(head)] for head in heads if isinstance(head, conv.Conv) and head.precision != "int8"]
        if floats and calibration is None:
            report.notes.append("convolutions stay fp32: int8 needs calibration inputs for their scales")
        elif floats:
            report.notes.append(f"stay fp32 because no calibration input reached them: {', '.join(floats)}")
        report.conversions = sum(isinstance(head, conv.Conv) for head in heads) - len(floats)
    for name, reason in found.opaque.items():
        report.notes.append(
            f"{name or type(model).__name__} cannot be traced, so layers that it calls itself are not fused ({reason})"
        )
    _account(report, modules, names, refused, found)
    return report.on(device)


def restore(model: nn.Module) -> None:
    """Undo `swap`: every module gets its class of `torch.nn` back."""
    for module in model.modules():
        if isinstance(module, Member | pool.Pool):
            module.__class__ = module.original
            for name in ("chain", "packed", "precision", "x_scale", "x_zero_point", "_key", "_sources"):
                module.__dict__.pop(name, None)


def _chains(modules: dict[int, nn.Module], found: Adjacency) -> dict[int, list[nn.Module]]:
    """For each layer the batch norm and the activation that follow it."""
    chains: dict[int, list[nn.Module]] = {}
    for key, module in modules.items():
        if type(module) not in _LAYERS:
            continue
        chain: list[nn.Module] = []
        last = module
        norm = _CONVS[type(module)][2] if type(module) in _CONVS else None
        while (reader := modules.get(found.reader(last) or 0)) is not None and not _refusal(reader):
            alone = found.follower(last) is not None
            if type(reader) is norm and alone and not chain and reader.running_mean is not None:
                chain.append(reader)
            elif type(reader) in (ACTIVATIONS if alone else SHAREABLE):
                if getattr(reader, "approximate", "none") == "none":
                    chain.append(reader)
                break
            else:
                break
            last = reader
        chains[key] = chain
    return chains


def _refusal(module: nn.Module) -> str | None:
    """Why a module that could be swapped by its class is not."""
    if not isinstance(module, (*_LAYERS, *_POOLS, *NORMS, *ACTIVATIONS)):
        return None
    cls = type(module)
    if not any(cls is known for known in (*_LAYERS, *_POOLS, *NORMS, *ACTIVATIONS)):
        return f"{cls.__name__} is a subclass: it may compute something else"
    if "forward" in module.__dict__:
        return "the object has a forward of its own"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode is '{module.padding_mode}'"
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
        complaint = registry.complaint(tensor.device)
        if complaint is not None:
            return f"{name} is on {tensor.device}, and {complaint}"
        if tensor.is_floating_point() and tensor.dtype not in REALS:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}; kernels take float32, bfloat16 and float16"
    return None


def _swap_layer(
    head: nn.Module, followers: list[nn.Module], found: Adjacency, modules: dict[int, nn.Module], precision: str
) -> Head:
    norm = activation = None
    shared = False
    between: set[int] = set()
    last = head
    for module in followers:
        between |= found.between(last)
        if type(module) in NORMS:
            norm = module
            module.__class__ = NORMS[type(module)]
        else:
            activation = module
            shared = found.follower(last) is None
            if not isinstance(module, Member):  # as it is when another layer computes it, too
                module.__class__ = ACTIVATIONS[type(module)]
        last = module
    head.__class__ = _CONVS[type(head)][0] if type(head) in _CONVS else linear.Linear
    assert isinstance(head, Head)
    head.join(Chain(head, norm, activation, tuple(modules[key] for key in between), shared), precision)
    return head


def _make_int8(head: Any, parameters: tuple[float, int] | None) -> None:
    if isinstance(head, conv.Conv):
        if parameters is None:
            return
        head.__class__ = _CONVS[head.original][1]
        head.x_scale, head.x_zero_point = parameters
    else:
        head.__class__ = linear.Int8Linear
    head.packed = None
    head.join(head.chain, "int8")


def _calibrate(
    model: nn.Module,
    modules: dict[int, nn.Module],
    refused: dict[int, str],
    calibration: Iterable[Any],
    device: torch.device,
) -> dict[int, tuple[float, int]]:
    """Scale and zero point (u8) of the input of every convolution that calibration reaches."""
    from pykernels.quantization.observers import MSEObserver  # needs torchao, which takes a while to import

    observers = {key: MSEObserver() for key, m in modules.items() if type(m) in _CONVS and key not in refused}
    handles = [modules[key].register_forward_pre_hook(_watch(observer)) for key, observer in observers.items()]
    samples = 0
    try:
        for sample in calibration:
            _evaluate(model, to_device(sample, device))
            samples += 1
    finally:
        for handle in handles:
            handle.remove()
    if samples == 0:
        raise ValueError("calibration must yield at least one input; an iterator may have been used up before")
    ranges: dict[int, tuple[float, int]] = {}
    for key, observer in observers.items():
        if float(observer.max_val) >= float(observer.min_val):
            scale, zero_point = observer.calculate_qparams()
            ranges[key] = (float(scale), int(zero_point))
    return ranges


def _watch(observer: Any) -> Any:
    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        observer(args[0])

    return look


def _evaluate(model: nn.Module, sample: Any) -> Any:
    with mode(model, training=False), torch.no_grad():
        if isinstance(sample, dict):
            return model(**sample)
        return model(*sample) if isinstance(sample, tuple | list) else model(sample)


def _compare(model: nn.Module, expected: Any, example_inputs: Any, precision: str) -> None:
    from torch.utils import _pytree as pytree

    actual = _evaluate(model, example_inputs)
    for ours, theirs in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if not isinstance(ours, torch.Tensor) or not ours.is_floating_point():
            continue
        rounds = precision in STORED or ours.dtype != torch.float32  # int8 is compared while its layers are still float
        tolerance, size = 0.1 if rounds else 1e-3, float(theirs.double().norm())
        error = float((ours.double() - theirs.double()).norm())
        if not error <= tolerance * max(size, 1e-12):
            restore(model)
            raise RuntimeError(
                f"example_inputs: the swapped model differs from the original by {error / max(size, 1e-12):.2g} of its "
                "norm; some code calls layers of the model otherwise than its forward does"
            )


def _account(
    report: Report, modules: dict[int, nn.Module], names: dict[int, str], refused: dict[int, str], found: Adjacency
) -> None:
    packed = 0
    computed: Counter[int] = Counter()  # calls of shared activations that a layer computes
    for module in modules.values():
        if isinstance(module, Head) and module.chain.shared:
            chain = (module, *module.chain.followers)
            computed[id(chain[-1])] += len(found.calls[id(chain[-2])])
    for key, module in modules.items():
        name = names[key]
        if isinstance(module, Head):
            chain = (module, *module.chain.followers)
            what = " + ".join(member.original.__name__ for member in chain)
            report.fused.append(Fused(_op(module), what, ", ".join(names[id(member)] for member in chain)))
            packed += _packed_bytes(module)
        elif isinstance(module, pool.Pool):
            report.fused.append(Fused(_snake(module.original), module.original.__name__, name))
        elif key in computed:
            if computed[key] < (calls := len(found.calls[key])):
                why = f"the layer before it computes it in {computed[key]} of its {calls} calls, the rest follow none"
                report.left.append(Left(module.original.__name__, name, why))
        elif isinstance(module, (Follower, *_SILENT)):
            continue
        elif key in refused:
            report.left.append(Left(type(module).__name__, name, refused[key]))
        elif type(module).__module__.startswith("torch.nn."):
            report.left.append(Left(type(module).__name__, name, _why_left(module, found)))
    report.bytes_after = packed


def _op(head: Head) -> str:
    if isinstance(head, conv.Conv):
        return "qconv2d" if head.precision == "int8" else "conv2d"
    return "int8_linear" if head.precision == "int8" else "linear"


def _why_left(module: nn.Module, found: Adjacency) -> str:
    if type(module) in NORMS or type(module) in ACTIVATIONS:
        calls = found.calls.get(id(module), [])
        if len(calls) > 1:
            return f"called in {len(calls)} places, not always after the same layer"
        if not calls and found.opaque:
            return "not proved to follow a layer: its caller cannot be traced"
        if not calls:
            return "not called in evaluation"
        return "what it reads is not the output of a layer that it alone reads"
    if any(True for _ in module.children()):
        return "a layer of torch with code of its own; the layers inside are swapped alone"
    return "no kernel for it"


def _packed_bytes(head: Head) -> int:
    """Bytes of the packed weights, also of a head that is in training and has none yet."""
    if head.packed is not None:
        return head.packed.numel()
    with torch.no_grad():
        return int(head.pack(*head.chain.folded()).numel())


def _snake(cls: type[nn.Module]) -> str:
    name = "".join("_" + letter.lower() if letter.isupper() else letter for letter in cls.__name__)
    return name.lstrip("_")
