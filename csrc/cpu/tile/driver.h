// Runs dot tiles and epilogues over a whole GEMM or convolution. Torch-free.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/driver.h"
#include "cpu/tile/kernels.h"

namespace pykernels {

// A convolution over channels-last pixels of whole words, all strides in bytes:
//   input pixel (i, y, x) stands at x + i * image_stride + y * row_stride + x * pixel, its groups group_stride apart;
//   outside of height x width it is `fill` (of every byte, after the flip);
//   output pixel (i, y, x), row (i * rows + y) * columns + x of out, reads input pixels
//   (i, y * sh - top + ky * dh, x * sw - left + kx * dw).
// A GEMM is one image of one row, with a 1x1 kernel.
// How a problem is cut, where somebody has measured it; 0: as plan_tiles() finds best by counting.
struct Tiling {
  int64_t rows = 0;    // of a tile at most
  int64_t block = 0;   // tiles that reuse a panel group while it is in cache
  int64_t splits = 0;  // pieces of the rows; as many pieces of the panels as threads are then left
};

struct TileProblem {
  const DotKernel* dot;
  void (*epilogue)(const Epilogue&, const EpilogueArgs&);
  const uint8_t* x;
  int64_t image_stride, row_stride, pixel, group_stride;
  int64_t height, width;
  int64_t kh = 1, kw = 1, sh = 1, sw = 1, dh = 1, dw = 1, top = 0, left = 0;
  uint8_t fill = 0, flip = 0;
  int64_t images = 1, rows = 1, columns;
  PackedView weights;
  Epilogue e;
  Tiling tiling;

  int64_t max_rows() const { return tiling.rows > 0 ? std::min<int64_t>(tiling.rows, dot->max_rows) : dot->max_rows; }
};

// The addend of a Finish that adds nothing: x + -0 is x, whatever x.
extern const std::array<float, kMaxPanels * kColumns> kNoAddend;

int64_t l2_bytes();  // of a core
// Bytes of A that a block of tiles may hold: half of L2, the rest is for the weights, which each block reads anew.
int64_t block_bytes();

// Of so many products of so many terms, as far as 64 bits can count.
inline int64_t operations_of(int64_t outputs, int64_t terms) {
  int64_t operations;
  return __builtin_mul_overflow(2 * outputs, terms, &operations) ? INT64_MAX : operations;
}

// The kernels of the isa in force for these weights.
const DotKernel& dot_kernel(const PackedView& weights);
auto epilogue_kernel(Element element) -> void (*)(const Epilogue&, const EpilogueArgs&);

// Everything of an epilogue but x's scale and zero point, residual and output: weights' arrays and activation.
Epilogue make_epilogue(const PackedView& weights, Activation activation);
// What an epilogue's kernels read, made of what it says: its arrays, which it points to afterwards, and its bounds.
class Folded {
 public:
  void fold(Epilogue& e, const PackedView& weights);

 private:
  std::vector<int32_t> start_;
  std::vector<float> multiplier_, addend_;
};

// What is written; scale and zero point where that is 8 bits.
void set_out(Epilogue& e, Dtype dtype, double scale, int64_t zero_point);
// What is added; scale and zero point where that is 8 bits.
void set_residual(Epilogue& e, Dtype dtype, bool after_activation, double scale, int64_t zero_point);

// A rectangle of the output, [y0, y1) x [x0, x1), whose pixels follow one another along x or, `down`, along y.
struct Stretch {
  int64_t y0, y1, x0, x1;
  bool down;

  int64_t pixels() const { return (y1 - y0) * (x1 - x0); }
};

// Neighbouring pixels that tiles share evenly.
struct Section {
  int64_t pixels, tiles;
};

struct TilePlan {
  // A line is a row of the output where tiles read patches, else a whole image.
  Section sections[3];                               // of a line
  int64_t most_rows, tiles_per_line, tiles, panels;  // rows of the largest tile; panels of all groups
  int64_t tile_splits, panel_splits, tasks;
  int64_t block;  // tiles that reuse a panel group while it is in cache
  bool staged;    // every tile reads a patch; else its pixels where they stand

  // The taps of a tile in a patch, or in place where all its taps lie in the image; bytes between groups.
  std::vector<DotTap> taps;
  int64_t words, group_stride;
  bool whole_rows;  // a kernel row is one tap of kw times the words

  // In place: an image's pixels in the order in which tiles take them. Those of kInside have all their taps in the
  // image; those of a stretch around it, each with a corner, lack the same ones. Before, inside and after are sections.
  static constexpr int kInside = 2;
  Stretch walk[5];
  int64_t fill_bytes;  // what taps in the padding read

  bool by_rows;  // a patch holds the lines of input under a tile; else the pixels of each tap, one after another
  int64_t patch_pixel, patch_line, patch_bytes;  // bytes of a pixel, pixels of one line (or tap), bytes of a patch

  int64_t scratch;  // bytes a task needs
};

// Folds rows and images into one long row where memory allows, and chooses the split for `threads`.
TilePlan plan_tiles(TileProblem& problem, int64_t threads);

// Operands: x, residual.
class TileDriver final : public Driver {
 public:
  TileDriver(const TileProblem& problem, int64_t threads);
  void bind(const uint8_t* const* in, uint8_t* out) override;
  void run(int64_t task, uint8_t* memory) const override;

 private:
  TileProblem problem_;
  Folded folded_;
  TilePlan plan_;
};

}  // namespace pykernels
