"""The CUDA library as built: its ops, its symbols, and the machine code of its kernels. Needs no GPU."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from pykernels.cuda import tables
from pykernels.ops import _load

PATH = _load.library_path("pykernels_cuda")
ROOT = pathlib.Path(__file__).parent.parent
if os.environ.get("PYKERNELS_REQUIRE_EMULATOR") and PATH is None:  # built together
    raise FileNotFoundError("pykernels_cuda.so was not built, and PYKERNELS_REQUIRE_EMULATOR forbids to skip its tests")
pytestmark = pytest.mark.skipif(PATH is None, reason="pykernels_cuda.so was not built: PYKERNELS_CUDA=on make build")


def loaded(code: str) -> str:
    """What code prints in an interpreter that has loaded the library, as `lib`; a CPU build of torch can do that."""
    begin = f"import sys; sys.path.append({str(ROOT)!r}); import torch, pykernels; lib = torch.ops.pykernels"
    code = f"{begin}\ntorch.ops.load_library({str(PATH)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- ops -------------------------------------------------------------------------------------------------------------
OPS = ("int8_gemm", "int8_conv", "int8_few_channels")
FEW_SIZES = (3, 5, 7)  # of kernels of few channels: an object each


@pytest.fixture(scope="module")
def configurations() -> dict[str, dict[str, int]]:
    """The compute capability (times 10) that every configuration needs, by op and name."""
    texts = loaded(f"for op in {OPS}: print(getattr(lib, f'_cuda_{{op}}_configs')())").split("\n\n")
    return {
        op: {name: int(arch) for name, arch in (line.split(",") for line in text.splitlines())}
        for op, text in zip(OPS, texts, strict=False)
    }


def own(configurations: dict[str, dict[str, int]], arch: int) -> list[int]:
    """Kernels of the objects of GEMMs and convolutions for an architecture: one for each width of output, and for
    clusters of 2x2, which write bytes, another one. Bands are an argument."""
    found = []
    for op in OPS[:2]:
        names = [name for name, needed in configurations[op].items() if needed == arch]
        tiles = [name for name in names if "2x2" not in name and "bands" not in name]
        found += [3 + (f"{tile} 2x2" in names) for tile in tiles]
    return found


@pytest.mark.parametrize("op", OPS)
def test_every_configuration_of_a_table_is_in_the_library(configurations: dict[str, dict[str, int]], op: str) -> None:
    for path in tables.FOLDER.glob("*.json"):
        names = {name for rows in json.loads(path.read_text()).get(op, {}).values() for _, name in rows}
        newest = 90 if path.stem == "sm90" else 80
        assert {configurations[op][name] for name in names - {tables.TRITON}} <= {80, newest}


def test_the_configurations_for_few_channels_are_those_of_the_tables(configurations: dict[str, dict[str, int]]) -> None:
    assert configurations["int8_few_channels"] == dict.fromkeys(tables.FEW_CHANNELS.values(), 80)


def test_a_cpu_tensor_finds_no_implementation() -> None:
    code = """
a, one = torch.zeros(1, 16, 4, 4, dtype=torch.uint8).to(memory_format=torch.channels_last), torch.zeros(16)
w, rest = torch.zeros(16, 16, dtype=torch.int8), (1.0, 0, 1.0, 0, "none", None, 1.0, 0, "before", 0)
for call in (
    lambda: lib._cuda_int8_gemm(w.byte(), w, w.float(), one, one.int(), one, None, None, *rest),
    lambda: lib._cuda_int8_conv(a, w, a.float(), [1, 1], [1, 1], [0] * 4, [1, 1], one, one.int(), one, *rest),
    lambda: lib._cuda_int8_few_channels(a[:, :3], w, a.float(), [3, 3], [1, 1], [1] * 4, one, one.int(), one, *rest),
):
    try:
        call()
    except NotImplementedError as error:
        print("'CPU' backend" in str(error))
"""
    assert loaded(code).split() == ["True"] * 3


STAND_IN = """
from pykernels.cuda import tables
from pykernels import reference
from pykernels.ops import _load
from pykernels.reference.quantize import ACTIVATIONS, requantize
from pykernels.cuda.triton import conv, linear, pack

def finish(op, acc, out, scale, sums, bias, x_scale, x_zero_point, out_scale, out_zero_point, activation, residual,
           residual_scale, residual_zero_point, residual_order, config):
    print(next(name for name, (index, _) in tables.configurations(op).items() if index == config))
    f = (acc - x_zero_point * sums).float() * (torch.tensor(x_scale) * scale) + bias
    if residual is not None:
        f = f + (residual.view(f.shape).int() - residual_zero_point).float() * torch.tensor(residual_scale)
    result = requantize(ACTIVATIONS[activation](f), out_scale, out_zero_point, out.dtype)
    out.movedim(1, -1).copy_(result.view(out.movedim(1, -1).shape))

def gemm(a, b, out, scale, sums, bias, row_scale, row_zero_point, *rest):
    finish("int8_gemm", (a.double() @ b.double().t()).int(), out, scale, sums, bias, *rest)

def int8_conv(x, w, out, kernel, stride, padding, dilation, scale, sums, bias, *rest):
    w = w.view(-1, *kernel, x.shape[1]).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(x.double(), padding)
    acc = torch.nn.functional.conv2d(padded, w.double(), None, stride, 0, dilation).int()
    finish("int8_conv", acc.permute(0, 2, 3, 1).reshape(-1, w.shape[0]), out, scale, sums, bias, *rest)

def few_channels(x, w, out, kernel, stride, padding, scale, sums, bias, x_scale, x_zero_point, *rest):
    c, n = x.shape[1], w.shape[0]
    w = w.view(n, kernel[0], -1)[..., : kernel[1] * c].reshape(n, *kernel, c).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(x.double(), padding, value=x_zero_point)
    acc = torch.nn.functional.conv2d(padded, w.double(), None, stride).int()
    acc = acc.permute(0, 2, 3, 1).reshape(-1, n)
    finish("int8_few_channels", acc, out, scale, sums, bias, x_scale, x_zero_point, *rest)

torch.library.impl("pykernels::_cuda_int8_few_channels", "CPU", few_channels)
torch.library.impl("pykernels::_cuda_int8_gemm", "CPU", gemm)
torch.library.impl("pykernels::_cuda_int8_conv", "CPU", int8_conv)
_load.CUDA_ERROR = None
scale, bias = torch.rand(32) + 0.1, torch.randn(32)
"""


def test_the_launcher_of_int8_linear_calls_it_with_its_own_arguments() -> None:
    """On the CPU, with a Python function as its implementation there."""
    pytest.importorskip("triton")
    code = """
x = torch.randint(0, 256, (100, 48), dtype=torch.uint8)
w = torch.randint(-128, 128, (32, 48), dtype=torch.int8)
quantized = (0.02, 130, 0.7, 3, torch.int8, "hardswish")
y = linear.int8_linear(x, pack.int8_linear_pack(w, scale, bias), 32, *quantized)
print(torch.equal(y, reference.int8_linear(x, w, scale, bias, *quantized)))
"""
    name, equal = loaded(STAND_IN + code).splitlines()
    assert name == "sm90 16x64x256 swapped"  # what the table of the tests' machine says for 100 rows
    assert equal == "True"


@pytest.mark.parametrize("residual", [False, True])
def test_the_launcher_of_qconv2d_calls_it_with_its_own_arguments(residual: bool) -> None:
    """Kernel, strides, padding and dilation that are different along height and width."""
    pytest.importorskip("triton")
    code = f"""
x = torch.randint(0, 256, (3, 16, 90, 81), dtype=torch.uint8).to(memory_format=torch.channels_last)
w = torch.randint(-128, 128, (32, 16, 2, 3), dtype=torch.int8)
geometry = ([2, 3], [1, 2], [3, 1, 0, 2], [2, 1], 1)
shape = reference.qconv2d(x, w, scale, bias, *geometry[1:], 0.02, 0, 0.7).shape
r = torch.randint(0, 256, shape, dtype=torch.uint8).to(memory_format=torch.channels_last) if {residual} else None
rest = (0.02, 0, 0.7, 3, torch.int8, "relu6", r, 0.3, 7)
y = conv.qconv2d(x, pack.qconv2d_pack(w, scale, bias), 32, *geometry, *rest)
print(torch.equal(y, reference.qconv2d(x, w, scale, bias, *geometry[1:], *rest)))
"""
    name, equal = loaded(STAND_IN + code).splitlines()
    assert name == "sm90 128x64x64 pingpong"
    assert equal == "True"


@pytest.mark.parametrize(("dtype", "kernel"), [("uint8", (3, 2)), ("int8", (2, 7))])
def test_the_launcher_of_few_channels_calls_it_with_its_own_arguments(dtype: str, kernel: tuple[int, int]) -> None:
    """u8 that is contiguous, s8 that is channels_last."""
    pytest.importorskip("triton")
    code = f"""
x = torch.randint(0, 256, (2, 3, 9, 14), dtype=torch.uint8).view(torch.{dtype})
x = x.to(memory_format=torch.channels_last) if {dtype == "int8"} else x
w = torch.randint(-128, 128, (32, 3, *{kernel}), dtype=torch.int8)
geometry = ([2, 1], [3, 1, 0, 2], [1, 1], 1)
rest = (0.02, 11, 0.7, 3, torch.int8, "silu")
y = conv.qconv2d(x, pack.qconv2d_pack(w, scale, bias), 32, list({kernel}), *geometry, *rest)
print(torch.equal(y, reference.qconv2d(x, w, scale, bias, *geometry, *rest)))
"""
    name, equal = loaded(STAND_IN + code).splitlines()
    assert name == f"sm80 {max(kernel)}x{max(kernel)} by 32"
    assert equal == "True"


def test_the_tuner_calls_every_configuration_with_its_arguments() -> None:
    pytest.importorskip("triton")
    code = """
from benchmarks.gpu import tune
from pykernels.cuda.triton.conv_shape import conv_shape
x = torch.empty(1, 32, 6, 5, device="meta", dtype=torch.uint8)
s = conv_shape("qconv2d", x, 48, [3, 3], [2, 2], [1] * 4, [1, 1], 1)
x = torch.empty(1, 3, 6, 5, device="meta", dtype=torch.uint8)
few = [conv_shape("qconv2d", x, 48, [k, k], [2, 2], [1] * 4, [1, 1], 1) for k in (3, 5, 7)]
library = [tune.library_gemm(5, 32, 48, (9, 0), "cpu"), tune.library_conv(s, (9, 0), "cpu")]
for calls in [*library, *(tune.library_few_channels(s, (9, 0), "cpu") for s in few)]:
    for name, call in calls.items():
        print(name)
        call()
print(tune.library_gemm(5, 32, 48, (8, 9), "cpu").keys())
"""
    *lines, older = loaded(STAND_IN + code).splitlines()
    assert lines[::2] == lines[1::2]  # what was called is what the stand-in was told
    configurations = loaded(f"print(*(getattr(lib, f'_cuda_{{op}}_configs')() for op in {OPS}), sep='')")
    assert sorted(lines[::2]) == sorted(line.split(",")[0] for line in configurations.split("\n") if line)
    assert "sm80" in older and "sm90" not in older


# ---- machine code ----------------------------------------------------------------------------------------------------
def cuobjdump(*options: str) -> Iterator[str]:
    """The lines of its answer: the disassembly has millions."""
    triton = pytest.importorskip("triton")
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with subprocess.Popen([tool, *options, PATH], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0


@functools.cache
def kernels(arch: str) -> dict[str, list[tuple[int, str, str]]]:
    """Of every kernel for an architecture its instructions: address, name, operands."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    name = ""
    instruction = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*)")
    for line in cuobjdump("-sass", "-arch", arch):
        if match := instruction.match(line):
            found[name].append((int(match[1], 16), match[2], match[3]))
        elif line.lstrip().startswith("Function : "):
            name = line.split()[-1]
            found[name] = []
    return found


def counted(code: list[tuple[int, str, str]]) -> Counter[str]:
    return Counter(name for _, name, _ in code)


def instructions(arch: str, few: bool = False) -> list[Counter[str]]:
    """How often each instruction stands in every kernel for an architecture: those of few channels, or the others."""
    return [counted(code) for name, code in kernels(arch).items() if ("few_channels" in name) is few]


def linear(name: str) -> tuple[int, int] | None:
    """Of a kernel of few channels whose outputs are bytes, and linear: its size, and its output channels a warp."""
    match = re.search(r"few_channels_convIaLi(\d)ELi(\d)ELb1E", name)
    return (int(match[1]), 8 * int(match[2])) if match else None


def loops(code: list[tuple[int, str, str]], holds: str) -> list[Counter[str]]:
    """Of the loops, with none in them, in which an instruction stands."""
    jumps = [(int(to[1], 16), at) for at, name, rest in code if name == "BRA" and (to := re.search(r"0x(\w+)", rest))]
    back = [loop for loop in jumps if loop[0] <= loop[1]]
    alone = [loop for loop in back if not any(loop[0] <= b and e <= loop[1] and (b, e) != loop for b, e in back)]
    found = [counted([each for each in code if begin <= each[0] <= end]) for begin, end in alone]
    return [counts for counts in found if matching(counts, holds)]


def matching(counts: Counter[str], pattern: str) -> int:
    return sum(count for name, count in counts.items() if re.match(pattern, name))


def test_architectures(configurations: dict[str, dict[str, int]]) -> None:
    """Machine code for 8.0 and what follows in its family, and 9.0; PTX for everything newer."""
    files = re.findall(r"\.(sm_\w+)\.cubin", "".join(cuobjdump("-lelf")))
    assert files.count("sm_80") == len(own(configurations, 80)) + len(FEW_SIZES) > len(FEW_SIZES)
    assert files.count("sm_90") == len(FEW_SIZES)
    assert files.count("sm_90a") == len(own(configurations, 90)) > 0
    assert set(files) == {"sm_80", "sm_90", "sm_90a"}
    # where the emulator is built (PYKERNELS_CUDA_TESTS), that of sm_90a as well
    assert set(re.findall(r"\.(sm_\w+)\.ptx", "".join(cuobjdump("-lptx")))) - {"sm_90a"} == {"sm_80"}


def test_no_kernel_spills(configurations: dict[str, dict[str, int]]) -> None:
    text = "".join(cuobjdump("-res-usage"))
    found = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    few = 2 * 4 * len(configurations["int8_few_channels"])  # for two architectures, and linear epilogues by themselves
    assert len(found) == sum(own(configurations, 80)) + sum(own(configurations, 90)) + few
    for name, registers, stack, local in found:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 255, name


def test_sm_90a_multiplies_bytes_by_wgmma_on_what_tma_brought(configurations: dict[str, dict[str, int]]) -> None:
    found = instructions("sm_90a")
    assert len(found) == sum(own(configurations, 90))
    for counts in found:
        assert matching(counts, r"IGMMA\.64x\d+x32\.(U8\.S8|S8\.U8)")
        assert matching(counts, "UTMALDG") and matching(counts, "UTMASTG")
        assert not matching(counts, "CALL")  # a call would serialise the multiplications
    gathering = sum(matching(counts, r"UTMALDG\.4D\.IM2COL") > 0 for counts in found)
    assert gathering == 3 * len(configurations["int8_conv"])


def test_sm_80_multiplies_bytes_on_what_cp_async_brought(configurations: dict[str, dict[str, int]]) -> None:
    found = instructions("sm_80")
    assert len(found) == sum(own(configurations, 80))
    for counts in found:
        assert matching(counts, r"IMMA\.16832\.U8\.S8\.SAT")
        assert matching(counts, "LDGSTS")
        assert not matching(counts, "CALL")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_few_channels_are_multiplied_from_registers_and_shared_memory(arch: str) -> None:
    """Eight taps of a kernel row at a time, or four of each of two; a load a tap and pixel, whatever the channels."""
    found = {sizes: code for name, code in kernels(arch).items() if (sizes := linear(name))}
    assert found.keys() == set(tables.FEW_CHANNELS)
    for (size, width), code in found.items():
        (loop,) = loops(code, "IMMA")
        halves = size * (1 if size <= 4 else 2)
        assert matching(loop, r"IMMA\.16832\.U8\.S8$") == (halves + 1) // 2 * (width // 8), (size, width)
        assert matching(loop, "LDS") == loop["LDS"] == 2 * halves
        assert matching(loop, "STG") == loop[f"STG.E{'.64' if width == 32 else ''}"] == 2
        assert not matching(loop, "LDG|STS|CALL|BAR")


# Of a thread, for sm_90: instructions an output, half of them products and loads, half the epilogue.
MOST = {(3, 32): 9.5, (3, 16): 13.0, (5, 32): 10.5, (5, 16): 14.0, (7, 32): 11.5, (7, 16): 15.0}


def test_an_output_of_few_channels_costs_few_instructions() -> None:
    """csrc/cuda/conv/few_channels.cpp counts on it, and docs/performance.md tells."""
    for name, code in kernels("sm_90").items():
        if sizes := linear(name):
            (loop,) = loops(code, "IMMA")
            outputs = sizes[1] // 2
            assert matching(loop, "I2FP") == matching(loop, "FFMA") == matching(loop, "FADD") == outputs, name
            assert matching(loop, "F2I|I2F$|FMUL") == 0
            assert sum(loop.values()) / outputs <= MOST[sizes], (name, sum(loop.values()))
            copies = loops(code, "STS")  # a loop for each number of channels
            assert len(copies) == 4
            for copy in copies:  # four pixels each
                assert sum(copy.values()) <= 70 * matching(copy, r"STS\.128") > 0, name


@pytest.mark.parametrize(("arch", "few"), [("sm_80", False), ("sm_80", True), ("sm_90", True), ("sm_90a", False)])
def test_no_product_of_the_epilogue_is_contracted(arch: str, few: bool) -> None:
    """The division of sigmoid, tanh and gelu corrects its quotient by six FFMA, and the exponential and polynomial
    beside it have up to 14; an output has one of its own, or two, and a residual one: each from a conversion.
    """
    for counts in instructions(arch, few):
        divisions = matching(counts, r"MUFU\.RCP")
        assert divisions > 0
        assert matching(counts, "FFMA") <= (6 + 14) * divisions + 2 * matching(counts, "I2F")
