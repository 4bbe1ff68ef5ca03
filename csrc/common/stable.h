// What the families' op.cpp share on top of the LibTorch Stable ABI: checks that name the argument, memory formats, and
// allocation. No kernel and no driver includes this.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/activation.h"
#include "common/check.h"
#include "common/quantized.h"
#include "common/real.h"
#include "common/strides.h"

namespace pykernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline bool is_byte(ScalarType t) { return t == ScalarType::Byte || t == ScalarType::Char; }
inline bool is_real(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}
inline Real real_of(ScalarType t) {
  return t == ScalarType::Float ? Real::fp32 : t == ScalarType::Half ? Real::fp16 : Real::bf16;
}

inline int64_t element_size(ScalarType t) {
  switch (t) {
    case ScalarType::Byte:
    case ScalarType::Char: return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Long: return 8;
    default: return 4;
  }
}

inline std::string shape_of(const Tensor& t) { return shape_of(t.sizes().data(), t.dim()); }

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  PK_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

inline void check_real(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  PK_CHECK(is_real(t.scalar_type()), op, ": ", name, " must be " PK_REAL_WORDS ", not ", dtype_name(t.scalar_type()));
}

inline void check_byte(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  PK_CHECK(is_byte(t.scalar_type()), op, ": ", name, " must be uint8 or int8, not ", dtype_name(t.scalar_type()));
}

inline void check_byte_dtype(const char* op, const char* name, ScalarType t) {
  PK_CHECK(is_byte(t), op, ": ", name, " must be uint8 or int8, not ", dtype_name(t));
}

inline void check_real_dtype(const char* op, const char* name, ScalarType t) {
  PK_CHECK(is_real(t), op, ": ", name, " must be " PK_REAL_WORDS ", not ", dtype_name(t));
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  PK_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, not shape ", shape_of(t));
}

// A zero point must be a value of the quantized dtype.
inline void check_zero_point(const char* op, const char* name, int64_t zero_point, ScalarType t) {
  const int64_t low = t == ScalarType::Byte ? 0 : -128, high = low + 255;
  PK_CHECK(zero_point >= low && zero_point <= high, op, ": ", name, " must lie in [", low, ", ", high, "] for ",
           dtype_name(t), ", not ", zero_point);
}

// What has passed these checks.
inline Quantization quantization(ScalarType t, double scale, int64_t zero_point) {
  return {t == ScalarType::Char, static_cast<float>(scale), static_cast<int32_t>(zero_point)};
}

inline Activation activation_by_name(const char* op, const std::string& name) {
  int i = 0;
  for (const char* known : kActivationNames) {
    if (name == known) return static_cast<Activation>(i);
    ++i;
  }
  PK_CHECK(false, op, ": activation must be one of " PK_ACTIVATION_WORDS ", not '", name, "'");
}

inline bool is_channels_last(const Tensor& t) {
  return is_channels_last(t.sizes().data(), t.strides().data(), t.dim());
}

inline Tensor empty(const Ints& sizes, ScalarType dtype, bool channels_last = false) {
  return torch::stable::empty(
      sizes, dtype, std::nullopt, std::nullopt, std::nullopt,
      channels_last ? std::optional(torch::headeronly::MemoryFormat::ChannelsLast) : std::nullopt);
}

inline Tensor to_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor to_channels_last(const Tensor& t) {
  return is_channels_last(t) ? t : torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

// A float? / Tensor? argument of a schema arrives as std::optional.
template <class T>
const T* pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace pykernels
