// 64 channels in and out: deeper or wider tiles would be half empty.
#include "cuda/conv/sm90.h"

namespace pykernels::conv {

extern const Config sm90_128x64x64 =
    cuda::sm90_conv_config<cute::Shape<cute::Int<128>, cute::Int<64>, cute::Int<64>>,
                           cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>,
                           cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized>(
        "sm90 128x64x64 pingpong");

}  // namespace pykernels::conv
