// Twice the tiles, for problems that would leave multiprocessors idle.
#include "cuda/gemm/sm90.h"

namespace pykernels::gemm {

extern const Config sm90_64x128x128 =
    cuda::sm90_config<false, cute::Shape<cute::Int<64>, cute::Int<128>, cute::Int<128>>,
                      cute::Shape<cute::Int<1>, cute::Int<1>, cute::Int<1>>,
                      cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized>(
        "sm90 64x128x128 pingpong");

}  // namespace pykernels::gemm
