"""Add, multiply, concatenate and look up on bytes: the oracle's bits on every isa, for every layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from int8 import (
    BYTES,
    EMPTY,
    LAYOUTS,
    LOW,
    assert_same,
    channels_last,
    codes,
    layouts,
    scales,
    seeds,
    shapes,
    zero_points,
)

from pykernels import reference
from pykernels.ops import quantize as ops

EXACT = ["none", "relu", "relu6", "hardswish", "hardsigmoid"]
OWN_EXP = ["silu", "sigmoid", "gelu", "tanh"]


@given(
    data=st.data(),
    shape=shapes,
    layout=layouts,
    other_layout=st.sampled_from(["contiguous", "channels_last", "permuted", "strided"]),
    dtypes=st.tuples(*[st.sampled_from(BYTES)] * 3),
    steps=st.tuples(scales, scales, scales),
    seed=seeds,
    activation=st.sampled_from(EXACT),
)
def test_qadd_and_qmul_are_the_oracle(
    isa: str, data: st.DataObject, shape, layout, other_layout, dtypes, steps, seed, activation
) -> None:
    zeros = [data.draw(zero_points(dtype)) for dtype in dtypes]
    a = LAYOUTS[layout](codes(shape, dtypes[0], seed))
    b = LAYOUTS[other_layout](codes(tuple(a.shape), dtypes[1], seed + 1))
    arguments = (a, b, steps[0], zeros[0], steps[1], zeros[1], steps[2], zeros[2], dtypes[2])
    assert_same(ops.qadd(*arguments, activation), reference.qadd(*arguments, activation), like=a)
    assert_same(ops.qmul(*arguments), reference.qmul(*arguments), like=a)


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("dtype", BYTES)
def test_qadd_with_an_exact_activation_over_every_pair_of_bytes(isa: str, activation: str, dtype: torch.dtype) -> None:
    low = LOW[dtype]
    a, b = torch.meshgrid(*[torch.arange(low, low + 256, dtype=dtype)] * 2, indexing="ij")
    for out_scale, out_zero_point in ((0.03, low), (0.02, low + 128), (0.5, low + 255)):
        arguments = (a, b, 0.05, low + 100, 0.031, low + 77, out_scale, out_zero_point, dtype, activation)
        assert_same(ops.qadd(*arguments), reference.qadd(*arguments))


@pytest.mark.parametrize("activation", OWN_EXP)
def test_qadd_with_an_activation_by_our_own_exp_is_within_one_step(isa: str, activation: str) -> None:
    a, b = codes((100, 100), torch.uint8, 1), codes((100, 100), torch.uint8, 2)
    arguments = (a, b, 0.05, 100, 0.03, 120, 0.02, 50, torch.uint8, activation)
    difference = ops.qadd(*arguments).int() - reference.qadd(*arguments).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.01


@pytest.mark.parametrize("activation", OWN_EXP)
def test_qadd_with_an_activation_by_our_own_exp_is_the_same_on_every_isa(isa: str, activation: str) -> None:
    a, b = codes((999,), torch.uint8, 1), codes((999,), torch.int8, 2)
    arguments = (a, b, 0.05, 100, 0.03, 12, 0.02, 50, torch.uint8, activation)
    got = ops.qadd(*arguments)
    torch.ops.pykernels._set_isa("scalar")
    assert_same(got, ops.qadd(*arguments))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "strided"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 37, 4, 4), (1, 130, 1, 6), (2, 64, 40, 40)])
@pytest.mark.parametrize("dtype", BYTES)
def test_a_factor_for_each_channel_as_in_squeeze_and_excitation(
    isa: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    a = LAYOUTS[layout](codes(shape, dtype, 1))
    b = codes((*shape[:2], 1, 1), torch.uint8, 2)
    zero = LOW[dtype] + 128
    arguments = (a, b, 0.05, zero, 1 / 255, 3, 0.04, zero - 3, dtype)
    assert_same(ops.qmul(*arguments), reference.qmul(*arguments), like=a)
    assert_same(ops.qadd(*arguments, "relu"), reference.qadd(*arguments, "relu"), like=a)


@given(
    data=st.data(),
    dims=st.integers(1, 4),
    count=st.integers(1, 4),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    out_dtype=st.sampled_from(BYTES),
    seed=seeds,
)
def test_qcat_is_the_oracle(isa: str, data: st.DataObject, dims, count, layout, out_dtype, seed) -> None:
    dim = data.draw(st.integers(-dims, dims - 1))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=dims, max_size=dims))
    dtypes = [data.draw(st.sampled_from(BYTES)) for _ in range(count)]
    xs = []
    for i, dtype in enumerate(dtypes):
        sizes[dim] = data.draw(st.integers(0, 40))
        xs.append(LAYOUTS[layout](codes(tuple(sizes), dtype, seed + i)))
    parameters = [data.draw(st.tuples(st.sampled_from([0.05, 0.11]), st.sampled_from([3, 10]))) for _ in range(count)]
    arguments = (xs, [scale for scale, _ in parameters], [zero for _, zero in parameters], dim, 0.05, 3, out_dtype)
    got = ops.qcat(*arguments)
    assert_same(got, reference.qcat(*arguments))
    expected = torch.cat([torch.empty_like(xs[0]).to(out_dtype)], dim)
    if expected.is_contiguous():
        assert got.is_contiguous()
    else:
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_qcat_of_equal_parameters_is_a_copy(isa: str) -> None:
    xs = [channels_last(codes((2, c, 60, 60), torch.uint8, c)) for c in (64, 32, 3)]
    got = ops.qcat(xs, [0.1] * 3, [7] * 3, 1, 0.1, 7)
    assert_same(got, torch.cat(xs, 1), like=torch.cat(xs, 1))


def test_qcat_takes_the_layout_of_its_first_input(isa: str) -> None:
    contiguous, last = codes((2, 5, 4, 3), torch.uint8, 1), channels_last(codes((2, 6, 4, 3), torch.uint8, 2))
    assert ops.qcat([contiguous, last], [0.1, 0.2], [0, 0], 1, 0.1, 0).is_contiguous()
    assert ops.qcat([last, contiguous], [0.1, 0.2], [0, 0], 1, 0.1, 0).is_contiguous(memory_format=torch.channels_last)


@given(shape=shapes, layout=layouts, dtypes=st.tuples(*[st.sampled_from(BYTES)] * 2), seed=seeds)
def test_qlookup_is_the_oracle(isa: str, shape, layout, dtypes, seed) -> None:
    x, table = LAYOUTS[layout](codes(shape, dtypes[0], seed)), codes((256,), dtypes[1], seed + 1)
    assert_same(ops.qlookup(x, table), reference.qlookup(x, table), like=x)


@pytest.mark.parametrize(
    "fn", [F.hardswish, F.hardsigmoid, torch.sigmoid, F.silu, F.relu6, F.gelu, torch.tanh, torch.exp]
)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("x_dtype", BYTES)
def test_a_lookup_table_is_the_function_between_dequantize_and_quantize(
    isa: str, fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    x = torch.arange(LOW[x_dtype], LOW[x_dtype] + 256, dtype=x_dtype).repeat(3)
    x_zero, out_zero = LOW[x_dtype] + 130, LOW[dtype] + 20
    table = ops.lookup_table(fn, 0.05, x_zero, 0.03, out_zero, dtype, x_dtype)
    expected = reference.requantize(fn(reference.dequantize(x, 0.05, x_zero)), 0.03, out_zero, dtype)
    assert_same(ops.qlookup(x, table), expected)


def test_a_lookup_table_of_something_else_than_a_function_of_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="fn must work element by element"):
        ops.lookup_table(lambda x: x.sum(), 0.1, 0, 0.1, 0)


@pytest.mark.parametrize("shape", EMPTY)
def test_no_elements(isa: str, shape: tuple[int, ...]) -> None:
    q = torch.empty(shape, dtype=torch.uint8)
    assert ops.qadd(q, q, 1.0, 0, 1.0, 0, 1.0, 0).shape == shape
    assert ops.qmul(q, q, 1.0, 0, 1.0, 0, 1.0, 0).shape == shape
    assert ops.qlookup(q, torch.zeros(256, dtype=torch.uint8)).shape == shape
    assert ops.qcat([q, q], [1.0, 1.0], [0, 0], 0, 1.0, 0).shape == (2 * shape[0], *shape[1:])
