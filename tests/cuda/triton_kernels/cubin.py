"""Kernels compiled for a GPU that is not here, and what their machine code is to be.

Looked for are what would change bits (products contracted into FMAs, approximate division, denormals flushed) and what
would cost speed (registers spilled to memory, narrow loads and stores).
"""

from __future__ import annotations

import pathlib
import re
import subprocess
from collections import Counter
from collections.abc import Collection
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(
    kernel: Any,
    arch: int,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    aligned: Collection[str] = (),
) -> Any:
    """`kernel` for sm_`arch`: pointers to 16-byte aligned memory; numbers named in `aligned` are multiples of 16, as
    Triton finds out at a launch. `types` and `constants` may name arguments that this kernel lacks."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in aligned and name not in constants)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(kernel: Any, folder: pathlib.Path) -> dict[str, int]:
    """Registers of a thread (REG), its bytes of spilled ones (STACK and LOCAL)."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert found.keys() == {"REG", "STACK", "LOCAL"}, text
    return found


def instructions(kernel: Any) -> Counter[str]:
    """How often each stands in its machine code, by the first part of its name; without NOPs, which fill the end."""
    found = re.findall(r"\t(?:@!?U?P\w+ )?([A-Z]\w*)", kernel.asm["sass"])
    return Counter(name for name in found if name != "NOP")


def accesses(kernel: Any) -> set[str]:
    """The global loads and stores of its PTX, as `ld 16`: bytes a thread."""
    found = set()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"]):
        found.add(f"{kind} {int(vector or 1) * int(bits) // 8}")
    return found


# Of one activated number; each divides once.
FMAS = {"silu": 8, "sigmoid": 8, "gelu": 13, "tanh": 13}


def check(
    kernel: Any, folder: pathlib.Path, registers: int, sums: bool = False, activation: str = "none", stack: int = 0
) -> None:
    """FMAs are those of a curved activation, and with `sums`, the epilogue of s32 sums, one for each sum and residual
    that becomes a float. `stack`: bytes that may be."""
    ptx = kernel.asm["ptx"]
    assert re.search(r"\.target sm_\d+", ptx)
    allowed = len(re.findall(r"\bcvt\.rn\.f32\.[su]\d+", ptx)) if sums else 0
    allowed += FMAS.get(activation, 0) * len(re.findall(r"\bdiv\.rn\.f32", ptx))
    assert len(re.findall(r"\bfma\.\S*f32", ptx)) <= allowed
    for unwanted in (r"\bdiv\.(full|approx)", r"\brcp\.", r"\.ftz\b", r"\b(ld|st)\.local\b"):
        assert not re.search(unwanted, ptx), unwanted
    used = resources(kernel, folder)
    assert used["STACK"] <= stack and used["LOCAL"] == 0, used
    assert used["REG"] <= registers, used


def in_flight(kernel: Any) -> int:
    """The most global loads that a thread has under way at a time, going straight through its machine code."""
    waiting: list[set[str]] = []
    most = 0
    for line in kernel.asm["sass"].splitlines():
        text = re.sub(r"^\s*\S*\t", "", line)
        used = set(re.findall(r"\bR\d+\b", text))
        waiting = [registers for registers in waiting if not registers & used]
        found = re.search(r"\bLDG\.E\.?(\d*)\S* R(\d+),", text)
        if found:
            first = int(found[2])
            waiting.append({f"R{first + i}" for i in range(int(found[1] or 32) // 32)})
            most = max(most, len(waiting))
    return most
