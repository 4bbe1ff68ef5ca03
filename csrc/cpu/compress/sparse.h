// What the sparse codecs do with runs of elements. pykernels/reference/compress.py specifies what is sent;
// cpu/compress/ sparse_op.cpp and topk.cpp put the passes together.
//
// The magnitude of a value is the bits of abs(v), an integer: NaN is above infinity, infinity above every number.
#pragma once

#include <cstdint>

#include "cpu/compress/kernels.h"

namespace pykernels {

// Elements of a run at most, and what compaction may write behind the end of a list.
inline constexpr int64_t kRun = 8192, kSlack = 16;
inline constexpr uint32_t kUnused = 0xffffffff;  // the position of an unused entry of a sparse payload

// v = residual + x; with a velocity, velocity = momentum * velocity + x and v = residual + velocity.
struct Gradient {
  const void* x;
  Real type;
  float* residual;  // as long as x; null: v = x
  float* velocity;  // as long as x; null: none
  float momentum;
};

// The three digits of a magnitude, from the leading one.
inline constexpr int kDigits = 3;
inline constexpr int kDigitShift[kDigits] = {20, 10, 0};
inline constexpr int64_t kDigitValues = 2048, kHistograms = 4;

struct SparseKernels {
  // v of the n elements from `first` on goes to the residual, and the new velocity to the velocity, where v is finite.
  // Elements of magnitudes greater than `above` are listed, positions[n + kSlack] and values[n + kSlack]; returns their
  // number. Where v is not finite, bit i % 8 of unstored[i / 8] is set for the i-th element; if there is no such
  // element, `unstored` is not written, and `*stored` is true.
  int64_t (*update)(const Gradient&, int64_t first, int64_t n, int32_t above, uint32_t* positions, float* values,
                    uint8_t* unstored, bool* stored);
  // v of the elements at n positions.
  void (*gather)(const Gradient&, const uint32_t* positions, int64_t n, float* v);
  // Residual and velocity become 0 at n positions, where their values are finite.
  void (*clear)(const Gradient&, const uint32_t* positions, const float* values, int64_t n);

  // Counts a digit of the magnitudes whose digits before it are `prefix` into kHistograms histograms, which are to be
  // added: equal digits in a row would wait for each other in one.
  void (*histogram)(const float* v, int64_t n, int digit, int32_t prefix, uint32_t (*counts)[kDigitValues]);
  // How many magnitudes are greater than and equal to `magnitude`.
  void (*count)(const float* v, int64_t n, int32_t magnitude, int64_t* greater, int64_t* equal);
  // Lists the values of greater magnitude and the first `ties` of equal magnitude, as update() does; element i has
  // position positions[i], or first + i without positions. Returns their number.
  int64_t (*pick)(const float* v, const uint32_t* positions, uint32_t first, int64_t n, int32_t magnitude, int64_t ties,
                  uint32_t* to_positions, float* to_values);

  // Whether n positions ascend, but for unused entries at the end.
  bool (*ascending)(const uint32_t* positions, int64_t n);
  // out[positions[i]] += factor * values[i]; no position comes twice.
  void (*add)(const uint32_t* positions, const float* values, int64_t n, float factor, void* out, Real type);
  // out[i] = factor * values[i]
  void (*scale)(const float* values, int64_t n, float factor, void* out, Real type);
  // keys[i] = the hash of first + i and the seed
  void (*keys)(uint32_t first, int64_t n, uint64_t seed, uint32_t* keys);
};
PYKERNELS_TABLE(SparseKernels, sparse_kernels)

}  // namespace pykernels
