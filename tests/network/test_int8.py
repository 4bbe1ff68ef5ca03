"""Quantize/dequantize graphs: lowered to calls on bytes, close to the simulation, equal to the bit under every isa."""

from __future__ import annotations

import pytest
import torch
from networks import Function, Mixed, close, lively, ops, what
from torch import nn
from torch.nn import functional as F

import pykernels as pk
from pykernels.quantization import recipes

quantized = torch.ops.quantized_decomposed
X = (3, 12, 12)
_EDGES = ("pykernels.quantize_per_tensor", "pykernels.dequantize_per_tensor", "aten.contiguous")


def q(x: torch.Tensor, scale: float, zero_point: int, low: int = 0, high: int = 255) -> torch.Tensor:
    """What a PT2E quantizer leaves on an edge: quantize, then dequantize."""
    dtype = torch.uint8 if low >= 0 else torch.int8
    codes = quantized.quantize_per_tensor(x, scale, zero_point, low, high, dtype)
    return quantized.dequantize_per_tensor(codes, scale, zero_point, low, high, dtype)


def weight(shape: tuple[int, ...], per_channel: bool = True) -> nn.Module:
    """An s8 weight and its scales; calling it dequantizes."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-127, 128, shape, dtype=torch.int8))
            self.register_buffer("scales", torch.rand(shape[0]) * 0.01 + 0.001)
            self.register_buffer("zeros", torch.zeros(shape[0], dtype=torch.int64))

        def forward(self) -> torch.Tensor:
            if not per_channel:
                return quantized.dequantize_per_tensor(self.codes, 0.005, 0, -128, 127, torch.int8)
            return quantized.dequantize_per_channel(self.codes, self.scales, self.zeros, 0, -128, 127, torch.int8)

    return Weight()


def lowered(forward, *shape: int, inputs: int = 1, **layers: nn.Module) -> tuple[pk.Optimized, nn.Module]:
    """A graph that holds its quantizers, as PT2E leaves it, and what became of it."""
    model, example = Function(forward, **layers).eval(), tuple(torch.randn(2, *shape) for _ in range(inputs))
    graph = torch.export.export(model, example, dynamic_shapes=(({0: torch.export.Dim("batch")},) * inputs,)).module()
    return pk.optimize(graph, example, precision="int8"), model


def steps_apart(fast: nn.Module, model: nn.Module, scale: float, *inputs: torch.Tensor) -> float:
    """How many quantization steps two answers on the same grid are apart at most."""
    with torch.no_grad():
        return float(((fast(*inputs) - model(*inputs)) / scale).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bit_floats_is_int8_between_its_own_inputs_and_outputs(dtype: torch.dtype, tmp_path) -> None:
    model, x = lively(Mixed(), *X), torch.randn(4, *X)
    batches = [torch.randn(4, *X) for _ in range(3)]
    expected = pk.optimize(model, x, "int8", batches)
    model.to(dtype)
    fast = pk.optimize(model, x.to(dtype), "int8", [batch.to(dtype) for batch in batches])
    assert what(fast) == what(expected) and {p.dtype for p in model.parameters()} == {dtype}
    assert "aten.to" not in ops(fast) and "aten._to_copy" not in ops(fast)
    y = fast(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - expected(x)).norm() <= 0.05 * expected(x).norm()
    fast.save(tmp_path / "net.pk")
    assert torch.equal(pk.load(tmp_path / "net.pk")(x.to(dtype)), y)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_between_quantizers_is_one_call(signed, per_channel, bias) -> None:
    low, high, zero = (-128, 127, 3) if signed else (0, 255, 128)
    b = torch.randn(8) if bias else None

    def forward(m, x):
        y = F.relu(F.conv2d(q(x, 0.02, zero, low, high), m.w(), b, 2, 1))
        return q(y, 0.05, low, low, high)

    fast, model = lowered(forward, *X, w=weight((8, 3, 3, 3), per_channel))
    assert what(fast) == ["conv2d + relu + quantize"]
    assert ops(fast)[:3] == [f"pykernels.{op}" for op in ("quantize_per_tensor", "qconv2d", "dequantize_per_tensor")]
    assert steps_apart(fast, model, 0.05, torch.randn(3, *X)) <= 1.001


@pytest.mark.parametrize(
    ("expected", "tail"),
    [
        ("conv2d + add + relu + quantize", lambda y, x: F.relu(y + x)),
        ("conv2d + relu + add + quantize", lambda y, x: x + F.relu(y)),
        ("conv2d + hardswish + quantize", lambda y, x: F.hardswish(y)),
    ],
)
def test_an_8_bit_residual_is_added_in_the_same_pass(expected, tail) -> None:
    def forward(m, x):
        x = q(x, 0.03, 120)
        return q(tail(F.conv2d(x, m.w(), None, 1, 1), x), 0.04, 100)

    fast, model = lowered(forward, *X, w=weight((3, 3, 3, 3)))
    assert what(fast) == [expected]
    assert steps_apart(fast, model, 0.04, torch.randn(3, *X)) <= 1.001


@pytest.mark.parametrize("read", ["once", "twice"])
@torch.no_grad()
def test_a_layer_norm_that_only_a_quantize_reads_writes_bytes(read, isa) -> None:
    def forward(m, x):
        y = m.norm(x)
        z = F.linear(q(y, 0.03, 121), m.w())
        return z if read == "once" else (z, y)

    norm = nn.LayerNorm(19)
    norm.weight.data.normal_()
    fast, _ = lowered(forward, 7, 19, w=weight((5, 19)), norm=norm)
    assert what(fast) == ["layer_norm + quantize" if read == "once" else "layer_norm", "linear"]
    assert fast.report().conversions == (0 if read == "once" else 1)
    assert ops(fast)[:2] == ["pykernels.layer_norm", "pykernels.quantize_per_tensor"], "the graph of ops has two calls"
    kernels = [row.kernel for row in fast.plan().rows]
    assert kernels.count("layer_norm") == 1 and kernels.count("quantize") == (read == "twice")
    for batch in (1, 5):
        x = torch.randn(batch, 7, 19)
        for planned, expected in zip(fast.planned.program(x), fast.program(x), strict=True):
            assert torch.equal(planned, expected)


def test_the_last_linear_layer_answers_in_float() -> None:
    fast, model = lowered(lambda m, x: F.linear(q(x, 0.02, 128), m.w()), 32, w=weight((10, 32)))
    assert ops(fast) == ["pykernels.quantize_per_tensor", "pykernels.int8_linear"]
    close(fast, model, torch.randn(4, 32), tolerance=1e-5)


@pytest.mark.parametrize(
    ("op", "forward"),
    [
        ("qadd", lambda a, b: a + b),
        ("qadd", lambda a, b: F.relu(a + b)),
        ("qmul", lambda a, b: a * b),
        ("qcat", lambda a, b: torch.cat([a, b], 1)),
        ("qadaptive_avg_pool2d", lambda a, b: F.adaptive_avg_pool2d(a, (2, 3))),
        ("qadaptive_avg_pool2d", lambda a, b: a.mean((2, 3), keepdim=True)),
        ("qavg_pool2d", lambda a, b: F.avg_pool2d(a, 3, 2, 1)),
        ("qlookup", lambda a, b: F.hardswish(a)),
        ("qlookup", lambda a, b: torch.sigmoid(F.leaky_relu(a) * 0.5)),
        ("qlookup", lambda a, b: a),
    ],
)
def test_operations_between_quantized_values_run_on_bytes(op, forward) -> None:
    def whole(m, a, b):
        return q(forward(q(a, 0.03, 110), q(b, 0.02, 130)), 0.025, 90)

    fast, model = lowered(whole, *X, inputs=2)
    assert [call for call in ops(fast) if call not in _EDGES] == [f"pykernels.{op}"]
    assert ops(fast).count("pykernels.dequantize_per_tensor") == 1
    assert steps_apart(fast, model, 0.025, torch.randn(3, *X), torch.randn(3, *X)) <= 1.001


def test_squeeze_excite_multiplies_a_gate_per_channel() -> None:
    def forward(m, x):
        x = q(x, 0.03, 110)
        gate = q(x.mean((2, 3), keepdim=True), 0.01, 100)
        return q(gate * x, 0.02, 120)

    fast, model = lowered(forward, *X)
    assert what(fast) == ["mean + quantize", "mul + quantize"]
    assert steps_apart(fast, model, 0.02, torch.randn(3, *X)) <= 6, "a step of the gate's grid is some of the product's"


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.flatten(1),
        lambda x: x.view(x.shape[0], -1),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x[:, 1:, ::2],
        lambda x: x.chunk(3, 1)[1],
        lambda x: x.reshape(-1, 3, 2, 6, 12).transpose(2, 3).contiguous(),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: F.pad(x, (1, 2, 0, 1)),
        lambda x: torch.cat([x, x.flip(2)], 1),
    ],
)
def test_moves_act_on_the_bytes_and_change_no_value(move) -> None:
    fast, model = lowered(lambda m, x: q(move(q(x, 0.02, 128)), 0.02, 128), *X)
    called = ops(fast)
    assert called.count("pykernels.quantize_per_tensor") == called.count("pykernels.dequantize_per_tensor") == 1
    assert called[0] == "pykernels.quantize_per_tensor" or "sym_size" in called[0]
    assert steps_apart(fast, model, 0.02, torch.randn(3, *X)) <= 1e-3


def test_signed_bytes_are_upsampled_as_bytes() -> None:
    def forward(m, x):
        return q(F.interpolate(q(x, 0.02, 3, -128, 127), scale_factor=2, mode="nearest"), 0.02, 3, -128, 127)

    fast, model = lowered(forward, *X)
    assert ops(fast).count("pykernels.upsample_nearest2d") == 1 and fast.report().conversions == 2
    assert steps_apart(fast, model, 0.02, torch.randn(3, *X)) <= 1e-3


@pytest.mark.parametrize("low", [0, -128])
def test_a_constant_may_be_an_8_bit_operand(low: int) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer(
                "codes", torch.randint(low, low + 256, (1, *X)).to(torch.uint8 if low == 0 else torch.int8)
            )

        def forward(self) -> torch.Tensor:
            return quantized.dequantize_per_tensor(self.codes, 0.01, low + 99, low, low + 255, self.codes.dtype)

    model = Function(lambda m, x: q(q(x, 0.03, 110) + m.constant(), 0.04, 100), constant=Constant()).eval()
    x = torch.randn(1, *X)
    fast = pk.optimize(torch.export.export(model, (x,)).module(), x, "int8", dynamic_batch=False)
    assert steps_apart(fast, model, 0.04, x) <= 1.001


def test_a_padding_of_channels_too_is_not_taken_for_one_of_the_line() -> None:
    def forward(m, x):
        return F.conv1d(F.pad(q(x, 0.02, 128), (1, 2, 0, 1)), m.w(), None)

    fast, model = lowered(forward, 3, 12, w=weight((8, 4, 3)))
    close(fast, model, torch.randn(3, 3, 12))


def test_channel_shuffle_stays_channels_last() -> None:
    def forward(m, x):
        y = F.conv2d(q(x, 0.02, 128), m.w(), None, 1, 1)
        y = q(y, 0.05, 128)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return q(F.conv2d(y, m.v(), None, 1, 1), 0.2, 128)

    fast, model = lowered(forward, *X, w=weight((8, 3, 3, 3)), v=weight((4, 8, 3, 3)))
    steps = steps_apart(fast, model, 0.2, torch.randn(3, *X))
    assert steps <= 2.001, "a step of the first layer's grid may move the second's"
    shuffled = next(n for n in reversed(fast.program.graph.nodes) if str(n.target) == "aten.permute.default")
    assert list(shuffled.args[1]) == [0, 3, 1, 2]


def test_a_quantize_moves_before_what_it_commutes_with() -> None:
    def forward(m, x):
        y = F.max_pool2d(F.relu(F.conv2d(q(x, 0.02, 128), m.w())), 2)
        return q(y.flatten(1), 0.05, 0)

    fast, model = lowered(forward, *X, w=weight((8, 3, 3, 3)))
    assert what(fast) == ["conv2d + relu + quantize", "max_pool2d"]
    assert steps_apart(fast, model, 0.05, torch.randn(2, *X)) <= 1.001


def test_parts_without_an_8_bit_kernel_run_in_float_between_conversions() -> None:
    def forward(m, x):
        y = q(F.conv2d(q(x, 0.02, 128), m.w()), 0.05, 128)
        return q(F.layer_norm(y, y.shape[1:]), 0.03, 128)

    fast, model = lowered(forward, *X, w=weight((8, 3, 3, 3)))
    assert [entry.op for entry in fast.report().left] == ["layer_norm"]
    assert fast.report().conversions == 4, "in, around the norm, out"
    assert steps_apart(fast, model, 0.03, torch.randn(2, *X)) <= 4


def test_a_narrow_activation_range_is_clamped() -> None:
    fast, model = lowered(
        lambda m, x: q(F.conv2d(q(x, 0.02, 64, 0, 127), m.w()), 0.05, 64, 0, 127), *X, w=weight((8, 3, 3, 3))
    )
    assert steps_apart(fast, model, 0.05, 3 * torch.randn(2, *X)) <= 1.001


def test_a_quantized_network_is_int8_between_its_edges_and_bit_equal_everywhere() -> None:
    model = lively(Mixed(), *X)
    data = [torch.randn(8, *X) for _ in range(2)]
    fast = pk.optimize(model, torch.randn(1, *X), precision="int8", calibration=data)
    assert not fast.report().left and fast.report().conversions == 1
    assert not {"aten.dequantize", "pykernels.dequantize_per_tensor"} & set(ops(fast))
    x = torch.randn(5, *X)
    close(fast, model, x, tolerance=0.05)
    answers, before = [], torch.ops.pykernels._isa()
    from pykernels import _host

    try:
        for isa in [name for name, available in _host.isas().items() if available]:
            torch.ops.pykernels._set_isa(isa)
            answers.append(fast(x))
    finally:
        torch.ops.pykernels._set_isa(before)
    assert len(answers) > 1 and all(torch.equal(answers[0], other) for other in answers)


def test_without_calibration_the_report_says_so() -> None:
    fast = pk.optimize(lively(Mixed(), *X), torch.randn(2, *X), precision="int8")
    assert any("calibration" in note for note in fast.report().notes)


def test_a_graph_of_the_x86_quantizer_is_lowered_as_well() -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
            self.conv2, self.bn2, self.pool = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.MaxPool2d(2)
            self.mean, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.pool(self.relu(self.bn1(self.conv1(x))))
            return self.head(self.mean(self.relu(self.bn2(self.conv2(x)) + x)).flatten(1))

    model, x = lively(Residual(), *X), torch.randn(4, *X)
    exported = torch.export.export(model, (x,), strict=True).module()
    prepared = prepare_pt2e(exported, X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()))
    prepared(x)
    simulated = convert_pt2e(prepared)
    fast = pk.optimize(simulated, x, precision="int8", dynamic_batch=False)
    assert [entry.op for entry in fast.report().fused] == [
        "qconv2d",
        "max_pool2d",
        "qconv2d",
        "qadaptive_avg_pool2d",
        "int8_linear",
    ]
    assert not fast.report().left and fast.report().conversions == 1
    close(fast, simulated, x, tolerance=0.02)
    close(fast, model, x, tolerance=0.2)


def test_a_network_trained_with_fake_quantization_is_lowered_like_any_other() -> None:
    from pykernels.quantization.training import convert_qat, prepare_qat

    model, x = lively(Mixed(), *X), torch.randn(8, *X)
    prepared = prepare_qat(model, (x,))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(torch.randn(8, *X)).square().mean().backward()
        optimizer.step()
    simulated = convert_qat(prepared)
    fast = pk.optimize(simulated, x, precision="int8")
    assert not fast.report().left and fast.report().conversions == 1
    close(fast, simulated, torch.randn(3, *X), tolerance=0.02)


def test_a_quantized_graph_compiles_with_the_dynamo_backend() -> None:
    from pykernels.network.dynamo import pykernels as backend

    model, x = lively(Mixed(), *X), torch.randn(4, *X)
    simulated = recipes.quantize(model, (x,), [x])
    reports: list = []
    fast = torch.compile(simulated, backend=backend, options={"on_report": reports.append})
    close(fast, simulated, x, tolerance=0.02)
    assert {entry.op for entry in reports[0].fused} >= {"qconv2d", "int8_linear", "qmul"}
