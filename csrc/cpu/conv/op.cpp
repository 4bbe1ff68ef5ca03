// Convolutions over packed weights: conv2d (fp32, bf16, fp16), qconv2d (8 bit), conv_bn_act (plain tensors).
#include "cpu/tile/op.h"

#include <algorithm>
#include <cmath>

#include "cpu/conv/depthwise_driver.h"
#include "cpu/conv/winograd_driver.h"

namespace pykernels {
namespace {

PackedHeader conv_header(const char* op, const Tensor& weight, int64_t groups, bool has_bias) {
  check_dim(op, "weight", weight, 4);
  const int64_t o = weight.size(0), c = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  PK_CHECK(o > 0 && c > 0 && kh > 0 && kw > 0, op, ": weight must not be empty, but has shape ", shape_of(weight));
  PK_CHECK(groups >= 1 && o % groups == 0, op, ": groups is ", groups, ", which does not divide the ", o,
           " output channels of weight");
  const Element element = element_of(weight.scalar_type());
  if (c == 1 && o == groups && groups > 1) return make_header(PackKind::depthwise, element, 1, o, 1, kh, kw, has_bias);
  return make_header(PackKind::dot, element, groups, o / groups, c, kh, kw, has_bias);
}

// x as the pixels that tiles read: x itself where it is that, else a copy.
Tensor pixels_of(const ConvShape& s, const Tensor& input, int64_t threads) {
  const int64_t bytes = element_size(input.scalar_type());
  const ConvPixels pixels(s, bytes);
  // More than a few channels: the host framework transposes NCHW faster than a strided copy.
  const Tensor x = s.c > 4 || is_channels_last(input) ? to_channels_last(input) : input;
  if (is_channels_last(x) && pixels.as_they_are) return x;
  const Tensor copy = empty({s.n * pixels.image + kBlockBytes}, ScalarType::Byte);
  ConvInputDriver driver(s, bytes, x.strides().data(), threads);
  run(driver, {bytes_of(x)}, copy);
  return copy;
}

// `residual` is dense in the layout of `out`, or null.
void run_conv(const ConvShape& s, const Tensor& x, const PackedView& weights, Weights are, Epilogue e,
              const std::optional<Tensor>& residual, const Tensor& out) {
  e.out_stride = s.o;
  if (s.n == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const auto fill = static_cast<uint8_t>(e.x_zero_point);
  const uint8_t flip = x.scalar_type() == ScalarType::Char ? 0x80 : 0;
  const uint8_t* added = residual ? bytes_of(*residual) : nullptr;
  if (weights.h.kind == PackKind::depthwise) {
    const Tensor source = to_channels_last(x);
    DepthwiseDriver driver(s, weights, e, fill, flip, threads);
    run(driver, {bytes_of(source), added}, out);
  } else {
    const Tensor source = pixels_of(s, x, threads);
    const ConvProducts products = conv_products(s, weights, e, fill, flip, {}, threads, are);
    run(*products.driver, {bytes_of(source), added}, out);
  }
}

// The residual as channels_last memory of the output's shape.
std::optional<Tensor> checked_residual(const char* op, const std::optional<Tensor>& residual, const Tensor& out,
                                       const std::string& order) {
  residual_after_activation(op, order);
  if (!residual) return std::nullopt;
  PK_CHECK(shape_of(*residual) == shape_of(out), op, ": residual must have the output's shape ", shape_of(out),
           ", not ", shape_of(*residual));
  return to_channels_last(*residual);
}

Tensor conv2d_pack(const Tensor& weight, std::optional<Tensor> bias, int64_t groups) {
  const char* op = "conv2d_pack";
  check_real(op, "weight", weight);
  const PackedHeader header = conv_header(op, weight, groups, bias.has_value());
  return pack_weights(op, header, weight, std::nullopt, checked_bias(op, bias, weight.size(0)));
}

Tensor qconv2d_pack(const Tensor& weight, const Tensor& weight_scale, std::optional<Tensor> bias, int64_t groups) {
  const char* op = "qconv2d_pack";
  check_cpu(op, "weight", weight);
  PK_CHECK(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8, not ",
           dtype_name(weight.scalar_type()));
  const PackedHeader header = conv_header(op, weight, groups, bias.has_value());
  return pack_weights(op, header, weight, checked_weight_scale(op, weight_scale, weight.size(0)),
                      checked_bias(op, bias, weight.size(0)));
}

Tensor conv2d_named(const char* op, const Tensor& x, const Tensor& packed, Weights are, const ConvShape& s,
                    const std::string& activation, const std::optional<Tensor>& residual,
                    const std::string& residual_order) {
  const ScalarType t = x.scalar_type();
  const PackedView weights = checked_packed(op, packed, element_of(t));
  check_conv_weight(op, weights, s);
  Epilogue e = make_epilogue(op, weights, activation);
  Tensor out = empty({s.n, s.o, s.oh, s.ow}, t, true);
  const std::optional<Tensor> dense = checked_residual(op, residual, out, residual_order);
  if (dense) {
    check_real(op, "residual", *dense);
    set_residual(op, e, *dense, residual_order, 1.0, 0);
  }
  e.out_dtype = dtype_of(t);
  run_conv(s, x, weights, are, e, dense, out);
  return out;
}

Tensor conv2d(const Tensor& x, const Tensor& packed, int64_t out_channels, Ints kernel_size, Ints stride, Ints padding,
              Ints dilation, int64_t groups, std::string activation, std::optional<Tensor> residual,
              std::string residual_order) {
  const char* op = "conv2d";
  check_real(op, "x", x);
  check_dim(op, "x", x, 4);
  const ConvShape s = conv_shape(op, x.sizes().data(), out_channels, kernel_size, stride, padding, dilation, groups);
  return conv2d_named(op, x, packed, Weights::called, s, activation, residual, residual_order);
}

Tensor qconv2d(const Tensor& x, const Tensor& packed, int64_t out_channels, Ints kernel_size, Ints stride, Ints padding,
               Ints dilation, int64_t groups, double x_scale, int64_t x_zero_point, std::optional<double> out_scale,
               int64_t out_zero_point, ScalarType out_dtype, std::string activation, std::optional<Tensor> residual,
               double residual_scale, int64_t residual_zero_point, std::string residual_order) {
  const char* op = "qconv2d";
  check_byte(op, "x", x);
  check_dim(op, "x", x, 4);
  const ConvShape s = conv_shape(op, x.sizes().data(), out_channels, kernel_size, stride, padding, dilation, groups);
  const PackedView weights = checked_packed(op, packed, Element::s8);
  check_conv_weight(op, weights, s);
  check_scale(op, "x_scale", x_scale);
  check_zero_point(op, "x_zero_point", x_zero_point, x.scalar_type());
  Epilogue e = make_epilogue(op, weights, activation);
  set_out(op, e, out_dtype, out_scale, out_zero_point);
  Tensor out = empty({s.n, s.o, s.oh, s.ow}, out_dtype, true);
  const std::optional<Tensor> dense = checked_residual(op, residual, out, residual_order);
  if (dense) set_residual(op, e, *dense, residual_order, residual_scale, residual_zero_point);
  e.x_scale = static_cast<float>(x_scale);
  e.x_zero_point = static_cast<int32_t>(x_zero_point) + (x.scalar_type() == ScalarType::Char ? 128 : 0);
  run_conv(s, x, weights, Weights::called, e, dense, out);
  return out;
}

// A vector of `channels` floats, fp32 and contiguous.
Tensor channel_vector(const char* op, const char* name, const Tensor& t, int64_t channels) {
  check_real(op, name, t);
  PK_CHECK(t.dim() == 1 && t.size(0) == channels, op, ": ", name, " must have shape [", channels, "], not ",
           shape_of(t));
  return to_contiguous(torch::stable::to(t, ScalarType::Float));
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& running_mean,
                   const Tensor& running_var, std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps,
                   Ints stride, Ints padding, Ints dilation, int64_t groups, std::string activation,
                   std::optional<Tensor> residual, std::string residual_order) {
  const char* op = "conv_bn_act";
  check_real(op, "x", x);
  check_real(op, "weight", weight);
  PK_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight must have x's dtype ", dtype_name(x.scalar_type()),
           ", not ", dtype_name(weight.scalar_type()));
  PK_CHECK(eps >= 0, op, ": eps must not be negative, but is ", eps);
  check_dim(op, "weight", weight, 4);
  const int64_t o = weight.size(0);
  check_dim(op, "x", x, 4);
  const ConvShape s =
      conv_shape(op, x.sizes().data(), o, {weight.size(2), weight.size(3)}, stride, padding, dilation, groups);
  const Tensor mean = channel_vector(op, "running_mean", running_mean, o),
               var = channel_vector(op, "running_var", running_var, o);
  std::optional<Tensor> g, b, c;
  if (gamma) g = channel_vector(op, "gamma", *gamma, o);
  if (beta) b = channel_vector(op, "beta", *beta, o);
  if (bias) c = channel_vector(op, "bias", *bias, o);
  // w' = w * gamma / sqrt(var + eps);  bias' = (bias - mean) * gamma / sqrt(var + eps) + beta
  Tensor folded = torch::stable::clone(to_contiguous(torch::stable::to(weight, ScalarType::Float)));
  Tensor shift = empty({o}, ScalarType::Float);
  const int64_t each = o ? folded.numel() / o : 0;
  for (int64_t i = 0; i < o; ++i) {
    const float scale =
        (g ? pointer<float>(*g)[i] : 1.0f) / std::sqrt(pointer<float>(var)[i] + static_cast<float>(eps));
    for (int64_t j = 0; j < each; ++j) mutable_pointer<float>(folded)[i * each + j] *= scale;
    mutable_pointer<float>(shift)[i] =
        ((c ? pointer<float>(*c)[i] : 0.0f) - pointer<float>(mean)[i]) * scale + (b ? pointer<float>(*b)[i] : 0.0f);
  }
  const Tensor packed = conv2d_pack(torch::stable::to(folded, x.scalar_type()), shift, groups);
  return conv2d_named(op, x, packed, Weights::once, s, activation, residual, residual_order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) {
  m.impl("_set_winograd", TORCH_BOX(&set_winograd));
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("conv2d_pack", TORCH_BOX(&conv2d_pack));
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("qconv2d_pack", TORCH_BOX(&qconv2d_pack));
  m.impl("qconv2d", TORCH_BOX(&qconv2d));
  m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act));
}

}  // namespace pykernels
