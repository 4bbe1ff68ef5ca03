#include "cpu/arithmetic/driver.h"

#include <cstring>
#include <limits>
#include <utility>

namespace pykernels {

// Units: elements where both operands have them, else rows; those of columns are cut where an image ends, too.
BinaryDriver::BinaryDriver(const Broadcast& shape, int64_t threads) : shape_(shape) {
  const int64_t rows = shape.images * shape.rows, elements = rows * shape.n;
  const bool same = shape.operand == Operand::same;
  set(cut(same || elements == 0 ? elements : rows, static_cast<double>(elements), threads,
          same || elements == 0 ? 64 : units_of_lines(shape.n)));
}

void BinaryDriver::piece(int64_t begin, int64_t end, uint8_t*) const {
  const int64_t n = shape_.n;
  if (shape_.operand == Operand::same) return combine(begin, begin, 1, end - begin);
  if (shape_.operand == Operand::rows) return combine(begin * n, begin, end - begin, n);
  while (begin < end) {
    const int64_t image = begin / shape_.rows, next = std::min(end, (image + 1) * shape_.rows);
    combine(begin * n, image * n, next - begin, n);
    begin = next;
  }
}

ByteArithmeticDriver::ByteArithmeticDriver(Arithmetic arithmetic, Activation activation, const Broadcast& shape,
                                           const Quantization& a, const Quantization& b, const Quantization& out,
                                           int64_t threads)
    : BinaryDriver(shape, threads), arithmetic_(arithmetic), activation_(activation), qa_(a), qb_(b), q_out_(out) {}

void ByteArithmeticDriver::combine(int64_t at, int64_t at_b, int64_t rows, int64_t n) const {
  const QuantizedInput a = input_of(qa_, a_ + at), b = input_of(qb_, b_ + at_b);
  const QuantizedOutput out = output_of(q_out_, out_ + at);
  if (arithmetic_ == Arithmetic::add)
    kernels_.add(a, b, shape_.operand, rows, n, activation_, out);
  else
    kernels_.mul(a, b, shape_.operand, rows, n, out);
}

RealArithmeticDriver::RealArithmeticDriver(Arithmetic arithmetic, Activation activation, const Broadcast& shape,
                                           Real type, int64_t threads)
    : BinaryDriver(shape, threads), arithmetic_(arithmetic), activation_(activation), type_(type) {}

void RealArithmeticDriver::combine(int64_t at, int64_t at_b, int64_t rows, int64_t n) const {
  const int64_t bytes = real_bytes(type_);
  const uint8_t *a = a_ + at * bytes, *b = b_ + at_b * bytes;
  uint8_t* out = out_ + at * bytes;
  if (arithmetic_ == Arithmetic::add)
    kernels_.add_reals(a, b, type_, shape_.operand, rows, n, activation_, out);
  else
    kernels_.mul_reals(a, b, type_, shape_.operand, rows, n, out);
}

// Each task fills its own stretch of the output, row by row and part by part.
ConcatDriver::ConcatDriver(std::vector<ConcatPart> parts, int64_t rows, int64_t row, const Quantization& out,
                           int64_t threads)
    : parts_(std::move(parts)), row_(row), q_out_(out) {
  int64_t first = std::numeric_limits<int64_t>::max(), last = 0, length = 0;
  for (const ConcatPart& part : parts_) {
    const Quantization& q = part.q;
    copies_.push_back(q.s8 == out.s8 && q.scale == out.scale && q.zero_point == out.zero_point);
    if (part.length == 0) continue;
    first = std::min(first, part.offset);
    last = std::max(last, part.offset + part.length);
    length += part.length;
  }
  if (rows == 0 || length == 0) return;
  start_ = first / 64 * 64;
  set(cut((rows - 1) * row + last - start_, static_cast<double>(rows) * length, threads, 64));
}

void ConcatDriver::piece(int64_t begin, int64_t end, uint8_t*) const {
  begin += start_;
  end += start_;
  for (int64_t r = begin / row_; r * row_ < end; ++r)
    for (size_t i = 0; i < parts_.size(); ++i) {
      const ConcatPart& part = parts_[i];
      const int64_t start = r * row_ + part.offset;
      const int64_t first = std::max(begin, start), last = std::min(end, start + part.length);
      if (first >= last) continue;
      const uint8_t* from = in_[i] + r * part.length + first - start;
      if (copies_[i])
        std::memcpy(out_ + first, from, last - first);
      else
        kernels_.requantize(input_of(part.q, from), last - first, output_of(q_out_, out_ + first));
    }
}

void LookupDriver::piece(int64_t begin, int64_t end, uint8_t*) const {
  kernels_.lookup(x_ + begin, end - begin, table_, out_ + begin);
}

void CastDriver::piece(int64_t begin, int64_t end, uint8_t*) const {
  kernels_.cast(x_ + begin * real_bytes(from_), from_, end - begin, out_ + begin * real_bytes(to_), to_);
}

void ActivationDriver::piece(int64_t begin, int64_t end, uint8_t*) const {
  const int64_t at = begin * real_bytes(type_);
  kernels_.activate(x_ + at, type_, end - begin, activation_, out_ + at);
}

void LeakyReluDriver::piece(int64_t begin, int64_t end, uint8_t*) const {
  const int64_t at = begin * real_bytes(type_);
  kernels_.leaky_relu(x_ + at, type_, end - begin, slope_, out_ + at);
}

}  // namespace pykernels
