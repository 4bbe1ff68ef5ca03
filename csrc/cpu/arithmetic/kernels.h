// The table of the arithmetic family. Every kernel works on dense runs of elements: no strides, no alignment asked, any
// n >= 0. `type` says how real values are stored; `s8` that bytes are signed, else unsigned.
#pragma once

#include "common/activation.h"
#include "common/quantized.h"
#include "common/real.h"
#include "cpu/isa/isa.h"

namespace pykernels {

// How the second operand of add and mul lies against rows x n elements of the first.
enum class Operand {
  same,     // [rows, n]
  columns,  // [n], used again for every row
  rows,     // [rows], one value for a whole row
};

struct ArithmeticKernels {
  // q(activation(real(a) + real(b))), q(real(a) * real(b)), q(real(a)); every step rounded to fp32.
  void (*add)(const QuantizedInput& a, const QuantizedInput& b, Operand, int64_t rows, int64_t n, Activation,
              const QuantizedOutput& q);
  void (*mul)(const QuantizedInput& a, const QuantizedInput& b, Operand, int64_t rows, int64_t n,
              const QuantizedOutput& q);
  void (*requantize)(const QuantizedInput& a, int64_t n, const QuantizedOutput& q);
  // y[i] = table[x[i]]
  void (*lookup)(const uint8_t* x, int64_t n, const uint8_t* table, uint8_t* y);

  // activation(a + b), a * b in fp32, rounded once to the type of all three; as torch, the activation apart, but for
  // the bits of a NaN.
  void (*add_reals)(const void* a, const void* b, Real type, Operand, int64_t rows, int64_t n, Activation, void* y);
  void (*mul_reals)(const void* a, const void* b, Real type, Operand, int64_t rows, int64_t n, void* y);
  // Half to even.
  void (*cast)(const void* x, Real from, int64_t n, void* y, Real to);
  // activation(x); x > 0 ? x : slope * x
  void (*activate)(const void* x, Real type, int64_t n, Activation, void* y);
  void (*leaky_relu)(const void* x, Real type, int64_t n, float slope, void* y);
};
PYKERNELS_TABLE(ArithmeticKernels, arithmetic_kernels)

}  // namespace pykernels
