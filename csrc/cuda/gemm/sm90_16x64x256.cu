// The smallest: a few rows, all weights read once.
#include "cuda/gemm/sm90.h"

namespace pykernels::gemm {

extern const Config sm90_16x64x256 =
    cuda::sm90_config<true, cute::Shape<cute::Int<64>, cute::Int<16>, cute::Int<256>>,
                      cute::Shape<cute::Int<1>, cute::Int<1>, cute::Int<1>>, cutlass::gemm::KernelTmaWarpSpecialized,
                      cutlass::epilogue::TmaWarpSpecialized>("sm90 16x64x256 swapped");

}  // namespace pykernels::gemm
