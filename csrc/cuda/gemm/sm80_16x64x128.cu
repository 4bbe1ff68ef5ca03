// A few rows: the weights are most of the bytes, and are read once.
#include "cuda/gemm/sm80.h"

namespace pykernels::gemm {

extern const Config sm80_16x64x128 =
    cuda::sm80_config<cutlass::gemm::GemmShape<16, 64, 128>, cutlass::gemm::GemmShape<16, 32, 128>, 4>(
        "sm80 16x64x128");

}  // namespace pykernels::gemm
