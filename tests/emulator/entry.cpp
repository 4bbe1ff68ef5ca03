// What the tests call: the configurations of the CUDA library's ops on the emulated device, and modules of their
// own.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/conv/conv.h"
#include "cuda/conv/few_channels.h"
#include "cuda/gemm/gemm.h"
#include "emulator/machine.h"
#include "emulator/runtime.h"

#define ENTRY extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string answer;

// A complaint stays until the next one of the thread.
const char* complaint(const char* given) {
  answer = emulator::take_error();
  if (answer.empty() && given) answer = given;
  return answer.empty() ? nullptr : answer.c_str();
}

// What f throws, or null.
template <class F>
const char* complaint_of(F f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    answer = error.what();
    return answer.c_str();
  }
}

}  // namespace

ENTRY const char* emulator_load(const char* ptx) {
  return complaint_of([&] { emulator::load_module(ptx); });
}
ENTRY void emulator_unload() { emulator::unload_modules(); }
ENTRY const char* emulator_launch(const char* kernel, const uint32_t* sizes, uint32_t shared, void** arguments) {
  return complaint_of([&] { emulator::launch_by_name(kernel, sizes, shared, arguments); });
}

ENTRY void emulator_device(int capability, int multiprocessors) { emulator::set_device(capability, multiprocessors); }
ENTRY void emulator_kind(int kind) { emulator::kind_to_mistakes = kind != 0; }

// Global memory that this thread's kernels may use; without any, all of it.
ENTRY void emulator_allow(const void* memory, size_t bytes, int writable) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  emulator::allowed.push_back({begin, begin + bytes, writable != 0});
}
ENTRY void emulator_forbid() { emulator::allowed.clear(); }

// A descriptor of bytes as the driver makes it: tiles of `box` if there are no corners, else im2col with box =
// channels, pixels. Returns the driver's code.
ENTRY int emulator_tensor_map(CUtensorMap* out, int rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                              const uint32_t* box, const uint32_t* steps, const int* lower, const int* upper,
                              int swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaGetDriverEntryPointByVersion(lower ? "cuTensorMapEncodeIm2col" : "cuTensorMapEncodeTiled", &function, 12000, 0,
                                   &result);
  constexpr auto type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  constexpr auto apart = CU_TENSOR_MAP_INTERLEAVE_NONE;
  constexpr auto promotion = CU_TENSOR_MAP_L2_PROMOTION_NONE;
  constexpr auto zero = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  const auto how = static_cast<CUtensorMapSwizzle>(swizzle);
  if (lower)
    return reinterpret_cast<decltype(&cuTensorMapEncodeIm2col)>(function)(
        out, type, rank, address, sizes, strides, lower, upper, box[0], box[1], steps, apart, how, promotion, zero);
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(out, type, rank, address, sizes, strides, box,
                                                                       steps, apart, how, promotion, zero);
}

// A family's configurations. width: 0, 1, 2 for outputs of 1, 2, 4 bytes. Null, or what is wrong.
#define FAMILY(family)                                                                               \
  ENTRY int family##_configs() { return pykernels::family::config_count(); }                         \
  ENTRY const char* family##_name(int config) { return pykernels::family::config(config).name; }     \
  ENTRY int family##_arch(int config) { return pykernels::family::config(config).arch; }             \
  ENTRY const char* family##_run(int config, int width, const pykernels::family::Problem* problem) { \
    emulator::take_error();                                                                          \
    return complaint(pykernels::family::config(config).run[width](*problem));                        \
  }
FAMILY(gemm)
FAMILY(conv)
FAMILY(few_channels)
