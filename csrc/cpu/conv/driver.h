// A convolution as drivers: its input brought to the pixels that dot tiles read, and the tiles. Torch-free.
#pragma once

#include "common/check.h"
#include "common/packed.h"
#include "cpu/tile/driver.h"

namespace pykernels {

struct ConvShape {
  int64_t n, c, h, w;  // input
  int64_t o, kh, kw;   // weights
  int64_t sh, sw, dh, dw, groups;
  int64_t left, right, top, bottom;
  int64_t oh, ow;  // output
};

// x: [n, c, h, w]; padding: left, right, top, bottom. Throws where the arguments do not fit one another.
ConvShape conv_shape(const char* op, const int64_t* x, int64_t out_channels, const Ints& kernel, const Ints& stride,
                     const Ints& padding, const Ints& dilation, int64_t groups);

// Throws unless the weights were packed for this convolution.
void check_conv_weight(const char* op, const PackedView& weights, const ConvShape& shape);

// What dot tiles read: NHWC, each group's channels rounded up to whole words. All in bytes, but for the channels.
struct ConvPixels {
  int64_t channels;  // of a group, with the padding
  int64_t pixel, row, image;
  bool as_they_are;  // a channels_last input is that already

  ConvPixels(const ConvShape& shape, int64_t element_bytes);
};

// Operand: x, of any strides (in elements) for few channels; it writes ConvPixels and a block of bytes behind them that
// may be read.
class ConvInputDriver final : public Driver {
 public:
  ConvInputDriver(const ConvShape& shape, int64_t element_bytes, const int64_t* x_strides, int64_t threads);
  void bind(const uint8_t* const* in, uint8_t* out) override { x_ = in[0], out_ = out; }
  void run(int64_t task, uint8_t* memory) const override;

 private:
  template <class T>
  void copy_lines(int64_t first, int64_t last) const;

  ConvShape shape_;
  ConvPixels pixels_;
  int64_t element_bytes_;
  int64_t strides_[4];
  const uint8_t* x_ = nullptr;
  uint8_t* out_ = nullptr;
};

// For a TileDriver: over x as ConvPixels. `fill` is what the padding holds: x's zero point after the flip.
TileProblem conv_problem(const ConvShape& shape, const PackedView& weights, const Epilogue& e, uint8_t fill,
                         uint8_t flip);

}  // namespace pykernels
