// The most operations a byte of shared memory: for problems of many tiles.
#include "cuda/gemm/sm80.h"

namespace pykernels::gemm {

extern const Config sm80_128x256x64 =
    cuda::sm80_config<cutlass::gemm::GemmShape<128, 256, 64>, cutlass::gemm::GemmShape<64, 64, 64>, 3>(
        "sm80 128x256x64");

}  // namespace pykernels::gemm
