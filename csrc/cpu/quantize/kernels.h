#pragma once

#include "cpu/isa/isa.h"

namespace pykernels {

struct QuantizeKernels {
  int unused;
};
PYKERNELS_TABLE(QuantizeKernels, quantize_kernels)

}  // namespace pykernels
