// Steps that move elements: most are other sizes and strides over the same memory.
#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/copy/driver.h"
#include "cpu/plan/builder.h"

namespace pykernels {
namespace {

// The bits of a number in a tensor's dtype, which holds it.
uint64_t bits_of(Dtype t, double value) {
  const auto fp32 = std::bit_cast<uint32_t>(static_cast<float>(value));
  switch (t) {
    case Dtype::u8:
    case Dtype::s8: return static_cast<uint8_t>(static_cast<int64_t>(value));
    case Dtype::bf16: return fp32 >> 16;
    case Dtype::f16: return std::bit_cast<uint16_t>(static_cast<_Float16>(value));
    case Dtype::s32: return static_cast<uint32_t>(static_cast<int64_t>(value));
    default: return fp32;
  }
}

// The strides of `v` under other sizes, where no copy is needed: whether there are any. As torch's computeStride.
bool view_strides(const View& v, View* out) {
  int64_t at = out->dims - 1, chunk = v.strides[v.dims - 1], elements = 1, viewed = 1;
  for (int64_t d = v.dims - 1; d >= 0; --d) {
    elements *= v.sizes[d];
    if (d > 0 && (v.sizes[d - 1] == 1 || v.strides[d - 1] == elements * chunk)) continue;
    for (; at >= 0 && (viewed < elements || out->sizes[at] == 1); --at) {
      out->strides[at] = viewed * chunk;
      viewed *= out->sizes[at];
    }
    if (viewed != elements) return false;
    if (d > 0) chunk = v.strides[d - 1], elements = viewed = 1;
  }
  return at == -1;
}

}  // namespace

// numbers: where its bytes begin in the weights, dtype, sizes
void Builder::constant() {
  const int64_t offset = number();
  View v;
  v.dtype = dtype();
  v.dims = static_cast<int64_t>(step_->numbers.size()) - 2;
  PK_CHECK(v.dims <= kMaxDims, "run_plan: a constant has ", v.dims, " dimensions");
  for (int64_t d = 0; d < v.dims; ++d) v.sizes[d] = number();
  PK_CHECK(is_countable(v), "run_plan: a constant has shape ", shape_of(v.sizes.data(), v.dims));
  PK_CHECK(offset >= 0 && offset % kBlockBytes == 0 && offset <= program_.weight_bytes &&
               v.bytes() <= program_.weight_bytes - offset,
           "run_plan: a constant lies outside of the weights");
  set_strides(v, false);
  v.buffer = weights_buffer_;
  v.offset = offset;
  yields(v);
}

// numbers: a size each, or -1 for what is left (once), or -2 - d for the operand's size d
void Builder::reshape() {
  const View& x = in(0);
  View v = x;
  v.dims = static_cast<int64_t>(step_->numbers.size());
  PK_CHECK(v.dims <= kMaxDims, "run_plan: a reshape yields ", v.dims, " dimensions");
  int64_t known = 1, open = -1;
  for (int64_t d = 0; d < v.dims; ++d) {
    const int64_t size = number(-1 - kMaxDims, int64_t{1} << 48);
    PK_CHECK(size >= -1 - x.dims, "run_plan: a reshape takes a size that its operand does not have");
    PK_CHECK(size != -1 || open < 0, "run_plan: a reshape leaves two sizes open");
    v.sizes[d] = size < -1 ? x.sizes[-2 - size] : size;
    if (size == -1)
      open = d;
    else
      PK_CHECK(!__builtin_mul_overflow(known, v.sizes[d], &known), "run_plan: a reshape yields too many elements");
  }
  if (open >= 0) {
    PK_CHECK(known > 0 && x.numel() % known == 0, "run_plan: a tensor of shape ", shape_of(x.sizes.data(), x.dims),
             " cannot be reshaped");
    v.sizes[open] = x.numel() / known;
  }
  PK_CHECK(is_countable(v) && v.numel() == x.numel(), "run_plan: a tensor of shape ", shape_of(x.sizes.data(), x.dims),
           " cannot be reshaped to ", shape_of(v.sizes.data(), v.dims));
  if (x.numel() == 0 || x.dims == 0) {
    set_strides(v, false);
  } else if (!view_strides(x, &v)) {
    const View source = to_contiguous(x);
    v.buffer = source.buffer;
    v.offset = source.offset;
    set_strides(v, false);
  }
  yields(v);
}

// numbers: the operand's dimensions in their new order
void Builder::permute() {
  const View& x = in(0);
  View v = x;
  bool seen[kMaxDims] = {};
  for (int64_t d = 0; d < x.dims; ++d) {
    const int64_t from = number(0, x.dims - 1);
    PK_CHECK(!seen[from], "run_plan: a permutation names a dimension twice");
    seen[from] = true;
    v.sizes[d] = x.sizes[from];
    v.strides[d] = x.strides[from];
  }
  yields(v);
}

// numbers: dimension, start, end, step; start and end as Python's
void Builder::slice() {
  View v = in(0);
  const int64_t d = number(0, v.dims - 1), size = v.sizes[d];
  const auto clamped = [&](int64_t i) { return std::clamp<int64_t>(i < 0 ? i + size : i, 0, size); };
  const int64_t start = clamped(number()), end = std::max(start, clamped(number()));
  const int64_t step = number(1, int64_t{1} << 31);
  v.sizes[d] = (end - start + step - 1) / step;
  v.offset += start * v.strides[d] * dtype_bytes(v.dtype);
  if (v.sizes[d] > 1) v.strides[d] *= step;
  yields(v);
}

// numbers: a size each, or -1 for the operand's; new dimensions come first
void Builder::expand() {
  const View& x = in(0);
  View v = x;
  v.dims = static_cast<int64_t>(step_->numbers.size());
  PK_CHECK(v.dims >= x.dims && v.dims <= kMaxDims, "run_plan: a tensor of ", x.dims,
           " dimensions cannot be expanded to ", v.dims);
  for (int64_t d = 0; d < v.dims; ++d) {
    const int64_t from = d - (v.dims - x.dims), size = number(-1, int64_t{1} << 48);
    PK_CHECK(size >= 0 || from >= 0, "run_plan: a new dimension of an expanded tensor has no size");
    v.sizes[d] = size < 0 ? x.sizes[from] : size;
    PK_CHECK(from < 0 || x.sizes[from] == 1 || x.sizes[from] == v.sizes[d], "run_plan: a tensor of shape ",
             shape_of(x.sizes.data(), x.dims), " cannot be expanded so");
    v.strides[d] = from < 0 || (x.sizes[from] == 1 && v.sizes[d] != 1) ? 0 : x.strides[from];
  }
  PK_CHECK(is_countable(v), "run_plan: an expanded tensor has too many elements: its shape is ",
           shape_of(v.sizes.data(), v.dims));
  yields(v);
}

// numbers: how many elements before and behind, of the last dimension first; reals: their value
void Builder::pad() {
  const View x = in(0);
  const double value = real();
  PK_CHECK(std::abs(value) < 1e9 || is_real(x.dtype), "run_plan: integers are padded with ", value);
  Sizes sizes = x.sizes, before{};
  const int64_t dims = static_cast<int64_t>(step_->numbers.size()) / 2;
  PK_CHECK(dims <= x.dims, "run_plan: more dimensions are padded than there are");
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = x.dims - 1 - i;
    before[d] = number(0, int64_t{1} << 31);
    sizes[d] += before[d] + number(0, int64_t{1} << 31);
  }
  const View out = fresh(x.dtype, sizes.data(), x.dims, suggests_channels_last(x));
  View inside = out;
  inside.sizes = x.sizes;
  for (int64_t d = 0; d < x.dims; ++d) inside.offset += before[d] * out.strides[d] * dtype_bytes(x.dtype);
  add(std::make_unique<FillDriver>(dtype_bytes(x.dtype), out.numel(), bits_of(x.dtype, value), threads_), "fill", {},
      out);
  copy(x, inside);
  yields(out);
}

// numbers: 1 for channels_last, 0 for contiguous
void Builder::contiguous() { yields(number(0, 1) ? to_channels_last(in(0)) : to_contiguous(in(0))); }

// numbers: dimension
void Builder::cat() {
  const View& first = in(0);
  const int64_t d = number(0, first.dims - 1);
  Sizes sizes = first.sizes;
  sizes[d] = 0;
  bool channels_last = true;
  for (size_t i = 0; i < operands(); ++i) {
    const View& x = in(i);
    bool fits = x.dims == first.dims && x.dtype == first.dtype;
    for (int64_t k = 0; fits && k < x.dims; ++k) fits = k == d || x.sizes[k] == first.sizes[k];
    PK_CHECK(fits, "run_plan: tensors of shapes ", shape_of(first.sizes.data(), first.dims), " and ",
             shape_of(x.sizes.data(), x.dims), " cannot be joined");
    sizes[d] += x.sizes[d];
    channels_last = channels_last && suggests_channels_last(x);
  }
  const View out =
      joins() ? whole(value(), joined_->wholes[value()]) : fresh(first.dtype, sizes.data(), first.dims, channels_last);
  View piece = out;
  for (size_t i = 0; i < operands(); ++i) {
    piece.sizes[d] = in(i).sizes[d];
    if (!in_place(i)) copy(in(i), piece);
    piece.offset += piece.sizes[d] * out.strides[d] * dtype_bytes(out.dtype);
  }
  yields(out);
}

}  // namespace pykernels
