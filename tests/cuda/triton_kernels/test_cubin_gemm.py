"""The machine code of the int8 GEMM for sm_80 and sm_90, compiled without a GPU as the launcher would have it."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
from cubin import accesses, check, compiled, resources

from pykernels.cuda.triton import floats, gemm

TYPES = {
    **dict.fromkeys(["sums", "row_zero_point", "parts"], "*i32"),
    **dict.fromkeys(["scales", "biases", "row_scale"], "*fp32"),
    **dict.fromkeys(["M", "N", "K", "lda", "ldb", "x_zero_point", "residual_zero_point", "zero_point"], "i32"),
    **dict.fromkeys(["x_scale", "residual_scale", "inverse"], "fp32"),
}
KINDS = {"uint8": "*u8", "int8": "*i8", "fp32": "*fp32", "bf16": "*u16", "fp16": "*fp16", "int32": "*i32"}
ALIGNED = {"N", "K", "lda", "ldb"}
PROCESSORS = {80: 108, 90: 132}
ROOM = {80: 164 * 1024, 90: 228 * 1024}  # shared memory of a multiprocessor
LARGE, MIDDLE, SMALL, FEW_ROWS = (8192, 8192, 4096), (2048, 1024, 1024), (100, 200, 512), (16, 4096, 8192)


def epilogue(out: str, activation: str = "relu", residual: str | None = None, rows: bool = False) -> dict[str, Any]:
    constants: dict[str, Any] = {"OUT": out, "ACTIVATION": activation, "RESIDUAL": residual, "AFTER": False}
    if residual is None:
        constants["residual"] = None
    if not rows:
        constants |= {"row_scale": None, "row_zero_point": None}
    return constants


def build(arch: int, c: gemm.Config, x: str, constants: dict[str, Any]) -> Any:
    tma, out = arch >= 90, constants["OUT"]
    types = {
        **TYPES,
        "a": f"tensordesc<{x}[{c.bm},{c.bk}]>" if tma else f"*{x}",
        "b": f"tensordesc<i8[{c.bn},{c.bk}]>" if tma else "*i8",
        "out": KINDS["int32" if c.split > 1 else out],
        "residual": KINDS[constants["RESIDUAL"] or "uint8"],
    }
    shape = {"SPLIT": c.split, "GROUP": 8, "BM": c.bm, "BN": c.bn, "BK": c.bk}
    return compiled(gemm._gemm, arch, types, {"FLIP": x == "u8", "TMA": tma, **shape, **constants}, c.options, ALIGNED)


def check_gemm(kernel: Any, arch: int, c: gemm.Config, folder: pathlib.Path, activation: str = "none") -> None:
    check(kernel, folder, 255, sums=True, activation=activation)
    ptx = kernel.asm["ptx"]
    if arch >= 90 and c.bm >= 64:
        assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8", ptx)
    else:
        assert re.search(r"mma\.sync\.aligned\.m16n8k32\.row\.col\S*\.s32\.s8\.s8\.s32", ptx)
    if arch >= 90:
        assert "cp.async.bulk.tensor.2d" in ptx
    else:
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x10|16)", ptx)
        assert not re.search(r"cp\.async\.ca", ptx)
    if activation in ("none", "relu"):  # with which tiles are measured
        # As many programs as the launcher starts find room on a multiprocessor.
        registers = -(-resources(kernel, folder)["REG"] // 8) * 8
        assert registers * 32 * c.warps * c.resident <= 65536, registers
    assert (kernel.metadata.shared + 1024) * c.resident <= ROOM[arch], kernel.metadata.shared


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("size", [LARGE, MIDDLE, SMALL, FEW_ROWS], ids=["large", "middle", "small", "few rows"])
def test_tiles_of_every_size(arch: int, size: tuple[int, int, int], tmp_path: pathlib.Path) -> None:
    c = gemm.config(arch, PROCESSORS[arch], *size)
    kernel = build(arch, c, "u8", epilogue("uint8"))
    check_gemm(kernel, arch, c, tmp_path)
    assert "st 16" in accesses(kernel)


EPILOGUES = {
    "per token": epilogue("bf16", "none", rows=True),
    "residual": epilogue("int8", "relu", "int8"),
    "curved": epilogue("fp32", "gelu", "bf16"),
}


@pytest.mark.parametrize(("arch", "name"), [(80, "residual"), *((90, name) for name in EPILOGUES)])
def test_epilogues(arch: int, name: str, tmp_path: pathlib.Path) -> None:
    c = gemm.config(arch, PROCESSORS[arch], *LARGE, adds=EPILOGUES[name]["RESIDUAL"] is not None)
    kernel = build(arch, c, "i8", EPILOGUES[name])
    check_gemm(kernel, arch, c, tmp_path, EPILOGUES[name]["ACTIVATION"])
    assert "st 16" in accesses(kernel)
    if arch >= 90:  # ptxas has not made every wgmma wait for the one before, as it does where it loses sight of them
        code = kernel.asm["sass"]
        assert code.count("WARPGROUP.DEPBAR") < code.count("IGMMA")


@pytest.mark.parametrize("arch", [80, 90])
def test_adding_up_the_parts(arch: int, tmp_path: pathlib.Path) -> None:
    constants = {**epilogue("bf16", "silu", rows=True), "SPLIT": 8, "BM": 4, "BN": 256}
    options = {"num_warps": 4, **gemm.OPTIONS}
    kernel = compiled(gemm._add_parts, arch, {**TYPES, "out": "*u16"}, constants, options, ALIGNED)
    check(kernel, tmp_path, 168, sums=True, activation="silu")
    assert {"ld 16", "st 16"} <= accesses(kernel)


@pytest.mark.parametrize("arch", [80, 90])
def test_finishing_floats(arch: int, tmp_path: pathlib.Path) -> None:
    constants = {"REAL": "bf16", "ACTIVATION": "silu", "RESIDUAL": "bf16", "AFTER": False, **floats.shape_of(4096)}
    types = {**TYPES, "y": "*u16", "residual": "*u16"}
    kernel = compiled(floats._finish_floats, arch, types, constants, {"num_warps": 4, **floats.OPTIONS}, ALIGNED)
    check(kernel, tmp_path, 168, sums=True, activation="silu")
    assert {"ld 16", "st 16"} <= accesses(kernel) and not {"ld 2", "st 2"} & accesses(kernel)


@pytest.mark.parametrize("size", [(5000, 1, 512), (1, 1, 8192)], ids=["rows", "parts"])
def test_one_column(size: tuple[int, int, int]) -> None:
    """A launch makes a constant of a 1, which has no methods of a tensor: that it compiles is what is asked."""
    c = gemm.config(90, PROCESSORS[90], *size)
    build(90, c, "u8", {**epilogue("bf16", "none", rows=True), "N": 1})
    if c.split > 1:
        constants = {**epilogue("bf16", "none", rows=True), "N": 1, "SPLIT": c.split, "BM": 4, "BN": 256}
        compiled(gemm._add_parts, 90, {**TYPES, "out": "*u16"}, constants, gemm.OPTIONS)
    constants = {"REAL": "bf16", "ACTIVATION": "none", "RESIDUAL": None, "residual": None, "AFTER": False, "N": 1}
    compiled(floats._finish_floats, 90, {**TYPES, "y": "*u16"}, {**constants, **floats.shape_of(1)}, floats.OPTIONS)
