// Real numbers to bytes and back, once per isa. The formulas stand in kernels.h and cpu/isa/requantize.h.
#include "cpu/quantize/kernels.h"

#include "cpu/isa/quantized.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;

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

// The least and the greatest of 0 and the row: the zeros that a short load fills in change nothing, and min(x, acc)
// yields acc where x is NaN. Two accumulators of each hide the latency.
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
PK_INLINE void quantize_run(const X* x, int64_t n, Q* q, const Requantize& r) {
  each_byte(q, n, [&](int64_t i, int lanes) PK_LAMBDA { return requantize(r, load(x + i, lanes)); });
}

void quantize_row_kernel(const void* x, Real type, int64_t n, uint8_t* q, float* scale, int32_t* zero_point) {
  with_real(x, type, [&](const auto* p) {
    float lo, hi;
    range(p, n, &lo, &hi);
    float s = (hi - lo) / 255.0f;
    if (s < kSmallestNormal) {
      s = 1.0f;
      lo = 0.0f;
    }
    const float at_lo = __builtin_rintf(-lo / s);
    *scale = s;
    *zero_point = static_cast<int32_t>(at_lo < 255.0f ? at_lo : at_lo == at_lo ? 255.0f : 0.0f);  // inf/inf is NaN
    quantize_run(p, n, q, requantizer(1.0f / s, *zero_point, q));
  });
}

void quantize_row_s8_kernel(const void* x, Real type, int64_t n, int8_t* q, float* scale) {
  with_real(x, type, [&](const auto* p) {
    float lo, hi;
    range(p, n, &lo, &hi);
    const float s = (-lo > hi ? -lo : hi) / 127.0f;
    *scale = s < kSmallestNormal ? 1.0f : s;
    quantize_run(p, n, q, requantizer(1.0f / *scale, 0, -127, 127));
  });
}

void quantize_kernel(const void* x, Real type, int64_t n, const QuantizedOutput& out) {
  with_real(x, type, [&](const auto* p) {
    with_bytes(out.data, out.s8,
               [&](auto* q) { quantize_run(p, n, q, requantizer(out.inverse_scale, out.zero_point, q)); });
  });
}

void dequantize_kernel(const QuantizedInput& in, int64_t n, void* x, Real type) {
  with_bytes(in.data, in.s8, [&](const auto* q) {
    with_real(x, type, [&](auto* p) {
      const auto a = reader(q, in);
      each_real(p, n, [&](int64_t i, int lanes) PK_LAMBDA { return read(a, i, lanes); });
    });
  });
}

void quantize_channels_kernel(const void* x, Real type, int64_t rows, int64_t n, const ChannelParameters& channels,
                              const QuantizedOutput& out) {
  const i32 low = set1_i32(out.s8 ? -128 : 0), high = set1_i32(out.s8 ? 127 : 255);
  with_real(x, type, [&](const auto* p) {
    with_bytes(out.data, out.s8, [&](auto* q) {
      for (int64_t r = 0; r < rows; ++r)
        each_byte(q + r * n, n, [&](int64_t i, int lanes) PK_LAMBDA {
          const i32 zero_point = load_i32(channels.zero_point + i, lanes);
          const Requantize channel{load(channels.scale + i, lanes), to_f32(sub(low, zero_point)),
                                   to_f32(sub(high, zero_point)), zero_point};
          return requantize(channel, load(p + r * n + i, lanes));
        });
    });
  });
}

void dequantize_channels_kernel(const QuantizedInput& in, int64_t rows, int64_t n, const ChannelParameters& channels,
                                void* x, Real type) {
  with_bytes(in.data, in.s8, [&](const auto* q) {
    with_real(x, type, [&](auto* p) {
      for (int64_t r = 0; r < rows; ++r)
        each_real(p + r * n, n, [&](int64_t i, int lanes) PK_LAMBDA {
          return dequantize(load_i32(q + r * n + i, lanes), load_i32(channels.zero_point + i, lanes),
                            load(channels.scale + i, lanes));
        });
    });
  });
}

}  // namespace

const QuantizeKernels quantize_kernels = {
    quantize_row_kernel, quantize_row_s8_kernel,   quantize_kernel,
    dequantize_kernel,   quantize_channels_kernel, dequantize_channels_kernel,
};

}  // namespace pykernels::PYKERNELS_ISA_NS
