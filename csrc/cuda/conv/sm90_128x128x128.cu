// One warp group multiplies while the other finishes its tile.
#include "cuda/conv/sm90.h"

namespace pykernels::conv {

extern const Config sm90_128x128x128 =
    cuda::sm90_conv_config<cute::Shape<cute::Int<128>, cute::Int<128>, cute::Int<128>>,
                           cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>,
                           cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized>(
        "sm90 128x128x128 pingpong");

}  // namespace pykernels::conv
