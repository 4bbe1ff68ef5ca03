// The table of the quantize family. Every kernel works on dense runs of elements: no strides, no alignment asked, any
// n >= 0. `type` says how real values are stored; `s8` that bytes are signed, else unsigned.
#pragma once

#include "common/quantized.h"
#include "common/real.h"
#include "cpu/isa/isa.h"

namespace pykernels {

// One scale and zero point for each of a run of channels.
struct ChannelParameters {
  const float* scale;  // or its inverse, to quantize
  const int32_t* zero_point;
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
};
PYKERNELS_TABLE(QuantizeKernels, quantize_kernels)

}  // namespace pykernels
