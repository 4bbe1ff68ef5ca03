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
from inputs import same
from launchers import Launchers
from test_triton_contract import NAMES, check_call
from test_triton_conv import Conv, int8_weights, integers

from pykernels import reference
from pykernels.cuda import tables
from pykernels.cuda.triton import pack, short_k, topk

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8])
def test_maxima_of_channels_last_memory(gpu: EmulatedGPU, dtype: torch.dtype) -> None:
    """Two halves at once; bytes as halves, and where integers have it two of a word at once."""
    x = (torch.randn(1, 48, 9, 11) * 30).clamp(-128 if dtype.is_signed else 0, 127).to(dtype)
    if dtype.is_floating_point:
        x[0, :5, 3:5, 2] = torch.nan
    x = x.contiguous(memory_format=torch.channels_last)
    window = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    y = gpu.answer("pool", "max_pool2d", x, *window)
    same(y, reference.max_pool2d_with_indices(x, *window)[0])
    words = {torch.uint8: "u16x2", torch.int8: "s16x2"} if gpu.machine[0] == 90 else {}
    pairs = words.get(dtype) or ("NaN.f16x2" if dtype not in (torch.float32, torch.bfloat16) else None)
    for kind in ("u16x2", "s16x2", "NaN.f16x2"):
        assert (f"max.{kind}" in gpu.ptx) == (kind == pairs)


def test_a_window_of_many_taps_is_divided(gpu: EmulatedGPU) -> None:
    x = torch.randint(0, 256, (1, 16, 40, 50), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    arguments = ([1, 1], 0.02, 3, 0.02, 3, torch.uint8)
    same(gpu.answer("pool", "qadaptive_avg_pool2d", x, *arguments), reference.qadaptive_avg_pool2d(x, *arguments))
    assert gpu.ptx.count(".entry _average_window(") == 2


@pytest.mark.parametrize(("k", "slack"), [(90, 4096), (90, -300), (700, 4096)], ids=["a list", "no room", "longer"])
def test_top_k_by_a_list(gpu: EmulatedGPU, monkeypatch: pytest.MonkeyPatch, k: int, slack: int) -> None:
    monkeypatch.setattr(topk, "FEWEST", 1024)
    monkeypatch.setattr(topk, "SLACK", slack)
    x, residual = torch.randn(9001), torch.randn(9001) * 0.1
    segments, payload = (
        torch.tensor([[0, 700, 1], [1000, 5500, 0], [8000, 1001, 7]]),
        torch.zeros(8 * k, dtype=torch.uint8),
    )
    expected = [residual.clone(), payload.clone()]
    reference.sparse_encode(x, expected[0], None, expected[1], segments, k)
    gpu("topk", "sparse_encode", x, residual, None, payload, segments, k)
    assert torch.equal(residual, expected[0]) and torch.equal(payload, expected[1])
    assert ".entry _send_listed(" in gpu.ptx


@pytest.mark.parametrize("gpu", [90], ids=["sm_90"], indirect=True)
@pytest.mark.parametrize(("channels", "outputs", "residual"), [(64, 80, False), (96, 64, True), (256, 256, False)])
def test_a_short_k(
    gpu: EmulatedGPU, monkeypatch: pytest.MonkeyPatch, channels: int, outputs: int, residual: bool
) -> None:
    """Tiles come by TMA several ahead, and leave by TMA while the next one multiplies."""
    monkeypatch.setattr(short_k, "fits", lambda *sizes: True)
    monkeypatch.setattr(tables, "_short_k", lambda *sizes: None)
    c = Conv(channels, outputs, (1, 1))
    x = integers((1, channels, 29, 31), torch.uint8)
    rest = [0.02, 3, 0.3, 5, torch.uint8, "relu"]
    rest += [integers((1, outputs, 29, 31), torch.uint8), 0.11, 7] if residual else []
    gpu.machine = (90, 2)  # whose programs go through several tiles
    check(gpu, c, x, *rest)
    assert ".entry _gemm_short(" in gpu.ptx and "cp.async.bulk.tensor.2d.global.shared" in gpu.ptx


@pytest.mark.parametrize("gpu", [90], ids=["sm_90"], indirect=True)
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_every_op_gives_the_cpus_answer(gpu: EmulatedGPU, index: int) -> None:
    check_call(Launchers(gpu), index)
