// The AVX-512 (F, BW, VL, DQ, VNNI, BF16) and AVX-VNNI intrinsics that the kernels use, on AVX2: with
// -DPYKERNELS_EMULATE=ON every isa runs on any AVX2 host, to be tested there. Each follows the operation that Intel's
// intrinsics guide gives for it.
//
// The functions stand in the isa's own namespace, where unqualified names find them before the compiler's global ones.
// A 512-bit operation that works lane by lane (32-bit lanes, or 128-bit ones for shuffles and packs) is the 256-bit
// operation on either half. A masked load or store touches the selected elements only, one by one, as sanitizers and
// page ends demand.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#error "emulation replaces AVX-512; compile it with AVX2 flags"
#endif

#define PK_EMULATE static inline __attribute__((always_inline))
#define PK_ELEMENTWISE static __attribute__((noinline, unused))  // inlined at every use, they take minutes to compile

namespace pykernels::PYKERNELS_ISA_NS {

// ---- halves -------------------------------------------------------------------------------------------------------
PK_EMULATE __m256i half(__m512i v, int k) {
  __m256i h;
  std::memcpy(&h, reinterpret_cast<const char*>(&v) + 32 * k, 32);
  return h;
}
PK_EMULATE __m256 half(__m512 v, int k) {
  __m256 h;
  std::memcpy(&h, reinterpret_cast<const char*>(&v) + 32 * k, 32);
  return h;
}
PK_EMULATE __m512i join(__m256i low, __m256i high) {
  __m512i v;
  std::memcpy(&v, &low, 32);
  std::memcpy(reinterpret_cast<char*>(&v) + 32, &high, 32);
  return v;
}
PK_EMULATE __m512 join(__m256 low, __m256 high) {
  __m512 v;
  std::memcpy(&v, &low, 32);
  std::memcpy(reinterpret_cast<char*>(&v) + 32, &high, 32);
  return v;
}

#define PK_HALVES_1(name, Vector, op) \
  PK_EMULATE Vector name(Vector a) { return join(op(half(a, 0)), op(half(a, 1))); }
#define PK_HALVES_2(name, Vector, op) \
  PK_EMULATE Vector name(Vector a, Vector b) { return join(op(half(a, 0), half(b, 0)), op(half(a, 1), half(b, 1))); }
#define PK_HALVES_SHIFT(name, op) \
  PK_EMULATE __m512i name(__m512i a, int k) { return join(op(half(a, 0), k), op(half(a, 1), k)); }

// ---- elements, for what has no 256-bit counterpart ------------------------------------------------------------------
template <class T, class Vector>
struct Elements {
  static constexpr int kCount = sizeof(Vector) / sizeof(T);
  T at[kCount];
  PK_EMULATE Elements of(Vector v) {
    Elements e;
    std::memcpy(e.at, &v, sizeof v);
    return e;
  }
  inline __attribute__((always_inline)) Vector vector() const {
    Vector v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
};

template <class T, class Vector, class Mask>
PK_ELEMENTWISE Vector emulated_load(Mask mask, Vector otherwise, const void* p) {
  auto e = Elements<T, Vector>::of(otherwise);
  for (int i = 0; i < e.kCount; ++i)
    if ((mask >> i) & 1) std::memcpy(&e.at[i], static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  return e.vector();
}
template <class T, class Vector, class Mask>
PK_ELEMENTWISE void emulated_store(void* p, Mask mask, Vector v) {
  const auto e = Elements<T, Vector>::of(v);
  for (int i = 0; i < e.kCount; ++i)
    if ((mask >> i) & 1) std::memcpy(static_cast<char*>(p) + i * sizeof(T), &e.at[i], sizeof(T));
}
template <class T, class Vector, class Mask>
PK_ELEMENTWISE Vector emulated_blend(Mask mask, Vector clear, Vector set) {
  auto e = Elements<T, Vector>::of(clear);
  const auto s = Elements<T, Vector>::of(set);
  for (int i = 0; i < e.kCount; ++i)
    if ((mask >> i) & 1) e.at[i] = s.at[i];
  return e.vector();
}
template <class To, class From, class Out, class In>
PK_ELEMENTWISE Out emulated_narrow(In v, int64_t low, int64_t high) {  // saturating to low..high
  const auto e = Elements<From, In>::of(v);
  Elements<To, Out> out;
  for (int i = 0; i < e.kCount; ++i) {
    const int64_t x = e.at[i];
    out.at[i] = static_cast<To>(x < low ? low : x > high ? high : x);
  }
  return out.vector();
}
template <class T, class Mask, class Vector, class Test>
PK_ELEMENTWISE Mask emulated_mask(Vector a, Vector b, Test test) {
  const auto x = Elements<T, Vector>::of(a), y = Elements<T, Vector>::of(b);
  Mask mask = 0;
  for (int i = 0; i < x.kCount; ++i)
    mask = static_cast<Mask>(mask | (static_cast<Mask>(test(x.at[i], y.at[i]) ? 1 : 0) << i));
  return mask;
}

// ---- AVX-512F, fp32
// ---------------------------------------------------------------------------------------------------
PK_EMULATE __m512 _mm512_set1_ps(float v) { return join(_mm256_set1_ps(v), _mm256_set1_ps(v)); }
PK_EMULATE __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
PK_EMULATE __m512 _mm512_loadu_ps(const void* p) {
  __m512 v;
  std::memcpy(&v, p, 64);
  return v;
}
PK_EMULATE void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, 64); }
PK_HALVES_2(_mm512_add_ps, __m512, _mm256_add_ps)
PK_HALVES_2(_mm512_sub_ps, __m512, _mm256_sub_ps)
PK_HALVES_2(_mm512_mul_ps, __m512, _mm256_mul_ps)
PK_HALVES_2(_mm512_div_ps, __m512, _mm256_div_ps)
PK_HALVES_2(_mm512_min_ps, __m512, _mm256_min_ps)
PK_HALVES_2(_mm512_max_ps, __m512, _mm256_max_ps)
PK_HALVES_1(_mm512_sqrt_ps, __m512, _mm256_sqrt_ps)
PK_EMULATE __m512 _mm512_abs_ps(__m512 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return join(_mm256_andnot_ps(sign, half(a, 0)), _mm256_andnot_ps(sign, half(a, 1)));
}
PK_EMULATE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return join(_mm256_fmadd_ps(half(a, 0), half(b, 0), half(c, 0)), _mm256_fmadd_ps(half(a, 1), half(b, 1), half(c, 1)));
}
// Bits 7:4 of the control are the number of fraction bits to keep; the kernels keep none, and round to nearest even or
// down.
PK_EMULATE __m512 _mm512_roundscale_ps(__m512 a, int control) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  if (control == kDown) return join(_mm256_round_ps(half(a, 0), kDown), _mm256_round_ps(half(a, 1), kDown));
  return join(_mm256_round_ps(half(a, 0), kNearest), _mm256_round_ps(half(a, 1), kNearest));
}
PK_EMULATE __m512 _mm512_cvtph_ps(__m256i a) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
// The control is the rounding, always to nearest even.
PK_EMULATE __m256i _mm512_cvtps_ph(__m512 a, int) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(half(a, 0), kNearest)),
                                 _mm256_cvtps_ph(half(a, 1), kNearest), 1);
}
PK_EMULATE void _mm512_stream_ps(void* p, __m512 v) { std::memcpy(p, &v, 64); }
PK_EMULATE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  return emulated_mask<float, __mmask16>(a, b, [predicate](float x, float y) {
    switch (predicate) {
      case _CMP_EQ_OQ: return x == y;
      case _CMP_LT_OQ: return x < y;
      case _CMP_LE_OQ: return x <= y;
      case _CMP_GT_OQ: return x > y;
      case _CMP_GE_OQ: return x >= y;
      case _CMP_UNORD_Q: return x != x || y != y;
      case _CMP_ORD_Q: return x == x && y == y;
    }
    __builtin_trap();  // a predicate not written down yet
  });
}
PK_EMULATE __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) { return emulated_blend<float>(mask, a, b); }
PK_EMULATE __m512 _mm512_maskz_max_ps(__mmask16 mask, __m512 a, __m512 b) {
  return emulated_blend<float>(mask, _mm512_setzero_ps(), _mm512_max_ps(a, b));
}
PK_EMULATE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return emulated_load<float>(mask, _mm512_setzero_ps(), p);
}
PK_EMULATE void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) { emulated_store<float>(p, mask, v); }

// ---- AVX-512F and BW, integers
// ----------------------------------------------------------------------------------------
PK_EMULATE __m512i _mm512_castps_si512(__m512 a) { return reinterpret_cast<__m512i>(a); }
PK_EMULATE __m512 _mm512_castsi512_ps(__m512i a) { return reinterpret_cast<__m512>(a); }
PK_EMULATE __m512i _mm512_castsi256_si512(__m256i a) { return join(a, _mm256_setzero_si256()); }
PK_EMULATE __m256i _mm512_castsi512_si256(__m512i a) { return half(a, 0); }
PK_EMULATE __m256i _mm512_extracti64x4_epi64(__m512i a, int k) { return half(a, k); }
PK_EMULATE __m128i _mm512_extracti32x4_epi32(__m512i a, int k) {
  const __m256i h = half(a, k / 2);
  return k % 2 ? _mm256_extracti128_si256(h, 1) : _mm256_castsi256_si128(h);
}
PK_EMULATE __m128i _mm512_castsi512_si128(__m512i a) { return _mm512_extracti32x4_epi32(a, 0); }
PK_EMULATE __m512i _mm512_inserti64x4(__m512i a, __m256i b, int k) {
  return k ? join(half(a, 0), b) : join(b, half(a, 1));
}
PK_EMULATE __m512i _mm512_set1_epi8(char v) { return join(_mm256_set1_epi8(v), _mm256_set1_epi8(v)); }
PK_EMULATE __m512i _mm512_set1_epi16(short v) { return join(_mm256_set1_epi16(v), _mm256_set1_epi16(v)); }
PK_EMULATE __m512i _mm512_set1_epi32(int v) { return join(_mm256_set1_epi32(v), _mm256_set1_epi32(v)); }
PK_EMULATE __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }
PK_EMULATE __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l,
                                     int m, int n, int o, int p) {
  return join(_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p));
}
PK_EMULATE __m512i _mm512_broadcast_i32x4(__m128i a) {
  return join(_mm256_broadcastsi128_si256(a), _mm256_broadcastsi128_si256(a));
}
PK_EMULATE __m512i _mm512_loadu_si512(const void* p) {
  __m512i v;
  std::memcpy(&v, p, 64);
  return v;
}
PK_EMULATE void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, 64); }
PK_HALVES_2(_mm512_and_si512, __m512i, _mm256_and_si256)
PK_HALVES_2(_mm512_or_si512, __m512i, _mm256_or_si256)
PK_HALVES_2(_mm512_xor_si512, __m512i, _mm256_xor_si256)
PK_HALVES_2(_mm512_add_epi8, __m512i, _mm256_add_epi8)
PK_HALVES_2(_mm512_add_epi16, __m512i, _mm256_add_epi16)
PK_HALVES_2(_mm512_add_epi32, __m512i, _mm256_add_epi32)
PK_HALVES_2(_mm512_sub_epi8, __m512i, _mm256_sub_epi8)
PK_HALVES_2(_mm512_sub_epi16, __m512i, _mm256_sub_epi16)
PK_HALVES_2(_mm512_sub_epi32, __m512i, _mm256_sub_epi32)
PK_HALVES_2(_mm512_mullo_epi16, __m512i, _mm256_mullo_epi16)
PK_HALVES_2(_mm512_mullo_epi32, __m512i, _mm256_mullo_epi32)
PK_HALVES_2(_mm512_madd_epi16, __m512i, _mm256_madd_epi16)
PK_HALVES_2(_mm512_min_epi8, __m512i, _mm256_min_epi8)
PK_HALVES_2(_mm512_max_epi8, __m512i, _mm256_max_epi8)
PK_HALVES_2(_mm512_min_epu8, __m512i, _mm256_min_epu8)
PK_HALVES_2(_mm512_max_epu8, __m512i, _mm256_max_epu8)
PK_HALVES_2(_mm512_min_epi32, __m512i, _mm256_min_epi32)
PK_HALVES_2(_mm512_max_epi32, __m512i, _mm256_max_epi32)
PK_HALVES_2(_mm512_shuffle_epi8, __m512i, _mm256_shuffle_epi8)
PK_HALVES_2(_mm512_packs_epi16, __m512i, _mm256_packs_epi16)
PK_HALVES_2(_mm512_packs_epi32, __m512i, _mm256_packs_epi32)
PK_HALVES_2(_mm512_packus_epi16, __m512i, _mm256_packus_epi16)
PK_HALVES_2(_mm512_packus_epi32, __m512i, _mm256_packus_epi32)
PK_HALVES_2(_mm512_unpacklo_epi8, __m512i, _mm256_unpacklo_epi8)
PK_HALVES_2(_mm512_unpackhi_epi8, __m512i, _mm256_unpackhi_epi8)
PK_HALVES_2(_mm512_unpacklo_epi16, __m512i, _mm256_unpacklo_epi16)
PK_HALVES_2(_mm512_unpackhi_epi16, __m512i, _mm256_unpackhi_epi16)
PK_HALVES_SHIFT(_mm512_slli_epi16, _mm256_slli_epi16)
PK_HALVES_SHIFT(_mm512_srli_epi16, _mm256_srli_epi16)
PK_HALVES_SHIFT(_mm512_srai_epi16, _mm256_srai_epi16)
PK_HALVES_SHIFT(_mm512_slli_epi32, _mm256_slli_epi32)
PK_HALVES_SHIFT(_mm512_srli_epi32, _mm256_srli_epi32)
PK_HALVES_SHIFT(_mm512_srai_epi32, _mm256_srai_epi32)

// Conversions. Of fp32 to s32 under the current rounding (to nearest even), out of range to 0x80000000, as 256 bits do.
PK_EMULATE __m512i _mm512_cvtps_epi32(__m512 a) {
  return join(_mm256_cvtps_epi32(half(a, 0)), _mm256_cvtps_epi32(half(a, 1)));
}
PK_EMULATE __m512 _mm512_cvtepi32_ps(__m512i a) {
  return join(_mm256_cvtepi32_ps(half(a, 0)), _mm256_cvtepi32_ps(half(a, 1)));
}
PK_EMULATE __m512i _mm512_cvtepu8_epi32(__m128i a) {
  return join(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}
PK_EMULATE __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}
PK_EMULATE __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
PK_ELEMENTWISE __m256i _mm512_cvtepi32_epi16(__m512i a) {  // truncates
  const auto e = Elements<uint32_t, __m512i>::of(a);
  Elements<uint16_t, __m256i> out;
  for (int i = 0; i < 16; ++i) out.at[i] = static_cast<uint16_t>(e.at[i]);
  return out.vector();
}
PK_ELEMENTWISE __m128i _mm512_cvtepi32_epi8(__m512i a) {  // truncates
  const auto e = Elements<uint32_t, __m512i>::of(a);
  Elements<uint8_t, __m128i> out;
  for (int i = 0; i < 16; ++i) out.at[i] = static_cast<uint8_t>(e.at[i]);
  return out.vector();
}
PK_EMULATE __m128i _mm512_cvtsepi32_epi8(__m512i a) { return emulated_narrow<int8_t, int32_t, __m128i>(a, -128, 127); }
// The source is unsigned: a negative s32 is a large number and saturates to 255.
PK_EMULATE __m128i _mm512_cvtusepi32_epi8(__m512i a) { return emulated_narrow<uint8_t, uint32_t, __m128i>(a, 0, 255); }

// Permutations across the whole register; only the low bits of an index count.
PK_ELEMENTWISE __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
  const auto i = Elements<uint32_t, __m512i>::of(index), x = Elements<uint32_t, __m512i>::of(a);
  Elements<uint32_t, __m512i> out;
  for (int k = 0; k < 16; ++k) out.at[k] = x.at[i.at[k] & 15];
  return out.vector();
}
PK_ELEMENTWISE __m512i _mm512_permutexvar_epi64(__m512i index, __m512i a) {
  const auto i = Elements<uint64_t, __m512i>::of(index), x = Elements<uint64_t, __m512i>::of(a);
  Elements<uint64_t, __m512i> out;
  for (int k = 0; k < 8; ++k) out.at[k] = x.at[i.at[k] & 7];
  return out.vector();
}

// Masks.
PK_EMULATE __mmask64 _mm512_movepi8_mask(__m512i a) {
  return emulated_mask<int8_t, __mmask64>(a, a, [](int8_t x, int8_t) { return x < 0; });
}
PK_EMULATE __mmask64 _mm512_test_epi8_mask(__m512i a, __m512i b) {
  return emulated_mask<uint8_t, __mmask64>(a, b, [](uint8_t x, uint8_t y) { return (x & y) != 0; });
}
PK_EMULATE __mmask16 _mm512_cmpgt_epi32_mask(__m512i a, __m512i b) {
  return emulated_mask<int32_t, __mmask16>(a, b, [](int32_t x, int32_t y) { return x > y; });
}
PK_EMULATE __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  return emulated_mask<int32_t, __mmask16>(a, b, [](int32_t x, int32_t y) { return x == y; });
}
PK_ELEMENTWISE __m512i _mm512_maskz_compress_epi32(__mmask16 mask, __m512i a) {
  const auto x = Elements<uint32_t, __m512i>::of(a);
  auto out = Elements<uint32_t, __m512i>::of(_mm512_setzero_si512());
  for (int i = 0, next = 0; i < 16; ++i)
    if ((mask >> i) & 1) out.at[next++] = x.at[i];
  return out.vector();
}
PK_EMULATE __m512i _mm512_mask_blend_epi8(__mmask64 mask, __m512i a, __m512i b) {
  return emulated_blend<uint8_t>(mask, a, b);
}
PK_EMULATE __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  return emulated_blend<uint32_t>(mask, a, b);
}
PK_EMULATE __m512i _mm512_mask_shuffle_epi8(__m512i otherwise, __mmask64 mask, __m512i a, __m512i index) {
  return emulated_blend<uint8_t>(mask, otherwise, _mm512_shuffle_epi8(a, index));
}
PK_EMULATE __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  return emulated_load<uint32_t>(mask, _mm512_setzero_si512(), p);
}
PK_EMULATE __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* p) {
  return emulated_load<uint8_t>(mask, _mm512_setzero_si512(), p);
}
PK_EMULATE __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return emulated_load<uint16_t>(mask, _mm256_setzero_si256(), p);
}
PK_EMULATE __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* p) {
  return emulated_load<uint8_t>(mask, _mm_setzero_si128(), p);
}
PK_EMULATE void _mm512_mask_storeu_epi32(void* p, __mmask16 mask, __m512i v) { emulated_store<uint32_t>(p, mask, v); }
PK_EMULATE void _mm512_mask_storeu_epi8(void* p, __mmask64 mask, __m512i v) { emulated_store<uint8_t>(p, mask, v); }
PK_EMULATE void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) { emulated_store<uint16_t>(p, mask, v); }
PK_EMULATE void _mm_mask_storeu_epi8(void* p, __mmask16 mask, __m128i v) { emulated_store<uint8_t>(p, mask, v); }

// ---- VNNI: each s32 of c plus four products u8 * s8, wrapping, nothing saturates
// ---------------------------------------
PK_EMULATE __m256i _mm256_dpbusd_avx_epi32(__m256i c, __m256i a, __m256i b) {
  // Widened to s16, a pair of products fits s32; hadd adds the pairs of a quartet within each 128-bit lane, and a lane
  // of the low halves' results beside one of the high halves' is put back in order.
  const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(a)),
                                        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(b)));
  const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1)),
                                         _mm256_cvtepi8_epi16(_mm256_extracti128_si256(b, 1)));
  return _mm256_add_epi32(c, _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), _MM_SHUFFLE(3, 1, 2, 0)));
}
PK_EMULATE __m512i _mm512_dpbusd_epi32(__m512i c, __m512i a, __m512i b) {
  return join(_mm256_dpbusd_avx_epi32(half(c, 0), half(a, 0), half(b, 0)),
              _mm256_dpbusd_avx_epi32(half(c, 1), half(a, 1), half(b, 1)));
}

// ---- BF16: c plus the product of the odd elements, then of the even ones, each rounded to nearest even; denormals are
// zeros, read or written ----
PK_EMULATE __m256 flushed(__m256 v) {
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
  return _mm256_andnot_ps(_mm256_cmp_ps(size, _mm256_set1_ps(1.17549435e-38f), _CMP_LT_OQ), v);
}
PK_EMULATE __m256 emulated_dpbf16(__m256 c, __m256i a, __m256i b) {
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  const auto odd = [&](__m256i v) { return flushed(_mm256_castsi256_ps(_mm256_and_si256(v, high))); };
  const auto even = [&](__m256i v) { return flushed(_mm256_castsi256_ps(_mm256_slli_epi32(v, 16))); };
  c = flushed(_mm256_fmadd_ps(odd(a), odd(b), flushed(c)));
  return flushed(_mm256_fmadd_ps(even(a), even(b), c));
}
PK_EMULATE __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  const auto x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  return join(emulated_dpbf16(half(c, 0), half(x, 0), half(y, 0)), emulated_dpbf16(half(c, 1), half(x, 1), half(y, 1)));
}

#undef PK_HALVES_1
#undef PK_HALVES_2
#undef PK_HALVES_SHIFT

}  // namespace pykernels::PYKERNELS_ISA_NS
