#include "cpu/pool/kernels.h"

#include "cpu/isa/math.h"

namespace pykernels::PYKERNELS_ISA_NS {

const PoolKernels pool_kernels = {0};

}  // namespace pykernels::PYKERNELS_ISA_NS
