// The pool ops: arguments checked, windows listed, work split. Inputs whose channels (or whose columns) are dense are
// read where they lie; anything else is copied first. The output has the layout of the input.
#include <algorithm>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <utility>

#include "common/stable.h"
#include "cpu/pool/kernels.h"

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

void check_input(const char* op, const Tensor& x) {
  check_dim(op, "x", x, 4);
  for (int64_t d = 1; d < 4; ++d)
    PK_CHECK(x.size(d) > 0, op, ": x may be empty in its batch dimension only, not of shape ", shape_of(x));
}

// One axis of a pool: its windows, and what a vectorised walk along it needs to know.
struct Axis {
  std::vector<Window> windows;
  int64_t step = 1;
  // Alike but for clipping: output o covers o * stride - padding + [0, kernel) * step. stride 0: not so.
  int64_t kernel = 0, stride = 0, padding = 0;
};

struct Spatial {
  Ints kernel, stride, padding, dilation;
  bool ceil_mode;
};

void check_spatial(const char* op, const Spatial& s) {
  check_pair(op, "kernel_size", s.kernel, 1);
  check_pair(op, "stride", s.stride, 1);
  check_pair(op, "padding", s.padding, 0);
  check_pair(op, "dilation", s.dilation, 1);
  for (int d : {0, 1})
    PK_CHECK(s.padding[d] <= s.kernel[d] / 2, op, ": padding must be at most half of kernel_size, not ", s.padding[d],
             " for kernel_size ", s.kernel[d]);
}

// As torch: with ceil_mode a window may overrun the end, but must begin inside the plane or its first padding.
int64_t output_size(const char* op, const Spatial& s, int d, int64_t size) {
  const int64_t reach = s.dilation[d] * (s.kernel[d] - 1) + 1, room = size + 2 * s.padding[d] - reach;
  int64_t out = (room < 0 ? -1 : room / s.stride[d]) + 1;
  if (s.ceil_mode && room + s.stride[d] - 1 >= 0) {
    out = (room + s.stride[d] - 1) / s.stride[d] + 1;
    if ((out - 1) * s.stride[d] >= size + s.padding[d]) --out;
  }
  PK_CHECK(out > 0, op, ": kernel_size ", s.kernel[d], " (dilation ", s.dilation[d], ") does not fit x, whose ",
           d == 0 ? "height" : "width", " is ", size, " and padding ", s.padding[d]);
  return out;
}

// divisor: what the extents count. 0: nothing (a maximum), 1: taps inside, 2: taps and padding.
enum class Counts { nothing, taps, taps_and_padding };

Axis plain_axis(const char* op, const Spatial& s, int d, int64_t size, int64_t outputs, Counts counts) {
  Axis axis{std::vector<Window>(outputs), s.dilation[d], s.kernel[d], s.stride[d], s.padding[d]};
  const int64_t reach = s.dilation[d] * (s.kernel[d] - 1) + 1;
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t from = o * s.stride[d] - s.padding[d], to = from + reach;
    const int64_t begin = from < 0 ? from + (-from + s.dilation[d] - 1) / s.dilation[d] * s.dilation[d] : from;
    const int64_t end = to < size ? to : size;
    // Only a dilated window can step over the whole plane. torch answers -inf and an index outside of the plane.
    PK_CHECK(begin < end, op, ": padding ", s.padding[d], " and dilation ", s.dilation[d],
             " leave a window without an element of x, whose ", d == 0 ? "height" : "width", " is ", size);
    const int64_t padded_end = to < size + s.padding[d] ? to : size + s.padding[d];
    axis.windows[o] = {begin, (end - begin + s.dilation[d] - 1) / s.dilation[d],
                       static_cast<float>(counts == Counts::nothing ? 1
                                          : counts == Counts::taps  ? end - begin
                                                                    : padded_end - from)};
  }
  return axis;
}

// Output o covers [floor(o * size / outputs), ceil((o + 1) * size / outputs)).
Axis adaptive_axis(int64_t size, int64_t outputs) {
  Axis axis{std::vector<Window>(outputs)};
  for (int64_t o = 0; o < outputs; ++o) {
    // o * size / outputs without the product, which may overflow.
    const int64_t begin = o * (size / outputs) + o * (size % outputs) / outputs;
    const int64_t end = (o + 1) * (size / outputs) + ((o + 1) * (size % outputs) + outputs - 1) / outputs;
    axis.windows[o] = {begin, end - begin, static_cast<float>(end - begin)};
  }
  if (size % outputs == 0) axis.kernel = axis.stride = size / outputs;
  return axis;
}

// Picking every stride-th of all columns pays while a vector computes more columns than it skips.
constexpr int64_t kWidestStride = 4;

struct Job {
  Pool pool{};
  Tensor x;  // keeps a copy of the input alive
  bool channels_last;
  std::vector<Window> rows, cols;
  std::vector<float> col_extents;
};

bool wants_channels_last(const Tensor& x) { return x.size(1) > 1 && x.stride(1) == 1 && !x.is_contiguous(); }

void prepare(Job& job, const Tensor& x, const Tensor& y, Axis rows, Axis cols) {
  job.channels_last = wants_channels_last(x);
  job.x = job.channels_last || x.stride(3) == 1 || x.size(3) == 1 ? x : to_contiguous(x);
  Pool& p = job.pool;
  p.x = job.x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.channels = x.size(1);
  p.width = x.size(3);
  p.out_h = y.size(2);
  p.out_w = y.size(3);
  p.x_batch = job.x.stride(0);
  p.x_channel = job.x.stride(1);
  p.x_row = job.x.stride(2);
  p.x_col = job.x.stride(3);
  p.row_step = rows.step;
  p.col_step = cols.step;
  p.line_length = p.width;
  const int64_t positions = (p.out_w - 1) * cols.stride + 1, reach = (cols.kernel - 1) * cols.step;
  if (cols.stride > 0 && cols.stride <= kWidestStride && reach <= 2 * p.width + 64) {
    p.col_stride = cols.stride;
    p.col_taps = cols.kernel;
    p.col_pad = cols.padding;
    p.line_length = std::max(cols.padding + p.width, positions + reach);
  }
  const Window &row = rows.windows[0], &col = cols.windows[0];
  if (p.out_h == 1 && p.out_w == 1 && p.row_step == 1 && p.col_step == 1 && col.count == p.width &&
      (p.x_row == p.width || row.count == 1) && row.begin == 0)
    p.run = row.count * col.count;
  job.rows = std::move(rows.windows);
  job.cols = std::move(cols.windows);
  for (const Window& w : job.cols) job.col_extents.push_back(w.extent);
  p.rows = job.rows.data();
  p.cols = job.cols.data();
  p.col_extents = job.col_extents.data();
}

// Elements of x that make it worth waking another thread.
constexpr int64_t kGrain = 1 << 15;

void run(Job& job, PoolKernels::ChannelsLast channels_last, PoolKernels::Contiguous contiguous) {
  Pool& p = job.pool;
  const int64_t batch = job.x.size(0);
  if (batch == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  // Taps of all windows, as if none were clipped by the list's middle one.
  const int64_t taps = std::max<int64_t>(job.rows[p.out_h / 2].count * job.cols[p.out_w / 2].count, 1);
  const double work = static_cast<double>(batch) * p.channels * p.out_h * p.out_w * static_cast<double>(taps);
  if (job.channels_last) {
    const int64_t lines = batch * p.out_h;
    p.blocks = 1;
    p.block_channels = p.channels;
    if (lines < 4 * threads && p.channels >= 256) {
      const int64_t wanted = std::min((4 * threads + lines - 1) / lines, p.channels / 128);
      p.block_channels = (p.channels / wanted + 63) / 64 * 64;
      p.blocks = (p.channels + p.block_channels - 1) / p.block_channels;
    }
    const int64_t units = lines * p.blocks;
    const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kGrain / (work / units)));
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { channels_last(p, begin, end); });
    return;
  }
  // One piece a thread: each needs scratch, which is allocated here because nothing may throw in the body.
  const int64_t units = batch * p.channels * p.out_h;
  const int64_t pieces =
      std::clamp<int64_t>(static_cast<int64_t>(std::min(work / kGrain, 1e9)), 1, std::min(threads, units));
  const int64_t bytes = pool_scratch(p);
  const Tensor scratch = empty({pieces, bytes}, ScalarType::Byte);
  char* memory = mutable_pointer<char>(scratch);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      contiguous(p, units / pieces * i + std::min(i, units % pieces),
                 units / pieces * (i + 1) + std::min(i + 1, units % pieces), memory + i * bytes);
  });
}

Tensor empty_output(const Tensor& x, int64_t height, int64_t width, ScalarType dtype) {
  return empty({x.size(0), x.size(1), height, width}, dtype, wants_channels_last(x));
}

void check_poolable(const char* op, const Tensor& x) {
  check_cpu(op, "x", x);
  const ScalarType t = x.scalar_type();
  PK_CHECK(is_real(t) || is_byte(t), op, ": x must be " PK_REAL_LIST ", uint8 or int8, not ", dtype_name(t));
  check_input(op, x);
}

// Axes are made after the output is allocated: an impossible size ends as torch's own complaint about memory.
template <class MakeAxes>
Tensor max_pool(const Tensor& x, int64_t height, int64_t width, const MakeAxes& axes) {
  const Tensor y = empty_output(x, height, width, x.scalar_type());
  auto [rows, cols] = axes();
  Job job;
  prepare(job, x, y, std::move(rows), std::move(cols));
  const PoolType t = pool_type(x.scalar_type());
  run(job, pool_kernels().max_channels_last[t], pool_kernels().max_contiguous[t]);
  return y;
}

template <class MakeAxes>
std::tuple<Tensor, Tensor> max_pool_indices(const char* op, const Tensor& x, int64_t height, int64_t width,
                                            const MakeAxes& axes) {
  PK_CHECK(x.size(2) < (int64_t{1} << 31) / x.size(3), op, ": x must have fewer than 2^31 elements a plane, not shape ",
           shape_of(x));
  const Tensor y = empty_output(x, height, width, x.scalar_type()),
               indices = empty_output(x, height, width, ScalarType::Long);
  auto [rows, cols] = axes();
  Job job;
  prepare(job, x, y, std::move(rows), std::move(cols));
  job.pool.indices = mutable_pointer<int64_t>(indices);
  const PoolType t = pool_type(x.scalar_type());
  run(job, pool_kernels().max_indices_channels_last[t], pool_kernels().max_indices_contiguous[t]);
  return {y, indices};
}

Spatial max_spatial(const char* op, const Tensor& x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                    bool ceil_mode) {
  check_poolable(op, x);
  Spatial s{std::move(kernel), std::move(stride), std::move(padding), std::move(dilation), ceil_mode};
  check_spatial(op, s);
  return s;
}

Tensor max_pool2d(Tensor x, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  const char* op = "max_pool2d";
  const Spatial s = max_spatial(op, x, kernel, stride, padding, dilation, ceil_mode);
  const int64_t h = output_size(op, s, 0, x.size(2)), w = output_size(op, s, 1, x.size(3));
  return max_pool(x, h, w, [&] {
    return std::pair(plain_axis(op, s, 0, x.size(2), h, Counts::nothing),
                     plain_axis(op, s, 1, x.size(3), w, Counts::nothing));
  });
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(Tensor x, Ints kernel, Ints stride, Ints padding, Ints dilation,
                                                   bool ceil_mode) {
  const char* op = "max_pool2d_with_indices";
  const Spatial s = max_spatial(op, x, kernel, stride, padding, dilation, ceil_mode);
  const int64_t h = output_size(op, s, 0, x.size(2)), w = output_size(op, s, 1, x.size(3));
  return max_pool_indices(op, x, h, w, [&] {
    return std::pair(plain_axis(op, s, 0, x.size(2), h, Counts::nothing),
                     plain_axis(op, s, 1, x.size(3), w, Counts::nothing));
  });
}

auto adaptive_axes(const Tensor& x, const Ints& output) {
  return [&x, &output] { return std::pair(adaptive_axis(x.size(2), output[0]), adaptive_axis(x.size(3), output[1])); };
}

Tensor adaptive_max_pool2d(Tensor x, Ints output) {
  const char* op = "adaptive_max_pool2d";
  check_poolable(op, x);
  check_pair(op, "output_size", output, 1);
  return max_pool(x, output[0], output[1], adaptive_axes(x, output));
}

std::tuple<Tensor, Tensor> adaptive_max_pool2d_with_indices(Tensor x, Ints output) {
  const char* op = "adaptive_max_pool2d_with_indices";
  check_poolable(op, x);
  check_pair(op, "output_size", output, 1);
  return max_pool_indices(op, x, output[0], output[1], adaptive_axes(x, output));
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

template <class MakeAxes>
Tensor average(const char* op, const Tensor& x, int64_t height, int64_t width, const Affine* q, const MakeAxes& axes) {
  const Tensor y = empty_output(x, height, width, q ? q->out_dtype : x.scalar_type());
  auto [rows, cols] = axes();
  Job job;
  if (q) {
    int64_t most_rows = 0, most_cols = 0;
    for (const Window& w : rows.windows) most_rows = std::max(most_rows, w.count);
    for (const Window& w : cols.windows) most_cols = std::max(most_cols, w.count);
    PK_CHECK(most_rows < (int64_t{1} << 23) / most_cols, op, ": x has windows of ", most_rows, " x ", most_cols,
             " elements; their sum is exact in 32 bits below 2^23 elements only");
    job.pool.x_scale = static_cast<float>(q->x_scale);
    job.pool.x_zero_point = static_cast<int32_t>(q->x_zero_point);
    job.pool.y_type = pool_type(q->out_dtype);
    job.pool.y_zero_point = static_cast<int32_t>(q->out_zero_point);
    job.pool.y_inverse = 1.0f / static_cast<float>(q->out_scale.value_or(1.0));
  }
  prepare(job, x, y, std::move(rows), std::move(cols));
  const PoolType t = pool_type(x.scalar_type());
  run(job, pool_kernels().avg_channels_last[t], pool_kernels().avg_contiguous[t]);
  return y;
}

Tensor average_plain(const char* op, const Tensor& x, Ints kernel, Ints stride, Ints padding, bool ceil_mode,
                     bool count_include_pad, OptionalInt divisor, const Affine* q) {
  check_input(op, x);
  const Spatial s{std::move(kernel), std::move(stride), std::move(padding), {1, 1}, ceil_mode};
  check_spatial(op, s);
  PK_CHECK(!divisor || (*divisor != 0 && std::abs(*divisor) < (int64_t{1} << 31)), op,
           ": divisor_override must not be 0 and lie within 2^31, not ", divisor.value_or(0));
  const int64_t h = output_size(op, s, 0, x.size(2)), w = output_size(op, s, 1, x.size(3));
  return average(op, x, h, w, q, [&] {
    const Counts counts = divisor ? Counts::nothing : count_include_pad ? Counts::taps_and_padding : Counts::taps;
    std::pair axes(plain_axis(op, s, 0, x.size(2), h, counts), plain_axis(op, s, 1, x.size(3), w, counts));
    if (divisor)
      for (Window& row : axes.first.windows) row.extent = static_cast<float>(*divisor);
    return axes;
  });
}

Tensor average_adaptive(const char* op, const Tensor& x, const Ints& output, const Affine* q) {
  check_input(op, x);
  check_pair(op, "output_size", output, 1);
  return average(op, x, output[0], output[1], q, adaptive_axes(x, output));
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
