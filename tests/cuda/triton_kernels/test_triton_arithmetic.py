"""qadd, qmul, qcat and qlookup in Triton, interpreted: the oracle's bits and the CPU's; and their machine code."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch
from cubin import accesses, check, compiled, in_flight, instructions
from inputs import LAYOUTS, LOW, S8, U8, codes, same
from launchers import Launchers, refuses_as_the_cpu_does
from torch.utils._python_dispatch import _disable_current_modes

from pykernels import reference
from pykernels.cuda.triton import arithmetic
from pykernels.cuda.triton.arguments import ACTIVATIONS
from pykernels.cuda.triton.planes import TILE, tile_shape
from pykernels.ops import quantize as ops

SHAPE = (2, 19, 5, 16)
OWN_EXP = ("silu", "sigmoid", "gelu", "tanh")  # where the CPU's ops differ from torch's functions


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [U8, S8])
def test_qadd_over_every_pair_of_bytes_is_the_cpus(launchers: Launchers, activation: str, dtype: torch.dtype) -> None:
    low = LOW[dtype]
    a, b = torch.meshgrid(*[torch.arange(low, low + 256, dtype=dtype)] * 2, indexing="ij")
    arguments = (a, b, 0.05, low + 100, 0.031, low + 77, 0.027, low + 128, dtype, activation)
    got = ops.qadd(*arguments)
    assert launchers.calls["qadd"] == 1
    with _disable_current_modes():
        same(got, ops.qadd(*arguments))
    if activation not in OWN_EXP:
        same(got, reference.qadd(*arguments))


@pytest.mark.parametrize(
    ("layout", "other", "dtypes"),
    [
        ("contiguous", "contiguous", (U8, U8, U8)),
        ("channels_last", "channels_last", (U8, S8, U8)),
        ("channels_last", "contiguous", (S8, U8, S8)),
        ("transposed", "channels_last", (S8, S8, U8)),
        ("strided", "offset", (U8, U8, S8)),
        ("expanded", "contiguous", (S8, S8, S8)),
        ("overlapping", "strided", (U8, S8, S8)),
    ],
)
def test_qadd_and_qmul_in_every_layout(
    launchers: Launchers, layout: str, other: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    a = LAYOUTS[layout](codes(SHAPE, dtypes[0]))
    b = codes(tuple(a.shape), dtypes[1])
    b = LAYOUTS[other](b) if a.dim() == 4 else b
    zeros = [LOW[dtype] + shift for dtype, shift in zip(dtypes, (3, 250, 128), strict=True)]
    arguments = (a, b, 0.05, zeros[0], 0.07, zeros[1], 0.06, zeros[2], dtypes[2])
    same(ops.qadd(*arguments, "relu"), reference.qadd(*arguments, "relu"), like=a)
    same(ops.qmul(*arguments), reference.qmul(*arguments), like=a)
    assert launchers.calls == {"qadd": 1, "qmul": 1}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 37, 4, 4), (1, 130, 1, 6), (2, 64, 12, 9)])
def test_a_factor_for_each_channel(launchers: Launchers, layout: str, shape: tuple[int, ...]) -> None:
    a = LAYOUTS[layout](codes(shape, S8))
    b = codes((*a.shape[:2], 1, 1), U8)
    arguments = (a, b, 0.05, -7, 1 / 255, 3, 0.04, 5, S8)
    same(ops.qmul(*arguments), reference.qmul(*arguments), like=a)
    same(ops.qadd(*arguments, "relu6"), reference.qadd(*arguments, "relu6"), like=a)
    assert launchers.calls == {"qadd": 1, "qmul": 1}


def test_sums_beyond_fp32_are_as_on_the_cpu(launchers: Launchers) -> None:
    """inf - inf is NaN, through every activation the zero point."""
    a, b = torch.tensor([0, 0, 255, 255], dtype=U8), torch.tensor([0, 255, 0, 255], dtype=U8)
    for activation in ACTIVATIONS:
        arguments = (a, b, 3e38, 128, 3e38, 128, 1e38, 77, U8, activation)
        got = ops.qadd(*arguments)
        with _disable_current_modes():
            same(got, ops.qadd(*arguments))
    assert launchers.calls["qadd"] == len(ACTIVATIONS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("dim", "out"), [(0, U8), (1, U8), (1, S8), (-2, S8), (3, U8)])
def test_qcat(launchers: Launchers, layout: str, dim: int, out: torch.dtype) -> None:
    """Copies, requantizes, and passes over what has no elements."""
    xs = []
    for size, dtype in ((16, out), (0, U8), (37, S8), (3, U8)):
        shape = list((2, 5, 4, 6))
        shape[dim] = size
        xs.append(LAYOUTS[layout](codes(tuple(shape), dtype)))
    arguments = (xs, [0.1, 0.1, 0.23, 0.07], [3, 3, -9, 200], dim, 0.1, 3, out)
    got = ops.qcat(*arguments)
    same(got, reference.qcat(*arguments))
    with _disable_current_modes():
        assert got.stride() == ops.qcat(*arguments).stride()
    assert launchers.calls == {"qcat": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "out"), [(U8, S8), (S8, U8)])
def test_qlookup(launchers: Launchers, layout: str, dtype: torch.dtype, out: torch.dtype) -> None:
    x, table = LAYOUTS[layout](codes(SHAPE, dtype)), codes((256,), out)
    same(ops.qlookup(x, table), reference.qlookup(x, table), like=x)
    assert launchers.calls == {"qlookup": 1}


def test_no_elements(launchers: Launchers) -> None:
    x = torch.empty((2, 0, 3, 3), dtype=U8)
    for got in (
        ops.qadd(x, x, 1.0, 0, 1.0, 0, 1.0, 0),
        ops.qmul(x, x[:, :, :1, :1], 1.0, 0, 1.0, 0, 1.0, 0),
        ops.qcat([x, x], [1.0, 1.0], [0, 0], 1, 1.0, 0),
        ops.qlookup(x, torch.zeros(256, dtype=U8)),
    ):
        assert got.shape == x.shape


X, Q = torch.zeros(2, 6, 5, 7), torch.zeros(2, 6, 5, 7, dtype=U8)
ONES, ZEROS = [1.0, 1.0], [0, 0]


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("a_scale must be a positive number that fp32 holds", lambda: ops.qadd(Q, Q, 0.0, 0, 1.0, 0, 1.0, 0)),
        ("b_scale must be a positive number that fp32 holds", lambda: ops.qadd(Q, Q, 1.0, 0, 1e300, 0, 1.0, 0)),
        ("out_scale must be a positive number that fp32", lambda: ops.qmul(Q, Q, 1.0, 0, 1.0, 0, -1.0, 0)),
        (r"scales\[1\] must be a positive number", lambda: ops.qcat([Q, Q], [1.0, torch.inf], ZEROS, 1, 1.0, 0)),
        ("a must be uint8 or int8", lambda: ops.qadd(X, Q, 1.0, 0, 1.0, 0, 1.0, 0)),
        ("b must be uint8 or int8", lambda: ops.qmul(Q, X, 1.0, 0, 1.0, 0, 1.0, 0)),
        ("out_dtype must be uint8 or int8", lambda: ops.qmul(Q, Q, 1.0, 0, 1.0, 0, 1.0, 0, torch.float32)),
        (r"xs\[1\] must be uint8 or int8", lambda: ops.qcat([Q, X], ONES, ZEROS, 1, 1.0, 0)),
        ("table must be uint8 or int8", lambda: ops.qlookup(Q, torch.zeros(256))),
        ("x must be uint8 or int8", lambda: ops.qlookup(X, torch.zeros(256, dtype=U8))),
        ("a_zero_point must lie in", lambda: ops.qadd(Q, Q, 1.0, -1, 1.0, 0, 1.0, 0)),
        ("b_zero_point must lie in", lambda: ops.qmul(Q, Q, 1.0, 0, 1.0, 256, 1.0, 0)),
        ("out_zero_point must lie in", lambda: ops.qadd(Q, Q, 1.0, 0, 1.0, 0, 1.0, 200, S8)),
        (r"zero_points\[1\] must lie in", lambda: ops.qcat([Q, Q], ONES, [0, 300], 1, 1.0, 0)),
        ("b must have the shape of a", lambda: ops.qadd(Q, Q[:1], 1.0, 0, 1.0, 0, 1.0, 0)),
        ("activation must be one of none, relu", lambda: ops.qadd(Q, Q, 1.0, 0, 1.0, 0, 1.0, 0, U8, "swish")),
        ("scales must have 2 numbers", lambda: ops.qcat([Q, Q], [1.0], ZEROS, 1, 1.0, 0)),
        ("zero_points must have 2 numbers", lambda: ops.qcat([Q, Q], ONES, [0], 1, 1.0, 0)),
        ("dim must lie in", lambda: ops.qcat([Q, Q], ONES, ZEROS, 4, 1.0, 0)),
        (r"xs\[1\] must have the shape of xs\[0\]", lambda: ops.qcat([Q, Q[..., :3]], ONES, ZEROS, 1, 1.0, 0)),
        (r"xs\[1\] must have the shape of xs\[0\]", lambda: ops.qcat([Q, Q[0]], ONES, ZEROS, 1, 1.0, 0)),
        (r"table must have shape \[256\]", lambda: ops.qlookup(Q, torch.zeros(255, dtype=U8))),
    ],
)
def test_bad_arguments_are_named_as_on_the_cpu(launchers: Launchers, message: str, call: Callable[[], object]) -> None:
    refuses_as_the_cpu_does(call, message)


# ---- machine code ----

TYPES = {
    **dict.fromkeys(["a", "b", "x", "out", "table"], "*u8"),
    **dict.fromkeys(["n", "rows"], "i64"),
    **dict.fromkeys(["cols", "pixels", "width", "offset", *arithmetic.ZERO_POINTS], "i32"),
    **dict.fromkeys(["a_scale", "b_scale", "scale", "inverse"], "fp32"),
}
SIZES = {"n", "rows", "cols", "width", "offset"}
FIXED = {"OUT": "uint8", "CLAMPS": False, "ASM": True, "TILE": TILE, "OP": "add", **tile_shape(256)}
KERNELS = [
    ("_binary", {"ACTIVATION": "relu", "CLAMPS": True}),
    ("_binary", {"ACTIVATION": "relu"}),
    ("_binary", {"ACTIVATION": "hardswish", "OP": "add"}),
    ("_binary", {"ACTIVATION": "gelu"}),
    ("_binary_channels", {"ACTIVATION": "none", "OP": "mul", "COLUMNS": True, "CLAMPS": True}),
    ("_binary_channels", {"ACTIVATION": "none", "OP": "mul", "COLUMNS": False}),
    ("_place_rows", {"COPY": True}),
    ("_place_rows", {"COPY": False}),
    ("_lookup", {}),
]


@pytest.mark.parametrize(
    ("name", "constants", "arch"), [pytest.param(*k, (90, 80)[i % 2], id=f"{k[0]}-{i}") for i, k in enumerate(KERNELS)]
)
def test_machine_code(name: str, constants: dict[str, object], arch: int, tmp_path: pathlib.Path) -> None:
    kernel = compiled(
        getattr(arithmetic, name), arch, TYPES, {**FIXED, **constants}, arithmetic.OPTIONS, SIZES
    )  # fmt: skip
    check(kernel, tmp_path, 96, activation=str(constants.get("ACTIVATION")))
    assert {"ld 16", "st 16"} <= accesses(kernel)
    assert "st 1" not in accesses(kernel)


# An H200 issues seven instructions in the time of a byte, and a sum moves three.
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_instructions_of_a_sum(activation: str, tmp_path: pathlib.Path) -> None:
    constants = {**FIXED, "ACTIVATION": activation, "CLAMPS": True}
    kernel = compiled(arithmetic._binary, 90, TYPES, constants, arithmetic.OPTIONS, SIZES)
    check(kernel, tmp_path, 32)
    assert accesses(kernel) == {"ld 16", "st 16"}
    assert instructions(kernel).total() <= 16 * TILE // 128
    assert in_flight(kernel) == 2
