// Reductions of a row of fp32 in scratch, in one order on every isa: 16 interleaved sums, those then by halves.
#pragma once

#include "cpu/isa/loops.h"

namespace pykernels::PYKERNELS_ISA_NS {

constexpr int kRowSums = 16 / kLanes;  // vectors that hold the interleaved sums

// Elements of a row of n with what its sums read beyond.
PK_INLINE int64_t padded_row(int64_t n) { return (n + 15) / 16 * 16; }

// The sum of f(v) over a padded row.
template <class F>
PK_INLINE float sum_row(const float* row, int64_t padded, const F& f) {
  f32 sums[kRowSums];
  for (int k = 0; k < kRowSums; ++k) sums[k] = set1(0.0f);
  for (int64_t i = 0; i < padded; i += 16)
    for (int k = 0; k < kRowSums; ++k) sums[k] = add(sums[k], f(load(row + i + k * kLanes, kLanes)));
  for (int half = kRowSums / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] = add(sums[k], sums[k + half]);
  return sum_lanes(sums[0]);
}

// What is beyond n adds nothing to a sum.
PK_INLINE void clear_tail(float* row, int64_t n, int64_t padded) {
  for (int64_t i = n; i < padded; ++i) row[i] = 0.0f;
}

// The largest of n > 0 elements; NaN where one is.
template <class T>
PK_INLINE float max_row(const T* x, int64_t n) {
  f32 most = set1(real(x[0]));
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) most = max_nan(load(x + i, kLanes), most);
  float lanes[kLanes];
  store(lanes, most, kLanes);
  float top = lanes[0];
  for (int k = 1; k < kLanes; ++k) top = lanes[k] > top || lanes[k] != lanes[k] ? lanes[k] : top;
  for (int64_t i = n / kLanes * kLanes; i < n; ++i) {
    const float v = real(x[i]);
    top = v > top || v != v ? v : top;
  }
  return top;
}

}  // namespace pykernels::PYKERNELS_ISA_NS
