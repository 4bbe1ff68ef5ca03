"""quantize_* and dequantize_* in Triton, interpreted: the oracle's bits for every layout; and their machine code."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch
from cubin import accesses, check, compiled
from inputs import BF16, FP16, FP32, LAYOUTS, LOW, S8, U8, numbers, same
from launchers import Launchers, refuses_as_the_cpu_does

from pykernels import reference
from pykernels.cuda.triton import quantize
from pykernels.cuda.triton.planes import TILE, tile_shape
from pykernels.ops import quantize as ops

SPREAD = [  # every layout, both kinds of numbers and of bytes
    pytest.param(layout, (FP32, BF16, FP16)[i % 3], (U8, S8)[i // 2 % 2], id=f"{layout}-{i}")
    for i, layout in enumerate([*LAYOUTS, "contiguous", "channels_last"])
]
SHAPE = (2, 19, 5, 16)


@pytest.mark.parametrize(("layout", "real", "dtype"), SPREAD)
def test_per_tensor(launchers: Launchers, layout: str, real: torch.dtype, dtype: torch.dtype) -> None:
    for zero in (LOW[dtype], LOW[dtype] + 131, LOW[dtype] + 255):
        x = LAYOUTS[layout](numbers(SHAPE, real))
        q = ops.quantize_per_tensor(x, 0.125, zero, dtype)
        same(q, reference.quantize_per_tensor(x, 0.125, zero, dtype), like=x)
        y = ops.dequantize_per_tensor(q, 0.0371, zero, real)
        same(y, reference.dequantize_per_tensor(q, 0.0371, zero, real), like=x)
    assert launchers.calls == {"quantize_per_tensor": 3, "dequantize_per_tensor": 3}


@pytest.mark.parametrize(("layout", "real", "dtype"), SPREAD)
def test_per_channel(launchers: Launchers, layout: str, real: torch.dtype, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](numbers(SHAPE, real))
    for axis in range(-1, x.dim() - 1):
        n = x.shape[axis]
        scale, zero = torch.rand(n, dtype=torch.float64) + 0.01, torch.randint(LOW[dtype], LOW[dtype] + 256, (n,))
        q = ops.quantize_per_channel(x, scale, zero, axis, dtype)
        same(q, reference.quantize_per_channel(x, scale, zero, axis, dtype), like=x)
        y = ops.dequantize_per_channel(q, scale, zero.int(), axis, real)
        same(y, reference.dequantize_per_channel(q, scale, zero, axis, real), like=q)
    assert launchers.calls["quantize_per_channel"] == launchers.calls["dequantize_per_channel"] == x.dim()


@pytest.mark.parametrize(("layout", "real", "dtype"), SPREAD)
def test_per_token(launchers: Launchers, layout: str, real: torch.dtype, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](numbers(SHAPE, real))
    q, scale, zero = ops.quantize_per_token(x, dtype)
    expected = reference.quantize_per_token(x, dtype)
    for got, right in zip((q, scale, zero), expected, strict=True):
        same(got, right)
    same(q, expected[0], like=x)
    y = ops.dequantize_per_token(q, scale, zero, real)
    same(y, reference.dequantize_per_token(q, scale, zero, real), like=q)
    assert launchers.calls == {"quantize_per_token": 1, "dequantize_per_token": 1}


@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize("length", [1, 300, 2049, quantize.LONGEST, quantize.LONGEST + 77])
def test_tokens_of_every_length(launchers: Launchers, length: int, dtype: torch.dtype) -> None:
    """Rows that share a tile, that fill one, and that are read twice."""
    x = numbers((3, length), (BF16, FP16)[length % 2])
    for got, right in zip(ops.quantize_per_token(x, dtype), reference.quantize_per_token(x, dtype), strict=True):
        same(got, right)
    assert launchers.calls["quantize_per_token"] == 1


@pytest.mark.parametrize("dtype", [U8, S8])
def test_tokens_at_the_edges(launchers: Launchers, dtype: torch.dtype) -> None:
    nan, inf = torch.nan, torch.inf
    rows = [
        [0.0, -0.0, 0.0], [1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], [nan, 1.0, -2.0], [nan, nan, nan], [inf, 1.0, -2.0],
        [inf, -inf, nan], [-inf, 1.0, 5.0], [3e38, -3e38, 0.0], [1e-40, -1e-42, 0.0], [2.9e-36, -1e-39, 0.0],
    ]  # fmt: skip
    x = torch.tensor(rows)
    for got, right in zip(ops.quantize_per_token(x, dtype), reference.quantize_per_token(x, dtype), strict=True):
        same(got, right)


@pytest.mark.parametrize("block", [1, 16, 33, 2048, 100_000])
@pytest.mark.parametrize(("layout", "real"), [("contiguous", BF16), ("channels_last", FP32), ("strided", FP32)])
def test_per_block(launchers: Launchers, layout: str, real: torch.dtype, block: int) -> None:
    """The last block is short."""
    x = LAYOUTS[layout](numbers(SHAPE, real))
    q, scale = ops.quantize_per_block(x, block)
    expected, expected_scale = reference.quantize_per_block(x, block)
    same(q, expected, like=x)
    same(scale, expected_scale)
    y = ops.dequantize_per_block(q, scale, block, real)
    same(y, reference.dequantize_per_block(q, scale, block, real), like=q)
    assert launchers.calls == {"quantize_per_block": 1, "dequantize_per_block": 1}


@pytest.mark.parametrize("shape", [(0,), (5, 0), (2, 0, 3, 3)])
def test_no_elements(launchers: Launchers, shape: tuple[int, ...]) -> None:
    x, q = torch.empty(shape), torch.empty(shape, dtype=U8)
    assert ops.quantize_per_tensor(x, 0.1).shape == ops.dequantize_per_tensor(q, 0.1).shape == shape
    for axis, n in enumerate(shape):
        scale, zero = torch.ones(n), torch.zeros(n, dtype=torch.int64)
        assert ops.quantize_per_channel(x, scale, zero, axis).shape == shape
        assert ops.dequantize_per_channel(q, scale, zero, axis).shape == shape
    token = ops.quantize_per_token(x)
    assert (token[1] == 1).all() and (token[2] == 0).all() and token[1].shape == (*shape[:-1], 1)
    assert ops.dequantize_per_token(*token).shape == shape
    block = ops.quantize_per_block(x, 32)
    assert ops.dequantize_per_block(*block, 32).shape == shape and block[1].shape == (0,)


X, Q = torch.zeros(2, 6, 5, 7), torch.zeros(2, 6, 5, 7, dtype=U8)
S6, Z6 = torch.ones(6), torch.zeros(6, dtype=torch.int64)
TOKEN = (Q, torch.ones(2, 6, 5, 1), torch.zeros(2, 6, 5, 1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("scale must be a positive number that fp32 holds, not 1e-300", lambda: ops.quantize_per_tensor(X, 1e-300)),
        ("scale must be a positive number that fp32 holds, not nan", lambda: ops.dequantize_per_tensor(Q, torch.nan)),
        ("scale must be a positive number that fp32 holds, not 1e-40", lambda: ops.dequantize_per_tensor(Q, 1e-40)),
        ("x must be float32, bfloat16 or float16, not float64", lambda: ops.quantize_per_tensor(X.double(), 0.1)),
        ("x must be float32, bfloat16 or float16, not int32", lambda: ops.quantize_per_token(X.int())),
        ("x must be float32, bfloat16 or float16, not int64", lambda: ops.quantize_per_block(X.long(), 4)),
        ("x must be float32, bfloat16 or float16, not uint8", lambda: ops.quantize_per_channel(Q, S6, Z6, 1)),
        ("x must be uint8 or int8, not float32", lambda: ops.dequantize_per_tensor(X, 0.1)),
        ("x must be uint8 or int8, not int32", lambda: ops.dequantize_per_channel(Q.int(), S6, Z6, 1)),
        ("x must be int8, not uint8", lambda: ops.dequantize_per_block(Q, torch.rand(14), 32)),
        ("dtype must be uint8 or int8, not float32", lambda: ops.quantize_per_token(X, FP32)),
        ("dtype must be float32, bfloat16 or float16, not uint8", lambda: ops.dequantize_per_tensor(Q, 0.1, 0, U8)),
        ("scale must be float32 or float64, not float16", lambda: ops.quantize_per_channel(X, S6.half(), Z6, 1)),
        ("zero_point must be int32 or int64, not float32", lambda: ops.quantize_per_channel(X, S6, Z6.float(), 1)),
        ("scale must be float32, not float64", lambda: ops.dequantize_per_token(Q, TOKEN[1].double(), TOKEN[2])),
        ("zero_point must be int32, not int64", lambda: ops.dequantize_per_token(Q, TOKEN[1], TOKEN[2].long())),
        (r"zero_point must lie in \[0, 255\] for uint8, not 256", lambda: ops.quantize_per_tensor(X, 0.1, 256)),
        (r"zero_point must lie in \[-128, 127\] for int8", lambda: ops.quantize_per_tensor(X, 0.1, 128, S8)),
        (r"axis must lie in \[-4, 3\] for x of shape \[2, 6, 5, 7\]", lambda: ops.quantize_per_channel(X, S6, Z6, 4)),
        (r"scale must have shape \[5\], the size of x along ax", lambda: ops.quantize_per_channel(X, S6, Z6, 2)),
        ("x must have at least 1 dimension", lambda: ops.quantize_per_token(torch.tensor(1.0))),
        ("scale must have the shape of x", lambda: ops.dequantize_per_token(Q, TOKEN[1][..., 0], TOKEN[2])),
        ("block_size must be at least 1, not 0", lambda: ops.quantize_per_block(X, 0)),
        (r"scale must have shape \[14\]", lambda: ops.dequantize_per_block(Q.view(S8), torch.rand(13), 32)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_as_on_the_cpu(launchers: Launchers, message: str, call: Callable[[], object]) -> None:
    refuses_as_the_cpu_does(call, message)


# ---- machine code ----

TYPES = {
    "scale": "*fp32", "zero_point": "*i32", "n": "i64", "cols": "i32", "channels": "i32", "inverse": "fp32",
}  # fmt: skip
REALS = {"fp32": "*fp32", "bf16": "*u16", "fp16": "*fp16"}
ROWS = {"COLUMNS": False, **tile_shape(256)}
KERNELS = [
    ("_quantize", {"TILE": TILE}, {"ld 16", "st 16"}),
    ("_dequantize", {"TILE": TILE}, {"ld 16", "st 16"}),
    ("_quantize_channels", {"COLUMNS": True, **tile_shape(64)}, {"ld 16", "st 16"}),
    ("_dequantize_channels", ROWS, {"ld 16", "st 16"}),
    ("_quantize_rows", quantize.row_shape(1024), {"ld 16", "st 16"}),
    ("_quantize_rows", quantize.row_shape(quantize.LONGEST), {"ld 16", "st 16"}),
    ("_quantize_rows", quantize.row_shape(quantize.LONGEST + 1), {"ld 16", "st 16"}),
]


@pytest.mark.parametrize(
    ("name", "constants", "wide", "arch", "real"),
    [
        pytest.param(*kernel, (90, 80)[i % 2], ("fp32", "bf16", "fp16")[i % 3], id=f"{kernel[0]}-{i}")
        for i, kernel in enumerate(KERNELS)
    ],
)
def test_machine_code(
    name: str, constants: dict[str, object], wide: set[str], arch: int, real: str, tmp_path: pathlib.Path
) -> None:
    types = {**TYPES, "x": REALS[real], "q": "*u8"}
    if name in ("_quantize", "_dequantize"):
        types.update(scale="fp32", zero_point="i32")
    options = {**quantize.OPTIONS, **{key: value for key, value in constants.items() if key.islower()}}
    given = {key: value for key, value in constants.items() if key.isupper()}
    kernel = compiled(
        getattr(quantize, name),
        arch,
        types,
        {"REAL": real, "OUT": "uint8", **given},
        options,
        {"n", "cols", "channels"},
    )
    check(kernel, tmp_path, 96)
    assert wide <= accesses(kernel)
    assert not {"ld 1", "st 1", "st 2"} & accesses(kernel)
