// Arithmetic as drivers over dense runs of elements: add and mul of bytes and of real numbers, concatenation of bytes,
// lookup, cast, activations. Torch-free.
#pragma once

#include <vector>

#include "cpu/arithmetic/kernels.h"
#include "cpu/pieces.h"

namespace pykernels {

enum class Arithmetic { add, mul };

// The shape of a and of the output, [images, rows, n] dense elements, and how b lies against it: [images, rows, n],
// for each image a row of columns [images, n], or one value a row [images, rows].
struct Broadcast {
  Operand operand;
  int64_t images, rows, n;
};
inline Broadcast same_shape(int64_t elements) { return {Operand::same, 1, 1, elements}; }
// b [images, channels, 1, 1] against a [images, channels, H, W] of so many pixels, channels_last or contiguous.
inline Broadcast per_channel(int64_t images, int64_t channels, int64_t pixels, bool channels_last) {
  return channels_last ? Broadcast{Operand::columns, images, pixels, channels}
                       : Broadcast{Operand::rows, images, channels, pixels};
}

// Operands: a, b.
class BinaryDriver : public PiecesDriver {
 public:
  void bind(const uint8_t* const* in, uint8_t* out) final {
    a_ = in[0];
    b_ = in[1];
    out_ = out;
  }

 protected:
  BinaryDriver(const Broadcast&, int64_t threads);
  // rows x n elements from element `at` of a and of the output and `at_b` of b on.
  virtual void combine(int64_t at, int64_t at_b, int64_t rows, int64_t n) const = 0;

  Broadcast shape_;
  const uint8_t *a_ = nullptr, *b_ = nullptr;
  uint8_t* out_ = nullptr;

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const final;
};

class ByteArithmeticDriver final : public BinaryDriver {
 public:
  // The activation follows an addition only.
  ByteArithmeticDriver(Arithmetic, Activation, const Broadcast&, const Quantization& a, const Quantization& b,
                       const Quantization& out, int64_t threads);

 private:
  void combine(int64_t at, int64_t at_b, int64_t rows, int64_t n) const override;

  Arithmetic arithmetic_;
  Activation activation_;
  Quantization qa_, qb_, q_out_;
  const ArithmeticKernels& kernels_ = arithmetic_kernels();
};

class RealArithmeticDriver final : public BinaryDriver {
 public:
  // The activation follows an addition only.
  RealArithmeticDriver(Arithmetic, Activation, const Broadcast&, Real type, int64_t threads);

 private:
  void combine(int64_t at, int64_t at_b, int64_t rows, int64_t n) const override;

  Arithmetic arithmetic_;
  Activation activation_;
  Real type_;
  const ArithmeticKernels& kernels_ = arithmetic_kernels();
};

// One input of a concatenation, dense [rows, length] bytes: it stands at `offset` of every row of the output.
struct ConcatPart {
  Quantization q;
  int64_t offset, length;
};

// Operands: the parts. The output has rows of `row` bytes; what no part covers is left as it is.
class ConcatDriver final : public PiecesDriver {
 public:
  ConcatDriver(std::vector<ConcatPart> parts, int64_t rows, int64_t row, const Quantization& out, int64_t threads);

  void bind(const uint8_t* const* in, uint8_t* out) override {
    in_.assign(in, in + parts_.size());
    out_ = out;
  }

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;

  std::vector<ConcatPart> parts_;
  std::vector<const uint8_t*> in_;
  std::vector<char> copies_;  // parts whose bytes mean what the output's do
  uint8_t* out_ = nullptr;
  int64_t row_, start_ = 0;  // pieces are bytes of the output from here on
  Quantization q_out_;
  const ArithmeticKernels& kernels_ = arithmetic_kernels();
};

// Operands: n bytes, the table of 256.
class LookupDriver final : public UnaryDriver {
 public:
  LookupDriver(int64_t n, int64_t threads) : UnaryDriver(n, threads) {}

  void bind(const uint8_t* const* in, uint8_t* out) override {
    UnaryDriver::bind(in, out);
    table_ = in[1];
  }

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;

  const uint8_t* table_ = nullptr;
  const ArithmeticKernels& kernels_ = arithmetic_kernels();
};

// Operand: n real numbers.
class CastDriver final : public UnaryDriver {
 public:
  CastDriver(int64_t n, Real from, Real to, int64_t threads) : UnaryDriver(n, threads), from_(from), to_(to) {}

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;

  Real from_, to_;
  const ArithmeticKernels& kernels_ = arithmetic_kernels();
};

// Operand: n real numbers.
class ActivationDriver final : public UnaryDriver {
 public:
  ActivationDriver(int64_t n, Real type, Activation activation, int64_t threads)
      : UnaryDriver(n, threads), type_(type), activation_(activation) {}

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;

  Real type_;
  Activation activation_;
  const ArithmeticKernels& kernels_ = arithmetic_kernels();
};

// Operand: n real numbers.
class LeakyReluDriver final : public UnaryDriver {
 public:
  LeakyReluDriver(int64_t n, Real type, float slope, int64_t threads)
      : UnaryDriver(n, threads), type_(type), slope_(slope) {}

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;

  Real type_;
  float slope_;
  const ArithmeticKernels& kernels_ = arithmetic_kernels();
};

}  // namespace pykernels
