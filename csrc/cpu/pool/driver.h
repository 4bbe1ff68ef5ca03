// A pool as a driver. Torch-free. Operand 0: x; the output: y, dense, in the layout of the kernel that runs, which is
// channels_last where PoolProblem::channels_last() says so and else contiguous.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "common/check.h"
#include "cpu/pieces.h"
#include "cpu/pool/kernels.h"

namespace pykernels {

enum class PoolKind { max, max_with_indices, average };

struct PoolProblem {
  PoolKind kind = PoolKind::max;
  PoolType type = kPoolF32;                   // of x
  std::array<int64_t, 4> sizes{}, strides{};  // of x: NCHW, in elements

  // Adaptive: output o of an axis covers its share of the plane. Else windows of `kernel` taps, `dilation` apart, begin
  // every `stride` elements, the first one `padding` before the plane. Pairs: of rows, of columns.
  bool adaptive = false;
  Ints output{};  // adaptive only
  Ints kernel{}, stride{}, padding{}, dilation{1, 1};
  bool ceil_mode = false;

  // Averages.
  bool count_include_pad = true;
  std::optional<int64_t> divisor{};  // instead of the number of elements

  // Averages of 8 bits. out_scale and out_zero_point: of an 8-bit output.
  PoolType out_type = kPoolF32;
  double x_scale = 1, out_scale = 1;
  int64_t x_zero_point = 0, out_zero_point = 0;

  // Whether the channels_last kernel runs. Where the strides fit both layouts, contiguous wins.
  bool channels_last() const;
  // Whether x is read where it lies; else it must be copied to be contiguous (and described anew).
  bool readable() const;
};

// Checks the geometry; the height and the width of the output.
std::array<int64_t, 2> pool_output(const char* op, const PoolProblem&);

class PoolDriver final : public PiecesDriver {
 public:
  // The problem has passed pool_output() and is readable. Checks what it takes the windows to see.
  PoolDriver(const char* op, const PoolProblem&, int64_t threads);
  PoolDriver(const PoolDriver&) = delete;

  void bind(const uint8_t* const* in, uint8_t* out) override {
    pool_.x = in[0];
    pool_.y = out;
  }
  // max_with_indices: where the maximum stands in its plane (row * width + column), laid out as the output.
  void bind_indices(int64_t* indices) { pool_.indices = indices; }

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;

  Pool pool_{};
  std::vector<Window> rows_, cols_;
  std::vector<float> col_extents_;
  PoolKernels::ChannelsLast channels_last_ = nullptr;  // the one that runs
  PoolKernels::Contiguous contiguous_ = nullptr;
};

}  // namespace pykernels
