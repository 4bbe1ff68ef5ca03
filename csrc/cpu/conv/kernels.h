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

// The same of bytes where the kernel is 3, 5 or 7 wide, the stride 1 or 2 and nothing dilated, a block of channels at a
// time: out is u8 [pixels][out_step], what the scaled epilogue of cpu/tile/kernels.h makes of the sums, or s32
// [pixels][channels of a block], the sums.
struct DepthwiseWordsArgs {
  const uint8_t* const* row;  // kh: the first channel of the first tap; whole blocks must be readable at every tap
  int64_t pixel;              // bytes from one tap to the next
  int64_t kh, pixels;
  int channels;  // that are written of the block
  const uint8_t* weights;
  const int32_t* start;
  const float *multiplier, *addend;  // these three in the kernels' order
  float low, high;
  bool finishes;
  void* out;
  int64_t out_step;
};

struct DepthwiseWordsKernels {
  int channels;  // of a block; 0: this isa has no such kernels
  // Bytes of a block's weights as the kernels read them, and these, of (up to a block) `channels` channels.
  int64_t (*weight_bytes)(int64_t kh, int64_t kw, int64_t stride);
  void (*order_weights)(const uint8_t* panels, int64_t panel_bytes, int64_t channels, int64_t kh, int64_t kw,
                        int64_t stride, uint8_t* to);
  // 4-byte numbers of a block's channels, zeros for those beyond.
  void (*order_channels)(const void* from, int64_t channels, void* to);
  void (*run[3][2])(const DepthwiseWordsArgs&);  // by (kw - 3) / 2 and stride - 1
};
PYKERNELS_TABLE(DepthwiseWordsKernels, depthwise_words_kernels)

}  // namespace pykernels
