// qadd, qmul, qcat, qlookup: bytes to bytes in one pass.
#include <cstring>
#include <string>

#include "cpu/quantize/op.h"

namespace pykernels {
namespace {

// b is [N, C, 1, 1] (and not simply of a's shape) against a's [N, C, H, W].
bool is_per_channel(const Tensor& a, const Tensor& b) {
  return a.dim() == 4 && b.dim() == 4 && b.size(0) == a.size(0) && b.size(1) == a.size(1) && b.size(2) == 1 &&
         b.size(3) == 1;
}

// The elementwise ops: checks, layouts and threads; kernel(a, b, operand, rows, n, out) does the rest.
template <class Kernel>
Tensor elementwise(const char* op, const Tensor& a, const Tensor& b, double a_scale, int64_t a_zero_point,
                   double b_scale, int64_t b_zero_point, double out_scale, int64_t out_zero_point, ScalarType out_dtype,
                   const Kernel& kernel) {
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
  const QuantizedInput in_a = quantized_input(dense_a, a_scale, a_zero_point);
  const QuantizedOutput to = quantized_output(out, out_scale, out_zero_point);
  const bool channels_last = is_channels_last(dense_a);
  if (same || !(channels_last || dense_a.is_contiguous())) {
    const Tensor dense_b = in_layout_of(dense_a, b);
    const QuantizedInput in_b = quantized_input(dense_b, b_scale, b_zero_point);
    parallel_steps(a.numel(), 1, [&](int64_t begin, int64_t end) {
      kernel(from(in_a, begin), from(in_b, begin), Operand::same, 1, end - begin, from(to, begin));
    });
    return out;
  }

  const Tensor factors = to_contiguous(b);
  const QuantizedInput in_b = quantized_input(factors, b_scale, b_zero_point);
  const int64_t channels = a.size(1), pixels = a.size(2) * a.size(3);
  if (channels_last) {  // rows of channels; those of one image share a row of factors
    parallel_steps(a.size(0) * pixels, channels, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t image = begin / pixels, next = std::min(end, (image + 1) * pixels);
        kernel(from(in_a, begin * channels), from(in_b, image * channels), Operand::columns, next - begin, channels,
               from(to, begin * channels));
        begin = next;
      }
    });
  } else {  // planes of pixels, one factor each
    parallel_steps(a.size(0) * channels, pixels, [&](int64_t begin, int64_t end) {
      kernel(from(in_a, begin * pixels), from(in_b, begin), Operand::rows, end - begin, pixels,
             from(to, begin * pixels));
    });
  }
  return out;
}

Tensor qadd(const Tensor& a, const Tensor& b, double a_scale, int64_t a_zero_point, double b_scale,
            int64_t b_zero_point, double out_scale, int64_t out_zero_point, ScalarType out_dtype,
            std::string activation) {
  const Activation act = activation_by_name("qadd", activation);
  const auto add = quantize_kernels().add;
  return elementwise("qadd", a, b, a_scale, a_zero_point, b_scale, b_zero_point, out_scale, out_zero_point, out_dtype,
                     [&](const QuantizedInput& x, const QuantizedInput& y, Operand operand, int64_t rows, int64_t n,
                         const QuantizedOutput& q) { add(x, y, operand, rows, n, act, q); });
}

Tensor qmul(const Tensor& a, const Tensor& b, double a_scale, int64_t a_zero_point, double b_scale,
            int64_t b_zero_point, double out_scale, int64_t out_zero_point, ScalarType out_dtype) {
  return elementwise("qmul", a, b, a_scale, a_zero_point, b_scale, b_zero_point, out_scale, out_zero_point, out_dtype,
                     quantize_kernels().mul);
}

// One input of a concatenation, as rows of `length` bytes at `offset` in the rows of the output.
struct Piece {
  Tensor dense;  // keeps the memory of `in`
  QuantizedInput in;
  int64_t offset, length;
  bool plain_copy;
};

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
  const int64_t row = inner * sizes[dim];
  std::vector<Piece> pieces;
  int64_t offset = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor x = channels_last ? to_channels_last(xs[i]) : to_contiguous(xs[i]);
    const int64_t length = inner * x.size(dim);
    const bool equal = x.scalar_type() == out_dtype && static_cast<float>(scales[i]) == static_cast<float>(out_scale) &&
                       zero_points[i] == out_zero_point;
    if (length > 0) pieces.push_back({x, quantized_input(x, scales[i], zero_points[i]), offset, length, equal});
    offset += length;
  }
  const QuantizedOutput to = quantized_output(out, out_scale, out_zero_point);
  const auto requantize = quantize_kernels().requantize;
  // Each thread fills its own stretch of the output, row by row and piece by piece.
  parallel_steps(outer * row, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin / row; r * row < end; ++r)
      for (const Piece& piece : pieces) {
        const int64_t start = r * row + piece.offset;
        const int64_t first = std::max(begin, start), last = std::min(end, start + piece.length);
        if (first >= last) continue;
        const QuantizedInput in = from(piece.in, r * piece.length + first - start);
        const QuantizedOutput target = from(to, first);
        if (piece.plain_copy)
          std::memcpy(target.data, in.data, last - first);
        else
          requantize(in, last - first, target);
      }
  });
  return out;
}

Tensor qlookup(const Tensor& x, const Tensor& table) {
  const char* op = "qlookup";
  check_byte(op, "x", x);
  check_byte(op, "table", table);
  PK_CHECK(table.dim() == 1 && table.size(0) == 256, op, ": table must have shape [256], not ", shape_of(table));
  const Tensor source = dense(x), entries = to_contiguous(table), out = dense_like(source, table.scalar_type());
  const uint8_t* from_x = static_cast<const uint8_t*>(source.const_data_ptr());
  const uint8_t* values = static_cast<const uint8_t*>(entries.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const auto kernel = quantize_kernels().lookup;
  parallel_steps(x.numel(), 1,
                 [&](int64_t begin, int64_t end) { kernel(from_x + begin, end - begin, values, to + begin); });
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
