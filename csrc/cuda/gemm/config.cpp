#include "cuda/gemm/gemm.h"

namespace pykernels::gemm {

extern const Config sm80_128x256x64;
extern const Config sm80_128x128x64;
extern const Config sm80_64x64x128;
extern const Config sm80_16x64x128;
extern const Config sm90_128x256x128;
extern const Config sm90_128x256x128_bands;
extern const Config sm90_128x256x128_2x2;
extern const Config sm90_128x256x128_2x2_bands;
extern const Config sm90_128x128x128;
extern const Config sm90_128x128x128_bands;
extern const Config sm90_64x128x128;
extern const Config sm90_64x64x256;
extern const Config sm90_16x64x256;

namespace {
// Tables of pykernels/cuda/tuned name them: their order means nothing.
const Config* const kConfigs[] = {
    &sm80_128x256x64,  &sm80_128x128x64,        &sm80_64x64x128,       &sm80_16x64x128,
    &sm90_128x256x128, &sm90_128x256x128_bands, &sm90_128x256x128_2x2, &sm90_128x256x128_2x2_bands,
    &sm90_128x128x128, &sm90_128x128x128_bands, &sm90_64x128x128,      &sm90_64x64x256,
    &sm90_16x64x256};
}  // namespace

int config_count() { return static_cast<int>(sizeof(kConfigs) / sizeof(kConfigs[0])); }
const Config& config(int index) { return *kConfigs[index]; }

}  // namespace pykernels::gemm
