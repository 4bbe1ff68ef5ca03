// One warp group multiplies while the other finishes its tile.
#include "cuda/gemm/sm90.h"

namespace pykernels::gemm {

namespace {
template <int Band>
constexpr Config made(const char* name) {
  return cuda::sm90_config<false, cute::Shape<cute::Int<128>, cute::Int<128>, cute::Int<128>>,
                           cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>,
                           cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized,
                           Band>(name);
}
}  // namespace

extern const Config sm90_128x128x128 = made<1>("sm90 128x128x128 pingpong");
extern const Config sm90_128x128x128_bands = made<8>("sm90 128x128x128 pingpong in bands");

}  // namespace pykernels::gemm
