"""A network as data: values, the steps that compute them, and what an emitter must know of each.

`match` makes steps over the calls of a canonical graph; the quantizer annotates them; `assemble` gives them values, in
floats or in 8 bits, and makes a `Network`, from which emitters and the report read. Nothing here knows ATen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from pykernels.graph.qdq import QParams

__all__ = [
    "KEEPING",
    "Attention",
    "Call",
    "Concatenation",
    "Layer",
    "Lookup",
    "Network",
    "Pool",
    "QParams",
    "Step",
    "Value",
    "Weight",
]


# Kinds whose ops take 8 bits as they are: what they yield has the scale and zero point of what they read.
KEEPING = frozenset({"max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "interleave"})


@dataclass(eq=False)
class Value:
    """What flows between steps.

    Attributes:
        name: of the node of the graph that it comes from.
        shape: sizes, those that may vary as symbolic expressions; None for what is no tensor, or unknown.
        dtype: of what is stored.
        layout: how it lies in memory where the model computes it; what a caller sees at the network's edges.
        quantization: what its 8 bits stand for; None for any other value.
        constant: the tensor, where it is known.
    """

    name: str
    shape: tuple[Any, ...] | None = None
    dtype: torch.dtype | None = None
    layout: torch.memory_format | None = None
    quantization: QParams | None = None
    constant: torch.Tensor | None = None


class Weight(NamedTuple):
    """An int8 weight with one scale an output channel."""

    values: torch.Tensor
    scale: torch.Tensor


@dataclass
class Layer:
    """A convolution or a linear layer; of a linear layer the geometry means nothing.

    Attributes:
        weight: float or s8 [O, C / groups, kh, kw], [O, C / groups, k] or [O, K].
        weight_scale: fp32 [O] of an s8 weight.
        bias: [O] or None.
        padding: left, right, top, bottom.
        key: layers of equal keys have the same weight and bias.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    bias: torch.Tensor | None
    key: Any
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass
class Pool:
    """The arguments of a pool, or of an op like it, between its input and the parameters of its 8 bits, in the order of
    the op's schema; sizes that are computed at run time are `Value`s."""

    geometry: tuple[Any, ...]


@dataclass
class Attention:
    """Whether a query sees only the keys up to its own, and what scores are multiplied by."""

    causal: bool
    scale: float


@dataclass
class Concatenation:
    """Along which dimension."""

    dim: int


@dataclass
class Lookup:
    """256 answers, of the output's 8-bit dtype; the first is that of the smallest bit pattern, 0."""

    table: torch.Tensor


@dataclass
class Call:
    """A call as the graph has it; values among the arguments are `Value`s."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Step:
    """One call of ours, or one left to torch.

    Attributes:
        kind: ``conv2d`` (also of lines), ``linear``, ``add``, ``mul``, ``cat``, ``lookup``, ``activation``, the name of
            a pool, of an upsampling or of another op, ``quantize``, ``dequantize``, ``move`` (elements, not values),
            ``cast``, ``size`` (numbers), or ``torch``.
        nodes: the calls of the graph that it stands for, in order; it is ready where the last one stands.
        operands: each value it reads, with the call among `nodes` that reads it.
        activation: the kernels' name of what is applied before the result is stored.
        residual_order: whether the last operand, a residual, is added ``before`` or ``after`` the activation; None
            without a residual.
        quantized: whether it reads 8 bits.
        out: the parameters of the 8 bits that it writes; None where it writes something else.
        reason: why it is torch's.
        where: the module of the model that it comes from.
        what: what it stands for, in words: ``conv2d + relu + quantize``.
        details: what its kind needs to know.
        inputs, outputs: its values, in the order of `operands`.
    """

    kind: str
    nodes: list[fx.Node]
    operands: list[tuple[fx.Node, fx.Node]]
    activation: str = "none"
    residual_order: str | None = None
    quantized: bool = False
    out: QParams | None = None
    reason: str = ""
    where: str = ""
    what: str = ""
    details: Layer | Pool | Concatenation | Lookup | Call | None = None
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    @property
    def anchor(self) -> fx.Node:
        """The call that a layer is named after."""
        return self.nodes[0]

    @property
    def output(self) -> fx.Node:
        """The node of the graph whose value it yields."""
        return self.nodes[-1]

    @property
    def label(self) -> str:
        """What it stands for, where: a plan names it so."""
        return ": ".join(filter(None, (self.where, self.what or self.kind)))

    @property
    def reads(self) -> list[fx.Node]:
        """The nodes of the graph whose values it reads."""
        return [value for value, _ in self.operands]

    @property
    def values(self) -> list[Value]:
        """The values that it reads, those among a call's arguments, too."""
        arguments: Any = ()
        if isinstance(self.details, Call):
            arguments = self.details.args, self.details.kwargs
        elif isinstance(self.details, Pool):
            arguments = self.details.geometry
        found = [*self.inputs, *pytree.tree_leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, Value))]
        return [leaf for leaf in found if isinstance(leaf, Value)]

    @property
    def has_effect(self) -> bool:
        """Whether it does more than to yield a result: it writes what others see, or checks something."""
        if not isinstance(self.details, Call):
            return False
        target = self.details.target
        if not isinstance(target, torch._ops.OpOverload):
            return isinstance(target, torch._ops.HigherOrderOperator)
        return target._schema.is_mutable or "_assert" in str(target)

    @property
    def op(self) -> str | None:
        """The op of ours that computes it, or None where torch does."""
        if self.kind in ("move", "cast", "size", "torch"):
            return None
        if self.kind in ("quantize", "dequantize"):
            return f"{self.kind}_per_tensor"
        if not self.quantized:
            return (
                None if self.kind in ("mul", "cat", "lookup") else {"activation": "activate"}.get(self.kind, self.kind)
            )
        if self.kind in KEEPING:
            return self.kind
        return {"linear": "int8_linear"}.get(self.kind, "q" + self.kind)


@dataclass
class Network:
    """Inputs, steps in the order of execution, outputs.

    Attributes:
        inputs: one for each flat input.
        steps: every step reads values that stand before it.
        outputs: values, and what else the model returns (numbers, None).
        precision: as `pykernels.optimize` takes it.
        device: where its constants are.
    """

    inputs: list[Value]
    steps: list[Step]
    outputs: Sequence[Any]
    precision: str
    device: torch.device

    def live(self) -> list[Step]:
        """The steps whose results somebody reads, and those that have an effect."""
        wanted = {value for value in self.outputs if isinstance(value, Value)}
        found: list[Step] = []
        for step in reversed(self.steps):
            if step.has_effect or not wanted.isdisjoint(step.outputs):
                found.append(step)
                wanted.update(step.values)
        return found[::-1]
