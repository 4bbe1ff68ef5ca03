// The table of the quantize family: rows of n elements, dense, no alignment asked.
#pragma once

#include "cpu/isa/isa.h"

namespace pykernels {

struct QuantizeKernels {
  // Dynamic quantization of one row x (fp32, or bf16 when so flagged) of n >= 0 elements. NaNs are left out of the range
  // and become the zero point; a range too small for a normal fp32 scale counts as zero (scale 1); an infinite one yields
  // scale infinity and q = zero point, so that what is dequantized from the row is NaN.
  // u8 affine: lo = min(0, min x), hi = max(0, max x), scale = (hi - lo)/255, zero_point = rint(-lo/scale)
  void (*quantize_row)(const void* x, bool bf16, int64_t n, uint8_t* q, float* scale, int32_t* zero_point);
  // s8 symmetric: scale = max|x|/127, q in [-127, 127]
  void (*quantize_row_s8)(const void* x, bool bf16, int64_t n, int8_t* q, float* scale);
};
PYKERNELS_TABLE(QuantizeKernels, quantize_kernels)

}  // namespace pykernels
