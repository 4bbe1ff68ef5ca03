#include "cpu/conv/input.h"

#include <algorithm>

#include "cpu/tile/op.h"

namespace pykernels {
namespace {

// One row of x (channels `channel_stride` and columns `column_stride` elements apart) to pixels.
template <class T>
void copy_row(const T* from, int64_t channel_stride, int64_t column_stride, const ConvShape& s, int64_t group,
              int64_t padded, uint8_t* to, int64_t pixel) {
  if (sizeof(T) == 1 && group == 3 && s.groups == 1) {  // a photograph: one word a pixel
    const T *red = from, *green = from + channel_stride, *blue = from + 2 * channel_stride;
    auto* words = reinterpret_cast<uint32_t*>(to);
    const auto word = [&](int64_t i) { return uint32_t{red[i]} | uint32_t{green[i]} << 8 | uint32_t{blue[i]} << 16; };
    if (column_stride == 1)  // planes: the compiler's to vectorize
      for (int64_t x = 0; x < s.w; ++x) words[x] = word(x);
    else
      for (int64_t x = 0; x < s.w; ++x) words[x] = word(x * column_stride);
    return;
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

template <class T>
void copy_rows(const ConvShape& s, const Tensor& x, int64_t group, int64_t padded, const ConvInput& in, uint8_t* out) {
  const T* from = pointer<T>(x);
  const int64_t sn = x.stride(0), sc = x.stride(1), sy = x.stride(2), sx = x.stride(3);
  parallel(s.n * s.h, std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(in.row, 1)),
           [&](int64_t first, int64_t last) {
             for (int64_t line = first; line < last; ++line)
               copy_row<T>(from + line / s.h * sn + line % s.h * sy, sc, sx, s, group, padded, out + line * in.row,
                           in.pixel);
           });
}

}  // namespace

ConvInput prepare_input(const ConvShape& s, const Tensor& input) {
  const ScalarType t = input.scalar_type();
  const int64_t es = element_size(t), group = s.c / s.groups, padded = round_up(group, 4 / es);
  ConvInput in{input, nullptr, 0, 0, 0, static_cast<uint8_t>(t == ScalarType::Char ? 0x80 : 0)};
  in.pixel = s.groups * padded * es;
  in.row = s.w * in.pixel;
  in.image = s.h * in.row;
  // More than a few channels: the host framework transposes NCHW faster than a strided copy.
  const Tensor x = s.c > 4 || is_channels_last(input) ? to_channels_last(input) : input;
  if (is_channels_last(x) && group == padded) {
    in.storage = x;
    in.data = static_cast<const uint8_t*>(x.const_data_ptr());
    return in;
  }
  in.storage = empty({s.n * in.image + kBlockBytes}, ScalarType::Byte);
  auto* out = mutable_pointer<uint8_t>(in.storage);
  in.data = out;
  if (es == 1)
    copy_rows<uint8_t>(s, x, group, padded, in, out);
  else if (es == 2)
    copy_rows<uint16_t>(s, x, group, padded, in, out);
  else
    copy_rows<uint32_t>(s, x, group, padded, in, out);
  return in;
}

}  // namespace pykernels
