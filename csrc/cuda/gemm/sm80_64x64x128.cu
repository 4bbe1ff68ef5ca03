// Many tiles, for small problems.
#include "cuda/gemm/sm80.h"

namespace pykernels::gemm {

extern const Config sm80_64x64x128 =
    cuda::sm80_config<cutlass::gemm::GemmShape<64, 64, 128>, cutlass::gemm::GemmShape<32, 32, 128>, 3>(
        "sm80 64x64x128");

}  // namespace pykernels::gemm
