"""qconv2d, conv2d and conv_bn_act as CUDA tensors get them, interpreted: the oracle's bits, and its errors."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from interpreter import Interpreter, on_machine

from pykernels import reference
from pykernels.cuda.triton import conv, conv_shape, pack

ops = torch.ops.pykernels
SM_80, SM_90 = (80, 4), (90, 4)
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Conv(NamedTuple):
    channels: int
    out: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


CONVS = {
    "1x1": Conv(16, 48, (1, 1)),
    "1x1 padded": Conv(10, 9, (1, 1), padding=(1, 0, 0, 1)),
    "1x1 strided, odd channels": Conv(10, 6, (1, 1), (2, 2)),
    "first layer": Conv(3, 16, (7, 7), (2, 2), (3, 3, 3, 3)),
    "one channel": Conv(1, 5, (3, 3)),
    "runs of 16 bytes, no whole words a line": Conv(3, 70, (3, 3), (1, 2), (0, 2, 1, 0), (2, 1)),
    "runs of 64 bytes": Conv(5, 20, (3, 9), padding=(4, 4, 1, 1)),
    "runs of 128 bytes": Conv(11, 6, (2, 9), (2, 3), (9, 9, 0, 1)),
    "a whole tap a tile": Conv(64, 32, (3, 3), padding=(1, 1, 1, 1)),
    "two tiles a tap": Conv(256, 20, (2, 2), padding=(1, 1, 1, 1)),
    "asymmetric padding": Conv(48, 8, (3, 3), padding=(2, 0, 0, 1)),
    "dilated": Conv(16, 24, (3, 3), (2, 1), (2, 2, 2, 2), (2, 3)),
    "dilated, few channels": Conv(8, 24, (3, 3), (2, 1), (2, 2, 2, 2), (2, 3)),
    "1-D": Conv(7, 9, (1, 3), (1, 2), (1, 1, 0, 0)),
    "grouped": Conv(48, 24, (3, 3), padding=(1, 1, 1, 1), groups=3),
    "grouped, odd channels": Conv(6, 4, (3, 3), groups=2),
    "depthwise": Conv(32, 32, (3, 3), padding=(1, 1, 1, 1), groups=32),
    "depthwise, odd channels": Conv(21, 21, (5, 5), (2, 2), (2, 2, 2, 2), groups=21),
    "depthwise, dilated": Conv(40, 40, (3, 3), dilation=(2, 2), padding=(2, 1, 0, 3), groups=40),
    "depthwise, a row": Conv(19, 19, (1, 9), padding=(4, 4, 0, 0), groups=19),
    "depthwise with multiplier": Conv(6, 12, (3, 3), padding=(1, 1, 1, 1), groups=6),
}


def integers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape).to(dtype)


def int8_weights(c: Conv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (c.out, c.channels // c.groups, *c.kernel)
    return integers(shape, torch.int8), torch.rand(c.out) * 0.01 + 0.001, torch.randn(c.out)


def run(interpret: Interpreter, x, w, scale, b, c: Conv, *rest, machine=SM_90) -> torch.Tensor:
    packed = pack.qconv2d_pack(w, scale, b, c.groups)
    y = interpret.apply(on_machine, machine, "conv", "qconv2d", x, packed, c.out, list(c.kernel), *c.geometry, *rest)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("name", CONVS)
def test_every_kind_is_exact(interpret: Interpreter, name: str, dtype: torch.dtype) -> None:
    """uint8 contiguous with the zero point that loads fill in for nothing, int8 channels_last with another."""
    c, unsigned = CONVS[name], dtype == torch.uint8
    x, (w, scale, b) = integers((2, c.channels, 7, 9), dtype), int8_weights(c)
    x = x if unsigned else x.contiguous(memory_format=torch.channels_last)
    for zero_point, machine in ((0, SM_90), (11, SM_80)) if unsigned else ((0, SM_80), (-3, SM_90)):
        arguments = (0.02, zero_point, 0.3, 5, dtype, "relu6")
        y = run(interpret, x, w, scale, b, c, *arguments, machine=machine)
        assert torch.equal(y, reference.qconv2d(x, w, scale, b, *c.geometry, *arguments))


@pytest.mark.parametrize("residual", [torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["a whole tap a tile", "1x1", "depthwise, odd channels", "grouped", "first layer"])
def test_residuals_and_outputs(interpret: Interpreter, name: str, residual: torch.dtype) -> None:
    c = CONVS[name]
    x, (w, scale, b) = integers((1, c.channels, 9, 9), torch.uint8), int8_weights(c)
    shape = reference.qconv2d(x, w, scale, b, *c.geometry, 0.02, 3, None, 0, torch.float32).shape
    r = torch.randn(shape).to(residual) if residual.is_floating_point else integers(shape, residual)
    for out, order in (
        (torch.uint8, "before"),
        (torch.int8, "after"),
        (torch.float32, "after"),
        (torch.half, "before"),
    ):
        requantized = (0.3, 7) if out in (torch.uint8, torch.int8) else (None, 0)
        arguments = (0.02, 3, *requantized, out, "relu", r, 0.05, 4, order)
        y = run(interpret, x, w, scale, b, c, *arguments)
        assert torch.equal(y, reference.qconv2d(x, w, scale, b, *c.geometry, *arguments)), (out, order)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("name", ["asymmetric padding", "depthwise"])
def test_activations_make_the_cpu_s_bits(interpret: Interpreter, name: str, activation: str) -> None:
    c = CONVS[name]
    x, (w, scale, b) = integers((1, c.channels, 6, 7), torch.uint8), int8_weights(c)
    for out, out_scale in ((torch.uint8, 0.02), (torch.bfloat16, None), (torch.float16, None)):
        arguments = (0.001, 128, out_scale, 0, out, activation)
        packed = ops.qconv2d_pack(w, scale, b, c.groups)
        expected = ops.qconv2d(x, packed, c.out, list(c.kernel), *c.geometry, *arguments)
        assert torch.equal(run(interpret, x, w, scale, b, c, *arguments), expected)


def test_programs_that_share_a_tile(interpret: Interpreter) -> None:
    c = Conv(256, 40, (3, 3), padding=(1, 1, 1, 1))
    x, (w, scale, b) = integers((1, 256, 5, 5), torch.uint8), int8_weights(c)
    for machine in ((80, 32), (90, 32)):
        shape = conv_shape.conv_shape("qconv2d", x, c.out, c.kernel, *c.geometry)
        assert conv.conv_by_formula(*machine, shape, 256).split > 1
        arguments = (0.02, 7, 0.3, 5, torch.uint8)
        y = run(interpret, x, w, scale, b, c, *arguments, machine=machine)
        assert torch.equal(y, reference.qconv2d(x, w, scale, b, *c.geometry, *arguments))


@pytest.mark.parametrize("n", [16, 3])
def test_strided_expanded_and_misaligned_inputs(interpret: Interpreter, n: int) -> None:
    c = Conv(n, 8, (3, 3), padding=(1, 1, 1, 1))
    w, scale, b = int8_weights(c)
    shifted = integers((1 + 9 * 9 * n,), torch.uint8)[1:].view(1, 9, 9, n).permute(0, 3, 1, 2)
    for x in (
        integers((4, 2 * n, 9, 20), torch.uint8)[::2, ::2, :, 1::2],
        integers((1, n, 9, 1), torch.uint8).expand(2, n, 9, 9),
        integers((2, 9, n, 9), torch.uint8).transpose(1, 2),
        shifted,
    ):
        expected = reference.qconv2d(x, w, scale, b, *c.geometry, 0.02, 3, 0.3, 7)
        assert torch.equal(run(interpret, x, w, scale, b, c, 0.02, 3, 0.3, 7, torch.uint8), expected)


@pytest.mark.parametrize("name", ["1x1", "a whole tap a tile", "depthwise", "first layer"])
def test_an_empty_batch(interpret: Interpreter, name: str) -> None:
    c = CONVS[name]
    x, (w, scale, b) = integers((0, c.channels, 9, 9), torch.uint8), int8_weights(c)
    assert run(interpret, x, w, scale, b, c, 0.02, 3, 0.3, 7, torch.uint8).shape[:2] == (0, c.out)


class TestFloats:
    def conv2d(self, interpret: Interpreter, x, w, b, c: Conv, *rest) -> torch.Tensor:
        packed = pack.conv2d_pack(w, b, c.groups)
        y = interpret.answer("conv", "conv2d", x, packed, c.out, list(c.kernel), *c.geometry, *rest)
        fake = torch.empty(y.shape, memory_format=torch.channels_last)
        assert y.stride() == fake.stride()
        return y

    @pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
    @pytest.mark.parametrize("name", CONVS)
    def test_every_kind(self, interpret: Interpreter, name: str, dtype: torch.dtype) -> None:
        c, close = CONVS[name], {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
        x, b = torch.randn(2, c.channels, 9, 11).to(dtype), torch.randn(c.out)
        w = (torch.randn(c.out, c.channels // c.groups, *c.kernel) * 0.1).to(dtype)
        y = self.conv2d(interpret, x, w, b, c, "relu")
        expected = reference.conv2d(x, w, b, *c.geometry, "relu")
        torch.testing.assert_close(y, expected, check_stride=False, **close)
        r = torch.randn(expected.shape)
        for order in ("before", "after"):
            y = self.conv2d(interpret, x, w, b, c, "hardswish", r, order)
            expected = reference.conv2d(x, w, b, *c.geometry, "hardswish", r, order)
            torch.testing.assert_close(y, expected, check_stride=False, **close)

    def test_sizes_of_one_and_empty_batches(self, interpret: Interpreter) -> None:
        for c, size in (
            (Conv(4, 1, (3, 3)), (2, 4, 3, 3)),
            (Conv(1, 3, (1, 1)), (1, 1, 1, 5)),
            (CONVS["1x1"], (0, 16, 5, 5)),
        ):
            x, w = torch.randn(size), torch.randn(c.out, c.channels, *c.kernel)
            y = self.conv2d(interpret, x, w, None, c, "none")
            torch.testing.assert_close(y, reference.conv2d(x, w, None, *c.geometry), check_stride=False)

    def test_what_cudnn_finishes_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With stand-ins for what only a GPU has: which calls are left to it, with which arguments."""
        calls = []

        def convolved(x, weight, bias, stride, padding, dilation, groups):
            calls.append("relu")
            return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

        def added(x, weight, z, alpha, bias, stride, padding, dilation, groups):
            calls.append("add_relu")
            return (torch.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

        monkeypatch.setattr(conv, "_cudnn_finishes", lambda x, s: True)
        monkeypatch.setattr(torch, "cudnn_convolution_relu", convolved)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", added)
        c = Conv(6, 8, (3, 3), (2, 1), (1, 0, 2, 1))
        x, w, b = torch.randn(2, 6, 9, 8), torch.randn(8, 6, 3, 3), torch.randn(8)
        packed, geometry = pack.conv2d_pack(w, b), (c.out, list(c.kernel), *c.geometry)
        y = conv.conv2d(x, packed, *geometry, "relu")
        expected = reference.conv2d(x, w, b, *c.geometry, "relu")
        torch.testing.assert_close(y, expected, check_stride=False, rtol=1e-4, atol=1e-4)
        r = torch.randn(expected.shape)
        y = conv.conv2d(x, packed, *geometry, "relu", r)
        expected = reference.conv2d(x, w, b, *c.geometry, "relu", r)
        torch.testing.assert_close(y, expected, check_stride=False, rtol=1e-4, atol=1e-4)
        assert calls == ["relu", "add_relu"]
        # A pass of ours follows all others, which needs a GPU or the interpreter.
        for rest in (("relu", r, "after"), ("relu", r.bfloat16()), ("silu",), ("none",)):
            monkeypatch.setattr(conv, "finish_floats", lambda *_: calls.append("ours"))
            conv.conv2d(x, packed, *geometry, *rest)
        assert calls[2:] == ["ours"] * 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("given", [True, False])
    def test_conv_bn_act(self, interpret: Interpreter, dtype: torch.dtype, given: bool) -> None:
        c = Conv(6, 4, (3, 3), (2, 1), (1, 0, 2, 1), groups=2)
        x, w = torch.randn(2, 6, 9, 8).to(dtype), (torch.randn(4, 3, 3, 3) * 0.3).to(dtype)
        mean, var = torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4)
        bias, gamma, beta = (torch.randn(4), torch.rand(4) + 0.5, torch.randn(4)) if given else (None, None, None)
        arguments = (bias, mean, var, gamma, beta, 1e-3, *c.geometry)
        expected = reference.conv_bn_act(x.float(), w.float(), *arguments)
        close = {"rtol": 3 * CLOSE[dtype], "atol": 3 * CLOSE[dtype]}
        y = interpret.answer("conv", "conv_bn_act", x, w, *arguments)
        torch.testing.assert_close(y.float(), expected, check_stride=False, **close)
        r = torch.randn(expected.shape).to(dtype)
        y = interpret.answer("conv", "conv_bn_act", x, w, *arguments, "silu", r, "after")
        expected = reference.conv_bn_act(x.float(), w.float(), *arguments, "silu", r, "after")
        torch.testing.assert_close(y.float(), expected, check_stride=False, **close)


class TestBadArguments:
    def test_of_the_geometry(self) -> None:
        x, w = torch.randn(1, 16, 8, 8), torch.randn(32, 16, 3, 3)
        packed = pack.conv2d_pack(w)
        g = (32, [3, 3], [1, 1], [0, 0, 0, 0], [1, 1], 1)

        def call(message: str, at: int, value: object, data: torch.Tensor = x) -> None:
            arguments = list(g)
            if at >= 0:
                arguments[at] = value
            with pytest.raises(RuntimeError, match=message):
                conv.conv2d(data, packed, *arguments)

        call(r"packed is refused: it has \d+ bytes", 0, 31)
        call(r"packed is refused: it has \d+ bytes, but .* kernel 5x3", 1, [5, 3])
        call("stride must be at least 1", 2, [0, 1])
        call("padding must be .left, right, top, bottom", 3, [1, 1])
        call("padding must lie in", 3, [-1, 0, 0, 0])
        call("dilation must be at least 1", 4, [1, 0])
        call("packed is refused: .* 2 groups", 5, 2)
        call("groups is 3, which does not divide the 16 channels of x", 5, 3)
        call("x must have 4 dimensions", -1, None, x[0])
        call("smaller than kernel_size", -1, None, x[:, :, :2])
        call("x must be float32, bfloat16 or float16, not float64", -1, None, x.double())
        with pytest.raises(RuntimeError, match="packed on the CPU"):
            conv.conv2d(x, ops.conv2d_pack(w), *g)

    def test_of_quantization(self) -> None:
        c = Conv(16, 32, (3, 3))
        x, (w, scale, b) = integers((1, 16, 8, 8), torch.uint8), int8_weights(c)
        packed = pack.qconv2d_pack(w, scale, b)

        def call(message: str, *rest: object, data: torch.Tensor = x) -> None:
            with pytest.raises(RuntimeError, match=message):
                conv.qconv2d(data, packed, 32, [3, 3], *c.geometry, *rest, *(None, 0, torch.uint8)[len(rest) - 2 :])

        call("x must be uint8 or int8, not float32", 0.1, 0, 0.1, data=x.float())
        call("x_scale must be a positive number", float("nan"), 0, 0.1)
        call(r"x_zero_point must lie in \[0, 255\]", 0.1, -1, 0.1)
        call("out_scale is required", 0.1, 0)
        call("residual must have the output's shape", 0.1, 0, 0.1, 0, torch.uint8, "none", x)
        r = torch.zeros(1, 32, 6, 6, dtype=torch.uint8)
        call("residual_scale must be", 0.1, 0, 0.1, 0, torch.uint8, "none", r, 0.0)
        call("residual_order must be", 0.1, 0, 0.1, 0, torch.uint8, "none", r, 1.0, 0, "between")
        call("residual must be .* not int32", 0.1, 0, 0.1, 0, torch.uint8, "none", r.int())
        call("activation must be one of", 0.1, 0, 0.1, 0, torch.uint8, "swish")

    def test_of_batch_norm(self) -> None:
        x, w, m = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.ones(6)
        g = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
        with pytest.raises(RuntimeError, match="weight must have x's dtype float32, not bfloat16"):
            conv.conv_bn_act(x, w.bfloat16(), None, m, m, None, None, 1e-5, *g)
        with pytest.raises(RuntimeError, match=r"running_mean must have shape \[6\]"):
            conv.conv_bn_act(x, w, None, m[:3], m, None, None, 1e-5, *g)
        with pytest.raises(RuntimeError, match="eps must not be negative"):
            conv.conv_bn_act(x, w, None, m, m, None, None, -1.0, *g)
        with pytest.raises(RuntimeError, match="x has 4 channels, but weight is for 3"):
            conv.conv_bn_act(x, w[:, :3], None, m, m, None, None, 1e-5, *g)
