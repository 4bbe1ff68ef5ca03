// Runs dot tiles and epilogues over a whole GEMM or convolution. Torch-free: the op splits [0, tasks) over threads.
#pragma once

#include "cpu/tile/kernels.h"

namespace pykernels {

// Output pixels are images x rows x columns; pixel (i, y, x) reads its words at
//   a + i * image_stride + y * row_stride + x * lda + tap_offset[t] + group * group_stride   (bytes)
// and is row (i * rows + y) * columns + x of the output. A GEMM is one image of one row.
struct TileProblem {
  const DotKernel* dot;
  void (*epilogue)(const Epilogue&, const EpilogueArgs&);
  const uint8_t* a;
  int64_t image_stride, row_stride, lda, group_stride;
  int64_t images, rows, columns;
  const int64_t* tap_offset;
  int64_t taps, words;  // of one tap
  const PackedView* weights;
  Epilogue e;
};

struct TilePlan {
  int64_t tiles_per_row, tiles, panels;  // panels of all groups
  int64_t tile_splits, panel_splits, tasks;
  int64_t block;  // tiles that reuse a panel group while it is in cache
};

// Folds rows and images into one long row where memory allows, and chooses the split for `threads`.
TilePlan plan_tiles(TileProblem& problem, int64_t threads);

void run_tiles(const TileProblem& problem, const TilePlan& plan, int64_t task);

}  // namespace pykernels
