#include "cpu/conv/input.h"

#include <algorithm>
#include <cstring>

#include "cpu/tile/op.h"

namespace pykernels {
namespace {

// One row of x (channels `channel_stride` and columns `column_stride` elements apart) to pixels.
template <class T>
void copy_row(const T* from, int64_t channel_stride, int64_t column_stride, const ConvShape& s, int64_t group,
              int64_t padded, uint8_t* to, int64_t pixel, T flip) {
  if (channel_stride == 1 && column_stride == s.c && group == padded && flip == 0) {
    std::memcpy(to, from, s.w * s.c * sizeof(T));
    return;
  }
  for (int64_t x = 0; x < s.w; ++x) {
    T* out = reinterpret_cast<T*>(to + x * pixel);
    const T* in = from + x * column_stride;
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t c = 0; c < group; ++c)
        out[g * padded + c] = static_cast<T>(in[(g * group + c) * channel_stride] ^ flip);
      for (int64_t c = group; c < padded; ++c) out[g * padded + c] = 0;
    }
  }
}

template <class T>
void copy_rows(const ConvShape& s, const Tensor& x, int64_t group, int64_t padded, T fill, T flip, const ConvInput& in,
               uint8_t* out) {
  const T* from = pointer<T>(x);
  const int64_t height = s.h + s.top + s.bottom, width = s.w + s.left + s.right;
  const int64_t sn = x.stride(0), sc = x.stride(1), sy = x.stride(2), sx = x.stride(3);
  const auto blank = [&](uint8_t* to, int64_t pixels) {
    std::fill_n(reinterpret_cast<T*>(to), pixels * in.pixel / static_cast<int64_t>(sizeof(T)), fill);
  };
  parallel(
      s.n * height, std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(in.row, 1)), [&](int64_t first, int64_t last) {
        for (int64_t line = first; line < last; ++line) {
          const int64_t image = line / height, y = line % height - s.top;
          uint8_t* to = out + image * in.image + (line % height) * in.row;
          if (y < 0 || y >= s.h) {
            blank(to, width);
            continue;
          }
          blank(to, s.left);
          copy_row<T>(from + image * sn + y * sy, sc, sx, s, group, padded, to + s.left * in.pixel, in.pixel, flip);
          blank(to + (s.left + s.w) * in.pixel, s.right);
        }
      });
}

}  // namespace

ConvInput prepare_input(const ConvShape& shape, const Tensor& input, bool depthwise, uint8_t zero_point) {
  ConvShape s = shape;
  if (depthwise)
    s.groups = 1;
  else
    s.left = s.right = s.top = s.bottom = 0;
  const ScalarType t = input.scalar_type();
  const int64_t es = element_size(t), per_word = 4 / es;
  const int64_t group = s.c / s.groups;
  const int64_t padded = depthwise ? round_up(group, kColumns) : round_up(group, per_word);
  const bool is_signed = t == ScalarType::Char, flip = depthwise && is_signed;
  const bool pads = s.left || s.right || s.top || s.bottom;
  ConvInput in{input, nullptr, 0, 0, 0, static_cast<uint8_t>(is_signed && !flip ? 0x80 : 0)};
  in.pixel = s.groups * padded * es;
  in.row = (s.w + s.left + s.right) * in.pixel;
  in.image = (s.h + s.top + s.bottom) * in.row;
  // More than a few channels: the host framework transposes NCHW faster than a strided copy.
  const Tensor x = s.c > 4 || is_channels_last(input) ? to_channels_last(input) : input;
  if (is_channels_last(x) && !pads && group == padded && !flip) {
    in.storage = x;
    in.data = static_cast<const uint8_t*>(x.const_data_ptr());
    return in;
  }
  in.storage = empty({s.n * in.image + kBlockBytes}, ScalarType::Byte);
  auto* out = mutable_pointer<uint8_t>(in.storage);
  in.data = out;
  if (es == 1)
    copy_rows<uint8_t>(s, x, group, padded, zero_point, flip ? 0x80 : 0, in, out);
  else if (es == 2)
    copy_rows<uint16_t>(s, x, group, padded, 0, 0, in, out);
  else
    copy_rows<uint32_t>(s, x, group, padded, 0, 0, in, out);
  return in;
}

}  // namespace pykernels
