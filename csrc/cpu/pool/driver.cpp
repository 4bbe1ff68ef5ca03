#include "cpu/pool/driver.h"

#include <algorithm>
#include <utility>

#include "common/strides.h"

namespace pykernels {
namespace {

const char* axis_name(int d) { return d == 0 ? "height" : "width"; }

// One axis of a pool: its windows, and what a vectorised walk along it needs to know.
struct Axis {
  std::vector<Window> windows;
  int64_t step = 1;
  // Alike but for clipping: output o covers o * stride - padding + [0, kernel) * step. stride 0: not so.
  int64_t kernel = 0, stride = 0, padding = 0;
};

constexpr int64_t kMostWindows = int64_t{1} << 24;  // of an axis

// As torch: with ceil_mode a window may overrun the end, but must begin inside the plane or its first padding.
int64_t output_size(const char* op, const PoolProblem& p, int d) {
  const int64_t size = p.sizes[2 + d];
  const int64_t reach = p.dilation[d] * (p.kernel[d] - 1) + 1, room = size + 2 * p.padding[d] - reach;
  int64_t out = (room < 0 ? -1 : room / p.stride[d]) + 1;
  if (p.ceil_mode && room + p.stride[d] - 1 >= 0) {
    out = (room + p.stride[d] - 1) / p.stride[d] + 1;
    if ((out - 1) * p.stride[d] >= size + p.padding[d]) --out;
  }
  PK_CHECK(out > 0, op, ": kernel_size ", p.kernel[d], " (dilation ", p.dilation[d], ") does not fit x, whose ",
           axis_name(d), " is ", size, " and padding ", p.padding[d]);
  return out;
}

// What the extents count.
enum class Counts { nothing, taps, taps_and_padding };

Axis plain_axis(const char* op, const PoolProblem& p, int d, int64_t outputs, Counts counts) {
  Axis axis{std::vector<Window>(outputs), p.dilation[d], p.kernel[d], p.stride[d], p.padding[d]};
  const int64_t size = p.sizes[2 + d], reach = p.dilation[d] * (p.kernel[d] - 1) + 1;
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t from = o * p.stride[d] - p.padding[d], to = from + reach;
    const int64_t begin = from < 0 ? from + (-from + p.dilation[d] - 1) / p.dilation[d] * p.dilation[d] : from;
    const int64_t end = to < size ? to : size;
    // Only a dilated window can step over the whole plane. torch answers -inf and an index outside of the plane.
    PK_CHECK(begin < end, op, ": padding ", p.padding[d], " and dilation ", p.dilation[d],
             " leave a window without an element of x, whose ", axis_name(d), " is ", size);
    const int64_t padded_end = to < size + p.padding[d] ? to : size + p.padding[d];
    axis.windows[o] = {begin, (end - begin + p.dilation[d] - 1) / p.dilation[d],
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

Axis axis_of(const char* op, const PoolProblem& p, int d, int64_t outputs) {
  if (p.adaptive) return adaptive_axis(p.sizes[2 + d], outputs);
  if (p.kind != PoolKind::average) return plain_axis(op, p, d, outputs, Counts::nothing);
  if (!p.divisor) return plain_axis(op, p, d, outputs, p.count_include_pad ? Counts::taps_and_padding : Counts::taps);
  Axis axis = plain_axis(op, p, d, outputs, Counts::nothing);
  if (d == 0)
    for (Window& row : axis.windows) row.extent = static_cast<float>(*p.divisor);
  return axis;
}

int64_t most_taps(const Axis& axis) {
  int64_t most = 0;
  for (const Window& w : axis.windows) most = std::max(most, w.count);
  return most;
}

// Picking every stride-th of all columns pays while a vector computes more columns than it skips.
constexpr int64_t kWidestStride = 4;

void set_line(Pool& p, const Axis& cols) {
  p.line_length = p.width;
  const int64_t positions = (p.out_w - 1) * cols.stride + 1, reach = (cols.kernel - 1) * cols.step;
  if (cols.stride == 0 || cols.stride > kWidestStride || reach > 2 * p.width + 64) return;
  p.col_stride = cols.stride;
  p.col_taps = cols.kernel;
  p.col_pad = cols.padding;
  p.line_length = std::max(cols.padding + p.width, positions + reach);
}

// Few lines of many channels: blocks of channels, whole vectors of any isa, so that all threads have work.
void set_blocks(Pool& p, int64_t lines, int64_t threads) {
  p.blocks = 1;
  p.block_channels = p.channels;
  if (lines >= 4 * threads || p.channels < 256) return;
  const int64_t wanted = std::min((4 * threads + lines - 1) / lines, p.channels / 128);
  p.block_channels = (p.channels / wanted + 63) / 64 * 64;
  p.blocks = (p.channels + p.block_channels - 1) / p.block_channels;
}

}  // namespace

bool PoolProblem::channels_last() const {
  return sizes[1] > 1 && strides[1] == 1 && !is_contiguous(sizes.data(), strides.data(), 4);
}

bool PoolProblem::readable() const { return channels_last() || strides[3] == 1 || sizes[3] == 1; }

std::array<int64_t, 2> pool_output(const char* op, const PoolProblem& p) {
  for (int d = 1; d < 4; ++d)
    PK_CHECK(p.sizes[d] > 0, op, ": x may be empty in its batch dimension only, not of shape ",
             shape_of(p.sizes.data(), 4));
  std::array<int64_t, 2> out;
  if (p.adaptive) {
    check_pair(op, "output_size", p.output, 1);
    out = {p.output[0], p.output[1]};
  } else {
    check_pair(op, "kernel_size", p.kernel, 1);
    check_pair(op, "stride", p.stride, 1);
    check_pair(op, "padding", p.padding, 0);
    check_pair(op, "dilation", p.dilation, 1);
    for (int d : {0, 1})
      PK_CHECK(p.padding[d] <= p.kernel[d] / 2, op, ": padding must be at most half of kernel_size, not ", p.padding[d],
               " for kernel_size ", p.kernel[d]);
    PK_CHECK(!p.divisor || (*p.divisor != 0 && *p.divisor > -(int64_t{1} << 31) && *p.divisor < (int64_t{1} << 31)), op,
             ": divisor_override must not be 0 and lie within 2^31, not ", p.divisor.value_or(0));
    for (int d : {0, 1}) out[d] = output_size(op, p, d);
  }
  for (int d : {0, 1})  // a window each is kept
    PK_CHECK(out[d] <= kMostWindows, op, ": the output would have a ", axis_name(d), " of ", out[d], ", more than ",
             kMostWindows);
  PK_CHECK(p.kind != PoolKind::max_with_indices || p.sizes[2] < (int64_t{1} << 31) / p.sizes[3], op,
           ": x must have fewer than 2^31 elements a plane, not shape ", shape_of(p.sizes.data(), 4));
  return out;
}

PoolDriver::PoolDriver(const char* op, const PoolProblem& problem, int64_t threads) {
  const auto out = pool_output(op, problem);
  Axis rows = axis_of(op, problem, 0, out[0]), cols = axis_of(op, problem, 1, out[1]);
  Pool& p = pool_;
  if (problem.kind == PoolKind::average && (problem.type == kPoolU8 || problem.type == kPoolS8)) {
    const int64_t most_rows = most_taps(rows), most_cols = most_taps(cols);
    PK_CHECK(most_rows < (int64_t{1} << 23) / most_cols, op, ": x has windows of ", most_rows, " x ", most_cols,
             " elements; their sum is exact in 32 bits below 2^23 elements only");
    p.x_scale = static_cast<float>(problem.x_scale);
    p.x_zero_point = static_cast<int32_t>(problem.x_zero_point);
    p.y_type = problem.out_type;
    p.y_zero_point = static_cast<int32_t>(problem.out_zero_point);
    p.y_inverse = 1.0f / static_cast<float>(problem.out_scale);
  }
  const auto& [n, c, h, w] = problem.sizes;
  p.channels = c;
  p.width = w;
  p.out_h = out[0];
  p.out_w = out[1];
  p.x_batch = problem.strides[0];
  p.x_channel = problem.strides[1];
  p.x_row = problem.strides[2];
  p.x_col = problem.strides[3];
  p.row_step = rows.step;
  p.col_step = cols.step;
  set_line(p, cols);
  const Window &row = rows.windows[0], &col = cols.windows[0];
  if (p.out_h == 1 && p.out_w == 1 && p.row_step == 1 && p.col_step == 1 && col.count == p.width &&
      (p.x_row == p.width || row.count == 1) && row.begin == 0)
    p.run = row.count * col.count;
  rows_ = std::move(rows.windows);
  cols_ = std::move(cols.windows);
  for (const Window& window : cols_) col_extents_.push_back(window.extent);
  p.rows = rows_.data();
  p.cols = cols_.data();
  p.col_extents = col_extents_.data();
  if (n == 0) return;

  // Taps of all windows, as if none were clipped by the list's middle one.
  const int64_t taps = std::max<int64_t>(rows_[p.out_h / 2].count * cols_[p.out_w / 2].count, 1);
  const double work = static_cast<double>(n) * c * p.out_h * p.out_w * static_cast<double>(taps);
  const PoolKernels& kernels = pool_kernels();
  const auto kernel_of = [&](const auto& max, const auto& with_indices, const auto& average) {
    return (problem.kind == PoolKind::max                ? max
            : problem.kind == PoolKind::max_with_indices ? with_indices
                                                         : average)[problem.type];
  };
  if (problem.channels_last()) {
    channels_last_ = kernel_of(kernels.max_channels_last, kernels.max_indices_channels_last, kernels.avg_channels_last);
    set_blocks(p, n * p.out_h, threads);
    set(cut(n * p.out_h * p.blocks, work, threads));
  } else {
    contiguous_ = kernel_of(kernels.max_contiguous, kernels.max_indices_contiguous, kernels.avg_contiguous);
    scratch = pool_scratch(p);
    set(cut(n * c * p.out_h, work, threads, 1, 1));  // one piece a thread: each prepares its scratch
  }
}

void PoolDriver::piece(int64_t begin, int64_t end, uint8_t* memory) const {
  if (channels_last_)
    channels_last_(pool_, begin, end);
  else
    contiguous_(pool_, begin, end, memory);
}

}  // namespace pykernels
