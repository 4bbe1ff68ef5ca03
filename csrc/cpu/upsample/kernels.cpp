// Bilinear interpolation, once per isa: four pixels blended channel by channel.
#include "cpu/upsample/kernels.h"

#include "cpu/isa/loops.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

template <class T>
PK_INLINE void blend_row(const T* above, const T* below, const Tap& row, const Tap* columns, int64_t width,
                         int64_t channels, T* y, int64_t step) {
  const f32 t0 = set1(row.weight0), t1 = set1(row.weight1);
  for (int64_t x = 0; x < width; ++x, y += step) {
    const int64_t l = columns[x].first * channels, r = columns[x].second * channels;
    const f32 s0 = set1(columns[x].weight0), s1 = set1(columns[x].weight1);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int n = lanes_left(channels - c);
      const f32 top = add(mul(s0, read_real(above + l + c, n)), mul(s1, read_real(above + r + c, n)));
      const f32 bottom = add(mul(s0, read_real(below + l + c, n)), mul(s1, read_real(below + r + c, n)));
      write_real(y + c, add(mul(t0, top), mul(t1, bottom)), n);
    }
  }
}

void bilinear_kernel(const void* above, const void* below, Pixel type, const Tap& row, const Tap* columns,
                     int64_t width, int64_t channels, void* y, int64_t step) {
  const auto of = [&](auto* out) {
    using T = decltype(out);
    blend_row(static_cast<T>(const_cast<void*>(above)), static_cast<T>(const_cast<void*>(below)), row, columns, width,
              channels, out, step);
  };
  switch (type) {
    case Pixel::f32: return of(static_cast<float*>(y));
    case Pixel::bf16: return of(static_cast<bfloat16*>(y));
    case Pixel::f16: return of(static_cast<float16*>(y));
    case Pixel::u8: return of(static_cast<uint8_t*>(y));
    case Pixel::s8: return of(static_cast<int8_t*>(y));
  }
}

}  // namespace

const UpsampleKernels upsample_kernels = {bilinear_kernel};

}  // namespace pykernels::PYKERNELS_ISA_NS
