"""Between real numbers and 8-bit affine integers, and activations: csrc/cpu/isa/requantize.h and math.h, step by step.

Every product and sum is rounded by itself, but for `tl.fma`: launch with OPTIONS, which forbid contraction into others,
and divide by `tl.math.div_rn`. NaNs pass through every activation.
"""

import triton
import triton.language as tl

from pykernels.cuda.triton.reals import load_real, store_real

OPTIONS = {"enable_fp_fusion": False}
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds half to even, for numbers up to 2^22
ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def rint(t):
    """int32, half to even, for abs(t) up to 2^22."""
    return (t + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def requantize(f, inverse, zero_point, LOW: tl.constexpr, HIGH: tl.constexpr):
    """clamp(rint(f * inverse) + zero_point, LOW, HIGH), int32; NaN becomes the zero point.

    Clamping before rounding yields the same, since what is clamped to are integers.
    """
    t = f * inverse
    t = tl.where(t == t, t, 0.0)
    low = (LOW - zero_point).to(tl.float32)
    high = (HIGH - zero_point).to(tl.float32)
    return rint(tl.minimum(tl.maximum(t, low), high)) + zero_point


@triton.jit
def dequantize(q, zero_point, scale):
    """(q - zero_point) * scale, fp32."""
    return (q.to(tl.int32) - zero_point).to(tl.float32) * scale


@triton.jit
def store_output(pointer, f, mask, inverse, zero_point, OUT: tl.constexpr):
    """Store fp32 `f` as OUT says: requantized to "uint8" or "int8", or as "fp32", "bf16" (its bits) or "fp16"."""
    if OUT == "uint8":
        tl.store(pointer, requantize(f, inverse, zero_point, 0, 255).to(tl.uint8), mask=mask)
    elif OUT == "int8":
        tl.store(pointer, requantize(f, inverse, zero_point, -128, 127).to(tl.int8), mask=mask)
    else:
        store_real(pointer, f, mask, OUT)


@triton.jit
def _full(x, VALUE: tl.constexpr):
    return tl.full(x.shape, VALUE, tl.float32)


@triton.jit
def _exp(x):
    """x = n ln2 + r, a minimax polynomial in r, scaled by 2^n."""
    x = tl.where(x < -87.0, -87.0, x)
    x = tl.where(x > 88.0, 88.0, x)
    shifted = x * 1.44269504088896341 + ROUNDER
    n = shifted - ROUNDER
    r = tl.fma(n, _full(x, -0.693147182464599609), x)
    r = tl.fma(n, _full(x, 1.90465429995776e-9), r)
    y = tl.fma(_full(x, 1.381459064e-3), r, _full(x, 8.368725888e-3))
    y = tl.fma(y, r, _full(x, 4.166838899e-2))
    y = tl.fma(y, r, _full(x, 1.666652113e-1))
    y = tl.fma(y, r, _full(x, 4.999999404e-1))
    y = tl.fma(y, r, _full(x, 1.0))
    y = tl.fma(y, r, _full(x, 1.0))
    return y * ((shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _one_over(x):
    return tl.math.div_rn(_full(x, 1.0), x)


@triton.jit
def _sigmoid(x):
    return _one_over(_exp(0.0 - x) + 1.0)


@triton.jit
def _tanh(x):
    """1 - 2 / (exp(2x) + 1) away from zero, near it the odd polynomial of Cephes tanhf."""
    large = 1.0 - tl.math.div_rn(_full(x, 2.0), _exp(x + x) + 1.0)
    z = x * x
    p = _full(x, -5.70498872745e-3)
    p = tl.fma(p, z, _full(x, 2.06390887954e-2))
    p = tl.fma(p, z, _full(x, -5.37397155531e-2))
    p = tl.fma(p, z, _full(x, 1.33314422036e-1))
    p = tl.fma(p, z, _full(x, -3.33332819422e-1))
    return tl.where(tl.abs(x) < 0.625, tl.fma(p * z, x, x), large)


@triton.jit
def _erf(x):
    """Abramowitz & Stegun 7.1.26, odd by construction."""
    a = tl.abs(x)
    t = _one_over(tl.fma(a, _full(x, 0.3275911), _full(x, 1.0)))
    p = _full(x, 1.061405429)
    p = tl.fma(p, t, _full(x, -1.453152027))
    p = tl.fma(p, t, _full(x, 1.421413741))
    p = tl.fma(p, t, _full(x, -0.284496736))
    p = tl.fma(p, t, _full(x, 0.254829592))
    y = 1.0 - (p * t) * _exp(0.0 - a * a)
    return tl.where(x < 0.0, 0.0 - y, y)


@triton.jit
def _hard_gate(x):
    """relu6(x + 3) / 6"""
    gate = x + 3.0
    gate = tl.where(gate < 0.0, 0.0, gate)
    return tl.where(gate > 6.0, 6.0, gate) * (1.0 / 6.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of this name (pykernels.ops.names) of fp32 x."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0.0, 0.0, x)
        return tl.where(x > 6.0, 6.0, x)
    elif ACTIVATION == "hardswish":
        return x * _hard_gate(x)
    elif ACTIVATION == "hardsigmoid":
        return _hard_gate(x)
    elif ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "sigmoid":
        return _sigmoid(x)
    elif ACTIVATION == "gelu":
        return (x * 0.5) * (_erf(x * 0.70710678118654752) + 1.0)
    elif ACTIVATION == "tanh":
        return _tanh(x)
    else:
        return x


@triton.jit
def _load_residual(pointer, mask, scale, zero_point, RESIDUAL: tl.constexpr):
    if RESIDUAL == "uint8" or RESIDUAL == "int8":
        return dequantize(tl.load(pointer, mask=mask, other=0), zero_point, scale)
    else:
        return load_real(pointer, mask, RESIDUAL)


@triton.jit
def finish(
    f, residual, out, place, mask, residual_scale, residual_zero_point, inverse, zero_point,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, AFTER: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Store activation(f + residual), or with AFTER activation(f) + residual; RESIDUAL is a kind as OUT, or None."""
    if RESIDUAL is not None and not AFTER:
        f = f + _load_residual(residual + place, mask, residual_scale, residual_zero_point, RESIDUAL)
    f = activate(f, ACTIVATION)
    if RESIDUAL is not None and AFTER:
        f = f + _load_residual(residual + place, mask, residual_scale, residual_zero_point, RESIDUAL)
    store_output(out + place, f, mask, inverse, zero_point, OUT)


MOST = tl.constexpr(3.4028234663852886e38)  # fp32's largest finite number


@triton.jit
def folded(
    scale, bias, residual_scale, residual_zero_point, inverse, zero_point,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """What `scaled` takes of columns of these scales and biases: multiplier, addend, the residual's factor, low, high.

    All that is linear is folded, bytes counted as unsigned, as `scaled` in csrc/cpu/tile/kernels.h does.
    """
    SHIFT: tl.constexpr = 128 if OUT == "int8" else 0
    zero = (zero_point + SHIFT).to(tl.float32)
    offset = zero
    factor = zero  # is not looked at without a residual
    if RESIDUAL is not None:
        RESIDUAL_SHIFT: tl.constexpr = 128 if RESIDUAL == "int8" else 0
        factor = tl.minimum(residual_scale * inverse, MOST)
        offset = zero - (residual_zero_point + RESIDUAL_SHIFT).to(tl.float32) * factor
    addend = bias * inverse + offset
    known = addend == addend
    multiplier = tl.where(known, tl.minimum(scale * inverse, MOST), 0.0)
    addend = tl.where(known, addend, zero)
    low = zero if ACTIVATION == "relu" or ACTIVATION == "relu6" else zero * 0.0
    high = zero * 0.0 + 255.0
    if ACTIVATION == "relu6":
        high = tl.minimum(rint(tl.minimum(6.0 * inverse, 512.0)).to(tl.float32) + zero, 255.0)
    return multiplier, addend, factor, low, high


@triton.jit
def scaled(acc, r, multiplier, addend, factor, low, high, RESIDUAL: tl.constexpr, OUT: tl.constexpr):
    """The bytes of s32 sums [rows, columns] and of the residual's bytes `r`; the rest is of `folded`."""
    SHIFT: tl.constexpr = 128 if OUT == "int8" else 0
    t = tl.fma(acc.to(tl.float32), tl.broadcast_to(multiplier, acc.shape), tl.broadcast_to(addend, acc.shape))
    if RESIDUAL is not None:
        RESIDUAL_SHIFT: tl.constexpr = 128 if RESIDUAL == "int8" else 0
        added = (r.to(tl.int32) + RESIDUAL_SHIFT).to(tl.float32)
        t = tl.fma(added, tl.full(acc.shape, 1.0, tl.float32) * factor, t)
    q = rint(tl.minimum(tl.maximum(t, low), high)) - SHIFT
    return q.to(tl.int8 if OUT == "int8" else tl.uint8)


@triton.jit
def _scaled(
    acc, scale, bias, residual, out, place, mask, residual_scale, residual_zero_point, inverse, zero_point,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Store the bytes of what is linear."""
    multiplier, addend, factor, low, high = folded(
        scale, bias, residual_scale, residual_zero_point, inverse, zero_point, ACTIVATION, RESIDUAL, OUT
    )
    r = None
    if RESIDUAL is not None:
        r = tl.load(residual + place, mask=mask, other=0)
    tl.store(out + place, scaled(acc, r, multiplier, addend, factor, low, high, RESIDUAL, OUT), mask=mask)


@triton.jit
def finish_sums(
    acc, row, column, there, known, place, out, residual, sums, scales, biases, row_scale, row_zero_point, x_scale,
    x_zero_point, residual_scale, residual_zero_point, inverse, zero_point,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, AFTER: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Store what the s32 sums `acc` [rows, columns] of int8 products come to, at out + `place`.

    f = fma(float(acc - x_zero_point * sum), x_scale * scale, bias), then `finish`, or all of it folded where it is
    linear (`_scaled`); OUT "int32" is acc without its zero point. `row` and `column` index per-row and per-channel
    parameters, `there` and `known` say which of them there are. With `row_scale` and `row_zero_point` each row has its
    own; these zero points are uint8's, 128 too large for the int8 that was multiplied. `sums` may be None for a zero
    point of 0.
    """
    mask = there[:, None] & known[None, :]
    if sums is not None:
        total = tl.load(sums + column, mask=known, other=0)[None, :]
        if row_zero_point is not None:
            acc -= (tl.load(row_zero_point + row, mask=there, other=0) - 128)[:, None] * total
        else:
            acc -= x_zero_point * total
    if OUT == "int32":
        tl.store(out + place, acc, mask=mask)
    else:
        scale = tl.load(scales + column, mask=known, other=0.0)[None, :]
        bias = tl.load(biases + column, mask=known, other=0.0)[None, :]
        if row_scale is not None:
            scale = tl.load(row_scale + row, mask=there, other=0.0)[:, None] * scale
        else:
            scale = x_scale * scale
        BYTES: tl.constexpr = OUT == "uint8" or OUT == "int8"
        CLAMPS: tl.constexpr = ACTIVATION == "none" or ACTIVATION == "relu" or ACTIVATION == "relu6"
        ADDS: tl.constexpr = RESIDUAL is None or ((RESIDUAL == "uint8" or RESIDUAL == "int8") and not AFTER)
        if BYTES and CLAMPS and ADDS and row_scale is None:
            _scaled(
                acc, scale, bias, residual, out, place, mask, residual_scale, residual_zero_point, inverse, zero_point,
                ACTIVATION, RESIDUAL, OUT,
            )  # fmt: skip
        else:
            f = tl.fma(acc.to(tl.float32), tl.broadcast_to(scale, acc.shape), tl.broadcast_to(bias, acc.shape))
            finish(
                f, residual, out, place, mask, residual_scale, residual_zero_point, inverse, zero_point,
                ACTIVATION, RESIDUAL, AFTER, OUT,
            )  # fmt: skip
