#include <algorithm>

#include "cpu/plan/prepare.h"

namespace pykernels {

int64_t View::numel() const {
  int64_t n = 1;
  for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
  return n;
}

bool is_countable(const View& v) {
  int64_t elements = 1;
  for (int64_t d = 0; d < v.dims; ++d)
    if (v.sizes[d] < 0 || __builtin_mul_overflow(elements, std::max<int64_t>(v.sizes[d], 1), &elements) ||
        elements >= (int64_t{1} << 48))
      return false;
  return true;
}

bool is_contiguous(const View& v) {
  int64_t expected = 1;
  for (int64_t d = v.dims - 1; d >= 0; --d) {
    if (v.sizes[d] != 1 && v.strides[d] != expected) return v.numel() == 0;
    expected *= v.sizes[d];
  }
  return true;
}

bool is_channels_last(const View& v) {
  if (v.dims != 4) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (v.sizes[d] != 1 && v.strides[d] != expected) return false;
    expected *= v.sizes[d];
  }
  return true;
}

bool is_dense(const View& v) {
  if (is_contiguous(v)) return true;
  int64_t filled = 1;
  for (int64_t step = 0; step < v.dims && filled < v.numel(); ++step)
    for (int64_t d = 0; d < v.dims; ++d)
      if (v.sizes[d] > 1 && v.strides[d] == filled) {
        filled *= v.sizes[d];
        break;
      }
  return filled == v.numel();
}

void set_strides(View& v, bool channels_last) {
  constexpr int64_t nhwc[] = {0, 2, 3, 1};
  int64_t stride = 1;
  for (int64_t i = v.dims - 1; i >= 0; --i) {
    const int64_t d = channels_last && v.dims == 4 ? nhwc[i] : i;
    v.strides[d] = stride;
    stride *= v.sizes[d] > 0 ? v.sizes[d] : 1;
  }
}

}  // namespace pykernels
