// From exact sums to outputs, shared by the epilogues of all kernels: epilogue.h has the formula.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/array.h>

#include <cfloat>

#include "cpu/isa/math.h"
#include "cuda/epilogue/epilogue.h"

namespace pykernels::PYKERNELS_ISA_NS {

using epilogue::Finish;
using epilogue::Residual;

template <Activation act, int N>
PK_INLINE void activate_each(cutlass::Array<float, N>& f) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < N; ++i) f[i] = activate(act, f[i]);
}

// The switch stands outside the loop: it is taken once a fragment.
template <int N>
PK_INLINE void activate_all(Activation act, cutlass::Array<float, N>& f) {
#define PK_CASE(name, ...) \
  case Activation::name: return activate_each<Activation::name>(f);
  switch (act) { PK_ACTIVATIONS(PK_CASE) }
#undef PK_CASE
}

// An output of 1, 2 or 4 bytes as its bits; which dtype of that width is known at run time only, for one kernel each.
PK_INLINE float real(const Finish& p, int8_t bits) {
  const int q = p.residual_low ? bits : uint8_t(bits);
  return mul(to_f32(q - p.residual_zero_point), p.residual_scale);
}
PK_INLINE float real(const Finish& p, uint16_t bits) {
  return p.bfloat16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}
PK_INLINE float real(const Finish&, float value) { return value; }

PK_INLINE void store(const Finish& p, float f, int8_t& bits) {
  const float low = to_f32(p.low - p.zero_point), high = to_f32(p.high - p.zero_point);
  bits = int8_t(to_i32(min(max_or_zero(mul(f, p.inverse), low), high)) + p.zero_point);
}
PK_INLINE void store(const Finish& p, float f, uint16_t& bits) {
  bits = p.bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(f)) : __half_as_ushort(__float2half_rn(f));
}
PK_INLINE void store(const Finish&, float f, float& value) { value = f; }

template <int N>
PK_INLINE void add_scaled(const Finish& p, cutlass::Array<float, N>& t, const cutlass::Array<int8_t, N>& residual) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < N; ++i) {
    const int byte = p.residual_low ? residual[i] + 128 : uint8_t(residual[i]);
    t[i] = fma(to_f32(byte), p.residual_factor, t[i]);
  }
}

template <class Out, int N>
PK_INLINE void add_residual(const Finish& p, cutlass::Array<float, N>& f, const cutlass::Array<Out, N>& residual) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < N; ++i) f[i] = add(f[i], real(p, residual[i]));
}

// What is linear of a column: t = fma(float(a), multiplier, addend).
struct Line {
  float multiplier, addend;
};
PK_INLINE Line folded(const Finish& p, float scale, float bias) {
  const float addend = add(mul(bias, p.inverse), p.offset), multiplier = min(mul(scale, p.inverse), FLT_MAX);
  const bool known = addend == addend;
  return {known ? multiplier : 0.0f, known ? addend : p.zero};
}

// Bytes, with all that is linear folded.
template <int N, class... Residuals>
PK_INLINE cutlass::Array<int8_t, N> finish_scaled(const Finish& p, const cutlass::Array<int, N>& a,
                                                  const cutlass::Array<float, N>& scale,
                                                  const cutlass::Array<float, N>& bias, const Residuals&... residual) {
  cutlass::Array<float, N> t;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < N; ++i) {
    const Line line = folded(p, scale[i], bias[i]);
    t[i] = fma(to_f32(a[i]), line.multiplier, line.addend);
  }
  if (p.residual == Residual::before) (add_scaled(p, t, residual), ...);
  cutlass::Array<int8_t, N> out;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < N; ++i) out[i] = int8_t(to_i32(min(p.most, max(p.least, t[i]))) + p.low);
  return out;
}

// residual: none, or one array of Out.
template <class Out, int N, class... Residuals>
PK_INLINE cutlass::Array<Out, N> finish(const Finish& p, const cutlass::Array<int, N>& acc,
                                        const cutlass::Array<float, N>& row_scale,
                                        const cutlass::Array<int, N>& row_zero,
                                        const cutlass::Array<float, N>& column_scale,
                                        const cutlass::Array<int, N>& column_sum, const cutlass::Array<float, N>& bias,
                                        const Residuals&... residual) {
  cutlass::Array<int, N> a;
  cutlass::Array<float, N> scale, f;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < N; ++i) {
    a[i] = sub(acc[i], mul(row_zero[i], column_sum[i]));
    scale[i] = mul(row_scale[i], column_scale[i]);
  }
  if constexpr (sizeof(Out) == 1)
    if (p.scaled) return finish_scaled(p, a, scale, bias, residual...);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < N; ++i) f[i] = fma(to_f32(a[i]), scale[i], bias[i]);
  if (p.residual == Residual::before) (add_residual<Out>(p, f, residual), ...);
  activate_all(p.activation, f);
  if (p.residual == Residual::after) (add_residual<Out>(p, f, residual), ...);
  cutlass::Array<Out, N> out;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < N; ++i) {
    Out bits;
    store(p, f[i], bits);
    out[i] = bits;
  }
  return out;
}

}  // namespace pykernels::PYKERNELS_ISA_NS
