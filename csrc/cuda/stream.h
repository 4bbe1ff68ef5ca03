// The stream that torch would launch on, for a library that knows no CUDA build of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pykernels {

// torch's current stream of that device; throws where torch has no CUDA.
cudaStream_t current_stream(int32_t device);

}  // namespace pykernels
