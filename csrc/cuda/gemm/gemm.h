// The int8 GEMM of the CUDA library, as its kernels and its op see it. Torch-free, and free of CUTLASS.
//
//   acc = sum over k of a[m][k] * b[n][k]    exact, s32, and then the epilogue of epilogue.h
//
// a is u8 [m][k] and b s8 [n][k], k contiguous.
//
// The caller guarantees: 16-byte aligned pointers, k a multiple of 16.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/epilogue/epilogue.h"

namespace pykernels::gemm {

struct Problem {
  int m, n, k;
  const uint8_t* a;
  const int8_t* b;
  epilogue::Arguments epilogue;
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
