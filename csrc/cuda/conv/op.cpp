// _cuda_int8_conv and _cuda_int8_few_channels: check and run one configuration of conv.h or few_channels.h. Private:
// pykernels/cuda/triton chooses the configuration.
#include <torch/csrc/stable/accelerator.h>

#include <climits>

#include "cuda/conv/conv.h"
#include "cuda/conv/few_channels.h"
#include "cuda/epilogue/arguments.h"

namespace pykernels {

namespace {

// The arguments of both ops that say where x's pixels lie, in the schemas' order.
struct Geometry {
  const Ints& kernel;
  const Ints& stride;
  const Ints& padding;
  const Ints& dilation;
};

// Reads them into p, with the sizes of x and out. Strides up to max_stride, taps that span up to max_span pixels.
void check_geometry(const char* op, conv::Problem& p, const Tensor& x, int64_t out_channels, const Geometry& g,
                    int64_t max_stride, int64_t max_span) {
  check_pair(op, "kernel_size", g.kernel, 1);
  check_pair(op, "stride", g.stride, 1);
  check_pair(op, "dilation", g.dilation, 1);
  PK_CHECK(g.padding.size() == 4, op, ": padding must be (left, right, top, bottom), not ", g.padding.size(),
           " numbers");
  for (int64_t v : g.padding) PK_CHECK(v >= 0 && v < 128, op, ": padding must lie in [0, 128), not ", v);
  int64_t out[2];
  for (int axis : {0, 1}) {
    const int64_t span = (g.kernel[axis] - 1) * g.dilation[axis] + 1, size = x.size(2 + axis);
    const int64_t before = g.padding[axis == 0 ? 2 : 0], after = g.padding[axis == 0 ? 3 : 1];
    PK_CHECK(g.stride[axis] <= max_stride, op, ": stride must be at most ", max_stride, ", not ", g.stride[axis]);
    PK_CHECK(span <= max_span, op, ": kernel_size must span at most ", max_span, " pixels, not ", span);
    PK_CHECK(size + before + after >= span, op, ": x with its padding is smaller than kernel_size");
    out[axis] = (size + before + after - span) / g.stride[axis] + 1;
    p.kernel[axis] = static_cast<int>(g.kernel[axis]);
    p.stride[axis] = static_cast<int>(g.stride[axis]);
    p.dilation[axis] = static_cast<int>(g.dilation[axis]);
    p.before[axis] = static_cast<int>(before), p.after[axis] = static_cast<int>(after);
  }
  PK_CHECK(
      x.size(0) * out[0] * out[1] <= INT_MAX && out_channels <= INT_MAX && x.size(2) <= INT_MAX && x.size(3) <= INT_MAX,
      op, ": out must have less than 2^31 pixels and channels");
  p.images = static_cast<int>(x.size(0)), p.height = static_cast<int>(x.size(2)), p.width = static_cast<int>(x.size(3));
  p.channels = static_cast<int>(x.size(1)), p.out_channels = static_cast<int>(out_channels);
  p.out_height = static_cast<int>(out[0]), p.out_width = static_cast<int>(out[1]);
}

int64_t pixels(const conv::Problem& p) { return int64_t{p.images} * p.out_height * p.out_width; }

const int8_t* checked_weights(const char* op, const Tensor& w, const Tensor& x, int64_t k) {
  PK_CHECK(w.scalar_type() == ScalarType::Char, op, ": w must be int8, not ", dtype_name(w.scalar_type()));
  PK_CHECK(w.dim() == 2 && w.is_contiguous() && w.size(1) == k, op, ": w must be contiguous of shape [n, ", k,
           "], not ", shape_of(w));
  return static_cast<const int8_t*>(cuda_memory(op, "w", w, x));
}

void int8_conv(const Tensor& x, const Tensor& w, const Tensor& out, const Ints& kernel_size, const Ints& stride,
               const Ints& padding, const Ints& dilation, const Tensor& column_scale, const Tensor& column_sum,
               const Tensor& bias, double x_scale, int64_t x_zero_point, double out_scale, int64_t out_zero_point,
               const std::string& activation, const std::optional<Tensor>& residual, double residual_scale,
               int64_t residual_zero_point, const std::string& residual_order, int64_t config) {
  constexpr const char* kOp = "_cuda_int8_conv";
  PK_CHECK(x.is_cuda(), kOp, ": x must be on a CUDA device");
  PK_CHECK(x.scalar_type() == ScalarType::Byte, kOp, ": x must be uint8, not ", dtype_name(x.scalar_type()));
  PK_CHECK(is_channels_last(x), kOp, ": x must be channels_last with 4 dimensions, not of shape ", shape_of(x));
  conv::Problem p{};
  // The limits of TMA's im2col mode: 8 bits each for the corners of the box and for the taps in it.
  check_geometry(kOp, p, x, w.size(0), {kernel_size, stride, padding, dilation}, 8, 128);
  const int64_t c = x.size(1), k = kernel_size[0] * kernel_size[1] * c;
  PK_CHECK(c > 0 && c % 16 == 0, kOp, ": x must have a multiple of 16 channels, not ", c);
  PK_CHECK(k <= INT_MAX / (255 * 128), kOp, ": w sums ", k, " products, which s32 may not hold");
  for (int64_t v : padding)
    PK_CHECK(v == 0 || x_zero_point == 0, kOp, ": x_zero_point must be 0 where there is padding, not ", x_zero_point);
  p.w = checked_weights(kOp, w, x, k);
  p.x = static_cast<const uint8_t*>(cuda_memory(kOp, "x", x, x));
  const int64_t m = pixels(p), n = p.out_channels;
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

void int8_few_channels(const Tensor& x, const Tensor& w, const Tensor& out, const Ints& kernel_size, const Ints& stride,
                       const Ints& padding, const Tensor& column_scale, const Tensor& column_sum, const Tensor& bias,
                       double x_scale, int64_t x_zero_point, double out_scale, int64_t out_zero_point,
                       const std::string& activation, const std::optional<Tensor>& residual, double residual_scale,
                       int64_t residual_zero_point, const std::string& residual_order, int64_t config) {
  constexpr const char* kOp = "_cuda_int8_few_channels";
  PK_CHECK(x.is_cuda(), kOp, ": x must be on a CUDA device");
  PK_CHECK(is_byte(x.scalar_type()), kOp, ": x must be uint8 or int8, not ", dtype_name(x.scalar_type()));
  PK_CHECK(is_channels_last(x), kOp, ": x must be channels_last with 4 dimensions, not of shape ", shape_of(x));
  few_channels::Problem p{};
  check_geometry(kOp, p, x, w.size(0), {kernel_size, stride, padding, {1, 1}}, few_channels::kMaxStride,
                 few_channels::kMaxKernel);
  const int64_t c = x.size(1), m = pixels(p), n = p.out_channels;
  PK_CHECK(c >= 1 && c <= few_channels::kMaxChannels, kOp, ": x must have at most ", few_channels::kMaxChannels,
           " channels, not ", c);
  PK_CHECK(x.size(2) * x.size(3) * c <= INT_MAX && x.numel() / 4 < INT_MAX, kOp,
           ": x must have less than 2^31 words, and an image less than 2^31 bytes");
  PK_CHECK(n % 16 == 0, kOp, ": out must have a multiple of 16 channels, not ", n);
  p.w = checked_weights(kOp, w, x, kernel_size[0] * few_channels::row_bytes(p.kernel[1], p.channels));
  p.x = static_cast<const uint8_t*>(cuda_memory(kOp, "x", x, x));
  p.is_signed = x.scalar_type() == ScalarType::Char;
  check_zero_point(kOp, "x_zero_point", x_zero_point, x.scalar_type());
  p.epilogue = checked_epilogue(
      kOp,
      {out, column_scale, column_sum, bias, std::nullopt, std::nullopt, x_scale, x_zero_point + (p.is_signed ? 128 : 0),
       out_scale, out_zero_point, activation, residual, residual_scale, residual_zero_point, residual_order},
      x, m, n);
  check_config(kOp, config, few_channels::config_count());
  if (m == 0 || n == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  p.stream = enter_device(kOp, x.get_device());
  run_config(kOp, few_channels::config(static_cast<int>(config)), p, out.scalar_type());
}

std::string configs() { return config_lines(conv::config_count(), conv::config); }
std::string few_channels_configs() { return config_lines(few_channels::config_count(), few_channels::config); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pykernels, m) {
  m.def("_cuda_int8_conv_configs() -> str");
  m.def(
      "_cuda_int8_conv(Tensor x, Tensor w, Tensor(a!) out, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, Tensor column_scale, Tensor column_sum, Tensor bias, float x_scale, int x_zero_point, "
      "float out_scale, int out_zero_point, str activation, Tensor? residual, float residual_scale, "
      "int residual_zero_point, str residual_order, int config) -> ()");
  m.def("_cuda_int8_few_channels_configs() -> str");
  m.def(
      "_cuda_int8_few_channels(Tensor x, Tensor w, Tensor(a!) out, int[] kernel_size, int[] stride, int[] padding, "
      "Tensor column_scale, Tensor column_sum, Tensor bias, float x_scale, int x_zero_point, float out_scale, "
      "int out_zero_point, str activation, Tensor? residual, float residual_scale, int residual_zero_point, "
      "str residual_order, int config) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) {
  m.impl("_cuda_int8_conv", TORCH_BOX(&int8_conv));
  m.impl("_cuda_int8_few_channels", TORCH_BOX(&int8_few_channels));
}
STABLE_TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) {
  m.impl("_cuda_int8_conv_configs", TORCH_BOX(&configs));
  m.impl("_cuda_int8_few_channels_configs", TORCH_BOX(&few_channels_configs));
}

}  // namespace pykernels
