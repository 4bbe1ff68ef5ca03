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
OPS = ("int8_gemm", "int8_conv")


@pytest.fixture(scope="module")
def configurations() -> dict[str, dict[str, int]]:
    """The compute capability (times 10) that every configuration needs, by op and name."""
    texts = loaded(f"for op in {OPS}: print(getattr(lib, f'_cuda_{{op}}_configs')())").split("\n\n")
    return {
        op: {name: int(arch) for name, arch in (line.split(",") for line in text.splitlines())}
        for op, text in zip(OPS, texts, strict=False)
    }


def count(configurations: dict[str, dict[str, int]], arch: int) -> int:
    return sum(list(found.values()).count(arch) for found in configurations.values())


@pytest.mark.parametrize("op", OPS)
def test_every_configuration_of_a_table_is_in_the_library(configurations: dict[str, dict[str, int]], op: str) -> None:
    for path in tables.FOLDER.glob("*.json"):
        names = {name for rows in json.loads(path.read_text()).get(op, {}).values() for _, name in rows}
        newest = 90 if path.stem == "sm90" else 80
        assert {configurations[op][name] for name in names - {tables.TRITON}} <= {80, newest}


def test_a_cpu_tensor_finds_no_implementation() -> None:
    code = """
a, one = torch.zeros(1, 16, 4, 4, dtype=torch.uint8).to(memory_format=torch.channels_last), torch.zeros(16)
w, rest = torch.zeros(16, 16, dtype=torch.int8), (1.0, 0, 1.0, 0, "none", None, 1.0, 0, "before", 0)
for call in (
    lambda: lib._cuda_int8_gemm(w.byte(), w, w.float(), one, one.int(), one, None, None, *rest),
    lambda: lib._cuda_int8_conv(a, w, a.float(), [1, 1], [1, 1], [0] * 4, [1, 1], one, one.int(), one, *rest),
):
    try:
        call()
    except NotImplementedError as error:
        print("'CPU' backend" in str(error))
"""
    assert loaded(code).split() == ["True", "True"]


STAND_IN = """
from pykernels.cuda import tables
from pykernels.ops import _load, reference
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

torch.library.impl("pykernels::_cuda_int8_gemm", "CPU", gemm)
torch.library.impl("pykernels::_cuda_int8_conv", "CPU", int8_conv)
_load.CUDA_ERROR = None
scale, bias = torch.rand(32) + 0.1, torch.randn(32)
"""


def test_the_launcher_of_int8_linear_calls_it_with_its_own_arguments() -> None:
    """On the CPU, with a Python function as its implementation there."""
    pytest.importorskip("triton")
    code = """
x = torch.randint(0, 256, (5, 48), dtype=torch.uint8)
w = torch.randint(-128, 128, (32, 48), dtype=torch.int8)
quantized = (0.02, 130, 0.7, 3, torch.int8, "hardswish")
y = linear.int8_linear(x, pack.int8_linear_pack(w, scale, bias), 32, *quantized)
print(torch.equal(y, reference.int8_linear(x, w, scale, bias, *quantized)))
"""
    name, equal = loaded(STAND_IN + code).splitlines()
    assert name == "sm90 16x64x256 swapped"  # what the table of the tests' machine says for 5 rows
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


def test_the_tuner_calls_every_configuration_with_its_arguments() -> None:
    pytest.importorskip("triton")
    code = """
from benchmarks.gpu import tune
from pykernels.cuda.triton.conv_shape import conv_shape
x = torch.empty(1, 32, 6, 5, device="meta", dtype=torch.uint8)
s = conv_shape("qconv2d", x, 48, [3, 3], [2, 2], [1] * 4, [1, 1], 1)
for calls in (tune.library_gemm(5, 32, 48, (9, 0), "cpu"), tune.library_conv(s, (9, 0), "cpu")):
    for name, call in calls.items():
        print(name)
        call()
print(tune.library_gemm(5, 32, 48, (8, 9), "cpu").keys())
"""
    *lines, older = loaded(STAND_IN + code).splitlines()
    assert lines[::2] == lines[1::2]  # what was called is what the stand-in was told
    configurations = loaded(f"print(*(getattr(lib, f'_cuda_{{op}}_configs')() for op in {OPS}), sep='')")
    assert lines[::2] == [line.split(",")[0] for line in configurations.split("\n") if line]
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
def instructions(arch: str) -> list[Counter[str]]:
    """How often each instruction stands in every kernel for an architecture."""
    found: list[Counter[str]] = []
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    for line in cuobjdump("-sass", "-arch", arch):
        if match := instruction.match(line):
            found[-1][match[1]] += 1
        elif line.lstrip().startswith("Function : "):
            found.append(Counter())
    return found


def matching(counts: Counter[str], pattern: str) -> int:
    return sum(count for name, count in counts.items() if re.match(pattern, name))


def test_architectures(configurations: dict[str, dict[str, int]]) -> None:
    """Machine code for 8.0 and what follows in its family, and 9.0; PTX for everything newer."""
    files = re.findall(r"\.(sm_\w+)\.cubin", "".join(cuobjdump("-lelf")))
    assert files.count("sm_80") == count(configurations, 80) > 0
    assert files.count("sm_90a") == count(configurations, 90) > 0
    assert set(files) == {"sm_80", "sm_90a"}
    # where the emulator is built (PYKERNELS_CUDA_TESTS), that of sm_90a as well
    assert set(re.findall(r"\.(sm_\w+)\.ptx", "".join(cuobjdump("-lptx")))) - {"sm_90a"} == {"sm_80"}


def test_no_kernel_spills(configurations: dict[str, dict[str, int]]) -> None:
    text = "".join(cuobjdump("-res-usage"))
    found = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(found) == 3 * (count(configurations, 80) + count(configurations, 90))  # one for each width of output
    for name, registers, stack, local in found:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 255, name


def test_sm_90a_multiplies_bytes_by_wgmma_on_what_tma_brought(configurations: dict[str, dict[str, int]]) -> None:
    found = instructions("sm_90a")
    assert len(found) == 3 * count(configurations, 90)
    for counts in found:
        assert matching(counts, r"IGMMA\.64x\d+x32\.(U8\.S8|S8\.U8)")
        assert matching(counts, "UTMALDG") and matching(counts, "UTMASTG")
        assert not matching(counts, "CALL")  # a call would serialise the multiplications
    gathering = sum(matching(counts, r"UTMALDG\.4D\.IM2COL") > 0 for counts in found)
    assert gathering == 3 * len(configurations["int8_conv"])


def test_sm_80_multiplies_bytes_on_what_cp_async_brought(configurations: dict[str, dict[str, int]]) -> None:
    found = instructions("sm_80")
    assert len(found) == 3 * count(configurations, 80)
    for counts in found:
        assert matching(counts, r"IMMA\.16832\.U8\.S8\.SAT")
        assert matching(counts, "LDGSTS")
        assert not matching(counts, "CALL")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_product_of_the_epilogue_is_contracted(arch: str) -> None:
    """The division of sigmoid, tanh and gelu corrects its quotient by six FFMA, and the exponential and polynomial
    beside it have up to 14; an output has one of its own, or two, and a residual one: each from a conversion.
    """
    for counts in instructions(arch):
        divisions = matching(counts, r"MUFU\.RCP")
        assert divisions > 0
        assert matching(counts, "FFMA") <= (6 + 14) * divisions + 2 * matching(counts, "I2F")
