// What a dot product of 4-byte words is on each isa, for s8, bf16, fp16 and fp32 weights. For sources compiled once per
// isa.
#pragma once

#include "cpu/isa/vec.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

PK_INLINE int32_t word_at(const uint8_t* p) {
  int32_t w;
  std::memcpy(&w, p, 4);
  return w;
}
PK_INLINE float float_at(const uint8_t* p) {
  float f;
  std::memcpy(&f, p, 4);
  return f;
}

// A loop over register arrays. Unrolled this early, GCC sees constant indices and keeps the arrays in registers; where
// the optimizer unrolls by itself, later, the accumulators go through the stack in every step.
#define PK_FOR(i, n) _Pragma("GCC unroll 32") for (int i = 0; i < (n); ++i)

// An element type:
//   kRegisters   accumulators of one row and panel          kBudget   accumulators a tile may hold
//   kRows        rows of the largest tile                    kWordBytes   of A as the driver lays it out (kernels.h)
//   word(p)      the word at p for every column              weight(b, q)   register q of the block at b
//   words(v)     a register of words, one for every column (s8 on vector isas)
//   Half         the 16-bit float of which a word holds two
//   mac(c, x, w) adds the product                            finish(c, out)  writes the 16 sums of a row and panel
//   zero()       where sums of floats begin                   start(p, q)   register q of the sums of bytes that begin
//   at p Out          what tiles on vector isas write of themselves (Finish of kernels.h)
#if defined(PYKERNELS_ISA_SCALAR)

struct Column16 {
  int32_t v[16];
};
struct DotS8 {
  static constexpr int kRegisters = 1, kBudget = 2, kRows = 2, kWordBytes = 4;
  using Acc = Column16;
  using Word = uint32_t;
  using Weight = const int8_t*;
  PK_INLINE Acc start(const int32_t* p, int) {
    Acc c;
    std::memcpy(&c, p, sizeof(c));
    return c;
  }
  PK_INLINE Word word(const uint8_t* p) { return static_cast<uint32_t>(word_at(p)); }
  PK_INLINE Weight weight(const uint8_t* b, int) { return reinterpret_cast<const int8_t*>(b); }
  PK_INLINE void mac(Acc& c, Word x, Weight w) {
    for (int j = 0; j < 16; ++j)
      for (int k = 0; k < 4; ++k) c.v[j] += static_cast<int32_t>((x >> (8 * k)) & 255) * w[4 * j + k];
  }
  PK_INLINE void finish(const Acc* c, void* out) { std::memcpy(out, c->v, 64); }
};
struct Real16 {
  float v[16];
};
struct DotF32 {
  static constexpr int kRegisters = 1, kBudget = 2, kRows = 2, kWordBytes = 4;
  using Acc = Real16;
  using Word = float;
  using Weight = const uint8_t*;
  PK_INLINE Acc zero() { return {}; }
  PK_INLINE Word word(const uint8_t* p) { return float_at(p); }
  PK_INLINE Weight weight(const uint8_t* b, int) { return b; }
  PK_INLINE void mac(Acc& c, Word x, Weight w) {
    for (int j = 0; j < 16; ++j) c.v[j] += x * float_at(w + 4 * j);
  }
  PK_INLINE void finish(const Acc* c, void* out) { std::memcpy(out, c->v, 64); }
};
template <class T>
struct DotHalf : DotF32 {
  using Half = T;
  using Word = const T*;
  using Weight = const T*;
  PK_INLINE Word word(const uint8_t* p) { return reinterpret_cast<const T*>(p); }
  PK_INLINE Weight weight(const uint8_t* b, int) { return reinterpret_cast<const T*>(b); }
  PK_INLINE void mac(Acc& c, Word x, Weight w) {
    for (int j = 0; j < 16; ++j)
      for (int k = 0; k < 2; ++k) c.v[j] += load(x + k) * load(w + 2 * j + k);
  }
};
struct DotBF16 : DotHalf<bfloat16> {};
struct DotF16 : DotHalf<float16> {};

#else  // vector isas

struct Rows {
  const uint8_t* at[4];
};
// 16 bytes of each of four rows as 16 words, one byte of each row in a word: q[i] holds words 4i .. 4i+3.
PK_INLINE void interleave(const Rows& rows, __m128i* q) {
  __m128i t[4];
  PK_FOR (k, 4) t[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.at[k]));
  const __m128i low01 = _mm_unpacklo_epi8(t[0], t[1]), high01 = _mm_unpackhi_epi8(t[0], t[1]);
  const __m128i low23 = _mm_unpacklo_epi8(t[2], t[3]), high23 = _mm_unpackhi_epi8(t[2], t[3]);
  q[0] = _mm_unpacklo_epi16(low01, low23);
  q[1] = _mm_unpackhi_epi16(low01, low23);
  q[2] = _mm_unpacklo_epi16(high01, high23);
  q[3] = _mm_unpackhi_epi16(high01, high23);
}

constexpr int kPanelRegisters = 16 / kLanes;  // fp32 or s32 registers of 16 columns

struct DotF32 {
#if defined(PYKERNELS_ISA_AVX512) || defined(PYKERNELS_ISA_AVX512VNNI)
  static constexpr int kBudget = 24, kRows = 12;
#else
  static constexpr int kBudget = 12, kRows = 6;
#endif
  static constexpr int kRegisters = kPanelRegisters, kWordBytes = 4;
  using Out = float;
  using Acc = f32;
  using Word = f32;
  using Weight = f32;
  PK_INLINE Acc zero() { return set1(0.0f); }
  PK_INLINE Word word(const uint8_t* p) { return set1(float_at(p)); }
  PK_INLINE Weight weight(const uint8_t* b, int q) {
    return load(reinterpret_cast<const float*>(b) + q * kLanes, kLanes);
  }
  PK_INLINE void mac(Acc& c, Word x, Weight w) { c = fma(x, w, c); }
  PK_INLINE void finish(const Acc* c, void* out) {
    for (int q = 0; q < kRegisters; ++q) store(static_cast<float*>(out) + q * kLanes, c[q], kLanes);
  }
};

// The two 16-bit floats of a word, as fp32.
template <class T>
struct DotHalf : DotF32 {
  static constexpr int kBudget = DotF32::kBudget * 2 / 3, kRows = DotF32::kRows * 2 / 3;
  struct Pair {
    f32 low, high;
  };
  using Half = T;
  using Out = T;
  using Word = Pair;
  using Weight = Pair;
  PK_INLINE i32 words_at(const uint8_t* b, int q) {
    return load_i32(reinterpret_cast<const int32_t*>(b) + q * kLanes, kLanes);
  }
  PK_INLINE void mac(Acc& c, Word x, Weight w) { c = fma(x.high, w.high, fma(x.low, w.low, c)); }
};

#if defined(PYKERNELS_ISA_AVX512BF16)

// Both products of a word and their sums in one instruction, which takes denormals for zeros.
struct DotBF16 : DotF32 {
  using Half = bfloat16;
  using Out = bfloat16;
  using Word = i32;
  using Weight = i32;
  PK_INLINE Word word(const uint8_t* p) { return set1_i32(word_at(p)); }
  PK_INLINE Weight weight(const uint8_t* b, int) { return _mm512_loadu_si512(b); }
  PK_INLINE void mac(Acc& c, Word x, Weight w) {
    c = _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

#else

// bf16: the low half shifted up, the high half masked.
struct DotBF16 : DotHalf<bfloat16> {
  PK_INLINE Pair split(i32 v) {
#if defined(PYKERNELS_ISA_AVX512) || defined(PYKERNELS_ISA_AVX512VNNI)
    return {cast_f32(shift_left<16>(v)), cast_f32(_mm512_and_si512(v, set1_i32(static_cast<int32_t>(0xffff0000))))};
#else
    return {cast_f32(shift_left<16>(v)), cast_f32(_mm256_and_si256(v, set1_i32(static_cast<int32_t>(0xffff0000))))};
#endif
  }
  PK_INLINE Word word(const uint8_t* p) { return split(set1_i32(word_at(p))); }
  PK_INLINE Weight weight(const uint8_t* b, int q) { return split(words_at(b, q)); }
};

#endif

// fp16: the driver converts A once a tile, the weights are sorted into low and high halves and converted here.
struct DotF16 : DotHalf<float16> {
  static constexpr int kWordBytes = 8;
  PK_INLINE Pair split(i32 v) {
#if defined(PYKERNELS_ISA_AVX512) || defined(PYKERNELS_ISA_AVX512VNNI)
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)), _mm512_cvtph_ps(_mm512_cvtepi32_epi16(shift_right<16>(v)))};
#else
    const __m256i low = _mm256_and_si256(v, set1_i32(0xffff));
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, shift_right<16>(v)), 0xd8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#endif
  }
  PK_INLINE Word word(const uint8_t* p) { return {set1(float_at(p)), set1(float_at(p + 4))}; }
  PK_INLINE Weight weight(const uint8_t* b, int q) { return split(words_at(b, q)); }
};

#if defined(PYKERNELS_ISA_AVX512VNNI)

struct DotS8 {
  static constexpr int kRegisters = 1, kBudget = 24, kRows = 12, kWordBytes = 4;
  using Out = uint8_t;
  using Acc = i32;
  using Word = i32;
  using Weight = i32;
  PK_INLINE Acc start(const int32_t* p, int q) { return load_i32(p + q * kLanes); }
  PK_INLINE Word word(const uint8_t* p) { return set1_i32(word_at(p)); }
  PK_INLINE Word words(i32 v) { return v; }
  PK_INLINE Weight weight(const uint8_t* b, int) { return _mm512_loadu_si512(b); }
  PK_INLINE void mac(Acc& c, Word x, Weight w) { c = _mm512_dpbusd_epi32(c, x, w); }
  PK_INLINE void finish(const Acc* c, void* out) { store_i32(static_cast<int32_t*>(out), *c); }
};

#elif defined(PYKERNELS_ISA_AVXVNNI)

struct DotS8 {
  static constexpr int kRegisters = 2, kBudget = 12, kRows = 6, kWordBytes = 4;
  using Out = uint8_t;
  using Acc = i32;
  using Word = i32;
  using Weight = i32;
  PK_INLINE Acc start(const int32_t* p, int q) { return load_i32(p + q * kLanes); }
  PK_INLINE Word word(const uint8_t* p) { return set1_i32(word_at(p)); }
  PK_INLINE Word words(i32 v) { return v; }
  PK_INLINE Weight weight(const uint8_t* b, int q) { return load_i32(reinterpret_cast<const int32_t*>(b) + q * 8); }
  PK_INLINE void mac(Acc& c, Word x, Weight w) { c = _mm256_dpbusd_avx_epi32(c, x, w); }
  PK_INLINE void finish(const Acc* c, void* out) {
    for (int q = 0; q < 2; ++q) store_i32(static_cast<int32_t*>(out) + q * 8, c[q]);
  }
};

#else  // avx2 and avx512 without VNNI

// Bytes as s16 pairs, multiplied and added exactly (vpmaddwd; vpmaddubsw would saturate): the even bytes of a word in
// one register, the odd ones in another, so that a lane still is a column. The driver widens A once a tile (kWordBytes
// is 8), the weights are widened here: two shifts and one, shared by the rows of the tile.
struct DotS8 {
#if defined(PYKERNELS_ISA_AVX512)
  static constexpr int kBudget = 20, kRows = 10;
#else
  static constexpr int kBudget = 8, kRows = 4;
#endif
  static constexpr int kRegisters = kPanelRegisters, kWordBytes = 8;
  struct Pair {
    i32 even, odd;
  };
  using Out = uint8_t;
  using Acc = i32;
  using Word = Pair;
  using Weight = Pair;
  PK_INLINE Acc start(const int32_t* p, int q) { return load_i32(p + q * kLanes); }
  PK_INLINE Word word(const uint8_t* p) { return {set1_i32(word_at(p)), set1_i32(word_at(p + 4))}; }
#if defined(PYKERNELS_ISA_AVX512)
  PK_INLINE Word words(i32 v) { return {_mm512_and_si512(v, set1_i32(0x00ff00ff)), _mm512_srli_epi16(v, 8)}; }
  PK_INLINE Weight weight(const uint8_t* b, int) {
    const i32 v = _mm512_loadu_si512(b);
    return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)};
  }
  PK_INLINE i32 dot(i32 a, i32 b) { return _mm512_madd_epi16(a, b); }
#else
  PK_INLINE Word words(i32 v) { return {_mm256_and_si256(v, set1_i32(0x00ff00ff)), _mm256_srli_epi16(v, 8)}; }
  PK_INLINE Weight weight(const uint8_t* b, int q) {
    const i32 v = load_i32(reinterpret_cast<const int32_t*>(b) + q * kLanes);
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  PK_INLINE i32 dot(i32 a, i32 b) { return _mm256_madd_epi16(a, b); }
#endif
  PK_INLINE void mac(Acc& c, Word x, Weight w) { c = add(add(c, dot(x.even, w.even)), dot(x.odd, w.odd)); }
  PK_INLINE void finish(const Acc* c, void* out) {
    for (int q = 0; q < kRegisters; ++q) store_i32(static_cast<int32_t*>(out) + q * kLanes, c[q]);
  }
};

#endif
#endif

}  // namespace
}  // namespace pykernels::PYKERNELS_ISA_NS
