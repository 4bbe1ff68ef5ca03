// Winograd's F(m x m, 3x3) in fp32: of a patch of n x n pixels, n = m + 2, an output tile of m x m, by n * n products a
// channel instead of 9 * m * m. For each of the n * n positions
//   sum[o] = sum over c of V[c] * U[o][c],   V = B^T d B of the patch d,   U = G g G^T of the 3x3 weights g
// is a product of matrices, which dot tiles compute; the output is A^T sum A. B, G and A are Lavin and Gray's
// (arXiv:1509.09308), of the points 0, 1, -1 and, where m is 4, 2, -2.
#pragma once

#include "cpu/isa/isa.h"

namespace pykernels {

// V of one patch: position i of channel c to to[i * step + c].
struct WinogradInput {
  const float* const* pixel;  // [n * n], each `channels` floats, which is a multiple of 16
  int64_t channels;
  float* to;
  int64_t step;
};

// A^T sum A: from[i * step + j] is position i of column j, to[i * stride + j] output pixel i.
struct WinogradOutput {
  const float* from;
  int64_t step, columns;  // a multiple of 16
  float* to;
  int64_t stride;
};

struct WinogradTile {
  void (*input)(const WinogradInput&);
  void (*output)(const WinogradOutput&);
};

struct WinogradKernels {
  WinogradTile two, four;  // by m
};
PYKERNELS_TABLE(WinogradKernels, winograd_kernels)

}  // namespace pykernels
