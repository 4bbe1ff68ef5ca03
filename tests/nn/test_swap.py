"""pk.swap: a model's layers become ours in place; its names, hooks, checkpoints and training stay."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from residual import Net, X, relative, trained
from torch import nn

import pykernels as pk
from pykernels.network.report import Report
from pykernels.nn.swap import restore


@torch.no_grad()
def test_the_answer_stays() -> None:
    net = trained()
    expected = net(X)
    pk.swap(net)
    assert relative(net(X), expected) < 1e-5
    assert relative(net(X.contiguous(memory_format=torch.channels_last)), expected) < 1e-5
    assert net(X[:1]).shape == (1, 5)


@torch.no_grad()
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.03), ("fp16", 0.004), ("int8", 0.05)])
def test_lower_precisions_come_close(precision: str, tolerance: float) -> None:
    net = trained()
    expected = net(X)
    report = pk.swap(net, precision, calibration=[X, (X[:1],), {"x": X}])
    assert 1e-5 < relative(net(X), expected) < tolerance
    assert report.precision == precision
    assert net(X).dtype == torch.float32


def test_the_report_tells_what_was_fused_and_what_was_not() -> None:
    report = pk.swap(trained())
    assert isinstance(report, Report)
    assert [(entry.op, entry.what, entry.where) for entry in report.fused] == [
        ("conv2d", "Conv2d + BatchNorm2d + Hardswish", "stem.0, stem.1, stem.2"),
        ("conv2d", "Conv2d + BatchNorm2d + ReLU", "block.conv1, block.bn1, block.relu"),
        ("conv2d", "Conv2d + BatchNorm2d", "block.conv2, block.bn2"),
        ("conv2d", "Conv2d", "mix"),
        ("max_pool2d", "MaxPool2d", "pool"),
        ("adaptive_avg_pool2d", "AdaptiveAvgPool2d", "squeeze"),
        ("linear", "Linear + GELU", "head.0, head.1"),
        ("linear", "Linear", "head.3"),
    ]
    assert [(entry.op, entry.where) for entry in report.left] == [("ReLU", "block.relu")]
    assert report.left[0].reason == "the layer before it computes it in 1 of its 2 calls, the rest follow none"
    assert report.bytes_before > 0 and report.bytes_after > 0
    assert "block.relu" in str(report)


def test_int8_without_calibration_makes_linears_int8_and_says_so() -> None:
    net = trained()
    report = pk.swap(net, "int8")
    assert {entry.op for entry in report.fused if "Linear" in entry.what} == {"int8_linear"}
    assert {entry.op for entry in report.fused if "Conv" in entry.what} == {"conv2d"}
    assert any("convolutions stay fp32" in note for note in report.notes)


def test_int8_with_calibration_makes_convolutions_int8() -> None:
    report = pk.swap(trained(), "int8", calibration=iter([X]))
    assert {entry.op for entry in report.fused if "Conv" in entry.what} == {"qconv2d"}
    assert report.notes == []
    assert report.conversions == 4


def test_a_convolution_that_calibration_does_not_reach_stays_fp32() -> None:
    net = trained()
    net.spare = nn.Conv2d(3, 3, 1)
    report = pk.swap(net, "int8", calibration=[X])
    assert any("no calibration input reached them: spare" in note for note in report.notes)


# --- the model is still what it was ---


def test_state_dict_keys_values_and_objects_stay() -> None:
    net = trained()
    names = [name for name, _ in net.named_modules()]
    before, parameters = copy.deepcopy(net.state_dict()), list(net.parameters())
    buffers = [name for name, _ in net.named_buffers()]
    modules = list(net.modules())
    pk.swap(net, "int8", calibration=[X])
    net(X)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert [name for name, _ in net.named_buffers()] == buffers
    assert [name for name, _ in net.named_modules()] == names


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_old_checkpoints_load_after_the_swap(assign: bool) -> None:
    other = trained()
    checkpoint, expected = copy.deepcopy(other.state_dict()), other(X)
    net = trained()
    pk.swap(net)
    net(X)
    net.load_state_dict(checkpoint, assign=assign)
    assert relative(net(X), expected) < 1e-5


@torch.no_grad()
def test_new_checkpoints_load_into_the_plain_model() -> None:
    net = trained()
    expected = net(X)
    pk.swap(net, "int8", calibration=[X])
    plain = Net().eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(X), expected)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_copies_and_pickles_compute_the_same(precision: str) -> None:
    net = trained()
    pk.swap(net, precision, calibration=[X])
    expected = net(X)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(X), expected)
        again.stem[0].weight.zero_()
        assert not torch.equal(again(X), expected)
        assert torch.equal(net(X), expected)


def test_hooks_registered_before_and_after_survive() -> None:
    net, seen = trained(), []
    net.stem.register_forward_hook(lambda m, i, o: seen.append("before"))
    net.mix.register_forward_pre_hook(lambda m, i: seen.append("pre"))
    net.head[3].register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    pk.swap(net)
    seen.clear()
    net.head.register_forward_hook(lambda m, i, o: seen.append("after"))
    net(X).sum().backward()
    assert seen == ["before", "pre", "after", "backward"]


@torch.no_grad()
def test_a_hook_on_a_container_between_sees_the_value_it_would_have_seen() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).eval()
    trained(net)
    expected = net[0](X)
    report = pk.swap(net)
    assert report.fused[0].what == "Conv2d + BatchNorm2d + ReLU"
    fused = net(X)
    values = []
    net[0].register_forward_hook(lambda m, i, o: values.append(o))
    torch.testing.assert_close(net(X), fused, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values[0], expected)


def test_training_is_torch_s_own() -> None:
    ours = trained().train()
    theirs = copy.deepcopy(ours)
    pk.swap(ours, "int8", calibration=[X])
    assert ours.training and all(module.training for module in ours.modules())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, theirs)]
    for step in range(3):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(net(X), torch.tensor([1, 2])).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@torch.no_grad()
def test_evaluation_after_training_uses_what_was_learned() -> None:
    net = trained()
    pk.swap(net)
    net(X)
    plain = copy.deepcopy(net)
    restore(plain)
    for model in (net, plain):
        model.train()
        torch.manual_seed(5)
        model(torch.randn(4, 3, 16, 16) * 3 + 1)
        model.eval()
    assert relative(net(X), plain(X)) < 1e-5


def test_gradients_in_evaluation_are_right() -> None:
    ours = trained()
    theirs = copy.deepcopy(ours)
    pk.swap(ours)
    for net in (ours, theirs):
        net.zero_grad()
        F.cross_entropy(net(X), torch.tensor([1, 2])).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_modes_of_single_modules_are_kept() -> None:
    net = trained().train()
    net.block.bn1.eval()
    pk.swap(net, "int8", calibration=[X])
    assert net.training and net.block.conv1.training and not net.block.bn1.training


@torch.no_grad()
def test_swapping_again_changes_the_precision_and_restore_undoes() -> None:
    net = trained()
    expected, classes = net(X), [type(module) for module in net.modules()]
    pk.swap(net, "int8", calibration=[X])
    report = pk.swap(net)
    assert report.precision == "fp32" and relative(net(X), expected) < 1e-5
    restore(net)
    assert [type(module) for module in net.modules()] == classes
    assert torch.equal(net(X), expected)


@torch.no_grad()
def test_the_model_itself_may_be_one_layer() -> None:
    layer = nn.Linear(7, 3).eval()
    x = torch.randn(2, 7)
    expected = layer(x)
    report = pk.swap(layer)
    assert report.fused[0].op == "linear"
    assert relative(layer(x), expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("precision", "op"), [("fp32", "conv2d"), ("int8", "qconv2d")])
def test_models_of_16_bit_floats(precision: str, op: str, dtype: torch.dtype) -> None:
    net = trained()
    expected = net(X)
    net.to(dtype)
    report = pk.swap(net, precision, [X.to(dtype)] if precision == "int8" else None, example_inputs=X.to(dtype))
    assert report.fused[0].op == op
    y = net(X.to(dtype))
    assert y.dtype == dtype and relative(y.float(), expected) < 0.06


@torch.no_grad()
def test_moving_and_casting() -> None:
    net = trained()
    expected = net(X)
    pk.swap(net)
    net(X)
    assert relative(net.double()(X.double()).float(), expected) < 1e-5
    assert relative(net.float()(X), expected) < 1e-5
    assert relative(net.bfloat16()(X.bfloat16()).float(), expected) < 0.03
    assert relative(net.half()(X.half()).float(), expected) < 0.03
    assert net.float().to("meta")(X.to("meta")).device.type == "meta"


@torch.no_grad()
def test_the_swapped_model_compiles_and_exports() -> None:
    net = trained()
    pk.swap(net)
    expected = net(X)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    assert relative(compiled(X), expected) < 1e-6
    assert relative(compiled(X[:1]), expected[:1]) < 1e-5
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (X,), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("pykernels.conv2d.default") == 4 and not any("batch_norm" in target for target in targets)
    assert relative(program.module()(X[:1]), expected[:1]) < 1e-5


@torch.no_grad()
def test_fx_still_traces_the_swapped_model() -> None:
    net = trained()
    pk.swap(net)
    assert relative(torch.fx.symbolic_trace(net)(X), net(X)) < 1e-5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pk.swap(None), TypeError, "model must be a torch.nn.Module, not NoneType"),  # type: ignore[arg-type]
        (lambda: pk.swap(Net(), "int4"), ValueError, "precision must be one of fp32, bf16, fp16, int8, not 'int4'"),
        (lambda: pk.swap(Net(), "int8", calibration=[]), ValueError, "calibration must yield at least one input"),
        (lambda: pk.swap(Net(), "int8", calibration=[X * float("nan")]), ValueError, "NaN"),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
