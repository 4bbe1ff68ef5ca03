#include "cpu/tile/op.h"

#include <algorithm>

namespace pykernels {

bool residual_after_activation(const char* op, const std::string& order) {
  PK_CHECK(order == "before" || order == "after", op,
           ": residual_order must be 'before' or 'after' the activation, not '", order, "'");
  return order == "after";
}

Dtype dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Byte: return Dtype::u8;
    case ScalarType::Char: return Dtype::s8;
    case ScalarType::Int: return Dtype::s32;
    default: return Dtype::f32;
  }
}

Element element_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: return Element::s8;
  }
}

std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, int64_t channels) {
  if (!bias) return std::nullopt;
  check_real(op, "bias", *bias);
  PK_CHECK(bias->dim() == 1 && bias->size(0) == channels, op, ": bias must have shape [", channels, "], not ",
           shape_of(*bias));
  return to_contiguous(torch::stable::to(*bias, ScalarType::Float));
}

Tensor checked_weight_scale(const char* op, const Tensor& weight_scale, int64_t channels) {
  check_cpu(op, "weight_scale", weight_scale);
  PK_CHECK(weight_scale.scalar_type() == ScalarType::Float, op, ": weight_scale must be float32, not ",
           dtype_name(weight_scale.scalar_type()));
  PK_CHECK(weight_scale.dim() == 1 && weight_scale.size(0) == channels, op, ": weight_scale must have shape [",
           channels, "], not ", shape_of(weight_scale));
  Tensor scale = to_contiguous(weight_scale);
  for (int64_t i = 0; i < channels; ++i) check_scale(op, "weight_scale", pointer<float>(scale)[i]);
  return scale;
}

void check_reduction(const char* op, const char* name, int64_t products) {
  PK_CHECK(products <= kMaxReduction, op, ": ", name, " sums more than ", kMaxReduction,
           " products to one output, which s32 cannot hold");
}

Tensor pack_weights(const char* op, const PackedHeader& header, const Tensor& weight,
                    const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  if (header.element == Element::s8) check_reduction(op, "weight", header.k * header.kh * header.kw);
  const Tensor source = to_contiguous(weight);
  Tensor out = empty({header.bytes}, ScalarType::Byte);
  void* target = out.mutable_data_ptr();
  write_header(header, target);
  const void* from = source.const_data_ptr();
  const float* scales = scale ? pointer<float>(*scale) : nullptr;
  const float* biases = bias ? pointer<float>(*bias) : nullptr;
  const int64_t work = std::max<int64_t>(1, header.k * header.kh * header.kw);
  parallel(header.groups * header.n, std::max<int64_t>(16, (64 << 10) / work),
           [&](int64_t first, int64_t last) { pack_channels(header, from, scales, biases, target, first, last); });
  return out;
}

PackedView checked_packed(const char* op, const Tensor& packed, Element element) {
  check_cpu(op, "packed", packed);
  PK_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(), op,
           ": packed must be the contiguous 1-D uint8 tensor that the *_pack op returned");
  PackedView view;
  const char* refused = read_packed(packed.const_data_ptr(), packed.numel(), &view);
  PK_CHECK(refused == nullptr, op, ": packed is refused: ", refused);
  PK_CHECK(view.h.element == element, op, ": packed holds ", element_name(view.h.element), " weights, but x needs ",
           element_name(element));
  return view;
}

Epilogue make_epilogue(const char* op, const PackedView& weights, const std::string& activation) {
  return make_epilogue(weights, activation_by_name(op, activation));
}

void set_out(const char* op, Epilogue& e, ScalarType out_dtype, std::optional<double> out_scale,
             int64_t out_zero_point) {
  PK_CHECK(is_real(out_dtype) || is_byte(out_dtype), op, ": out_dtype must be " PK_REAL_LIST ", uint8 or int8, not ",
           dtype_name(out_dtype));
  if (is_byte(out_dtype)) {
    PK_CHECK(out_scale.has_value(), op, ": out_scale is required for out_dtype ", dtype_name(out_dtype));
    check_scale(op, "out_scale", *out_scale);
    check_zero_point(op, "out_zero_point", out_zero_point, out_dtype);
  } else {
    PK_CHECK(!out_scale.has_value(), op, ": out_scale makes no sense for out_dtype ", dtype_name(out_dtype));
  }
  set_out(e, dtype_of(out_dtype), out_scale.value_or(1.0), out_zero_point);
}

void set_residual(const char* op, Epilogue& e, const Tensor& residual, const std::string& order, double scale,
                  int64_t zero_point) {
  check_cpu(op, "residual", residual);
  const ScalarType t = residual.scalar_type();
  PK_CHECK(is_real(t) || is_byte(t), op, ": residual must be " PK_REAL_LIST ", uint8 or int8, not ", dtype_name(t));
  if (is_byte(t)) {
    check_scale(op, "residual_scale", scale);
    check_zero_point(op, "residual_zero_point", zero_point, t);
  }
  set_residual(e, dtype_of(t), residual_after_activation(op, order), scale, zero_point);
}

}  // namespace pykernels
