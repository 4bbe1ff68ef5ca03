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

from pykernels import _load, _tuned

PATH = _load.library_path("pykernels_cuda")
ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(PATH is None, reason="pykernels_cuda.so was not built: no nvcc, or no CUTLASS headers")


def loaded(code: str) -> str:
    """What code prints in an interpreter that has loaded the library, as `lib`; a CPU build of torch can do that."""
    code = f"import torch, pykernels; torch.ops.load_library({str(PATH)!r}); lib = torch.ops.pykernels\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- ops -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def configurations() -> dict[str, int]:
    """The compute capability (times 10) that every configuration of the GEMM needs, by name."""
    text = loaded("print(lib._cuda_int8_gemm_configs(), end='')")
    return {name: int(arch) for name, arch in (line.split(",") for line in text.splitlines())}


def test_every_configuration_of_a_table_is_in_the_library(configurations: dict[str, int]) -> None:
    for path in _tuned.FOLDER.glob("*.json"):
        names = {name for rows in json.loads(path.read_text())["int8_gemm"].values() for _, name in rows}
        newest = 90 if path.stem == "sm90" else 80
        assert {configurations[name] for name in names - {_tuned.TRITON}} <= {80, newest}


def test_a_cpu_tensor_finds_no_implementation() -> None:
    code = """
try:
    a, one = torch.zeros(16, 16, dtype=torch.uint8), torch.zeros(16)
    lib._cuda_int8_gemm(a, a.char(), a.float(), one, one.int(), one, None, None, 1.0, 0, 1.0, 0, "none", None, 1.0, 0,
                        "before", 0)
except NotImplementedError as error:
    print("'CPU' backend" in str(error))
"""
    assert loaded(code).strip() == "True"


STAND_IN = """
from pykernels import _load, _tuned, reference
from pykernels.reference.quantize import ACTIVATIONS, requantize
from pykernels.triton import linear, pack

def gemm(a, b, out, scale, sums, bias, row_scale, row_zero_point, x_scale, x_zero_point, out_scale, out_zero_point,
         activation, residual, residual_scale, residual_zero_point, residual_order, config):
    names = _tuned.configurations()
    print(next(name for name, (index, _) in names.items() if index == config))
    acc = (a.double() @ b.double().t()).int() - x_zero_point * sums
    f = ACTIVATIONS[activation](acc.float() * (torch.tensor(x_scale) * scale) + bias)
    out.copy_(requantize(f, out_scale, out_zero_point, out.dtype))

torch.library.impl("pykernels::_cuda_int8_gemm", "CPU", gemm)
_load.CUDA_ERROR = None
x = torch.randint(0, 256, (5, 48), dtype=torch.uint8)
w = torch.randint(-128, 128, (32, 48), dtype=torch.int8)
scale, bias = torch.rand(32) + 0.1, torch.randn(32)
quantized = (0.02, 130, 0.7, 3, torch.int8, "hardswish")
y = linear.int8_linear(x, pack.int8_linear_pack(w, scale, bias), 32, *quantized)
print(torch.equal(y, reference.int8_linear(x, w, scale, bias, *quantized)))
"""


def test_the_launcher_of_int8_linear_calls_it_with_its_own_arguments() -> None:
    """On the CPU, with a Python function as its implementation there."""
    pytest.importorskip("triton")
    name, equal = loaded(STAND_IN).splitlines()
    assert name == "sm90 16x64x256 swapped"  # what the table of the tests' machine says for 5 rows
    assert equal == "True"


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


def test_architectures(configurations: dict[str, int]) -> None:
    """Machine code for 8.0 and what follows in its family, and 9.0; PTX for everything newer."""
    files = re.findall(r"\.(sm_\w+)\.cubin", "".join(cuobjdump("-lelf")))
    assert files.count("sm_80") == list(configurations.values()).count(80) > 0
    assert files.count("sm_90a") == list(configurations.values()).count(90) > 0
    assert set(files) == {"sm_80", "sm_90a"}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", "".join(cuobjdump("-lptx")))) == {"sm_80"}


def test_no_kernel_spills(configurations: dict[str, int]) -> None:
    text = "".join(cuobjdump("-res-usage"))
    found = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(found) == 3 * len(configurations)  # one for each width of output
    for name, registers, stack, local in found:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 255, name


def test_sm_90a_multiplies_bytes_by_wgmma_on_what_tma_brought(configurations: dict[str, int]) -> None:
    found = instructions("sm_90a")
    assert len(found) == 3 * list(configurations.values()).count(90)
    for counts in found:
        assert matching(counts, r"IGMMA\.64x\d+x32\.(U8\.S8|S8\.U8)")
        assert matching(counts, "UTMALDG") and matching(counts, "UTMASTG")
        assert not matching(counts, "CALL")  # a call would serialise the multiplications


def test_sm_80_multiplies_bytes_on_what_cp_async_brought(configurations: dict[str, int]) -> None:
    found = instructions("sm_80")
    assert len(found) == 3 * list(configurations.values()).count(80)
    for counts in found:
        assert matching(counts, r"IMMA\.16832\.U8\.S8\.SAT")
        assert matching(counts, "LDGSTS")
        assert not matching(counts, "CALL")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_product_of_the_epilogue_is_contracted(arch: str) -> None:
    """The division of sigmoid, tanh and gelu corrects its quotient by six FFMA; nothing else has any."""
    for counts in instructions(arch):
        divisions = matching(counts, r"MUFU\.RCP")
        assert divisions > 0
        assert matching(counts, "FFMA") <= 6 * divisions
