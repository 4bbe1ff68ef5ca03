// Upsampling, and the interleaving of a transposed convolution's phases. Torch-free.
//
// An image is [n, height, width, channels] in memory; one of contiguous planes is an image of n * channels and one
// channel.
#pragma once

#include <array>
#include <vector>

#include "common/check.h"
#include "cpu/pieces.h"
#include "cpu/upsample/kernels.h"

namespace pykernels {

enum class Interpolation { nearest, bilinear };

struct UpsampleProblem {
  Interpolation mode;
  Pixel type;
  int64_t n, height, width, channels;
  int64_t out_height, out_width;
  int64_t out_step;  // elements between pixels of the output; rows follow one another
  bool align_corners = false;
  std::array<double, 2> factors{};  // scale factors that the caller gave; 0: the ratio of the sizes
};

// Height and width of the output: one of `sizes` and `factors` is empty. Checks them; image: height, width.
std::array<int64_t, 2> upsample_output(const char* op, const int64_t* image, const Ints& sizes,
                                       const std::vector<double>& factors);

// Operand: the image.
class UpsampleDriver final : public PiecesDriver {
 public:
  UpsampleDriver(const UpsampleProblem&, int64_t threads);

  void bind(const uint8_t* const* in, uint8_t* out) override {
    in_ = in[0];
    out_ = out;
  }

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;
  void nearest_row(const uint8_t* from, uint8_t* to) const;

  UpsampleProblem p_;
  std::vector<Tap> rows_, columns_;
  const uint8_t* in_ = nullptr;
  uint8_t* out_ = nullptr;
  const UpsampleKernels& kernels_ = upsample_kernels();
};

// One phase of an interleaving as a strided copy: the elements [n, groups, channels, rows, columns] that come from one
// place of the stride's grid. x is [n, groups * stride * stride * channels, height, width], the phase (row, column) of
// group g in channels ((g * stride + row) * stride + column) * channels and up; `crop` (left, right, top, bottom) is
// cut off the result.
struct Phase {
  int64_t sizes[5], from[5], to[5];
  int64_t from_offset, to_offset;  // elements
};
struct InterleaveShape {
  Ints stride, crop;
  int64_t groups;

  // The sizes of the result for those of x. Checks them all.
  std::array<int64_t, 4> output(const char* op, const int64_t* sizes) const;
  Phase phase(int64_t row, int64_t column, const int64_t* sizes, const int64_t* from, const int64_t* to) const;
};

}  // namespace pykernels
