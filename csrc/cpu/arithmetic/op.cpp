// qadd, qmul, qcat, qlookup: bytes to bytes in one pass; add, activate, leaky_relu: the same of real numbers.
#include "cpu/op.h"

#include <string>
#include <utility>
#include <vector>

#include "common/layout.h"
#include "cpu/arithmetic/driver.h"

namespace pykernels {
namespace {

// b is [N, C, 1, 1] (and not simply of a's shape) against a's [N, C, H, W].
bool is_per_channel(const Tensor& a, const Tensor& b) {
  return a.dim() == 4 && b.dim() == 4 && b.size(0) == a.size(0) && b.size(1) == a.size(1) && b.size(2) == 1 &&
         b.size(3) == 1;
}

// The operands of a sum or product as drivers take them: b, or a copy of it, as `shape` says.
struct Operands {
  Tensor a, b;
  Broadcast shape;
};

void check_shapes(const char* op, const Tensor& a, const Tensor& b) {
  PK_CHECK(same_sizes(a, b) || is_per_channel(a, b), op, ": b must have the shape of a, ", shape_of(a),
           ", or be [N, C, 1, 1] against [N, C, H, W], not ", shape_of(b));
}

Operands operands_of(const Tensor& a, const Tensor& b) {
  const Tensor dense_a = dense(a);
  const bool channels_last = is_channels_last(dense_a);
  const bool whole = same_sizes(a, b) || !(channels_last || dense_a.is_contiguous());  // b is, or is made, of a's shape
  if (whole) return {dense_a, in_layout_of(dense_a, b), same_shape(a.numel())};
  return {dense_a, to_contiguous(b), per_channel(a.size(0), a.size(1), a.size(2) * a.size(3), channels_last)};
}

// The elementwise ops: checks, layouts.
Tensor elementwise(const char* op, Arithmetic arithmetic, Activation activation, const Tensor& a, const Tensor& b,
                   double a_scale, int64_t a_zero_point, double b_scale, int64_t b_zero_point, double out_scale,
                   int64_t out_zero_point, ScalarType out_dtype) {
  check_byte(op, "a", a);
  check_byte(op, "b", b);
  check_byte_dtype(op, "out_dtype", out_dtype);
  check_scale(op, "a_scale", a_scale);
  check_scale(op, "b_scale", b_scale);
  check_scale(op, "out_scale", out_scale);
  check_zero_point(op, "a_zero_point", a_zero_point, a.scalar_type());
  check_zero_point(op, "b_zero_point", b_zero_point, b.scalar_type());
  check_zero_point(op, "out_zero_point", out_zero_point, out_dtype);
  check_shapes(op, a, b);
  const Operands o = operands_of(a, b);
  const Tensor out = dense_like(o.a, out_dtype);
  ByteArithmeticDriver driver(arithmetic, activation, o.shape, quantization(a.scalar_type(), a_scale, a_zero_point),
                              quantization(b.scalar_type(), b_scale, b_zero_point),
                              quantization(out_dtype, out_scale, out_zero_point), torch::stable::get_num_threads());
  run(driver, {bytes_of(o.a), bytes_of(o.b)}, out);
  return out;
}

Tensor add(const Tensor& a, const Tensor& b, std::string activation) {
  const char* op = "add";
  check_real(op, "a", a);
  check_real(op, "b", b);
  PK_CHECK(a.scalar_type() == b.scalar_type(), op, ": b must be ", dtype_name(a.scalar_type()), " as a is, not ",
           dtype_name(b.scalar_type()));
  const Activation applied = activation_by_name(op, activation);
  check_shapes(op, a, b);
  const Operands o = operands_of(a, b);
  const Tensor out = dense_like(o.a, a.scalar_type());
  RealArithmeticDriver driver(Arithmetic::add, applied, o.shape, real_of(a.scalar_type()),
                              torch::stable::get_num_threads());
  run(driver, {bytes_of(o.a), bytes_of(o.b)}, out);
  return out;
}

Tensor activate(const Tensor& x, std::string activation) {
  check_real("activate", "x", x);
  const Activation applied = activation_by_name("activate", activation);
  const Tensor source = dense(x), out = dense_like(source, x.scalar_type());
  ActivationDriver driver(x.numel(), real_of(x.scalar_type()), applied, torch::stable::get_num_threads());
  run(driver, {bytes_of(source)}, out);
  return out;
}

Tensor leaky_relu(const Tensor& x, double negative_slope) {
  check_real("leaky_relu", "x", x);
  const Tensor source = dense(x), out = dense_like(source, x.scalar_type());
  LeakyReluDriver driver(x.numel(), real_of(x.scalar_type()), static_cast<float>(negative_slope),
                         torch::stable::get_num_threads());
  run(driver, {bytes_of(source)}, out);
  return out;
}

Tensor qadd(const Tensor& a, const Tensor& b, double a_scale, int64_t a_zero_point, double b_scale,
            int64_t b_zero_point, double out_scale, int64_t out_zero_point, ScalarType out_dtype,
            std::string activation) {
  return elementwise("qadd", Arithmetic::add, activation_by_name("qadd", activation), a, b, a_scale, a_zero_point,
                     b_scale, b_zero_point, out_scale, out_zero_point, out_dtype);
}

Tensor qmul(const Tensor& a, const Tensor& b, double a_scale, int64_t a_zero_point, double b_scale,
            int64_t b_zero_point, double out_scale, int64_t out_zero_point, ScalarType out_dtype) {
  return elementwise("qmul", Arithmetic::mul, Activation::none, a, b, a_scale, a_zero_point, b_scale, b_zero_point,
                     out_scale, out_zero_point, out_dtype);
}

Tensor qcat(std::vector<Tensor> xs, std::vector<double> scales, Ints zero_points, int64_t dim, double out_scale,
            int64_t out_zero_point, ScalarType out_dtype) {
  const char* op = "qcat";
  PK_CHECK(!xs.empty(), op, ": xs must hold at least one tensor");
  const auto name = [](const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; };
  PK_CHECK(scales.size() == xs.size(), op, ": scales must have ", xs.size(), " numbers, one for each of xs, not ",
           scales.size());
  PK_CHECK(zero_points.size() == xs.size(), op, ": zero_points must have ", xs.size(),
           " numbers, one for each of xs, not ", zero_points.size());
  check_byte_dtype(op, "out_dtype", out_dtype);
  check_scale(op, "out_scale", out_scale);
  check_zero_point(op, "out_zero_point", out_zero_point, out_dtype);
  const int64_t dims = xs[0].dim();
  PK_CHECK(dim >= -dims && dim < dims, op, ": dim must lie in [", -dims, ", ", dims - 1, "] for xs[0] of shape ",
           shape_of(xs[0]), ", not ", dim);
  if (dim < 0) dim += dims;
  Ints sizes(xs[0].sizes().begin(), xs[0].sizes().end());
  sizes[dim] = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    check_byte(op, name("xs", i).c_str(), xs[i]);
    check_scale(op, name("scales", i).c_str(), scales[i]);
    check_zero_point(op, name("zero_points", i).c_str(), zero_points[i], xs[i].scalar_type());
    bool fits = xs[i].dim() == dims;
    for (int64_t d = 0; fits && d < dims; ++d) fits = d == dim || xs[i].size(d) == sizes[d];
    PK_CHECK(fits, op, ": ", name("xs", i), " must have the shape of xs[0], ", shape_of(xs[0]), ", but along dim ", dim,
             ", not ", shape_of(xs[i]));
    sizes[dim] += xs[i].size(dim);
  }

  // The layout of the first input: memory order of the dimensions, from it the bytes of a row an input contributes.
  const bool channels_last = is_channels_last(xs[0]) && !xs[0].is_contiguous();
  const Tensor out = empty(sizes, out_dtype, channels_last);
  int64_t outer = 1, inner = 1;
  bool before = true;
  for (int64_t place = 0; place < dims; ++place) {
    const int64_t nhwc[4] = {0, 2, 3, 1};
    const int64_t d = channels_last ? nhwc[place] : place;
    if (d == dim)
      before = false;
    else
      (before ? outer : inner) *= sizes[d];
  }
  std::vector<Tensor> sources;  // they keep the memory
  std::vector<const uint8_t*> in;
  std::vector<ConcatPart> parts;
  int64_t row = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    sources.push_back(channels_last ? to_channels_last(xs[i]) : to_contiguous(xs[i]));
    in.push_back(bytes_of(sources.back()));
    parts.push_back({quantization(xs[i].scalar_type(), scales[i], zero_points[i]), row, inner * xs[i].size(dim)});
    row += parts.back().length;
  }
  ConcatDriver driver(std::move(parts), outer, row, quantization(out_dtype, out_scale, out_zero_point),
                      torch::stable::get_num_threads());
  run(driver, in.data(), out);
  return out;
}

Tensor qlookup(const Tensor& x, const Tensor& table) {
  const char* op = "qlookup";
  check_byte(op, "x", x);
  check_byte(op, "table", table);
  PK_CHECK(table.dim() == 1 && table.size(0) == 256, op, ": table must have shape [256], not ", shape_of(table));
  const Tensor source = dense(x), entries = to_contiguous(table), out = dense_like(source, table.scalar_type());
  LookupDriver driver(x.numel(), torch::stable::get_num_threads());
  run(driver, {bytes_of(source), bytes_of(entries)}, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("qadd", TORCH_BOX(&qadd));
  m.impl("qmul", TORCH_BOX(&qmul));
  m.impl("qcat", TORCH_BOX(&qcat));
  m.impl("qlookup", TORCH_BOX(&qlookup));
  m.impl("add", TORCH_BOX(&add));
  m.impl("activate", TORCH_BOX(&activate));
  m.impl("leaky_relu", TORCH_BOX(&leaky_relu));
}

// An empty list names no device: with the registration for CPU alone, the dispatcher would refuse it with a page of its
// own.
STABLE_TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) { m.impl("qcat", TORCH_BOX(&qcat)); }

}  // namespace pykernels
