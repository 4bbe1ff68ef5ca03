// The passes of the sparse codecs, once per isa.
#include "cpu/compress/sparse.h"

#include "cpu/compress/codes.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

constexpr int32_t kMagnitude = 0x7fffffff, kGreatestFinite = 0x7f7fffff;

PK_INLINE uint32_t first_bits(int lanes) { return (uint32_t{2} << (lanes - 1)) - 1; }
PK_INLINE i32 magnitude_of(f32 v) { return bit_and(cast_i32(v), set1_i32(kMagnitude)); }
PK_INLINE bool is_finite(float v) { return __builtin_fabsf(v) < __builtin_inff(); }
PK_INLINE int32_t* bits_of(float* p) { return reinterpret_cast<int32_t*>(p); }
PK_INLINE int32_t* bits_of(uint32_t* p) { return reinterpret_cast<int32_t*>(p); }
PK_INLINE const int32_t* bits_of(const uint32_t* p) { return reinterpret_cast<const int32_t*>(p); }

// f(i, lanes) over n elements, a vector at a time.
template <class F>
PK_INLINE void each_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, lanes_left(n - i));
}

template <bool kVelocity, class X>
PK_INLINE int64_t update_run(const Gradient& g, const X* x, int64_t first, int64_t n, int32_t above,
                             uint32_t* positions, float* values, uint8_t* unstored, bool* stored) {
  const i32 over = set1_i32(above), greatest = set1_i32(kGreatestFinite);
  const f32 infinite = set1(__builtin_inff()), momentum = set1(g.momentum);
  float* const residual = g.residual + first;
  float* const velocity = kVelocity ? g.velocity + first : nullptr;
  int64_t found = 0;
  bool all_stored = true;
  x += first;
  each_vector(n, [&](int64_t i, int lanes) PK_LAMBDA {
    const f32 kept = load(residual + i, lanes);
    f32 before = set1(0.0f), moved = load(x + i, lanes);
    if (kVelocity) {
      before = load(velocity + i, lanes);
      moved = add(mul(momentum, before), moved);
    }
    const f32 v = add(kept, moved);
    store(residual + i, select_lt(abs(v), infinite, v, kept), lanes);
    if (kVelocity) store(velocity + i, select_lt(abs(v), infinite, moved, before), lanes);
    const i32 magnitude = magnitude_of(v);
    const uint32_t chosen = bits_gt(magnitude, over) & first_bits(lanes);
    compact(bits_of(positions + found), add(lane_index(), set1_i32(static_cast<int32_t>(first + i))), chosen);
    found += compact(bits_of(values + found), cast_i32(v), chosen);
    uint32_t lost = bits_gt(magnitude, greatest);
    if (__builtin_expect(lost != 0, 0)) {
      if (all_stored) std::memset(unstored, 0, (n + 7) / 8);
      all_stored = false;
      for (; lost != 0; lost &= lost - 1) {
        const int64_t at = i + __builtin_ctz(lost);
        unstored[at / 8] |= 1 << at % 8;
      }
    }
  });
  *stored = all_stored;
  return found;
}

int64_t update_kernel(const Gradient& g, int64_t first, int64_t n, int32_t above, uint32_t* positions, float* values,
                      uint8_t* unstored, bool* stored) {
  return with_real(g.x, g.type, [&](const auto* x) {
    return g.velocity == nullptr ? update_run<false>(g, x, first, n, above, positions, values, unstored, stored)
                                 : update_run<true>(g, x, first, n, above, positions, values, unstored, stored);
  });
}

// to[i] = from[positions[i]]; the lanes behind the last one become zero.
template <class T>
PK_INLINE void read_at(const T* from, const uint32_t* positions, int lanes, T* to) {
  for (int lane = 0; lane < lanes; ++lane) to[lane] = from[positions[lane]];
  for (int lane = lanes; lane < kLanes; ++lane) to[lane] = T{};
}

template <class X>
PK_INLINE void gather_run(const Gradient& g, const X* x, const uint32_t* positions, int64_t n, float* v) {
  each_vector(n, [&](int64_t i, int lanes) PK_LAMBDA {
    X read[kLanes];
    float state[kLanes];
    read_at(x, positions + i, lanes, read);
    f32 sum = load(read);
    if (g.velocity != nullptr) {
      read_at(g.velocity, positions + i, lanes, state);
      sum = add(mul(set1(g.momentum), load(state)), sum);
    }
    if (g.residual != nullptr) {
      read_at(g.residual, positions + i, lanes, state);
      sum = add(load(state), sum);
    }
    store(v + i, sum, lanes);
  });
}

void gather_kernel(const Gradient& g, const uint32_t* positions, int64_t n, float* v) {
  with_real(g.x, g.type, [&](const auto* x) { gather_run(g, x, positions, n, v); });
}

void clear_kernel(const Gradient& g, const uint32_t* positions, const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (is_finite(values[i])) g.residual[positions[i]] = 0.0f;
  if (g.velocity == nullptr) return;
  for (int64_t i = 0; i < n; ++i)
    if (is_finite(values[i])) g.velocity[positions[i]] = 0.0f;
}

template <int kDigit>
PK_INLINE void histogram_run(const float* v, int64_t n, int32_t prefix, uint32_t (*counts)[kDigitValues]) {
  constexpr int kShift = kDigitShift[kDigit], kAbove = kDigit == 0 ? 31 : kDigitShift[kDigit - 1];
  const i32 wanted = set1_i32(prefix), mask = set1_i32((1 << (kAbove - kShift)) - 1);
  each_vector(n, [&](int64_t i, int lanes) PK_LAMBDA {
    const i32 magnitude = magnitude_of(load(v + i, lanes));
    int32_t digits[kLanes];
    store_i32(digits, bit_and(shift_right<kShift>(magnitude), mask));
    uint32_t chosen = first_bits(lanes);
    if (kDigit > 0) chosen &= bits_eq(shift_right<kAbove>(magnitude), wanted);
    if (chosen == first_bits(kLanes)) {
      for (int lane = 0; lane < kLanes; ++lane) ++counts[(i + lane) % kHistograms][digits[lane]];
    } else {
      for (; chosen != 0; chosen &= chosen - 1) {
        const int lane = __builtin_ctz(chosen);
        ++counts[(i + lane) % kHistograms][digits[lane]];
      }
    }
  });
}

void histogram_kernel(const float* v, int64_t n, int digit, int32_t prefix, uint32_t (*counts)[kDigitValues]) {
  switch (digit) {
    case 0: return histogram_run<0>(v, n, prefix, counts);
    case 1: return histogram_run<1>(v, n, prefix, counts);
    default: return histogram_run<2>(v, n, prefix, counts);
  }
}

void count_kernel(const float* v, int64_t n, int32_t magnitude, int64_t* greater, int64_t* equal) {
  const i32 wanted = set1_i32(magnitude);
  int64_t over = 0, same = 0;
  each_vector(n, [&](int64_t i, int lanes) PK_LAMBDA {
    const i32 m = magnitude_of(load(v + i, lanes));
    over += __builtin_popcount(bits_gt(m, wanted) & first_bits(lanes));
    same += __builtin_popcount(bits_eq(m, wanted) & first_bits(lanes));
  });
  *greater = over;
  *equal = same;
}

int64_t pick_kernel(const float* v, const uint32_t* positions, uint32_t first, int64_t n, int32_t magnitude,
                    int64_t ties, uint32_t* to_positions, float* to_values) {
  const i32 wanted = set1_i32(magnitude);
  int64_t found = 0;
  each_vector(n, [&](int64_t i, int lanes) PK_LAMBDA {
    const f32 values = load(v + i, lanes);
    const i32 m = magnitude_of(values);
    uint32_t equal = bits_eq(m, wanted) & first_bits(lanes);
    if (equal != 0) {
      while (__builtin_popcount(equal) > ties) equal &= ~(uint32_t{1} << (31 - __builtin_clz(equal)));
      ties -= __builtin_popcount(equal);
    }
    const uint32_t chosen = (bits_gt(m, wanted) & first_bits(lanes)) | equal;
    const i32 at = positions != nullptr ? load_i32(bits_of(positions + i), lanes)
                                        : add(lane_index(), set1_i32(static_cast<int32_t>(first + i)));
    compact(bits_of(to_positions + found), at, chosen);
    found += compact(bits_of(to_values + found), cast_i32(values), chosen);
  });
  return found;
}

// Unsigned comparison is signed comparison with the leading bits turned round. An unused entry is the greatest number.
bool ascending_kernel(const uint32_t* positions, int64_t n) {
  const i32 turn = set1_i32(INT32_MIN), unused = set1_i32(static_cast<int32_t>(kUnused));
  bool good = true;
  each_vector(n - 1, [&](int64_t i, int lanes) PK_LAMBDA {
    const i32 a = load_i32(bits_of(positions + i), lanes), b = load_i32(bits_of(positions + i + 1), lanes);
    const uint32_t right = bits_gt(bit_xor(b, turn), bit_xor(a, turn)) | bits_eq(b, unused);
    good &= (right & first_bits(lanes)) == first_bits(lanes);
  });
  return good;
}

template <class X>
PK_INLINE void add_run(const uint32_t* positions, const float* values, int64_t n, float factor, X* out) {
  each_vector(n, [&](int64_t i, int lanes) PK_LAMBDA {
    X block[kLanes];
    read_at(static_cast<const X*>(out), positions + i, lanes, block);
    store(block, add(load(block), mul(load(values + i, lanes), set1(factor))));
    for (int lane = 0; lane < lanes; ++lane) out[positions[i + lane]] = block[lane];
  });
}

void add_kernel(const uint32_t* positions, const float* values, int64_t n, float factor, void* out, Real type) {
  with_real(out, type, [&](auto* to) { add_run(positions, values, n, factor, to); });
}

void scale_kernel(const float* values, int64_t n, float factor, void* out, Real type) {
  with_real(out, type, [&](auto* to) {
    each_real(to, n, [&](int64_t i, int lanes) PK_LAMBDA { return mul(load(values + i, lanes), set1(factor)); });
  });
}

// key_of() of numbers below 2^32.
void keys_kernel(uint32_t first, int64_t n, uint64_t seed, uint32_t* keys) {
  const i32 low = set1_i32(static_cast<int32_t>(seed)), high = set1_i32(static_cast<int32_t>(seed >> 32));
  each_vector(n, [&](int64_t i, int lanes) PK_LAMBDA {
    const i32 h = mix(add(lane_index(), set1_i32(static_cast<int32_t>(first + i))));
    store_i32(bits_of(keys + i), mix(bit_xor(low, mix(bit_xor(high, h)))), lanes);
  });
}

}  // namespace

const SparseKernels sparse_kernels = {update_kernel, gather_kernel,    clear_kernel, histogram_kernel, count_kernel,
                                      pick_kernel,   ascending_kernel, add_kernel,   scale_kernel,     keys_kernel};

}  // namespace pykernels::PYKERNELS_ISA_NS
