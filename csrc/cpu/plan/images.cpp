// Steps that make images of other sizes.
#include "cpu/copy/driver.h"
#include "cpu/plan/builder.h"
#include "cpu/upsample/driver.h"

namespace pykernels {
namespace {

Pixel pixel_of(Dtype t) {
  switch (t) {
    case Dtype::bf16: return Pixel::bf16;
    case Dtype::f16: return Pixel::f16;
    case Dtype::u8: return Pixel::u8;
    case Dtype::s8: return Pixel::s8;
    default: return Pixel::f32;
  }
}

}  // namespace

// numbers: align_corners, then height and width unless something else gives them; reals: scale factors, if any.
// Operands: x; an image whose height and width the result gets, if any.
void Builder::upsample() {
  const View& x = in(0);
  PK_CHECK(x.dims == 4 && (is_byte(x.dtype) || is_real(x.dtype)), "run_plan: what is upsampled is no image");
  const bool align_corners = number(0, 1) != 0;
  Ints size;
  std::vector<double> factors;
  if (operands() > 1) {
    PK_CHECK(in(1).dims == 4, "run_plan: what is upsampled gets the size of no image");
    size = {in(1).sizes[2], in(1).sizes[3]};
  } else if (step_->reals.empty()) {
    size = pair();
  } else {
    for (int d = 0; d < 2; ++d) factors.push_back(real());
  }
  const auto [height, width] = upsample_output(name(), x.sizes.data() + 2, size, factors);
  const bool last = suggests_channels_last(x);
  const int64_t sizes[] = {x.sizes[0], x.sizes[1], height, width};
  const View out = last ? fresh_pixels(x.dtype, sizes) : fresh(x.dtype, sizes, 4, false);
  yields(out);
  if (out.numel() == 0) return;
  const View source = last ? to_channels_last(x) : to_contiguous(x);
  const int64_t images = last ? x.sizes[0] : x.sizes[0] * x.sizes[1], channels = last ? x.sizes[1] : 1;
  UpsampleProblem p{step_->kind == StepKind::upsample_nearest2d ? Interpolation::nearest : Interpolation::bilinear,
                    pixel_of(x.dtype),
                    images,
                    x.sizes[2],
                    x.sizes[3],
                    channels,
                    height,
                    width,
                    last ? out.strides[3] : 1};
  p.align_corners = align_corners;
  if (!factors.empty()) p.factors = {factors[0], factors[1]};
  add(std::make_unique<UpsampleDriver>(p, threads_), "upsampling", {&source}, out);
}

// numbers: stride, crop (left, right, top, bottom), groups
void Builder::interleave() {
  const View& x = in(0);
  PK_CHECK(x.dims == 4, "run_plan: what is interleaved is no image");
  const Ints stride = pair();
  Ints crop = pair();
  for (const int64_t side : pair()) crop.push_back(side);
  const InterleaveShape shape{stride, crop, number()};
  const auto sizes = shape.output(name(), x.sizes.data());
  const View out =
      suggests_channels_last(x) ? fresh_pixels(x.dtype, sizes.data()) : fresh(x.dtype, sizes.data(), 4, false);
  yields(out);
  if (out.numel() == 0) return;
  for (int64_t row = 0; row < stride[0]; ++row)
    for (int64_t column = 0; column < stride[1]; ++column) {
      const Phase p = shape.phase(row, column, x.sizes.data(), x.strides.data(), out.strides.data());
      const auto part = [&](View v, const int64_t* strides, int64_t offset) {
        v.dims = 5;
        std::copy_n(p.sizes, 5, v.sizes.data());
        std::copy_n(strides, 5, v.strides.data());
        v.offset += offset * dtype_bytes(v.dtype);
        return v;
      };
      const View from = part(x, p.from, p.from_offset);
      add(std::make_unique<CopyDriver>(dtype_bytes(x.dtype), 5, p.sizes, p.from, p.to, threads_), "interleaving",
          {&from}, part(out, p.to, p.to_offset));
    }
}

}  // namespace pykernels
