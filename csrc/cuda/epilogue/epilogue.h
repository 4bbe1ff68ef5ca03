// What becomes of the exact sums of the CUDA library's products, as kernels and ops see it. Torch-free, free of
// CUTLASS.
//
//   f = fma(float(acc - row_zero[m] * column_sum[n]), row_scale[m] * column_scale[n], bias[n])
//   f = f + residual[m][n], activation(f), or the two the other way round
//   d = clamp(rint(f * inverse) + zero_point, low, high) for 8 bits, else f rounded to nearest
//
// or, from bytes to bytes with all that is linear folded, what `scaled` of csrc/cpu/tile/kernels.h says; in fp32 and
// without other FMAs, as everywhere (docs/architecture.md). With column_sum[n] = sum over k of the weights that is
// the product of real numbers. d and residual are [m][n], n contiguous, of one dtype, but for bytes, either of which
// may be u8 or s8.
//
// The caller guarantees: 16-byte aligned pointers, n a multiple of 16 bytes of d and of 4.
#pragma once

#include "common/activation.h"

namespace pykernels::epilogue {

enum class Residual : int { none, before, after };  // where: relative to the activation

struct Finish {
  Activation activation;
  Residual residual;
  float inverse;   // 1 / out_scale
  int zero_point;  // of bytes: what follows, too
  int low, high;   // 0, 255 or -128, 127
  float residual_scale;
  int residual_zero_point;
  int residual_low;  // 0 or -128: the residual's bytes are u8 or s8
  bool bfloat16;     // of 16 bits: bfloat16, else float16

  // Of `scaled`, as csrc/cpu/tile/kernels.h names them; `zero` is the zero point of unsigned bytes.
  bool scaled;
  float zero, offset, residual_factor, least, most;
};

struct Arguments {
  void* d;
  const void* residual;    // or null
  const float* row_scale;  // or null: row_scale_value for all
  const int* row_zero;     // or null: row_zero_value for all
  float row_scale_value;
  int row_zero_value;
  const float* column_scale;
  const int* column_sum;
  const float* bias;
  Finish finish;
};

}  // namespace pykernels::epilogue
