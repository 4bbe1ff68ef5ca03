// What the ops of the CUDA library share: checks that name the argument, and the epilogue's part of a problem.
#pragma once

#include <cuda_runtime_api.h>

#include "common/stable.h"
#include "cuda/epilogue/epilogue.h"

namespace pykernels {

// The arguments of a private op that its epilogue takes, in the schema's order; row_* are per row of the product.
struct EpilogueArguments {
  const Tensor& out;
  const Tensor& column_scale;
  const Tensor& column_sum;
  const Tensor& bias;
  const std::optional<Tensor>& row_scale;
  const std::optional<Tensor>& row_zero_point;
  double x_scale;
  int64_t x_zero_point;
  double out_scale;
  int64_t out_zero_point;
  const std::string& activation;
  const std::optional<Tensor>& residual;
  double residual_scale;
  int64_t residual_zero_point;
  const std::string& residual_order;
};

// The memory of a tensor on x's device that begins at a multiple of 16 bytes.
const void* cuda_memory(const char* op, const char* name, const Tensor& t, const Tensor& x);

// Checked for a product of m rows by n columns. out and residual are m * n elements, row after row, whatever their
// shape: for a convolution they are images.
epilogue::Arguments checked_epilogue(const char* op, const EpilogueArguments& given, const Tensor& x, int64_t m,
                                     int64_t n);

// Sets the device of this library's CUDA runtime, which is not torch's, and returns torch's current stream there. The
// caller holds a DeviceGuard.
cudaStream_t enter_device(const char* op, int32_t device);

// Runs one of a family's configurations for the width of out's dtype.
template <class Config, class Problem>
void run_config(const char* op, const Config& config, const Problem& p, ScalarType out) {
  const int64_t width = element_size(out);
  const char* complaint = config.run[width == 1 ? 0 : width == 2 ? 1 : 2](p);
  PK_CHECK(!complaint, op, ": '", config.name, "' did not run: ", complaint);
}

// A family's configurations, one line each: name and the compute capability it needs, times 10.
template <class Config>
std::string config_lines(int count, const Config& (*config)(int)) {
  std::string lines;
  for (int i = 0; i < count; ++i) lines += std::string(config(i).name) + "," + std::to_string(config(i).arch) + "\n";
  return lines;
}

inline void check_config(const char* op, int64_t config, int count) {
  PK_CHECK(config >= 0 && config < count, op, ": config must lie in [0, ", count, "), not ", config);
}

}  // namespace pykernels
