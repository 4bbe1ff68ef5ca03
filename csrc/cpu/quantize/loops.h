// The loops of the quantize family, once per isa: how a run of elements is cut into vectors, and how the flags that say
// what bytes are become types.
#pragma once

#include "cpu/isa/requantize.h"
#include "cpu/quantize/kernels.h"

namespace pykernels::PYKERNELS_ISA_NS {

#define PK_LAMBDA __attribute__((always_inline))

PK_INLINE int lanes_left(int64_t left) { return left < kLanes ? static_cast<int>(left) : kLanes; }

// q[i] = f(i, number of lanes) for runs of kLanes elements, the last one shorter.
template <class Q, class F>
PK_INLINE void each_byte(Q* q, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    store4(q + i, f(i, kLanes), f(i + kLanes, kLanes), f(i + 2 * kLanes, kLanes), f(i + 3 * kLanes, kLanes));
  for (; i + kLanes <= n; i += kLanes) store_i32(q + i, f(i, kLanes));
  if (i < n) store_i32(q + i, f(i, lanes_left(n - i)), lanes_left(n - i));
}

template <class X, class F>
PK_INLINE void each_real(X* x, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, f(i, kLanes));
  if (i < n) store(x + i, f(i, lanes_left(n - i)), lanes_left(n - i));
}

// f(const float*) or f(const bfloat16*); const uint8_t* or const int8_t*.
template <class F>
PK_INLINE void with_real(const void* x, bool bf16, const F& f) {
  if (bf16)
    f(static_cast<const bfloat16*>(x));
  else
    f(static_cast<const float*>(x));
}
template <class F>
PK_INLINE void with_real(void* x, bool bf16, const F& f) {
  if (bf16)
    f(static_cast<bfloat16*>(x));
  else
    f(static_cast<float*>(x));
}
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

// The kernels of arithmetic.cpp.
void add_kernel(const QuantizedInput& a, const QuantizedInput& b, Operand, int64_t rows, int64_t n, Activation,
                const QuantizedOutput& q);
void mul_kernel(const QuantizedInput& a, const QuantizedInput& b, Operand, int64_t rows, int64_t n,
                const QuantizedOutput& q);
void requantize_kernel(const QuantizedInput& a, int64_t n, const QuantizedOutput& q);
void lookup_kernel(const uint8_t* x, int64_t n, const uint8_t* table, uint8_t* y);

}  // namespace pykernels::PYKERNELS_ISA_NS
