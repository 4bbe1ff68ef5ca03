// The most operations a byte of shared memory: for problems of many tiles, which are gone through in bands of one or
// four.
#include "cuda/gemm/sm90.h"

namespace pykernels::gemm {

namespace {
template <int kSwizzle>
constexpr Config of(const char* name) {
  return cuda::sm90_config<false, cute::Shape<cute::Int<128>, cute::Int<256>, cute::Int<128>>,
                           cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>,
                           cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                           cutlass::epilogue::TmaWarpSpecializedCooperative, kSwizzle>(name);
}
}  // namespace

extern const Config sm90_128x256x128 = of<1>("sm90 128x256x128 cooperative");
extern const Config sm90_128x256x128_bands = of<4>("sm90 128x256x128 cooperative, bands of 4");

}  // namespace pykernels::gemm
