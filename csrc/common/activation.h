// The activations an epilogue can apply; what they compute stands in cpu/isa/math.h. Torch-free.
#pragma once

namespace pykernels {

enum class Activation : int { none, relu, relu6, hardswish, hardsigmoid, silu, sigmoid, gelu, tanh };

// In the order of the enum.
inline constexpr const char* kActivationNames[] = {"none", "relu",    "relu6", "hardswish", "hardsigmoid",
                                                   "silu", "sigmoid", "gelu",  "tanh"};

}  // namespace pykernels
