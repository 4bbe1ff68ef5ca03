// _cuda_int8_gemm: checks and runs one configuration of gemm.h. Private: pykernels/triton chooses the configuration.
#include <torch/csrc/stable/accelerator.h>

#include <climits>

#include "common/stable.h"
#include "cuda/gemm/gemm.h"
#include "cuda/stream.h"

namespace pykernels {

namespace {

using gemm::Problem;
using gemm::Residual;

constexpr const char* kOp = "_cuda_int8_gemm";

// A vector of one 4-byte number per row or column on a's device.
template <class T>
const T* vector(const char* name, const std::optional<Tensor>& t, const Tensor& a, int64_t size, ScalarType dtype) {
  if (!t) return nullptr;
  PK_CHECK(t->is_cuda() && t->get_device() == a.get_device(), kOp, ": ", name, " must be on the device of a");
  PK_CHECK(t->scalar_type() == dtype, kOp, ": ", name, " must be ", dtype_name(dtype), ", not ",
           dtype_name(t->scalar_type()));
  PK_CHECK(t->numel() == size && t->is_contiguous(), kOp, ": ", name, " must be contiguous with ", size,
           " elements, not of shape ", shape_of(*t));
  return static_cast<const T*>(t->const_data_ptr());
}

// The memory of a tensor on a's device that begins at a multiple of 16 bytes.
const void* memory(const char* name, const Tensor& t, const Tensor& a) {
  PK_CHECK(t.is_cuda() && t.get_device() == a.get_device(), kOp, ": ", name, " must be on the device of a");
  const void* p = t.const_data_ptr();
  PK_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0, kOp, ": ", name, " must begin at a multiple of 16 bytes");
  return p;
}

const void* matrix(const char* name, const Tensor& t, const Tensor& a) {
  PK_CHECK(t.dim() == 2 && t.is_contiguous(), kOp, ": ", name, " must be contiguous with 2 dimensions, not of shape ",
           shape_of(t));
  return memory(name, t, a);
}

// out and residual are m * n elements, row after row, whatever their shape: for a convolution they are images.
void int8_gemm(const Tensor& a, const Tensor& b, const Tensor& out, const Tensor& column_scale,
               const Tensor& column_sum, const Tensor& bias, const std::optional<Tensor>& row_scale,
               const std::optional<Tensor>& row_zero_point, double x_scale, int64_t x_zero_point, double out_scale,
               int64_t out_zero_point, const std::string& activation, const std::optional<Tensor>& residual,
               double residual_scale, int64_t residual_zero_point, const std::string& residual_order, int64_t config) {
  PK_CHECK(a.is_cuda(), kOp, ": a must be on a CUDA device");
  PK_CHECK(a.scalar_type() == ScalarType::Byte, kOp, ": a must be uint8, not ", dtype_name(a.scalar_type()));
  PK_CHECK(b.scalar_type() == ScalarType::Char, kOp, ": b must be int8, not ", dtype_name(b.scalar_type()));
  Problem p{};
  p.a = static_cast<const uint8_t*>(matrix("a", a, a));
  p.b = static_cast<const int8_t*>(matrix("b", b, a));
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  PK_CHECK(b.size(1) == k, kOp, ": b must have shape [n, ", k, "], not ", shape_of(b));
  PK_CHECK(k > 0 && k % 16 == 0, kOp, ": a must have a multiple of 16 columns, not ", k);
  PK_CHECK(m <= INT_MAX && n <= INT_MAX, kOp, ": a and b must have less than 2^31 rows");
  PK_CHECK(k <= INT_MAX / (255 * 128), kOp, ": a sums ", k, " products, which s32 may not hold");
  const ScalarType dtype = out.scalar_type();
  const bool byte = is_byte(dtype);
  PK_CHECK(byte || is_real(dtype), kOp, ": out must be uint8, int8, float32, bfloat16 or float16, not ",
           dtype_name(dtype));
  const int64_t width = element_size(dtype);
  PK_CHECK(n * width % 16 == 0 && n % 4 == 0, kOp, ": b must have rows for whole 16 bytes of ", dtype_name(dtype),
           ", not ", n);
  PK_CHECK(out.numel() == m * n, kOp, ": out must have ", m, " x ", n, " elements, not shape ", shape_of(out));
  p.d = const_cast<void*>(memory("out", out, a));
  p.m = static_cast<int>(m), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.column_scale = vector<float>("column_scale", column_scale, a, n, ScalarType::Float);
  p.column_sum = vector<int>("column_sum", column_sum, a, n, ScalarType::Int);
  p.bias = vector<float>("bias", bias, a, n, ScalarType::Float);
  for (const Tensor* t : {&column_scale, &column_sum, &bias}) memory("column_scale, column_sum and bias each", *t, a);
  p.row_scale = vector<float>("row_scale", row_scale, a, m, ScalarType::Float);
  p.row_zero = vector<int>("row_zero_point", row_zero_point, a, m, ScalarType::Int);
  if (!p.row_scale) check_scale(kOp, "x_scale", x_scale);
  if (!p.row_zero) check_zero_point(kOp, "x_zero_point", x_zero_point, ScalarType::Byte);
  p.row_scale_value = static_cast<float>(x_scale);
  p.row_zero_value = static_cast<int>(x_zero_point);
  p.finish.activation = activation_by_name(kOp, activation);
  if (byte) {
    check_scale(kOp, "out_scale", out_scale);
    check_zero_point(kOp, "out_zero_point", out_zero_point, dtype);
    p.finish.inverse = 1.0f / static_cast<float>(out_scale);
    p.finish.zero_point = static_cast<int>(out_zero_point);
    p.finish.low = dtype == ScalarType::Byte ? 0 : -128;
    p.finish.high = p.finish.low + 255;
  }
  p.finish.bfloat16 = dtype == ScalarType::BFloat16;
  PK_CHECK(residual_order == "before" || residual_order == "after", kOp,
           ": residual_order must be before or after, not '", residual_order, "'");
  if (residual) {
    const ScalarType t = residual->scalar_type();
    PK_CHECK(byte ? is_byte(t) : t == dtype, kOp, ": residual must be ", byte ? "uint8 or int8" : dtype_name(dtype),
             " like the output, not ", dtype_name(t));
    PK_CHECK(residual->numel() == m * n, kOp, ": residual must have ", m, " x ", n, " elements, not shape ",
             shape_of(*residual));
    p.residual = memory("residual", *residual, a);
    p.finish.residual = residual_order == "before" ? Residual::before : Residual::after;
    if (byte) {
      check_scale(kOp, "residual_scale", residual_scale);
      check_zero_point(kOp, "residual_zero_point", residual_zero_point, t);
      p.finish.residual_scale = static_cast<float>(residual_scale);
      p.finish.residual_zero_point = static_cast<int>(residual_zero_point);
      p.finish.residual_low = t == ScalarType::Byte ? 0 : -128;
    }
  }
  PK_CHECK(config >= 0 && config < gemm::config_count(), kOp, ": config must lie in [0, ", gemm::config_count(),
           "), not ", config);
  if (m == 0 || n == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(a.get_device());
  PK_CHECK(cudaSetDevice(a.get_device()) == cudaSuccess, kOp, ": the CUDA runtime of this library has no device ",
           a.get_device(), ": its driver may be older than the library");  // the guard set that of torch's runtime
  p.stream = current_stream(a.get_device());
  const gemm::Config& chosen = gemm::config(static_cast<int>(config));
  const char* complaint = chosen.run[width == 1 ? 0 : width == 2 ? 1 : 2](p);
  PK_CHECK(!complaint, kOp, ": '", chosen.name, "' did not run: ", complaint);
}

// One line a configuration: its name, the compute capability it needs times 10.
std::string configs() {
  std::string lines;
  for (int i = 0; i < gemm::config_count(); ++i)
    lines += std::string(gemm::config(i).name) + "," + std::to_string(gemm::config(i).arch) + "\n";
  return lines;
}

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
