"""The kernels' PTX for sm_80 and sm_90, as their launchers have it compiled, on an emulated GPU: the oracle's bits.

What Triton's interpreter passes over runs here: inline PTX, the layouts of the tensor cores' operands, copies and their
waits, which take effect as late as they may (tests/emulator/machine.h).
"""

from __future__ import annotations

from collections.abc import Iterator

import emulated
import pytest
import torch
from emulated import Emulator
from emulated_launchers import EmulatedGPU
from launchers import Launchers
from test_triton_contract import NAMES, check_call
from test_triton_conv import Conv, int8_weights, integers

from pykernels import reference
from pykernels.cuda.triton import pack

pytestmark = emulated.MARKS


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def gpu(request: pytest.FixtureRequest) -> Iterator[EmulatedGPU]:
    device = Emulator()
    device.unload()
    yield EmulatedGPU(device, (request.param, 4))
    device.unload()
    emulated.emulator.cache_clear()


def check(gpu: EmulatedGPU, c: Conv, x: torch.Tensor, *rest: object) -> None:
    w, scale, b = int8_weights(c)
    packed = pack.qconv2d_pack(w, scale, b, c.groups)
    y = gpu.answer("conv", "qconv2d", x, packed, c.out, list(c.kernel), *c.geometry, *rest)
    assert torch.equal(y, reference.qconv2d(x, w, scale, b, *c.geometry, *rest))


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.uint8, (3, 3)), (torch.int8, (2, 5))])
def test_depthwise(gpu: EmulatedGPU, dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    c = Conv(48, 48, kernel, (2, 1), (1, 2, 0, 1), groups=48)
    check(gpu, c, integers((2, 48, 9, 11), dtype), 0.02, 3, 0.3, 5, dtype, "relu6")
    assert f"dp4a.{'u32' if dtype == torch.uint8 else 's32'}.s32" in gpu.ptx


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_few_channels(gpu: EmulatedGPU, dtype: torch.dtype) -> None:
    c = Conv(3, 16, (3, 3), (2, 2), (1, 1, 1, 1))
    check(gpu, c, integers((1, 3, 9, 9), dtype), 0.02, 3, 0.3, 5, dtype, "relu")
    assert "_conv_few" in gpu.ptx


@pytest.mark.parametrize(
    ("c", "kernel"),
    [
        (Conv(64, 32, (3, 3), padding=(1, 1, 1, 1)), "_conv"),
        (Conv(48, 24, (3, 3), padding=(2, 0, 0, 1), groups=3), "_conv"),
        (Conv(64, 40, (1, 1)), "_gemm"),
    ],
    ids=["whole taps", "grouped", "1x1"],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_tensor_cores(gpu: EmulatedGPU, c: Conv, kernel: str, dtype: torch.dtype) -> None:
    check(gpu, c, integers((1, c.channels, 9, 9), dtype), 0.02, 3, 0.3, 5, dtype, "relu")
    assert f".entry {kernel}(" in gpu.ptx
    assert ("wgmma.mma_async" if gpu.machine[0] == 90 else "mma.sync") in gpu.ptx
    assert ("cp.async.bulk.tensor" in gpu.ptx) == (kernel == "_gemm" and gpu.machine[0] == 90)


@pytest.mark.parametrize("gpu", [90], ids=["sm_90"], indirect=True)
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_every_op_gives_the_cpus_answer(gpu: EmulatedGPU, index: int) -> None:
    check_call(Launchers(gpu), index)
