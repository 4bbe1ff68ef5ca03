// The most operations a byte of shared memory: for problems of many tiles.
#include "cuda/gemm/sm90.h"

namespace pykernels::gemm {

extern const Config sm90_128x256x128 =
    cuda::sm90_config<false, cute::Shape<cute::Int<128>, cute::Int<256>, cute::Int<128>>,
                      cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>,
                      cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                      cutlass::epilogue::TmaWarpSpecializedCooperative>("sm90 128x256x128 cooperative");

}  // namespace pykernels::gemm
