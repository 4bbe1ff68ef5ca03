// One warp group multiplies while the other finishes its tile.
#include "cuda/gemm/sm90.h"

namespace pykernels::gemm {

extern const Config sm90_128x128x128 =
    cuda::sm90_config<false, cute::Shape<cute::Int<128>, cute::Int<128>, cute::Int<128>>,
                      cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>,
                      cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized>(
        "sm90 128x128x128 pingpong");

}  // namespace pykernels::gemm
