// Linear layers: int8_mm, linear and int8_linear over packed weights. Leading dimensions of x are rows.
#include "cpu/tile/op.h"

#include <algorithm>

#include "cpu/linear/driver.h"

namespace pykernels {
namespace {

// x [rows, k] of `bytes` a row as the dot kernels read it: x itself where its rows are whole words, else a copy.
Tensor word_rows(const Tensor& x, int64_t rows, int64_t bytes) {
  const Tensor dense = to_contiguous(x);
  if (bytes % 4 == 0) return dense;
  const Tensor copy = empty({std::max<int64_t>(rows * round_up(bytes, 4), 1)}, ScalarType::Byte);
  WordRowsDriver driver(rows, bytes, torch::stable::get_num_threads());
  run(driver, {bytes_of(dense)}, copy);
  return copy;
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

// a: rows of whole words; residual as `out`, or null.
void run_linear(const Tensor& a, int64_t rows, bool is_signed, const PackedView& weights, const Epilogue& e,
                const Tensor& out, const uint8_t* residual = nullptr) {
  TileDriver driver(linear_problem(rows, weights, e, is_signed ? 0x80 : 0), torch::stable::get_num_threads());
  run(driver, {bytes_of(a), residual}, out);
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
  check_reduction(op, "b", k);
  Tensor out = empty(leading(a, n), ScalarType::Int);
  if (out.numel() == 0) return out;
  const Tensor matrix = b.stride(0) == 1 || b.stride(1) == 1 ? b : to_contiguous(b);
  const uint8_t flip = a.scalar_type() == ScalarType::Char ? 0x80 : 0;
  MatmulDriver driver(rows, k, n, flip, matrix.stride(0), matrix.stride(1), torch::stable::get_num_threads());
  run(driver, {bytes_of(word_rows(a, rows, k)), bytes_of(matrix)}, out);
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
  check_linear_weight(op, weights, k, out_features);
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
  e.out_dtype = dtype_of(t);
  run_linear(word_rows(x, rows, k * element_size(t)), rows, false, weights, e, out, dense ? bytes_of(*dense) : nullptr);
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
  check_linear_weight(op, weights, k, out_features);
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

  const Tensor out = empty(leading(x, out_features), out_type);
  if (!is_real(t)) {
    run_linear(word_rows(x, rows, k), rows, flip, weights, e, out);
    return out;
  }
  const Tensor dense = to_contiguous(x);
  const Tensor q = empty({std::max<int64_t>(rows * round_up(k, 4), 1)}, ScalarType::Byte);
  const int64_t threads = torch::stable::get_num_threads();
  if (x_scale) {
    QuantizeRowsDriver driver(rows, k, real_of(t), *x_scale, x_zero_point, threads);
    run(driver, {bytes_of(dense)}, q);
    run_linear(q, rows, false, weights, e, out);
    return out;
  }
  const Tensor row_scale = empty({rows}, ScalarType::Float), row_zero_point = empty({rows}, ScalarType::Int);
  auto* scales = mutable_pointer<float>(row_scale);
  auto* zero_points = mutable_pointer<int32_t>(row_zero_point);
  e.row_scale = scales;
  e.row_zero_point = zero_points;
  QuantizeRowsDriver driver(rows, k, real_of(t), scales, zero_points, threads);
  run(driver, {bytes_of(dense)}, q);
  run_linear(q, rows, false, weights, e, out);
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
