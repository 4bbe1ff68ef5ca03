"""Real numbers in the kernels. bf16 is read and written as its bits, by integer steps, so that the interpreter, which
truncates, rounds as a GPU does."""

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def bits_of(v):
    return v.to(tl.int32, bitcast=True)


@triton.jit
def number_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_finite(v):
    return (bits_of(v) & MAGNITUDE) < INFINITY


@triton.jit
def bf16_bits(v):
    """fp32 to the bits of bf16, half to even; NaNs become the positive quiet one. uint16."""
    bits = v.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(v == v, rounded, 0x7FC0).to(tl.uint16)


@triton.jit
def bf16_number(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load_real(pointer, mask, REAL: tl.constexpr):
    """fp32 of the numbers at `pointer`, 0 where not `mask`."""
    loaded = tl.load(pointer, mask=mask, other=0)
    if REAL == "bf16":
        return bf16_number(loaded)
    else:
        return loaded.to(tl.float32)


@triton.jit
def store_real(pointer, v, mask, REAL: tl.constexpr):
    if REAL == "bf16":
        tl.store(pointer, bf16_bits(v), mask=mask)
    elif REAL == "fp16":
        tl.store(pointer, v.to(tl.float16), mask=mask)
    else:
        tl.store(pointer, v, mask=mask)
