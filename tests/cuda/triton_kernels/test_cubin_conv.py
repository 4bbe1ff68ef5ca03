"""The machine code of the int8 convolutions for sm_80 and sm_90, compiled as the launchers would have it."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch
import triton
from cubin import accesses, check, compiled, resources

from pykernels.cuda.triton import conv, depthwise, few_channels, gemm
from pykernels.cuda.triton.conv_shape import ConvShape, conv_shape

TYPES = {
    **dict.fromkeys(["x", "out", "residual"], "*u8"),
    "w": "*i8",
    **dict.fromkeys(["sums"], "*i32"),
    **dict.fromkeys(["scales", "biases"], "*fp32"),
    **dict.fromkeys(["M", "N", "K", "C", "ROW", "PIXEL", "OC", *gemm.NUMBERS], "i32"),
    **dict.fromkeys([*conv.SIZES, *depthwise.SIZES, *few_channels.SIZES], "i32"),
    **dict.fromkeys(["x_scale", "residual_scale", "inverse"], "fp32"),
}
ALIGNED = {"N", "K", "C", "ROW", "PIXEL", "OC"}
PROCESSORS = {80: 108, 90: 132}
# Of ResNet-50, batches of 32 and 1: images, channels, size, output channels, kernel, stride.
SIZES = {
    "thin": (32, 16, 112, 64, 3, 1),
    "large": (32, 128, 56, 128, 3, 1),
    "wide": (32, 256, 14, 256, 3, 1),
    "one image": (1, 512, 7, 512, 3, 1),
}


def shape_of(images: int, channels: int, size: int, out: int, kernel: int, stride: int, groups: int = 1) -> ConvShape:
    x = torch.empty(images, channels, size, size, dtype=torch.uint8, device="meta")
    return conv_shape("qconv2d", x, out, [kernel] * 2, [stride] * 2, [kernel // 2] * 4, [1, 1], groups)


def plain(residual: str | None = None, activation: str = "relu") -> dict[str, Any]:
    absent = ["row_scale", "row_zero_point", *([] if residual else ["residual"])]
    shared = {"ACTIVATION": activation, "RESIDUAL": residual, "AFTER": False, "OUT": "uint8"}
    return {**dict.fromkeys(absent), **shared}


def build(arch: int, size: str, epilogue: dict[str, Any], fill: bool) -> tuple[Any, gemm.Config]:
    s = shape_of(*SIZES[size])
    row = s.layout(torch.int8).row
    c = conv.conv_config(arch, PROCESSORS[arch], s, row)
    shape = {"SPLIT": c.split, "GROUP": gemm.GROUP, "BM": c.bm, "BN": c.bn, "BK": c.bk}
    constants = {"FLIP": True, "FILL": fill, "WHOLE": row % c.bk == 0, **shape, **epilogue}
    types = {**TYPES, "out": "*i32"} if c.split > 1 else TYPES
    return compiled(conv._conv, arch, types, constants, c.options, ALIGNED), c


@pytest.mark.parametrize(
    ("arch", "size", "residual", "fill"),
    [
        (80, "thin", None, False),
        (90, "thin", None, True),
        (80, "large", "uint8", False),
        (90, "large", "uint8", False),
        (80, "wide", None, True),
        (90, "wide", None, True),
        (90, "one image", None, False),
    ],
)
def test_implicit_gemm(arch: int, size: str, residual: str | None, fill: bool, tmp_path: pathlib.Path) -> None:
    kernel, c = build(arch, size, plain(residual), fill)
    check(kernel, tmp_path, 255, sums=True)
    ptx = kernel.asm["ptx"]
    if arch >= 90 and c.bm >= 64:
        assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8", ptx)
    else:
        assert re.search(r"mma\.sync\.aligned\.m16n8k32\.row\.col\S*\.s32\.s8\.s8\.s32", ptx)
    # Both operands come 16 bytes at a time, past the registers.
    assert "cp.async.cg.shared.global" in ptx and "cp.async.ca" not in ptx
    assert "st 16" in accesses(kernel)
    registers = -(-resources(kernel, tmp_path)["REG"] // 8) * 8
    assert registers * 32 * c.warps * c.resident <= 65536, registers


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("size", [(3, 64, 7), (3, 32, 3), (9, 96, 11)], ids=["7x7", "3x3", "11x11"])
def test_few_channels(arch: int, size: tuple[int, int, int], tmp_path: pathlib.Path) -> None:
    channels, out, kernel = size
    s = shape_of(32, channels, 224, out, kernel, 2)
    run = s.layout(torch.int8).row
    c = few_channels.few_config(arch, s.o, kernel, run)
    shape = {"GROUP": gemm.GROUP, "BM": c.bm, "BN": c.bn, "BK": c.bk, "RUN": run}
    constants = {"FLIP": True, "WORDS": True, **shape, **plain()}
    built = compiled(few_channels._conv_few, arch, TYPES, constants, c.options, ALIGNED - {"C"})
    check(built, tmp_path, 255, sums=True)
    code = built.asm["sass"]
    # The words of a thread go to shared memory 16 bytes at a time, and their bytes are nowhere looked at one by one.
    if not triton.__version__.startswith("3.6."):  # which stores them byte by byte
        assert "STS.128" in code and "STS.U8" not in code
    assert {"ld 4", "st 16"} <= accesses(built) and not {"ld 1", "st 1"} & accesses(built)
    registers = -(-resources(built, tmp_path)["REG"] // 8) * 8
    assert registers * 32 * c.warps * c.resident <= 65536, registers


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("residual", "x", "kw"), [(None, "u8", 3), ("uint8", "i8", 5)])
def test_depthwise(arch: int, residual: str | None, x: str, kw: int, tmp_path: pathlib.Path) -> None:
    constants = {**plain(residual, "relu6"), "KW": kw, "DP4A": True, **depthwise.tile_of(96)}
    options = {"num_warps": 4, **depthwise.OPTIONS}
    kernel = compiled(depthwise._depthwise, arch, {**TYPES, "x": f"*{x}", "w": "*i32"}, constants, options, ALIGNED)
    check(kernel, tmp_path, 128, sums=True)
    found = accesses(kernel)
    assert {"ld 16", "st 16"} <= found and not {"ld 1", "st 1"} & found, found
    # 16 channels a thread, four taps an instruction.
    assert set(re.findall(r"dp4a\S*", kernel.asm["ptx"])) == {f"dp4a.{'u32' if x == 'u8' else 's32'}.s32"}
    assert len(re.findall(r"\bIDP\.4A", kernel.asm["sass"])) == 16 * -(-kw // 4)


def test_one_output_channel() -> None:
    """A launch makes a constant of a 1, which has no methods of a tensor: that it compiles is what is asked."""
    s = shape_of(32, 64, 56, 1, 3, 1)
    c = conv.conv_config(90, PROCESSORS[90], s, 64)
    shape = {"SPLIT": c.split, "GROUP": gemm.GROUP, "BM": c.bm, "BN": c.bn, "BK": c.bk, "N": 1, "OC": 1}
    constants = {"FLIP": True, "FILL": True, "WHOLE": True, **shape, **plain("uint8")}
    compiled(conv._conv, 90, TYPES, constants, c.options, ALIGNED)
