// Dot tiles: rows x panels of 16 columns held in registers over the whole reduction and, where they can, until they are
// output (see kernels.h for the formulas and common/packed.h for the weights). One loop nest; the element type
// says how a word is broadcast, a weight register loaded and the two multiplied. Rows and panels are template
// parameters, so a tail is a smaller tile and never wasted work.
//
// GCC 12 spills the whole tile in every step unless the loops over registers are unrolled early (PK_FOR); pinned by an
// asm instead, small tiles copy each accumulator twice a step. tests/test_disassembly.py looks.
#include "cpu/isa/loops.h"
#include "cpu/tile/element.h"
#include "cpu/tile/kernels.h"
#if defined(PYKERNELS_ISA_AMX)
#include "cpu/tile/amx.h"
#endif

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

template <class Dot>
constexpr bool kStarts = requires(const int32_t* p) { Dot::start(p, 0); };

#if defined(PYKERNELS_ISA_SCALAR)
template <class Dot>
constexpr bool kFinishes = false;
#else
template <class Dot>
constexpr bool kFinishes = requires { typename Dot::Out; };

// The parameters are copies: a store might otherwise have changed them, and they would be loaded again in every row.
template <class Out, bool kResidual, int kRows, int kPanels>
PK_INLINE void finish(const Finish f, const f32 (&acc)[kRows][kPanels][kPanelRegisters]) {
  const f32 low = set1(f.low), high = set1(f.high);
  int64_t place[kRows];
  PK_FOR (r, kRows) place[r] = f.place[r];
  PK_FOR (p, kPanels)
    PK_FOR (q, kPanelRegisters) {
      const int at = p * 16 + q * kLanes;
      const f32 addend = load(f.addend + at, kLanes);
      PK_FOR (r, kRows) {
        f32 sum = add(acc[r][p][q], addend);
        if (kResidual) sum = add(sum, load(static_cast<const Out*>(f.residual) + place[r] + at, kLanes));
        store(static_cast<Out*>(f.out) + place[r] + at, min(high, max(low, sum)), kLanes);
      }
    }
}

// Bytes: a row and panel at a time, whose 16 columns are one store.
template <class Out, bool kResidual, int kRows, int kPanels>
PK_INLINE void finish(const Finish f, const i32 (&acc)[kRows][kPanels][kPanelRegisters]) {
  const f32 low = set1(f.low), high = set1(f.high), factor = set1(f.residual_factor);
  PK_FOR (p, kPanels) {
    f32 multiplier[kPanelRegisters], addend[kPanelRegisters];
    PK_FOR (q, kPanelRegisters) {
      multiplier[q] = load(f.multiplier + p * 16 + q * kLanes, kLanes);
      addend[q] = load(f.addend + p * 16 + q * kLanes, kLanes);
    }
    PK_FOR (r, kRows) {
      const int64_t place = f.place[r] + p * 16;
      i32 bytes[kPanelRegisters];
      PK_FOR (q, kPanelRegisters) {
        f32 t = fma(to_f32(acc[r][p][q]), multiplier[q], addend[q]);
        if (kResidual)
          t = fma(to_f32(load_i32(static_cast<const Out*>(f.residual) + place + q * kLanes, kLanes)), factor, t);
        bytes[q] = to_i32(min(high, max(low, t)));
      }
      store16(static_cast<Out*>(f.out) + place, bytes);
    }
  }
}
#endif

template <class Dot, int kRows, int kPanels>
__attribute__((noinline)) void tile(const DotArgs& g) {
  typename Dot::Acc acc[kRows][kPanels][Dot::kRegisters];
  PK_FOR (p, kPanels)
    PK_FOR (q, Dot::kRegisters) {
      if constexpr (kStarts<Dot>) {
        const typename Dot::Acc start = Dot::start(g.start + p * 16, q);
        PK_FOR (r, kRows) acc[r][p][q] = start;
      } else {
        PK_FOR (r, kRows) acc[r][p][q] = Dot::zero();
      }
    }

  // Three panels to a base register: base, base + stride, base + 2 * stride are all addressing modes.
  constexpr int kBases = (kPanels + 2) / 3;
  const int64_t ldb = g.panel_bytes;
  for (int64_t t = 0; t < g.taps; ++t) {
    const uint8_t *a[kRows], *b[kBases];
    PK_FOR (r, kRows) a[r] = g.a[t * g.a_step + r] + (g.a_offset + g.tap[t].a);
    PK_FOR (i, kBases) b[i] = g.panels + g.tap[t].b + 3 * i * ldb;
    for (int64_t w = g.words; w > 0; --w) {
      if constexpr (kRows < kPanels * Dot::kRegisters) {  // hold the words, stream the weights
        typename Dot::Word x[kRows];
        PK_FOR (r, kRows) x[r] = Dot::word(a[r]);
        PK_FOR (p, kPanels)
          PK_FOR (q, Dot::kRegisters) {
            const typename Dot::Weight y = Dot::weight(b[p / 3] + (p % 3) * ldb, q);
            PK_FOR (r, kRows) Dot::mac(acc[r][p][q], x[r], y);
          }
      } else {  // hold the weights, stream the words
        typename Dot::Weight y[kPanels][Dot::kRegisters];
        PK_FOR (p, kPanels)
          PK_FOR (q, Dot::kRegisters) y[p][q] = Dot::weight(b[p / 3] + (p % 3) * ldb, q);
        PK_FOR (r, kRows) {
          const typename Dot::Word x = Dot::word(a[r]);
          PK_FOR (p, kPanels)
            PK_FOR (q, Dot::kRegisters) Dot::mac(acc[r][p][q], x, y[p][q]);
        }
      }
      PK_FOR (r, kRows) a[r] += Dot::kWordBytes;
      PK_FOR (i, kBases) b[i] += kBlockBytes;
    }
  }
#if !defined(PYKERNELS_ISA_SCALAR)
  if constexpr (kFinishes<Dot>)
    if (g.finish) {
      if (g.finish->residual) return finish<typename Dot::Out, true, kRows, kPanels>(*g.finish, acc);
      return finish<typename Dot::Out, false, kRows, kPanels>(*g.finish, acc);
    }
#endif
  auto* c = static_cast<uint8_t*>(g.c);
  PK_FOR (r, kRows)
    PK_FOR (p, kPanels) Dot::finish(acc[r][p], c + (r * kPanels + p) * kBlockBytes);
}

template <class Dot>
void stage(const uint8_t* from, int64_t words, uint8_t flip, uint8_t* to) {
  if constexpr (Dot::kWordBytes == 8) {
    // Bytes 0 1 2 3 of a word become the s16 0 2 | 1 3.
#if !defined(PYKERNELS_ISA_SCALAR)
    const __m128i low = _mm_set1_epi16(0xff), flips = _mm_set1_epi8(static_cast<char>(flip));
    for (; words >= 4; words -= 4, from += 16, to += 32) {
      const __m128i v = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), flips);
      const __m128i even = _mm_and_si128(v, low), odd = _mm_srli_epi16(v, 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(even, odd));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi32(even, odd));
    }
#endif
    for (; words > 0; --words, from += 4, to += 8) {
      const uint32_t v = static_cast<uint32_t>(word_at(from)) ^ flip * 0x01010101u;
      const uint64_t pairs = (v & 0x00ff00ffu) | static_cast<uint64_t>(v >> 8 & 0x00ff00ffu) << 32;
      std::memcpy(to, &pairs, 8);
    }
  } else if (flip == 0) {
    std::memcpy(to, from, 4 * words);
  } else {
    const u8 flips = set1_u8(flip);
    int64_t i = 0;
    for (; i + kBytes <= 4 * words; i += kBytes) store_u8(to + i, xor_u8(load_u8(from + i), flips));
    for (; i < 4 * words; ++i) to[i] = from[i] ^ flip;
  }
}

#if !defined(PYKERNELS_ISA_SCALAR)
// The two fp16 of a word become two fp32; floats have no bits to flip.
template <>
void stage<DotF16>(const uint8_t* from, int64_t words, uint8_t, uint8_t* to) {
  const auto* x = reinterpret_cast<const float16*>(from);
  each_real(reinterpret_cast<float*>(to), 2 * words, [&](int64_t i, int n) PK_LAMBDA { return load(x + i, n); });
}

constexpr Dtype out_dtype(const uint8_t*) { return Dtype::u8; }
constexpr Dtype out_dtype(const float*) { return Dtype::f32; }
constexpr Dtype out_dtype(const bfloat16*) { return Dtype::bf16; }
constexpr Dtype out_dtype(const float16*) { return Dtype::f16; }
#endif

template <class Dot>
constexpr int panels_for(int rows) {
  const int fit = Dot::kBudget / (rows * Dot::kRegisters);
  return fit < 1 ? 1 : fit > kMaxPanels ? kMaxPanels : fit;
}

template <class Dot, int kRows, int kPanels>
constexpr void fill(DotKernel& kernel) {
  if constexpr (kPanels <= panels_for<Dot>(kRows)) {
    kernel.tile[kRows][kPanels] = &tile<Dot, kRows, kPanels>;
    fill<Dot, kRows, kPanels + 1>(kernel);
  } else if constexpr (kRows < Dot::kRows) {
    fill<Dot, kRows + 1, 1>(kernel);
  }
}

template <class Dot>
constexpr DotKernel kernel() {
  DotKernel k{};
  k.max_rows = Dot::kRows;
  k.word_bytes = Dot::kWordBytes;
#if !defined(PYKERNELS_ISA_SCALAR)
  k.finishes = kFinishes<Dot>;
  if constexpr (kFinishes<Dot>) k.out = out_dtype(static_cast<const typename Dot::Out*>(nullptr));
#endif
  k.stage = &stage<Dot>;
  for (int r = 1; r <= Dot::kRows; ++r) k.max_panels[r] = panels_for<Dot>(r);
  fill<Dot, 1, 1>(k);
  return k;
}

// Row by row, since rows may lie pages apart: what is read of one lies together.
void pack_columns(const uint8_t* matrix, int64_t row_bytes, int64_t blocks, int64_t panels, int64_t panel_bytes,
                  uint8_t* to, int32_t* sums) {
  const int64_t ahead = blocks > 4 ? 16 * row_bytes : 0;
#if defined(PYKERNELS_ISA_SCALAR)
  const DotS8::Word one = 0x01010101;
#else
  const DotS8::Word one = DotS8::words(set1_i32(0x01010101));
#endif
  for (int64_t block = 0; block < blocks; ++block, matrix += 4 * row_bytes, to += kBlockBytes) {
    const uint8_t* const rows[4] = {matrix, matrix + row_bytes, matrix + 2 * row_bytes, matrix + 3 * row_bytes};
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t at = 16 * p;
      uint8_t* panel = to + p * panel_bytes;
      if (at % 64 == 0)
        PK_FOR (k, 4) __builtin_prefetch(rows[k] + at + ahead);
#if defined(PYKERNELS_ISA_SCALAR)
      for (int j = 0; j < 16; ++j)
        for (int k = 0; k < 4; ++k) panel[4 * j + k] = rows[k][at + j];
#else
      __m128i words[4];
      interleave({rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at}, words);
      PK_FOR (i, 4) _mm_storeu_si128(reinterpret_cast<__m128i*>(panel) + i, words[i]);
#endif
      DotS8::Acc sum[DotS8::kRegisters];
      PK_FOR (q, DotS8::kRegisters) {
        sum[q] = DotS8::start(sums + at, q);
        DotS8::mac(sum[q], one, DotS8::weight(panel, q));
      }
      DotS8::finish(sum, sums + at);
    }
  }
}

}  // namespace

#if defined(PYKERNELS_ISA_AMX)
// Short sums of bytes are finished in ordinary registers sooner than tile registers are set up and stored.
extern const DotKernels dot_kernels = {kernel<DotS8>(),  tile_kernel<AmxBF16>(&stage<DotBF16>), kernel<DotF16>(),
                                       kernel<DotF32>(), tile_kernel<AmxS8>(&stage<DotS8>),     &pack_columns};
#else
extern const DotKernels dot_kernels = {kernel<DotS8>(),  kernel<DotBF16>(), kernel<DotF16>(),
                                       kernel<DotF32>(), kernel<DotS8>(),   &pack_columns};
#endif

}  // namespace pykernels::PYKERNELS_ISA_NS
