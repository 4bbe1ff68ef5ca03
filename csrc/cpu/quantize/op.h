// What op.cpp and arithmetic_op.cpp share: arguments of the ops as the kernels take them.
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "cpu/quantize/kernels.h"

namespace pykernels {

// Elements worth a thread of their own.
inline constexpr int64_t kGrain = int64_t{1} << 15;

// f(begin, end) over [0, n), `each` elements a step, on the host framework's threads.
template <class F>
void parallel_steps(int64_t n, int64_t each, const F& f) {
  if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, each)), f);
}

inline void check_byte_dtype(const char* op, const char* name, ScalarType t) {
  PK_CHECK(is_byte(t), op, ": ", name, " must be uint8 or int8, not ", dtype_name(t));
}

inline void check_real_dtype(const char* op, const char* name, ScalarType t) {
  PK_CHECK(is_real(t), op, ": ", name, " must be " PK_REAL_WORDS ", not ", dtype_name(t));
}

inline QuantizedInput quantized_input(const Tensor& t, double scale, int64_t zero_point) {
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Char, static_cast<float>(scale),
          static_cast<int32_t>(zero_point)};
}

inline QuantizedOutput quantized_output(const Tensor& t, double scale, int64_t zero_point) {
  return {t.mutable_data_ptr(), t.scalar_type() == ScalarType::Char, 1.0f / static_cast<float>(scale),
          static_cast<int32_t>(zero_point)};
}

// The same arguments from the i-th element on.
inline QuantizedInput from(QuantizedInput q, int64_t i) {
  q.data = static_cast<const uint8_t*>(q.data) + i;
  return q;
}
inline QuantizedOutput from(QuantizedOutput q, int64_t i) {
  q.data = static_cast<uint8_t*>(q.data) + i;
  return q;
}

}  // namespace pykernels
