#include "cuda/conv/conv.h"

namespace pykernels::conv {

extern const Config sm90_128x256x128;
extern const Config sm90_128x128x128;
extern const Config sm90_128x64x64;
extern const Config sm90_64x128x128;

namespace {
// Tables of pykernels/cuda/tuned name them: their order means nothing.
const Config* const kConfigs[] = {&sm90_128x256x128, &sm90_128x128x128, &sm90_128x64x64, &sm90_64x128x128};
}  // namespace

int config_count() { return static_cast<int>(sizeof(kConfigs) / sizeof(kConfigs[0])); }
const Config& config(int index) { return *kConfigs[index]; }

}  // namespace pykernels::conv
