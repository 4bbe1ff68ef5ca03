// Linear layers: int8_mm, linear and int8_linear over packed weights. Leading dimensions of x are rows.
#include "cpu/tile/op.h"

#include <cmath>

#include "cpu/quantize/kernels.h"

namespace pykernels {
namespace {

// Rows of A as the dot kernels read them: a multiple of 4 bytes long.
struct Rows {
  Tensor storage;  // keeps the memory
  const uint8_t* data;
  int64_t stride;  // bytes
};

// x [rows, k] of `bytes` a row, used in place when its rows are whole words; else copied with zeros behind.
Rows word_rows(const Tensor& x, int64_t rows, int64_t bytes) {
  Tensor dense = to_contiguous(x);
  const auto* from = static_cast<const uint8_t*>(dense.const_data_ptr());
  if (bytes % 4 == 0) return {dense, from, bytes};
  const int64_t stride = round_up(bytes, 4);
  Tensor copy = empty({std::max<int64_t>(rows * stride, 1)}, ScalarType::Byte);
  auto* to = mutable_pointer<uint8_t>(copy);
  parallel(rows, std::max<int64_t>(1, (32 << 10) / std::max<int64_t>(stride, 1)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      std::memcpy(to + r * stride, from + r * bytes, bytes);
      std::memset(to + r * stride + bytes, 0, stride - bytes);
    }
  });
  return {copy, to, stride};
}

Ints leading(const Tensor& x, int64_t last) {
  Ints sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// is_signed: the rows hold int8, shifted to uint8 (value + 128: the sign bit flipped) on the way.
void run_linear(const Rows& a, int64_t rows, bool is_signed, const PackedView& weights, const Epilogue& e) {
  if (rows == 0 || weights.h.n == 0) return;
  TileProblem p{};
  p.dot = &dot_kernel(weights.h.element);
  p.epilogue = weights.h.element == Element::s8 ? epilogue_kernels().s32 : epilogue_kernels().f32;
  p.x = a.data;
  p.pixel = p.group_stride = a.stride;
  p.height = 1, p.width = p.columns = rows;
  p.flip = is_signed ? 0x80 : 0;
  p.weights = &weights;
  p.e = e;
  p.e.out_stride = weights.h.n;
  run(p);
}

void check_linear_weight(const char* op, const PackedView& w, int64_t k, int64_t out_features, const Tensor& x) {
  PK_CHECK(w.h.kind == PackKind::dot && w.h.groups == 1 && w.taps() == 1, op,
           ": packed holds convolution weights, not a linear layer's");
  PK_CHECK(w.h.k == k, op, ": x has ", k, " features (shape ", shape_of(x), "), but packed was made for ", w.h.k);
  PK_CHECK(w.h.n == out_features, op, ": out_features is ", out_features, ", but packed was made for ", w.h.n);
}

Tensor int8_mm(const Tensor& a, const Tensor& b) {
  const char* op = "int8_mm";
  check_byte(op, "a", a);
  check_cpu(op, "b", b);
  PK_CHECK(b.scalar_type() == ScalarType::Char, op, ": b must be int8, not ", dtype_name(b.scalar_type()));
  PK_CHECK(a.dim() >= 2, op, ": a must have at least 2 dimensions, not shape ", shape_of(a));
  check_dim(op, "b", b, 2);
  const int64_t k = a.size(a.dim() - 1), n = b.size(1), rows = rows_of(a);
  PK_CHECK(b.size(0) == k, op, ": a has ", k, " columns (shape ", shape_of(a), ") but b has ", b.size(0),
           " rows (shape ", shape_of(b), ")");
  Tensor out = empty(leading(a, n), ScalarType::Int);
  if (out.numel() == 0) return out;
  const PackedHeader header = make_header(PackKind::dot, Element::s8, 1, n, k, 1, 1, false);
  const Tensor packed = pack_weights(op, header, torch::stable::transpose(b, 0, 1), std::nullopt, std::nullopt);
  const PackedView weights = checked_packed(op, packed, Element::s8);
  Epilogue e = make_epilogue(op, weights, "none");
  const bool flip = a.scalar_type() == ScalarType::Char;
  e.x_zero_point = flip ? 128 : 0;
  e.out = out.mutable_data_ptr();
  e.out_dtype = Dtype::s32;
  run_linear(word_rows(a, rows, k), rows, flip, weights, e);
  return out;
}

Tensor linear_pack(const Tensor& weight, std::optional<Tensor> bias) {
  const char* op = "linear_pack";
  check_real(op, "weight", weight);
  check_dim(op, "weight", weight, 2);
  const int64_t n = weight.size(0), k = weight.size(1);
  const auto b = checked_bias(op, bias, n);
  return pack_weights(op, make_header(PackKind::dot, element_of(weight.scalar_type()), 1, n, k, 1, 1, b.has_value()),
                      weight, std::nullopt, b);
}

Tensor linear(const Tensor& x, const Tensor& packed, int64_t out_features, std::string activation,
              std::optional<Tensor> residual, std::string residual_order) {
  const char* op = "linear";
  check_real(op, "x", x);
  PK_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension");
  const ScalarType t = x.scalar_type();
  const int64_t k = x.size(x.dim() - 1), rows = rows_of(x);
  const PackedView weights = checked_packed(op, packed, element_of(t));
  check_linear_weight(op, weights, k, out_features, x);
  Epilogue e = make_epilogue(op, weights, activation);
  Tensor out = empty(leading(x, out_features), t);
  std::optional<Tensor> dense;
  if (residual) {
    PK_CHECK(shape_of(*residual) == shape_of(out), op, ": residual must have the output's shape ", shape_of(out),
             ", not ", shape_of(*residual));
    check_real(op, "residual", *residual);
    dense = to_contiguous(*residual);
    set_residual(op, e, *dense, residual_order, 1.0, 0);
  } else {
    residual_after_activation(op, residual_order);
  }
  e.out = out.mutable_data_ptr();
  e.out_dtype = dtype_of(t);
  run_linear(word_rows(x, rows, k * element_size(t)), rows, false, weights, e);
  return out;
}

Tensor int8_linear_pack(const Tensor& weight, const Tensor& weight_scale, std::optional<Tensor> bias) {
  const char* op = "int8_linear_pack";
  check_cpu(op, "weight", weight);
  PK_CHECK(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8, not ",
           dtype_name(weight.scalar_type()));
  check_dim(op, "weight", weight, 2);
  const int64_t n = weight.size(0), k = weight.size(1);
  const Tensor scale = checked_weight_scale(op, weight_scale, n);
  const auto b = checked_bias(op, bias, n);
  return pack_weights(op, make_header(PackKind::dot, Element::s8, 1, n, k, 1, 1, b.has_value()), weight, scale, b);
}

Tensor int8_linear(const Tensor& x, const Tensor& packed, int64_t out_features, std::optional<double> x_scale,
                   int64_t x_zero_point, std::optional<double> out_scale, int64_t out_zero_point,
                   std::optional<ScalarType> out_dtype, std::string activation) {
  const char* op = "int8_linear";
  check_cpu(op, "x", x);
  const ScalarType t = x.scalar_type();
  PK_CHECK(is_real(t) || is_byte(t), op, ": x must be " PK_REAL_LIST ", uint8 or int8, not ", dtype_name(t));
  PK_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension");
  PK_CHECK(is_real(t) || x_scale.has_value(), op, ": x_scale is required for ", dtype_name(t), " x");
  const int64_t k = x.size(x.dim() - 1), rows = rows_of(x);
  const PackedView weights = checked_packed(op, packed, Element::s8);
  check_linear_weight(op, weights, k, out_features, x);
  Epilogue e = make_epilogue(op, weights, activation);
  const ScalarType out_type = out_dtype.value_or(is_real(t) ? t : ScalarType::Float);
  set_out(op, e, out_type, out_scale, out_zero_point);
  const bool flip = t == ScalarType::Char;
  if (x_scale) {
    check_scale(op, "x_scale", *x_scale);
    check_zero_point(op, "x_zero_point", x_zero_point, flip ? t : ScalarType::Byte);
    e.x_scale = static_cast<float>(*x_scale);
    e.x_zero_point = static_cast<int32_t>(x_zero_point) + (flip ? 128 : 0);
  }

  Tensor row_scale = empty({is_real(t) && !x_scale ? rows : 0}, ScalarType::Float);
  Tensor row_zero_point = empty({row_scale.size(0)}, ScalarType::Int);
  Rows a{x, nullptr, 0};
  if (is_real(t)) {
    const Tensor dense = to_contiguous(x);
    a.stride = round_up(k, 4);
    a.storage = empty({std::max<int64_t>(rows * a.stride, 1)}, ScalarType::Byte);
    auto* q = mutable_pointer<uint8_t>(a.storage);
    a.data = q;
    const auto* from = static_cast<const uint8_t*>(dense.const_data_ptr());
    const QuantizeKernels& kernels = quantize_kernels();
    const float inverse = x_scale ? 1.0f / static_cast<float>(*x_scale) : 0.0f;
    auto* scales = mutable_pointer<float>(row_scale);
    auto* zero_points = mutable_pointer<int32_t>(row_zero_point);
    if (!x_scale) {
      e.row_scale = scales;
      e.row_zero_point = zero_points;
    }
    parallel(rows, std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(k, 1)), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const void* row = from + r * k * element_size(t);
        uint8_t* to = q + r * a.stride;
        if (x_scale)
          kernels.quantize(row, real_of(t), k, {to, false, inverse, static_cast<int32_t>(x_zero_point)});
        else
          kernels.quantize_row(row, real_of(t), k, to, scales + r, zero_points + r);
        std::memset(to + k, 0, a.stride - k);
      }
    });
  } else {
    a = word_rows(x, rows, k);
  }
  Tensor out = empty(leading(x, out_features), out_type);
  e.out = out.mutable_data_ptr();
  run_linear(a, rows, flip, weights, e);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("int8_mm", TORCH_BOX(&int8_mm));
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("int8_linear_pack", TORCH_BOX(&int8_linear_pack));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
}

}  // namespace pykernels
