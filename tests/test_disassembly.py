"""The machine code of the dot tiles and the depthwise kernels, read without running it, so of every isa on any host.

What is looked for was seen: GCC 12 keeps a tile's accumulators on the stack unless the source is written with care, and
the kernel then computes the right numbers at a third of its speed.
"""

from __future__ import annotations

import itertools
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pykernels import _host

ROOT = pathlib.Path(__file__).parents[1]
BYTES = re.compile(r"vpdpbusd|v?pmaddwd")
DOT = re.compile(rf"{BYTES.pattern}|vdpbf16ps|vfmadd|\bmulps")
ISAS = ["avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"]
WIDE = [isa for isa in ISAS if not isa.startswith("avx2") and isa != "avxvnni"]
EXPECTED = {
    ("avx2", "DotS8"): r"vpmaddwd .*%ymm",
    ("avx2", "DotF32"): r"vfmadd\d+ps .*%ymm",
    ("avxvnni", "DotS8"): r"\{vex\} vpdpbusd .*%ymm",
    ("avxvnni", "DotF32"): r"vfmadd\d+ps .*%ymm",
    ("avx512", "DotS8"): r"vpmaddwd .*%zmm",
    ("avx512", "DotF32"): r"vfmadd\d+ps .*%zmm",
    ("avx512vnni", "DotS8"): r"vpdpbusd .*%zmm",
    ("avx512vnni", "DotF32"): r"vfmadd\d+ps .*%zmm",
    ("avx512bf16", "DotS8"): r"vpdpbusd .*%zmm",
    ("avx512bf16", "DotBF16"): r"vdpbf16ps .*%zmm",
    ("avx512bf16", "DotF32"): r"vfmadd\d+ps .*%zmm",
    ("amx", "DotF32"): r"vfmadd\d+ps .*%zmm",
}

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")


def kernel_object(isa: str, source: str) -> pathlib.Path:
    if _host.build()["emulated"]:
        pytest.skip("this build emulates what it would read here")
    if not _host.build()["compiler"].startswith("GNU") or _host.build()["sanitizers"]:
        pytest.skip("the tiles are tuned to an unsanitized build by GCC")
    for folder in (pathlib.Path(sys.prefix) / "build", ROOT / "build"):
        path = folder / f"CMakeFiles/kernels_{isa}.dir/csrc/cpu/{source}.o"
        if path.exists():
            return path
    pytest.skip("installed from a wheel: its object files are not here")


def functions(path: pathlib.Path) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Each function's demangled name and its instructions with their addresses."""
    listing = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    for function in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        if name := re.match(r"[0-9a-f]+ <(.*)>:\n", function):
            instructions = re.findall(r"^\s+([0-9a-f]+):\s+(.*)$", function, re.M)
            yield name[1], [(int(address, 16), text) for address, text in instructions]


def tiles(isa: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Each tile function: "DotS8, 12, 2" (element, rows, panels) and its instructions with their addresses."""
    for name, instructions in functions(kernel_object(isa, "tile/dot.cpp")):
        if tile := re.search(r"\btile<.*?(Dot\w+, \d+, \d+)>", name):
            yield tile[1], instructions


def products_of(name: str) -> re.Pattern[str]:
    """What multiplies in a kernel: of bytes, FMAs only finish."""
    return BYTES if "DotS8" in name else DOT


def inner_loops(instructions: list[tuple[int, str]], products: re.Pattern[str] = DOT) -> list[list[str]]:
    """The innermost loops that multiply: from the target of a backward jump to the jump, none inside another."""
    at = {address: i for i, (address, _) in enumerate(instructions)}
    spans = []
    for i, (_, text) in enumerate(instructions):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        if jump and at.get(int(jump[1], 16), i + 1) <= i:
            span = (at[int(jump[1], 16)], i)
            if any(products.search(body) for _, body in instructions[span[0] : i + 1]):
                spans.append(span)
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[text for _, text in instructions[first : last + 1]] for first, last in inner]


@pytest.mark.parametrize("isa", ISAS)
def test_inner_loops_of_the_dot_tiles_stay_in_registers(isa: str) -> None:
    seen = 0
    for name, instructions in tiles(isa):
        for loop in inner_loops(instructions, products_of(name)):
            seen += 1
            stack = [text for text in loop if "%rsp" in text or "%rbp)" in text]
            assert not [text for text in stack if "mm" in text], f"{name} spills: {stack}"
    assert seen >= 26


@pytest.mark.parametrize("isa", ISAS)
def test_inner_loops_of_the_depthwise_kernels_stay_in_registers(isa: str) -> None:
    seen = 0
    for name, instructions in functions(kernel_object(isa, "conv/depthwise.cpp")):
        for loop in inner_loops(instructions, products_of(name)):
            seen += 1
            stack = [text for text in loop if "%rsp" in text or "%rbp)" in text]
            assert not [text for text in stack if "mm" in text], f"{name} spills: {stack}"
    assert seen >= 7


@pytest.mark.parametrize(("isa", "element"), EXPECTED)
def test_dot_tiles_multiply_with_the_instruction_of_their_isa(isa: str, element: str) -> None:
    for name, instructions in tiles(isa):
        dot, rows, panels = name.split(", ")
        if dot != element:
            continue
        wanted = products_of(element)
        products = [text for text in itertools.chain(*inner_loops(instructions, wanted)) if wanted.search(text)]
        registers = {"vpmaddwd": 512 // 256 if isa in WIDE else 512 // 128}.get(products[0].split()[0])
        registers = registers or (1 if isa in WIDE else 2)
        assert len(products) == int(rows) * int(panels) * registers, f"{name}: {products}"
        assert all(re.match(EXPECTED[isa, element], text) for text in products), f"{name}: {products}"


@pytest.mark.parametrize(("element", "product"), [("AmxS8", "tdpbusd"), ("AmxBF16", "tdpbf16ps")])
def test_tiles_of_amx_load_each_operand_once_a_step(element: str, product: str) -> None:
    seen = 0
    for name, instructions in functions(kernel_object("amx", "tile/dot.cpp")):
        tile = re.search(rf"\bin_tiles<.*{element}, (\d)>", name)
        if not tile:
            continue
        seen += 1
        panels = int(tile[1])
        products = [text for _, text in instructions if text.startswith("tdp")]
        assert len(products) == 2 * panels, name  # whole steps and the last
        assert all(re.fullmatch(rf"{product} +%tmm[57],%tmm[46],%tmm[0-3]", text) for text in products), products
        starts = panels if element == "AmxS8" else 0  # where sums of bytes begin
        assert len([text for _, text in instructions if text.startswith("tileloadd")]) == 2 * panels + 4 + starts
    assert seen == 4  # panels; rows are loaded where they stand or from a copy


PEAKS = EXPECTED | {("scalar", "DotS8"): r"pmaddwd .*%xmm", ("scalar", "DotF32"): r"mulps .*%xmm"}


@pytest.mark.parametrize(("isa", "element"), PEAKS)
def test_the_measured_peak_is_of_multiplications_done_in_every_step(isa: str, element: str) -> None:
    name = {"DotS8": "int8(long)", "DotBF16": "bf16(long)", "DotF32": "fp32(long)"}[element]
    (instructions,) = (
        body for title, body in functions(kernel_object(isa, "peak/kernels.cpp")) if title.endswith(name)
    )
    (loop,) = inner_loops(instructions)
    products = [text for text in loop if re.match(PEAKS[isa, element], text)]
    assert len(products) == (24 if isa in WIDE else 12)
    if isa != "scalar":  # SSE2 has two operands: it must copy one
        assert not [text for text in loop if text.startswith("vmov")]
