"""The int8 GEMM of a short K in Triton: which products it takes, the oracle's bits, and its machine code."""

from __future__ import annotations

import contextlib
import pathlib
import re
from typing import Any

import pytest
import torch
from cubin import check, compiled, resources
from inputs import same
from interpreter import Interpreter, on_machine
from test_cubin_gemm import TYPES
from test_triton_conv import Conv, int8_weights, integers

from pykernels import reference
from pykernels.cuda import tables
from pykernels.cuda.triton import pack, short_k

MACHINE = (90, 4)
# Channels, outputs, image; dtype, activation, whether there is a residual.
CASES = [
    (16, 48, 45, 50, torch.uint8, "none", True),
    (64, 80, 31, 36, torch.int8, "relu", False),
    (96, 256, 19, 27, torch.uint8, "relu6", True),
    (256, 256, 20, 21, torch.uint8, "relu", False),
    (256, 272, 17, 21, torch.int8, "relu6", True),
]


def test_what_it_takes() -> None:
    assert short_k.fits(90, 132, 128 * 56 * 56, 256, 64) and short_k.fits(90, 132, 128 * 28 * 28, 512, 128)
    assert short_k.fits(90, 132, 128 * 14 * 14, 1024, 256)
    for arch, m, n, k in (
        (80, 401408, 256, 64),  # has no TMA
        (90, 4096, 256, 64),  # few rows
        (90, 401408, 64, 256),  # it reads more than it writes
        (90, 401408, 1024, 512),  # a long K
        (90, 401408, 72, 64),  # rows of the output do not fill 16 bytes
    ):
        assert not short_k.fits(arch, 132, m, n, k)


@pytest.mark.parametrize(("channels", "outputs", "h", "w", "dtype", "activation", "residual"), CASES)
def test_it_is_the_oracles(
    interpret: Interpreter, channels: int, outputs: int, h: int, w: int, dtype: torch.dtype, activation: str,
    residual: bool,
) -> None:  # fmt: skip
    c = Conv(channels, outputs, (1, 1))
    assert short_k.fits(*MACHINE, 2 * h * w, outputs, channels)
    x = integers((2, channels, h, w), dtype)
    weights, scale, bias = int8_weights(c)
    packed = pack.qconv2d_pack(weights, scale, bias, 1)
    rest: list[Any] = [0.02, 3, 0.3, 5, dtype, activation]
    if residual:
        rest += [integers((2, outputs, h, w), dtype), 0.11, 7]
    geometry = ([1, 1], [1, 1], [0] * 4, [1, 1], 1)
    y = interpret.apply(on_machine, MACHINE, "conv", "qconv2d", x, packed, outputs, *geometry, *rest)
    same(y, reference.qconv2d(x, weights, scale, bias, *geometry[1:], *rest))


def test_a_launcher_gives_it_what_it_can_do_and_nothing_else(interpret: Interpreter) -> None:
    """A curved activation, a residual after it and floats go to the other kernel."""
    assert interpret.apply(launched_short, "relu", torch.uint8, False) == 1
    assert interpret.apply(launched_short, "silu", torch.uint8, False) == 0
    assert interpret.apply(launched_short, "relu", torch.float32, False) == 0
    assert interpret.apply(launched_short, "relu", torch.uint8, True) == 0  # a tile is forced: a measurement


def launched_short(activation: str, dtype: torch.dtype, forced: bool) -> int:
    """There: how often a linear layer launched it."""
    from unittest import mock

    from interpreter import stand_in

    from pykernels.cuda.triton.linear import int8_linear
    from pykernels.cuda.triton.pack import int8_linear_pack

    packed = int8_linear_pack(torch.ones(64, 32, dtype=torch.int8), torch.ones(64), torch.zeros(64))
    x = torch.ones(4600, 32, dtype=torch.uint8)
    measured = tables.forced((64, 64, 64, 4, 4, 3, 1)) if forced else contextlib.nullcontext()
    with stand_in(MACHINE), mock.patch.object(short_k, "launch") as launch, measured:
        int8_linear(x, packed, 64, 0.1, 0, 0.1 if dtype == torch.uint8 else None, 0, dtype, activation)
    return launch.call_count


def test_what_was_measured_goes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9.0 the table has the widths of ResNet-50's layers; what is far from all of them was not measured."""
    assert tables.short_k(401408, 256, 64, False, 90) is False
    assert tables.short_k(401408, 16, 16, False, 90) is None
    assert tables.short_k(401408, 256, 64, False, 80) is None  # a table that was reasoned
    held = {"device": "one", "int8_gemm": {"256x64": [[1024, "triton"], [None, tables.SHORT_K]]}}
    monkeypatch.setattr(tables, "table", lambda name: held)
    tables._short_k.cache_clear()
    try:
        assert [tables.short_k(m, 256, 64, True, 90) for m in (1024, 1025)] == [False, True]
        with tables.forced((64, 64, 64, 4, 4, 3, 1)):
            assert tables.short_k(4096, 256, 64, False, 90) is False
        with tables.forced(tables.SHORT_K):
            assert tables.short_k(1024, 256, 64, False, 90) is True
    finally:
        tables._short_k.cache_clear()


# ---- machine code ----


def build(k: int, residual: str | None, x: str = "u8") -> tuple[Any, short_k.Short]:
    c = short_k.short_of(k)
    block = f"[{c.bm},{c.bn}]"
    described = {"a": f"tensordesc<{x}[{c.bm},{k}]>", "b": f"tensordesc<i8[{c.bn},{k}]>",
                 "out": f"tensordesc<u8{block}>", "residual": f"tensordesc<u8{block}>"}  # fmt: skip
    constants = {"FLIP": x == "u8", "ACTIVATION": "relu", "RESIDUAL": residual, "OUT": "uint8", "BM": c.bm, "BN": c.bn,
                 "BK": k, "STAGES": c.stages, **({} if residual else {"residual": None})}  # fmt: skip
    options = {"num_warps": c.warps, **short_k.OPTIONS}
    return compiled(short_k._gemm_short, 90, {**TYPES, **described}, constants, options, {"N"}), c


def loop(kernel: Any) -> list[str]:
    """The instructions of its innermost loop that multiplies."""
    lines = kernel.asm["sass"].splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\S+:$", line)}
    found = []
    for i, line in enumerate(lines):
        target = re.search(r"BRA.*?(LBB\d+)", line)
        if target and labels.get(target[1], i) < i and any("IGMMA" in inner for inner in lines[labels[target[1]] : i]):
            found.append([inner for inner in lines[labels[target[1]] : i + 1] if "\t" in inner])
    return min(found, key=len)


@pytest.mark.parametrize(("k", "residual"), [(64, None), (128, None), (256, None), (64, "uint8"), (256, "uint8")])
def test_machine_code(k: int, residual: str | None, tmp_path: pathlib.Path) -> None:
    """An output costs its conversion, one FMA, two comparisons, the rounding, its zero point, and little else."""
    kernel, c = build(k, residual)
    check(kernel, tmp_path, 255, sums=True)
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n64k32\.s32\.s8\.s8", kernel.asm["ptx"])
    code = loop(kernel)
    assert any("UTMALDG" in line for line in code) and any("UTMASTG" in line for line in code)
    assert not any(re.search(r"\bSTG\b", line) for line in code)
    outputs = c.bm * c.bn // (32 * c.warps)
    assert len(code) <= (14.5 if residual else 10.0) * outputs, len(code) / outputs
    registers = -(-resources(kernel, tmp_path)["REG"] // 8) * 8
    assert registers * 32 * c.warps * c.resident <= 65536, registers
    assert (kernel.metadata.shared + 1024) * c.resident <= 228 * 1024, kernel.metadata.shared
