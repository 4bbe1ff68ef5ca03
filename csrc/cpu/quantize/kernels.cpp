#include "cpu/quantize/kernels.h"

#include "cpu/isa/math.h"

namespace pykernels::PYKERNELS_ISA_NS {

const QuantizeKernels quantize_kernels = {0};

}  // namespace pykernels::PYKERNELS_ISA_NS
