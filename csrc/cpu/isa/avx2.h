// The vector layer on 256-bit registers.
#pragma once

namespace pykernels::PYKERNELS_ISA_NS {

constexpr int kLanes = 8;
constexpr int kBytes = 32;
using f32 = __m256;
using i32 = __m256i;
struct u8 {
  __m256i v;
};

// All ones in the first n lanes.
PK_INLINE __m256i lane_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

PK_INLINE f32 load(const float* p) { return _mm256_loadu_ps(p); }
PK_INLINE f32 load(const float* p, int n) { return n == 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, lane_mask(n)); }
PK_INLINE __m128i load_words8(const void* p, int n) {
  if (n == 8) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  alignas(16) uint16_t buffer[8] = {};
  std::memcpy(buffer, p, 2 * n);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
PK_INLINE void store_words8(void* p, __m128i v, int n) {
  if (n == 8) {
    _mm_storeu_si128(static_cast<__m128i*>(p), v);
    return;
  }
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), v);
  std::memcpy(p, buffer, 2 * n);
}
PK_INLINE f32 load(const bfloat16* p, int n = 8) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_words8(p, n)), 16));
}
PK_INLINE f32 load(const float16* p, int n = 8) { return _mm256_cvtph_ps(load_words8(p, n)); }
PK_INLINE void store(float* p, f32 v, int n = 8) {
  if (n == 8)
    _mm256_storeu_ps(p, v);
  else
    _mm256_maskstore_ps(p, lane_mask(n), v);
}
PK_INLINE __m128i narrow(bfloat16*, f32 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
PK_INLINE __m128i narrow(float16*, f32 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PK_INLINE void store(bfloat16* p, f32 v, int n = 8) { store_words8(p, narrow(p, v), n); }
PK_INLINE void store(float16* p, f32 v, int n = 8) { store_words8(p, narrow(p, v), n); }
PK_INLINE void stream(float* p, f32 v) { _mm256_stream_ps(p, v); }
template <class T>
PK_INLINE void stream(T* p, f32 v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(p, v));
}
PK_INLINE void fence() { _mm_sfence(); }
PK_INLINE f32 set1(float v) { return _mm256_set1_ps(v); }
PK_INLINE f32 add(f32 a, f32 b) { return _mm256_add_ps(a, b); }
PK_INLINE f32 sub(f32 a, f32 b) { return _mm256_sub_ps(a, b); }
PK_INLINE f32 mul(f32 a, f32 b) { return _mm256_mul_ps(a, b); }
PK_INLINE f32 div(f32 a, f32 b) { return _mm256_div_ps(a, b); }
PK_INLINE f32 min(f32 a, f32 b) { return _mm256_min_ps(a, b); }
PK_INLINE f32 max(f32 a, f32 b) { return _mm256_max_ps(a, b); }
PK_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
PK_INLINE f32 round(f32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PK_INLINE f32 floor(f32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
PK_INLINE f32 abs(f32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
PK_INLINE f32 sqrt(f32 a) { return _mm256_sqrt_ps(a); }
PK_INLINE f32 max_or_zero(f32 a, f32 b) { return _mm256_and_ps(_mm256_max_ps(a, b), _mm256_cmp_ps(a, a, _CMP_ORD_Q)); }
PK_INLINE f32 select_lt(f32 a, f32 b, f32 x, f32 y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
PK_INLINE f32 select_over(f32 v, f32 m, f32 x, f32 y) {
  return _mm256_blendv_ps(y, x, _mm256_or_ps(_mm256_cmp_ps(v, m, _CMP_GT_OQ), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
PK_INLINE f32 max_nan(f32 v, f32 m) {
  return _mm256_blendv_ps(_mm256_max_ps(v, m), v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

PK_INLINE __m128i load_bytes8(const void* p, int n) {
  if (n == 8) return _mm_loadl_epi64(static_cast<const __m128i*>(p));
  uint64_t word = 0;
  std::memcpy(&word, p, n);
  return _mm_cvtsi64_si128(static_cast<int64_t>(word));
}
PK_INLINE void store_bytes8(void* p, __m128i v, int n) {
  if (n == 8) {
    _mm_storel_epi64(static_cast<__m128i*>(p), v);
    return;
  }
  const uint64_t word = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
  std::memcpy(p, &word, n);
}
PK_INLINE i32 load_i32(const int32_t* p, int n = 8) {
  return n == 8 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskload_epi32(p, lane_mask(n));
}
PK_INLINE i32 load_i32(const uint8_t* p, int n = 8) { return _mm256_cvtepu8_epi32(load_bytes8(p, n)); }
PK_INLINE i32 load_i32(const int8_t* p, int n = 8) { return _mm256_cvtepi8_epi32(load_bytes8(p, n)); }
PK_INLINE void store_i32(int32_t* p, i32 v, int n = 8) {
  if (n == 8)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  else
    _mm256_maskstore_epi32(p, lane_mask(n), v);
}
PK_INLINE __m128i narrow16(i32 v) { return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }
PK_INLINE void store_i32(uint8_t* p, i32 v, int n = 8) {
  const __m128i h = narrow16(v);
  store_bytes8(p, _mm_packus_epi16(h, h), n);
}
PK_INLINE void store_i32(int8_t* p, i32 v, int n = 8) {
  const __m128i h = narrow16(v);
  store_bytes8(p, _mm_packs_epi16(h, h), n);
}
// The packs interleave the 128-bit halves of their operands; the permutation puts the groups of 4 bytes back in order.
PK_INLINE __m256i in_order(__m256i bytes) {
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
PK_INLINE void store4(uint8_t* p, i32 a, i32 b, i32 c, i32 d) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), in_order(bytes));
}
PK_INLINE void store4(int8_t* p, i32 a, i32 b, i32 c, i32 d) {
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), in_order(bytes));
}
PK_INLINE void store16(uint8_t* p, const i32* v) {
  const __m256i words = _mm256_packs_epi32(v[0], v[1]);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 1, 2, 0)));
}
PK_INLINE void store16(int8_t* p, const i32* v) {
  const __m256i words = _mm256_packs_epi32(v[0], v[1]);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 1, 2, 0)));
}
PK_INLINE i32 set1_i32(int32_t v) { return _mm256_set1_epi32(v); }
PK_INLINE i32 add(i32 a, i32 b) { return _mm256_add_epi32(a, b); }
PK_INLINE i32 sub(i32 a, i32 b) { return _mm256_sub_epi32(a, b); }
PK_INLINE i32 mul(i32 a, i32 b) { return _mm256_mullo_epi32(a, b); }
PK_INLINE i32 min(i32 a, i32 b) { return _mm256_min_epi32(a, b); }
PK_INLINE i32 max(i32 a, i32 b) { return _mm256_max_epi32(a, b); }
PK_INLINE f32 to_f32(i32 a) { return _mm256_cvtepi32_ps(a); }
PK_INLINE i32 to_i32(f32 a) { return _mm256_cvtps_epi32(a); }
PK_INLINE float sum_lanes(f32 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
PK_INLINE int32_t sum_lanes(i32 a) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(3, 2, 3, 2)));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, _MM_SHUFFLE(1, 1, 1, 1))));
}
template <int k>
PK_INLINE i32 shift_left(i32 a) {
  return _mm256_slli_epi32(a, k);
}
template <int k>
PK_INLINE i32 shift_right(i32 a) {
  return _mm256_srli_epi32(a, k);
}
template <int k>
PK_INLINE i32 shift_right_signed(i32 a) {
  return _mm256_srai_epi32(a, k);
}
PK_INLINE i32 bit_and(i32 a, i32 b) { return _mm256_and_si256(a, b); }
PK_INLINE i32 bit_or(i32 a, i32 b) { return _mm256_or_si256(a, b); }
PK_INLINE i32 bit_xor(i32 a, i32 b) { return _mm256_xor_si256(a, b); }
PK_INLINE i32 lane_index() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
PK_INLINE f32 cast_f32(i32 a) { return _mm256_castsi256_ps(a); }
PK_INLINE i32 cast_i32(f32 a) { return _mm256_castps_si256(a); }
PK_INLINE uint32_t lane_bits(__m256i mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
}
PK_INLINE uint32_t bits_gt(i32 a, i32 b) { return lane_bits(_mm256_cmpgt_epi32(a, b)); }
PK_INLINE uint32_t bits_eq(i32 a, i32 b) { return lane_bits(_mm256_cmpeq_epi32(a, b)); }
// For every set of lanes, a byte each: the numbers of its lanes, ascending.
struct LanesOfBits {
  uint64_t lanes[256];
  constexpr LanesOfBits() : lanes() {
    for (int bits = 0; bits < 256; ++bits)
      for (int lane = 0, next = 0; lane < 8; ++lane)
        if (bits >> lane & 1) lanes[bits] |= static_cast<uint64_t>(lane) << 8 * next++;
  }
};
constexpr LanesOfBits kLanesOfBits;
PK_INLINE int compact(int32_t* p, i32 v, uint32_t bits) {
  const __m256i chosen = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kLanesOfBits.lanes[bits])));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(v, chosen));
  return __builtin_popcount(bits);
}

PK_INLINE u8 load_u8(const void* p, int n = 32) {
  if (n == 32) return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
  alignas(32) uint8_t buffer[32] = {};
  std::memcpy(buffer, p, n);
  return {_mm256_load_si256(reinterpret_cast<const __m256i*>(buffer))};
}
PK_INLINE void store_u8(void* p, u8 v, int n = 32) {
  if (n == 32) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v.v);
    return;
  }
  alignas(32) uint8_t buffer[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), v.v);
  std::memcpy(p, buffer, n);
}
PK_INLINE u8 max_u8(u8 a, u8 b) { return {_mm256_max_epu8(a.v, b.v)}; }
PK_INLINE u8 min_u8(u8 a, u8 b) { return {_mm256_min_epu8(a.v, b.v)}; }
PK_INLINE u8 max_s8(u8 a, u8 b) { return {_mm256_max_epi8(a.v, b.v)}; }
PK_INLINE u8 min_s8(u8 a, u8 b) { return {_mm256_min_epi8(a.v, b.v)}; }
PK_INLINE u8 set1_u8(uint8_t v) { return {_mm256_set1_epi8(static_cast<char>(v))}; }
PK_INLINE u8 xor_u8(u8 a, u8 b) { return {_mm256_xor_si256(a.v, b.v)}; }

// 16 rows of 16 entries: every row is looked up by the low half of the index, and a tree of blends chooses the row by
// the high half, bit by bit from the lowest.
struct ByteTable {
  __m256i rows[16];
};
PK_INLINE ByteTable byte_table(const uint8_t* entries) {
  ByteTable t;
  for (int i = 0; i < 16; ++i)
    t.rows[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries) + i));
  return t;
}
PK_INLINE u8 lookup(const ByteTable& t, u8 index) {
  const __m256i low = _mm256_and_si256(index.v, _mm256_set1_epi8(15));
  const __m256i bit4 = _mm256_slli_epi16(index.v, 3), bit5 = _mm256_slli_epi16(index.v, 2);
  const __m256i bit6 = _mm256_slli_epi16(index.v, 1);
  const auto pair = [&](int i) __attribute__((always_inline)) {
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(t.rows[i], low), _mm256_shuffle_epi8(t.rows[i + 1], low), bit4);
  };
  const auto four = [&](int i)
                        __attribute__((always_inline)) { return _mm256_blendv_epi8(pair(i), pair(i + 2), bit5); };
  const auto eight = [&](int i)
                         __attribute__((always_inline)) { return _mm256_blendv_epi8(four(i), four(i + 4), bit6); };
  return {_mm256_blendv_epi8(eight(0), eight(8), index.v)};
}

}  // namespace pykernels::PYKERNELS_ISA_NS
