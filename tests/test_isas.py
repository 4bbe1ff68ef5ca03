"""Integer ops yield the same bits on every isa, so that a network answers alike on every machine."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pykernels import _host
from pykernels.ops.names import ACTIVATIONS

P = torch.ops.pykernels
ROOT = pathlib.Path(__file__).parent.parent
ISAS = [name for name, available in _host.isas().items() if available]

pytestmark = pytest.mark.skipif(len(ISAS) < 2, reason="one isa only on this CPU")


def on_every_isa(run: Callable[[], torch.Tensor]) -> None:
    before = P._isa()
    try:
        results = {}
        for isa in ISAS:
            P._set_isa(isa)
            results[isa] = run()
    finally:
        P._set_isa(before)
    for isa, result in results.items():
        differing = (result != results["scalar"]).sum().item()
        assert differing == 0, f"{isa}: {differing} of {result.numel()} values differ from the scalar isa's"


def u8(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def s8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@given(m=st.integers(1, 40), k=st.integers(1, 150), n=st.integers(1, 70), signed=st.booleans(), seed=st.integers(0, 99))
def test_int8_mm(m: int, k: int, n: int, signed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = (s8 if signed else u8)(m, k), s8(k, n)
    on_every_isa(lambda: P.int8_mm(a, b))
    assert torch.equal(P.int8_mm(a, b), (a.long() @ b.long()).int())


@given(
    m=st.integers(1, 30),
    k=st.integers(1, 150),
    n=st.integers(1, 70),
    activation=st.sampled_from(list(ACTIVATIONS)),
    out=st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.float16]),
    zero_point=st.integers(0, 255),
    seed=st.integers(0, 99),
)
def test_int8_linear(m: int, k: int, n: int, activation: str, out: torch.dtype, zero_point: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, packed = u8(m, k), P.int8_linear_pack(s8(n, k), torch.rand(n) * 0.01, torch.randn(n))
    quantized = out in (torch.uint8, torch.int8)
    options = (0.05, 100 if out is torch.uint8 else -20) if quantized else (None, 0)
    on_every_isa(lambda: P.int8_linear(x, packed, n, 0.02, zero_point, *options, out, activation))


@given(
    channels=st.sampled_from([(3, 20, 1), (16, 16, 16), (33, 33, 33), (32, 24, 2), (64, 17, 1)]),
    size=st.integers(3, 12),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    activation=st.sampled_from(list(ACTIVATIONS)),
    residual=st.sampled_from(["", "before", "after"]),
    seed=st.integers(0, 99),
)
def test_qconv2d(
    channels: tuple[int, int, int],
    size: int,
    kernel: int,
    stride: int,
    activation: str,
    residual: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    c, o, groups = channels
    x = u8(2, c, size, size).contiguous(memory_format=torch.channels_last)
    packed = P.qconv2d_pack(s8(o, c // groups, kernel, kernel), torch.rand(o) * 0.01, torch.randn(o), groups)
    pad = kernel // 2
    side = (size + 2 * pad - kernel) // stride + 1
    other = u8(2, o, side, side).contiguous(memory_format=torch.channels_last) if residual else None
    geometry = (o, [kernel] * 2, [stride] * 2, [pad] * 4, [1, 1], groups)
    rest = (0.05, 90, torch.uint8, activation, other, 0.03, 7, residual or "before")
    on_every_isa(lambda: P.qconv2d(x, packed, *geometry, 0.02, 120, *rest))


@given(n=st.integers(1, 300), signed=st.booleans(), scale=st.floats(1e-3, 10.0), seed=st.integers(0, 99))
def test_quantize(n: int, signed: bool, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, n) * 50
    dtype, zero_point = (torch.int8, -3) if signed else (torch.uint8, 77)
    on_every_isa(lambda: P.quantize_per_tensor(x, scale, zero_point, dtype))
    on_every_isa(lambda: P.quantize_per_token(x, dtype)[0])


@given(n=st.integers(1, 300), activation=st.sampled_from(list(ACTIVATIONS)), seed=st.integers(0, 99))
def test_qadd_and_qmul(n: int, activation: str, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = u8(2, n), u8(2, n)
    parameters = (0.02, 100, 0.05, 30, 0.04, 90, torch.uint8)
    on_every_isa(lambda: P.qadd(a, b, *parameters, activation))
    on_every_isa(lambda: P.qmul(a, b, *parameters))


def test_the_emulation_has_every_intrinsic_that_kernels_use() -> None:
    """A build with -DPYKERNELS_EMULATE=ON knows no other 512-bit ones; it takes long, and is easily forgotten."""
    sources = {path: path.read_text() for path in (ROOT / "csrc" / "cpu").rglob("*") if path.suffix in (".h", ".cpp")}
    written = sources.pop(ROOT / "csrc" / "cpu" / "isa" / "emulate.h")
    names = re.compile(r"\b_mm512_\w+")
    used = {name for text in sources.values() for name in names.findall(text)}
    used |= {f"_mm512_{name}" for text in sources.values() for name in re.findall(r"\bPK_BYTES\((\w+)\)", text)}
    unknown = used - set(names.findall(written)) - {"_mm512_", "_mm512_name"}
    assert len(used) > 50 and not unknown, f"csrc/cpu/isa/emulate.h lacks {sorted(unknown)}"
