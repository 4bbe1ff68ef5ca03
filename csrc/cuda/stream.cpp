#include "cuda/stream.h"

#include <dlfcn.h>

#include "common/stable.h"

namespace pykernels {

namespace {
using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// A C shim of libtorch_cuda, which a CUDA build of torch has loaded already. It is looked up, not linked, so that one
// library serves every torch; the shims of libtorch_cpu give no native stream before torch 2.13.
GetStream look_up() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch_cuda ? reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
}
}  // namespace

cudaStream_t current_stream(int32_t device) {
  static const GetStream get_stream = look_up();
  PK_CHECK(get_stream,
           "this torch has no CUDA: libtorch_cuda.so with aoti_torch_get_current_cuda_stream is not loaded");
  void* stream = nullptr;
  PK_CHECK(get_stream(device, &stream) == AOTI_TORCH_SUCCESS, "torch has no current CUDA stream of device ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace pykernels
