// Activations on the vector layer. Only mul/add/sub/div/fma/min/max and bit shifts, in one fixed order and contracted
// nowhere else, so that every isa computes the same bits.
#pragma once

#include "common/activation.h"
#include "cpu/isa/vec.h"

namespace pykernels::PYKERNELS_ISA_NS {

// x, up to 2^22, rounded half to even, and the same as an integer of which the last 9 bits count. Adding 1.5 * 2^23
// rounds, and leaves the integer in the last bits; ptxas has no registers for that where CUTLASS takes nearly all.
PK_INLINE f32 round_to(f32 x, i32* whole) {
#ifdef PYKERNELS_ISA_CUDA
  const f32 n = round(x);
  *whole = to_i32(n);
  return n;
#else
  const f32 shifted = add(x, set1(12582912.0f));
  *whole = cast_i32(shifted);
  return sub(shifted, set1(12582912.0f));
#endif
}

// exp(x), relative error < 1e-7: x = n ln2 + r, a minimax polynomial in r, scaled by 2^n.
PK_INLINE f32 exp(f32 x) {
  x = min(set1(88.0f), max(set1(-87.0f), x));
  i32 whole;
  const f32 n = round_to(mul(x, set1(1.44269504088896341f)), &whole);
  f32 r = fma(n, set1(-0.693147182464599609f), x);
  r = fma(n, set1(1.90465429995776e-9f), r);
  f32 y = fma(set1(1.381459064e-3f), r, set1(8.368725888e-3f));
  y = fma(y, r, set1(4.166838899e-2f));
  y = fma(y, r, set1(1.666652113e-1f));
  y = fma(y, r, set1(4.999999404e-1f));
  y = fma(y, r, set1(1.0f));
  y = fma(y, r, set1(1.0f));
  return mul(y, cast_f32(add(shift_left<23>(whole), set1_i32(127 << 23))));
}

PK_INLINE f32 sigmoid(f32 x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(set1(0.0f), x)))); }

// tanh(x) = 1 - 2/(exp(2x)+1) away from zero; near zero the odd Taylor-minimax polynomial of Cephes tanhf.
PK_INLINE f32 tanh(f32 x) {
  const f32 large = sub(set1(1.0f), div(set1(2.0f), add(exp(add(x, x)), set1(1.0f))));
  const f32 z = mul(x, x);
  f32 p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const f32 small = fma(mul(p, z), x, x);
  return select_lt(abs(x), set1(0.625f), small, large);
}

// erf(x), absolute error < 2e-7 (Abramowitz & Stegun 7.1.26 holds 1.5e-7), odd by construction.
PK_INLINE f32 erf(f32 x) {
  const f32 a = abs(x);
  const f32 t = div(set1(1.0f), fma(set1(0.3275911f), a, set1(1.0f)));
  f32 p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const f32 y = sub(set1(1.0f), mul(mul(p, t), exp(sub(set1(0.0f), mul(a, a)))));
  return select_lt(x, set1(0.0f), sub(set1(0.0f), y), y);
}

PK_INLINE f32 hard_gate(f32 x) {  // relu6(x + 3) / 6
  return mul(min(set1(6.0f), max(set1(0.0f), add(x, set1(3.0f)))), set1(1.0f / 6.0f));
}

PK_INLINE f32 activate(Activation act, f32 x) {
  switch (act) {
    case Activation::none: return x;
    case Activation::relu: return max(set1(0.0f), x);
    case Activation::relu6: return min(set1(6.0f), max(set1(0.0f), x));
    case Activation::hardswish: return mul(x, hard_gate(x));
    case Activation::hardsigmoid: return hard_gate(x);
    case Activation::silu: return mul(x, sigmoid(x));
    case Activation::sigmoid: return sigmoid(x);
    case Activation::gelu: return mul(mul(x, set1(0.5f)), add(set1(1.0f), erf(mul(x, set1(0.70710678118654752f)))));
    case Activation::tanh: return tanh(x);
  }
  return x;
}

}  // namespace pykernels::PYKERNELS_ISA_NS
