// Between real numbers and 8-bit affine integers, in fp32, exactly as every family's epilogue must do it:
//   q = clamp(rint(f * (1/scale)) + zero_point, low, high), half to even; NaN becomes the zero point (the real 0)
//   f = (q - zero_point) * scale
#pragma once

#include "cpu/isa/vec.h"

namespace pykernels::PYKERNELS_ISA_NS {

// 1/scale is computed once, in fp32. Clamping to the integers low - zero_point and high - zero_point before the
// rounding conversion yields what clamping after it would, and one step less. low <= 0 <= high.
struct Requantize {
  f32 inverse, low, high;
  i32 zero_point;
};

PK_INLINE Requantize requantizer(float inverse, int32_t zero_point, int32_t low, int32_t high) {
  return {set1(inverse), set1(static_cast<float>(low - zero_point)), set1(static_cast<float>(high - zero_point)),
          set1_i32(zero_point)};
}
PK_INLINE Requantize requantizer(float inverse, int32_t zero_point, const uint8_t*) {
  return requantizer(inverse, zero_point, 0, 255);
}
PK_INLINE Requantize requantizer(float inverse, int32_t zero_point, const int8_t*) {
  return requantizer(inverse, zero_point, -128, 127);
}

PK_INLINE i32 requantize(const Requantize& r, f32 f) {
  return add(to_i32(min(max_or_zero(mul(f, r.inverse), r.low), r.high)), r.zero_point);
}

PK_INLINE f32 dequantize(i32 q, i32 zero_point, f32 scale) { return mul(to_f32(sub(q, zero_point)), scale); }

}  // namespace pykernels::PYKERNELS_ISA_NS
