"""The CUDA library's int8 GEMM on an emulated device: its host code, its kernels' PTX, the oracle's bits. Needs no GPU.

What is waited for happens as late as it may (tests/emulator/machine.h), so that these tests look at waits, too. The last of
them take waits out, one kind at a time, and see that it is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import emulated
import int8_gemm
import pytest
import torch
from emulated import LIBRARY, Emulator

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="no nvcc, no CUTLASS headers, or configured without PYKERNELS_CUDA_TESTS"
)
CONFIGURATIONS = list(Emulator().configurations) if LIBRARY.exists() else []
# Smaller than every tile; no multiple of any; several tiles for each of four multiprocessors, several turns of the ring.
SIZES = [(1, 16, 16), (7, 48, 32), (65, 272, 144), (130, 320, 1296)]


@pytest.fixture(scope="module")
def device() -> Iterator[Emulator]:
    pytest.importorskip("triton")  # brings cuobjdump
    yield emulated.emulator()


def wrong(device: Emulator, config: str, call: tuple[object, ...]) -> str | None:
    """What is wrong with the answer to a call, or None."""
    m, n, k, dtype, order, activation = call
    given = int8_gemm.arguments(m, n, k, dtype, order, activation)
    out = torch.full((m, n), 77, dtype=dtype)
    try:
        device.int8_gemm(config, given, out)
    except RuntimeError as error:
        return str(error)
    different = int((out.nan_to_num() != int8_gemm.expected(given, dtype).nan_to_num()).sum())
    return f"{different} of {out.numel()} elements differ" if different else None


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_it_gives_the_oracles_bits(device: Emulator, config: str, size: tuple[int, int, int]) -> None:
    """Every dtype, the residual at every place, every activation, scales of the tensor or of its rows."""
    for call in int8_gemm.calls([size], config.endswith("swapped")):
        assert wrong(device, config, call) is None, call


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_it_does_so_too_where_copies_and_products_are_done_at_once(device: Emulator, config: str) -> None:
    device.kind(True)
    try:
        assert wrong(device, config, (65, 272, 144, torch.uint8, None, "silu")) is None
    finally:
        device.kind(False)


@pytest.mark.parametrize("multiprocessors", [2, 132])
def test_it_does_so_on_devices_small_and_large(device: Emulator, multiprocessors: int) -> None:
    given = int8_gemm.arguments(300, 320, 272, torch.int8, "after", "relu")
    for config in CONFIGURATIONS:
        if config.endswith("swapped"):
            continue
        out = torch.empty(300, 320, dtype=torch.int8)
        device.int8_gemm(config, given, out, multiprocessors)
        assert torch.equal(out, int8_gemm.expected(given, torch.int8)), config


def test_a_swapped_configuration_refuses_a_residual(device: Emulator) -> None:
    given = int8_gemm.arguments(5, 32, 32, torch.float32, "before", "none")
    for config in CONFIGURATIONS:
        if config.endswith("swapped"):
            with pytest.raises(RuntimeError, match="takes no residual"):
                device.int8_gemm(config, given, torch.empty(5, 32))


# ---- what is noticed -------------------------------------------------------------------------------------------------
@pytest.fixture
def altered(device: Emulator) -> Iterator[Emulator]:
    """The device without a kernel; afterwards it has the library's again."""
    device.unload()
    yield device
    device.unload()
    for text in emulated.ptx(LIBRARY):
        device.load(text)


WAITS_80 = {
    "cp.async": (r"cp\.async\.wait_(group \d+|all);", ""),
    "barrier": (r"bar\.sync\s+0;", ""),
}
WAITS_90 = {
    "mbarrier": (r"@P1 bra DONE;", "bra DONE;"),
    "wgmma": (r"wgmma\.wait_group\.sync\.aligned (\d);", "wgmma.wait_group.sync.aligned 8;"),
    "bulk store": (r"cp\.async\.bulk\.wait_group\.read \d;", ""),
    "named barrier": (r"bar\.sync\s+%r\d+, %r\d+;", ""),
    "proxy fence": (r"fence\.proxy\.async\.shared::cta;", ""),
}
CASES = [("sm80 64x64x128", "sm_80", name) for name in WAITS_80]
CASES += [("sm90 64x128x128 pingpong", "sm_90a", name) for name in WAITS_90]


@pytest.mark.parametrize(("config", "target", "wait"), CASES)
def test_without_a_wait_it_would_not(altered: Emulator, config: str, target: str, wait: str) -> None:
    pattern, replacement = (WAITS_80 | WAITS_90)[wait]
    count = 0
    for text in emulated.ptx(LIBRARY):
        if f".target {target}" in text:
            text, found = re.subn(pattern, replacement, text)
            altered.load(text)
            count += found
    assert count
    assert wrong(altered, config, (130, 320, 1296, torch.uint8, None, "none")) is not None


def test_a_kernel_keeps_to_its_memory(device: Emulator) -> None:
    """A matrix of which the device is told less than the kernel is."""
    given = int8_gemm.arguments(65, 64, 64, torch.float32, None, "none")
    for config in CONFIGURATIONS:
        short = dict(given, bias=given["bias"][:32])
        with pytest.raises(RuntimeError, match="global memory that is not the kernel's"):
            device.int8_gemm(config, short, torch.empty(65, 64))
