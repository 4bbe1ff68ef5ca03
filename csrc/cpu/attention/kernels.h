// The table of what attention needs beside dot tiles: rows brought to fp32 and to the panels that tiles read, and the
// weights of the keys,
//
//   w = exp(s - max),  out = sum of w * value * (1 / sum of w)
//
// in fp32, every step rounded; rows are summed as softmax sums them (cpu/isa/rows.h).
#pragma once

#include <cstdint>

#include "common/real.h"
#include "cpu/isa/isa.h"

namespace pykernels {

// What is done to a row of scores before they become weights. A mask is one element a key: bytes, 0 for a key that is
// left out, or real numbers that are added.
struct MaskRow {
  enum class Kind { none, bytes, reals } kind;
  Real type;
  const void* at;
};

struct AttentionKernels {
  // n reals times `factor`, in fp32.
  void (*widen)(const void* x, Real type, int64_t n, float factor, float* to);
  // Rows of `depth` reals, `stride` elements apart, as columns of panels of 16: to[p][d][j] = x[16 p + j][d], zeros
  // beyond the last row.
  void (*pack_rows)(const void* x, Real type, int64_t rows, int64_t stride, int64_t depth, float* to);
  // Their columns as those of panels: to[p][r][j] = x[r][16 p + j], zeros beyond `depth`.
  void (*pack_columns)(const void* x, Real type, int64_t rows, int64_t stride, int64_t depth, float* to);
  // The first n scores of a row become weights, those up to `padded`, a multiple of 16, zeros. Returns 1 / their sum; 0
  // where no key is left.
  float (*weigh)(float* scores, int64_t n, int64_t padded, const MaskRow& mask);
  // n reals: sums times `factor`.
  void (*narrow)(const float* sums, int64_t n, float factor, Real type, void* to);
};
PYKERNELS_TABLE(AttentionKernels, attention_kernels)

}  // namespace pykernels
