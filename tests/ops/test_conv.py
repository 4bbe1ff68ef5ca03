"""conv2d and qconv2d over packed weights: every kind of convolution, layout and isa against the oracle."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pykernels import reference
from pykernels.ops import conv

ops = torch.ops.pykernels

LAYOUTS = [torch.contiguous_format, torch.channels_last]
CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


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
    "1x1 strided, odd channels": Conv(10, 6, (1, 1), (2, 2)),
    "first layer": Conv(3, 16, (7, 7), (2, 2), (3, 3, 3, 3)),
    "one channel": Conv(1, 5, (3, 3)),
    "3x3": Conv(16, 32, (3, 3), padding=(1, 1, 1, 1)),
    "asymmetric padding": Conv(8, 8, (3, 3), padding=(2, 0, 0, 1)),
    "dilated": Conv(8, 24, (3, 3), (2, 1), (2, 2, 2, 2), (2, 3)),
    "1-D": Conv(7, 9, (1, 3), (1, 2), (1, 1, 0, 0)),
    "grouped": Conv(12, 24, (3, 3), padding=(1, 1, 1, 1), groups=3),
    "grouped, odd channels": Conv(6, 4, (3, 3), groups=2),
    "depthwise": Conv(32, 32, (3, 3), padding=(1, 1, 1, 1), groups=32),
    "depthwise, odd channels": Conv(21, 21, (5, 5), (2, 2), (2, 2, 2, 2), groups=21),
    "depthwise, dilated": Conv(16, 16, (3, 3), dilation=(2, 2), groups=16),
    "depthwise with multiplier": Conv(6, 12, (3, 3), padding=(1, 1, 1, 1), groups=6),
}


def integers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape).to(dtype)


def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, c: Conv, *rest) -> torch.Tensor:
    return ops.conv2d(x, ops.conv2d_pack(w, b, c.groups), c.out, list(c.kernel), *c.geometry, *rest)


def run_quantized(x: torch.Tensor, w, scale, b, c: Conv, *rest) -> torch.Tensor:
    return ops.qconv2d(x, ops.qconv2d_pack(w, scale, b, c.groups), c.out, list(c.kernel), *c.geometry, *rest)


def weights(c: Conv, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(c.out, c.channels // c.groups, *c.kernel).to(dtype), torch.randn(c.out)


def int8_weights(c: Conv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (c.out, c.channels // c.groups, *c.kernel)
    return integers(shape, torch.int8), torch.rand(c.out) * 0.01 + 0.001, torch.randn(c.out)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CONVS)
class TestEveryKind:
    @pytest.mark.parametrize("dtype", list(CLOSE))
    def test_float(self, isa: str, name: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
        c = CONVS[name]
        x, (w, b) = torch.randn(2, c.channels, 13, 15).to(dtype).to(memory_format=layout), weights(c, dtype)
        y = run(x, w, b, c, "relu")
        torch.testing.assert_close(
            y, reference.conv2d(x, w, b, *c.geometry, "relu"), check_stride=False, **CLOSE[dtype]
        )
        assert y.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
    def test_quantized(self, isa: str, name: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
        c = CONVS[name]
        x, (w, scale, b) = integers((2, c.channels, 13, 15), dtype).to(memory_format=layout), int8_weights(c)
        arguments = (0.02, 11, 0.3, 5, dtype, "relu6")
        y = run_quantized(x, w, scale, b, c, *arguments)
        assert torch.equal(y, reference.qconv2d(x, w, scale, b, *c.geometry, *arguments))
        assert y.is_contiguous(memory_format=torch.channels_last)


@st.composite
def convs(draw: st.DrawFn) -> tuple[Conv, tuple[int, int, int]]:
    groups = draw(st.integers(1, 4))
    depthwise = draw(st.booleans())
    channels = groups * draw(st.integers(1, 9)) if not depthwise else draw(st.integers(1, 40))
    c = Conv(
        channels,
        channels if depthwise else groups * draw(st.integers(1, 20)),
        (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        tuple(draw(st.integers(0, 3)) for _ in range(4)),
        (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        channels if depthwise else groups,
    )
    return c, (draw(st.integers(1, 3)), draw(st.integers(7, 16)), draw(st.integers(7, 16)))


@given(convs(), st.sampled_from([torch.uint8, torch.int8]), st.sampled_from(LAYOUTS))
def test_any_geometry_is_exact(isa: str, drawn, dtype: torch.dtype, layout: torch.memory_format) -> None:
    c, (n, h, w) = drawn
    x, (weight, scale, b) = integers((n, c.channels, h, w), dtype).to(memory_format=layout), int8_weights(c)
    arguments = (0.02, -3 if dtype == torch.int8 else 200, 0.4, 100, torch.uint8)
    y = run_quantized(x, weight, scale, b, c, *arguments)
    assert torch.equal(y, reference.qconv2d(x, weight, scale, b, *c.geometry, *arguments))


@given(convs(), st.sampled_from(LAYOUTS))
def test_any_geometry_in_fp32(isa: str, drawn, layout: torch.memory_format) -> None:
    c, (n, h, w) = drawn
    x, (weight, b) = torch.randn(n, c.channels, h, w).to(memory_format=layout), weights(c)
    y = run(x, weight, b, c)
    torch.testing.assert_close(
        y, reference.conv2d(x, weight, b, *c.geometry), check_stride=False, **CLOSE[torch.float32]
    )


@st.composite
def depthwises(draw: st.DrawFn) -> tuple[Conv, tuple[int, int, int]]:
    """Whole and broken panels, lines with and without an interior, padding larger than the image, many taps."""
    channels = draw(st.sampled_from([16, 32, 48]) | st.integers(1, 40))
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (5, 5), (1, 3), (2, 4), (9, 8)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (1, 2), (3, 1)]))
    padding = [draw(st.integers(0, 3) | st.integers(0, 20)) for _ in range(4)]
    size = [draw(st.sampled_from([1, 2]) | st.integers(1, most)) for most in (9, 80)]
    for d in range(2):
        reach = dilation[d] * (kernel[d] - 1) + 1
        size[d] = max(size[d], reach - padding[2 - 2 * d] - padding[3 - 2 * d])
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Conv(channels, channels, kernel, stride, tuple(padding), dilation, channels), (
        draw(st.integers(1, 2)),
        *size,
    )


@given(depthwises(), st.sampled_from([torch.uint8, torch.int8]))
def test_any_depthwise_is_exact(isa: str, drawn, dtype: torch.dtype) -> None:
    c, (n, h, w) = drawn
    x = integers((n, c.channels, h, w), dtype).contiguous(memory_format=torch.channels_last)
    weight, scale, b = int8_weights(c)
    arguments = (0.02, -3 if dtype == torch.int8 else 200, 0.4, 100, torch.uint8)
    y = run_quantized(x, weight, scale, b, c, *arguments)
    assert torch.equal(y, reference.qconv2d(x, weight, scale, b, *c.geometry, *arguments))


@given(depthwises(), st.sampled_from(list(CLOSE)), st.sampled_from(["none", "relu6", "hardswish"]))
def test_any_depthwise_in_floats(isa: str, drawn, dtype: torch.dtype, activation: str) -> None:
    c, (n, h, w) = drawn
    x = torch.randn(n, c.channels, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, b = weights(c, dtype)
    y = run(x, weight, b, c, activation)
    expected = reference.conv2d(x, weight, b, *c.geometry, activation)
    torch.testing.assert_close(y, expected, check_stride=False, **CLOSE[dtype])


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("size", [(2, 64, 40, 70), (1, 160, 7, 70), (3, 40, 5, 100)])
def test_threads_share_a_depthwise_convolution(isa: str, size: tuple[int, ...], threads: int) -> None:
    c = Conv(size[1], size[1], (3, 3), padding=(1, 1, 1, 1), groups=size[1])
    x, (weight, scale, b) = integers(size, torch.uint8), int8_weights(c)
    arguments = (0.02, 200, 0.4, 100, torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, real = run_quantized(x, weight, scale, b, c, *arguments), run(x.float(), weight.float(), b, c)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, reference.qconv2d(x, weight, scale, b, *c.geometry, *arguments))
    expected = reference.conv2d(x.float(), weight.float(), b, *c.geometry)
    torch.testing.assert_close(real, expected, check_stride=False, rtol=1e-5, atol=1.0)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("residual", [torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["3x3", "depthwise, odd channels"])
def test_quantized_residuals_and_outputs(
    isa: str, name: str, out: torch.dtype, residual: torch.dtype, order: str
) -> None:
    c = CONVS[name]
    x, (w, scale, b) = integers((1, c.channels, 9, 9), torch.uint8), int8_weights(c)
    shape = reference.qconv2d(x, w, scale, b, *c.geometry, 0.02, 3, None, 0, torch.float32).shape
    r = torch.randn(shape).to(residual) if residual.is_floating_point else integers(shape, residual)
    requantized = (0.3, 7) if out in (torch.uint8, torch.int8) else (None, 0)
    arguments = (0.02, 3, *requantized, out, "relu", r, 0.05, 4, order)
    y = run_quantized(x, w, scale, b, c, *arguments)
    assert torch.equal(y, reference.qconv2d(x, w, scale, b, *c.geometry, *arguments))


@pytest.mark.parametrize("size", [(7, 7), (2, 30), (1, 1)], ids=str)
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (3, 4, 5, 2)], ids=["same", "wide"])
@pytest.mark.parametrize("out", [48, 21])
def test_threads_share_a_padded_convolution(isa: str, size: tuple[int, int], padding: tuple, out: int) -> None:
    c = Conv(20, out, (3, 3), padding=padding)
    for dtype in CLOSE:
        x, (w, b) = torch.randn(2, 20, *size).to(dtype), weights(c, dtype)
        r = torch.randn_like(reference.conv2d(x, w, b, *c.geometry))
        arguments = ("relu6", r, "before")
        found, before = [], torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                found.append(run(x, w * 0.1, b, c, *arguments))
            finally:
                torch.set_num_threads(before)
        expected = reference.conv2d(x, w * 0.1, b, *c.geometry, *arguments)
        torch.testing.assert_close(found[0], expected, check_stride=False, **CLOSE[dtype])
        assert torch.equal(*found)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("order", ["before", "after"])
def test_float_residual_and_activation(isa: str, activation: str, order: str) -> None:
    c = CONVS["3x3"]
    x, (w, b), r = torch.randn(2, 16, 6, 7), weights(c), torch.randn(2, 32, 6, 7)
    y = run(x, w * 0.1, b, c, activation, r, order)
    expected = reference.conv2d(x, w * 0.1, b, *c.geometry, activation, r, order)
    torch.testing.assert_close(y, expected, check_stride=False, **CLOSE[torch.float32])


def test_strided_and_expanded_inputs(isa: str) -> None:
    c = CONVS["3x3"]
    w, scale, b = int8_weights(c)
    arguments = (0.02, 3, 0.3, 7, torch.uint8)
    for x in (
        integers((4, 32, 9, 20), torch.uint8)[::2, ::2, :, 1::2],
        integers((1, 16, 9, 1), torch.uint8).expand(2, 16, 9, 9),
        integers((2, 9, 16, 9), torch.uint8).transpose(1, 2),
    ):
        expected = reference.qconv2d(x, w, scale, b, *c.geometry, *arguments)
        assert torch.equal(run_quantized(x, w, scale, b, c, *arguments), expected)


def test_an_empty_batch(isa: str) -> None:
    c = CONVS["3x3"]
    assert run(torch.empty(0, 16, 9, 9), *weights(c), c).shape == (0, 32, 9, 9)


def test_nan_reaches_only_the_pixels_that_see_it(isa: str) -> None:
    c = Conv(3, 4, (1, 1))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(1, 3, 4, 5).to(dtype)
        x[0, 1, 2, 3] = torch.nan
        y = run(x, *weights(c, dtype), c)
        assert y[0, :, 2, 3].isnan().all() and y.isnan().sum() == 4


class TestBadArguments:
    def test_are_named(self) -> None:
        c = CONVS["3x3"]
        x, (w, b) = torch.randn(1, 16, 8, 8), weights(c)
        packed = ops.conv2d_pack(w, b)
        g = (32, [3, 3], [1, 1], [0, 0, 0, 0], [1, 1], 1)

        def call(message: str, at: int, value: object, data: torch.Tensor = x) -> None:
            arguments = list(g)
            if at >= 0:
                arguments[at] = value
            with pytest.raises(RuntimeError, match=message):
                ops.conv2d(data, packed, *arguments)

        call("out_channels is 31", 0, 31)
        call("kernel_size is 5x3", 1, [5, 3])
        call("stride must be at least 1", 2, [0, 1])
        call("padding must be .left, right, top, bottom", 3, [1, 1])
        call("padding must lie in", 3, [-1, 0, 0, 0])
        call("dilation must be at least 1", 4, [1, 0])
        call("groups is 2, but packed was made for 1", 5, 2)
        call("groups is 3, which does not divide", 5, 3)
        call("x must have 4 dimensions", -1, None, x[0])
        call("x has 8 channels", -1, None, x[:, :8])
        call("smaller than kernel_size", -1, None, x[:, :, :2])
        call("x must be float32, bfloat16 or float16, not float64", -1, None, x.double())
        with pytest.raises(RuntimeError, match="packed holds convolution weights"):
            ops.linear(torch.randn(1, 16), packed, 32)

    def test_of_packing(self) -> None:
        w = torch.randn(4, 3, 3, 3)
        with pytest.raises(RuntimeError, match="weight must have 4 dimensions"):
            ops.conv2d_pack(w[0])
        with pytest.raises(RuntimeError, match="groups is 3, which does not divide"):
            ops.conv2d_pack(w, None, 3)
        with pytest.raises(RuntimeError, match="weight must not be empty"):
            ops.conv2d_pack(w[:, :0])

    def test_of_quantization(self) -> None:
        c = CONVS["3x3"]
        x, (w, scale, b) = integers((1, 16, 8, 8), torch.uint8), int8_weights(c)
        with pytest.raises(RuntimeError, match="x_scale must be a positive number"):
            run_quantized(x, w, scale, b, c, float("nan"), 0, 0.1, 0, torch.uint8)
        with pytest.raises(RuntimeError, match=r"x_zero_point must lie in \[0, 255\]"):
            run_quantized(x, w, scale, b, c, 0.1, -1, 0.1, 0, torch.uint8)
        with pytest.raises(RuntimeError, match="out_scale is required"):
            run_quantized(x, w, scale, b, c, 0.1, 0, None, 0, torch.uint8)
        with pytest.raises(RuntimeError, match="residual must have the output's shape"):
            run_quantized(x, w, scale, b, c, 0.1, 0, 0.1, 0, torch.uint8, "none", x)


class TestPublicFunctions:
    def test_conv2d_and_qconv2d_take_numbers_and_pairs(self) -> None:
        c = CONVS["3x3"]
        x, (w, b) = torch.randn(1, 16, 8, 8), weights(c)
        y = conv.conv2d(x, conv.conv2d_pack(w, b), 32, 3, padding=(1, 1), activation="relu")
        expected = reference.conv2d(x, w, b, *c.geometry, "relu")
        torch.testing.assert_close(y, expected, check_stride=False, **CLOSE[torch.float32])
        q, (wq, scale, b) = integers(x.shape, torch.uint8), int8_weights(c)
        y = conv.qconv2d(q, conv.qconv2d_pack(wq, scale, b), 32, 3, padding=1, x_scale=0.02, out_scale=0.3)
        assert torch.equal(y, reference.qconv2d(q, wq, scale, b, *c.geometry, 0.02, 0, 0.3))

    def test_conv1d_is_torch_s(self) -> None:
        x, w, b = torch.randn(2, 7, 30), torch.randn(9, 7, 5), torch.randn(9)
        y = conv.conv1d(x, conv.conv2d_pack(w.unsqueeze(2), b), 9, 5, stride=2, padding=3, dilation=2)
        torch.testing.assert_close(y, torch.nn.functional.conv1d(x, w, b, 2, 3, 2), **CLOSE[torch.float32])
