"""The CUDA library's ops on an emulated device: its host code, its kernels' PTX, the oracle's bits. Needs no GPU.

What is waited for happens as late as it may (tests/emulator/machine.h): these tests look at waits, too. The last
of them take waits out, one kind at a time, and see that it is noticed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import emulated
import library_calls
import pytest
import torch
from emulated import LIBRARY, Emulator
from library_calls import Case, Conv, Gemm

pytestmark = emulated.MARKS
CONFIGURATIONS = Emulator().configurations if LIBRARY.exists() else {op: {} for op in emulated.FAMILIES}
GEMM, CONV, FEW = (list(CONFIGURATIONS[op]) for op in emulated.FAMILIES)
UNSWAPPED = [config for config in GEMM if not config.endswith("swapped")]
# Smaller than every tile; no multiple of any; several tiles for each of four multiprocessors, and turns of the ring.
GEMMS: list[Gemm] = [(1, 16, 16), (7, 48, 32), (65, 272, 144), (130, 320, 1296)]
CONVS: list[Conv] = [
    ((1, 16, 5, 4), 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((2, 48, 13, 9), 80, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2)),
    ((2, 144, 17, 11), 272, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    ((3, 64, 11, 14), 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((1, 32, 30, 23), 96, (7, 5), (3, 2), (0, 0, 0, 0), (2, 3)),
]
# Of few channels: tiles across and down, rows that end in a tile, more padding than kernel, images smaller than a tile.
FEWS: list[Conv] = [
    ((2, 3, 45, 150), 64, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    ((1, 2, 3, 290), 16, (3, 2), (1, 1), (4, 3, 3, 5), (1, 1)),
    ((3, 1, 14, 21), 96, (5, 5), (2, 1), (0, 0, 0, 0), (1, 1)),
    ((1, 4, 19, 9), 48, (4, 5), (1, 2), (2, 1, 0, 2), (1, 1)),
    ((2, 3, 34, 37), 128, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
    ((1, 3, 7, 6), 80, (1, 6), (1, 1), (3, 2, 0, 0), (1, 1)),
]


@pytest.fixture(scope="module")
def device() -> Iterator[Emulator]:
    pytest.importorskip("triton")  # brings cuobjdump
    yield emulated.emulator()


def wrong(device: Emulator, op: str, config: str, case: Case, multiprocessors: int = 4) -> str | None:
    """What is wrong with the answer to a call, or None."""
    case.given["out"].fill_(77)
    try:
        device.run(op, config, case.given, multiprocessors)
    except RuntimeError as error:
        return str(error)
    return case.complaint()


@pytest.mark.parametrize("size", GEMMS, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("config", GEMM)
def test_a_product_has_the_oracles_bits(device: Emulator, config: str, size: Gemm) -> None:
    """Every dtype, place of the residual and activation, scales of the tensor or of its rows: half at one size, half at
    the next."""
    variants = library_calls.variants([size], config.endswith("swapped"))
    for variant in itertools.islice(variants, GEMMS.index(size) % 2, None, 2):
        case = library_calls.gemm_case(*variant)
        assert wrong(device, "int8_gemm", config, case) is None, case.title


@pytest.mark.parametrize("size", CONVS, ids=lambda size: f"{size[0][1]}x{size[0][2]}x{size[0][3]}")
@pytest.mark.parametrize("config", CONV)
def test_a_convolution_has_the_oracles_bits(device: Emulator, config: str, size: Conv) -> None:
    """Likewise; borders on every side or none, strides, dilation, channels that fill no tile."""
    for variant in itertools.islice(library_calls.variants([size], False), CONVS.index(size) % 2, None, 2):
        case = library_calls.conv_case(*variant)
        assert wrong(device, "int8_conv", config, case) is None, case.title


def holds(config: str, size: Conv) -> bool:
    """Whether a configuration for few channels is for kernels at least as large."""
    return max(size[2]) <= int(config.split()[1][0])


@pytest.mark.parametrize("size", FEWS, ids=lambda size: f"{size[0][1]}x{size[0][2]}x{size[0][3]}")
@pytest.mark.parametrize("config", FEW)
def test_a_convolution_of_few_channels_has_the_oracles_bits(device: Emulator, config: str, size: Conv) -> None:
    if not holds(config, size):
        case = library_calls.few_channels_case(size, torch.uint8, None, "relu")
        assert "its kernel is smaller" in (wrong(device, "int8_few_channels", config, case) or "")
        return
    for variant in itertools.islice(library_calls.variants([size], False), FEWS.index(size) % 3, None, 3):
        case = library_calls.few_channels_case(*variant)
        assert wrong(device, "int8_few_channels", config, case) is None, case.title


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("config", FEW)
def test_it_does_so_for_every_number_of_channels(device: Emulator, config: str, channels: int, stride: int) -> None:
    """On one multiprocessor, whose blocks take several tiles each; lines that begin at any byte of a word."""
    size, n = int(config.split()[1][0]), int(config.split()[-1])
    shape = ((5, channels, 13, 17), n, (size, size), (stride, stride), (size // 2,) * 4, (1, 1))
    case = library_calls.few_channels_case(shape, torch.uint8, None, "relu")
    assert wrong(device, "int8_few_channels", config, case, 1) is None, case.title


@pytest.mark.parametrize("config", GEMM)
def test_it_does_so_too_where_copies_and_products_are_done_at_once(device: Emulator, config: str) -> None:
    device.kind(True)
    try:
        case = library_calls.gemm_case((65, 272, 144), torch.uint8, None, "silu")
        assert wrong(device, "int8_gemm", config, case) is None
    finally:
        device.kind(False)


@pytest.mark.parametrize("multiprocessors", [2, 132])
@pytest.mark.parametrize("config", UNSWAPPED)
def test_it_does_so_on_devices_small_and_large(device: Emulator, config: str, multiprocessors: int) -> None:
    """Of which each holds a cluster."""
    case = library_calls.gemm_case((300, 320, 272), torch.int8, "after", "relu")
    multiprocessors = max(multiprocessors, 4 if "2x2" in config else 2)
    assert wrong(device, "int8_gemm", config, case, multiprocessors) is None


@pytest.mark.parametrize("config", [config for config in GEMM if "bands" in config])
def test_bands_cover_every_tile_once(device: Emulator, config: str) -> None:
    """More rows and columns of clusters than a band holds, and no multiples of it."""
    case = library_calls.gemm_case((2000, 2608, 16), torch.uint8, None, "relu")
    assert wrong(device, "int8_gemm", config, case, 8) is None


@pytest.mark.parametrize("config", sorted(set(GEMM) - set(UNSWAPPED)))
def test_a_swapped_configuration_refuses_a_residual(device: Emulator, config: str) -> None:
    case = library_calls.gemm_case((5, 32, 32), torch.float32, "before", "none")
    assert "takes no residual" in (wrong(device, "int8_gemm", config, case) or "")


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
    case = library_calls.gemm_case((130, 320, 1296), torch.uint8, None, "none")
    assert wrong(altered, "int8_gemm", config, case) is not None


@pytest.mark.parametrize("config", GEMM)
def test_a_kernel_keeps_to_its_memory(device: Emulator, config: str) -> None:
    """A bias of which the device is told less than the kernel is."""
    case = library_calls.gemm_case((65, 64, 64), torch.float32, None, "none")
    case.given["bias"] = case.given["bias"][:32]
    assert "global memory that is not the kernel's" in (wrong(device, "int8_gemm", config, case) or "")


def test_a_kernel_of_few_channels_waits_for_the_others_pixels(altered: Emulator) -> None:
    for text in emulated.ptx(LIBRARY):
        if "few_channels" in text:
            altered.load(re.sub(r"bar\.sync\s+0;", "", text))
    case = library_calls.few_channels_case(FEWS[0], torch.uint8, None, "relu")
    assert wrong(altered, "int8_few_channels", "sm80 3x3 by 32", case) is not None
