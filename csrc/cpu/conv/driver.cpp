#include "cpu/conv/driver.h"

#include <algorithm>
#include <type_traits>

namespace pykernels {
namespace {

// A row of a photograph. Of planes (step 1) it is the compiler's to vectorize.
template <class T>
inline void photograph_row(const T* red, const T* green, const T* blue, int64_t step, int64_t width, uint8_t* to) {
  if constexpr (sizeof(T) == 4) {
    auto* out = reinterpret_cast<T*>(to);
    for (int64_t x = 0; x < width; ++x, out += 3)
      out[0] = red[x * step], out[1] = green[x * step], out[2] = blue[x * step];
  } else {  // the fourth channel is zero
    using Pixel = std::conditional_t<sizeof(T) == 1, uint32_t, uint64_t>;
    constexpr int kBits = 8 * sizeof(T);
    auto* out = reinterpret_cast<Pixel*>(to);
    for (int64_t x = 0; x < width; ++x)
      out[x] = Pixel{red[x * step]} | Pixel{green[x * step]} << kBits | Pixel{blue[x * step]} << (2 * kBits);
  }
}

// One row of x (channels `channel_stride` and columns `column_stride` elements apart) to pixels.
template <class T>
void copy_row(const T* from, int64_t channel_stride, int64_t column_stride, const ConvShape& s, int64_t group,
              int64_t padded, uint8_t* to, int64_t pixel) {
  if (group == 3 && s.groups == 1) {
    const T *green = from + channel_stride, *blue = green + channel_stride;
    return column_stride == 1 ? photograph_row<T>(from, green, blue, 1, s.w, to)
                              : photograph_row<T>(from, green, blue, column_stride, s.w, to);
  }
  for (int64_t x = 0; x < s.w; ++x) {
    T* out = reinterpret_cast<T*>(to + x * pixel);
    const T* in = from + x * column_stride;
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t c = 0; c < group; ++c) out[g * padded + c] = in[(g * group + c) * channel_stride];
      for (int64_t c = group; c < padded; ++c) out[g * padded + c] = 0;
    }
  }
}

}  // namespace

ConvShape conv_shape(const char* op, const int64_t* x, int64_t out_channels, const Ints& kernel, const Ints& stride,
                     const Ints& padding, const Ints& dilation, int64_t groups) {
  check_pair(op, "kernel_size", kernel, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "dilation", dilation, 1);
  PK_CHECK(padding.size() == 4, op, ": padding must be (left, right, top, bottom), not ", padding.size(), " numbers");
  for (int64_t p : padding) PK_CHECK(p >= 0 && p < (1 << 20), op, ": padding must lie in [0, 2^20), not ", p);
  PK_CHECK(groups >= 1, op, ": groups must be at least 1, not ", groups);
  ConvShape s{};
  s.n = x[0], s.c = x[1], s.h = x[2], s.w = x[3];
  s.o = out_channels, s.kh = kernel[0], s.kw = kernel[1];
  s.sh = stride[0], s.sw = stride[1], s.dh = dilation[0], s.dw = dilation[1], s.groups = groups;
  s.left = padding[0], s.right = padding[1], s.top = padding[2], s.bottom = padding[3];
  PK_CHECK(s.c % groups == 0, op, ": groups is ", groups, ", which does not divide the ", s.c, " channels of x");
  const int64_t room_h = s.h + s.top + s.bottom - s.dh * (s.kh - 1) - 1;
  const int64_t room_w = s.w + s.left + s.right - s.dw * (s.kw - 1) - 1;
  PK_CHECK(room_h >= 0 && room_w >= 0, op, ": x of shape ", shape_of(x, 4),
           " with its padding is smaller than kernel_size ", s.kh, "x", s.kw, " (dilation ", s.dh, "x", s.dw, ")");
  s.oh = room_h / s.sh + 1, s.ow = room_w / s.sw + 1;
  return s;
}

void check_conv_weight(const char* op, const PackedView& w, const ConvShape& s) {
  PK_CHECK(w.h.kh == s.kh && w.h.kw == s.kw, op, ": kernel_size is ", s.kh, "x", s.kw, ", but packed was made for ",
           w.h.kh, "x", w.h.kw);
  PK_CHECK(w.h.groups * w.h.n == s.o, op, ": out_channels is ", s.o, ", but packed was made for ", w.h.groups * w.h.n);
  const bool depthwise = w.h.kind == PackKind::depthwise;
  const int64_t groups = depthwise ? w.h.n : w.h.groups;
  PK_CHECK(groups == s.groups, op, ": groups is ", s.groups, ", but packed was made for ", groups);
  PK_CHECK(groups * w.h.k == s.c, op, ": x has ", s.c, " channels, but packed was made for ", groups * w.h.k);
}

ConvPixels::ConvPixels(const ConvShape& s, int64_t element_bytes) {
  channels = round_up(s.c / s.groups, 4 / element_bytes);
  pixel = s.groups * channels * element_bytes;
  row = s.w * pixel;
  image = s.h * row;
  as_they_are = channels == s.c / s.groups;
}

ConvInputDriver::ConvInputDriver(const ConvShape& shape, int64_t element_bytes, const int64_t* x_strides,
                                 int64_t threads)
    : shape_(shape), pixels_(shape, element_bytes), element_bytes_(element_bytes) {
  std::copy_n(x_strides, 4, strides_);
  const int64_t lines = shape.n * shape.h;
  tasks = std::min(lines, std::clamp<int64_t>(lines * pixels_.row >> 16, 1, threads));
}

template <class T>
void ConvInputDriver::copy_lines(int64_t first, int64_t last) const {
  const auto* from = reinterpret_cast<const T*>(x_);
  for (int64_t line = first; line < last; ++line)
    copy_row<T>(from + line / shape_.h * strides_[0] + line % shape_.h * strides_[2], strides_[1], strides_[3], shape_,
                shape_.c / shape_.groups, pixels_.channels, out_ + line * pixels_.row, pixels_.pixel);
}

void ConvInputDriver::run(int64_t task, uint8_t*) const {
  const int64_t lines = shape_.n * shape_.h, first = lines * task / tasks, last = lines * (task + 1) / tasks;
  switch (element_bytes_) {
    case 1: return copy_lines<uint8_t>(first, last);
    case 2: return copy_lines<uint16_t>(first, last);
    default: return copy_lines<uint32_t>(first, last);
  }
}

TileProblem conv_problem(const ConvShape& s, const PackedView& weights, const Epilogue& e, uint8_t fill, uint8_t flip) {
  const ConvPixels pixels(s, element_bytes(weights.h.element));
  TileProblem p{};
  p.dot = &dot_kernel(weights);
  p.epilogue = epilogue_kernel(weights.h.element);
  p.image_stride = pixels.image, p.row_stride = pixels.row, p.pixel = pixels.pixel;
  p.group_stride = pixels.pixel / s.groups;
  p.height = s.h, p.width = s.w;
  p.kh = s.kh, p.kw = s.kw, p.sh = s.sh, p.sw = s.sw, p.dh = s.dh, p.dw = s.dw, p.top = s.top, p.left = s.left;
  p.fill = fill, p.flip = flip;
  p.images = s.n, p.rows = s.oh, p.columns = s.ow;
  p.weights = weights;
  p.e = e;
  return p;
}

}  // namespace pykernels
