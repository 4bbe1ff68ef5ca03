"""Which parts of a network run in int8, what is fused, and which tensors share a scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from pykernels.quantization import quantize

from .graphs import DQ, Q, aten, calls, is_int8, output_of, relative_error, scale_of_input, scale_of_output


class Net(nn.Module):
    """Modules by name and a forward given as a function of (net, x)."""

    def __init__(self, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def int8(net: nn.Module, x: torch.Tensor | None = None) -> GraphModule:
    """Quantize ``net`` without refinement (annotation is what these tests are about) and check it still computes."""
    x = torch.randn(4, 8, 10, 10) if x is None else x
    net.eval()
    graph = quantize(net, (x,), [x], refine=False)
    with torch.no_grad():
        assert relative_error(graph(x), net(x)) < 0.05
    return graph


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "tanh": nn.Tanh(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_an_activation_is_fused_to_its_convolution(name: str, norm: bool) -> None:
    first = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)) if norm else conv(8, 8)
    graph = int8(nn.Sequential(first, ACTIVATIONS[name], conv(8, 4)))
    before, after = calls(graph, aten.conv2d.default)
    (activation,) = before.users
    assert activation.target is not Q, "nothing is observed between a convolution and its activation"
    assert scale_of_output(activation) == scale_of_input(after)
    assert output_of(graph) is after, "what no int8 kernel reads leaves as fp32"


def test_an_activation_no_epilogue_knows_is_a_table() -> None:
    graph = int8(nn.Sequential(conv(8, 8), nn.LeakyReLU(0.1), conv(8, 4)))
    (activation,) = calls(graph, aten.leaky_relu.default)
    assert scale_of_input(activation) != scale_of_output(activation)


@pytest.mark.parametrize("groups", [2, 8], ids=["grouped", "depthwise"])
def test_grouped_convolutions_have_a_scale_for_each_channel(groups: int) -> None:
    graph = int8(nn.Sequential(conv(8, 16, groups=groups), conv(16, 4)))
    weight = calls(graph, aten.conv2d.default)[0].args[1]
    stored, scale = (graph.get_buffer(str(weight.args[i].target)) for i in (0, 1))
    assert stored.dtype == torch.int8 and scale.shape == (16,)
    assert stored.abs().amax() <= 127


def test_conv1d_runs_in_int8() -> None:
    net = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1))
    graph = int8(net, torch.randn(4, 8, 20))
    assert all(is_int8(c.args[0]) and is_int8(c.args[1]) for c in calls(graph, aten.conv1d.default))


@pytest.mark.parametrize(
    ("forward", "activation_after"),
    [
        (lambda net, x: net.last(F.relu(net.b(net.a(x)) + net.a(x))), True),
        (lambda net, x: net.last(net.b(net.a(x)) + net.a(x)), False),
    ],
    ids=["add then relu", "add"],
)
def test_a_residual_is_added_inside_the_convolution(
    forward: Callable[..., torch.Tensor], activation_after: bool
) -> None:
    net = Net(forward, a=conv(8, 8), b=conv(8, 8), last=conv(8, 4))
    graph = int8(net)
    (add,) = calls(graph, aten.add.Tensor)
    fused = [value for value in add.args if value.target is aten.conv2d.default]
    assert len(fused) == 1, "one operand comes straight from the convolution, unobserved"
    (other,) = (value for value in add.args if value is not fused[0])
    assert other.target is DQ
    (user,) = add.users
    assert (user.target is aten.relu.default) == activation_after


def test_a_residual_is_added_after_the_activation() -> None:
    graph = int8(Net(lambda net, x: net.last(F.silu(net.a(x)) + x), a=conv(8, 8), last=conv(8, 4)))
    (add,) = calls(graph, aten.add.Tensor)
    assert {value.target for value in add.args} == {aten.silu.default, DQ}


def test_of_two_convolutions_meeting_in_an_add_the_later_one_takes_it() -> None:
    graph = int8(
        Net(lambda net, x: net.last(F.relu(net.a(x) + net.b(x))), a=conv(8, 8), b=conv(8, 8, 1), last=conv(8, 4))
    )
    (add,) = calls(graph, aten.add.Tensor)
    first, second, _ = calls(graph, aten.conv2d.default)
    assert second in add.args and first not in add.args


def test_a_convolution_read_twice_is_observed() -> None:
    graph = int8(Net(lambda net, x: net.last(F.relu(y := net.a(x)) + y), a=conv(8, 8), last=conv(8, 4)))
    first = calls(graph, aten.conv2d.default)[0]
    assert [user.target for user in first.users] == [Q]


def test_a_concatenation_shares_its_scale_with_what_only_it_reads() -> None:
    net = Net(
        lambda net, x: net.last(torch.cat([net.a(x), F.max_pool2d(net.b(x), 3, 1, 1)], 1)),
        a=conv(8, 8), b=conv(8, 8), last=conv(16, 4),
    )  # fmt: skip
    graph = int8(net)
    (cat,) = calls(graph, aten.cat.default)
    scales = {value.args[1:3] for value in cat.args[0]} | {scale_of_output(cat)}
    assert len(scales) == 1
    (pool,) = calls(graph, aten.max_pool2d.default)
    assert scale_of_input(pool) in scales


def test_a_concatenation_leaves_the_finer_scale_to_what_others_read() -> None:
    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        small = net.a(x)
        return net.last(torch.cat([small, net.b(x)], 1)) + net.other(small)

    net = Net(forward, a=conv(8, 8), b=conv(8, 8), last=conv(16, 4), other=conv(8, 4))
    with torch.no_grad():
        net.b.weight.mul_(20)
    (cat,) = calls(int8(net), aten.cat.default)
    shared, own = cat.args[0][1].args[1:3], cat.args[0][0].args[1:3]
    assert shared == scale_of_output(cat) and own[0] < shared[0] / 4


def test_max_pooling_and_moves_keep_their_scale() -> None:
    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(F.relu(net.a(x)), 2)
        y = F.pad(y, (0, 1, 0, 1))
        y = y.reshape(-1, 2, 4, 6, 6).transpose(1, 2).reshape(-1, 8, 6, 6)
        left, right = y.chunk(2, dim=1)
        return net.b(left) + net.c(right)

    graph = int8(Net(forward, a=conv(8, 8), b=conv(4, 4), c=conv(4, 4)))
    scales = {node.args[1:3] for node in graph.graph.nodes if node.target is Q}
    assert len(scales) <= 3, "the input, everything from the relu to the halves, and the first operand of the add"


def test_squeeze_and_excitation_is_int8_throughout() -> None:
    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = F.hardswish(net.a(x))
        gate = F.hardsigmoid(net.up(F.relu(net.down(F.adaptive_avg_pool2d(y, 1)))))
        return net.last(gate * y)

    graph = int8(Net(forward, a=conv(8, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), last=conv(8, 4)))
    (mul,) = calls(graph, aten.mul.Tensor)
    assert all(is_int8(value) for value in mul.args)
    assert graph.meta["pykernels_quantization"].left_float == {}


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(10), Net(lambda _, x: x.mean((2, 3), keepdim=True))],
    ids=["adaptive", "average", "mean"],
)  # fmt: skip
def test_a_classifier_is_int8_from_input_to_logits(pool: nn.Module) -> None:
    net = nn.Sequential(
        conv(8, 16), nn.ReLU(), pool, nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    graph = int8(net)
    assert no_float_between_int8_calls(graph)
    assert output_of(graph).target is aten.linear.default
    assert not calls(graph, aten.dropout.default)


def test_a_batch_norm_before_its_convolution_becomes_a_depthwise_convolution() -> None:
    norm = nn.BatchNorm2d(8)
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    graph = int8(nn.Sequential(nn.MaxPool2d(2), norm, nn.ReLU(), conv(8, 4)))
    assert not calls(graph, aten.batch_norm.default)
    assert calls(graph, aten.conv2d.default)[0].args[6] == 8
    assert no_float_between_int8_calls(graph)


def test_written_out_activations_are_recognised() -> None:
    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = net.a(x)
        y = net.b(y * torch.sigmoid(y))
        return net.last(y * (F.relu6(y + 3) / 6))

    graph = int8(Net(forward, a=conv(8, 8), b=conv(8, 8), last=conv(8, 4)))
    assert calls(graph, aten.silu.default) and calls(graph, aten.hardswish.default)
    assert not calls(graph, aten.mul.Tensor)


def test_what_has_no_int8_kernel_is_named_with_the_reason() -> None:
    graph = int8(Net(lambda net, x: net.b(torch.cumsum(net.a(x), 1)), a=conv(8, 8), b=conv(8, 4)))
    left = graph.meta["pykernels_quantization"].left_float
    assert list(left) == ["cumsum"] and "no int8 kernel" in left["cumsum"]


def test_a_layer_can_be_kept_in_fp32() -> None:
    net = nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 4)).eval()
    x = torch.randn(2, 8, 10, 10)
    graph = quantize(net, (x,), [x], keep_float=["conv2d"], refine=False)
    first, second = calls(graph, aten.conv2d.default)
    assert not is_int8(first.args[0]) and is_int8(second.args[0])


def no_float_between_int8_calls(graph: GraphModule) -> bool:
    """Every computing call reads int8, or the unobserved result of a call it is fused to."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target in (Q, DQ) or "dequantize" in str(node.target):
            continue
        value = node.args[0]
        if not is_int8(value) and (
            value.target not in (aten.conv2d.default, aten.linear.default) or len(value.users) > 1
        ):
            return False
    return True


def test_a_batch_norm_goes_into_no_convolution_that_others_read() -> None:
    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = net.norm(net.a(x))
        z = net.b(y) + net.again(y)  # a batch norm of a batch norm, whose convolution `b` reads, too
        w = net.c(z)
        return net.last(net.other(w) + F.relu(w)) + net.last(net.own(net.d(z)) + net.its(net.d(z)))

    norms = {name: nn.BatchNorm2d(8) for name in ("norm", "again", "other", "own", "its")}
    for norm in norms.values():
        for tensor, low, high in ((norm.weight, 0.5, 2), (norm.running_var, 0.3, 2), (norm.running_mean, -1, 1)):
            nn.init.uniform_(tensor, low, high)
    int8(Net(forward, a=conv(8, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 8), last=conv(8, 4), **norms))
