"""What a network takes and answers, by name; requests are checked against it before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils import _pytree as pytree

from pykernels.serve.errors import Invalid

__all__ = ["DATATYPES", "Network", "Request", "Signature", "Spec", "examples"]

# Of the Open Inference Protocol; a network with other tensors is not served.
DATATYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


class Network(Protocol):
    """What is served: an `Optimized` network, or what is called like one and says the same of itself."""

    @property
    def input_names(self) -> list[str]: ...

    @property
    def output_names(self) -> list[str]: ...

    @property
    def dynamic(self) -> bool: ...

    @property
    def example(self) -> list[tuple[torch.dtype, list[int]] | None]: ...

    @property
    def free(self) -> list[list[int]]: ...

    def nested(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Spec(NamedTuple):
    """An input or output: its name, its dtype, and its shape with -1 for sizes that are free."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def datatype(self) -> str:
        """The dtype as the Open Inference Protocol calls it."""
        return _NAMES[self.dtype]


class Request(NamedTuple):
    """A request's inputs, in the network's order.

    Attributes:
        inputs: flat inputs of one call.
        rows: how many items they hold (dimension 0); None where the batch size is not free.
        key: the sizes beside the rows: requests of one key may be put together.
    """

    inputs: tuple[torch.Tensor, ...]
    rows: int | None
    key: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Signature:
    """A network's inputs and outputs.

    Attributes:
        inputs: in the order of a call.
        outputs: flat, in the network's order.
        batched: whether dimension 0 of every input is free, and so counts items.
        ones: whether whole numbers may be 1 in every place, as well as 0.
    """

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    batched: bool
    ones: bool

    @classmethod
    def of(cls, network: Network) -> Signature:
        """Of a network; its outputs are those of a call, which is made with inputs of the example's sizes.

        Raises:
            ValueError: an input or output is no tensor of a dtype in `DATATYPES`.
        """
        inputs = []
        for name, known, free in zip(network.input_names, network.example, network.free, strict=True):
            if known is None or known[0] not in _NAMES:
                raise ValueError(f"network: input {name!r} is no tensor of a dtype that can be sent")
            shape = tuple(-1 if d in free else size for d, size in enumerate(known[1]))
            inputs.append(Spec(name, known[0], shape))
        batched = bool(inputs) and all(spec.shape[:1] == (-1,) for spec in inputs)
        answers, ones = _answers(network)
        if len({len(answer) for answer in answers}) != 1:
            raise ValueError("network: the number of its outputs varies")
        # A size of an output is free when it follows a free size of the inputs.
        small, large = answers[0], answers[-1]
        outputs = []
        for name, x, y in zip(network.output_names, small, large, strict=True):
            if not isinstance(x, torch.Tensor) or x.dtype not in _NAMES:
                raise ValueError(f"network: output {name!r} is no tensor of a dtype that can be sent")
            outputs.append(
                Spec(name, x.dtype, tuple(a if a == b else -1 for a, b in zip(x.shape, y.shape, strict=True)))
            )
        return cls(tuple(inputs), tuple(outputs), batched, ones)

    def request(self, given: Mapping[str, torch.Tensor]) -> Request:
        """Inputs by name as a request.

        Raises:
            Invalid: an input is missing, unknown, of another dtype, or of sizes that the network does not take; the
                message names it.
        """
        known = [spec.name for spec in self.inputs]
        for name in given:
            if name not in known:
                raise Invalid(f"input {name!r:.80} is unknown; the inputs are {', '.join(known)}")
        for name in known:
            if name not in given:
                raise Invalid(f"input {name!r} is missing; the inputs are {', '.join(known)}")
        inputs = tuple(given[spec.name] for spec in self.inputs)
        for spec, x in zip(self.inputs, inputs, strict=True):
            if x.dtype != spec.dtype:
                raise Invalid(f"input {spec.name!r} must be {spec.datatype}, not {_NAMES.get(x.dtype, x.dtype)}")
            fits = x.dim() == len(spec.shape) and all(
                size > 0 and wanted in (-1, size) for wanted, size in zip(spec.shape, x.shape, strict=True)
            )
            if not fits:
                raise Invalid(
                    f"input {spec.name!r} must have shape {list(spec.shape)}, -1 for any size of at least 1, "
                    f"not {list(x.shape)}"
                )
        if not self.batched:
            return Request(inputs, None, tuple(tuple(x.shape) for x in inputs))
        rows = inputs[0].shape[0]
        for spec, x in zip(self.inputs, inputs, strict=True):
            if x.shape[0] != rows:
                first = self.inputs[0].name
                raise Invalid(f"input {spec.name!r} has {x.shape[0]} rows, but {first!r} has {rows}")
        return Request(inputs, rows, tuple(tuple(x.shape[1:]) for x in inputs))


def examples(network: Network, rows: int | None = None, times: int = 1, ones: bool = True) -> tuple[torch.Tensor, ...]:
    """Random inputs of the example's sizes.

    Args:
        rows: dimension 0 of inputs where that is free; by default the example's.
        times: of other sizes that are free.
        ones: whether whole numbers are 0 or 1; else they are 0, which is a place in whatever they stand for.
    """
    found = []
    for known, free in zip(network.example, network.free, strict=True):
        assert known is not None
        dtype, sizes = known
        shape = [size * times if d and d in free else size for d, size in enumerate(sizes)]
        if rows is not None and 0 in free:
            shape[0] = rows
        whole = torch.randint(0, 2, shape) if ones else torch.zeros(shape)
        found.append((torch.randn(shape) if dtype.is_floating_point else whole).to(dtype))
    return tuple(found)


def _answers(network: Network) -> tuple[list[list[Any]], bool]:
    """Flat outputs for inputs of the example's sizes, and of larger ones where sizes are free; and `Signature.ones`."""
    first = [known[1][0] for known, free in zip(network.example, network.free, strict=True) if known and 0 in free]
    more = first[0] + 1 if first else None
    try:
        found, ones = [_call(network, examples(network))], True
    except (RuntimeError, IndexError):
        found, ones = [_call(network, examples(network, ones=False))], False
    if network.dynamic:
        try:
            found.append(_call(network, examples(network, more, 2, ones)))
        except (RuntimeError, IndexError):  # a limit of the model's, on its length say
            found.append(_call(network, examples(network, more, 1, ones)))
    return found, ones


def _call(network: Network, inputs: Sequence[torch.Tensor]) -> list[Any]:
    args, kwargs = network.nested(inputs)
    with torch.no_grad():
        return pytree.tree_leaves(network(*args, **kwargs))
