"""The PT2E quantizer: annotates the steps of an exported graph with exactly what our int8 kernels can run.

Activations are u8, affine, per tensor; weights s8, symmetric, per output channel (-127..127); sums are s32 and the bias
stays fp32. Inside a step (a convolution or linear with its batch norm, activation and residual add) nothing is
observed. Between steps every tensor is int8, so no fp32 activation reaches memory; the network's input is quantized
once and what no int8 kernel reads (the logits) leaves its step as fp32.

The steps are those that `network.match` finds, so what is annotated is what will run. The annotation decides which
values *can* be int8 (forwards) and which *are wanted* as int8 (backwards), then annotates those that are both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

from pykernels.graph.capture import canonicalize
from pykernels.graph.nodes import arguments, facts, is_call, is_copy_of_values, is_move, name_of
from pykernels.network.match import CURVES, is_zero_pad, match
from pykernels.network.step import Step

from .observers import MSEObserver, PerChannelMSEObserver

ANNOTATION = "quantization_annotation"
LAYERS = ("conv2d", "linear")
AVERAGES = ("avg_pool2d", "adaptive_avg_pool2d")

ACTIVATION_SPEC = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=MSEObserver,
)
WEIGHT_SPEC = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-127,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
    observer_or_fake_quant_ctr=PerChannelMSEObserver,
)
QAT_ACTIVATION_SPEC = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
)
QAT_WEIGHT_SPEC = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-127,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
    observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver),
)


class Int8Quantizer(Quantizer):
    """PT2E quantizer for the int8 kernels of this package.

    Args:
        qat: annotate for ``prepare_qat_pt2e`` (fake quantization with moving-average ranges; batch norms stay and are
            fused with their convolution by torchao) instead of ``prepare_pt2e``.
        keep_float: names of graph nodes (convolutions or linears, or values) to leave in fp32.

    After ``annotate``, ``layers`` lists the convolutions and linears that will run in int8, each with what is fused to
    it, ``steps`` these and what else will, and ``left_float`` the calls on floating point data that stay outside, by
    node name, with the reason.
    """

    def __init__(self, *, qat: bool = False, keep_float: Iterable[str] = ()) -> None:
        super().__init__()
        self.qat = qat
        self.keep_float = frozenset(keep_float)
        self.activation_spec = QAT_ACTIVATION_SPEC if qat else ACTIVATION_SPEC
        self.weight_spec = QAT_WEIGHT_SPEC if qat else WEIGHT_SPEC
        self.layers: list[Step] = []
        self.steps: list[Step] = []
        self.left_float: dict[str, str] = {}

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Bring the graph to the spelling that is matched; the function stays the same."""
        return canonicalize(model, training=self.qat, channels_last=False)

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write a ``QuantizationAnnotation`` on every node that runs in int8."""
        steps = match(model, annotating=True, norms=self.qat, apart=self.keep_float)
        self.layers = [step for step in steps if step.kind in LAYERS]
        capable = self._capable(model, steps)
        wanted = self._wanted(steps, capable)
        for step in self.layers:
            self._annotate_layer(step, wanted)
        for step in steps:
            if step.kind not in LAYERS and step.output in capable:
                self._annotate_light(step, wanted)
        self.steps = [step for step in steps if ANNOTATION in step.output.meta]
        self._record_left_float(steps)
        return model

    def validate(self, model: GraphModule) -> None:
        """Refuse an annotation our kernels could not run (another quantizer's, composed with ours)."""
        for node in model.graph.nodes:
            annotation = node.meta.get(ANNOTATION)
            for spec in [] if annotation is None else [*annotation.input_qspec_map.values(), annotation.output_qspec]:
                if isinstance(spec, QuantizationSpec) and spec.dtype not in (torch.uint8, torch.int8):
                    raise ValueError(f"{node.name}: annotated as {spec.dtype}; our kernels run uint8 and int8")

    # ---- which values can be int8, and which are wanted so ----------------------------------------------------------

    def _capable(self, model: GraphModule, steps: list[Step]) -> set[Node]:
        """Values an int8 kernel can write: forwards, from the network's inputs and the layers' outputs."""
        inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
        capable = {node for node in inputs if _is_float(node) and node.name not in self.keep_float}
        for step in steps:
            if any(node.name in self.keep_float for node in step.nodes):
                continue
            if step.kind in LAYERS or (_is_light(step) and all(value in capable for value in _values(step))):
                capable.add(step.output)
        return capable

    def _wanted(self, steps: list[Step], capable: set[Node]) -> set[Node]:
        """Values some int8 kernel reads: backwards, from the inputs of layers.

        Average pooling reads int8 even when its own result is wanted as fp32 (a feature extractor's end).
        """
        wanted = {value for step in self.layers for value in step.reads}
        for step in reversed(steps):
            if step.kind in LAYERS or step.output not in capable:
                continue
            if step.output in wanted or step.kind in AVERAGES:
                wanted.update(_values(step))
        return wanted

    # ---- annotations ------------------------------------------------------------------------------------------------

    def _annotate_layer(self, step: Step, wanted: set[Node]) -> None:
        maps: dict[Node, dict[Node, QuantizationSpecBase | None]] = {node: {} for node in step.nodes}
        for value, reader in step.operands:
            maps[reader][value] = self.activation_spec
        anchor = next(node for node in step.nodes if is_call(node, "aten.conv2d", "aten.conv1d", "aten.linear"))
        values = arguments(anchor)
        maps[anchor][values["weight"]] = self.weight_spec
        if values["bias"] is not None:
            maps[anchor][values["bias"]] = None
        for node in step.nodes:
            last = node is step.output
            _set(node, maps[node], self.activation_spec if last and node in wanted else None)
        if anchor is not step.nodes[0]:  # a padding, which keeps the scale of what it pads
            pad = step.nodes[0]
            _set(pad, maps[pad], SharedQuantizationSpec((step.reads[0], pad)))
            maps[anchor][pad] = self.activation_spec

    def _annotate_light(self, step: Step, wanted: set[Node]) -> None:
        node, reads = step.anchor, dict.fromkeys(_values(step), self.activation_spec)
        if step.kind in AVERAGES and node not in wanted:
            _set(node, reads, None)
        elif step.output not in wanted:
            return
        elif step.kind == "cat":
            self._annotate_cat(step)
        elif is_call(node, "getitem"):
            split = node.args[0]
            _set(node, {}, SharedQuantizationSpec((split.args[0], split)))
        elif facts(node) is None:  # a split into pieces
            _set(node, reads, None)
        elif keeps_scale(node):
            _set(node, reads, SharedQuantizationSpec((step.reads[0], node)))
        elif step.output is not node:  # an add and the relu that its kernel computes, too
            _set(node, reads, None)
            _set(step.output, {}, self.activation_spec)
        else:
            _set(node, reads, self.activation_spec)

    def _annotate_cat(self, step: Step) -> None:
        """One scale for a concatenation and each operand that nothing else reads: joining is then a plain copy.

        An operand that others read keeps its own, finer scale, and is requantized while it is copied.
        """
        node = step.output
        maps: dict[Node, QuantizationSpecBase | None] = {}
        shared: SharedQuantizationSpec | None = None
        for value in dict.fromkeys(step.reads):  # an operand that stands there twice must not share with itself
            if not _read_only_by(value, node):
                maps[value] = self.activation_spec
            else:
                maps[value] = shared or self.activation_spec
                shared = shared or SharedQuantizationSpec((value, node))
        _set(node, maps, shared or self.activation_spec)

    # ---- the report -------------------------------------------------------------------------------------------------

    def _record_left_float(self, steps: list[Step]) -> None:
        self.left_float = {}
        for step in steps:
            for node in step.nodes:
                if ANNOTATION in node.meta or not _is_float(node):
                    continue
                if node.name in self.keep_float:
                    reason = "asked to stay fp32 (keep_float)"
                elif is_call(node, "aten.conv1d", "aten.conv2d", "aten.linear"):
                    reason = "its weight is not a constant, or its input has no batch dimension"
                elif _is_light(step):
                    reason = "no int8 kernel reads its result, or an operand is not int8"
                else:
                    reason = f"no int8 kernel for {node.target}"
                self.left_float[node.name] = reason


def keeps_scale(node: Node) -> bool:
    """Whether the output holds only values of the input, what lies between them, or exact zeros."""
    return is_copy_of_values(node) or is_zero_pad(node) or is_call(node, "aten.upsample_bilinear2d")


def _is_light(step: Step) -> bool:
    """Whether an int8 kernel reads and writes what this step computes between layers."""
    node = step.output
    if facts(node) is None:  # a split, which only its pieces read
        return is_move(node) and _is_float(step.reads[0]) and all(u.target is operator.getitem for u in node.users)
    if not _is_float(node) or not step.reads:
        return False
    if step.kind == "lookup":
        return name_of(node) in CURVES
    return step.kind in ("add", "mul", "cat", *AVERAGES) or keeps_scale(node)


def _is_float(node: Node) -> bool:
    """Whether a node carries an fp32 tensor."""
    known = facts(node)
    return known is not None and known.dtype == torch.float32


def _values(step: Step) -> list[Node]:
    """The tensors that a light step reads and yields; what tells it where to move them is none."""
    return step.reads[:1] if step.kind in ("move", "torch") else step.reads


def _set(node: Node, inputs: dict[Node, QuantizationSpecBase | None], output: QuantizationSpecBase | None) -> None:
    node.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=output, _annotated=True)


def _read_only_by(value: Node, reader: Node) -> bool:
    """True when ``reader`` alone reads ``value`` and whatever shares its scale through calls that keep it."""
    while True:
        if len(value.users) != 1 or reader not in value.users or value.op == "placeholder":
            return False
        if is_call(value, "getitem"):
            return False
        if not keeps_scale(value):
            return True
        value, reader = value.args[0], value
