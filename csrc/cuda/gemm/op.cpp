// _cuda_int8_gemm: checks and runs one configuration of gemm.h. Private: pykernels/cuda/triton chooses the
// configuration.
#include <torch/csrc/stable/accelerator.h>

#include <climits>

#include "cuda/epilogue/arguments.h"
#include "cuda/gemm/gemm.h"

namespace pykernels {

namespace {

constexpr const char* kOp = "_cuda_int8_gemm";

const void* matrix(const char* name, const Tensor& t, const Tensor& a) {
  PK_CHECK(t.dim() == 2 && t.is_contiguous(), kOp, ": ", name, " must be contiguous with 2 dimensions, not of shape ",
           shape_of(t));
  return cuda_memory(kOp, name, t, a);
}

void int8_gemm(const Tensor& a, const Tensor& b, const Tensor& out, const Tensor& column_scale,
               const Tensor& column_sum, const Tensor& bias, const std::optional<Tensor>& row_scale,
               const std::optional<Tensor>& row_zero_point, double x_scale, int64_t x_zero_point, double out_scale,
               int64_t out_zero_point, const std::string& activation, const std::optional<Tensor>& residual,
               double residual_scale, int64_t residual_zero_point, const std::string& residual_order, int64_t config) {
  PK_CHECK(a.is_cuda(), kOp, ": a must be on a CUDA device");
  PK_CHECK(a.scalar_type() == ScalarType::Byte, kOp, ": a must be uint8, not ", dtype_name(a.scalar_type()));
  PK_CHECK(b.scalar_type() == ScalarType::Char, kOp, ": b must be int8, not ", dtype_name(b.scalar_type()));
  gemm::Problem p{};
  p.a = static_cast<const uint8_t*>(matrix("a", a, a));
  p.b = static_cast<const int8_t*>(matrix("b", b, a));
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  PK_CHECK(b.size(1) == k, kOp, ": b must have shape [n, ", k, "], not ", shape_of(b));
  PK_CHECK(k > 0 && k % 16 == 0, kOp, ": a must have a multiple of 16 columns, not ", k);
  PK_CHECK(m <= INT_MAX && n <= INT_MAX, kOp, ": a and b must have less than 2^31 rows");
  PK_CHECK(k <= INT_MAX / (255 * 128), kOp, ": a sums ", k, " products, which s32 may not hold");
  p.m = static_cast<int>(m), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.epilogue = checked_epilogue(
      kOp,
      {out, column_scale, column_sum, bias, row_scale, row_zero_point, x_scale, x_zero_point, out_scale, out_zero_point,
       activation, residual, residual_scale, residual_zero_point, residual_order},
      a, m, n);
  check_config(kOp, config, gemm::config_count());
  if (m == 0 || n == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(a.get_device());
  p.stream = enter_device(kOp, a.get_device());
  run_config(kOp, gemm::config(static_cast<int>(config)), p, out.scalar_type());
}

std::string configs() { return config_lines(gemm::config_count(), gemm::config); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def("_cuda_int8_gemm_configs() -> str");
  m.def(
      "_cuda_int8_gemm(Tensor a, Tensor b, Tensor(a!) out, Tensor column_scale, Tensor column_sum, Tensor bias, "
      "Tensor? row_scale, Tensor? row_zero_point, float x_scale, int x_zero_point, float out_scale, "
      "int out_zero_point, str activation, Tensor? residual, float residual_scale, int residual_zero_point, "
      "str residual_order, int config) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) { m.impl("_cuda_int8_gemm", TORCH_BOX(&int8_gemm)); }
STABLE_TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) {
  m.impl("_cuda_int8_gemm_configs", TORCH_BOX(&configs));
}

}  // namespace pykernels
