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
  p.dot = &dot_kernel(weights.h.element);
  p.epilogue = epilogue_kernel(weights.h.element);
  p.pixel = p.group_stride = round_up(weights.h.k * element_bytes(weights.h.element), 4);
  p.height = 1, p.width = p.columns = rows;
  p.flip = flip;
  p.weights = weights;
  p.e = e;
  p.e.out_stride = weights.h.n;
  return p;
}

}  // namespace pykernels
