// Depthwise convolution: 16 channels at a time over a run of output pixels.
#pragma once

#include "common/packed.h"
#include "cpu/isa/isa.h"

namespace pykernels {

// c[x][j] = sum over t < taps of a[x * x_stride + tap_offset[t]][channel j] * weight[t][j],  x < pixels, j < 16
// a: u8, bf16 or fp32 at the first of the 16 channels; all 16 must be readable at every tap. Weights are one depthwise
// panel of common/packed.h (words of taps). c is [pixels][16], s32 or fp32. tap_offset has round_up(taps, 4) entries:
// those beyond taps meet zero weights and only have to be readable.
struct DepthwiseArgs {
  const uint8_t* a;
  int64_t x_stride;  // bytes
  const int64_t* tap_offset;
  int64_t words;
  const uint8_t* panel;
  int64_t pixels;
  void* c;
};

struct DepthwiseKernels {
  void (*s8)(const DepthwiseArgs&);
  void (*bf16)(const DepthwiseArgs&);
  void (*f32)(const DepthwiseArgs&);
};
PYKERNELS_TABLE(DepthwiseKernels, depthwise_kernels)

}  // namespace pykernels
