// Activations on the vector layer. Only mul/add/sub/div/min/max/round and bit shifts, in one fixed order and without
// FMA, so that every isa computes the same bits.
#pragma once

#include "common/activation.h"
#include "cpu/isa/vec.h"

namespace pykernels::PYKERNELS_ISA_NS {

// exp(x), relative error < 2e-7: x = n ln2 + r, a degree-6 Taylor-minimax polynomial in r (Cephes expf), scaled by 2^n.
PK_INLINE f32 exp(f32 x) {
  x = min(set1(88.0f), max(set1(-87.0f), x));
  const f32 n = round(mul(x, set1(1.44269504088896341f)));
  f32 r = sub(x, mul(n, set1(0.693359375f)));
  r = sub(r, mul(n, set1(-2.12194440e-4f)));
  f32 y = set1(1.9875691500e-4f);
  y = add(mul(y, r), set1(1.3981999507e-3f));
  y = add(mul(y, r), set1(8.3334519073e-3f));
  y = add(mul(y, r), set1(4.1665795894e-2f));
  y = add(mul(y, r), set1(1.6666665459e-1f));
  y = add(mul(y, r), set1(5.0000001201e-1f));
  y = add(add(mul(y, mul(r, r)), r), set1(1.0f));
  return mul(y, cast_f32(shift_left<23>(add(to_i32(n), set1_i32(127)))));
}

PK_INLINE f32 sigmoid(f32 x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(set1(0.0f), x)))); }

// tanh(x) = 1 - 2/(exp(2x)+1) away from zero; near zero the odd Taylor-minimax polynomial of Cephes tanhf.
PK_INLINE f32 tanh(f32 x) {
  const f32 large = sub(set1(1.0f), div(set1(2.0f), add(exp(add(x, x)), set1(1.0f))));
  const f32 z = mul(x, x);
  f32 p = set1(-5.70498872745e-3f);
  p = add(mul(p, z), set1(2.06390887954e-2f));
  p = add(mul(p, z), set1(-5.37397155531e-2f));
  p = add(mul(p, z), set1(1.33314422036e-1f));
  p = add(mul(p, z), set1(-3.33332819422e-1f));
  const f32 small = add(mul(mul(p, z), x), x);
  return select_lt(abs(x), set1(0.625f), small, large);
}

// erf(x), absolute error < 2e-7 (Abramowitz & Stegun 7.1.26 holds 1.5e-7), odd by construction.
PK_INLINE f32 erf(f32 x) {
  const f32 a = abs(x);
  const f32 t = div(set1(1.0f), add(set1(1.0f), mul(set1(0.3275911f), a)));
  f32 p = set1(1.061405429f);
  p = add(mul(p, t), set1(-1.453152027f));
  p = add(mul(p, t), set1(1.421413741f));
  p = add(mul(p, t), set1(-0.284496736f));
  p = add(mul(p, t), set1(0.254829592f));
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
