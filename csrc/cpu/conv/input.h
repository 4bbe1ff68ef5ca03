// A convolution's input as the kernels read it.
#pragma once

#include "common/packed.h"
#include "common/stable.h"

namespace pykernels {

struct ConvShape {
  int64_t n, c, h, w;  // input
  int64_t o, kh, kw;   // weights
  int64_t sh, sw, dh, dw, groups;
  int64_t left, right, top, bottom;
  int64_t oh, ow;  // output
};

// NHWC, `pixel` bytes a pixel: each group's channels rounded up to whole words.
struct ConvInput {
  Tensor storage;  // keeps the memory
  const uint8_t* data;
  int64_t pixel, row, image;  // bytes
  uint8_t flip;               // what turns its bytes into u8: still to be done by whoever reads them
};

// Uses x itself when it is channels_last and its groups are whole words; else copies it once.
ConvInput prepare_input(const ConvShape& shape, const Tensor& x);

}  // namespace pykernels
