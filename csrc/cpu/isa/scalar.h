// The vector layer with one lane: plain C++, the oracle of every other isa.
#pragma once

namespace pykernels::PYKERNELS_ISA_NS {

constexpr int kLanes = 1;
constexpr int kBytes = 1;
using f32 = float;
using i32 = int32_t;
using u8 = uint8_t;

PK_INLINE f32 load(const float* p, int = 1) { return *p; }
PK_INLINE f32 load(const bfloat16* p, int = 1) {
  const uint32_t bits = uint32_t{p->bits} << 16;
  f32 v;
  std::memcpy(&v, &bits, 4);
  return v;
}
PK_INLINE void store(float* p, f32 v, int = 1) { *p = v; }
PK_INLINE void store(bfloat16* p, f32 v, int = 1) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  p->bits = v != v ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
PK_INLINE f32 load(const float16* p, int = 1) {
  const uint32_t sign = uint32_t{p->bits & 0x8000u} << 16, exponent = (p->bits >> 10) & 31, fraction = p->bits & 0x3ff;
  uint32_t bits = (exponent + 112) << 23 | fraction << 13;
  if (exponent == 31) bits = 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0);  // a NaN becomes a quiet one
  if (exponent == 0) {
    const f32 small = float(fraction) * 0x1p-24f;
    std::memcpy(&bits, &small, 4);
  }
  bits |= sign;
  f32 v;
  std::memcpy(&v, &bits, 4);
  return v;
}
PK_INLINE void store(float16* p, f32 v, int = 1) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  else if (magnitude >= 0x477ff000)  // 65520 rounds to infinity
    half = 0x7c00;
  else if (magnitude < 0x38800000)  // below 2^-14 there are whole steps of 2^-24
    half = uint32_t(_mm_cvtss_si32(_mm_set_ss(__builtin_fabsf(v) * 0x1p24f)));
  else
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  p->bits = uint16_t(half | (bits >> 16 & 0x8000));
}
template <class T>
PK_INLINE void stream(T* p, f32 v) {
  store(p, v);
}
PK_INLINE void fence() {}
PK_INLINE f32 set1(float v) { return v; }
PK_INLINE f32 add(f32 a, f32 b) { return a + b; }
PK_INLINE f32 sub(f32 a, f32 b) { return a - b; }
PK_INLINE f32 mul(f32 a, f32 b) { return a * b; }
PK_INLINE f32 div(f32 a, f32 b) { return a / b; }
PK_INLINE f32 min(f32 a, f32 b) { return a < b ? a : b; }
PK_INLINE f32 max(f32 a, f32 b) { return a > b ? a : b; }
PK_INLINE f32 fma(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
PK_INLINE f32 round(f32 a) { return __builtin_rintf(a); }
PK_INLINE f32 floor(f32 a) { return __builtin_floorf(a); }
PK_INLINE f32 abs(f32 a) { return __builtin_fabsf(a); }
PK_INLINE f32 sqrt(f32 a) { return __builtin_sqrtf(a); }
PK_INLINE f32 max_or_zero(f32 a, f32 b) { return a == a ? max(a, b) : 0.0f; }
PK_INLINE f32 select_lt(f32 a, f32 b, f32 x, f32 y) { return a < b ? x : y; }
PK_INLINE f32 select_over(f32 v, f32 m, f32 x, f32 y) { return v > m || v != v ? x : y; }
PK_INLINE f32 max_nan(f32 v, f32 m) { return v > m || v != v ? v : m; }

PK_INLINE i32 load_i32(const int32_t* p, int = 1) { return *p; }
PK_INLINE i32 load_i32(const uint8_t* p, int = 1) { return *p; }
PK_INLINE i32 load_i32(const int8_t* p, int = 1) { return *p; }
PK_INLINE void store_i32(int32_t* p, i32 v, int = 1) { *p = v; }
PK_INLINE void store_i32(uint8_t* p, i32 v, int = 1) { *p = uint8_t(v < 0 ? 0 : v > 255 ? 255 : v); }
PK_INLINE void store_i32(int8_t* p, i32 v, int = 1) { *p = int8_t(v < -128 ? -128 : v > 127 ? 127 : v); }
template <class Q>
PK_INLINE void store4(Q* p, i32 a, i32 b, i32 c, i32 d) {
  store_i32(p, a);
  store_i32(p + 1, b);
  store_i32(p + 2, c);
  store_i32(p + 3, d);
}
template <class Q>
PK_INLINE void store16(Q* p, const i32* v) {
  for (int i = 0; i < 16; ++i) store_i32(p + i, v[i]);
}
PK_INLINE i32 set1_i32(int32_t v) { return v; }
PK_INLINE i32 add(i32 a, i32 b) { return int32_t(uint32_t(a) + uint32_t(b)); }
PK_INLINE i32 sub(i32 a, i32 b) { return int32_t(uint32_t(a) - uint32_t(b)); }
PK_INLINE i32 mul(i32 a, i32 b) { return int32_t(uint32_t(a) * uint32_t(b)); }
PK_INLINE i32 min(i32 a, i32 b) { return a < b ? a : b; }
PK_INLINE i32 max(i32 a, i32 b) { return a > b ? a : b; }
PK_INLINE f32 to_f32(i32 a) { return float(a); }
PK_INLINE i32 to_i32(f32 a) { return _mm_cvtss_si32(_mm_set_ss(a)); }
PK_INLINE float sum_lanes(f32 a) { return a; }
PK_INLINE int32_t sum_lanes(i32 a) { return a; }
template <int k>
PK_INLINE i32 shift_left(i32 a) {
  return int32_t(uint32_t(a) << k);
}
template <int k>
PK_INLINE i32 shift_right(i32 a) {
  return int32_t(uint32_t(a) >> k);
}
template <int k>
PK_INLINE i32 shift_right_signed(i32 a) {
  return a >> k;
}
PK_INLINE i32 bit_and(i32 a, i32 b) { return a & b; }
PK_INLINE i32 bit_or(i32 a, i32 b) { return a | b; }
PK_INLINE i32 bit_xor(i32 a, i32 b) { return a ^ b; }
PK_INLINE i32 lane_index() { return 0; }
PK_INLINE f32 cast_f32(i32 a) {
  f32 v;
  std::memcpy(&v, &a, 4);
  return v;
}
PK_INLINE i32 cast_i32(f32 a) {
  i32 v;
  std::memcpy(&v, &a, 4);
  return v;
}

PK_INLINE uint32_t bits_gt(i32 a, i32 b) { return a > b; }
PK_INLINE uint32_t bits_eq(i32 a, i32 b) { return a == b; }
PK_INLINE int compact(int32_t* p, i32 v, uint32_t bits) {
  *p = v;
  return static_cast<int>(bits);
}

PK_INLINE u8 load_u8(const void* p, int = 1) { return *static_cast<const uint8_t*>(p); }
PK_INLINE void store_u8(void* p, u8 v, int = 1) { *static_cast<uint8_t*>(p) = v; }
PK_INLINE u8 max_u8(u8 a, u8 b) { return a > b ? a : b; }
PK_INLINE u8 min_u8(u8 a, u8 b) { return a < b ? a : b; }
PK_INLINE u8 max_s8(u8 a, u8 b) { return int8_t(a) > int8_t(b) ? a : b; }
PK_INLINE u8 min_s8(u8 a, u8 b) { return int8_t(a) < int8_t(b) ? a : b; }
PK_INLINE u8 set1_u8(uint8_t v) { return v; }
PK_INLINE u8 xor_u8(u8 a, u8 b) { return a ^ b; }

struct ByteTable {
  const uint8_t* entries;
};
PK_INLINE ByteTable byte_table(const uint8_t* entries) { return {entries}; }
PK_INLINE u8 lookup(const ByteTable& t, u8 index) { return t.entries[index]; }

}  // namespace pykernels::PYKERNELS_ISA_NS
