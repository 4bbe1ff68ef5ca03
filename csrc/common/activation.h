// The activations an epilogue can apply; what they compute stands in cpu/isa/math.h. Torch-free.
#pragma once

#include "common/lists.h"

namespace pykernels {

enum class Activation : int { PK_ACTIVATIONS(PK_NAME) };

// In the order of the enum.
inline constexpr const char* kActivationNames[] = {PK_ACTIVATIONS(PK_QUOTED)};

}  // namespace pykernels
