// Runs dot tiles and epilogues over a whole GEMM or convolution. Torch-free: the op splits [0, tasks) over threads.
#pragma once

#include <vector>

#include "cpu/tile/kernels.h"

namespace pykernels {

// A convolution over channels-last pixels of whole words, all strides in bytes:
//   input pixel (i, y, x) stands at x + i * image_stride + y * row_stride + x * pixel, its groups group_stride apart;
//   outside of height x width it is `fill` (of every byte, after the flip);
//   output pixel (i, y, x), row (i * rows + y) * columns + x of out, reads input pixels
//   (i, y * sh - top + ky * dh, x * sw - left + kx * dw).
// A GEMM is one image of one row, with a 1x1 kernel.
struct TileProblem {
  const DotKernel* dot;
  void (*epilogue)(const Epilogue&, const EpilogueArgs&);
  const uint8_t* x;
  int64_t image_stride, row_stride, pixel, group_stride;
  int64_t height, width;
  int64_t kh = 1, kw = 1, sh = 1, sw = 1, dh = 1, dw = 1, top = 0, left = 0;
  uint8_t fill = 0, flip = 0;
  int64_t images = 1, rows = 1, columns;
  const PackedView* weights;
  Epilogue e;
};

// The words of A under one tile, in place or in a patch: offsets of the taps from the tile's first pixel, bytes between
// the pixels of its rows and between groups.
struct TileView {
  std::vector<int64_t> tap_offset;
  int64_t lda, group_stride;
};

struct TilePlan {
  int64_t tiles_per_row, tiles, panels;  // panels of all groups
  int64_t tile_splits, panel_splits, tasks;
  int64_t block;        // tiles that reuse a panel group while it is in cache
  int64_t taps, words;  // of one tap, as the dot kernels see them
  TileView direct, patch;
  bool by_rows;    // a patch holds the lines of input under a tile; else the pixels of each tap, one after another
  bool stage_all;  // every tile is read from a patch; else those that touch the padding
  int64_t patch_line, patch_bytes;  // pixels of one line (or tap) of a patch; bytes of a patch
  int64_t scratch;                  // bytes a task needs
};

// Folds rows and images into one long row where memory allows, and chooses the split for `threads`.
TilePlan plan_tiles(TileProblem& problem, int64_t threads);

// `scratch` is the task's own, plan.scratch bytes, 64-byte aligned.
void run_tiles(const TileProblem& problem, const TilePlan& plan, int64_t task, uint8_t* scratch);

}  // namespace pykernels
