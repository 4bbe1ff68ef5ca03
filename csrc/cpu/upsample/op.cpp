// upsample_nearest2d, upsample_bilinear2d, interleave: images of other sizes, in the layout of x.
#include "cpu/op.h"

#include <utility>

#include "common/layout.h"
#include "cpu/copy/driver.h"
#include "cpu/upsample/driver.h"

namespace pykernels {
namespace {

void check_image(const char* op, const Tensor& x) {
  check_cpu(op, "x", x);
  const ScalarType t = x.scalar_type();
  PK_CHECK(is_real(t) || is_byte(t), op, ": x must be " PK_REAL_LIST ", uint8 or int8, not ", dtype_name(t));
  check_dim(op, "x", x, 4);
}

Pixel pixel_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Pixel::f32;
    case ScalarType::BFloat16: return Pixel::bf16;
    case ScalarType::Half: return Pixel::f16;
    case ScalarType::Byte: return Pixel::u8;
    default: return Pixel::s8;
  }
}

Tensor upsample(const char* op, Interpolation mode, const Tensor& x, const Ints& sizes,
                const std::vector<double>& factors, bool align_corners) {
  check_image(op, x);
  const auto [height, width] = upsample_output(op, x.sizes().data() + 2, sizes, factors);
  const bool last = is_channels_last(x) && !x.is_contiguous();
  const Tensor source = last ? x : to_contiguous(x);
  const Tensor out = empty({x.size(0), x.size(1), height, width}, x.scalar_type(), last);
  const int64_t images = last ? x.size(0) : x.size(0) * x.size(1), channels = last ? x.size(1) : 1;
  UpsampleProblem p{mode, pixel_of(x.scalar_type()), images, x.size(2), x.size(3), channels, height, width, channels};
  p.align_corners = align_corners;
  if (!factors.empty()) p.factors = {factors[0], factors[1]};
  UpsampleDriver driver(p, torch::stable::get_num_threads());
  run(driver, {bytes_of(source)}, out);
  return out;
}

Tensor upsample_nearest2d(const Tensor& x, Ints output_size, std::vector<double> scale_factors) {
  return upsample("upsample_nearest2d", Interpolation::nearest, x, output_size, scale_factors, false);
}

Tensor upsample_bilinear2d(const Tensor& x, Ints output_size, bool align_corners, std::vector<double> scale_factors) {
  return upsample("upsample_bilinear2d", Interpolation::bilinear, x, output_size, scale_factors, align_corners);
}

Tensor interleave(const Tensor& x, Ints stride, Ints crop, int64_t groups) {
  const char* op = "interleave";
  check_image(op, x);
  const InterleaveShape shape{std::move(stride), std::move(crop), groups};
  const auto sizes = shape.output(op, x.sizes().data());
  const Tensor out =
      empty({sizes[0], sizes[1], sizes[2], sizes[3]}, x.scalar_type(), is_channels_last(x) && !x.is_contiguous());
  const int64_t bytes = element_size(x.scalar_type());
  for (int64_t row = 0; row < shape.stride[0]; ++row)
    for (int64_t column = 0; column < shape.stride[1]; ++column) {
      const Phase p = shape.phase(row, column, x.sizes().data(), x.strides().data(), out.strides().data());
      CopyDriver driver(bytes, 5, p.sizes, p.from, p.to, torch::stable::get_num_threads());
      if (driver.tasks == 0) continue;
      const uint8_t* in[] = {bytes_of(x) + p.from_offset * bytes};
      driver.bind(in, mutable_bytes_of(out) + p.to_offset * bytes);
      parallel(driver.tasks, 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) driver.run(task, nullptr);
      });
    }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("upsample_nearest2d", TORCH_BOX(&upsample_nearest2d));
  m.impl("upsample_bilinear2d", TORCH_BOX(&upsample_bilinear2d));
  m.impl("interleave", TORCH_BOX(&interleave));
}

}  // namespace pykernels
