// Depthwise convolution: 16 channels at a time over a run of output pixels.
#pragma once

#include "common/packed.h"
#include "cpu/isa/isa.h"

namespace pykernels {

// sum[x][j] = start[j] + sum over t < taps of tap[t][at + x * x_stride][channel j] * weight[t][j],  x < pixels, j < 16;
// sums of floats begin at zero
// c[x][j] = min(high, max(low, sum[x][j] + bias[j])) for fp32, else sum[x][j]
// tap[t] + at: u8, bf16, fp16 or fp32 at the first of the 16 channels, all of which must be readable. Weights are one
// depthwise panel of common/packed.h (words of taps). c is [pixels][ldc], s32 or fp32. There are round_up(taps, 4)
// pointers: those beyond taps meet zero weights and only have to be readable.
struct DepthwiseArgs {
  const uint8_t* const* tap;
  int64_t at, x_stride;  // bytes
  int64_t words, kh, kw;
  const uint8_t* panel;
  int64_t pixels;
  const int32_t* start;
  const float* bias;  // or null
  float low, high;
  void* c;
  int64_t ldc;  // elements
};

struct DepthwiseKernels {
  void (*s8)(const DepthwiseArgs&);
  void (*bf16)(const DepthwiseArgs&);
  void (*f16)(const DepthwiseArgs&);
  void (*f32)(const DepthwiseArgs&);
};
PYKERNELS_TABLE(DepthwiseKernels, depthwise_kernels)

}  // namespace pykernels
