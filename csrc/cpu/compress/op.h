// Tensors as the drivers of this family take them: device, dtype and contiguity are checked here, sizes there.
#pragma once

#include "common/stable.h"
#include "cpu/compress/driver.h"

namespace pykernels {

using Optional = std::optional<Tensor>;

inline Elements elements_of(const char* op, const char* name, const Tensor& t) {
  check_real(op, name, t);
  PK_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  return {name, t.data_ptr(), real_of(t.scalar_type()), t.numel()};
}

inline void check_floats(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  PK_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, not ", dtype_name(t.scalar_type()));
  PK_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

// A residual or a velocity.
inline Residual state_of(const char* op, const char* name, const Optional& state) {
  if (!state) return {nullptr, 0};
  check_floats(op, name, *state);
  return {mutable_pointer<float>(*state), state->numel()};
}

inline std::optional<Weights> weights_of(const char* op, const Optional& weights) {
  if (!weights) return {};
  check_floats(op, "weights", *weights);
  PK_CHECK(weights->dim() == 1, op, ": weights must be flat, not of shape ", shape_of(*weights));
  return Weights{pointer<float>(*weights), weights->numel()};
}

inline Bytes bytes_of(const char* op, const char* name, const Tensor& t, int64_t dim) {
  check_cpu(op, name, t);
  PK_CHECK(t.scalar_type() == ScalarType::Byte, op, ": ", name, " must be uint8, not ", dtype_name(t.scalar_type()));
  check_dim(op, name, t, dim);
  PK_CHECK(t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1, op, ": the bytes of ", name, " must be contiguous");
  Bytes bytes{name, static_cast<uint8_t*>(t.data_ptr()), t.size(dim - 1)};
  if (dim == 2) bytes.rows = t.size(0), bytes.stride = t.stride(0);
  return bytes;
}

inline Segments segments_of(const char* op, const Tensor& segments) {
  check_cpu(op, "segments", segments);
  PK_CHECK(segments.scalar_type() == ScalarType::Long, op, ": segments must be int64, not ",
           dtype_name(segments.scalar_type()));
  PK_CHECK(segments.dim() == 2 && segments.size(1) == 3, op, ": segments must have shape [segments, 3], not ",
           shape_of(segments));
  PK_CHECK(segments.is_contiguous(), op, ": segments must be contiguous");
  return {pointer<int64_t>(segments), segments.size(0)};
}

}  // namespace pykernels
