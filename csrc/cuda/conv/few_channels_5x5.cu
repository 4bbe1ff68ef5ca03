// Eight taps of a kernel row are one product: one each of five rows.
#include "cuda/conv/few_channels_sm80.h"

namespace pykernels::few_channels {

extern const Config sm80_5x5x32 = cuda::few_channels_config<5, 4, 3>("sm80 5x5 by 32");
extern const Config sm80_5x5x16 = cuda::few_channels_config<5, 2, 4>("sm80 5x5 by 16");

}  // namespace pykernels::few_channels
