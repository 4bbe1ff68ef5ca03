// The table of the normalizations over one dimension.
//
//   softmax:     y = exp(x - max) * (1 / sum of exp(x - max))
//   layer_norm:  y = (x - mean) / sqrt(variance + eps) * weight + bias,   variance = mean of (x - mean)^2
//
// in fp32, every step rounded. Rows are summed in 16 interleaved sums, those then by halves, and columns from the first
// to the last, so that all isas yield the same bits.
#pragma once

#include <cstdint>

#include "common/real.h"
#include "cpu/isa/isa.h"

namespace pykernels {

// Scratch for a row of n elements, in floats.
inline int64_t row_scratch(int64_t n) { return (n + 15) / 16 * 16; }

struct NormalizeKernels {
  // Rows of n dense elements; `memory` has row_scratch(n) floats. weight and bias [n] in fp32, or null.
  void (*softmax_rows)(const void* x, Real type, int64_t rows, int64_t n, float* memory, void* y);
  void (*layer_norm_rows)(const void* x, Real type, int64_t rows, int64_t n, const float* weight, const float* bias,
                          float eps, float* memory, void* y);
  // Columns [0, width) of n rows, `stride` elements apart: a softmax down each column.
  void (*softmax_columns)(const void* x, Real type, int64_t n, int64_t stride, int64_t width, void* y);
};
PYKERNELS_TABLE(NormalizeKernels, normalize_kernels)

}  // namespace pykernels
