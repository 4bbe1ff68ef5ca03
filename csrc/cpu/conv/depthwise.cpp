// Depthwise kernels (formula in kernels.h). A few pixels at a time share each load of the weights; the taps of a word
// are interleaved per channel so that the dot product of cpu/tile/element.h serves here too.
#include "cpu/conv/kernels.h"
#include "cpu/tile/element.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

// An element type's word of taps for 16 channels, times the block of weights at b, added to c.
#if defined(PYKERNELS_ISA_SCALAR)

PK_INLINE void mac_taps(DotS8, DotS8::Acc* c, const uint8_t* const* tap, int64_t at, const uint8_t* b) {
  for (int j = 0; j < 16; ++j)
    for (int k = 0; k < 4; ++k) c->v[j] += int32_t{tap[k][at + j]} * static_cast<int8_t>(b[4 * j + k]);
}
template <class Dot, class Half = typename Dot::Half>
PK_INLINE void mac_taps(Dot, typename Dot::Acc* c, const uint8_t* const* tap, int64_t at, const uint8_t* b) {
  const auto* w = reinterpret_cast<const Half*>(b);
  for (int j = 0; j < 16; ++j)
    for (int k = 0; k < 2; ++k) c->v[j] += load(reinterpret_cast<const Half*>(tap[k] + at) + j) * load(w + 2 * j + k);
}
PK_INLINE void mac_taps(DotF32, DotF32::Acc* c, const uint8_t* const* tap, int64_t at, const uint8_t* b) {
  for (int j = 0; j < 16; ++j) c->v[j] += float_at(tap[0] + at + 4 * j) * float_at(b + 4 * j);
}

#else

PK_INLINE __m256i join(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

PK_INLINE void mac_taps(DotS8, DotS8::Acc* c, const uint8_t* const* tap, int64_t at, const uint8_t* b) {
  __m128i q[4];
  interleave({tap[0] + at, tap[1] + at, tap[2] + at, tap[3] + at}, q);
#if defined(PYKERNELS_ISA_AVX512) || defined(PYKERNELS_ISA_AVX512VNNI)
  const __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(join(q[0], q[1])), join(q[2], q[3]), 1);
  DotS8::mac(c[0], DotS8::words(x), DotS8::weight(b, 0));
#else
  PK_FOR (i, 2) DotS8::mac(c[i], DotS8::words(join(q[2 * i], q[2 * i + 1])), DotS8::weight(b, i));
#endif
}
template <class Dot, class Half = typename Dot::Half>
PK_INLINE void mac_taps(Dot, typename Dot::Acc* c, const uint8_t* const* tap, int64_t at, const uint8_t* b) {
  PK_FOR (q, kPanelRegisters) {
    const typename Dot::Pair x = {load(reinterpret_cast<const Half*>(tap[0] + at) + q * kLanes, kLanes),
                                  load(reinterpret_cast<const Half*>(tap[1] + at) + q * kLanes, kLanes)};
    Dot::mac(c[q], x, Dot::weight(b, q));
  }
}
#if defined(PYKERNELS_ISA_AVX512BF16)
PK_INLINE void mac_taps(DotBF16, DotBF16::Acc* c, const uint8_t* const* tap, int64_t at, const uint8_t* b) {
  const auto wide = [&](int k) __attribute__((always_inline)) {
    return _mm512_cvtepu16_epi32(load_words16(tap[k] + at, kLanes));
  };
  DotBF16::mac(c[0], bit_or(wide(0), shift_left<16>(wide(1))), DotBF16::weight(b, 0));
}
#endif
PK_INLINE void mac_taps(DotF32, DotF32::Acc* c, const uint8_t* const* tap, int64_t at, const uint8_t* b) {
  PK_FOR (q, kPanelRegisters)
    DotF32::mac(c[q], load(reinterpret_cast<const float*>(tap[0] + at) + q * kLanes, kLanes), DotF32::weight(b, q));
}

#endif

template <class Dot>
constexpr int taps_per_word = 1;
template <>
constexpr int taps_per_word<DotS8> = 4;
template <>
constexpr int taps_per_word<DotBF16> = 2;
template <>
constexpr int taps_per_word<DotF16> = 2;

// A panel's sums of one pixel to c; those of fp32 with their bias and clamp.
template <class Dot>
PK_INLINE void finish(Dot, const DepthwiseArgs&, const typename Dot::Acc* acc, uint8_t* c) {
  Dot::finish(acc, c);
}
#if defined(PYKERNELS_ISA_SCALAR)
PK_INLINE void finish(DotF32, const DepthwiseArgs& g, const Real16* acc, uint8_t* c) {
  for (int j = 0; j < 16; ++j)
    store(reinterpret_cast<float*>(c) + j, min(g.high, max(g.low, acc->v[j] + (g.bias ? g.bias[j] : -0.0f))));
}
#else
struct Clamp {
  f32 bias, low, high;
};
PK_INLINE Clamp make_clamp(const DepthwiseArgs& g, int q) {
  return {g.bias ? load(g.bias + q * kLanes, kLanes) : set1(-0.0f), set1(g.low), set1(g.high)};
}
PK_INLINE f32 clamp(const Clamp& c, f32 f) { return min(c.high, max(c.low, add(f, c.bias))); }

PK_INLINE void finish(DotF32, const DepthwiseArgs& g, const f32* acc, uint8_t* c) {
  PK_FOR (q, kPanelRegisters) store(reinterpret_cast<float*>(c) + q * kLanes, clamp(make_clamp(g, q), acc[q]), kLanes);
}
#endif

template <class Dot, int kPixels>
PK_INLINE void pixels(const DepthwiseArgs& g, int64_t at, uint8_t* c) {
  typename Dot::Acc acc[kPixels][Dot::kRegisters];
  PK_FOR (x, kPixels)
    PK_FOR (q, Dot::kRegisters) {
      if constexpr (requires { Dot::start(g.start, q); })
        acc[x][q] = Dot::start(g.start, q);
      else
        acc[x][q] = Dot::zero();
    }
  for (int64_t w = 0; w < g.words; ++w)
    PK_FOR (x, kPixels)
      mac_taps(Dot{}, acc[x], g.tap + w * taps_per_word<Dot>, at + x * g.x_stride, g.panel + w * kBlockBytes);
  PK_FOR (x, kPixels) finish(Dot{}, g, acc[x], c + x * g.ldc * 4);
}

template <class Dot>
void depthwise(const DepthwiseArgs& g) {
  // As many as stay in registers; the words of bytes take two of them on isas that multiply s16.
  constexpr bool kWide = taps_per_word<Dot> == 4 && Dot::kRegisters * Dot::kWordBytes > 8;
  constexpr int kPixels = Dot::kRegisters > 2 || kWide ? 2 : 4;
  auto* c = static_cast<uint8_t*>(g.c);
  int64_t x = 0;
  for (; x + kPixels <= g.pixels; x += kPixels) pixels<Dot, kPixels>(g, g.at + x * g.x_stride, c + x * g.ldc * 4);
  for (; x < g.pixels; ++x) pixels<Dot, 1>(g, g.at + x * g.x_stride, c + x * g.ldc * 4);
}

#if !defined(PYKERNELS_ISA_SCALAR)
// 3x3, one vector of channels: the nine weights stay in registers; each row sums apart, for shorter chains.
PK_INLINE void f32_3x3(const uint8_t* const* row, int64_t right, int64_t stride, const uint8_t* weights,
                       const Clamp& limits, float* c, int64_t ldc, int64_t pixels) {
  const uint8_t *top = row[0], *middle = row[1], *bottom = row[2];
  f32 w[9];
  PK_FOR (t, 9) w[t] = DotF32::weight(weights + t * kBlockBytes, 0);
  const auto sum = [&](const uint8_t* a, const f32* v) __attribute__((always_inline)) {
    const auto at = [&](int j) __attribute__((always_inline)) {
      return load(reinterpret_cast<const float*>(a + j * right), kLanes);
    };
    return fma(at(2), v[2], fma(at(1), v[1], mul(at(0), v[0])));
  };
  for (int64_t x = 0; x < pixels; ++x, top += stride, middle += stride, bottom += stride, c += ldc)
    store(c, clamp(limits, add(add(sum(top, w), sum(middle, w + 3)), sum(bottom, w + 6))), kLanes);
}

void f32_3x3(const DepthwiseArgs& g) {
  constexpr int64_t kBlock = 16;  // pixels: both vectors of a panel, which share cache lines, soon after another
  const int64_t right = g.tap[1] - g.tap[0];
  for (int64_t x = 0; x < g.pixels; x += kBlock) {
    const int64_t pixels = g.pixels - x < kBlock ? g.pixels - x : kBlock;
    for (int q = 0; q < kPanelRegisters; ++q) {
      const int64_t at = g.at + x * g.x_stride + q * kLanes * 4;
      const uint8_t* const row[3] = {g.tap[0] + at, g.tap[3] + at, g.tap[6] + at};
      f32_3x3(row, right, g.x_stride, g.panel + q * kLanes * 4, make_clamp(g, q),
              static_cast<float*>(g.c) + x * g.ldc + q * kLanes, g.ldc, pixels);
    }
  }
}
#endif

void depthwise_f32(const DepthwiseArgs& g) {
#if !defined(PYKERNELS_ISA_SCALAR)
  if (g.words == 9 && g.kw == 3) return f32_3x3(g);
#endif
  depthwise<DotF32>(g);
}

}  // namespace

extern const DepthwiseKernels depthwise_kernels = {&depthwise<DotS8>, &depthwise<DotBF16>, &depthwise<DotF16>,
                                                   &depthwise_f32};

}  // namespace pykernels::PYKERNELS_ISA_NS
