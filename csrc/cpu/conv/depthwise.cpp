// Depthwise kernels (formula in kernels.h). A few pixels at a time share each load of the weights; the taps of a word
// are interleaved per channel so that the dot product of cpu/tile/element.h serves here too.
#include "cpu/conv/kernels.h"
#include "cpu/tile/element.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

// An element type's word of taps for 16 channels, times the block of weights at b, added to c.
#if defined(PYKERNELS_ISA_SCALAR)

PK_INLINE void mac_taps(DotS8, DotS8::Acc* c, const uint8_t* a, const int64_t* offset, const uint8_t* b) {
  for (int j = 0; j < 16; ++j)
    for (int k = 0; k < 4; ++k) c->v[j] += int32_t{a[offset[k] + j]} * static_cast<int8_t>(b[4 * j + k]);
}
PK_INLINE void mac_taps(DotBF16, DotBF16::Acc* c, const uint8_t* a, const int64_t* offset, const uint8_t* b) {
  const auto* w = reinterpret_cast<const bfloat16*>(b);
  for (int j = 0; j < 16; ++j)
    for (int k = 0; k < 2; ++k)
      c->v[j] += load(reinterpret_cast<const bfloat16*>(a + offset[k]) + j) * load(w + 2 * j + k);
}
PK_INLINE void mac_taps(DotF32, DotF32::Acc* c, const uint8_t* a, const int64_t* offset, const uint8_t* b) {
  for (int j = 0; j < 16; ++j) c->v[j] += float_at(a + offset[0] + 4 * j) * float_at(b + 4 * j);
}

#else

// Bytes of four taps to [channel][tap]: q[i] holds channels 4i .. 4i+3.
PK_INLINE void interleave(const uint8_t* a, const int64_t* offset, __m128i* q) {
  __m128i t[4];
  PK_FOR (k, 4) t[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + offset[k]));
  const __m128i low01 = _mm_unpacklo_epi8(t[0], t[1]), high01 = _mm_unpackhi_epi8(t[0], t[1]);
  const __m128i low23 = _mm_unpacklo_epi8(t[2], t[3]), high23 = _mm_unpackhi_epi8(t[2], t[3]);
  q[0] = _mm_unpacklo_epi16(low01, low23);
  q[1] = _mm_unpackhi_epi16(low01, low23);
  q[2] = _mm_unpacklo_epi16(high01, high23);
  q[3] = _mm_unpackhi_epi16(high01, high23);
}

PK_INLINE __m256i join(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

PK_INLINE void mac_taps(DotS8, DotS8::Acc* c, const uint8_t* a, const int64_t* offset, const uint8_t* b) {
  __m128i q[4];
  interleave(a, offset, q);
#if defined(PYKERNELS_ISA_AVX512) || defined(PYKERNELS_ISA_AVX512VNNI)
  const __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(join(q[0], q[1])), join(q[2], q[3]), 1);
  DotS8::mac(c[0], DotS8::words(x), DotS8::weight(b, 0));
#else
  PK_FOR (i, 2) DotS8::mac(c[i], DotS8::words(join(q[2 * i], q[2 * i + 1])), DotS8::weight(b, i));
#endif
}
PK_INLINE void mac_taps(DotBF16, DotBF16::Acc* c, const uint8_t* a, const int64_t* offset, const uint8_t* b) {
  PK_FOR (q, kPanelRegisters) {
    const DotBF16::Pair x = {load(reinterpret_cast<const bfloat16*>(a + offset[0]) + q * kLanes, kLanes),
                             load(reinterpret_cast<const bfloat16*>(a + offset[1]) + q * kLanes, kLanes)};
    DotBF16::mac(c[q], x, DotBF16::weight(b, q));
  }
}
PK_INLINE void mac_taps(DotF32, DotF32::Acc* c, const uint8_t* a, const int64_t* offset, const uint8_t* b) {
  PK_FOR (q, kPanelRegisters)
    DotF32::mac(c[q], load(reinterpret_cast<const float*>(a + offset[0]) + q * kLanes, kLanes), DotF32::weight(b, q));
}

#endif

template <class Dot>
constexpr int taps_per_word = 1;
template <>
constexpr int taps_per_word<DotS8> = 4;
template <>
constexpr int taps_per_word<DotBF16> = 2;

template <class Dot, int kPixels>
PK_INLINE void pixels(const DepthwiseArgs& g, const uint8_t* a, uint8_t* c) {
  typename Dot::Acc acc[kPixels][Dot::kRegisters];
  PK_FOR (x, kPixels)
    PK_FOR (q, Dot::kRegisters) acc[x][q] = Dot::zero();
  for (int64_t w = 0; w < g.words; ++w)
    PK_FOR (x, kPixels)
      mac_taps(Dot{}, acc[x], a + x * g.x_stride, g.tap_offset + w * taps_per_word<Dot>, g.panel + w * kBlockBytes);
  PK_FOR (x, kPixels) Dot::finish(acc[x], c + x * kBlockBytes);
}

template <class Dot>
void depthwise(const DepthwiseArgs& g) {
  constexpr int kPixels = Dot::kRegisters > 2 ? 2 : 4;
  auto* c = static_cast<uint8_t*>(g.c);
  int64_t x = 0;
  for (; x + kPixels <= g.pixels; x += kPixels) pixels<Dot, kPixels>(g, g.a + x * g.x_stride, c + x * kBlockBytes);
  for (; x < g.pixels; ++x) pixels<Dot, 1>(g, g.a + x * g.x_stride, c + x * kBlockBytes);
}

}  // namespace

extern const DepthwiseKernels depthwise_kernels = {&depthwise<DotS8>, &depthwise<DotBF16>, &depthwise<DotF32>};

}  // namespace pykernels::PYKERNELS_ISA_NS
