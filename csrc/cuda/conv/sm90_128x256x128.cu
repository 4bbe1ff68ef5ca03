// Two warp groups share a tile: the most products for each byte read.
#include "cuda/conv/sm90.h"

namespace pykernels::conv {

extern const Config sm90_128x256x128 = cuda::sm90_conv_config<
    cute::Shape<cute::Int<128>, cute::Int<256>, cute::Int<128>>, cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative>(
    "sm90 128x256x128 cooperative");

}  // namespace pykernels::conv
