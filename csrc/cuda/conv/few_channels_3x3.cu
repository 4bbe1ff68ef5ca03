// Four taps of each of two kernel rows are one product.
#include "cuda/conv/few_channels_sm80.h"

namespace pykernels::few_channels {

extern const Config sm80_3x3x32 = cuda::few_channels_config<3, 4, 4>("sm80 3x3 by 32");
extern const Config sm80_3x3x16 = cuda::few_channels_config<3, 2, 5>("sm80 3x3 by 16");

}  // namespace pykernels::few_channels
