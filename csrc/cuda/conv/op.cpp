// _cuda_int8_conv: checks and runs one configuration of conv.h. Private: pykernels/cuda/triton chooses the
// configuration.
#include <torch/csrc/stable/accelerator.h>

#include <climits>

#include "cuda/conv/conv.h"
#include "cuda/epilogue/arguments.h"

namespace pykernels {

namespace {

constexpr const char* kOp = "_cuda_int8_conv";

// The output's size along one axis, 0 height or 1 width.
int64_t out_size(const conv::Problem& p, int axis, int64_t size) {
  const int64_t room = size + p.before[axis] + p.after[axis] - int64_t{p.dilation[axis]} * (p.kernel[axis] - 1) - 1;
  PK_CHECK(room >= 0, kOp, ": x with its padding is smaller than kernel_size");
  return room / p.stride[axis] + 1;
}

// The limits are those of TMA's im2col mode: 8 bits each for the corners of the box and for the taps in it.
void check_geometry(conv::Problem& p, const Ints& kernel, const Ints& stride, const Ints& padding,
                    const Ints& dilation) {
  check_pair(kOp, "kernel_size", kernel, 1);
  check_pair(kOp, "stride", stride, 1);
  check_pair(kOp, "dilation", dilation, 1);
  PK_CHECK(padding.size() == 4, kOp, ": padding must be (left, right, top, bottom), not ", padding.size(), " numbers");
  for (int64_t v : padding) PK_CHECK(v >= 0 && v < 128, kOp, ": padding must lie in [0, 128), not ", v);
  for (int axis : {0, 1}) {
    PK_CHECK(stride[axis] <= 8, kOp, ": stride must be at most 8, not ", stride[axis]);
    PK_CHECK((kernel[axis] - 1) * dilation[axis] < 128, kOp, ": kernel_size must span at most 128 pixels, not ",
             (kernel[axis] - 1) * dilation[axis] + 1);
    p.kernel[axis] = static_cast<int>(kernel[axis]);
    p.stride[axis] = static_cast<int>(stride[axis]);
    p.dilation[axis] = static_cast<int>(dilation[axis]);
    p.before[axis] = static_cast<int>(padding[axis == 0 ? 2 : 0]);
    p.after[axis] = static_cast<int>(padding[axis == 0 ? 3 : 1]);
  }
}

void int8_conv(const Tensor& x, const Tensor& w, const Tensor& out, const Ints& kernel_size, const Ints& stride,
               const Ints& padding, const Ints& dilation, const Tensor& column_scale, const Tensor& column_sum,
               const Tensor& bias, double x_scale, int64_t x_zero_point, double out_scale, int64_t out_zero_point,
               const std::string& activation, const std::optional<Tensor>& residual, double residual_scale,
               int64_t residual_zero_point, const std::string& residual_order, int64_t config) {
  PK_CHECK(x.is_cuda(), kOp, ": x must be on a CUDA device");
  PK_CHECK(x.scalar_type() == ScalarType::Byte, kOp, ": x must be uint8, not ", dtype_name(x.scalar_type()));
  PK_CHECK(is_channels_last(x), kOp, ": x must be channels_last with 4 dimensions, not of shape ", shape_of(x));
  PK_CHECK(w.scalar_type() == ScalarType::Char, kOp, ": w must be int8, not ", dtype_name(w.scalar_type()));
  conv::Problem p{};
  check_geometry(p, kernel_size, stride, padding, dilation);
  const int64_t c = x.size(1), h = x.size(2), width = x.size(3);
  PK_CHECK(c > 0 && c % 16 == 0, kOp, ": x must have a multiple of 16 channels, not ", c);
  const int64_t k = kernel_size[0] * kernel_size[1] * c;
  PK_CHECK(w.dim() == 2 && w.is_contiguous() && w.size(1) == k, kOp, ": w must be contiguous of shape [n, ", k,
           "], not ", shape_of(w));
  PK_CHECK(k <= INT_MAX / (255 * 128), kOp, ": w sums ", k, " products, which s32 may not hold");
  for (int64_t v : padding)
    PK_CHECK(v == 0 || x_zero_point == 0, kOp, ": x_zero_point must be 0 where there is padding, not ", x_zero_point);
  const int64_t oh = out_size(p, 0, h), ow = out_size(p, 1, width), n = w.size(0), m = x.size(0) * oh * ow;
  PK_CHECK(m <= INT_MAX && n <= INT_MAX && h <= INT_MAX && width <= INT_MAX, kOp,
           ": out must have less than 2^31 pixels and channels");
  p.images = static_cast<int>(x.size(0)), p.height = static_cast<int>(h), p.width = static_cast<int>(width);
  p.channels = static_cast<int>(c), p.out_channels = static_cast<int>(n);
  p.out_height = static_cast<int>(oh), p.out_width = static_cast<int>(ow);
  p.x = static_cast<const uint8_t*>(cuda_memory(kOp, "x", x, x));
  p.w = static_cast<const int8_t*>(cuda_memory(kOp, "w", w, x));
  p.epilogue = checked_epilogue(
      kOp,
      {out, column_scale, column_sum, bias, std::nullopt, std::nullopt, x_scale, x_zero_point, out_scale,
       out_zero_point, activation, residual, residual_scale, residual_zero_point, residual_order},
      x, m, n);
  check_config(kOp, config, conv::config_count());
  if (m == 0 || n == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  p.stream = enter_device(kOp, x.get_device());
  run_config(kOp, conv::config(static_cast<int>(config)), p, out.scalar_type());
}

std::string configs() { return config_lines(conv::config_count(), conv::config); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def("_cuda_int8_conv_configs() -> str");
  m.def(
      "_cuda_int8_conv(Tensor x, Tensor w, Tensor(a!) out, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, Tensor column_scale, Tensor column_sum, Tensor bias, float x_scale, int x_zero_point, "
      "float out_scale, int out_zero_point, str activation, Tensor? residual, float residual_scale, "
      "int residual_zero_point, str residual_order, int config) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) { m.impl("_cuda_int8_conv", TORCH_BOX(&int8_conv)); }
STABLE_TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) {
  m.impl("_cuda_int8_conv_configs", TORCH_BOX(&configs));
}

}  // namespace pykernels
