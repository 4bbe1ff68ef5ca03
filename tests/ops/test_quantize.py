"""Real numbers to bytes and back: the oracle's bits on every isa, for every layout and odd size."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed, which PT2E graphs call
from hypothesis import given
from hypothesis import strategies as st
from int8 import (
    BYTES,
    EMPTY,
    LAYOUTS,
    LOW,
    REALS,
    assert_same,
    channels_last,
    codes,
    layouts,
    reals,
    scales,
    seeds,
    shapes,
    zero_points,
)

from pykernels import reference
from pykernels.ops import quantize as ops

DECOMPOSED = torch.ops.quantized_decomposed


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("dtype", BYTES)
@given(data=st.data(), shape=shapes, layout=layouts, scale=scales, seed=seeds)
def test_quantize_per_tensor_is_the_oracle(
    isa: str, dtype: torch.dtype, real: torch.dtype, data: st.DataObject, shape, layout, scale, seed
) -> None:
    zero_point = data.draw(zero_points(dtype))
    x = LAYOUTS[layout](reals(shape, real, seed))
    got = ops.quantize_per_tensor(x, scale, zero_point, dtype)
    assert_same(got, reference.quantize_per_tensor(x, scale, zero_point, dtype), like=x)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("dtype", BYTES)
@given(data=st.data(), shape=shapes, layout=layouts, scale=scales, seed=seeds)
def test_dequantize_per_tensor_is_the_oracle(
    isa: str, dtype: torch.dtype, real: torch.dtype, data: st.DataObject, shape, layout, scale, seed
) -> None:
    zero_point = data.draw(zero_points(dtype))
    q = LAYOUTS[layout](codes(shape, dtype, seed))
    got = ops.dequantize_per_tensor(q, scale, zero_point, real)
    assert_same(got, reference.dequantize_per_tensor(q, scale, zero_point, real), like=q)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("dtype", BYTES)
@given(data=st.data(), shape=shapes, layout=layouts, seed=seeds)
def test_per_channel_is_the_oracle(
    isa: str, dtype: torch.dtype, real: torch.dtype, data: st.DataObject, shape, layout, seed
) -> None:
    x = LAYOUTS[layout](reals(shape, real, seed))
    axis = data.draw(st.integers(-x.dim(), x.dim() - 1))
    scale = torch.rand(x.shape[axis]) + 0.01
    zero_point = torch.randint(LOW[dtype], LOW[dtype] + 256, (x.shape[axis],))
    q = ops.quantize_per_channel(x, scale, zero_point, axis, dtype)
    assert_same(q, reference.quantize_per_channel(x, scale, zero_point, axis, dtype), like=x)
    y = ops.dequantize_per_channel(q, scale, zero_point.int(), axis, real)
    assert_same(y, reference.dequantize_per_channel(q, scale, zero_point, axis, real), like=q)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("dtype", BYTES)
@given(shape=shapes, layout=layouts, seed=seeds, spread=st.sampled_from([1e-30, 0.01, 3.0, 1e30]))
def test_per_token_is_the_oracle(isa: str, dtype: torch.dtype, real: torch.dtype, shape, layout, seed, spread) -> None:
    x = LAYOUTS[layout](reals(shape, real, seed, spread))
    q, scale, zero_point = ops.quantize_per_token(x, dtype)
    expected = reference.quantize_per_token(x, dtype)
    assert_same(q, expected[0], like=x)
    assert_same(scale, expected[1])
    assert_same(zero_point, expected[2])
    assert scale.shape == (*x.shape[:-1], 1)
    y = ops.dequantize_per_token(q, scale, zero_point, real)
    assert_same(y, reference.dequantize_per_token(q, scale, zero_point, real), like=q)


@pytest.mark.parametrize("real", REALS)
@given(shape=shapes, layout=layouts, seed=seeds, block_size=st.integers(1, 200))
def test_per_block_is_the_oracle(isa: str, real: torch.dtype, shape, layout, seed, block_size) -> None:
    x = LAYOUTS[layout](reals(shape, real, seed))
    q, scale = ops.quantize_per_block(x, block_size)
    expected_q, expected_scale = reference.quantize_per_block(x, block_size)
    assert_same(q, expected_q, like=x)
    assert_same(scale, expected_scale)
    y = ops.dequantize_per_block(q, scale, block_size, real)
    assert_same(y, reference.dequantize_per_block(q, scale, block_size, real), like=q)


@pytest.mark.parametrize("dtype", BYTES)
def test_every_length_around_the_vectors(isa: str, dtype: torch.dtype) -> None:
    """Nothing is written behind the end, at any alignment of the start."""
    x = reals((400,), torch.float32)
    for n, start in itertools.product(range(140), (0, 1, 3)):
        part = x[start : start + n]
        q = ops.quantize_per_tensor(part, 0.05, 3, dtype)
        assert_same(q, reference.quantize_per_tensor(part, 0.05, 3, dtype))
        assert_same(ops.dequantize_per_tensor(q, 0.05, 3), reference.dequantize_per_tensor(q, 0.05, 3, torch.float32))
        for got, expected in zip(
            ops.quantize_per_token(part, dtype), reference.quantize_per_token(part, dtype), strict=True
        ):
            assert_same(got, expected)


def test_large_tensors_are_split_over_threads(isa: str) -> None:
    x = reals((5, 64, 41, 43), torch.float32)
    for y in (x, channels_last(x)):
        q = ops.quantize_per_tensor(y, 0.05, 128)
        assert_same(q, reference.quantize_per_tensor(y, 0.05, 128, torch.uint8), like=y)
        scale, zero_point = torch.rand(64) + 0.01, torch.randint(-128, 128, (64,))
        q = ops.quantize_per_channel(y, scale, zero_point, 1)
        assert_same(q, reference.quantize_per_channel(y, scale, zero_point, 1, torch.int8), like=y)


def test_rounding_is_half_to_even(isa: str) -> None:
    x = torch.arange(-20, 21) / 2.0
    assert ops.quantize_per_tensor(x, 1.0, 0, torch.int8).tolist() == torch.round(x).int().tolist()


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("real", REALS)
def test_values_that_no_byte_holds(isa: str, dtype: torch.dtype, real: torch.dtype) -> None:
    """Infinities and everything far away are the ends of the range; NaN is the zero point."""
    low, high = LOW[dtype], LOW[dtype] + 255
    x = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, -torch.nan, 3e38, -3e38, 2.0**31, -(2.0**31), 0.0, -0.0] * 5
    ).to(real)
    for zero_point in (low, 3, high):
        q = ops.quantize_per_tensor(x, 0.5, zero_point, dtype)
        assert q.tolist() == [high, low, zero_point, zero_point, high, low, high, low, zero_point, zero_point] * 5
        assert_same(q, reference.quantize_per_tensor(x, 0.5, zero_point, dtype))


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize(
    "row",
    [
        pytest.param([0.0, 0.0, 0.0], id="zeros"),
        pytest.param([1.0, 2.0, 3.0], id="positive"),
        pytest.param([-1.0, -2.0, -3.0], id="negative"),
        pytest.param([torch.nan, 1.0, -2.0], id="nan"),
        pytest.param([torch.nan, torch.nan], id="only nan"),
        pytest.param([torch.inf, 1.0, -2.0], id="infinity"),
        pytest.param([torch.inf, -torch.inf, torch.nan], id="infinities"),
        pytest.param([3e38, -3e38], id="range beyond fp32"),
        pytest.param([1e-40, -1e-42, 0.0], id="denormal"),
        pytest.param([2.9e-36, -1e-39, 0.0], id="scale below the smallest normal"),
    ],
)
def test_tokens_at_the_edges(isa: str, dtype: torch.dtype, row: list[float]) -> None:
    x = torch.tensor([row, row[::-1]])
    for got, expected in zip(ops.quantize_per_token(x, dtype), reference.quantize_per_token(x, dtype), strict=True):
        assert_same(got, expected)


def test_a_token_keeps_zero_exact_and_errs_by_half_a_step(isa: str) -> None:
    x = reals((64, 300), torch.float32)
    x[:, 0] = 0.0
    for dtype in BYTES:
        q, scale, zero_point = ops.quantize_per_token(x, dtype)
        y = ops.dequantize_per_token(q, scale, zero_point)
        assert (y[:, 0] == 0).all()
        assert ((y - x).abs() <= scale * 1.01).all()  # affine: half a step from x, half from the zero point
    assert ops.quantize_per_token(x, torch.int8)[0].min() >= -127


# ---- against PT2E's own ops ----


@pytest.mark.parametrize("dtype", BYTES)
@given(data=st.data(), scale=scales, seed=seeds)
def test_per_tensor_is_what_pt2e_computes(isa: str, dtype: torch.dtype, data: st.DataObject, scale, seed) -> None:
    zero_point, low = data.draw(zero_points(dtype)), LOW[dtype]
    x = reals((1000,), torch.float32, seed)
    q = DECOMPOSED.quantize_per_tensor(x, scale, zero_point, low, low + 255, dtype)
    assert_same(ops.quantize_per_tensor(x, scale, zero_point, dtype), q)
    y = DECOMPOSED.dequantize_per_tensor(q, scale, zero_point, low, low + 255, dtype)
    assert_same(ops.dequantize_per_tensor(q, scale, zero_point), y)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_per_channel_is_what_pt2e_computes(isa: str, dtype: torch.dtype, axis: int) -> None:
    x, low = reals((8, 16, 3, 5), torch.float32), LOW[dtype]
    n = x.shape[axis]
    scale, zero_point = torch.rand(n) + 0.01, torch.randint(low, low + 256, (n,))
    q = DECOMPOSED.quantize_per_channel(x, scale, zero_point, axis, low, low + 255, dtype)
    assert_same(ops.quantize_per_channel(x, scale, zero_point, axis, dtype), q)
    y = DECOMPOSED.dequantize_per_channel(q, scale, zero_point, axis, low, low + 255, dtype)
    assert_same(ops.dequantize_per_channel(q, scale, zero_point, axis), y)


# ---- nothing at all ----


@pytest.mark.parametrize("shape", EMPTY)
def test_no_elements(isa: str, shape: tuple[int, ...]) -> None:
    x, q = torch.empty(shape), torch.empty(shape, dtype=torch.uint8)
    assert ops.quantize_per_tensor(x, 0.1).shape == shape
    assert ops.dequantize_per_tensor(q, 0.1).shape == shape
    for axis, n in enumerate(shape):
        scale, zero_point = torch.ones(n), torch.zeros(n, dtype=torch.int64)
        assert ops.quantize_per_channel(x, scale, zero_point, axis).shape == shape
        assert ops.dequantize_per_channel(q, scale, zero_point, axis).shape == shape
    token = ops.quantize_per_token(x)
    assert [t.shape for t in token] == [shape, (*shape[:-1], 1), (*shape[:-1], 1)]
    assert (token[1] == 1).all() and (token[2] == 0).all()
    assert ops.dequantize_per_token(*token).shape == shape
    block = ops.quantize_per_block(x, 32)
    assert [t.shape for t in block] == [shape, (0,)]
    assert ops.dequantize_per_block(*block, 32).shape == shape


def test_no_dimensions(isa: str) -> None:
    assert ops.quantize_per_tensor(torch.tensor(1.0), 0.1, 3).item() == 13
    assert ops.dequantize_per_tensor(torch.tensor(13, dtype=torch.uint8), 0.5, 3).item() == 5.0
    assert ops.quantize_per_block(torch.tensor(1.0), 4)[0].item() == 127
