// Depthwise kernels of bytes for kernels 3, 5 or 7 wide (formula and layouts in kernels.h). The bytes of four
// neighbouring pixels are interleaved, so that a word holds four taps of a channel; at stride 1 the same words serve
// two outputs, with weights that are shifted by a tap. Interleaving works within 128 bits, and so a register holds
// channels 4i .. 4i+3 of each 16; packing bytes puts them in order again.
#include "cpu/conv/kernels.h"
#include "cpu/tile/element.h"

namespace pykernels::PYKERNELS_ISA_NS {

#if defined(PYKERNELS_ISA_SCALAR)

extern const DepthwiseWordsKernels depthwise_words_kernels = {};

#else
namespace {

constexpr int kRegisters = 4;  // of sums of a block
constexpr int kWeightBytes = kBytes * static_cast<int>(sizeof(DotS8::Weight)) / static_cast<int>(sizeof(i32));

#if defined(PYKERNELS_ISA_AVX512) || defined(PYKERNELS_ISA_AVX512VNNI)
#define PK_BYTES(name) _mm512_##name
PK_INLINE __m128i quarter(i32 v, int lane) {
  switch (lane) {
    case 0: return _mm512_castsi512_si128(v);
    case 1: return _mm512_extracti32x4_epi32(v, 1);
    case 2: return _mm512_extracti32x4_epi32(v, 2);
    default: return _mm512_extracti32x4_epi32(v, 3);
  }
}
#else
#define PK_BYTES(name) _mm256_##name
PK_INLINE __m128i quarter(i32 v, int lane) {
  return lane == 0 ? _mm256_castsi256_si128(v) : _mm256_extracti128_si256(v, 1);
}
#endif

// The register of weights at w, or two for its even and odd taps, as order_weights() leaves them.
PK_INLINE void load_weight(const uint8_t* w, i32* weight) { *weight = load_i32(reinterpret_cast<const int32_t*>(w)); }
template <class Pair>
PK_INLINE void load_weight(const uint8_t* w, Pair* weight) {
  load_weight(w, &weight->even);
  load_weight(w + kBytes, &weight->odd);
}
PK_INLINE DotS8::Weight weight_at(const uint8_t* w) {
  DotS8::Weight weight;
  load_weight(w, &weight);
  return weight;
}

// Sums of kOutputs neighbouring pixels, whose first tap is at row[y] + at.
template <int kTaps, int kShifts, int kOutputs>
PK_INLINE void window(const DepthwiseWordsArgs& g, int64_t at, i32 (&acc)[kOutputs][kRegisters]) {
  constexpr int kNeeded = kTaps + kOutputs - 1, kGroups = (kNeeded + 3) / 4;
  PK_FOR (o, kOutputs)
    PK_FOR (i, kRegisters) acc[o][i] = load_i32(g.start + i * kLanes);
  const uint8_t* w = g.weights;
  for (int64_t y = 0; y < g.kh; ++y) {
    const uint8_t* p = g.row[y] + at;
    PK_FOR (group, kGroups) {
      i32 t[4];
      PK_FOR (k, 4) t[k] = 4 * group + k < kNeeded ? load_u8(p + (4 * group + k) * g.pixel).v : t[0];
      const i32 low01 = PK_BYTES(unpacklo_epi8)(t[0], t[1]), high01 = PK_BYTES(unpackhi_epi8)(t[0], t[1]);
      const i32 low23 = PK_BYTES(unpacklo_epi8)(t[2], t[3]), high23 = PK_BYTES(unpackhi_epi8)(t[2], t[3]);
      const i32 words[kRegisters] = {PK_BYTES(unpacklo_epi16)(low01, low23), PK_BYTES(unpackhi_epi16)(low01, low23),
                                     PK_BYTES(unpacklo_epi16)(high01, high23),
                                     PK_BYTES(unpackhi_epi16)(high01, high23)};
      PK_FOR (i, kRegisters) {
        const DotS8::Word x = DotS8::words(words[i]);
        PK_FOR (o, kOutputs) DotS8::mac(acc[o][i], x, weight_at(w + (o * kRegisters + i) * kWeightBytes));
      }
      w += kShifts * kRegisters * kWeightBytes;
    }
  }
}

PK_INLINE void finish(const DepthwiseWordsArgs& g, const i32 (&acc)[kRegisters], int64_t x) {
  if (!g.finishes) {
    auto* sums = static_cast<int32_t*>(g.out) + x * kBytes;
    PK_FOR (i, kRegisters)
      PK_FOR (lane, kLanes / 4)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + 16 * lane + 4 * i), quarter(acc[i], lane));
    return;
  }
  const f32 low = set1(g.low), high = set1(g.high);
  i32 q[kRegisters];
  PK_FOR (i, kRegisters) {
    const f32 t = fma(to_f32(acc[i]), load(g.multiplier + i * kLanes), load(g.addend + i * kLanes));
    q[i] = to_i32(min(high, max(low, t)));
  }
  const i32 bytes = PK_BYTES(packus_epi16)(PK_BYTES(packs_epi32)(q[0], q[1]), PK_BYTES(packs_epi32)(q[2], q[3]));
  store_u8(static_cast<uint8_t*>(g.out) + x * g.out_step, {bytes}, g.channels);
}

template <int kTaps, int kStride>
void depthwise(const DepthwiseWordsArgs& g) {
  constexpr int kShifts = kStride == 1 ? 2 : 1;
  int64_t x = 0;
  if constexpr (kShifts == 2)
    for (; x + 2 <= g.pixels; x += 2) {
      i32 acc[2][kRegisters];
      window<kTaps, kShifts, 2>(g, x * g.pixel, acc);
      PK_FOR (o, 2) finish(g, acc[o], x + o);
    }
  for (; x < g.pixels; ++x) {
    i32 acc[1][kRegisters];
    window<kTaps, kShifts, 1>(g, x * kStride * g.pixel, acc);
    finish(g, acc[0], x);
  }
}

// The channel of a block whose sum is in lane `lane` of register i.
constexpr int channel_of(int i, int lane) { return 16 * (lane / 4) + 4 * i + lane % 4; }

int64_t row_words(int64_t kw, int64_t stride) { return stride == 1 ? 2 * ((kw + 4) / 4) : (kw + 3) / 4; }

int64_t weight_bytes(int64_t kh, int64_t kw, int64_t stride) {
  return kh * row_words(kw, stride) * kRegisters * kWeightBytes;
}

void order_weights(const uint8_t* panels, int64_t panel_bytes, int64_t channels, int64_t kh, int64_t kw, int64_t stride,
                   uint8_t* to) {
  const int shifts = stride == 1 ? 2 : 1;
  const int64_t groups = row_words(kw, stride) / shifts;
  for (int64_t y = 0; y < kh; ++y)
    for (int64_t group = 0; group < groups; ++group)
      for (int shift = 0; shift < shifts; ++shift)
        for (int i = 0; i < kRegisters; ++i, to += kWeightBytes)
          for (int lane = 0; lane < kLanes; ++lane) {
            int8_t taps[4];
            for (int k = 0; k < 4; ++k) {
              const int64_t channel = channel_of(i, lane), x = 4 * group + k - shift, tap = y * kw + x;
              const bool there = channel < channels && x >= 0 && x < kw;
              const uint8_t* panel = panels + channel / 16 * panel_bytes + channel % 16 * 4;
              taps[k] = there ? static_cast<int8_t>(panel[tap / 4 * kBlockBytes + tap % 4]) : int8_t{0};
            }
            if constexpr (kWeightBytes == kBytes) {
              std::memcpy(to + 4 * lane, taps, 4);
            } else {  // s16: the even taps, then the odd ones
              const int16_t even[2] = {taps[0], taps[2]}, odd[2] = {taps[1], taps[3]};
              std::memcpy(to + 4 * lane, even, 4);
              std::memcpy(to + kBytes + 4 * lane, odd, 4);
            }
          }
}

void order_channels(const void* from, int64_t channels, void* to) {
  for (int i = 0; i < kRegisters; ++i)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int channel = channel_of(i, lane);
      auto* word = static_cast<uint8_t*>(to) + 4 * (i * kLanes + lane);
      if (channel < channels)
        std::memcpy(word, static_cast<const uint8_t*>(from) + 4 * channel, 4);
      else
        std::memset(word, 0, 4);
    }
}

}  // namespace

extern const DepthwiseWordsKernels depthwise_words_kernels = {
    kBytes,
    &weight_bytes,
    &order_weights,
    &order_channels,
    {{&depthwise<3, 1>, &depthwise<3, 2>}, {&depthwise<5, 1>, &depthwise<5, 2>}, {&depthwise<7, 1>, &depthwise<7, 2>}}};

#endif
}  // namespace pykernels::PYKERNELS_ISA_NS
