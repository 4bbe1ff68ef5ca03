// The part of the vector layer that math.h needs, for one CUDA thread: the activations of a CUDA epilogue are the CPU's
// source, and so their bits. CUDA sources are compiled with -fmad=false, so that no product is contracted here either.
#pragma once

namespace pykernels::PYKERNELS_ISA_NS {

using f32 = float;
using i32 = int32_t;

PK_INLINE f32 set1(float v) { return v; }
PK_INLINE f32 add(f32 a, f32 b) { return a + b; }
PK_INLINE f32 sub(f32 a, f32 b) { return a - b; }
PK_INLINE f32 mul(f32 a, f32 b) { return a * b; }
// The quotient rounded to nearest, for 1 <= b and a no larger than b's scale, which is all that the activations divide:
// rcp.approx and its corrections in line. The compiler's own division calls a function for the hardest operands, and a
// call anywhere in a kernel makes ptxas serialise its wgmma instructions. (A result below 2^-126 may be one step off.)
PK_INLINE f32 div(f32 a, f32 b) {
  const float down = b > 0x1p64f ? 0x1p-64f : 1.0f;  // keeps the reciprocal a normal number
  b = b * down;
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  r = __fmaf_rn(__fmaf_rn(-b, r, 1.0f), r, r);
  float q = a * r;
  q = __fmaf_rn(__fmaf_rn(-b, q, a), r, q);
  q = __fmaf_rn(__fmaf_rn(-b, q, a), r, q);
  return q * down;
}
PK_INLINE f32 fma(f32 a, f32 b, f32 c) { return __fmaf_rn(a, b, c); }
PK_INLINE f32 min(f32 a, f32 b) { return a < b ? a : b; }
PK_INLINE f32 max(f32 a, f32 b) { return a > b ? a : b; }
PK_INLINE f32 round(f32 a) { return rintf(a); }
PK_INLINE f32 abs(f32 a) { return fabsf(a); }
PK_INLINE f32 max_or_zero(f32 a, f32 b) { return a == a ? max(a, b) : 0.0f; }
PK_INLINE f32 select_lt(f32 a, f32 b, f32 x, f32 y) { return a < b ? x : y; }

PK_INLINE i32 set1_i32(int32_t v) { return v; }
PK_INLINE i32 add(i32 a, i32 b) { return int32_t(uint32_t(a) + uint32_t(b)); }
PK_INLINE i32 sub(i32 a, i32 b) { return int32_t(uint32_t(a) - uint32_t(b)); }
PK_INLINE i32 mul(i32 a, i32 b) { return int32_t(uint32_t(a) * uint32_t(b)); }
PK_INLINE f32 to_f32(i32 a) { return __int2float_rn(a); }
PK_INLINE i32 to_i32(f32 a) { return __float2int_rn(a); }
template <int k>
PK_INLINE i32 shift_left(i32 a) {
  return int32_t(uint32_t(a) << k);
}
PK_INLINE f32 cast_f32(i32 a) { return __int_as_float(a); }

}  // namespace pykernels::PYKERNELS_ISA_NS
