// The int8 GEMM of the CUDA library, as its kernels and its op see it. Torch-free, and free of CUTLASS.
//
//   acc = sum over k of a[m][k] * b[n][k]                             exact, s32
//   f   = float(acc - row_zero[m] * column_sum[n]) * (row_scale[m] * column_scale[n]) + bias[n]
//   f   = f + residual[m][n], activation(f), or the two the other way round
//   d   = clamp(rint(f * inverse) + zero_point, low, high) for 8 bits, else f rounded to nearest
//
// in fp32 and without FMA, as everywhere (docs/architecture.md). With column_sum[n] = sum over k of b[n][k] that is the
// product of real numbers. a is u8 [m][k] and b s8 [n][k], k contiguous; d and residual are [m][n], n contiguous, of
// one dtype, but for bytes, either of which may be u8 or s8.
//
// The caller guarantees: 16-byte aligned pointers, k a multiple of 16, n a multiple of 16 bytes of d and of 4.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/activation.h"

namespace pykernels::gemm {

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
};

struct Problem {
  int m, n, k;
  const uint8_t* a;
  const int8_t* b;
  void* d;
  const void* residual;
  const float* row_scale;  // or null: row_scale_value for all
  const int* row_zero;     // or null: row_zero_value for all
  float row_scale_value;
  int row_zero_value;
  const float* column_scale;
  const int* column_sum;
  const float* bias;  // or null
  Finish finish;
  cudaStream_t stream;
};

// Runs on problem.stream without synchronising; null, or why it did not run (a static string).
using Run = const char* (*)(const Problem&);

struct Config {
  const char* name;  // architecture, tile m x n x k in the problem's own terms, how
  int arch;          // the compute capability it needs: 80 runs from 8.0 on, 90 on 9.0 alone
  Run run[3];        // for 1, 2 and 4 bytes of output
};

// Every configuration, whatever the machine.
int config_count();
const Config& config(int index);

}  // namespace pykernels::gemm
