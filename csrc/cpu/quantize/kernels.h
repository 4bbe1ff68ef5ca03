// The table of the quantize family. Every kernel works on dense runs of elements: no strides, no alignment asked, any
// n >= 0. `type` says how real values are stored; `s8` that bytes are signed, else unsigned.
#pragma once

#include "common/activation.h"
#include "common/real.h"
#include "cpu/isa/isa.h"

namespace pykernels {

// What the bytes at `data` mean: real = (byte - zero_point) * scale.
struct QuantizedInput {
  const void* data;
  bool s8;
  float scale;
  int32_t zero_point;
};

// Where bytes go: byte = clamp(rint(real * inverse_scale) + zero_point), inverse_scale = 1/scale rounded to fp32.
struct QuantizedOutput {
  void* data;
  bool s8;
  float inverse_scale;
  int32_t zero_point;
};

// One scale and zero point for each of a run of channels.
struct ChannelParameters {
  const float* scale;  // or its inverse, to quantize
  const int32_t* zero_point;
};

// How the second operand of add and mul lies against rows x n elements of the first.
enum class Operand {
  same,     // [rows, n]
  columns,  // [n], used again for every row
  rows,     // [rows], one value for a whole row
};

struct QuantizeKernels {
  // Dynamic quantization of one row x of n elements. NaNs are left out of the range and become the zero point; a range
  // too small for a normal fp32 scale counts as zero (scale 1); an infinite one yields scale infinity and q = zero
  // point, so that what is dequantized from the row is NaN. u8 affine: lo = min(0, min x), hi = max(0, max x), scale =
  // (hi - lo)/255, zero_point = rint(-lo/scale)
  void (*quantize_row)(const void* x, Real type, int64_t n, uint8_t* q, float* scale, int32_t* zero_point);
  // s8 symmetric: scale = max|x|/127, q in [-127, 127]
  void (*quantize_row_s8)(const void* x, Real type, int64_t n, int8_t* q, float* scale);

  // n elements with one scale and zero point.
  void (*quantize)(const void* x, Real type, int64_t n, const QuantizedOutput& q);
  void (*dequantize)(const QuantizedInput& q, int64_t n, void* x, Real type);
  // [rows, n] elements with the channels last; scale and zero point of `q` are not used.
  void (*quantize_channels)(const void* x, Real type, int64_t rows, int64_t n, const ChannelParameters&,
                            const QuantizedOutput& q);
  void (*dequantize_channels)(const QuantizedInput& q, int64_t rows, int64_t n, const ChannelParameters&, void* x,
                              Real type);

  // q(activation(real(a) + real(b))), q(real(a) * real(b)), q(real(a)); every step rounded to fp32.
  void (*add)(const QuantizedInput& a, const QuantizedInput& b, Operand, int64_t rows, int64_t n, Activation,
              const QuantizedOutput& q);
  void (*mul)(const QuantizedInput& a, const QuantizedInput& b, Operand, int64_t rows, int64_t n,
              const QuantizedOutput& q);
  void (*requantize)(const QuantizedInput& a, int64_t n, const QuantizedOutput& q);
  // y[i] = table[x[i]]
  void (*lookup)(const uint8_t* x, int64_t n, const uint8_t* table, uint8_t* y);
};
PYKERNELS_TABLE(QuantizeKernels, quantize_kernels)

}  // namespace pykernels
