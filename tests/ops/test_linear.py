"""int8_mm, linear and int8_linear: exact against the oracle on every isa, and clear about bad arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pykernels import _host, reference

ops = torch.ops.pykernels

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 129]))
CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
}
EXACT_ACTIVATIONS = ["none", "relu", "relu6", "hardswish", "hardsigmoid"]
CURVED_ACTIVATIONS = ["silu", "sigmoid", "gelu", "tanh"]


def integers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape).to(dtype)


def int8_weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return integers((n, k), torch.int8), torch.rand(n) * 0.01 + 0.001, torch.randn(n)


class TestInt8MM:
    @given(m=SIZES, k=SIZES, n=SIZES, dtype=st.sampled_from([torch.uint8, torch.int8]))
    def test_equals_the_integer_product(self, isa: str, m: int, k: int, n: int, dtype: torch.dtype) -> None:
        a, b = integers((m, k), dtype), integers((k, n), torch.int8)
        assert torch.equal(ops.int8_mm(a, b), reference.int8_mm(a, b))

    def test_extreme_values_do_not_saturate(self, isa: str) -> None:
        a, b = torch.full((3, 4096), 255, dtype=torch.uint8), torch.full((4096, 20), -128, dtype=torch.int8)
        assert torch.equal(ops.int8_mm(a, b), torch.full((3, 20), 255 * -128 * 4096, dtype=torch.int32))

    @pytest.mark.parametrize("shape", [(0, 8), (5, 0), (2, 3, 8), (2, 0, 8)])
    def test_leading_and_empty_dimensions(self, isa: str, shape: tuple[int, ...]) -> None:
        a, b = integers(shape, torch.uint8), integers((shape[-1], 6), torch.int8)
        assert torch.equal(ops.int8_mm(a, b), reference.int8_mm(a, b))

    def test_any_strides(self, isa: str) -> None:
        a, b = integers((30, 22), torch.int8)[::2, 1::3], integers((9, 7), torch.int8).t()
        assert torch.equal(ops.int8_mm(a, b), reference.int8_mm(a, b))

    def test_bad_arguments_are_named(self) -> None:
        a, b = integers((2, 3), torch.uint8), integers((3, 4), torch.int8)
        with pytest.raises(RuntimeError, match="a must be uint8 or int8, not float32"):
            ops.int8_mm(a.float(), b)
        with pytest.raises(RuntimeError, match="b must be int8, not uint8"):
            ops.int8_mm(a, b.to(torch.uint8))
        with pytest.raises(RuntimeError, match=r"a has 3 columns .* b has 4 rows"):
            ops.int8_mm(a, b.t())
        with pytest.raises(RuntimeError, match="b must have 2 dimensions"):
            ops.int8_mm(a, b[None])
        with pytest.raises(RuntimeError, match="a must have at least 2 dimensions"):
            ops.int8_mm(a[0], b)

    def test_a_reduction_too_long_for_s32_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="s32 cannot hold"):
            ops.int8_mm(integers((1, 70_000), torch.uint8), integers((70_000, 1), torch.int8))


class TestLinear:
    @given(m=SIZES, k=SIZES, n=SIZES, dtype=st.sampled_from(list(CLOSE)), bias=st.booleans())
    def test_matches_the_oracle(self, isa: str, m: int, k: int, n: int, dtype: torch.dtype, bias: bool) -> None:
        x, w, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.randn(n) if bias else None
        y = ops.linear(x, ops.linear_pack(w, b), n)
        torch.testing.assert_close(y, reference.linear(x, w, b), **CLOSE[dtype])

    @pytest.mark.parametrize("activation", EXACT_ACTIVATIONS + CURVED_ACTIVATIONS)
    @pytest.mark.parametrize("order", ["before", "after"])
    def test_residual_and_activation(self, isa: str, activation: str, order: str) -> None:
        x, w, r = torch.randn(2, 5, 19), torch.randn(21, 19), torch.randn(2, 5, 21)
        y = ops.linear(x, ops.linear_pack(w, None), 21, activation, r, order)
        torch.testing.assert_close(y, reference.linear(x, w, None, activation, r, order), **CLOSE[torch.float32])

    def test_nan_and_infinity_pass_through_their_row_only(self, isa: str) -> None:
        x, w = torch.randn(3, 9), torch.randn(5, 9)
        x[1, 4] = torch.nan
        y = ops.linear(x, ops.linear_pack(w), 5, "relu")
        assert y[1].isnan().all() and not y[[0, 2]].isnan().any()

    def test_bad_arguments_are_named(self) -> None:
        x, packed = torch.randn(2, 8), ops.linear_pack(torch.randn(4, 8))
        with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, not float64"):
            ops.linear(x.double(), packed, 4)
        with pytest.raises(RuntimeError, match="x has 7 features"):
            ops.linear(x[:, :7], packed, 4)
        with pytest.raises(RuntimeError, match="out_features is 5, but packed was made for 4"):
            ops.linear(x, packed, 5)
        with pytest.raises(RuntimeError, match="packed holds float32 weights, but x needs bfloat16"):
            ops.linear(x.bfloat16(), packed, 4)
        with pytest.raises(RuntimeError, match="packed holds float16 weights, but x needs bfloat16"):
            ops.linear(x.bfloat16(), ops.linear_pack(torch.randn(4, 8).half()), 4)
        with pytest.raises(RuntimeError, match="activation must be one of"):
            ops.linear(x, packed, 4, "swish")
        with pytest.raises(RuntimeError, match="residual_order must be"):
            ops.linear(x, packed, 4, "relu", torch.randn(2, 4), "between")
        with pytest.raises(RuntimeError, match="residual must have the output's shape"):
            ops.linear(x, packed, 4, "relu", torch.randn(2, 5))
        with pytest.raises(RuntimeError, match=r"bias must have shape \[4\]"):
            ops.linear_pack(torch.randn(4, 8), torch.randn(5))


class TestPacked:
    def test_the_bytes_are_the_same_on_every_isa(self) -> None:
        w, scale, bias = int8_weights(33, 50)
        before = ops._isa()
        packed = []
        for isa in (name for name, available in _host.isas().items() if available):
            ops._set_isa(isa)
            packed.append(ops.int8_linear_pack(w, scale, bias))
        ops._set_isa(before)
        assert all(torch.equal(p, packed[0]) for p in packed)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda p: p[:-1].clone(), "truncated"),
            (lambda p: p[:60].clone(), "shorter than a packed header"),
            (lambda p: torch.cat([p, p[:1]]), "truncated or padded"),
            (lambda p: torch.zeros_like(p), "not made by a pykernels"),
            (lambda p: torch.cat([p[:20], p[20:21] + 1, p[21:]]), "header is damaged"),
            (lambda p: p.view(torch.int8), "contiguous 1-D uint8"),
            (lambda p: p.expand(2, -1), "contiguous 1-D uint8"),
        ],
    )
    def test_a_damaged_tensor_is_refused(self, damage, message: str) -> None:
        packed = ops.linear_pack(torch.randn(4, 8))
        with pytest.raises(RuntimeError, match=message):
            ops.linear(torch.randn(2, 8), damage(packed), 4)

    @given(st.integers(0, 127), st.integers(1, 255))
    def test_no_flipped_header_byte_is_run(self, at: int, flip: int) -> None:
        packed = ops.linear_pack(torch.randn(4, 8))
        packed[at] ^= flip
        with pytest.raises(RuntimeError, match="packed is refused"):
            ops.linear(torch.randn(2, 8), packed, 4)


class TestInt8Linear:
    @given(m=SIZES, k=SIZES, n=SIZES, dtype=st.sampled_from([torch.uint8, torch.int8]), bias=st.booleans())
    def test_quantized_input(self, isa: str, m: int, k: int, n: int, dtype: torch.dtype, bias: bool) -> None:
        x, (w, scale, b) = integers((m, k), dtype), int8_weights(n, k)
        b = b if bias else None
        y = ops.int8_linear(x, ops.int8_linear_pack(w, scale, b), n, 0.02, 5, 0.3, 7, dtype)
        assert torch.equal(y, reference.int8_linear(x, w, scale, b, 0.02, 5, 0.3, 7, dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8])
    @pytest.mark.parametrize("x_scale", [None, 0.02])
    def test_float_input_dynamic_and_static(self, isa: str, dtype: torch.dtype, out, x_scale: float | None) -> None:
        x, (w, scale, b) = torch.randn(2, 7, 37, dtype=dtype), int8_weights(19, 37)
        eight_bit = out in (torch.uint8, torch.int8)
        arguments = (x_scale, 100 if x_scale else 0, 0.1 if eight_bit else None, 9 if eight_bit else 0, out)
        y = ops.int8_linear(x, ops.int8_linear_pack(w, scale, b), 19, *arguments)
        assert torch.equal(y, reference.int8_linear(x, w, scale, b, *arguments))

    @pytest.mark.parametrize("activation", EXACT_ACTIVATIONS)
    def test_piecewise_linear_activations_are_exact(self, isa: str, activation: str) -> None:
        x, (w, scale, b) = integers((9, 64), torch.uint8), int8_weights(40, 64)
        arguments = (0.02, 3, 0.05, 10, torch.uint8, activation)
        y = ops.int8_linear(x, ops.int8_linear_pack(w, scale, b), 40, *arguments)
        assert torch.equal(y, reference.int8_linear(x, w, scale, b, *arguments))

    @pytest.mark.parametrize("activation", CURVED_ACTIVATIONS)
    def test_curved_activations_are_within_one_step(self, isa: str, activation: str) -> None:
        x, (w, scale, b) = integers((9, 64), torch.uint8), int8_weights(40, 64)
        arguments = (0.02, 128, 0.02, 100, torch.uint8, activation)
        y = ops.int8_linear(x, ops.int8_linear_pack(w, scale, b), 40, *arguments)
        oracle = reference.int8_linear(x, w, scale, b, *arguments)
        assert (y.int() - oracle.int()).abs().max() <= 1

    @pytest.mark.parametrize("rows", [0, 1])
    def test_no_rows_and_one_row(self, isa: str, rows: int) -> None:
        x, (w, scale, b) = torch.randn(rows, 24), int8_weights(16, 24)
        y = ops.int8_linear(x, ops.int8_linear_pack(w, scale, b), 16)
        assert torch.equal(y, reference.int8_linear(x, w, scale, b))

    def test_bad_arguments_are_named(self) -> None:
        x, (w, scale, b) = integers((2, 8), torch.uint8), int8_weights(4, 8)
        packed = ops.int8_linear_pack(w, scale, b)
        with pytest.raises(RuntimeError, match="x_scale is required for uint8 x"):
            ops.int8_linear(x, packed, 4)
        for bad in (0.0, -1.0, float("nan"), float("inf"), 1e-45):
            with pytest.raises(RuntimeError, match="x_scale must be a positive number"):
                ops.int8_linear(x, packed, 4, bad)
        with pytest.raises(RuntimeError, match="x_zero_point must lie in"):
            ops.int8_linear(x, packed, 4, 0.1, 256)
        with pytest.raises(RuntimeError, match="out_scale is required for out_dtype uint8"):
            ops.int8_linear(x, packed, 4, 0.1, 0, None, 0, torch.uint8)
        with pytest.raises(RuntimeError, match="out_scale makes no sense for out_dtype float32"):
            ops.int8_linear(x, packed, 4, 0.1, 0, 0.1)
        with pytest.raises(RuntimeError, match="out_dtype must be"):
            ops.int8_linear(x, packed, 4, 0.1, 0, None, 0, torch.float64)
        with pytest.raises(RuntimeError, match="weight must be int8"):
            ops.int8_linear_pack(w.float(), scale, b)
        with pytest.raises(RuntimeError, match="weight_scale must be a positive number"):
            ops.int8_linear_pack(w, scale * 0, b)
        with pytest.raises(RuntimeError, match=r"weight_scale must have shape \[4\]"):
            ops.int8_linear_pack(w, scale[:3], b)
