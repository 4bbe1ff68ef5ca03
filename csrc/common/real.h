// How real numbers are stored, where a kernel is told at run time. Torch-free.
#pragma once

#include <cstdint>

#include "common/lists.h"

namespace pykernels {

enum class Real : int { PK_REALS(PK_NAME) };
inline int64_t real_bytes(Real type) { return type == Real::fp32 ? 4 : 2; }

}  // namespace pykernels
