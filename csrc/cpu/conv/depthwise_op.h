// Runs a depthwise convolution on the host framework's threads.
#pragma once

#include "cpu/conv/input.h"
#include "cpu/tile/kernels.h"

namespace pykernels {

// Padding is `zero_point` (as a byte for 8 bit, where int8 is shifted to uint8; zero for floats).
void run_depthwise(const ConvShape& shape, const Tensor& x, uint8_t zero_point, const PackedView& weights,
                   const Epilogue& e);

}  // namespace pykernels
