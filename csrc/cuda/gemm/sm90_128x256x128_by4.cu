// As sm90_128x256x128, by clusters of 2 x 2: a multiprocessor reads 192 rows and columns of a tile from the L2 cache
// where those of 2 x 1 read 256, but there are fewer places for clusters of four.
#include "cuda/gemm/sm90.h"

namespace pykernels::gemm {

extern const Config sm90_128x256x128_by4 =
    cuda::sm90_config<false, cute::Shape<cute::Int<128>, cute::Int<256>, cute::Int<128>>,
                      cute::Shape<cute::Int<2>, cute::Int<2>, cute::Int<1>>,
                      cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                      cutlass::epilogue::TmaWarpSpecializedCooperative>(
        "sm90 128x256x128 cooperative, clusters of 2x2");

}  // namespace pykernels::gemm
