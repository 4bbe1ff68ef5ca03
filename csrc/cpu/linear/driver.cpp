#include "cpu/linear/driver.h"

#include <algorithm>

#include "common/check.h"
#include "cpu/quantize/kernels.h"

namespace pykernels {
namespace {

int64_t tasks_of(int64_t rows, int64_t bytes, int64_t grain, int64_t threads) {
  return std::min(rows, std::clamp<int64_t>(rows * bytes / grain, 1, threads));
}

}  // namespace

WordRowsDriver::WordRowsDriver(int64_t rows, int64_t bytes, int64_t threads) : rows_(rows), bytes_(bytes) {
  tasks = tasks_of(rows, bytes, 32 << 10, threads);
}

void WordRowsDriver::run(int64_t task, uint8_t*) const {
  const int64_t stride = round_up(bytes_, 4), last = rows_ * (task + 1) / tasks;
  for (int64_t r = rows_ * task / tasks; r < last; ++r) {
    std::memcpy(out_ + r * stride, x_ + r * bytes_, bytes_);
    std::memset(out_ + r * stride + bytes_, 0, stride - bytes_);
  }
}

QuantizeRowsDriver::QuantizeRowsDriver(int64_t rows, int64_t k, Real type, double scale, int64_t zero_point,
                                       int64_t threads)
    : rows_(rows),
      k_(k),
      type_(type),
      inverse_scale_(1.0f / static_cast<float>(scale)),
      zero_point_(static_cast<int32_t>(zero_point)) {
  tasks = tasks_of(rows, k, 16 << 10, threads);
}

QuantizeRowsDriver::QuantizeRowsDriver(int64_t rows, int64_t k, Real type, float* scales, int32_t* zero_points,
                                       int64_t threads)
    : rows_(rows), k_(k), type_(type), scales_(scales), zero_points_(zero_points) {
  tasks = tasks_of(rows, k, 16 << 10, threads);
}

void QuantizeRowsDriver::run(int64_t task, uint8_t*) const {
  const QuantizeKernels& kernels = quantize_kernels();
  const int64_t stride = round_up(k_, 4), last = rows_ * (task + 1) / tasks;
  for (int64_t r = rows_ * task / tasks; r < last; ++r) {
    const uint8_t* row = x_ + r * k_ * real_bytes(type_);
    uint8_t* to = out_ + r * stride;
    if (scales_)
      kernels.quantize_row(row, type_, k_, to, scales_ + r, zero_points_ + r);
    else
      kernels.quantize(row, type_, k_, {to, false, inverse_scale_, zero_point_});
    std::memset(to + k_, 0, stride - k_);
  }
}

void check_linear_weight(const char* op, const PackedView& w, int64_t k, int64_t out_features) {
  PK_CHECK(w.h.kind == PackKind::dot && w.h.groups == 1 && w.taps() == 1, op,
           ": packed holds convolution weights, not a linear layer's");
  PK_CHECK(w.h.k == k, op, ": x has ", k, " features, but packed was made for ", w.h.k);
  PK_CHECK(w.h.n == out_features, op, ": out_features is ", out_features, ", but packed was made for ", w.h.n);
}

TileProblem linear_problem(int64_t rows, const PackedView& weights, const Epilogue& e, uint8_t flip) {
  TileProblem p{};
  p.dot = &dot_kernel(weights);
  p.epilogue = epilogue_kernel(weights.h.element);
  p.pixel = p.group_stride = round_up(weights.h.k * element_bytes(weights.h.element), 4);
  p.height = 1, p.width = p.columns = rows;
  p.flip = flip;
  p.weights = weights;
  p.e = e;
  p.e.out_stride = weights.h.n;
  return p;
}

MatmulDriver::MatmulDriver(int64_t rows, int64_t k, int64_t n, uint8_t flip, int64_t row_stride, int64_t column_stride,
                           int64_t threads)
    : rows_(rows), k_(k), n_(n), flip_(flip), row_stride_(row_stride), column_stride_(column_stride) {
  if (rows == 0 || n == 0) return;
  const int64_t panels = ceil_div(n, kColumns), panel_bytes = std::max<int64_t>(ceil_div(k, 4) * kBlockBytes, 1);
  // The rows are staged anew for each group, so it is larger than L2 would have it.
  const int64_t fit = std::max<int64_t>(4 * block_bytes() / panel_bytes, 1);
  // Whole rounds of the threads.
  tasks = std::min(panels, round_up(ceil_div(panels, fit), threads));
  const int64_t most = ceil_div(panels, tasks);
  packed_ = round_up(most * (panel_bytes + kColumns * 4), kBlockBytes);
  scratch = packed_ + TileDriver(problem(most * kColumns, nullptr, nullptr), 1).scratch;
}

int64_t MatmulDriver::first_column(int64_t task) const {
  return std::min(ceil_div(n_, kColumns) * task / tasks * kColumns, n_);
}

TileProblem MatmulDriver::problem(int64_t columns, const uint8_t* panels, const int32_t* sums) const {
  PackedView weights{};
  weights.h = make_header(PackKind::dot, Element::s8, 1, columns, k_, 1, 1, false);
  weights.panels = panels;
  weights.sum = sums;
  Epilogue e = make_epilogue(weights, Activation::none);
  e.x_zero_point = flip_ ? 128 : 0;
  e.out_dtype = Dtype::s32;
  TileProblem p = linear_problem(rows_, weights, e, flip_);
  p.e.out_stride = n_;
  return p;
}

// Columns [column, column + columns) of the matrix in words of four rows, and their sums.
void MatmulDriver::pack(int64_t column, int64_t columns, uint8_t* to, int32_t* sums) const {
  const auto* from = reinterpret_cast<const int8_t*>(b_) + column * column_stride_;
  const int64_t panel_bytes = ceil_div(k_, 4) * kBlockBytes;
  std::fill_n(sums, round_up(columns, kColumns), 0);
  int64_t whole = 0;  // rows of whole panels that are packed by now
  if (column_stride_ == 1) {
    whole = k_ / 4 * 4;
    dot_kernels().pack_columns(reinterpret_cast<const uint8_t*>(from), row_stride_, whole / 4, columns / kColumns,
                               panel_bytes, to, sums);
  }
  for (int64_t first = 0; first < columns; first += kColumns, to += panel_bytes, sums += kColumns) {
    const int64_t count = std::min(kColumns, columns - first);
    const int8_t* panel_from = from + first * column_stride_;
    int64_t i = count == kColumns ? whole : 0;
    constexpr int64_t kRun = 64;  // of a column at a time: a cache line, columns may lie 4096 bytes apart
    if (row_stride_ == 1 && count == kColumns)
      for (; i + kRun <= k_; i += kRun)
        for (int64_t j = 0; j < kColumns; ++j) {
          const int8_t* run = panel_from + i + j * column_stride_;
          uint8_t* words = to + i / 4 * kBlockBytes + 4 * j;
          for (int64_t w = 0; w < kRun / 4; ++w) std::memcpy(words + w * kBlockBytes, run + 4 * w, 4);
          for (int64_t row = 0; row < kRun; ++row) sums[j] += run[row];
        }
    for (; i < k_; i += 4) {
      uint8_t* block = to + i / 4 * kBlockBytes;
      std::memset(block, 0, kBlockBytes);
      for (int64_t row = 0; row < std::min<int64_t>(4, k_ - i); ++row)
        for (int64_t j = 0; j < count; ++j) {
          const int8_t value = panel_from[(i + row) * row_stride_ + j * column_stride_];
          block[4 * j + row] = static_cast<uint8_t>(value);
          sums[j] += value;
        }
    }
  }
}

void MatmulDriver::run(int64_t task, uint8_t* memory) const {
  const int64_t first = first_column(task), columns = first_column(task + 1) - first;
  const int64_t panels = ceil_div(columns, kColumns), panel_bytes = ceil_div(k_, 4) * kBlockBytes;
  auto* sums = reinterpret_cast<int32_t*>(memory + panels * panel_bytes);
  pack(first, columns, memory, sums);
  TileDriver tiles(problem(columns, memory, sums), 1);
  const uint8_t* const in[] = {a_, nullptr};
  tiles.bind(in, out_ + first * 4);
  for (int64_t t = 0; t < tiles.tasks; ++t) tiles.run(t, memory + packed_);
}

}  // namespace pykernels
