"""int8_mm, int8_linear and linear as CUDA tensors get them, interpreted: the oracle's bits, and its errors."""

from __future__ import annotations

import pytest
import torch
from interpreter import Interpreter, on_machine

from pykernels import reference
from pykernels.cuda.triton import gemm, linear, pack

ops = torch.ops.pykernels
SM_80, SM_90 = (80, 4), (90, 4)  # tiles by asynchronous copies, tiles by TMA; few multiprocessors: many tiles each
MACHINES = pytest.mark.parametrize("machine", [SM_80, SM_90], ids=["sm_80", "sm_90"])
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
EXACT_ACTIVATIONS = ["none", "relu", "relu6", "hardswish", "hardsigmoid"]
CURVED_ACTIVATIONS = ["silu", "sigmoid", "gelu", "tanh"]


def integers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape).to(dtype)


def int8_weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return integers((n, k), torch.int8), torch.rand(n) * 0.01 + 0.001, torch.randn(n)


class TestInt8MM:
    @MACHINES
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
    @pytest.mark.parametrize("shape", [(5, 40, 33), (130, 72, 300), (20, 600, 17), (1, 1, 1)])
    def test_equals_the_integer_product(
        self, interpret: Interpreter, machine: tuple[int, int], dtype: torch.dtype, shape: tuple[int, int, int]
    ) -> None:
        m, k, n = shape
        a, b = integers((m, k), dtype), integers((k, n), torch.int8)
        assert torch.equal(interpret.apply(on_machine, machine, "linear", "int8_mm", a, b), reference.int8_mm(a, b))

    @pytest.mark.parametrize("shape", [(0, 8), (5, 0), (2, 3, 8), (2, 0, 8)])
    def test_leading_and_empty_dimensions(self, interpret: Interpreter, shape: tuple[int, ...]) -> None:
        a, b = integers(shape, torch.uint8), integers((shape[-1], 6), torch.int8)
        assert torch.equal(interpret.answer("linear", "int8_mm", a, b), reference.int8_mm(a, b))

    def test_extreme_values_do_not_saturate(self, interpret: Interpreter) -> None:
        a, b = torch.full((3, 4096), 255, dtype=torch.uint8), torch.full((4096, 5), -128, dtype=torch.int8)
        expected = torch.full((3, 5), 255 * -128 * 4096, dtype=torch.int32)
        assert torch.equal(interpret.answer("linear", "int8_mm", a, b), expected)

    def test_any_strides(self, interpret: Interpreter) -> None:
        a, b = integers((30, 22), torch.int8)[::2, 1::3], integers((9, 7), torch.int8).t()
        assert torch.equal(interpret.answer("linear", "int8_mm", a, b), reference.int8_mm(a, b))

    def test_bad_arguments_are_named(self) -> None:
        a, b = integers((2, 3), torch.uint8), integers((3, 4), torch.int8)
        with pytest.raises(RuntimeError, match="a must be uint8 or int8, not float32"):
            linear.int8_mm(a.float(), b)
        with pytest.raises(RuntimeError, match="b must be int8, not uint8"):
            linear.int8_mm(a, b.to(torch.uint8))
        with pytest.raises(RuntimeError, match=r"a has 3 columns .* b has 4 rows"):
            linear.int8_mm(a, b.t())
        with pytest.raises(RuntimeError, match="b must have 2 dimensions"):
            linear.int8_mm(a, b[None])
        with pytest.raises(RuntimeError, match="a must have at least 2 dimensions"):
            linear.int8_mm(a[0], b)
        with pytest.raises(RuntimeError, match="s32 cannot hold"):
            linear.int8_mm(integers((1, 70_000), torch.uint8), integers((70_000, 1), torch.int8))


def both(interpret: Interpreter, m: int, k: int, n: int, x: torch.Tensor, *arguments, machine=SM_90, bias=True):
    """The launcher's answer, the oracle's, and the CPU op's."""
    w, scale, b = int8_weights(n, k)
    b = b if bias else None
    packed = pack.int8_linear_pack(w, scale, b)
    y = interpret.apply(on_machine, machine, "linear", "int8_linear", x, packed, n, *arguments)
    oracle = reference.int8_linear(x, w, scale, b, *arguments)
    assert y.dtype == oracle.dtype and y.is_contiguous()
    return y, oracle, ops.int8_linear(x, ops.int8_linear_pack(w, scale, b), n, *arguments)


class TestInt8Linear:
    @MACHINES
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
    @pytest.mark.parametrize("shape", [(9, 65, 40), (140, 33, 130), (70, 600, 20)])
    def test_quantized_input(self, interpret: Interpreter, machine, dtype: torch.dtype, shape) -> None:
        m, k, n = shape
        x, other = integers((m, k), dtype), {torch.uint8: torch.int8, torch.int8: torch.uint8}[dtype]
        y, oracle, _ = both(interpret, m, k, n, x, 0.02, 5, 0.3, 7, other, machine=machine, bias=m != 9)
        assert torch.equal(y, oracle)

    @MACHINES
    def test_programs_that_share_a_tile(self, interpret: Interpreter, machine) -> None:
        machine = (machine[0], 32)
        m, k, n = 17, 2100, 70
        assert gemm.by_formula(*machine, m, n, k).split > 1
        arguments = (0.02, 5, 0.3, 7, torch.int8)
        y, oracle, _ = both(interpret, m, k, n, integers((m, k), torch.uint8), *arguments, machine=machine)
        assert torch.equal(y, oracle)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8])
    @pytest.mark.parametrize("x_scale", [None, 0.02])
    def test_float_input_dynamic_and_static(self, interpret: Interpreter, dtype, out, x_scale: float | None) -> None:
        eight_bit = out in (torch.uint8, torch.int8)
        arguments = (x_scale, 100 if x_scale else 0, 0.1 if eight_bit else None, 9 if eight_bit else 0, out)
        y, oracle, _ = both(interpret, 14, 37, 19, torch.randn(2, 7, 37, dtype=dtype), *arguments)
        assert torch.equal(y, oracle)

    @pytest.mark.parametrize("activation", EXACT_ACTIVATIONS)
    def test_piecewise_linear_activations_are_exact(self, interpret: Interpreter, activation: str) -> None:
        arguments = (0.02, 3, 0.05, 10, torch.uint8, activation)
        y, oracle, _ = both(interpret, 9, 64, 40, integers((9, 64), torch.uint8), *arguments)
        assert torch.equal(y, oracle)

    @pytest.mark.parametrize("activation", CURVED_ACTIVATIONS)
    def test_curved_activations_are_within_one_step_and_the_cpu_s(self, interpret: Interpreter, activation) -> None:
        arguments = (0.02, 128, 0.02, 100, torch.uint8, activation)
        y, oracle, cpu = both(interpret, 9, 64, 40, integers((9, 64), torch.uint8), *arguments)
        assert (y.int() - oracle.int()).abs().max() <= 1
        assert torch.equal(y, cpu)
        y, _, cpu = both(interpret, 9, 64, 40, integers((9, 64), torch.uint8), 0.002, 128, None, 0, None, activation)
        assert torch.equal(y, cpu)

    @pytest.mark.parametrize("shape", [(0, 24), (1, 24), (3, 0), (24,)])
    def test_no_rows_one_row_no_columns(self, interpret: Interpreter, shape: tuple[int, ...]) -> None:
        y, oracle, _ = both(interpret, 0, shape[-1], 16, torch.randn(shape))
        assert torch.equal(y, oracle)

    def test_bad_arguments_are_named(self) -> None:
        x, (w, scale, b) = integers((2, 8), torch.uint8), int8_weights(4, 8)
        packed = pack.int8_linear_pack(w, scale, b)
        with pytest.raises(RuntimeError, match="x must be float32, bfloat16, float16, uint8 or int8, not int32"):
            linear.int8_linear(x.int(), packed, 4)
        with pytest.raises(RuntimeError, match="x_scale is required for uint8 x"):
            linear.int8_linear(x, packed, 4)
        for bad in (0.0, -1.0, float("nan"), float("inf"), 1e-45):
            with pytest.raises(RuntimeError, match="x_scale must be a positive number"):
                linear.int8_linear(x, packed, 4, bad)
        with pytest.raises(RuntimeError, match="x_zero_point must lie in"):
            linear.int8_linear(x, packed, 4, 0.1, 256)
        with pytest.raises(RuntimeError, match="out_scale is required for out_dtype uint8"):
            linear.int8_linear(x, packed, 4, 0.1, 0, None, 0, torch.uint8)
        with pytest.raises(RuntimeError, match="out_scale makes no sense for out_dtype float32"):
            linear.int8_linear(x, packed, 4, 0.1, 0, 0.1)
        with pytest.raises(RuntimeError, match="out_dtype must be"):
            linear.int8_linear(x, packed, 4, 0.1, 0, None, 0, torch.float64)
        with pytest.raises(RuntimeError, match="activation must be one of"):
            linear.int8_linear(x, packed, 4, 0.1, 0, None, 0, None, "swish")
        with pytest.raises(RuntimeError, match="packed is refused: it was packed on the CPU"):
            linear.int8_linear(x, ops.int8_linear_pack(w, scale, b), 4, 0.1)
        with pytest.raises(RuntimeError, match=r"packed is refused: it has \d+ bytes"):
            linear.int8_linear(x, packed, 40, 0.1)


class TestLinear:
    @pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
    @pytest.mark.parametrize("activation", EXACT_ACTIVATIONS + CURVED_ACTIVATIONS)
    def test_matches_the_oracle(self, interpret: Interpreter, dtype: torch.dtype, activation: str) -> None:
        x, w, b = torch.randn(2, 5, 19, dtype=dtype), torch.randn(21, 19, dtype=dtype), torch.randn(21)
        close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
        packed = pack.linear_pack(w, b)
        y = interpret.answer("linear", "linear", x, packed, 21, activation)
        torch.testing.assert_close(y, reference.linear(x, w, b, activation), **close)
        for order, kind in (("before", torch.float32), ("after", dtype)):
            r = torch.randn(2, 5, 21).to(kind)
            y = interpret.answer("linear", "linear", x, packed, 21, activation, r, order)
            torch.testing.assert_close(y, reference.linear(x, w, b, activation, r, order), **close)

    def test_without_bias_and_without_rows(self, interpret: Interpreter) -> None:
        for rows in (0, 3):
            x, w = torch.randn(rows, 8), torch.randn(700, 8)
            for activation in ("none", "tanh"):
                y = interpret.answer("linear", "linear", x, pack.linear_pack(w), 700, activation)
                torch.testing.assert_close(y, reference.linear(x, w, None, activation))

    def test_without_columns_the_bias_is_left(self, interpret: Interpreter) -> None:
        b = torch.randn(6)
        packed = pack.linear_pack(torch.randn(6, 0), b)
        y = interpret.answer("linear", "linear", torch.randn(2, 0), packed, 6, "relu")
        assert torch.equal(y, b.relu().expand(2, 6))

    def test_nan_passes_through_its_row_only(self, interpret: Interpreter) -> None:
        x, w = torch.randn(3, 9), torch.randn(5, 9)
        x[1, 4] = torch.nan
        for activation in ("relu", "relu6", "gelu"):
            y = interpret.answer("linear", "linear", x, pack.linear_pack(w), 5, activation)
            assert y[1].isnan().all() and not y[[0, 2]].isnan().any(), activation

    def test_bad_arguments_are_named(self) -> None:
        x, packed = torch.randn(2, 8), pack.linear_pack(torch.randn(4, 8))
        with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, not float64"):
            linear.linear(x.double(), packed, 4)
        with pytest.raises(RuntimeError, match=r"packed is refused: it has \d+ bytes, but bfloat16 weights"):
            linear.linear(x.bfloat16(), packed, 4)
        with pytest.raises(RuntimeError, match="activation must be one of"):
            linear.linear(x, packed, 4, "swish")
        with pytest.raises(RuntimeError, match="residual_order must be"):
            linear.linear(x, packed, 4, "relu", torch.randn(2, 4), "between")
        with pytest.raises(RuntimeError, match="residual must have the output's shape"):
            linear.linear(x, packed, 4, "relu", torch.randn(2, 5))
        with pytest.raises(RuntimeError, match="residual must be float32, bfloat16 or float16, not int8"):
            linear.linear(x, packed, 4, "relu", torch.zeros(2, 4, dtype=torch.int8))


class TestConfig:
    """What is launched, without launching it."""

    @pytest.mark.parametrize("arch", [80, 86, 90, 120])
    def test_tiles_fit_shared_memory(self, arch: int) -> None:
        room = {80: 163, 90: 227}.get(arch, 99) * 1024
        for m in (1, 16, 64, 65, 500, 5000):
            for n, k in ((16, 64), (1000, 4096), (8192, 8192)):
                c = gemm.by_formula(arch, 108, m, n, k)
                assert (c.bm + c.bn) * c.bk * c.stages * c.resident <= room, c
                assert c.split == 1 or k >= 4 * c.bk * c.split

    def test_large_problems_get_large_tiles_and_small_ones_are_shared(self) -> None:
        assert gemm.by_formula(90, 132, 8192, 8192, 4096).bn == 256
        small = gemm.by_formula(90, 132, 8, 1024, 8192)
        assert small.bm == 16 and small.split == 8
