// What sizes and strides (in elements) say of memory, as torch has it. Strides of dimensions of size 1 mean nothing.
// Torch-free.
#pragma once

#include <cstdint>

namespace pykernels {

inline constexpr int64_t kNhwc[] = {0, 2, 3, 1};  // the dimensions of an image as channels_last orders them

inline int64_t elements_of(const int64_t* sizes, int64_t dims) {
  int64_t n = 1;
  for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
  return n;
}

inline bool is_contiguous(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  int64_t expected = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return elements_of(sizes, dims) == 0;
    expected *= sizes[d];
  }
  return true;
}

// NHWC memory of a logical NCHW tensor.
inline bool is_channels_last(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  if (dims != 4) return false;
  int64_t expected = 1;
  for (int64_t i = 3; i >= 0; --i) {
    const int64_t d = kNhwc[i];
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Elements fill their memory without holes or overlaps, in whatever order of the dimensions.
inline bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  if (is_contiguous(sizes, strides, dims)) return true;
  const int64_t elements = elements_of(sizes, dims);
  int64_t filled = 1;
  for (int64_t step = 0; step < dims && filled < elements; ++step)
    for (int64_t d = 0; d < dims; ++d)
      if (sizes[d] > 1 && strides[d] == filled) {
        filled *= sizes[d];
        break;
      }
  return filled == elements;
}

}  // namespace pykernels
