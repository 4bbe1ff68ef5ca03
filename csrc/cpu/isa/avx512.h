// The vector layer on 512-bit registers (F, BW, VL, DQ). Tails go through masks.
#pragma once

namespace pykernels::PYKERNELS_ISA_NS {

constexpr int kLanes = 16;
constexpr int kBytes = 64;
using f32 = __m512;
using i32 = __m512i;
struct u8 {
  __m512i v;
};

PK_INLINE __mmask16 lane_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
PK_INLINE __mmask64 byte_mask(int n) { return n == 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

PK_INLINE f32 load(const float* p, int n = 16) {
  return n == 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(lane_mask(n), p);
}
PK_INLINE __m256i load_words16(const void* p, int n) {
  return n == 16 ? _mm256_loadu_si256(static_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(lane_mask(n), p);
}
PK_INLINE void store_words16(void* p, __m256i v, int n) {
  if (n == 16)
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  else
    _mm256_mask_storeu_epi16(p, lane_mask(n), v);
}
PK_INLINE f32 load(const bfloat16* p, int n = 16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words16(p, n)), 16));
}
PK_INLINE f32 load(const float16* p, int n = 16) { return _mm512_cvtph_ps(load_words16(p, n)); }
PK_INLINE void store(float* p, f32 v, int n = 16) {
  if (n == 16)
    _mm512_storeu_ps(p, v);
  else
    _mm512_mask_storeu_ps(p, lane_mask(n), v);
}
PK_INLINE __m256i narrow(bfloat16*, f32 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet));
}
PK_INLINE __m256i narrow(float16*, f32 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PK_INLINE void store(bfloat16* p, f32 v, int n = 16) { store_words16(p, narrow(p, v), n); }
PK_INLINE void store(float16* p, f32 v, int n = 16) { store_words16(p, narrow(p, v), n); }
PK_INLINE void stream(float* p, f32 v) { _mm512_stream_ps(p, v); }
template <class T>
PK_INLINE void stream(T* p, f32 v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, v));
}
PK_INLINE void fence() { _mm_sfence(); }
PK_INLINE f32 set1(float v) { return _mm512_set1_ps(v); }
PK_INLINE f32 add(f32 a, f32 b) { return _mm512_add_ps(a, b); }
PK_INLINE f32 sub(f32 a, f32 b) { return _mm512_sub_ps(a, b); }
PK_INLINE f32 mul(f32 a, f32 b) { return _mm512_mul_ps(a, b); }
PK_INLINE f32 div(f32 a, f32 b) { return _mm512_div_ps(a, b); }
PK_INLINE f32 min(f32 a, f32 b) { return _mm512_min_ps(a, b); }
PK_INLINE f32 max(f32 a, f32 b) { return _mm512_max_ps(a, b); }
PK_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }
PK_INLINE f32 round(f32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PK_INLINE f32 floor(f32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
PK_INLINE f32 abs(f32 a) { return _mm512_abs_ps(a); }
PK_INLINE f32 sqrt(f32 a) { return _mm512_sqrt_ps(a); }
PK_INLINE f32 max_or_zero(f32 a, f32 b) { return _mm512_maskz_max_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a, b); }
PK_INLINE f32 select_lt(f32 a, f32 b, f32 x, f32 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
PK_INLINE f32 select_over(f32 v, f32 m, f32 x, f32 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, m, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), y, x);
}
PK_INLINE f32 max_nan(f32 v, f32 m) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v, _mm512_max_ps(v, m));
}

PK_INLINE __m128i load_bytes16(const void* p, int n) {
  return n == 16 ? _mm_loadu_si128(static_cast<const __m128i*>(p)) : _mm_maskz_loadu_epi8(lane_mask(n), p);
}
PK_INLINE void store_bytes16(void* p, __m128i v, int n) {
  if (n == 16)
    _mm_storeu_si128(static_cast<__m128i*>(p), v);
  else
    _mm_mask_storeu_epi8(p, lane_mask(n), v);
}
PK_INLINE i32 load_i32(const int32_t* p, int n = 16) {
  return n == 16 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(lane_mask(n), p);
}
PK_INLINE i32 load_i32(const uint8_t* p, int n = 16) { return _mm512_cvtepu8_epi32(load_bytes16(p, n)); }
PK_INLINE i32 load_i32(const int8_t* p, int n = 16) { return _mm512_cvtepi8_epi32(load_bytes16(p, n)); }
PK_INLINE void store_i32(int32_t* p, i32 v, int n = 16) {
  if (n == 16)
    _mm512_storeu_si512(p, v);
  else
    _mm512_mask_storeu_epi32(p, lane_mask(n), v);
}
PK_INLINE void store_i32(uint8_t* p, i32 v, int n = 16) {
  store_bytes16(p, _mm512_cvtusepi32_epi8(_mm512_max_epi32(v, _mm512_setzero_si512())), n);
}
PK_INLINE void store_i32(int8_t* p, i32 v, int n = 16) { store_bytes16(p, _mm512_cvtsepi32_epi8(v), n); }
// The packs interleave the 128-bit quarters of their operands; the permutation puts the groups of 4 bytes back in
// order.
PK_INLINE __m512i in_order(__m512i bytes) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}
PK_INLINE void store4(uint8_t* p, i32 a, i32 b, i32 c, i32 d) {
  _mm512_storeu_si512(p, in_order(_mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d))));
}
PK_INLINE void store4(int8_t* p, i32 a, i32 b, i32 c, i32 d) {
  _mm512_storeu_si512(p, in_order(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d))));
}
template <class Q>
PK_INLINE void store16(Q* p, const i32* v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(*v));
}
PK_INLINE i32 set1_i32(int32_t v) { return _mm512_set1_epi32(v); }
PK_INLINE i32 add(i32 a, i32 b) { return _mm512_add_epi32(a, b); }
PK_INLINE i32 sub(i32 a, i32 b) { return _mm512_sub_epi32(a, b); }
PK_INLINE i32 mul(i32 a, i32 b) { return _mm512_mullo_epi32(a, b); }
PK_INLINE i32 min(i32 a, i32 b) { return _mm512_min_epi32(a, b); }
PK_INLINE i32 max(i32 a, i32 b) { return _mm512_max_epi32(a, b); }
PK_INLINE f32 to_f32(i32 a) { return _mm512_cvtepi32_ps(a); }
PK_INLINE i32 to_i32(f32 a) { return _mm512_cvtps_epi32(a); }
PK_INLINE float sum_lanes(f32 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m256 eight = _mm256_add_ps(_mm256_castsi256_ps(_mm512_castsi512_si256(bits)),
                                     _mm256_castsi256_ps(_mm512_extracti64x4_epi64(bits, 1)));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
PK_INLINE int32_t sum_lanes(i32 a) {
  const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(3, 2, 3, 2)));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, _MM_SHUFFLE(1, 1, 1, 1))));
}
template <int k>
PK_INLINE i32 shift_left(i32 a) {
  return _mm512_slli_epi32(a, k);
}
template <int k>
PK_INLINE i32 shift_right(i32 a) {
  return _mm512_srli_epi32(a, k);
}
template <int k>
PK_INLINE i32 shift_right_signed(i32 a) {
  return _mm512_srai_epi32(a, k);
}
PK_INLINE i32 bit_and(i32 a, i32 b) { return _mm512_and_si512(a, b); }
PK_INLINE i32 bit_or(i32 a, i32 b) { return _mm512_or_si512(a, b); }
PK_INLINE i32 bit_xor(i32 a, i32 b) { return _mm512_xor_si512(a, b); }
PK_INLINE i32 lane_index() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
PK_INLINE f32 cast_f32(i32 a) { return _mm512_castsi512_ps(a); }
PK_INLINE i32 cast_i32(f32 a) { return _mm512_castps_si512(a); }
PK_INLINE uint32_t bits_gt(i32 a, i32 b) { return _mm512_cmpgt_epi32_mask(a, b); }
PK_INLINE uint32_t bits_eq(i32 a, i32 b) { return _mm512_cmpeq_epi32_mask(a, b); }
PK_INLINE int compact(int32_t* p, i32 v, uint32_t bits) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), v));
  return __builtin_popcount(bits);
}

PK_INLINE u8 load_u8(const void* p, int n = 64) {
  return {n == 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(byte_mask(n), p)};
}
PK_INLINE void store_u8(void* p, u8 v, int n = 64) {
  if (n == 64)
    _mm512_storeu_si512(p, v.v);
  else
    _mm512_mask_storeu_epi8(p, byte_mask(n), v.v);
}
PK_INLINE u8 max_u8(u8 a, u8 b) { return {_mm512_max_epu8(a.v, b.v)}; }
PK_INLINE u8 min_u8(u8 a, u8 b) { return {_mm512_min_epu8(a.v, b.v)}; }
PK_INLINE u8 max_s8(u8 a, u8 b) { return {_mm512_max_epi8(a.v, b.v)}; }
PK_INLINE u8 min_s8(u8 a, u8 b) { return {_mm512_min_epi8(a.v, b.v)}; }
PK_INLINE u8 set1_u8(uint8_t v) { return {_mm512_set1_epi8(static_cast<char>(v))}; }
PK_INLINE u8 xor_u8(u8 a, u8 b) { return {_mm512_xor_si512(a.v, b.v)}; }

// 16 rows of 16 entries: every row is looked up by the low half of the index, and a tree of blends chooses the row by
// the high half, bit by bit from the lowest.
struct ByteTable {
  __m512i rows[16];
};
PK_INLINE ByteTable byte_table(const uint8_t* entries) {
  ByteTable t;
  for (int i = 0; i < 16; ++i)
    t.rows[i] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries) + i));
  return t;
}
PK_INLINE u8 lookup(const ByteTable& t, u8 index) {
  const __m512i low = _mm512_and_si512(index.v, _mm512_set1_epi8(15));
  const auto bit = [&](char value) __attribute__((always_inline)) {
    return _mm512_test_epi8_mask(index.v, _mm512_set1_epi8(value));
  };
  const __mmask64 bit4 = bit(16), bit5 = bit(32), bit6 = bit(64), bit7 = _mm512_movepi8_mask(index.v);
  const auto pair = [&](int i) __attribute__((always_inline)) {
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(t.rows[i], low), bit4, t.rows[i + 1], low);
  };
  const auto four = [&](int i)
                        __attribute__((always_inline)) { return _mm512_mask_blend_epi8(bit5, pair(i), pair(i + 2)); };
  const auto eight = [&](int i)
                         __attribute__((always_inline)) { return _mm512_mask_blend_epi8(bit6, four(i), four(i + 4)); };
  return {_mm512_mask_blend_epi8(bit7, eight(0), eight(8))};
}

}  // namespace pykernels::PYKERNELS_ISA_NS
