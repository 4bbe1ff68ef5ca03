"""Quantize, dequantize and arithmetic on bytes: the oracle's bits on every isa, for every layout and odd size."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed, which PT2E graphs call
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pykernels import reference
from pykernels.ops import quantize as ops

BYTES = [torch.uint8, torch.int8]
REALS = [torch.float32, torch.bfloat16]
LOW = {torch.uint8: 0, torch.int8: -128}
DECOMPOSED = torch.ops.quantized_decomposed

# ---- inputs ----

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).flatmap(
    lambda head: st.integers(1, 70).map(lambda last: (*head, last))
)
scales = st.floats(2.0**-13, 8.0, width=32)
seeds = st.integers(0, 2**31)


def zero_points(dtype: torch.dtype) -> st.SearchStrategy[int]:
    return st.integers(LOW[dtype], LOW[dtype] + 255)


def reals(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def codes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    low = LOW[dtype]
    return torch.randint(low, low + 256, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _reversed(x: torch.Tensor) -> torch.Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": _channels_last,
    "permuted": _reversed,
    "transposed": lambda x: x.transpose(0, -1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "offset": lambda x: F.pad(x, (1, 1))[..., 1:-1],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
    "overlapping": lambda x: x.reshape(-1).as_strided((x.numel() // 2, 2), (1, 1)),
}
layouts = st.sampled_from(list(LAYOUTS))


def assert_same(got: torch.Tensor, expected: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """The same bits, and the strides of torch.empty_like(like)."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    if like is not None:
        assert got.stride() == torch.empty_like(like).stride()


# ---- real numbers to bytes and back ----


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
    for y in (x, _channels_last(x)):
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


# ---- arithmetic ----

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
    xs = [_channels_last(codes((2, c, 60, 60), torch.uint8, c)) for c in (64, 32, 3)]
    got = ops.qcat(xs, [0.1] * 3, [7] * 3, 1, 0.1, 7)
    assert_same(got, torch.cat(xs, 1), like=torch.cat(xs, 1))


def test_qcat_takes_the_layout_of_its_first_input(isa: str) -> None:
    contiguous, last = codes((2, 5, 4, 3), torch.uint8, 1), _channels_last(codes((2, 6, 4, 3), torch.uint8, 2))
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


# ---- nothing at all ----


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3, 3), (2, 3, 0, 4)])
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
    assert ops.qadd(q, q, 1.0, 0, 1.0, 0, 1.0, 0).shape == shape
    assert ops.qmul(q, q, 1.0, 0, 1.0, 0, 1.0, 0).shape == shape
    assert ops.qlookup(q, torch.zeros(256, dtype=torch.uint8)).shape == shape
    assert ops.qcat([q, q], [1.0, 1.0], [0, 0], 0, 1.0, 0).shape == (2 * shape[0], *shape[1:])


def test_no_dimensions(isa: str) -> None:
    assert ops.quantize_per_tensor(torch.tensor(1.0), 0.1, 3).item() == 13
    assert ops.dequantize_per_tensor(torch.tensor(13, dtype=torch.uint8), 0.5, 3).item() == 5.0
    assert ops.quantize_per_block(torch.tensor(1.0), 4)[0].item() == 127


# ---- the framework's contract ----

X = reals((2, 6, 5, 7), torch.float32)
Q = codes((2, 6, 5, 7), torch.uint8)
S6, Z6 = torch.rand(6) + 0.1, torch.arange(6)
TOKEN = (Q, torch.rand(2, 6, 5, 1), torch.zeros(2, 6, 5, 1, dtype=torch.int32))
ARITHMETIC = (0.1, 3, 0.2, 4, 0.3, 5, torch.int8)
CALLS: dict[str, tuple[object, ...]] = {
    "quantize_per_tensor": (X, 0.1, 3, torch.uint8),
    "dequantize_per_tensor": (Q, 0.1, 3, torch.bfloat16),
    "quantize_per_channel": (X, S6, Z6, 1, torch.int8),
    "dequantize_per_channel": (Q, S6, Z6, 1, torch.float32),
    "quantize_per_token": (X, torch.uint8),
    "dequantize_per_token": (*TOKEN, torch.float32),
    "quantize_per_block": (X, 32),
    "dequantize_per_block": (Q.view(torch.int8), torch.rand(14), 32, torch.float32),
    "qadd": (Q, Q, *ARITHMETIC, "relu"),
    "qmul": (Q, codes((2, 6, 1, 1), torch.uint8), *ARITHMETIC),
    "qcat": ([Q, Q], [0.1, 0.2], [3, 4], 1, 0.1, 3, torch.uint8),
    "qlookup": (Q, codes((256,), torch.int8)),
}


def with_layout(arguments: tuple[object, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[object, ...]:
    def convert(value: object) -> object:
        if isinstance(value, list):
            return [convert(v) for v in value]
        return change(value) if isinstance(value, torch.Tensor) and value.shape == X.shape else value

    return tuple(convert(value) for value in arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "strided"])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, layout: str) -> None:
    arguments = with_layout(CALLS[name], LAYOUTS[layout])
    torch.library.opcheck(getattr(torch.ops.pykernels, name).default, arguments)


@pytest.mark.parametrize("name", CALLS)
def test_every_public_function_has_its_op_and_compiles_whole(name: str) -> None:
    function = getattr(ops, name)
    arguments = with_layout(CALLS[name], _channels_last)
    expected = function(*arguments)
    for dynamic in (False, True):
        torch.compiler.reset()
        got = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*arguments)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


class Round(torch.nn.Module):
    """Real to bytes, every kind of arithmetic, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", ops.lookup_table(F.hardswish, 0.05, 128, 0.05, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = ops.quantize_per_tensor(x, 0.05, 128)
        q = ops.qcat([q, ops.qlookup(q, self.table)], [0.05, 0.05], [128, 20], 1, 0.05, 128)
        gate = ops.quantize_per_token(x.mean((2, 3), keepdim=True).repeat(1, 2, 1, 1))[0]
        q = ops.qmul(ops.qadd(q, q, 0.05, 128, 0.05, 128, 0.1, 128), gate, 0.1, 128, 0.01, 0, 0.1, 128)
        return ops.dequantize_per_tensor(q, 0.1, 128)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_export_with_a_dynamic_batch_and_reload(layout: str, tmp_path) -> None:
    model, x = Round(), LAYOUTS[layout](reals((2, 6, 5, 7), torch.float32))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "round.pt2")
    loaded = torch.export.load(tmp_path / "round.pt2").module()
    for batch in (2, 5):
        y = LAYOUTS[layout](reals((batch, 6, 5, 7), torch.float32, batch))
        assert_same(loaded(y), model(y))


def test_inductor_compiles_it(isa: str) -> None:
    model, x = Round(), _channels_last(reals((2, 6, 5, 7), torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        assert_same(compiled(x), model(x))


# ---- bad arguments ----

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF, -INF, 1e-40, 1e-300, 1e300])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        (": scale", lambda s: ops.quantize_per_tensor(X, s)),
        (": scale", lambda s: ops.dequantize_per_tensor(Q, s)),
        (": scale", lambda s: ops.quantize_per_channel(X, torch.tensor([1.0, s] * 3, dtype=torch.float64), Z6, 1)),
        (": scale", lambda s: ops.dequantize_per_channel(Q, torch.tensor([1.0, s] * 3), Z6, 1)),
        (": a_scale", lambda s: ops.qadd(Q, Q, s, 0, 1.0, 0, 1.0, 0)),
        (": b_scale", lambda s: ops.qadd(Q, Q, 1.0, 0, s, 0, 1.0, 0)),
        (": out_scale", lambda s: ops.qmul(Q, Q, 1.0, 0, 1.0, 0, s, 0)),
        (r": scales\[1\]", lambda s: ops.qcat([Q, Q], [1.0, s], [0, 0], 1, 1.0, 0)),
        (": out_scale", lambda s: ops.qcat([Q, Q], [1.0, 1.0], [0, 0], 1, s, 0)),
        (": scale", lambda s: ops.lookup_table(F.relu, s, 0, 1.0, 0)),
    ],
)
def test_a_scale_must_be_positive_and_finite(name: str, call: Callable[[float], object], scale: float) -> None:
    with pytest.raises(RuntimeError, match=f"{name} must be a positive number that fp32 holds"):
        call(scale)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        # dtype
        ("x must be float32 or bfloat16, not float64", lambda: ops.quantize_per_tensor(X.double(), 0.1)),
        ("x must be float32 or bfloat16, not float16", lambda: ops.quantize_per_token(X.half())),
        ("x must be float32 or bfloat16, not int64", lambda: ops.quantize_per_block(X.long(), 4)),
        ("x must be float32 or bfloat16, not uint8", lambda: ops.quantize_per_channel(Q, S6, Z6, 1)),
        ("x must be uint8 or int8, not float32", lambda: ops.dequantize_per_tensor(X, 0.1)),
        ("x must be uint8 or int8, not int32", lambda: ops.dequantize_per_channel(Q.int(), S6, Z6, 1)),
        ("x must be uint8 or int8, not bool", lambda: ops.dequantize_per_token(Q.bool(), *TOKEN[1:])),
        ("x must be int8, not uint8", lambda: ops.dequantize_per_block(Q, torch.rand(14), 32)),
        ("dtype must be uint8 or int8, not int32", lambda: ops.quantize_per_tensor(X, 0.1, 0, torch.int32)),
        ("dtype must be uint8 or int8, not float32", lambda: ops.quantize_per_token(X, torch.float32)),
        ("dtype must be float32 or bfloat16, not float16", lambda: ops.dequantize_per_tensor(Q, 0.1, 0, torch.float16)),
        ("a must be uint8 or int8", lambda: ops.qadd(X, Q, 1.0, 0, 1.0, 0, 1.0, 0)),
        ("b must be uint8 or int8", lambda: ops.qmul(Q, X, 1.0, 0, 1.0, 0, 1.0, 0)),
        ("out_dtype must be uint8 or int8", lambda: ops.qmul(Q, Q, 1.0, 0, 1.0, 0, 1.0, 0, torch.float32)),
        (r"xs\[1\] must be uint8 or int8", lambda: ops.qcat([Q, X], [1.0, 1.0], [0, 0], 1, 1.0, 0)),
        ("table must be uint8 or int8", lambda: ops.qlookup(Q, torch.zeros(256))),
        ("x must be uint8 or int8", lambda: ops.qlookup(X, torch.zeros(256, dtype=torch.uint8))),
        ("scale must be float32 or float64, not float16", lambda: ops.quantize_per_channel(X, S6.half(), Z6, 1)),
        ("zero_point must be int32 or int64, not float32", lambda: ops.quantize_per_channel(X, S6, Z6.float(), 1)),
        ("scale must be float32, not float64", lambda: ops.dequantize_per_token(Q, TOKEN[1].double(), TOKEN[2])),
        ("zero_point must be int32, not int64", lambda: ops.dequantize_per_token(Q, TOKEN[1], TOKEN[2].long())),
        ("scale must be float32", lambda: ops.dequantize_per_block(Q.view(torch.int8), torch.rand(14).half(), 32)),
        # zero points
        ("zero_point must lie in .0, 255. for uint8, not 256", lambda: ops.quantize_per_tensor(X, 0.1, 256)),
        ("zero_point must lie in .0, 255. for uint8, not -1", lambda: ops.dequantize_per_tensor(Q, 0.1, -1)),
        ("zero_point must lie in .-128, 127. for int8", lambda: ops.quantize_per_tensor(X, 0.1, 128, torch.int8)),
        ("zero_point must lie in", lambda: ops.quantize_per_tensor(X, 0.1, 2**62)),
        ("zero_point must lie in", lambda: ops.quantize_per_channel(X, S6, Z6 + 200, 1)),
        ("zero_point must lie in", lambda: ops.dequantize_per_channel(Q, S6, Z6 - 1, 1)),
        ("a_zero_point must lie in", lambda: ops.qadd(Q, Q, 1.0, -1, 1.0, 0, 1.0, 0)),
        ("b_zero_point must lie in", lambda: ops.qmul(Q, Q, 1.0, 0, 1.0, 256, 1.0, 0)),
        ("out_zero_point must lie in", lambda: ops.qadd(Q, Q, 1.0, 0, 1.0, 0, 1.0, 200, torch.int8)),
        (r"zero_points\[1\] must lie in", lambda: ops.qcat([Q, Q], [1.0, 1.0], [0, 300], 1, 1.0, 0)),
        # shapes, axes, counts
        ("axis must lie in .-4, 3. for x of shape .2, 6, 5, 7.", lambda: ops.quantize_per_channel(X, S6, Z6, 4)),
        ("axis must lie in", lambda: ops.dequantize_per_channel(Q, S6, Z6, -5)),
        ("axis must lie in", lambda: ops.quantize_per_channel(torch.tensor(1.0), S6, Z6, 0)),
        (r"scale must have shape \[5\], the size of x along axis 2", lambda: ops.quantize_per_channel(X, S6, Z6, 2)),
        ("zero_point must have shape", lambda: ops.quantize_per_channel(X, S6, Z6[:5], 1)),
        ("scale must have shape", lambda: ops.quantize_per_channel(X, S6[:, None], Z6, 1)),
        ("x must have at least 1 dimension", lambda: ops.quantize_per_token(torch.tensor(1.0))),
        ("scale must have the shape of x", lambda: ops.dequantize_per_token(Q, TOKEN[1][..., 0], TOKEN[2])),
        ("zero_point must have the shape of x", lambda: ops.dequantize_per_token(Q, TOKEN[1], TOKEN[2][:1])),
        ("block_size must be at least 1, not 0", lambda: ops.quantize_per_block(X, 0)),
        ("block_size must be at least 1, not -3", lambda: ops.dequantize_per_block(Q.view(torch.int8), S6, -3)),
        (r"scale must have shape \[14\]", lambda: ops.dequantize_per_block(Q.view(torch.int8), torch.rand(13), 32)),
        ("b must have the shape of a", lambda: ops.qadd(Q, Q[:1], 1.0, 0, 1.0, 0, 1.0, 0)),
        ("b must have the shape of a", lambda: ops.qmul(Q, Q[:, :, :1, :], 1.0, 0, 1.0, 0, 1.0, 0)),
        ("activation must be one of none, relu", lambda: ops.qadd(Q, Q, *ARITHMETIC, "swish")),
        ("xs must hold at least one tensor", lambda: ops.qcat([], [], [], 0, 1.0, 0)),
        ("scales must have 2 numbers", lambda: ops.qcat([Q, Q], [1.0], [0, 0], 1, 1.0, 0)),
        ("zero_points must have 2 numbers", lambda: ops.qcat([Q, Q], [1.0, 1.0], [0], 1, 1.0, 0)),
        ("dim must lie in", lambda: ops.qcat([Q, Q], [1.0, 1.0], [0, 0], 4, 1.0, 0)),
        (r"xs\[1\] must have the shape of xs\[0\]", lambda: ops.qcat([Q, Q[..., :3]], [1.0, 1.0], [0, 0], 1, 1.0, 0)),
        (r"xs\[1\] must have the shape of xs\[0\]", lambda: ops.qcat([Q, Q[0]], [1.0, 1.0], [0, 0], 1, 1.0, 0)),
        (r"table must have shape \[256\]", lambda: ops.qlookup(Q, torch.zeros(255, dtype=torch.uint8))),
    ],
)
def test_bad_arguments_are_named(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
