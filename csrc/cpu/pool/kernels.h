#pragma once

#include "cpu/isa/isa.h"

namespace pykernels {

struct PoolKernels {
  int unused;
};
PYKERNELS_TABLE(PoolKernels, pool_kernels)

}  // namespace pykernels
