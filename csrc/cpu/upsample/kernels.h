// The table of the upsampling family; nearest neighbours are copies and need no kernel.
//
//   y[x, c] = t0 * (s0 * above[l, c] + s1 * above[r, c]) + t1 * (s0 * below[l, c] + s1 * below[r, c])
//
// in fp32, every step rounded, with taps l, r and weights s0, s1 of column x, and t0, t1 of the row. Bytes are
// interpolated as they are: weights add up to one, so that scale and zero point stay; rounded half to even.
#pragma once

#include <cstdint>

#include "common/real.h"
#include "cpu/isa/isa.h"

namespace pykernels {

// Where a place of the output stands between two of the input.
struct Tap {
  int64_t first, second;
  float weight0, weight1;
};

enum class Pixel : int { f32, bf16, f16, u8, s8 };
inline int64_t pixel_bytes(Pixel p) { return p == Pixel::f32 ? 4 : p == Pixel::bf16 || p == Pixel::f16 ? 2 : 1; }

struct UpsampleKernels {
  // Columns [0, width) of one row of the output, `step` elements apart; rows of the input are dense, `channels` a
  // pixel.
  void (*bilinear)(const void* above, const void* below, Pixel type, const Tap& row, const Tap* columns, int64_t width,
                   int64_t channels, void* y, int64_t step);
};
PYKERNELS_TABLE(UpsampleKernels, upsample_kernels)

}  // namespace pykernels
