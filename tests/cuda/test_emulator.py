"""The emulated device itself, by PTX of a few lines: what its instructions compute, and what mistakes it tells of."""

from __future__ import annotations

from collections.abc import Iterator

import emulated
import pytest
import torch
from emulated import Emulator

pytestmark = emulated.MARKS

HEAD = """.version 8.5
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(.param .u64 kernel_in, .param .u64 kernel_out)
{
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<40>;
  .reg .f32 %f<8>;
  .reg .b64 %rd<8>;
  ld.param.u64 %rd1, [kernel_in];
  ld.param.u64 %rd2, [kernel_out];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd1, %rd1, %rd3;   // of this thread
  add.s64 %rd2, %rd2, %rd3;
  mov.u32 %r2, smem;
  shl.b32 %r3, %r1, 2;
  add.s32 %r3, %r2, %r3;      // its word of shared memory
  mov.u16 %h0, 0;
  mov.u16 %h1, 2;
"""


@pytest.fixture(scope="module")
def device() -> Iterator[Emulator]:
    made = Emulator()
    made.unload()
    yield made
    made.unload()
    emulated.emulator.cache_clear()


def run(
    device: Emulator,
    body: str,
    x: torch.Tensor,
    threads: int = 32,
    words: int | None = None,
    reads: torch.Tensor | None = None,
) -> torch.Tensor:
    """One block; a word in and a word out a thread."""
    device.unload()
    device.load(HEAD + body + "  ret;\n}\n")
    out = torch.zeros(words or threads, dtype=torch.int32)
    device.launch("kernel", threads, x, out, shared=4096, reads=reads)
    return out


WORDS = torch.arange(64, dtype=torch.int32) * 7 - 100


# ---- right numbers ---------------------------------------------------------------------------------------------------
def test_threads_that_part_meet_again(device: Emulator) -> None:
    body = """
  ld.global.u32 %r4, [%rd1];
  and.b32 %r5, %r1, 1;
  setp.eq.s32 %p1, %r5, 0;
  @%p1 bra EVEN;
  mul.lo.s32 %r4, %r4, 3;
  bra.uni BOTH;
EVEN:
  sub.s32 %r4, 0, %r4;
BOTH:
  shfl.sync.bfly.b32 %r6, %r4, 1, 31, -1;
  st.global.u32 [%rd2], %r6;
"""
    own = torch.where(torch.arange(32) % 2 == 0, -WORDS[:32], 3 * WORDS[:32])
    assert torch.equal(run(device, body, WORDS), own[torch.arange(32) ^ 1])


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_conversions_round_as_torch_does(device: Emulator, name: str, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (992,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    edges = torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 1 + 2.0**-8,
                          1 + 2.0**-11, 3.3895e38, torch.inf, -torch.inf])  # fmt: skip
    numbers = torch.cat([bits[~bits.isnan()], edges, torch.randn(1024) * 0.01])[:1024]
    body = f"""
  ld.global.f32 %f1, [%rd1];
  cvt.rn.{name}.f32 %h1, %f1;
  cvt.f32.{name} %f2, %h1;
  st.global.f32 [%rd2], %f2;
"""
    got = run(device, body, numbers, threads=1024).view(torch.float32)
    assert torch.equal(got, numbers.to(dtype).float())


def test_the_greater_of_two_halves(device: Emulator) -> None:
    """Two at a time, denormals among them: of two zeros the positive one, and NaN where one is."""
    some = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0**-24, -(2.0**-20), 3.5], dtype=torch.float16)
    a, b = (
        torch.cat([t.flatten() for t in pair])
        for pair in zip(*[torch.meshgrid(some, some, indexing="ij")], strict=True)
    )
    x = torch.stack([a, b], 1).contiguous()  # 64 pairs, a word each
    body = """
  ld.global.u32 %r4, [%rd1];
  shr.u32 %r5, %r4, 16;
  prmt.b32 %r6, %r4, %r4, 0x1032;
  max.NaN.f16x2 %r7, %r4, %r6;
  st.global.u32 [%rd2], %r7;
"""
    got = run(device, body, x.view(torch.int32).flatten(), threads=64).view(torch.float16).view(64, 2)
    expected = torch.maximum(a, b)
    for half in got.unbind(1):
        assert torch.equal(half.isnan(), expected.isnan())
        assert torch.equal(half.nan_to_num(9.0), expected.nan_to_num(9.0))
    zeros = (a == 0) & (b == 0)
    positive = ~(a.signbit() & b.signbit())
    assert torch.equal(got[zeros, 0].signbit(), ~positive[zeros])


def test_floats_become_integers_half_to_even_and_within_the_range(device: Emulator) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, torch.nan, 2147483520.0, -7.51] * 4)[:32]
    body = "  ld.global.f32 %f1, [%rd1];\n  cvt.rni.s32.f32 %r4, %f1;\n  st.global.u32 [%rd2], %r4;\n"
    expected = x.nan_to_num(0.0).double().round().clamp(-(2.0**31), 2.0**31 - 1).to(torch.int64).to(torch.int32)
    assert torch.equal(run(device, body, x), expected)


def test_bit_fields_and_bytes(device: Emulator) -> None:
    x = torch.randint(-(2**31), 2**31, (32,)).to(torch.int32)
    body = """
  ld.global.u32 %r4, [%rd1];
  bfe.s32 %r5, %r4, 5, 9;
  prmt.b32 %r6, %r4, %r5, 0x9410;
  bfi.b32 %r7, %r4, %r6, 3, 8;
  shf.l.wrap.b32 %r8, %r7, %r4, 37;
  lop3.b32 %r9, %r8, %r4, %r5, 0xE8;
  st.global.u32 [%rd2], %r9;
"""
    full, out = (1 << 32) - 1, []
    for v in (int(word) & full for word in x):
        field = ((v >> 5 & 511) ^ 256) - 256 & full
        parts = [v & 255, v >> 8 & 255, field & 255, 255 if v >> 15 & 1 else 0]
        mixed = sum(part << 8 * i for i, part in enumerate(parts))
        mixed = mixed & ~(255 << 3) | (v & 255) << 3
        turned = (v << 32 | mixed) << 5 >> 32 & full
        out.append(turned & v | turned & field | v & field)
    expected = torch.tensor(out).to(torch.int32)
    assert torch.equal(run(device, body, x), expected)


def test_mma_multiplies_bytes(device: Emulator) -> None:
    """Fragments as ldmatrix brings them: a [16][32] u8, b [8][32] s8."""
    a, b = torch.randint(0, 256, (16, 32), dtype=torch.uint8), torch.randint(-128, 128, (8, 32), dtype=torch.int8)
    words = torch.cat([a.flatten(), b.flatten().view(torch.uint8)]).view(torch.int32)  # 192, 6 a lane
    copies = "".join(
        f"  ld.global.u32 %r4, [%rd1+{128 * i}];\n  st.shared.u32 [%r3+{128 * i}], %r4;\n" for i in range(6)
    )
    body = """
  bar.sync 0;
  and.b32 %r10, %r1, 15;  // a: lanes 0-15 have rows of the left half, 16-31 of the right one
  shr.u32 %r11, %r1, 4;
  shl.b32 %r10, %r10, 5;
  shl.b32 %r11, %r11, 4;
  add.s32 %r10, %r10, %r11;
  add.s32 %r10, %r10, %r2;
  ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%r12, %r13, %r14, %r15}, [%r10];
  and.b32 %r16, %r1, 7;
  bfe.u32 %r17, %r1, 3, 1;
  shl.b32 %r16, %r16, 5;
  shl.b32 %r17, %r17, 4;
  add.s32 %r16, %r16, %r17;
  add.s32 %r16, %r16, %r2;
  ldmatrix.sync.aligned.x2.m8n8.shared.b16 {%r18, %r19}, [%r16+512];
  mov.u32 %r20, 1000;
  mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%r21, %r22, %r23, %r24}, {%r12, %r13, %r14, %r15}, {%r18, %r19},
      {%r20, %r20, %r20, %r20};
  mul.wide.u32 %rd3, %r1, 12;
  add.s64 %rd2, %rd2, %rd3;  // 16 bytes a lane
  st.global.v4.u32 [%rd2], {%r21, %r22, %r23, %r24};
"""
    got = run(device, copies + body, words, words=128).reshape(32, 4)
    lane = torch.arange(32)[:, None]
    row, column = lane // 4 + 8 * (torch.arange(4) // 2), 2 * (lane % 4) + torch.arange(4) % 2
    assert torch.equal(got, ((a.double() @ b.double().t()).int() + 1000)[row, column])


def tma(
    device: Emulator, x: torch.Tensor, map: torch.Tensor, how: str, coordinates: str, offsets: str, size: int
) -> torch.Tensor:
    """The bytes of a box as they come to lie in shared memory, its first byte at a multiple of 1024."""
    rank = coordinates.count(",") + 1
    body = f"""
  setp.ne.s32 %p1, %r1, 0;
  @%p1 bra WAIT;
  ld.param.u64 %rd4, [kernel_in];
  mbarrier.init.shared::cta.b64 [%r2], 1;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {size};
  cp.async.bulk.tensor.{rank}d.shared::cluster.global{how}.mbarrier::complete_tx::bytes [%r2+1024],
      [%rd4, {{{coordinates}}}], [%r2]{offsets};
WAIT:
  bar.sync 0;
AGAIN:
  mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
  @!%p2 bra AGAIN;
  ld.shared.u32 %r5, [%r3+1024];
  st.global.u32 [%rd2], %r5;
"""
    return run(device, body, map, threads=size // 4, reads=x).view(torch.uint8)


def test_tma_brings_boxes_with_zeros_around_the_tensor(device: Emulator) -> None:
    x = torch.randint(1, 256, (5, 64), dtype=torch.uint8)
    got = tma(device, x, device.tensor_map(x, (32, 4)), "", "48, -2", "", 128).reshape(4, 32)
    padded = torch.nn.functional.pad(x, (0, 16, 2, 0))
    assert torch.equal(got, padded[:4, 48:80])


@pytest.mark.parametrize(("swizzle", "width"), [(1, 32), (2, 64), (3, 128)])
def test_tma_swizzles(device: Emulator, swizzle: int, width: int) -> None:
    """Chunks of 16 bytes: their number in a row is xored with the number of the 128 bytes that they lie in."""
    x = torch.randint(0, 256, (1024 // width, width), dtype=torch.uint8)
    got = tma(device, x, device.tensor_map(x, (width, 1024 // width), swizzle), "", "0, 0", "", 1024).reshape(64, 16)
    chunk = torch.arange(64)
    assert torch.equal(got[chunk ^ (chunk // 8 % (width // 16))], x.reshape(64, 16))


@pytest.mark.parametrize("stride", [1, 2])
def test_tma_visits_pixels_as_a_convolution_does(device: Emulator, stride: int) -> None:
    """im2col of a 3x3 convolution with padding 1: 16 output pixels from the 5th on, at the tap in row 2, column 0."""
    n, h, w, c = 2, 5, 6, 16
    x = torch.randint(1, 256, (n, h, w, c), dtype=torch.uint8)
    map = device.tensor_map(x, (c, 16), steps=(1, stride, stride, 1), corners=((-1, -1), (-1, -1)))
    out_w = (w - 1) // stride + 1
    first = 5
    q, p = first % out_w, first // out_w
    coordinates = f"0, {q * stride - 1}, {p * stride - 1}, 0"
    got = tma(device, x, map, ".im2col", coordinates, ", {%h0, %h1}", 256)
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    tap = padded[:, 2 : 2 + h : stride, 0:w:stride].reshape(-1, c)
    expected = torch.nn.functional.pad(tap, (0, 0, 0, 32))[first : first + 16]  # no image: zeros
    assert torch.equal(got.reshape(16, c), expected)


def test_the_driver_refuses_illegal_descriptors(device: Emulator) -> None:
    x = torch.zeros(4, 64, dtype=torch.uint8)
    for box, swizzle in (((24, 4), 0), ((64, 4), 1), ((64, 257), 0)):
        with pytest.raises(ValueError, match="refuses"):
            device.tensor_map(x, box, swizzle)


# ---- mistakes --------------------------------------------------------------------------------------------------------
EXCHANGE = """
  ld.global.u32 %r4, [%rd1];
  st.shared.u32 [%r3], %r4;
  BARRIER
  sub.s32 %r5, 252, %r3;
  add.s32 %r5, %r5, %r2;
  add.s32 %r5, %r5, %r2;
  ld.shared.u32 %r6, [%r5];
  st.global.u32 [%rd2], %r6;
"""


def test_a_missing_barrier_gives_wrong_numbers(device: Emulator) -> None:
    good = run(device, EXCHANGE.replace("BARRIER", "bar.sync 0;"), WORDS, threads=64)
    assert torch.equal(good, WORDS.flip(0))
    assert not torch.equal(run(device, EXCHANGE.replace("BARRIER", ""), WORDS, threads=64), WORDS.flip(0))


COPY = """
  cp.async.ca.shared.global [%r3], [%rd1], 4;
  cp.async.commit_group;
  WAIT
  ld.shared.u32 %r4, [%r3];
  st.global.u32 [%rd2], %r4;
"""


def test_a_copy_that_is_not_waited_for_gives_wrong_numbers(device: Emulator) -> None:
    assert torch.equal(run(device, COPY.replace("WAIT", "cp.async.wait_group 0;"), WORDS), WORDS[:32])
    for wait in ("", "cp.async.wait_group 1;"):
        assert not torch.equal(run(device, COPY.replace("WAIT", wait), WORDS), WORDS[:32])
    device.kind(True)
    try:
        assert torch.equal(run(device, COPY.replace("WAIT", ""), WORDS), WORDS[:32])
    finally:
        device.kind(False)


MISTAKES = {
    "a barrier that too few come to": ("bar.sync 1, 64;", "deadlock.*\n.*thread 0 .* waits at barrier 1"),
    "a phase that never ends": (
        "mbarrier.init.shared::cta.b64 [%r2], 33;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0;\n"
        "@!%p1 bra AGAIN;",
        "deadlock.*\n.*waits for the mbarrier at 1024",
    ),
    "an mbarrier that was not made": ("mbarrier.arrive.shared::cta.b64 _, [%r2];", "no mbarrier was made at 1024"),
    "shared memory out of bounds": (
        "ld.shared.u32 %r4, [%r3+4096];",
        "thread 0, PTX line .*ld.shared.u32.*shared memory",
    ),
    "a misaligned address": ("ld.shared.u32 %r4, [%r3+2];", "misaligned"),
    "another's memory": ("st.global.u32 [%rd1+4096], %r1;", "writes global memory that is not the kernel's"),
    "a shuffle from a thread that is not here": (
        "setp.lt.u32 %p1, %r1, 8;\n@!%p1 bra END;\nshfl.sync.idx.b32 %r4, %r1, 9, 31, 0xff;\nEND:",
        "shuffles from a thread",
    ),
    "a copy by a descriptor that is none": (
        "mbarrier.init.shared::cta.b64 [%r2], 32;\ncp.async.bulk.tensor.2d.shared::cluster.global.mbarrier"
        "::complete_tx::bytes [%r2+128], [%rd5, {%r1, %r1}], [%r2];",
        "no tensor map is there",
    ),
    "an unknown instruction": ("tanh.approx.f32 %f1, %f2;", "unknown instruction tanh.approx.f32"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_tells_of(device: Emulator, mistake: str) -> None:
    body, message = MISTAKES[mistake]
    space = torch.zeros(32, 32, dtype=torch.int32)
    aligned = "  ld.param.u64 %rd5, [kernel_in];\n  add.s64 %rd5, %rd5, 63;\n  and.b64 %rd5, %rd5, -64;\n"
    with pytest.raises(RuntimeError, match=message):
        run(device, aligned + body + "\n", space)


def test_what_threads_wrote_is_fenced_before_a_bulk_copy_reads_it(device: Emulator) -> None:
    body = """
  st.shared.u32 [%r3], %r1;
  FENCE
  bar.sync 0;
  setp.ne.s32 %p1, %r1, 0;
  @%p1 bra END;
  ld.param.u64 %rd4, [kernel_out];
  cp.async.bulk.global.shared::cta.bulk_group [%rd4], [%r2], 128;
  cp.async.bulk.commit_group;
  WAIT
END:
"""
    good = body.replace("FENCE", "fence.proxy.async.shared::cta;").replace("WAIT", "cp.async.bulk.wait_group.read 0;")
    out = torch.zeros(64, dtype=torch.int32)
    device.unload()
    device.load(HEAD + good + "  ret;\n}\n")
    aligned = out[-out.data_ptr() % 16 // 4 :][:32]
    device.launch("kernel", 32, WORDS, aligned, shared=4096)
    assert torch.equal(aligned, torch.arange(32, dtype=torch.int32))
    for missing, message in (
        ("fence.proxy.async.shared::cta;", "without fence"),
        ("cp.async.bulk.wait_group.read 0;", "ends before"),
    ):
        device.unload()
        device.load(HEAD + good.replace(missing, "") + "  ret;\n}\n")
        with pytest.raises(RuntimeError, match=message):
            device.launch("kernel", 32, WORDS, aligned, shared=4096)
