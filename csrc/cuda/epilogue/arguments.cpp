#include "cuda/epilogue/arguments.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/stream.h"

namespace pykernels {

namespace {

// A vector of one 4-byte number per row or column on x's device.
template <class T>
const T* vector(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t size, ScalarType dtype) {
  PK_CHECK(t.is_cuda() && t.get_device() == x.get_device(), op, ": ", name, " must be on the device of the input");
  PK_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", not ",
           dtype_name(t.scalar_type()));
  PK_CHECK(t.numel() == size && t.is_contiguous(), op, ": ", name, " must be contiguous with ", size,
           " elements, not of shape ", shape_of(t));
  return static_cast<const T*>(cuda_memory(op, name, t, x));
}

// Folds what is linear, if all is; as Folded::fold of csrc/cpu/tile/driver.cpp, whose products by channel the kernels
// make themselves.
void fold(epilogue::Finish& f, bool byte, bool by_row, bool adds) {
  f.scaled = byte && !by_row && f.activation <= Activation::relu6 && f.residual != epilogue::Residual::after;
  if (!f.scaled) return;
  f.offset = f.zero = static_cast<float>(f.zero_point - f.low);
  f.least = f.activation == Activation::none ? 0.0f : f.zero;
  f.most = f.activation == Activation::relu6 ? std::min(std::rint(6.0f * f.inverse) + f.zero, 255.0f) : 255.0f;
  if (!adds) return;
  f.residual_factor = std::min(f.residual_scale * f.inverse, FLT_MAX);
  f.offset -= static_cast<float>(f.residual_zero_point - f.residual_low) * f.residual_factor;
}

}  // namespace

const void* cuda_memory(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  PK_CHECK(t.is_cuda() && t.get_device() == x.get_device(), op, ": ", name, " must be on the device of the input");
  const void* p = t.const_data_ptr();
  PK_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0, op, ": ", name, " must begin at a multiple of 16 bytes");
  return p;
}

epilogue::Arguments checked_epilogue(const char* op, const EpilogueArguments& given, const Tensor& x, int64_t m,
                                     int64_t n) {
  epilogue::Arguments e{};
  const ScalarType dtype = given.out.scalar_type();
  const bool byte = is_byte(dtype);
  PK_CHECK(byte || is_real(dtype), op, ": out must be uint8, int8, " PK_REAL_WORDS ", not ", dtype_name(dtype));
  PK_CHECK(n * element_size(dtype) % 16 == 0 && n % 4 == 0, op, ": out must have rows of whole 16 bytes of ",
           dtype_name(dtype), ", not of ", n, " elements");
  PK_CHECK(given.out.numel() == m * n, op, ": out must have ", m, " x ", n, " elements, not shape ",
           shape_of(given.out));
  e.d = const_cast<void*>(cuda_memory(op, "out", given.out, x));
  e.column_scale = vector<float>(op, "column_scale", given.column_scale, x, n, ScalarType::Float);
  e.column_sum = vector<int>(op, "column_sum", given.column_sum, x, n, ScalarType::Int);
  e.bias = vector<float>(op, "bias", given.bias, x, n, ScalarType::Float);
  if (given.row_scale)
    e.row_scale = vector<float>(op, "row_scale", *given.row_scale, x, m, ScalarType::Float);
  else
    check_scale(op, "x_scale", given.x_scale);
  if (given.row_zero_point)
    e.row_zero = vector<int>(op, "row_zero_point", *given.row_zero_point, x, m, ScalarType::Int);
  else
    check_zero_point(op, "x_zero_point", given.x_zero_point, ScalarType::Byte);
  e.row_scale_value = static_cast<float>(given.x_scale);
  e.row_zero_value = static_cast<int>(given.x_zero_point);
  e.finish.activation = activation_by_name(op, given.activation);
  if (byte) {
    check_scale(op, "out_scale", given.out_scale);
    check_zero_point(op, "out_zero_point", given.out_zero_point, dtype);
    e.finish.inverse = 1.0f / static_cast<float>(given.out_scale);
    e.finish.zero_point = static_cast<int>(given.out_zero_point);
    e.finish.low = dtype == ScalarType::Byte ? 0 : -128;
    e.finish.high = e.finish.low + 255;
  }
  e.finish.bfloat16 = dtype == ScalarType::BFloat16;
  PK_CHECK(given.residual_order == "before" || given.residual_order == "after", op,
           ": residual_order must be before or after, not '", given.residual_order, "'");
  if (!given.residual) {
    fold(e.finish, byte, given.row_scale.has_value(), false);
    return e;
  }
  const Tensor& residual = *given.residual;
  const ScalarType t = residual.scalar_type();
  PK_CHECK(byte ? is_byte(t) : t == dtype, op, ": residual must be ", byte ? "uint8 or int8" : dtype_name(dtype),
           " like the output, not ", dtype_name(t));
  PK_CHECK(residual.numel() == m * n, op, ": residual must have ", m, " x ", n, " elements, not shape ",
           shape_of(residual));
  e.residual = cuda_memory(op, "residual", residual, x);
  e.finish.residual = given.residual_order == "before" ? epilogue::Residual::before : epilogue::Residual::after;
  if (byte) {
    check_scale(op, "residual_scale", given.residual_scale);
    check_zero_point(op, "residual_zero_point", given.residual_zero_point, t);
    e.finish.residual_scale = static_cast<float>(given.residual_scale);
    e.finish.residual_zero_point = static_cast<int>(given.residual_zero_point);
    e.finish.residual_low = t == ScalarType::Byte ? 0 : -128;
  }
  fold(e.finish, byte, given.row_scale.has_value(), true);
  return e;
}

cudaStream_t enter_device(const char* op, int32_t device) {
  PK_CHECK(cudaSetDevice(device) == cudaSuccess, op, ": the CUDA runtime of this library has no device ", device,
           ": its driver may be older than the library");
  return current_stream(device);
}

}  // namespace pykernels
