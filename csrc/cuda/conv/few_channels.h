// The int8 convolution of at most 4 input channels, such as a network's first, as its kernels and its op see it.
// Torch-free, and free of CUTLASS.
//
// As conv.h, but: x is u8 or s8 [images][height][width][channels], from a multiple of 4 bytes on, and w
// s8 [out_channels][kernel height][row], in which the taps of a kernel row stand one after the other, channels
// innermost, filled up with zeros to `row_bytes`. Beyond the border stands the zero point, whatever it is:
// epilogue.row_zero_value, as a u8 (128 more where x is s8).
//
// The caller guarantees: out_channels a multiple of 16, no groups, a dilation of 1, less than 2^31 bytes of an image
// and words of x. Whole 4-byte words of x's memory are read, of which a byte is x's.
#pragma once

#include "cuda/conv/conv.h"

namespace pykernels::few_channels {

inline constexpr int kMaxChannels = 4, kMaxKernel = 7, kMaxStride = 2;

struct Problem : conv::Problem {
  bool is_signed;  // x
};

// The bytes from one kernel row of w to the next: a power of two, at least 16 (pykernels/ops/packed.py).
constexpr int row_bytes(int kernel_width, int channels) {
  int bytes = 16;
  while (bytes < kernel_width * channels) bytes *= 2;
  return bytes;
}

// How an output is cut up: tiles of whole rows of `units` times 16 pixels.
struct Tiling {
  int rows, units;   // of a tile
  int down, across;  // tiles of an image
  int groups;        // of output channels that a block computes
  int grid[2];       // blocks: of tiles, of output channels
};

// What a kernel is made for: kernels up to size x size, `channels` output channels a warp, `blocks` a multiprocessor.
struct Shape {
  int size, channels, blocks;
};

inline constexpr int kWarps = 4;     // of a block
inline constexpr int kPitch = 264;   // words from one row of the input to the next in shared memory
inline constexpr int kMaxRows = 21;  // of the input in shared memory

// The one that is expected to take the fewest instructions on so many multiprocessors.
Tiling tiling(const Problem& p, const Shape& shape, int multiprocessors);

// Runs on problem.stream without synchronising; null, or why it did not run (a static string).
using Run = const char* (*)(const Problem&);

struct Config {
  const char* name;  // architecture, the largest kernel, output channels a warp
  int arch;          // the compute capability it needs, times 10
  Run run[3];        // for 1, 2 and 4 bytes of output
};

// Every configuration, whatever the machine.
int config_count();
const Config& config(int index);

}  // namespace pykernels::few_channels
