// Few pixels: more tiles than multiprocessors.
#include "cuda/conv/sm90.h"

namespace pykernels::conv {

extern const Config sm90_64x128x128 =
    cuda::sm90_conv_config<cute::Shape<cute::Int<64>, cute::Int<128>, cute::Int<128>>,
                           cute::Shape<cute::Int<1>, cute::Int<1>, cute::Int<1>>,
                           cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized>(
        "sm90 64x128x128 pingpong");

}  // namespace pykernels::conv
