// qadd, qmul, qcat, qlookup: bytes to bytes in one pass.
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
  const bool same = same_sizes(a, b);
  PK_CHECK(same || is_per_channel(a, b), op, ": b must have the shape of a, ", shape_of(a),
           ", or be [N, C, 1, 1] against [N, C, H, W], not ", shape_of(b));

  const Tensor dense_a = dense(a), out = dense_like(dense_a, out_dtype);
  if (a.numel() == 0) return out;
  const bool channels_last = is_channels_last(dense_a);
  const bool whole = same || !(channels_last || dense_a.is_contiguous());  // b is, or is made, of a's shape
  const Tensor dense_b = whole ? in_layout_of(dense_a, b) : to_contiguous(b);
  const Broadcast shape =
      whole ? same_shape(a.numel()) : per_channel(a.size(0), a.size(1), a.size(2) * a.size(3), channels_last);
  ByteArithmeticDriver driver(arithmetic, activation, shape, quantization(a.scalar_type(), a_scale, a_zero_point),
                              quantization(b.scalar_type(), b_scale, b_zero_point),
                              quantization(out_dtype, out_scale, out_zero_point), torch::stable::get_num_threads());
  run(driver, {bytes_of(dense_a), bytes_of(dense_b)}, out);
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
}

// An empty list names no device: with the registration for CPU alone, the dispatcher would refuse it with a page of its
// own.
STABLE_TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) { m.impl("qcat", TORCH_BOX(&qcat)); }

}  // namespace pykernels
