// The int8 convolution of the CUDA library, as its kernels and its op see it. Torch-free, and free of CUTLASS.
//
//   acc = sum over taps and channels of x[pixel of m at the tap][c] * w[n][tap][c]    exact, s32
//
// and then the epilogue of epilogue.h, whose rows m are the images * height * width pixels of the output. x is u8
// [images][height][width][channels], w s8 [out_channels][kernel height][kernel width][channels], channels contiguous.
//
// Beyond the border stands 0, so that a zero point other than 0 is right only without padding: the caller sees to it.
// The caller guarantees, too: 16-byte aligned pointers, channels a multiple of 16, no groups, sums that s32 can hold.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/epilogue/epilogue.h"

namespace pykernels::conv {

struct Problem {
  int images, height, width, channels, out_channels;
  int kernel[2], stride[2], dilation[2];  // along the height, the width
  int before[2], after[2];                // padding
  int out_height, out_width;
  const uint8_t* x;
  const int8_t* w;
  epilogue::Arguments epilogue;
  cudaStream_t stream;
};

// Runs on problem.stream without synchronising; null, or why it did not run (a static string).
using Run = const char* (*)(const Problem&);

struct Config {
  const char* name;  // architecture, tile m x n x k, how
  int arch;          // the compute capability it needs, times 10
  Run run[3];        // for 1, 2 and 4 bytes of output
};

// Every configuration, whatever the machine.
int config_count();
const Config& config(int index);

}  // namespace pykernels::conv
