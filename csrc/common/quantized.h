// Bytes that stand for real numbers: real = (byte - zero_point) * scale. Torch-free.
#pragma once

#include <cstdint>

namespace pykernels {

struct Quantization {
  bool s8;  // signed bytes, else unsigned
  float scale;
  int32_t zero_point;
};

struct QuantizedInput {
  const void* data;
  bool s8;
  float scale;
  int32_t zero_point;
};

// Where bytes go: byte = clamp(rint(real * inverse_scale) + zero_point), inverse_scale = 1/scale rounded to fp32.
struct QuantizedOutput {
  void* data;
  bool s8;
  float inverse_scale;
  int32_t zero_point;
};

inline QuantizedInput input_of(const Quantization& q, const uint8_t* data) {
  return {data, q.s8, q.scale, q.zero_point};
}
inline QuantizedOutput output_of(const Quantization& q, uint8_t* data) {
  return {data, q.s8, 1.0f / q.scale, q.zero_point};
}

}  // namespace pykernels
