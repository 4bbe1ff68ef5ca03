// Large problems: the tile that asks for the fewest operands a multiplication. Bands read less memory where the
// operands are more than the L2 cache holds, clusters of 2x2 a quarter less of the cache; in those, outputs are bytes.
#include "cuda/gemm/sm90.h"

namespace pykernels::gemm {

namespace {
template <int Band, class Bytes>
constexpr Config made(const char* name) {
  return cuda::sm90_config<false, cute::Shape<cute::Int<128>, cute::Int<256>, cute::Int<128>>,
                           cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>,
                           cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                           cutlass::epilogue::TmaWarpSpecializedCooperative, Band, Bytes>(name);
}
using TwoByOne = cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>;
using TwoByTwo = cute::Shape<cute::Int<2>, cute::Int<2>, cute::Int<1>>;
}  // namespace

extern const Config sm90_128x256x128 = made<1, TwoByOne>("sm90 128x256x128 cooperative");
extern const Config sm90_128x256x128_bands = made<8, TwoByOne>("sm90 128x256x128 cooperative in bands");
extern const Config sm90_128x256x128_2x2 = made<1, TwoByTwo>("sm90 128x256x128 cooperative 2x2");
extern const Config sm90_128x256x128_2x2_bands = made<8, TwoByTwo>("sm90 128x256x128 cooperative 2x2 in bands");

}  // namespace pykernels::gemm
