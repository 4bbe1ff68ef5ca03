"""The pools in Triton, interpreted: maxima and averages of bytes the oracle's to the bit; and their machine code."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cubin import accesses, check, compiled, instructions
from inputs import BF16, FP16, FP32, S8, U8, codes, same
from interpreter import Interpreter, max_pool_numbered_in_64_bits
from launchers import Launchers, refuses_as_the_cpu_does

from pykernels import reference
from pykernels.cuda.triton import pool as kernels
from pykernels.cuda.triton import pool_channels
from pykernels.cuda.triton.planes import TILE, tile_shape
from pykernels.cuda.triton.windows import GEOMETRY
from pykernels.ops import pool

ops = torch.ops.pykernels
DTYPES = [FP32, BF16, FP16, U8, S8]
SLICE = (slice(None), slice(1, -1), slice(1, None), slice(2, None))
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows sliced": lambda x: F.pad(x, (2, 0, 1, 0, 1, 1))[SLICE],
    "channels last sliced": lambda x: F.pad(x, (2, 0, 1, 0, 1, 1)).contiguous(memory_format=torch.channels_last)[SLICE],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
# kernel, stride, padding, dilation, ceil_mode, and the shape pooled
PLAIN = [
    ([3, 3], [2, 2], [1, 1], [1, 1], False, (2, 19, 11, 12)),
    ([2, 2], [2, 2], [0, 0], [1, 1], True, (1, 16, 9, 7)),
    ([3, 2], [1, 3], [1, 1], [2, 3], True, (2, 5, 13, 10)),
    ([5, 5], [1, 1], [2, 2], [1, 1], False, (1, 33, 6, 6)),
    ([1, 7], [3, 1], [0, 3], [1, 1], False, (3, 1, 8, 4)),
    ([9, 9], [4, 4], [4, 4], [1, 1], True, (1, 7, 10, 8)),
    ([4, 4], [3, 3], [2, 0], [1, 1], False, (1, 64, 4, 8)),
]
ADAPTIVE = [([1, 1], (2, 35, 7, 7)), ([3, 5], (2, 16, 7, 8)), ([6, 4], (1, 5, 6, 16)), ([9, 9], (1, 3, 4, 5))]


def values(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Few distinct numbers, so that maxima tie."""
    x = codes(shape, dtype) if dtype in (U8, S8) else (torch.randint(-8, 9, shape) / 4).to(dtype)
    return LAYOUTS[layout](x)


def keeps_layout(x: torch.Tensor, y: torch.Tensor) -> None:
    last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    expected = torch.empty(y.shape, memory_format=torch.channels_last if last else torch.contiguous_format)
    assert y.stride() == expected.stride()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 sums in another order, bf16 rounded once more."""
    tolerance = 2e-6 if actual.dtype == FP32 else 2**-7
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def spread(cases: list[Any]) -> Any:
    """Each case with two layouts and dtypes of all."""
    return [
        pytest.param(*case, layout, DTYPES[(i + j) % 4], id=f"{i}-{layout}")
        for i, case in enumerate(cases)
        for j, layout in enumerate([list(LAYOUTS)[i % 5], list(LAYOUTS)[(i + 1) % 5]])
    ]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "ceil", "shape", "layout", "dtype"), spread(PLAIN))
def test_max_pool(launchers: Launchers, kernel, stride, padding, dilation, ceil, shape, layout, dtype) -> None:
    x = values(shape, dtype, layout)
    arguments = (kernel, stride, padding, dilation, ceil)
    y, indices = ops.max_pool2d_with_indices(x, *arguments)
    expected, places = reference.max_pool2d_with_indices(x, *arguments)
    same(y, expected)
    same(indices, places)
    alone = ops.max_pool2d(x, *arguments)
    same(alone, expected)
    for t in (y, indices, alone):
        keeps_layout(x, t)
    assert launchers.calls == {"max_pool2d": 1, "max_pool2d_with_indices": 1}


@pytest.mark.parametrize(("size", "shape", "layout", "dtype"), spread(ADAPTIVE))
def test_adaptive_max_pool(launchers: Launchers, size, shape, layout, dtype) -> None:
    x = values(shape, dtype, layout)
    y, indices = ops.adaptive_max_pool2d_with_indices(x, size)
    expected, places = reference.adaptive_max_pool2d_with_indices(x, size)
    same(y, expected)
    same(indices, places)
    same(ops.adaptive_max_pool2d(x, size), expected)
    keeps_layout(x, y)
    assert launchers.calls == {"adaptive_max_pool2d": 1, "adaptive_max_pool2d_with_indices": 1}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_nan_and_infinities_are_pooled_as_torch_does(launchers: Launchers, dtype: torch.dtype, layout: str) -> None:
    numbers = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -torch.inf, -torch.inf, -0.0, 0.0, 1.0])
    x = numbers[torch.randint(len(numbers), (2, 19, 13, 11))].to(dtype)
    x[0, :, :9] = -torch.inf
    x = LAYOUTS[layout](x)
    for arguments in (([3, 3], [2, 2], [1, 1], [1, 1], False), ([2, 2], [1, 1], [0, 1], [2, 1], True)):
        y, indices = ops.max_pool2d_with_indices(x, *arguments)
        expected, places = F.max_pool2d(x, *arguments, return_indices=True)
        same(y, expected)
        same(indices, places)
        same(ops.max_pool2d(x, *arguments), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_outputs_numbered_in_64_bits(interpret: Interpreter, layout: str) -> None:
    x = values((2, 19, 9, 8), FP32, layout)
    arguments = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    got = interpret.apply(max_pool_numbered_in_64_bits, x, *arguments)
    for actual, expected in zip(got, reference.max_pool2d_with_indices(x, *arguments), strict=True):
        same(actual, expected)


AFFINE = [
    (0.0173, 0, None, 0, FP32), (0.5, 3, 0.0173, 3, U8), (3.7e-3, -7, 0.02, -5, S8), (1.0, 100, None, 0, BF16),
    (0.02, 5, None, 0, FP16)
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "ceil", "shape", "layout", "dtype"), spread(PLAIN))
@pytest.mark.parametrize(("padded", "divisor"), [(False, None), (True, None), (True, -3)])
def test_average_pool(
    launchers: Launchers, kernel, stride, padding, dilation, ceil, shape, layout, dtype, padded, divisor
) -> None:
    """Windows of a few taps, and of so many that each has a program of its own."""
    x = values(shape, dtype, layout)
    arguments = (kernel, stride, padding, ceil, padded, divisor)
    if dtype.is_floating_point:
        y = ops.avg_pool2d(x, *arguments)
        close(y, reference.avg_pool2d(x, *arguments))
        assert launchers.calls == {"avg_pool2d": 1}
    else:
        arguments += AFFINE[sum(shape) % 2 + (2 if dtype == S8 else 0) * (padded is False)]
        if dtype == S8:
            arguments = (*arguments[:7], -9, *arguments[8:])
        y = ops.qavg_pool2d(x, *arguments)
        same(y, reference.qavg_pool2d(x, *arguments))
        assert launchers.calls == {"qavg_pool2d": 1}
    keeps_layout(x, y)


@pytest.mark.parametrize(("size", "shape", "layout", "dtype"), spread(ADAPTIVE + ADAPTIVE[:2]))
def test_adaptive_average_pool(launchers: Launchers, size, shape, layout, dtype) -> None:
    x = values(shape, dtype, layout)
    if dtype.is_floating_point:
        y = ops.adaptive_avg_pool2d(x, size)
        close(y, reference.adaptive_avg_pool2d(x, size))
    else:
        for affine in AFFINE:
            arguments = (size, affine[0], abs(affine[1]), *affine[2:])
            y = ops.qadaptive_avg_pool2d(x, *arguments)
            same(y, reference.qadaptive_avg_pool2d(x, *arguments))
    keeps_layout(x, y)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [FP32, U8])
def test_a_window_of_many_taps_is_divided_among_programs(launchers: Launchers, dtype: torch.dtype, layout: str) -> None:
    """Of few channels and of many; and windows of part of a line, whose taps do not lie one after another."""
    for shape, size in (((1, 8, 64, 65), [1, 1]), ((2, 3, 90, 80), [1, 1]), ((1, 40, 70, 33), [1, 2])):
        x = values(shape, dtype, layout)
        if dtype == U8:
            affine = (0.02, 3, 0.02, 3, U8)
            same(ops.qadaptive_avg_pool2d(x, size, *affine), reference.qadaptive_avg_pool2d(x, size, *affine))
        else:
            close(ops.adaptive_avg_pool2d(x, size), reference.adaptive_avg_pool2d(x, size))
    one_begins_in_the_padding = ([20, 30], [20, 40], [2, 15], False, False)
    x = values((1, 8, 36, 30), FP32, layout)
    close(ops.avg_pool2d(x, *one_begins_in_the_padding), reference.avg_pool2d(x, *one_begins_in_the_padding))


def test_parts_of_a_window_fill_the_device_and_are_not_too_short() -> None:
    assert kernels._parts(128, 392, 132) == 8  # 128 images of 64 channels: 1024 programs
    assert kernels._parts(1, 392, 132) == 64
    assert kernels._parts(1, 7, 132) == 1 and kernels._parts(1, 8, 132) == 2
    assert kernels._parts(4000, 10**6, 132) == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_kernel_far_larger_than_the_plane_pools_all_of_it(launchers: Launchers, layout: str) -> None:
    x = values((1, 5, 4, 3), FP32, layout)
    kernel, padding = [2**30 - 1] * 2, [2**29 - 1] * 2
    same(ops.max_pool2d(x, kernel, [1, 1], padding, [1, 1], False)[0, :, 1, 1], x.amax((2, 3))[0])
    y = ops.avg_pool2d(x, kernel, [1, 1], padding, False, False)
    torch.testing.assert_close(y, x.mean((2, 3), keepdim=True).expand_as(y))


def test_no_images_and_gradients(launchers: Launchers) -> None:
    empty = torch.empty(0, 4, 6, 6)
    assert pool.max_pool2d(empty, 3).shape == (0, 4, 2, 2) and pool.global_avg_pool2d(empty).shape == (0, 4, 1, 1)
    x = torch.randn(2, 5, 9, 8, requires_grad=True)
    for ours, theirs in (
        (pool.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1)),
        (pool.avg_pool2d(x, 3), F.avg_pool2d(x, 3)),
    ):
        got, expected = (torch.autograd.grad((y**2).sum(), x)[0] for y in (ours, theirs))
        torch.testing.assert_close(got, expected)


IMAGE, QUANTIZED = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8, dtype=U8)
LARGE = torch.zeros(1, 1, 1, 1, dtype=U8).expand(1, 1, 2900, 2900)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "x must be float32, bfloat16, float16, uint8 or int8, not float64",
            lambda: pool.max_pool2d(IMAGE.double(), 2),
        ),
        ("avg_pool2d: x must be float32, bfloat16 or float16, not uint8", lambda: pool.avg_pool2d(QUANTIZED, 2)),
        ("x must have 4 dimensions", lambda: pool.max_pool2d(IMAGE[0, 0], 2)),
        ("x may be empty in its batch dimension only", lambda: pool.max_pool2d(IMAGE[:, :0], 2)),
        ("kernel_size must be at least 1", lambda: pool.max_pool2d(IMAGE, 0)),
        ("kernel_size must be at least 1 and below 2", lambda: pool.max_pool2d(IMAGE, 2**40)),
        ("stride must be at least 1", lambda: pool.max_pool2d(IMAGE, 2, stride=0)),
        ("dilation must be at least 1", lambda: pool.max_pool2d(IMAGE, 2, dilation=-1)),
        ("padding must be at most half", lambda: pool.max_pool2d(IMAGE, 2, padding=2)),
        ("padding must be at least 0", lambda: pool.avg_pool2d(IMAGE, 3, padding=-1)),
        ("kernel_size 9 .* does not fit x, whose height is 8", lambda: pool.max_pool2d(IMAGE, 9)),
        ("padding 1 and dilation 3", lambda: pool.max_pool2d(IMAGE[..., :2], (1, 2), padding=(0, 1), dilation=(1, 3))),
        ("divisor_override must not be 0", lambda: pool.avg_pool2d(IMAGE, 2, divisor_override=0)),
        ("output_size must be at least 1", lambda: pool.adaptive_avg_pool2d(IMAGE, 0)),
        ("x must be uint8 or int8, not float32", lambda: pool.qavg_pool2d(IMAGE, 2, x_scale=1.0)),
        ("x_scale must be a positive number", lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=torch.nan)),
        ("x_zero_point must lie in", lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=1.0, x_zero_point=256)),
        ("out_scale must be given", lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=1.0, out_dtype=U8)),
        ("out_scale must be given", lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=1.0, out_scale=1.0)),
        ("out_dtype must be", lambda: pool.qavg_pool2d(QUANTIZED, 2, x_scale=1.0, out_dtype=torch.float64)),
        ("x has windows of 2900 x 2900", lambda: pool.qglobal_avg_pool2d(LARGE, x_scale=1.0)),
    ],
)
def test_bad_arguments_are_named_as_on_the_cpu(launchers: Launchers, message: str, call: Callable[[], object]) -> None:
    refuses_as_the_cpu_does(call, message)


# ---- machine code ----

TYPES = {
    **dict.fromkeys(GEOMETRY + kernels.AFFINE, "i32"),
    **dict.fromkeys(["rows", "cols", "channels", "x_batch", "x_row", "x_col", "y_batch", "y_row", "y_col"], "i32"),
    **dict.fromkeys(["divisor", "x_scale", "inverse"], "fp32"),
    "indices": "*i64",
    "blocks": "i32",
    "sums": "*fp32",
}
SIZES = {"rows", "cols", "channels", "x_batch", "x_row", "x_col", "y_batch", "y_row", "y_col"}
STEPS = {"step_h": 1, "step_w": 1, "x_channel": 1, "y_channel": 1}
LOOP = {
    "ADAPTIVE": False,
    "LAST": True,
    "FLAT": False,
    "PARTS": 1,
    "WIDE": False,
    "TAPS_H": 3,
    "TAPS_W": 3,
    "UNROLL": kernels.UNROLLED,
    **tile_shape(64),
}
POINTERS = {"uint8": "*u8", "int8": "*i8", "fp32": "*fp32", "bf16": "*u16", "fp16": "*fp16"}
KERNELS: list[tuple[str, dict[str, Any]]] = [
    ("_average", {"KIND": "uint8", "OUT": "uint8", "DIVISOR": "padded"}),
    ("_average", {"KIND": "fp32", "OUT": "fp32", "DIVISOR": "taps"}),
    ("_average_window", {"KIND": "uint8", "OUT": "uint8", "DIVISOR": "taps", "ADAPTIVE": True}),
    ("_average_window", {"KIND": "bf16", "OUT": "bf16", "DIVISOR": "taps", "ADAPTIVE": True}),
    ("_average_window", {"KIND": "fp32", "OUT": "fp32", "DIVISOR": "taps", "ADAPTIVE": True, "FLAT": True, "PARTS": 8}),
]


@pytest.mark.parametrize(
    ("name", "constants", "arch"), [pytest.param(*k, (90, 80)[i % 2], id=f"{k[0]}-{i}") for i, k in enumerate(KERNELS)]
)
def test_machine_code(name: str, constants: dict[str, Any], arch: int, tmp_path: pathlib.Path) -> None:
    types = {**TYPES, "x": POINTERS[constants["KIND"]], "y": POINTERS[constants.get("OUT", constants["KIND"])]}
    shape = {"SPAN": 64, "TAPS": TILE // 64} if name == "_average_window" else {}
    options = {"num_warps": 4, **kernels.OPTIONS}
    if "PARTS" not in constants:
        constants = {**constants, "sums": None}
    kernel = compiled(getattr(kernels, name), arch, types, {**STEPS, **LOOP, **shape, **constants}, options, SIZES)
    # Triton 3.8 keeps one register in memory over the calls that divide 64 bits.
    check(kernel, tmp_path, 128, stack=8)
    found = accesses(kernel)
    assert "ld 16" in found and "ld 1" not in found
    if name != "_average_window":  # which writes a few bytes at the end
        assert "st 16" in found and "st 1" not in found


@pytest.mark.parametrize(("kind", "with_indices"), [("uint8", False), ("fp32", True), ("bf16", False)])
def test_machine_code_of_maxima_in_contiguous_memory(kind: str, with_indices: bool, tmp_path: pathlib.Path) -> None:
    """Taps of an output lie a stride apart, so each is a load of its own."""
    constants = {"KIND": kind, "x_col": 1, **STEPS, **LOOP, **({} if with_indices else {"indices": None})}
    del constants["x_channel"]
    types = {**TYPES, "x_channel": "i32", "x": POINTERS[kind], "y": POINTERS[kind]}
    options = {"num_warps": kernels.warps(FP32 if kind == "fp32" else U8, with_indices), **kernels.OPTIONS}
    kernel = compiled(kernels._max, 90, types, constants, options, {"cols"})
    check(kernel, tmp_path, 168)
    assert "st 16" in accesses(kernel)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("kind", "most"), [("fp32", 38.5), ("uint8", 31.0)])
def test_machine_code_of_dilated_maxima(kind: str, most: float, arch: int, tmp_path: pathlib.Path) -> None:
    """`most`: instructions that an output of nine taps may cost, all counted, with any Triton that we promise."""
    dtype = FP32 if kind == "fp32" else U8
    shape = pool_channels.shape_of(64, 56, dtype, False)
    loop = {"ADAPTIVE": False, "WIDE": False, "TAPS_H": 3, "TAPS_W": 3, "UNROLL": pool_channels.unroll(3, 3)}
    constants = {"KIND": kind, "indices": None, "step_h": 2, "step_w": 2, **loop, **shape}
    types = {**TYPES, "x": POINTERS[kind], "y": POINTERS[kind]}
    options = {"num_warps": pool_channels.THREADS // 32, **pool_channels.OPTIONS}
    kernel = compiled(pool_channels._max_channels, arch, types, constants, options, SIZES)
    check(kernel, tmp_path, 128, stack=8)
    assert accesses(kernel) == {"ld 16", "st 16"}
    outputs = shape["PIXELS"] * shape["SPAN"] // pool_channels.THREADS
    found = instructions(kernel)
    assert found["LDG"] == 9 * outputs * dtype.itemsize // 16
    assert found.total() <= most * outputs, found.total() / outputs


@pytest.mark.parametrize("dtype", [FP32, U8])
def test_machine_code_of_indices_in_channels_last_memory(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    kind = "fp32" if dtype == FP32 else "uint8"
    shape = pool_channels.shape_of(80, 56, dtype, True)
    loop = {"ADAPTIVE": True, "WIDE": True, "TAPS_H": 5, "TAPS_W": 3, "UNROLL": pool_channels.unroll(5, 3)}
    constants = {"KIND": kind, "step_h": 1, "step_w": 1, **loop, **shape}
    types = {**TYPES, "x": POINTERS[kind], "y": POINTERS[kind]}
    options = {"num_warps": pool_channels.THREADS // 32, **pool_channels.OPTIONS}
    kernel = compiled(pool_channels._max_channels, 90, types, constants, options, SIZES)
    check(kernel, tmp_path, 128, stack=8)
    assert not {"ld 1", "st 1", "ld 2", "st 2"} & accesses(kernel)
