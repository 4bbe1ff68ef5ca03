// The pool ops: arguments checked, outputs allocated. Inputs whose channels (or whose columns) are dense are read where
// they lie; anything else is copied first. The output has the layout of the input.
#include "cpu/op.h"

#include <optional>
#include <tuple>
#include <utility>

#include "cpu/pool/driver.h"

namespace pykernels {
namespace {

using OptionalInt = std::optional<int64_t>;

PoolType pool_type(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return kPoolF32;
    case ScalarType::BFloat16: return kPoolBf16;
    case ScalarType::Half: return kPoolF16;
    case ScalarType::Byte: return kPoolU8;
    default: return kPoolS8;
  }
}

PoolProblem problem_of(const char* op, PoolKind kind, const Tensor& x) {
  check_dim(op, "x", x, 4);
  PoolProblem p{kind, pool_type(x.scalar_type())};
  for (int64_t d = 0; d < 4; ++d) {
    p.sizes[d] = x.size(d);
    p.strides[d] = x.stride(d);
  }
  return p;
}

// y and, of a maximum with indices, where they stand. The driver is made after the output is allocated: an impossible
// size ends as torch's own complaint about memory.
std::tuple<Tensor, Tensor> pool(const char* op, PoolProblem p, const Tensor& x, ScalarType out_dtype) {
  const auto [height, width] = pool_output(op, p);
  const Ints sizes{x.size(0), x.size(1), height, width};
  const Tensor y = empty(sizes, out_dtype, p.channels_last());
  Tensor source = x, indices = y;
  if (!p.readable()) {
    source = to_contiguous(x);
    for (int64_t d = 0; d < 4; ++d) p.strides[d] = source.stride(d);
  }
  PoolDriver driver(op, p, torch::stable::get_num_threads());
  if (p.kind == PoolKind::max_with_indices) {
    indices = empty(sizes, ScalarType::Long, p.channels_last());
    driver.bind_indices(mutable_pointer<int64_t>(indices));
  }
  run(driver, {bytes_of(source)}, y);
  return {y, indices};
}

void check_poolable(const char* op, const Tensor& x) {
  check_cpu(op, "x", x);
  const ScalarType t = x.scalar_type();
  PK_CHECK(is_real(t) || is_byte(t), op, ": x must be " PK_REAL_LIST ", uint8 or int8, not ", dtype_name(t));
}

std::tuple<Tensor, Tensor> max_plain(const char* op, PoolKind kind, const Tensor& x, Ints kernel, Ints stride,
                                     Ints padding, Ints dilation, bool ceil_mode) {
  check_poolable(op, x);
  PoolProblem p = problem_of(op, kind, x);
  p.kernel = std::move(kernel);
  p.stride = std::move(stride);
  p.padding = std::move(padding);
  p.dilation = std::move(dilation);
  p.ceil_mode = ceil_mode;
  return pool(op, std::move(p), x, x.scalar_type());
}

std::tuple<Tensor, Tensor> max_adaptive(const char* op, PoolKind kind, const Tensor& x, Ints output) {
  check_poolable(op, x);
  PoolProblem p = problem_of(op, kind, x);
  p.adaptive = true;
  p.output = std::move(output);
  return pool(op, std::move(p), x, x.scalar_type());
}

Tensor max_pool2d(Tensor x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  return std::get<0>(max_plain("max_pool2d", PoolKind::max, x, std::move(kernel), std::move(stride), std::move(padding),
                               std::move(dilation), ceil_mode));
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(Tensor x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                                                   bool ceil_mode) {
  return max_plain("max_pool2d_with_indices", PoolKind::max_with_indices, x, std::move(kernel), std::move(stride),
                   std::move(padding), std::move(dilation), ceil_mode);
}

Tensor adaptive_max_pool2d(Tensor x, Ints output) {
  return std::get<0>(max_adaptive("adaptive_max_pool2d", PoolKind::max, x, std::move(output)));
}

std::tuple<Tensor, Tensor> adaptive_max_pool2d_with_indices(Tensor x, Ints output) {
  return max_adaptive("adaptive_max_pool2d_with_indices", PoolKind::max_with_indices, x, std::move(output));
}

// What requantization needs beside the windows.
struct Affine {
  double x_scale;
  int64_t x_zero_point;
  std::optional<double> out_scale;
  int64_t out_zero_point;
  ScalarType out_dtype;
};

void check_affine(const char* op, const Tensor& x, const Affine& q) {
  check_byte(op, "x", x);
  check_scale(op, "x_scale", q.x_scale);
  check_zero_point(op, "x_zero_point", q.x_zero_point, x.scalar_type());
  PK_CHECK(is_real(q.out_dtype) || is_byte(q.out_dtype), op,
           ": out_dtype must be " PK_REAL_LIST ", uint8 or int8, not ", dtype_name(q.out_dtype));
  PK_CHECK(is_byte(q.out_dtype) == q.out_scale.has_value(), op,
           ": out_scale must be given for a uint8 or int8 out_dtype, and only then");
  if (!q.out_scale) return;
  check_scale(op, "out_scale", *q.out_scale);
  check_zero_point(op, "out_zero_point", q.out_zero_point, q.out_dtype);
}

Tensor average(const char* op, PoolProblem p, const Tensor& x, const Affine* q) {
  if (q) {
    p.x_scale = q->x_scale;
    p.x_zero_point = q->x_zero_point;
    p.out_type = pool_type(q->out_dtype);
    p.out_scale = q->out_scale.value_or(1.0);
    p.out_zero_point = q->out_zero_point;
  }
  return std::get<0>(pool(op, std::move(p), x, q ? q->out_dtype : x.scalar_type()));
}

Tensor average_plain(const char* op, const Tensor& x, Ints kernel, Ints stride, Ints padding, bool ceil_mode,
                     bool count_include_pad, OptionalInt divisor, const Affine* q) {
  PoolProblem p = problem_of(op, PoolKind::average, x);
  p.kernel = std::move(kernel);
  p.stride = std::move(stride);
  p.padding = std::move(padding);
  p.ceil_mode = ceil_mode;
  p.count_include_pad = count_include_pad;
  p.divisor = divisor;
  return average(op, std::move(p), x, q);
}

Tensor average_adaptive(const char* op, const Tensor& x, Ints output, const Affine* q) {
  PoolProblem p = problem_of(op, PoolKind::average, x);
  p.adaptive = true;
  p.output = std::move(output);
  return average(op, std::move(p), x, q);
}

Tensor avg_pool2d(Tensor x, Ints kernel, Ints stride, Ints padding, bool ceil_mode, bool count_include_pad,
                  OptionalInt divisor) {
  check_real("avg_pool2d", "x", x);
  return average_plain("avg_pool2d", x, kernel, stride, padding, ceil_mode, count_include_pad, divisor, nullptr);
}

Tensor adaptive_avg_pool2d(Tensor x, Ints output) {
  check_real("adaptive_avg_pool2d", "x", x);
  return average_adaptive("adaptive_avg_pool2d", x, output, nullptr);
}

Tensor qavg_pool2d(Tensor x, Ints kernel, Ints stride, Ints padding, bool ceil_mode, bool count_include_pad,
                   OptionalInt divisor, double x_scale, int64_t x_zero_point, std::optional<double> out_scale,
                   int64_t out_zero_point, ScalarType out_dtype) {
  const Affine q{x_scale, x_zero_point, out_scale, out_zero_point, out_dtype};
  check_affine("qavg_pool2d", x, q);
  return average_plain("qavg_pool2d", x, kernel, stride, padding, ceil_mode, count_include_pad, divisor, &q);
}

Tensor qadaptive_avg_pool2d(Tensor x, Ints output, double x_scale, int64_t x_zero_point,
                            std::optional<double> out_scale, int64_t out_zero_point, ScalarType out_dtype) {
  const Affine q{x_scale, x_zero_point, out_scale, out_zero_point, out_dtype};
  check_affine("qadaptive_avg_pool2d", x, q);
  return average_adaptive("qadaptive_avg_pool2d", x, output, &q);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_with_indices", TORCH_BOX(&max_pool2d_with_indices));
  m.impl("adaptive_max_pool2d", TORCH_BOX(&adaptive_max_pool2d));
  m.impl("adaptive_max_pool2d_with_indices", TORCH_BOX(&adaptive_max_pool2d_with_indices));
  m.impl("avg_pool2d", TORCH_BOX(&avg_pool2d));
  m.impl("adaptive_avg_pool2d", TORCH_BOX(&adaptive_avg_pool2d));
  m.impl("qavg_pool2d", TORCH_BOX(&qavg_pool2d));
  m.impl("qadaptive_avg_pool2d", TORCH_BOX(&qadaptive_avg_pool2d));
}

}  // namespace pykernels
