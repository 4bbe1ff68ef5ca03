#include <algorithm>
#include <utility>

#include "cpu/plan/prepare.h"

namespace pykernels {

int64_t View::numel() const { return elements_of(sizes.data(), dims); }

bool is_countable(const View& v) {
  int64_t elements = 1;
  for (int64_t d = 0; d < v.dims; ++d)
    if (v.sizes[d] < 0 || __builtin_mul_overflow(elements, std::max<int64_t>(v.sizes[d], 1), &elements) ||
        elements >= (int64_t{1} << 48))
      return false;
  return true;
}

bool is_contiguous(const View& v) { return is_contiguous(v.sizes.data(), v.strides.data(), v.dims); }
bool is_channels_last(const View& v) { return is_channels_last(v.sizes.data(), v.strides.data(), v.dims); }
bool is_dense(const View& v) { return is_dense(v.sizes.data(), v.strides.data(), v.dims); }

bool suggests_channels_last(const View& v) {
  if (v.dims != 4 || is_contiguous(v)) return false;
  int64_t least = 1;
  for (int64_t i = 3; i >= 0; --i) {
    const int64_t d = kNhwc[i];
    if (v.sizes[d] == 1) continue;
    if (v.strides[d] < least) return false;
    least = v.strides[d] * v.sizes[d];
  }
  return true;
}

// TensorIterator's order of dimensions: operands are asked in turn, where one is not repeated along either dimension.
void set_strides_like(View& v, std::initializer_list<const View*> operands) {
  int64_t order[kMaxDims];                            // innermost first
  const auto outer = [&](int64_t d, int64_t other) {  // 1: d lies outside of other; -1: inside; 0: nobody knows
    for (const View* operand : operands) {
      const int64_t mine = operand->strides[d], its = operand->strides[other];
      if (mine == 0 || its == 0) continue;
      if (mine != its) return mine < its ? -1 : 1;
      if (v.sizes[d] > v.sizes[other]) return 1;
    }
    return 0;
  };
  for (int64_t i = 0; i < v.dims; ++i) order[i] = v.dims - 1 - i;
  for (int64_t i = 1; i < v.dims; ++i)
    for (int64_t k = i; k > 0;) {
      int64_t below = k - 1, found = 0;
      while (below >= 0 && (found = outer(order[below], order[k])) == 0) --below;
      if (found <= 0) break;
      std::swap(order[below], order[k]);
      k = below;
    }
  int64_t stride = 1;
  for (int64_t i = 0; i < v.dims; ++i) {
    v.strides[order[i]] = stride;
    stride *= std::max<int64_t>(v.sizes[order[i]], 1);
  }
}

void set_strides(View& v, bool channels_last) {
  int64_t stride = 1;
  for (int64_t i = v.dims - 1; i >= 0; --i) {
    const int64_t d = channels_last && v.dims == 4 ? kNhwc[i] : i;
    v.strides[d] = stride;
    stride *= std::max<int64_t>(v.sizes[d], 1);
  }
}

}  // namespace pykernels
