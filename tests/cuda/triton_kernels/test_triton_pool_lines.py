"""Maxima of several lines at a time: the oracle's, interpreted; and their machine code."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from cubin import accesses, check, compiled, in_flight, instructions, resources
from inputs import BF16, FP16, FP32, S8, U8, codes, same
from interpreter import Interpreter, on_machine
from launchers import Launchers

from pykernels import reference
from pykernels.cuda.triton import pool_lines
from pykernels.cuda.triton.windows import GEOMETRY, plain

ops = torch.ops.pykernels
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "uint8": U8, "int8": S8}
RESNET = ([3, 3], [2, 2], [1, 1], [1, 1], False)
# kernel, stride, padding, dilation, ceil_mode, and the shape pooled
CASES = [
    (*RESNET, (2, 20, 9, 10)),
    ([3, 3], [2, 2], [0, 0], [1, 1], True, (1, 12, 8, 9)),
    ([5, 3], [1, 2], [2, 1], [1, 1], False, (2, 9, 6, 7)),
    ([2, 4], [3, 2], [1, 2], [1, 1], False, (1, 68, 10, 5)),
]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = codes(shape, dtype) if dtype in (U8, S8) else torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "ceil", "shape"), CASES)
@pytest.mark.parametrize("dtype", [FP32, S8])
def test_maxima(interpret: Interpreter, kernel, stride, padding, dilation, ceil, shape, dtype) -> None:
    """One multiprocessor, so that a program takes as many lines as it may; lines of the last program are missing."""
    x = values(shape, dtype)
    window = (kernel, stride, padding, dilation, ceil)
    y = interpret.apply(on_machine, (90, 0), "pool", "max_pool2d", x, *window)
    same(y, reference.max_pool2d_with_indices(x, *window)[0])


@pytest.mark.parametrize("machine", [(90, 0), (80, 0)])
def test_words_where_memory_is_cut_into_them(interpret: Interpreter, machine: tuple[int, int]) -> None:
    """Not of odd places or strides, nor before 9.0, which has no maxima of pairs of integers."""
    whole = values((1, 16, 9, 9), S8)
    for x in (whole, whole[:, 4:12], whole[:, 3:11], values((1, 18, 9, 9), S8)[:, :16]):
        y = interpret.apply(on_machine, machine, "pool", "max_pool2d", x, *RESNET)
        same(y, reference.max_pool2d_with_indices(x, *RESNET)[0])


def test_nan_wins(interpret: Interpreter) -> None:
    numbers = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.inf, -torch.inf, -0.0, 0.0])
    for dtype in (FP32, BF16, FP16):
        x = numbers[torch.randint(len(numbers), (1, 8, 9, 10))].to(dtype).contiguous(memory_format=torch.channels_last)
        y = interpret.apply(on_machine, (90, 0), "pool", "max_pool2d", x, *RESNET)
        same(y, reference.max_pool2d_with_indices(x, *RESNET)[0])


def test_which_windows_are_taken(launchers: Launchers) -> None:
    """Those that are dilated, larger than the plane or of many taps go tap by tap. The answers are the oracle's."""
    x = values((1, 4, 6, 5), U8)
    taken = {"3x3": RESNET, "one line": ([1, 3], [1, 1], [0, 1], [1, 1], False)}
    left = {
        "dilated": ([3, 3], [1, 1], [1, 1], [2, 2], False),
        "larger than the plane": ([9, 3], [1, 1], [4, 1], [1, 1], False),
        "of many taps": ([6, 5], [1, 1], [3, 2], [1, 1], False),
    }
    for name, window in {**taken, **left}.items():
        assert pool_lines.suits(plain("max_pool2d", x, *window)) == (name in taken), name
        same(ops.max_pool2d(x, *window), reference.max_pool2d_with_indices(x, *window)[0])


def shape_of(images: int, dtype: torch.dtype, arch: int) -> dict[str, Any]:
    windows = plain("max_pool2d", torch.empty(images, 64, 112, 112, device="meta"), *RESNET)
    return pool_lines.shape_of(images, 64, windows, dtype, arch, 132)


def test_lines_of_a_program_leave_enough_programs() -> None:
    assert [shape_of(images, FP32, 90)["LINES"] for images in (1, 8, 128)] == [1, 2, 4]
    disjoint = plain("max_pool2d", torch.empty(128, 64, 112, 112, device="meta"), [2, 2], [2, 2], [0, 0], [1, 1], False)
    assert pool_lines.shape_of(128, 64, disjoint, FP32, 90, 132)["LINES"] == 1


# Instructions that an output of a 3x3 window with stride 2 may cost, all counted.
MOST = [(90, "fp32", 22.0), (90, "bf16", 27.0), (90, "uint8", 8.0), (80, "uint8", 22.0)]
POINTERS = {"uint8": "*u8", "int8": "*i8", "fp32": "*fp32", "bf16": "*u16", "fp16": "*fp16"}
IN_FLIGHT = 40_000  # bytes that a multiprocessor must have asked for to keep the memory of an H200 busy


@pytest.mark.parametrize(("arch", "kind", "most"), MOST)
def test_machine_code(arch: int, kind: str, most: float, tmp_path: pathlib.Path) -> None:
    shape = shape_of(128, DTYPES[kind], arch)
    window = {"WIDE": False, "STRIDE": 2, "DOWN": 3, "RIGHT": 3}
    numbers = ["blocks", "channels", "x_batch", "x_row", "x_col", *GEOMETRY]
    types = {**dict.fromkeys(numbers, "i32"), "x": POINTERS[kind], "y": POINTERS[kind]}
    options = {"num_warps": pool_lines.THREADS // 32, **pool_lines.OPTIONS}
    constants = {"KIND": kind, "ASM": True, **window, **shape}
    aligned = {"channels", "x_batch", "x_row", "x_col"}
    kernel = compiled(pool_lines._max_lines, arch, types, constants, options, aligned)
    check(kernel, tmp_path, 96)
    assert accesses(kernel) == {"ld 16", "st 16"}
    found = instructions(kernel)
    assert found["LDG"] == 27 and found["STG"] == 4  # where single outputs would be 36 and 4
    size = DTYPES[kind].itemsize
    assert found.total() <= most * found["STG"] * 16 // size, found.total() / (64 // size)
    registers = -(-resources(kernel, tmp_path)["REG"] // 8) * 8
    # A third of the loads finds what a neighbour loads.
    assert 65536 // registers * in_flight(kernel) * 16 * 2 // 3 >= IN_FLIGHT
