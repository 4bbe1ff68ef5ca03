// Eight taps of a kernel row are one product: one each of seven rows.
#include "cuda/conv/few_channels_sm80.h"

namespace pykernels::few_channels {

extern const Config sm80_7x7x32 = cuda::few_channels_config<7, 4, 3>("sm80 7x7 by 32");
extern const Config sm80_7x7x16 = cuda::few_channels_config<7, 2, 4>("sm80 7x7 by 16");

}  // namespace pykernels::few_channels
