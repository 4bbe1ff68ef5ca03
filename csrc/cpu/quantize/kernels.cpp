// Quantization of dense rows, once per isa. The formulas stand in kernels.h and cpu/isa/requantize.h.
#include "cpu/quantize/kernels.h"

#include "cpu/isa/requantize.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;

PK_INLINE int lanes_left(int64_t left) { return left < kLanes ? static_cast<int>(left) : kLanes; }

PK_INLINE float least_lane(f32 v) {
  float lanes[kLanes];
  store(lanes, v);
  float least = lanes[0];
  for (int i = 1; i < kLanes; ++i) least = lanes[i] < least ? lanes[i] : least;
  return least;
}

PK_INLINE float greatest_lane(f32 v) {
  float lanes[kLanes];
  store(lanes, v);
  float greatest = lanes[0];
  for (int i = 1; i < kLanes; ++i) greatest = lanes[i] > greatest ? lanes[i] : greatest;
  return greatest;
}

// The least and the greatest of 0 and the row: the zeros that a short load fills in change nothing, and min(x, acc) yields
// acc where x is NaN. Two accumulators of each hide the latency.
template <class X>
PK_INLINE void range(const X* x, int64_t n, float* least, float* greatest) {
  f32 lo0 = set1(0.0f), lo1 = lo0, hi0 = lo0, hi1 = lo0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const f32 a = load(x + i), b = load(x + i + kLanes);
    lo0 = min(a, lo0);
    hi0 = max(a, hi0);
    lo1 = min(b, lo1);
    hi1 = max(b, hi1);
  }
  for (; i < n; i += kLanes) {
    const f32 a = load(x + i, lanes_left(n - i));
    lo0 = min(a, lo0);
    hi0 = max(a, hi0);
  }
  *least = least_lane(min(lo0, lo1));
  *greatest = greatest_lane(max(hi0, hi1));
}

template <class X, class Q>
PK_INLINE void quantize(const X* x, int64_t n, Q* q, const Requantize& r) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_i32(q + i, requantize(r, load(x + i)));
  if (i < n) store_i32(q + i, requantize(r, load(x + i, lanes_left(n - i))), lanes_left(n - i));
}

template <class X>
void quantize_row(const X* x, int64_t n, uint8_t* q, float* scale, int32_t* zero_point) {
  float lo, hi;
  range(x, n, &lo, &hi);
  float s = (hi - lo) / 255.0f;
  if (s < kSmallestNormal) {
    s = 1.0f;
    lo = 0.0f;
  }
  const float at_lo = __builtin_rintf(-lo / s);
  *scale = s;
  *zero_point = static_cast<int32_t>(at_lo < 255.0f ? at_lo : at_lo == at_lo ? 255.0f : 0.0f);  // inf/inf is NaN
  quantize(x, n, q, requantizer(1.0f / s, *zero_point, q));
}

template <class X>
void quantize_row(const X* x, int64_t n, int8_t* q, float* scale) {
  float lo, hi;
  range(x, n, &lo, &hi);
  const float s = (-lo > hi ? -lo : hi) / 127.0f;
  *scale = s < kSmallestNormal ? 1.0f : s;
  quantize(x, n, q, requantizer(1.0f / *scale, 0, -127, 127));
}

void quantize_row_u8(const void* x, bool bf16, int64_t n, uint8_t* q, float* scale, int32_t* zero_point) {
  if (bf16)
    quantize_row(static_cast<const bfloat16*>(x), n, q, scale, zero_point);
  else
    quantize_row(static_cast<const float*>(x), n, q, scale, zero_point);
}

void quantize_row_s8(const void* x, bool bf16, int64_t n, int8_t* q, float* scale) {
  if (bf16)
    quantize_row(static_cast<const bfloat16*>(x), n, q, scale);
  else
    quantize_row(static_cast<const float*>(x), n, q, scale);
}

}  // namespace

const QuantizeKernels quantize_kernels = {quantize_row_u8, quantize_row_s8};

}  // namespace pykernels::PYKERNELS_ISA_NS
