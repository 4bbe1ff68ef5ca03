"""Float graphs: what is folded, what is fused, what stays with torch, and that the answer stays the same."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Function, Mixed, close, lively, ops, what
from torch import nn
from torch.nn import functional as F

import pykernels as pk

X = (3, 12, 12)


def conv(before: int = 3, after: int = 8, **arguments: object) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, **{"padding": 1, **arguments})


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("relu", F.relu),
        ("relu", lambda x: F.relu(x, inplace=True)),
        ("relu", lambda x: x.clamp(min=0)),
        ("relu6", F.relu6),
        ("relu6", lambda x: F.hardtanh(x, 0.0, 6.0)),
        ("hardswish", F.hardswish),
        ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
        ("hardswish", lambda x: x * (F.relu6(x + 3) / 6)),
        ("hardsigmoid", F.hardsigmoid),
        ("hardsigmoid", lambda x: F.relu6(x + 3) / 6),
        ("silu", F.silu),
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("gelu", F.gelu),
        ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5))),
        ("gelu", lambda x: 0.5 * (x * (torch.erf(x * 0.5**0.5) + 1))),
        ("sigmoid", torch.sigmoid),
        ("tanh", torch.tanh),
    ],
)
def test_every_spelling_of_an_activation_goes_into_the_convolution_before_it(name, activation) -> None:
    model = lively(Function(lambda m, x: activation(m.bn(m.conv(x))), conv=conv(), bn=nn.BatchNorm2d(8)), *X)
    fast = pk.optimize(model, torch.randn(2, *X))
    assert what(fast) == [f"conv2d + {name}"] and not fast.report().left
    close(fast, model, torch.randn(3, *X))


@pytest.mark.parametrize(
    ("expected", "forward"),
    [
        ("conv2d + add + relu", lambda m, x: F.relu(m.conv(x) + x)),
        ("conv2d + add + relu", lambda m, x: F.relu(x + m.conv(x))),
        ("conv2d + relu + add", lambda m, x: F.relu(m.conv(x)) + x),
        ("conv2d + add", lambda m, x: torch.add(m.conv(x), x)),
        ("conv2d + add + relu", lambda m, x: m.conv(x).add_(x).relu_()),
    ],
)
def test_a_residual_is_added_before_or_after_the_activation(expected, forward) -> None:
    model = Function(forward, conv=conv(3, 3)).eval()
    fast = pk.optimize(model, torch.randn(2, *X))
    assert what(fast) == [expected]
    close(fast, model, torch.randn(5, *X))


@pytest.mark.parametrize(
    "layer",
    [
        conv(3, 8, stride=2, padding=(0, 1), dilation=2),
        conv(3, 6, groups=3, bias=False),
        conv(3, 8, padding="same", dilation=2),
        conv(3, 8, padding="valid"),
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(3, 8, stride=2, padding=0)),
        nn.Conv2d(3, 8, (1, 3)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.BatchNorm1d(8), nn.GELU()),
    ],
    ids=lambda layer: str(layer)[:40],
)
def test_layers_of_every_geometry_run_as_one_call(layer) -> None:
    model = lively(nn.Sequential(layer), *X)
    fast = pk.optimize(model, torch.randn(2, *X))
    assert len(what(fast)) == 1 and not fast.report().left
    close(fast, model, torch.randn(3, *X))


def test_a_batch_norm_that_stands_alone_is_a_depthwise_scale_and_takes_its_activation() -> None:
    model = lively(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), conv()), *X)
    fast = pk.optimize(model, torch.randn(2, *X))
    assert what(fast) == ["batch_norm + relu", "conv2d"]
    close(fast, model, torch.randn(2, *X))


@pytest.mark.parametrize(
    ("layer", "shape", "added", "fused"),
    [
        (nn.Linear(12, 8, bias=False), (3, 12), (8,), True),
        (nn.Linear(12, 8, bias=False), (3, 12), (1, 1, 8), True),
        (conv(bias=False), X, (8, 1, 1), True),
        (conv(bias=False), X, (1, 8, 1, 1), True),
        (conv(), X, (8, 1, 1), False),
        (conv(bias=False), X, (12, 1), False),
        (nn.Linear(12, 8, bias=False), (3, 12), (3, 8), False),
    ],
)
def test_a_constant_for_each_channel_is_the_bias_of_a_layer_without_one(layer, shape, added, fused) -> None:
    torch.nn.init.normal_(layer.weight)
    model = Function(lambda m, x: m.added + m.layer(x), layer=layer)
    model.added = nn.Parameter(torch.randn(added))
    x = torch.randn(2, *shape)
    fast = pk.optimize(model, x)
    assert ("aten.add" not in ops(fast)) is fused
    close(fast, model, x)


def test_a_value_that_two_read_is_not_swallowed() -> None:
    model = Function(lambda m, x: F.relu(y := m.conv(x)) + y, conv=conv()).eval()
    fast = pk.optimize(model, torch.randn(2, *X))
    assert what(fast) == ["conv2d", "relu"]
    assert [entry.op for entry in fast.report().left] == ["add"]
    close(fast, model, torch.randn(2, *X))


def test_in_place_calls_on_views_keep_their_meaning() -> None:
    def forward(m, x):
        y = m.conv(x)
        y[:, :4].relu_()
        return y * 2

    model = Function(forward, conv=conv()).eval()
    close(pk.optimize(model, torch.randn(2, *X)), model, torch.randn(3, *X))


def test_what_is_not_understood_stays_with_torch_and_the_report_says_why() -> None:
    layers = nn.Sequential(
        conv(), nn.ConvTranspose2d(8, 4, 1, padding=1), nn.BatchNorm2d(4), nn.Mish(), nn.Conv2d(4, 2, 1)
    )
    model = lively(layers, *X)
    fast = pk.optimize(model, torch.randn(2, *X))
    report = fast.report()
    assert {entry.op: entry.reason for entry in report.left} == {
        "conv_transpose2d": "transposed convolution in training, or of weights or a geometry that no ordinary one has",
        "mish": "no kernel of ours",
    }
    assert "aten.batch_norm" not in ops(fast), "its batch norm is folded all the same"
    assert all(
        text in str(report) for text in ("left to torch", "conv_transpose2d", "no kernel of ours", "2 fused calls")
    )
    close(fast, model, torch.randn(2, *X))


def test_layouts_change_at_the_edges_only() -> None:
    model = lively(Mixed(), *X)
    assert "aten.contiguous" not in ops(pk.optimize(model, torch.randn(2, *X)))
    image = Function(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 8)).eval()
    fast = pk.optimize(image, torch.randn(2, *X))
    assert ops(fast) == ["pykernels.conv2d", "pykernels.conv2d", "aten.contiguous"]
    assert fast(torch.randn(2, *X)).is_contiguous()
    close(fast, image, torch.randn(2, *X).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_batch_size_is_free_even_when_the_example_holds_one_image(batch) -> None:
    model = lively(Mixed(), *X)
    fast = pk.optimize(model, torch.randn(1, *X))
    assert fast.dynamic and not fast.report().notes
    close(fast, model, torch.randn(batch, *X))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.filterwarnings("ignore:the batch size is fixed")
def test_a_model_that_fixes_its_batch_size_is_exported_with_it_and_a_note(precision) -> None:
    model, x = Function(lambda m, x: m.conv(x).reshape(2, -1), conv=conv()).eval(), torch.randn(2, *X)
    fast = pk.optimize(model, x, precision=precision, calibration=[x] if precision == "int8" else None)
    close(fast, model, x, tolerance=1e-5 if precision == "fp32" else 0.05)
    assert not fast.dynamic
    assert "batch size is fixed" in fast.report().notes[0]


def test_nested_outputs_and_keyword_inputs_keep_their_shape() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x, *, other):
            return {"a": self.a(x), "list": [self.b(other), None]}

    model, x = Two().eval(), torch.randn(2, *X)
    fast = pk.optimize(model, (x,), example_kwargs={"other": x})
    with torch.no_grad():
        answer, expected = fast(x, other=2 * x), model(x, other=2 * x)
    assert answer["list"][1] is None
    torch.testing.assert_close(answer["list"][0], expected["list"][0])
    with pytest.raises(ValueError, match="nested"):
        fast(x, x)


def test_weights_that_are_read_twice_are_packed_once() -> None:
    model = Function(lambda m, x: m.conv(m.conv(x)), conv=conv(3, 3)).eval()
    fast = pk.optimize(model, torch.randn(2, *X))
    assert len(list(fast.program.buffers())) == 1
    close(fast, model, torch.randn(2, *X))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_16_bit_floats_take_and_give_float32_and_err_as_they_do(precision: str, tolerance: float) -> None:
    model = lively(Mixed(), *X)
    fast, x = pk.optimize(model, torch.randn(2, *X), precision=precision), torch.randn(4, *X)
    close(fast, model, x, tolerance=tolerance)  # a dozen roundings of 2^-9, or 2^-12, in sequence
    assert fast.report().bytes_after < fast.report().bytes_before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_models_of_16_bit_floats_keep_their_inputs_and_outputs(precision: str, dtype: torch.dtype) -> None:
    exact, x = lively(Mixed(), *X), torch.randn(4, *X)
    fast = pk.optimize(copy.deepcopy(exact).to(dtype), torch.randn(2, *X).to(dtype), precision=precision)
    assert what(fast) == what(pk.optimize(exact, x))
    with torch.no_grad():
        y, expected = fast(x.to(dtype)), exact(x)
    assert y.dtype == dtype
    assert (y.float() - expected).norm() <= 3e-2 * expected.norm()


def test_the_model_is_left_as_it_was() -> None:
    model = Mixed().train()
    model.stem.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pk.optimize(model, torch.randn(2, *X))
    assert model.training and not model.stem.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_arguments_are_named() -> None:
    model = conv()
    with pytest.raises(ValueError, match="precision"):
        pk.optimize(model, torch.randn(2, *X), precision="fp8")
    with pytest.raises(ValueError, match="calibration"):
        pk.optimize(model, torch.randn(2, *X), calibration=[torch.randn(2, *X)])
    with pytest.raises(ValueError, match="model"):
        pk.optimize(lambda x: x, torch.randn(2, *X))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="inference"):
        pk.optimize(model, torch.randn(2, *X)).train()


def test_a_model_that_cannot_be_exported_is_sent_to_swap() -> None:
    model = Function(lambda m, x: m.conv(x) if x.sum() > 0 else -x, conv=conv(3, 3)).eval()
    with pytest.raises(pk.network.NotExportable, match=r"(?s)Function.*swap"):
        pk.optimize(model, torch.randn(2, *X))
