"""The pool family against its oracle: every op, every isa, both layouts, odd sizes; integers and maxima to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykernels import reference
from pykernels.ops import pool

ops = torch.ops.pykernels
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BYTES = [torch.uint8, torch.int8]
every_isa = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_like(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    """Few distinct values (so that maxima tie), in one of the layouts that a pool reads in place or copies."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    stored = (n, c + 3, h + 1, w + 2)
    if dtype in BYTES:
        info = torch.iinfo(dtype)
        x = torch.randint(info.min, info.max + 1, stored, dtype=dtype, generator=generator)
    else:
        x = (torch.randint(-8, 9, stored, generator=generator) / 4).to(dtype)
    if "last" in layout:
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    x = x[:, 1 : c + 1, :h, 1 : w + 1]
    if layout == "contiguous":
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


LAYOUTS = ["contiguous", "channels_last", "rows sliced", "channels last sliced", "transposed"]
layouts = st.sampled_from(LAYOUTS)
sides = st.integers(1, 24) | st.integers(30, 70)


@st.composite
def inputs(draw: st.DrawFn, dtypes: list[torch.dtype]) -> torch.Tensor:
    channels = draw(st.integers(1, 20) | st.sampled_from([31, 33, 64, 70, 160, 300]))
    shape = (draw(st.integers(0, 3)), channels, draw(sides), draw(sides))
    return random_like(shape, draw(st.sampled_from(dtypes)), draw(layouts), draw(st.integers(0, 9)))


def output_fits(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """At least one window, and none without an element of the plane."""
    reach = dilation * (kernel - 1) + 1
    if size + 2 * padding < reach:
        return False
    starts = range(-padding, size, stride)
    return all(any(0 <= s + k * dilation < size for k in range(kernel)) for s in starts)


@st.composite
def windows(draw: st.DrawFn, size: torch.Size, dilated: bool) -> tuple[list[int], ...]:
    axes = []
    for length in size[2:]:
        kernel = draw(st.integers(1, min(9, length + 2)))
        dilation = draw(st.integers(1, 3)) if dilated else 1
        padding = draw(st.integers(0, kernel // 2))
        stride = draw(st.integers(1, 7))
        if not output_fits(length, kernel, stride, padding, dilation):
            kernel, stride, padding, dilation = 1, stride, 0, 1
        axes.append((kernel, stride, padding, dilation))
    return tuple(list(pair) for pair in zip(*axes, strict=True))


def keeps_layout(x: torch.Tensor, y: torch.Tensor) -> bool:
    last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    expected = torch.empty(y.shape, memory_format=torch.channels_last if last else torch.contiguous_format)
    return y.stride() == expected.stride()


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_average(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 sums in another order, bf16 rounded once more."""
    tolerance = 2e-6 if actual.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- maxima ----


@every_isa
@given(data=st.data())
def test_max_pool_is_the_oracle_to_the_bit(isa: str, data: st.DataObject) -> None:
    x = data.draw(inputs(FLOATS + BYTES))
    kernel, stride, padding, dilation = data.draw(windows(x.shape, dilated=True))
    arguments = kernel, stride, padding, dilation, data.draw(st.booleans())
    y, indices = ops.max_pool2d_with_indices(x, *arguments)
    expected, expected_indices = reference.max_pool2d_with_indices(x, *arguments)
    assert_same(y, expected)
    assert_same(indices, expected_indices)
    assert_same(ops.max_pool2d(x, *arguments), expected)
    assert keeps_layout(x, y) and keeps_layout(x, indices) and keeps_layout(x, ops.max_pool2d(x, *arguments))


@every_isa
@given(x=inputs(FLOATS + BYTES), size=st.tuples(sides, sides))
def test_adaptive_max_pool_is_the_oracle_to_the_bit(isa: str, x: torch.Tensor, size: tuple[int, int]) -> None:
    y, indices = ops.adaptive_max_pool2d_with_indices(x, size)
    expected, expected_indices = reference.adaptive_max_pool2d_with_indices(x, size)
    assert_same(y, expected)
    assert_same(indices, expected_indices)
    assert_same(ops.adaptive_max_pool2d(x, size), expected)
    assert keeps_layout(x, y) and keeps_layout(x, indices)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_infinities_and_signed_zeros_are_pooled_as_torch_does(isa: str, dtype: torch.dtype, layout: str) -> None:
    values = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -torch.inf, -torch.inf, -0.0, 0.0, 1.0])
    x = values[torch.randint(len(values), (2, 19, 23, 21))].to(dtype)
    x[0, :, :9] = -torch.inf
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    for arguments in (([3, 3], [2, 2], [1, 1], [1, 1], False), ([2, 2], [1, 1], [0, 1], [2, 1], True)):
        y, indices = ops.max_pool2d_with_indices(x, *arguments)
        expected, expected_indices = F.max_pool2d(x, *arguments, return_indices=True)
        assert_same(y, expected)
        assert_same(indices, expected_indices)
        assert_same(ops.max_pool2d(x, *arguments), expected)
    assert_same(ops.adaptive_max_pool2d(x, [5, 4]), F.adaptive_max_pool2d(x, [5, 4]))


def test_a_window_of_equals_yields_its_first_index(isa: str) -> None:
    _, indices = pool.max_pool2d_with_indices(torch.zeros(1, 2, 4, 4), 2)
    assert indices[0, 0].tolist() == [[0, 2], [8, 10]]


def test_max_unpool_takes_the_indices(isa: str) -> None:
    x = torch.randn(2, 5, 8, 8)
    y, indices = pool.max_pool2d_with_indices(x, 2)
    assert_same(F.max_unpool2d(y, indices, 2), F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2))


# ---- averages ----


@every_isa
@given(data=st.data())
def test_avg_pool_is_the_oracle(isa: str, data: st.DataObject) -> None:
    x = data.draw(inputs(FLOATS))
    kernel, stride, padding, _ = data.draw(windows(x.shape, dilated=False))
    divisor = data.draw(st.sampled_from([None, None, 1, 7, -3]))
    arguments = kernel, stride, padding, data.draw(st.booleans()), data.draw(st.booleans()), divisor
    y = ops.avg_pool2d(x, *arguments)
    assert_average(y, reference.avg_pool2d(x, *arguments))
    assert keeps_layout(x, y)


@every_isa
@given(x=inputs(FLOATS), size=st.tuples(sides, sides) | st.just((1, 1)))
def test_adaptive_avg_pool_is_the_oracle(isa: str, x: torch.Tensor, size: tuple[int, int]) -> None:
    y = ops.adaptive_avg_pool2d(x, size)
    assert_average(y, reference.adaptive_avg_pool2d(x, size))
    assert keeps_layout(x, y)


@st.composite
def affine(draw: st.DrawFn, dtype: torch.dtype) -> tuple[float, int, float | None, int, torch.dtype]:
    out = draw(st.sampled_from(FLOATS + BYTES))
    zero_point = st.integers(0, 255) if dtype == torch.uint8 else st.integers(-128, 127)
    out_zero_point = draw(st.integers(0, 255) if out == torch.uint8 else st.integers(-128, 127)) if out in BYTES else 0
    scales = st.sampled_from([0.5, 0.0173, 1.0, 3.7e-3])
    return draw(scales), draw(zero_point), draw(scales) if out in BYTES else None, out_zero_point, out


@every_isa
@given(data=st.data())
def test_quantized_avg_pool_is_the_oracle_to_the_bit(isa: str, data: st.DataObject) -> None:
    x = data.draw(inputs(BYTES))
    kernel, stride, padding, _ = data.draw(windows(x.shape, dilated=False))
    divisor = data.draw(st.sampled_from([None, None, 1, 7, -3]))
    arguments = kernel, stride, padding, data.draw(st.booleans()), data.draw(st.booleans()), divisor
    arguments += data.draw(affine(x.dtype))
    y = ops.qavg_pool2d(x, *arguments)
    assert_same(y, reference.qavg_pool2d(x, *arguments))
    assert keeps_layout(x, y)


@every_isa
@given(data=st.data())
def test_quantized_adaptive_avg_pool_is_the_oracle_to_the_bit(isa: str, data: st.DataObject) -> None:
    x = data.draw(inputs(BYTES))
    arguments = data.draw(st.tuples(sides, sides) | st.just((1, 1))), *data.draw(affine(x.dtype))
    y = ops.qadaptive_avg_pool2d(x, *arguments)
    assert_same(y, reference.qadaptive_avg_pool2d(x, *arguments))
    assert keeps_layout(x, y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_averages_are_the_same_bits_on_every_isa(isa: str, dtype: torch.dtype, layout: str) -> None:
    x = random_like((2, 37, 19, 41), dtype, layout, 0) * torch.randn(2, 37, 19, 41).to(dtype)
    calls = (
        lambda: ops.avg_pool2d(x, [3, 5], [2, 1], [1, 2], True, False),
        lambda: ops.adaptive_avg_pool2d(x, [1, 1]),
        lambda: ops.adaptive_avg_pool2d(x, [7, 6]),
    )
    here = [call() for call in calls]
    ops._set_isa("scalar")
    for actual, call in zip(here, calls, strict=True):
        assert_same(actual, call())


# ---- sizes at the edges ----


@pytest.mark.parametrize("dtype", FLOATS + BYTES)
def test_planes_of_any_length_are_averaged_whole(isa: str, dtype: torch.dtype) -> None:
    for columns in range(1, 36):
        x = random_like((1, columns % 7 + 1, 1, columns), dtype, "contiguous", 0)
        if dtype in FLOATS:
            assert_average(ops.adaptive_avg_pool2d(x, [1, 1]), reference.adaptive_avg_pool2d(x, [1, 1]))
        else:
            y = ops.qadaptive_avg_pool2d(x, [1, 1], 0.5, 3, None, 0, torch.float32)
            assert_same(y, reference.qadaptive_avg_pool2d(x, [1, 1], 0.5, 3, None, 0, torch.float32))


@pytest.mark.parametrize("dtype", FLOATS + BYTES)
@pytest.mark.parametrize("channels", [1, 7, 16, 31, 33, 64, 100, 131])
def test_maxima_of_any_number_of_channels_have_their_places(isa: str, dtype: torch.dtype, channels: int) -> None:
    x = random_like((2, channels, 5, 6), dtype, "channels_last", 0)
    arguments = [3, 2], [2, 2], [1, 1], [1, 1], False
    for actual, expected in zip(
        ops.max_pool2d_with_indices(x, *arguments), reference.max_pool2d_with_indices(x, *arguments), strict=True
    ):
        assert_same(actual, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_kernel_far_larger_than_the_plane_pools_all_of_it(isa: str, layout: str) -> None:
    x = random_like((1, 5, 4, 3), torch.float32, layout, 0)
    kernel, padding = [2**30 - 1] * 2, [2**29 - 1] * 2
    assert_same(ops.max_pool2d(x, kernel, [1, 1], padding, [1, 1], False)[0, :, 1, 1], x.amax((2, 3))[0])
    y = ops.avg_pool2d(x, kernel, [1, 1], padding, False, False)
    torch.testing.assert_close(y, x.mean((2, 3), keepdim=True).expand_as(y))


def test_one_wide_plane_and_one_tall_plane(isa: str) -> None:
    for shape in ((1, 1, 1, 100_003), (1, 1, 100_003, 1), (1, 2, 3, 40_001)):
        x = torch.randn(shape)
        kernel = [min(3, size) for size in shape[2:]]
        assert_same(pool.max_pool2d(x, kernel), F.max_pool2d(x, kernel))
        assert_average(pool.global_avg_pool2d(x), reference.adaptive_avg_pool2d(x, [1, 1]))


def test_an_output_too_large_for_memory_is_refused() -> None:
    with pytest.raises(RuntimeError):
        pool.adaptive_avg_pool2d(torch.randn(1, 1, 2, 2), 2**31 - 1)


def test_a_window_too_large_for_exact_sums_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, 1, 2900, 2900)
    with pytest.raises(RuntimeError, match=r"x has windows of 2900 x 2900"):
        pool.qglobal_avg_pool2d(x, x_scale=1.0)


def test_overlapping_inputs_are_read_right(isa: str) -> None:
    row = torch.randn(1, 4, 1, 9)
    for x in (row.expand(2, 4, 6, 9), torch.randn(40).as_strided((1, 4, 6, 9), (0, 1, 2, 3))):
        assert_same(pool.max_pool2d(x, 3, 2, 1), F.max_pool2d(x.contiguous(), 3, 2, 1))


# ---- the public functions ----


def test_defaults_are_those_of_torch() -> None:
    x = torch.randn(2, 3, 13, 11)
    assert_same(pool.max_pool2d(x, 3), F.max_pool2d(x, 3))
    assert_same(pool.max_pool2d(x, (3, 2), padding=(1, 0), dilation=2), F.max_pool2d(x, (3, 2), None, (1, 0), 2))
    assert_average(pool.avg_pool2d(x, (2, 3), padding=1), F.avg_pool2d(x, (2, 3), padding=1))
    assert_average(pool.adaptive_avg_pool2d(x, (None, 4)), F.adaptive_avg_pool2d(x, (None, 4)))
    assert_same(pool.adaptive_max_pool2d(x, 5), F.adaptive_max_pool2d(x, 5))
    assert_average(pool.global_avg_pool2d(x), x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("stride", [(), [], None])
def test_an_empty_stride_is_the_kernel_size_as_torch_has_it(stride: list[int] | None) -> None:
    x = torch.randn(2, 3, 13, 11)
    q = torch.randint(256, x.shape, dtype=torch.uint8)
    expected, indices = F.max_pool2d(x, (3, 2), stride, return_indices=True)
    assert_same(pool.max_pool2d(x, (3, 2), stride), expected)
    for ours, theirs in zip(pool.max_pool2d_with_indices(x, (3, 2), stride), (expected, indices), strict=True):
        assert_same(ours, theirs)
    assert_average(pool.avg_pool2d(x, (3, 2), stride), F.avg_pool2d(x, (3, 2), stride))
    assert_same(pool.qavg_pool2d(q, (3, 2), stride, x_scale=0.1), pool.qavg_pool2d(q, (3, 2), (3, 2), x_scale=0.1))


def test_an_image_without_batch_is_pooled_as_torch_does() -> None:
    x = torch.randn(3, 13, 11)
    assert_same(pool.max_pool2d(x, 3), F.max_pool2d(x, 3))
    assert_average(pool.avg_pool2d(x, 3), F.avg_pool2d(x, 3))
    assert_average(pool.adaptive_avg_pool2d(x, (None, 2)), F.adaptive_avg_pool2d(x, (None, 2)))
    for ours, theirs in (
        (pool.max_pool2d_with_indices(x, 2), F.max_pool2d(x, 2, return_indices=True)),
        (pool.adaptive_max_pool2d_with_indices(x, 4), F.adaptive_max_pool2d(x, 4, return_indices=True)),
    ):
        assert_same(ours[0], theirs[0])
        assert_same(ours[1], theirs[1])
    q = torch.randint(256, (3, 6, 6), dtype=torch.uint8)
    assert pool.qavg_pool2d(q, 2, x_scale=0.1).shape == (3, 3, 3)
    assert pool.qglobal_avg_pool2d(q, x_scale=0.1).shape == (3, 1, 1)


# ---- bad arguments ----

IMAGE = torch.randn(1, 2, 8, 8)
QUANTIZED = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pool.max_pool2d(IMAGE.double(), 2),
            "x must be float32, bfloat16, float16, uint8 or int8, not float64",
        ),
        (lambda: pool.avg_pool2d(QUANTIZED, 2), "avg_pool2d: x must be float32, bfloat16 or float16, not uint8"),
        (lambda: pool.max_pool2d(IMAGE[0, 0], 2), "x must have 4 dimensions"),
        (lambda: pool.max_pool2d(IMAGE[:, :0], 2), "x may be empty in its batch dimension only"),
        (lambda: pool.max_pool2d(IMAGE, 0), "kernel_size must be at least 1"),
        (lambda: pool.max_pool2d(IMAGE, (2, 2, 2)), "kernel_size must have 2 numbers, not 3"),
        (lambda: pool.max_pool2d(IMAGE, 2**40), "kernel_size must be at least 1 and below 2"),
        (lambda: pool.max_pool2d(IMAGE, 2, stride=0), "stride must be at least 1"),
        (lambda: pool.max_pool2d(IMAGE, 2, dilation=-1), "dilation must be at least 1"),
        (lambda: pool.max_pool2d(IMAGE, 2, padding=2), "padding must be at most half"),
        (lambda: pool.avg_pool2d(IMAGE, 3, padding=-1), "padding must be at least 0"),
        (lambda: pool.max_pool2d(IMAGE, 9), "kernel_size 9 .* does not fit x, whose height is 8"),
        (lambda: pool.max_pool2d(IMAGE[..., :2], (1, 2), padding=(0, 1), dilation=(1, 3)), "padding 1 and dilation 3"),
        (lambda: pool.avg_pool2d(IMAGE, 2, divisor_override=0), "divisor_override must not be 0"),
        (lambda: pool.adaptive_avg_pool2d(IMAGE, 0), "output_size must be at least 1"),
        (lambda: pool.adaptive_max_pool2d(IMAGE, (3, -1)), "output_size must be at least 1"),
        (lambda: pool.qavg_pool2d(IMAGE, 2, x_scale=1.0), "x must be uint8 or int8, not float32"),
        (lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=float("nan")), "x_scale must be a positive number"),
        (lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=1.0, x_zero_point=256), "x_zero_point must lie in"),
        (lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=1.0, out_dtype=torch.uint8), "out_scale must be given"),
        (lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=1.0, out_scale=1.0), "out_scale must be given"),
        (lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=1.0, out_dtype=torch.float64), "out_dtype must be"),
        (
            lambda: pool.qglobal_avg_pool2d(
                QUANTIZED, x_scale=1.0, out_scale=0.1, out_zero_point=200, out_dtype=torch.int8
            ),
            "out_zero_point must lie in",
        ),
    ],
)
def test_a_bad_argument_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- autograd ----


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: pool.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1)),
        (lambda x: pool.max_pool2d_with_indices(x, 3, 1, 1)[0], lambda x: F.max_pool2d(x, 3, 1, 1)),
        (lambda x: pool.adaptive_max_pool2d(x, 3), lambda x: F.adaptive_max_pool2d(x, 3)),
        (lambda x: pool.adaptive_max_pool2d_with_indices(x, 4)[0], lambda x: F.adaptive_max_pool2d(x, 4)),
        (lambda x: pool.avg_pool2d(x, 3, 2, 1, True, False), lambda x: F.avg_pool2d(x, 3, 2, 1, True, False)),
        (lambda x: pool.adaptive_avg_pool2d(x, (3, 2)), lambda x: F.adaptive_avg_pool2d(x, (3, 2))),
    ],
)
def test_gradients_are_those_of_torch(ours: Any, theirs: Any, dtype: torch.dtype, layout: str) -> None:
    x = torch.randn(2, 5, 9, 8).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    gradients = []
    for function in (ours, theirs):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf)
        (gradient,) = torch.autograd.grad((y.float() ** 2).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((gradient.float() ** 3).sum(), leaf)
        gradients.append((gradient.detach(), second))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


# ---- the framework's contract ----

AFFINE = (0.05, 3, 0.04, 7, torch.uint8)
CALLS: dict[str, tuple[torch.dtype, tuple[Any, ...]]] = {
    "max_pool2d": (torch.float32, ([3, 3], [2, 2], [1, 1], [1, 1], True)),
    "max_pool2d_with_indices": (torch.float32, ([3, 2], [2, 1], [1, 0], [1, 2], False)),
    "adaptive_max_pool2d": (torch.float32, ([3, 5],)),
    "adaptive_max_pool2d_with_indices": (torch.float32, ([3, 5],)),
    "avg_pool2d": (torch.float32, ([3, 3], [2, 2], [1, 1], True, False, None)),
    "adaptive_avg_pool2d": (torch.float32, ([1, 1],)),
    "qavg_pool2d": (torch.uint8, ([3, 3], [2, 2], [1, 1], True, False, None, *AFFINE)),
    "qadaptive_avg_pool2d": (torch.uint8, ([2, 3], *AFFINE)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, layout: str) -> None:
    dtype, arguments = CALLS[name]
    x = random_like((2, 3, 10, 9), dtype, layout, 0)
    if dtype.is_floating_point:
        x.requires_grad_()
    torch.library.opcheck(getattr(ops, name).default, (x, *arguments))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 1, 7, 7), (2, 4, 1, 1), (1, 4, 1, 6), (0, 4, 6, 6)])
def test_the_fake_agrees_where_a_layout_is_ambiguous(shape: tuple[int, ...], layout: str) -> None:
    x = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.adaptive_max_pool2d(mode.from_tensor(x), [2, 3])
    real = ops.adaptive_max_pool2d(x, [2, 3])
    assert fake.stride() == real.stride() and fake.shape == real.shape


class Head(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, indices = pool.max_pool2d_with_indices(x, 3, 2, 1, ceil_mode=True)
        y = pool.avg_pool2d(pool.max_pool2d(y, 2, 1), 3, 1, 1)
        return indices, pool.adaptive_max_pool2d(y, (2, None)), pool.global_avg_pool2d(y)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_without_a_graph_break_whatever_the_size(layout: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Head(), fullgraph=True, dynamic=True)
    for shape in ((2, 4, 16, 18), (3, 4, 21, 13)):
        x = torch.randn(shape)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
        for actual, expected in zip(compiled(x), Head()(x), strict=True):
            torch.testing.assert_close(actual, expected)
            assert actual.stride() == expected.stride()


def test_compiled_gradients_are_those_of_eager() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 4, 12, 12, requires_grad=True)
    expected = torch.autograd.grad(Head()(x)[2].square().sum(), x)[0]
    compiled = torch.compile(Head(), fullgraph=True, backend="aot_eager")  # inductor would compile torch's backward
    actual = torch.autograd.grad(compiled(x)[2].square().sum(), x)[0]
    torch.testing.assert_close(actual, expected)


def test_export_with_dynamic_sizes_saved_and_loaded(tmp_path: Any) -> None:
    batch, height = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("height", min=8, max=512)
    x = torch.randn(2, 4, 16, 18).contiguous(memory_format=torch.channels_last)
    program = torch.export.export(Head(), (x,), dynamic_shapes=({0: batch, 2: height},))
    torch.export.save(program, tmp_path / "pool.pt2")
    loaded = torch.export.load(tmp_path / "pool.pt2").module()
    for shape in ((2, 4, 16, 18), (5, 4, 31, 18)):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        for actual, expected in zip(loaded(x), Head()(x), strict=True):
            assert_same(actual, expected)


def test_inference_mode_and_bytes_make_no_graph() -> None:
    with torch.inference_mode():
        y = pool.max_pool2d(IMAGE, 2)
    assert y.is_inference()
    assert not pool.max_pool2d(QUANTIZED, 2).requires_grad
