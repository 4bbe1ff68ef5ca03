// Two blocks a multiprocessor, one of them finishing while the other multiplies.
#include "cuda/gemm/sm80.h"

namespace pykernels::gemm {

extern const Config sm80_128x128x64 =
    cuda::sm80_config<cutlass::gemm::GemmShape<128, 128, 64>, cutlass::gemm::GemmShape<64, 64, 64>, 4>(
        "sm80 128x128x64");

}  // namespace pykernels::gemm
