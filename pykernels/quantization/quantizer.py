"""The PT2E quantizer: annotates an exported graph with exactly what our int8 kernels can run.

Activations are u8, affine, per tensor; weights s8, symmetric, per output channel (-127..127); sums are s32 and the bias
stays fp32. A *group* is what one kernel call computes: a convolution or linear with its batch norm, activation and
residual add; nothing inside a group is observed. Between groups every tensor is int8, so no fp32 activation reaches
memory; the network's input is quantized once and what no int8 kernel reads (the logits) leaves its group as fp32.

The annotation takes three passes over the graph: *group* calls, decide which values *can* be int8 (forwards) and which
*are wanted* as int8 (backwards), then annotate those that are both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

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

from .observers import MSEObserver, PerChannelMSEObserver
from .patterns import (
    BATCH_NORMS,
    CONVOLUTIONS,
    ELEMENTWISE,
    HEAVY,
    SPLITS,
    aten,
    fusable_activation,
    is_average,
    is_call,
    is_channel_gate,
    is_float_tensor,
    is_pass_through,
    same_shape,
    shape_of,
)
from .transforms import prepare_graph

ANNOTATION = "quantization_annotation"
ADDS = frozenset({aten.add.Tensor})
MULS = frozenset({aten.mul.Tensor})
CATS = frozenset({aten.cat.default})
RELUS = ("relu", "relu6")

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


@dataclass
class Group:
    """One kernel call: its nodes in order, the values it reads as int8, and the node whose value it writes."""

    anchor: Node
    nodes: list[Node]
    inputs: list[tuple[Node, Node]] = field(default_factory=list)  # (value, the node of the group that reads it)
    weight: Node | None = None

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    @property
    def heavy(self) -> bool:
        return self.weight is not None


class Int8Quantizer(Quantizer):
    """PT2E quantizer for the int8 kernels of this package.

    Args:
        qat: annotate for ``prepare_qat_pt2e`` (fake quantization with moving-average ranges; batch norms stay and are
            fused with their convolution by torchao) instead of ``prepare_pt2e``.
        keep_float: names of graph nodes (convolutions or linears, or values) to leave in fp32.

    After ``annotate``, ``groups`` lists what each kernel call will compute and ``left_float`` the calls on floating
    point data that stay outside, by node name, with the reason.
    """

    def __init__(self, *, qat: bool = False, keep_float: Iterable[str] = ()) -> None:
        super().__init__()
        self.qat = qat
        self.keep_float = frozenset(keep_float)
        self.activation_spec = QAT_ACTIVATION_SPEC if qat else ACTIVATION_SPEC
        self.weight_spec = QAT_WEIGHT_SPEC if qat else WEIGHT_SPEC
        self.groups: list[Group] = []
        self.left_float: dict[str, str] = {}

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Rewrite the graph (see ``transforms``) so that more of it can be int8; the function stays the same."""
        return prepare_graph(model, training=self.qat)

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write a ``QuantizationAnnotation`` on every node that runs in int8."""
        self.groups = self._group(model)
        of_output = {group.output: group for group in self.groups}
        capable = self._capable(model, of_output)
        wanted = self._wanted(model, of_output, capable)
        for group in self.groups:
            self._annotate_group(group, wanted)
        self._annotate_light(model, of_output, capable, wanted)
        self._record_left_float(model)
        return model

    def validate(self, model: GraphModule) -> None:
        """Refuse an annotation our kernels could not run (another quantizer's, composed with ours)."""
        for node in model.graph.nodes:
            annotation = node.meta.get(ANNOTATION)
            for spec in [] if annotation is None else [*annotation.input_qspec_map.values(), annotation.output_qspec]:
                if isinstance(spec, QuantizationSpec) and spec.dtype not in (torch.uint8, torch.int8):
                    raise ValueError(f"{node.name}: annotated as {spec.dtype}; our kernels run uint8 and int8")

    # ---- pass 1: groups -------------------------------------------------------------------------------------------

    def _group(self, model: GraphModule) -> list[Group]:
        groups = []
        order = {node: position for position, node in enumerate(model.graph.nodes)}
        taken: set[Node] = set()
        # Backwards, so that of two convolutions meeting in an add the later one takes it: the other one's result is
        # then ready as the residual operand when the kernel runs.
        for node in reversed(model.graph.nodes):
            if is_call(node, HEAVY) and node.name not in self.keep_float and self._supported(node):
                group = self._grow(node, order, taken)
                taken.update(group.nodes)
                groups.append(group)
        groups.reverse()
        return groups

    def _supported(self, node: Node) -> bool:
        data, weight = node.args[0], node.args[1]
        constant = isinstance(weight, Node) and weight.op == "get_attr"
        batched = not is_call(node, CONVOLUTIONS) or len(shape_of(data) or ()) == len(shape_of(weight) or ())
        return constant and batched and is_float_tensor(data) and is_float_tensor(node)

    def _grow(self, anchor: Node, order: dict[Node, int], taken: set[Node]) -> Group:
        """Follow the only consumer of ``anchor`` through batch norm, activation and residual add."""
        data, weight = anchor.args[0], anchor.args[1]
        assert isinstance(data, Node) and isinstance(weight, Node)
        group = Group(anchor, [anchor], [(data, anchor)], weight)
        convolution = is_call(anchor, CONVOLUTIONS)
        step = _only_user(group.output, taken)
        if convolution and self.qat and step is not None and is_call(step, BATCH_NORMS):
            group.nodes.append(step)
            step = _only_user(step, taken)
        activated = added = False
        while step is not None and step.name not in self.keep_float:
            if not activated and is_call(step, ELEMENTWISE) and fusable_activation(step):
                activated = True
            elif convolution and not added and (residual := _residual(step, group.output)) is not None:
                # A value computed after the convolution (or from it) is no operand its kernel could read.
                if order[residual] > order[anchor]:
                    break
                group.inputs.append((residual, step))
                added = True
            else:
                break
            group.nodes.append(step)
            step = None if activated and added else _only_user(step, taken)
        return group

    # ---- pass 2: which values can be int8, and which are wanted so --------------------------------------------------

    def _capable(self, model: GraphModule, of_output: dict[Node, Group]) -> set[Node]:
        """Values an int8 kernel can write: forwards, from the network's inputs and the groups' outputs."""
        capable: set[Node] = set()
        for node in model.graph.nodes:
            if node.name in self.keep_float:
                continue
            source = node in of_output or (node.op == "placeholder" and is_float_tensor(node))
            if source or (self._is_light(node) and all(value in capable for value in _values(node))):
                capable.add(node)
        return capable

    @staticmethod
    def _is_light(node: Node) -> bool:
        if is_call(node, SPLITS):
            return is_float_tensor(node.args[0]) and all(is_call(u, frozenset({operator.getitem})) for u in node.users)
        if not is_float_tensor(node):
            return False
        if is_call(node, ADDS):
            return len(node.args) == 2 and not node.kwargs and same_shape(*node.args)
        if is_call(node, MULS):
            a, b = node.args
            return same_shape(a, b) or is_channel_gate(a, b) or is_channel_gate(b, a)
        return is_call(node, ELEMENTWISE | CATS) or is_average(node) or is_pass_through(node)

    def _wanted(self, model: GraphModule, of_output: dict[Node, Group], capable: set[Node]) -> set[Node]:
        """Values some int8 kernel reads: backwards, from the groups' inputs.

        Average pooling reads int8 even when its own result is wanted as fp32 (a feature extractor's end).
        """
        inside = {node for group in of_output.values() for node in group.nodes}
        read = {value for group in of_output.values() for value, _ in group.inputs}
        wanted: set[Node] = set()
        for node in reversed(model.graph.nodes):
            if node in read:
                wanted.add(node)
            if node in inside or node not in capable or not self._is_light(node):
                continue
            if node in wanted or is_average(node):
                wanted.update(_values(node))
        return wanted

    # ---- pass 3: annotations ------------------------------------------------------------------------------------

    def _annotate_group(self, group: Group, wanted: set[Node]) -> None:
        assert group.weight is not None
        maps: dict[Node, dict[Node, QuantizationSpecBase | None]] = {node: {} for node in group.nodes}
        for value, reader in group.inputs:
            maps[reader][value] = self.activation_spec
        maps[group.anchor][group.weight] = self.weight_spec
        bias = group.anchor.args[2] if len(group.anchor.args) > 2 else None
        if isinstance(bias, Node):
            maps[group.anchor][bias] = None
        for node in group.nodes:
            last = node is group.output
            _set(node, maps[node], self.activation_spec if last and node in wanted else None)

    def _annotate_light(
        self, model: GraphModule, of_output: dict[Node, Group], capable: set[Node], wanted: set[Node]
    ) -> None:
        inside = {node for group in of_output.values() for node in group.nodes}
        for node in model.graph.nodes:
            if node in inside or node not in capable or not self._is_light(node) or ANNOTATION in node.meta:
                continue
            if is_average(node) and node not in wanted:
                _set(node, {node.args[0]: self.activation_spec}, None)
            elif node not in wanted:
                continue
            elif is_call(node, CATS):
                self._annotate_cat(node)
            elif is_call(node, SPLITS):
                _set(node, {node.args[0]: self.activation_spec}, None)
            elif is_call(node, frozenset({operator.getitem})):
                split = node.args[0]
                _set(node, {}, SharedQuantizationSpec((split.args[0], split)))
            elif is_pass_through(node):
                _set(node, {node.args[0]: self.activation_spec}, SharedQuantizationSpec((node.args[0], node)))
            elif is_call(node, ADDS) and (relu := _fusable_relu(node)) is not None:
                _set(node, dict.fromkeys(_values(node), self.activation_spec), None)
                _set(relu, {}, self.activation_spec)
            else:
                _set(node, dict.fromkeys(_values(node), self.activation_spec), self.activation_spec)

    def _annotate_cat(self, node: Node) -> None:
        """One scale for a concatenation and each operand that nothing else reads: joining is then a plain copy.

        An operand that others read keeps its own, finer scale, and is requantized while it is copied.
        """
        maps: dict[Node, QuantizationSpecBase | None] = {}
        shared: SharedQuantizationSpec | None = None
        for value in _values(node):
            if not _read_only_by(value, node):
                maps[value] = self.activation_spec
            else:
                maps[value] = shared or self.activation_spec
                shared = shared or SharedQuantizationSpec((value, node))
        _set(node, maps, shared or self.activation_spec)

    # ---- the report ---------------------------------------------------------------------------------------------

    def _record_left_float(self, model: GraphModule) -> None:
        self.left_float = {}
        for node in model.graph.nodes:
            if node.op != "call_function" or ANNOTATION in node.meta or not is_float_tensor(node):
                continue
            if node.name in self.keep_float:
                reason = "asked to stay fp32 (keep_float)"
            elif is_call(node, HEAVY):
                reason = "its weight is not a constant, or its input has no batch dimension"
            elif self._is_light(node):
                reason = "no int8 kernel reads its result, or an operand is not int8"
            else:
                reason = f"no int8 kernel for {node.target}"
            self.left_float[node.name] = reason


def _set(node: Node, inputs: dict[Node, QuantizationSpecBase | None], output: QuantizationSpecBase | None) -> None:
    node.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=output, _annotated=True)


def _values(node: Node) -> list[Node]:
    """The tensors a light call reads."""
    if is_call(node, CATS):
        return [value for value in node.args[0] if isinstance(value, Node)]
    count = 2 if is_call(node, ADDS | MULS) else 1
    return [value for value in node.args[:count] if isinstance(value, Node)]


def _only_user(node: Node, taken: set[Node]) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0] not in taken else None


def _residual(node: Node, value: Node) -> Node | None:
    """The other operand when ``node`` adds a tensor of the same shape to ``value``, else None."""
    if not is_call(node, ADDS) or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = second if first is value else first
    if other is value or not isinstance(other, Node) or other.op == "get_attr" or not same_shape(first, second):
        return None
    return other


def _fusable_relu(add: Node) -> Node | None:
    """The relu or relu6 that alone reads ``add``: the kernel for int8 addition computes it, too."""
    user = _only_user(add, set())
    return user if user is not None and is_call(user, ELEMENTWISE) and fusable_activation(user) in RELUS else None


def _read_only_by(value: Node, reader: Node) -> bool:
    """True when ``reader`` alone reads ``value`` and whatever shares its scale through pass-through calls."""
    while True:
        if len(value.users) != 1 or reader not in value.users or value.op == "placeholder":
            return False
        if is_call(value, frozenset({operator.getitem})):
            return False
        if not is_pass_through(value):
            return True
        source = value.args[0]
        assert isinstance(source, Node)
        value, reader = source, value
