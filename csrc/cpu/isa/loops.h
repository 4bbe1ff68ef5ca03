// How a run of elements is cut into vectors, and how a dtype known at run time becomes a type; once per isa.
#pragma once

#include "common/real.h"
#include "cpu/isa/vec.h"

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

// f(const float*), f(const bfloat16*) or f(const float16*).
template <class F>
PK_INLINE auto with_real(const void* x, Real type, const F& f) {
  switch (type) {
    case Real::bf16: return f(static_cast<const bfloat16*>(x));
    case Real::fp16: return f(static_cast<const float16*>(x));
    default: return f(static_cast<const float*>(x));
  }
}
template <class F>
PK_INLINE auto with_real(void* x, Real type, const F& f) {
  switch (type) {
    case Real::bf16: return f(static_cast<bfloat16*>(x));
    case Real::fp16: return f(static_cast<float16*>(x));
    default: return f(static_cast<float*>(x));
  }
}

// Vectors of any type as real numbers; bytes are rounded half to even, and saturate.
PK_INLINE f32 read_real(const float* x, int n) { return load(x, n); }
PK_INLINE f32 read_real(const bfloat16* x, int n) { return load(x, n); }
PK_INLINE f32 read_real(const float16* x, int n) { return load(x, n); }
PK_INLINE f32 read_real(const uint8_t* x, int n) { return to_f32(load_i32(x, n)); }
PK_INLINE f32 read_real(const int8_t* x, int n) { return to_f32(load_i32(x, n)); }
PK_INLINE void write_real(float* y, f32 v, int n) { store(y, v, n); }
PK_INLINE void write_real(bfloat16* y, f32 v, int n) { store(y, v, n); }
PK_INLINE void write_real(float16* y, f32 v, int n) { store(y, v, n); }
PK_INLINE void write_real(uint8_t* y, f32 v, int n) { store_i32(y, to_i32(v), n); }
PK_INLINE void write_real(int8_t* y, f32 v, int n) { store_i32(y, to_i32(v), n); }

// One element.
PK_INLINE float real(float x) { return x; }
PK_INLINE float real(uint8_t x) { return x; }
PK_INLINE float real(int8_t x) { return x; }
PK_INLINE float real(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
PK_INLINE float real(float16 x) {
  float lanes[kLanes];
  store(lanes, load(&x, 1));
  return lanes[0];
}

}  // namespace pykernels::PYKERNELS_ISA_NS
