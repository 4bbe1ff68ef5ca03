// How real numbers are stored, where a kernel is told at run time. Torch-free.
#pragma once

#include <cstdint>

namespace pykernels {

enum class Real : int { fp32, bf16, fp16 };
inline int64_t real_bytes(Real type) { return type == Real::fp32 ? 4 : 2; }

}  // namespace pykernels
