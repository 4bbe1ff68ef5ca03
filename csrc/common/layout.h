// Dense layouts: elements that fill their memory without holes or overlaps, in whatever order of the dimensions
// (contiguous, channels_last, any permutation). An elementwise op then runs along memory, and its output has the
// strides of its input, as torch.empty_like(preserve_format) gives them.
#pragma once

#include "common/stable.h"

namespace pykernels {

inline bool is_dense(const Tensor& t) { return is_dense(t.sizes().data(), t.strides().data(), t.dim()); }

// t itself, or a dense copy in the order of its strides: what an expanded, overlapping or strided input becomes.
inline Tensor dense(const Tensor& t) { return is_dense(t) ? t : torch::stable::clone(t); }

// Uninitialized, with the sizes and strides of the dense tensor t.
inline Tensor dense_like(const Tensor& t, ScalarType dtype) {
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      t.dim(), t.sizes().data(), t.strides().data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// b, whose sizes broadcast to those of the dense tensor a, in the layout of a.
inline Tensor in_layout_of(const Tensor& a, const Tensor& b) {
  bool same = same_sizes(a, b);
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == 1 || a.stride(d) == b.stride(d);
  if (same) return b;
  Tensor out = dense_like(a, b.scalar_type());
  torch::stable::copy_(out, b);
  return out;
}

}  // namespace pykernels
