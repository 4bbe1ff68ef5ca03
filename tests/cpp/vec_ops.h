// The functions of the vector layer as operations on arrays, one table per isa: vec_test.cpp compares the tables.
#pragma once

#include <cstdint>

#include "cpu/isa/isa.h"

namespace pykernels {

struct byte {  // a lane of the u8 vectors
  uint8_t bits;
};

// X(name, element of x and y, element of the result, the result, how it must agree with the scalar isa)
//   exact  bit for bit          number  bit for bit, but any NaN for a NaN          fma  rounded once or twice
#define PYKERNELS_VEC_OPS(X)                                                              \
  X(copy_f32, float, float, x, exact)                                                     \
  X(add_f32, float, float, add(x, y), number)                                             \
  X(sub_f32, float, float, sub(x, y), number)                                             \
  X(mul_f32, float, float, mul(x, y), number)                                             \
  X(div_f32, float, float, div(x, y), number)                                             \
  X(min_f32, float, float, min(x, y), exact)                                              \
  X(max_f32, float, float, max(x, y), exact)                                              \
  X(fma_f32, float, float, fma(x, y, y), fma)                                             \
  X(round_f32, float, float, round(x), number)                                            \
  X(floor_f32, float, float, floor(x), number)                                            \
  X(abs_f32, float, float, abs(x), exact)                                                 \
  X(sqrt_f32, float, float, sqrt(x), number)                                              \
  X(max_or_zero, float, float, max_or_zero(x, y), exact)                                  \
  X(select_lt, float, float, select_lt(x, y, sub(y, x), y), number)                       \
  X(select_over, float, float, select_over(x, y, sub(y, x), y), number)                   \
  X(max_nan, float, float, max_nan(x, y), exact)                                          \
  X(set1_f32, float, float, set1(0.1f), exact)                                            \
  X(from_bf16, bfloat16, float, x, exact)                                                 \
  X(to_bf16, float, bfloat16, x, exact)                                                   \
  X(from_f16, float16, float, x, exact)                                                   \
  X(to_f16, float, float16, x, exact)                                                     \
  X(copy_i32, int32_t, int32_t, x, exact)                                                 \
  X(add_i32, int32_t, int32_t, add(x, y), exact)                                          \
  X(sub_i32, int32_t, int32_t, sub(x, y), exact)                                          \
  X(mul_i32, int32_t, int32_t, mul(x, y), exact)                                          \
  X(min_i32, int32_t, int32_t, min(x, y), exact)                                          \
  X(max_i32, int32_t, int32_t, max(x, y), exact)                                          \
  X(shift_left, int32_t, int32_t, shift_left<23>(x), exact)                               \
  X(shift_right, int32_t, int32_t, shift_right<15>(x), exact)                             \
  X(shift_right_signed, int32_t, int32_t, shift_right_signed<28>(x), exact)               \
  X(bit_and, int32_t, int32_t, bit_and(x, y), exact)                                      \
  X(bit_or, int32_t, int32_t, bit_or(x, y), exact)                                        \
  X(bit_xor, int32_t, int32_t, bit_xor(x, y), exact)                                      \
  X(set1_i32, int32_t, int32_t, set1_i32(-7), exact)                                      \
  X(compact_gt, int32_t, int32_t, expanded(x, bits_gt(x, y)), exact)                      \
  X(compact_eq, int32_t, int32_t, expanded(x, bits_eq(x, bit_or(x, y))), exact)           \
  X(to_f32, int32_t, float, to_f32(x), exact)                                             \
  X(to_i32, float, int32_t, to_i32(x), exact)                                             \
  X(cast_f32, int32_t, float, cast_f32(x), exact)                                         \
  X(cast_i32, float, int32_t, cast_i32(x), exact)                                         \
  X(from_u8, uint8_t, int32_t, x, exact)                                                  \
  X(from_s8, int8_t, int32_t, x, exact)                                                   \
  X(to_u8, int32_t, uint8_t, x, exact)                                                    \
  X(to_s8, int32_t, int8_t, x, exact)                                                     \
  X(copy_u8, byte, byte, x, exact)                                                        \
  X(max_u8, byte, byte, max_u8(x, y), exact)                                              \
  X(min_u8, byte, byte, min_u8(x, y), exact)                                              \
  X(max_s8, byte, byte, max_s8(x, y), exact)                                              \
  X(min_s8, byte, byte, min_s8(x, y), exact)                                              \
  X(xor_u8, byte, byte, xor_u8(x, y), exact)                                              \
  X(set1_u8, byte, byte, set1_u8(200), exact)                                             \
  X(exp, float, float, exp(x), number)                                                    \
  X(erf, float, float, erf(x), number)                                                    \
  X(relu, float, float, activate(Activation::relu, x), number)                            \
  X(relu6, float, float, activate(Activation::relu6, x), number)                          \
  X(hardswish, float, float, activate(Activation::hardswish, x), number)                  \
  X(hardsigmoid, float, float, activate(Activation::hardsigmoid, x), number)              \
  X(silu, float, float, activate(Activation::silu, x), number)                            \
  X(sigmoid, float, float, activate(Activation::sigmoid, x), number)                      \
  X(gelu, float, float, activate(Activation::gelu, x), number)                            \
  X(tanh, float, float, activate(Activation::tanh, x), number)                            \
  X(requantize_u8, float, uint8_t, requantize(requantizer(1.7f, 131, 0, 255), x), exact)  \
  X(requantize_s8, float, int8_t, requantize(requantizer(0.3f, -9, -128, 127), x), exact) \
  X(dequantize, int32_t, float, dequantize(x, set1_i32(131), set1(0.017f)), exact)

#define PYKERNELS_COUNT(...) +1
inline constexpr int kVecOps = 0 PYKERNELS_VEC_OPS(PYKERNELS_COUNT);

struct VecOps {
  void (*run[kVecOps])(const void* x, const void* y, void* out, int64_t count);
};
PYKERNELS_TABLE(VecOps, vec_ops)

}  // namespace pykernels
