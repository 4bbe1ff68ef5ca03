// Bytes as operands, once per isa: how the flags that say what they are become types.
#pragma once

#include "common/quantized.h"
#include "cpu/isa/loops.h"
#include "cpu/isa/requantize.h"

namespace pykernels::PYKERNELS_ISA_NS {

// f(const uint8_t*) or f(const int8_t*).
template <class F>
PK_INLINE void with_bytes(const void* q, bool s8, const F& f) {
  if (s8)
    f(static_cast<const int8_t*>(q));
  else
    f(static_cast<const uint8_t*>(q));
}
template <class F>
PK_INLINE void with_bytes(void* q, bool s8, const F& f) {
  if (s8)
    f(static_cast<int8_t*>(q));
  else
    f(static_cast<uint8_t*>(q));
}

// One operand as real vectors.
template <class Q>
struct Reader {
  const Q* data;
  f32 scale;
  i32 zero_point;
};
template <class Q>
PK_INLINE Reader<Q> reader(const Q* data, const QuantizedInput& q) {
  return {data, set1(q.scale), set1_i32(q.zero_point)};
}
template <class Q>
PK_INLINE f32 read(const Reader<Q>& r, int64_t i, int n) {
  return dequantize(load_i32(r.data + i, n), r.zero_point, r.scale);
}

}  // namespace pykernels::PYKERNELS_ISA_NS
