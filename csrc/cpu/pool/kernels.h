// The table of the pool family. A pool is a reduction over windows, and a window of the plane is the product of one
// window of rows and one of columns, so plain, dilated, padded, adaptive and global pools are all the same to a kernel:
// lists of windows.
//
//   max:   y[n,c,oh,ow] = max over r in rows[oh], s in cols[ow] of x[n,c,r,s]      any NaN wins; ties keep the first
//   avg:   y = (sum of x) / divisor,             divisor = rows[oh].extent * cols[ow].extent
//   qavg:  y = requantize(float(sum of (x - x_zero_point)) * (x_scale / divisor)), the sum exact in s32
//
// All isas yield the same bits: the order of a sum depends on the layout only (channels_last: row by row; contiguous:
// each column downwards, then the columns; whole planes: 16 interleaved sums, then those by halves).
#pragma once

#include <cstdint>

#include "cpu/isa/isa.h"

namespace pykernels {

// The taps of one output coordinate along one axis, inside the plane: begin, begin + step, ... (the step is the axis's
// dilation), `count` >= 1 of them; `extent` is this axis's factor of the divisor.
struct Window {
  int64_t begin, count;
  float extent;
};

enum PoolType : int { kPoolF32, kPoolBf16, kPoolF16, kPoolU8, kPoolS8, kPoolTypes };

struct Pool {
  const void* x;
  void* y;           // dense, in the layout of the kernel called
  int64_t* indices;  // where the maximum stands in its plane (row * width + col), laid out as y
  int64_t channels, width, out_h, out_w;
  int64_t x_batch, x_channel, x_row, x_col;  // strides of x in elements
  const Window *rows, *cols;                 // out_h and out_w of them
  int64_t row_step, col_step;

  // channels_last: the channels are cut into this many blocks of block_channels (the last may be shorter).
  int64_t blocks, block_channels;

  // contiguous: a line of scratch holds col_pad neutral elements, the width, and neutral elements up to line_length.
  // With col_stride > 0, output ow reduces col_taps elements of the line from ow * col_stride; with 0, the windows as
  // listed.
  int64_t col_pad, col_taps, col_stride, line_length;
  const float* col_extents;  // cols[ow].extent as an array
  int64_t run;               // not 0: each plane is one window, of so many elements side by side

  // qavg only
  PoolType y_type;
  int32_t x_zero_point, y_zero_point;
  float x_scale, y_inverse;  // y_inverse = 1 / scale of y
};

// Scratch that a call of a contiguous kernel needs, in bytes, for any isa and type: two lines, with room to overrun.
inline int64_t pool_scratch(const Pool& p) {
  const int64_t longest = p.line_length > p.out_w ? p.line_length : p.out_w;
  return 2 * (longest + 64) * 4;
}

struct PoolKernels {
  // Units [begin, end) of (n, oh, block of channels); x_channel is 1.
  using ChannelsLast = void (*)(const Pool& p, int64_t begin, int64_t end);
  // Units [begin, end) of (n, c, oh); x_col is 1. The index kernel uses no scratch.
  using Contiguous = void (*)(const Pool& p, int64_t begin, int64_t end, void* scratch);

  ChannelsLast max_channels_last[kPoolTypes], max_indices_channels_last[kPoolTypes];
  Contiguous max_contiguous[kPoolTypes], max_indices_contiguous[kPoolTypes];
  // By the type of x; floats yield floats (avg), bytes are averaged as qavg.
  ChannelsLast avg_channels_last[kPoolTypes];
  Contiguous avg_contiguous[kPoolTypes];
};
PYKERNELS_TABLE(PoolKernels, pool_kernels)

}  // namespace pykernels
