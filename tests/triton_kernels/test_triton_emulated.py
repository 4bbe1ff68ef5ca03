"""The int8 kernels' PTX for sm_80 and sm_90, as their launchers have it compiled, on an emulated device: the oracle's bits.

What Triton's interpreter passes over runs here: inline PTX, the layouts of the tensor cores' operands, copies and their
waits, which take effect as late as they may (tests/emulator/machine.h).
"""

from __future__ import annotations

from collections.abc import Iterator

import emulated
import pytest
import torch
from emulated import LIBRARY, Emulator
from emulated_launchers import Triton
from test_triton_conv import Conv, int8_weights, integers

from pykernels import reference
from pykernels.triton import pack

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="no nvcc, no CUTLASS headers, or configured without PYKERNELS_CUDA_TESTS"
)
ARCHS = pytest.mark.parametrize("arch", [80, 90])


@pytest.fixture(scope="module")
def device() -> Iterator[Triton]:
    made = Emulator()
    made.unload()
    yield Triton(made)
    made.unload()
    emulated.emulator.cache_clear()


def check(device: Triton, arch: int, c: Conv, x: torch.Tensor, *rest: object) -> str:
    """qconv2d's answer is the oracle's. Returns the PTX of what was launched."""
    w, scale, b = int8_weights(c)
    packed = pack.qconv2d_pack(w, scale, b, c.groups)
    y = device.answer((arch, 4), "conv", "qconv2d", x, packed, c.out, list(c.kernel), *c.geometry, *rest)
    assert torch.equal(y, reference.qconv2d(x, w, scale, b, *c.geometry, *rest))
    return "".join(kernel.asm["ptx"] for kernel in device.launched)


@ARCHS
@pytest.mark.parametrize(("dtype", "kernel"), [(torch.uint8, (3, 3)), (torch.int8, (2, 5))])
def test_depthwise(device: Triton, arch: int, dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    c = Conv(48, 48, kernel, (2, 1), (1, 2, 0, 1), groups=48)
    text = check(device, arch, c, integers((2, 48, 9, 11), dtype), 0.02, 3, 0.3, 5, dtype, "relu6")
    assert f"dp4a.{'u32' if dtype == torch.uint8 else 's32'}.s32" in text
