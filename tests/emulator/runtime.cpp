// Stands in for the CUDA runtime and for what CUTLASS asks of the driver: the functions that the objects of the CUDA
// library import. A launch is over when it returns; global memory is the host's.
#include "emulator/runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "emulator/machine.h"
#include "emulator/tensor_map.h"

namespace emulator {

namespace {

struct Function {
  std::string name;
  int dynamic_shared = 48 << 10;  // at most
};

struct Device {
  std::mutex mutex;
  int capability = 90, multiprocessors = 4;
  std::unordered_map<const void*, Function> functions;  // by the host's stub
  std::vector<std::unique_ptr<Module>> modules;
  std::unordered_map<std::string, std::pair<const Module*, std::unique_ptr<Program>>> programs;

  int shared_limit() const { return capability == 90 ? 227 << 10 : 163 << 10; }
};
Device& device() {
  static Device* const all = new Device;  // the objects register themselves before anything else is made
  return *all;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string message;

cudaError_t refuse(cudaError_t code, const std::string& why) {
  if (message.empty()) message = why;
  return last_error = code;
}

const std::pair<const Module*, std::unique_ptr<Program>>& program(const std::string& name) {
  Device& d = device();
  const std::lock_guard lock(d.mutex);
  auto& found = d.programs[name];
  if (!found.second) {
    for (const auto& module : d.modules)
      if (module->kernels.contains(name)) {
        const Kernel& kernel = module->kernel(name);
        found = {module.get(), std::make_unique<Program>(Assembler(*module, kernel).assemble())};
      }
    if (!found.second) throw Error("no PTX of kernel " + name);
  }
  return found;
}

void start(const std::string& name, dim3 grid, dim3 block, dim3 cluster, void** arguments, size_t shared) {
  const auto& [module, assembled] = program(name);
  const Kernel& kernel = *assembled->kernel;
  if (module->target == "sm_90a" && device().capability != 90) throw Error("a kernel of sm_90a on another device");
  if (static_cast<int>(shared + kernel.shared_bytes) > device().shared_limit())
    throw Error("more shared memory than a block may have");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !block.x ||
      block.x * block.y * block.z > 1024)
    throw Error("an illegal launch");
  Launch l;
  l.program = assembled.get();
  l.grid = {grid.x, grid.y, grid.z};
  l.threads = {block.x, block.y, block.z};
  l.cluster = {cluster.x, cluster.y, cluster.z};
  l.dynamic_shared = static_cast<uint32_t>(shared);
  struct alignas(128) Line {
    uint8_t bytes[128];
  };
  std::vector<Line> lines(kernel.parameter_bytes / 128 + 1);
  uint8_t* const parameters = lines[0].bytes;
  std::vector<Parameter> in_order;
  for (const auto& [unused, p] : kernel.parameters) in_order.push_back(p);
  std::sort(in_order.begin(), in_order.end(),
            [](const Parameter& a, const Parameter& b) { return a.offset < b.offset; });
  for (size_t k = 0; k < in_order.size(); ++k)
    std::memcpy(parameters + in_order[k].offset, arguments[k], in_order[k].size);
  l.parameters = parameters;
  try {
    run(l);
  } catch (const std::exception& error) {
    throw Error(name.substr(0, 80) + ": " + error.what());
  }
}

cudaError_t launch(const void* stub, dim3 grid, dim3 block, dim3 cluster, void** arguments, size_t shared) {
  const auto found = device().functions.find(stub);
  if (found == device().functions.end())
    return refuse(cudaErrorInvalidDeviceFunction, "a kernel that is not registered");
  const Function& f = found->second;
  if (static_cast<int>(shared) > f.dynamic_shared)
    return refuse(cudaErrorInvalidValue, "more dynamic shared memory than the kernel was allowed");
  try {
    start(f.name, grid, block, cluster, arguments, shared);
  } catch (const std::exception& error) {
    return refuse(cudaErrorLaunchFailure, error.what());
  }
  return cudaSuccess;
}

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned k = 0; k < config.numAttrs; ++k)
    if (config.attrs[k].id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = config.attrs[k].val.clusterDim;
      return dim3(cluster.x, cluster.y, cluster.z);
    }
  return dim3(1, 1, 1);
}

CUresult encode(CUtensorMap* out, TensorMap m, CUtensorMapDataType type, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
  static constexpr uint8_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (type < 0 || static_cast<size_t>(type) >= sizeof kBytes) return CUDA_ERROR_INVALID_VALUE;
  m.magic = TensorMap::kMagic;
  m.element = kBytes[type];
  m.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE  ? 0
              : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
              : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                                                     : 128;
  bool good = reinterpret_cast<uintptr_t>(out) % 64 == 0 && m.address % 16 == 0 &&
              interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
              swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && m.rank >= 1 && m.rank <= 5;
  for (int dim = 0; good && dim < m.rank; ++dim) {
    good = sizes[dim] >= 1 && sizes[dim] <= uint64_t{1} << 32 && steps[dim] >= 1 && steps[dim] <= 8;
    if (dim) good &= strides[dim - 1] % 16 == 0 && strides[dim - 1] < uint64_t{1} << 40;
    m.size[dim] = static_cast<uint32_t>(std::min<uint64_t>(sizes[dim], 0xffffffff));
    m.stride[dim] = dim ? strides[dim - 1] : m.element;
    m.step[dim] = static_cast<uint8_t>(steps[dim]);
  }
  const int row = m.box[0] * m.element;
  good = good && row % 16 == 0 && row && (!m.swizzle || row <= m.swizzle);
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &m, sizeof m);
  return CUDA_SUCCESS;
}

CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  TensorMap m{};
  m.rank = static_cast<uint8_t>(std::min(rank, 6u));
  m.address = reinterpret_cast<uint64_t>(address);
  for (uint32_t dim = 0; dim < rank && dim < 5; ++dim) {
    if (box[dim] < 1 || box[dim] > 256) return CUDA_ERROR_INVALID_VALUE;
    m.box[dim] = static_cast<uint16_t>(box[dim]);
  }
  return encode(out, m, type, sizes, strides, steps, interleave, swizzle, fill);
}

CUresult encode_im2col(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower, const int* upper,
                       cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps,
                       CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill fill) {
  if (rank < 3 || rank > 5 || channels < 1 || channels > 256 || pixels < 1 || pixels > 1024)
    return CUDA_ERROR_INVALID_VALUE;
  TensorMap m{};
  m.rank = static_cast<uint8_t>(rank);
  m.im2col = 1;
  m.address = reinterpret_cast<uint64_t>(address);
  m.box[0] = static_cast<uint16_t>(channels), m.box[1] = static_cast<uint16_t>(pixels);
  const int limit = rank == 3 ? 1 << 15 : rank == 4 ? 1 << 7 : 1 << 4;
  for (uint32_t d = 0; d < rank - 2; ++d) {
    if (lower[d] < -limit || lower[d] >= limit || upper[d] < -limit || upper[d] >= limit)
      return CUDA_ERROR_INVALID_VALUE;
    m.lower[d] = static_cast<int16_t>(lower[d]), m.upper[d] = static_cast<int16_t>(upper[d]);
  }
  return encode(out, m, type, sizes, strides, steps, interleave, swizzle, fill);
}

struct Call {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Call> calls;

}  // namespace

void load_module(std::string text) {
  auto module = std::make_unique<Module>(std::move(text));
  Device& d = device();
  const std::lock_guard lock(d.mutex);
  d.modules.push_back(std::move(module));
}

void unload_modules() {
  Device& d = device();
  const std::lock_guard lock(d.mutex);
  d.programs.clear();
  d.modules.clear();
}

void launch_by_name(const std::string& name, const uint32_t* sizes, uint32_t shared, void** arguments) {
  start(name, dim3(sizes[0], sizes[1], sizes[2]), dim3(sizes[3], sizes[4], sizes[5]),
        dim3(sizes[6], sizes[7], sizes[8]), arguments, shared);
}

void set_device(int capability, int multiprocessors) {
  device().capability = capability;
  device().multiprocessors = multiprocessors;
}

std::string take_error() {
  last_error = cudaSuccess;
  return std::exchange(message, {});
}

}  // namespace emulator

using emulator::device;

// ---- registration and launches, as nvcc's host code calls them
// --------------------------------------------------------
extern "C" {

void** __cudaRegisterFatBinary(void* fatbin) { return static_cast<void**>(fatbin); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  device().functions[stub].name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  emulator::calls.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const emulator::Call call = emulator::calls.back();
  emulator::calls.pop_back();
  *grid = call.grid, *block = call.block, *shared = call.shared;
  *static_cast<cudaStream_t*>(stream) = call.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return emulator::launch(kernel, grid, block, dim3(1, 1, 1), arguments, shared);
}

// ---- the runtime
// ------------------------------------------------------------------------------------------------------
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return emulator::launch(stub, grid, block, dim3(1, 1, 1), arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  return emulator::launch(stub, config->gridDim, config->blockDim, emulator::cluster_of(*config), arguments,
                          config->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const auto found = device().functions.find(stub);
  if (found == device().functions.end())
    return emulator::refuse(cudaErrorInvalidDeviceFunction, "a kernel that is not registered");
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > device().shared_limit())
      return emulator::refuse(cudaErrorInvalidValue, "more shared memory than a block may have");
    found->second.dynamic_shared = std::max(found->second.dynamic_shared, value);
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* id) {
  *id = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device().multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device().capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device().capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device().shared_limit(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device().shared_limit() + 1024; break;
    default: return emulator::refuse(cudaErrorInvalidValue, "device attribute " + std::to_string(attribute));
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const dim3 cluster = emulator::cluster_of(*config);
  *clusters = device().multiprocessors / static_cast<int>(cluster.x * cluster.y * cluster.z);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return emulator::last_error; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated device"; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = !std::strcmp(name, "cuTensorMapEncodeTiled")    ? reinterpret_cast<void*>(emulator::encode_tiled)
              : !std::strcmp(name, "cuTensorMapEncodeIm2col") ? reinterpret_cast<void*>(emulator::encode_im2col)
                                                              : nullptr;
  *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
