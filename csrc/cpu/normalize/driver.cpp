#include "cpu/normalize/driver.h"

namespace pykernels {

// Units: rows; of columns blocks of 64 of one image of them, so that a piece reads whole lines.
constexpr int64_t kColumns = 64;

SoftmaxDriver::SoftmaxDriver(int64_t outer, int64_t n, int64_t inner, Real type, int64_t threads)
    : n_(n), inner_(inner), type_(type) {
  const double elements = static_cast<double>(outer) * n * inner;
  if (elements == 0) return;
  if (inner == 1) scratch = row_scratch(n) * 4;
  const int64_t units = inner == 1 ? outer : outer * ((inner + kColumns - 1) / kColumns);
  set(cut(units, elements, threads, inner == 1 ? units_of_lines(n) : 1));
}

void SoftmaxDriver::piece(int64_t begin, int64_t end, uint8_t* memory) const {
  const int64_t bytes = real_bytes(type_);
  if (inner_ == 1) {
    const int64_t at = begin * n_ * bytes;
    return kernels_.softmax_rows(x_ + at, type_, end - begin, n_, reinterpret_cast<float*>(memory), out_ + at);
  }
  const int64_t blocks = (inner_ + kColumns - 1) / kColumns;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t column = unit % blocks * kColumns;
    const int64_t at = (unit / blocks * n_ * inner_ + column) * bytes;
    kernels_.softmax_columns(x_ + at, type_, n_, inner_, std::min(kColumns, inner_ - column), out_ + at);
  }
}

LayerNormDriver::LayerNormDriver(int64_t rows, int64_t n, Real type, float eps, int64_t threads,
                                 const std::optional<Quantization>& to)
    : n_(n), type_(type), eps_(eps), to_(to) {
  if (rows == 0 || n == 0) return;
  scratch = row_scratch(n) * (to ? 8 : 4);
  set(cut(rows, static_cast<double>(rows) * n, threads, units_of_lines(n)));
}

void LayerNormDriver::piece(int64_t begin, int64_t end, uint8_t* memory) const {
  auto* row = reinterpret_cast<float*>(memory);
  const auto normalize = [&](int64_t first, int64_t rows, uint8_t* to) {
    kernels_.layer_norm_rows(x_ + first * n_ * real_bytes(type_), type_, rows, n_, weight_, bias_, eps_, row, to);
  };
  if (!to_) return normalize(begin, end - begin, out_ + begin * n_ * real_bytes(type_));
  uint8_t* normalized = memory + row_scratch(n_) * 4;
  for (int64_t r = begin; r < end; ++r) {
    normalize(r, 1, normalized);
    bytes_.quantize(normalized, type_, n_, output_of(*to_, out_ + r * n_));
  }
}

}  // namespace pykernels
