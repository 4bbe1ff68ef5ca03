// Real numbers to bytes and back with one scale and zero point, as drivers over dense runs of n elements. Torch-free.
#pragma once

#include "cpu/pieces.h"
#include "cpu/quantize/kernels.h"

namespace pykernels {

// Operand: real numbers.
class QuantizeDriver final : public UnaryDriver {
 public:
  QuantizeDriver(int64_t n, Real from, const Quantization& to, int64_t threads)
      : UnaryDriver(n, threads), from_(from), to_(to) {}

 private:
  void piece(int64_t begin, int64_t end, uint8_t*) const override {
    kernels_.quantize(x_ + begin * real_bytes(from_), from_, end - begin, output_of(to_, out_ + begin));
  }

  Real from_;
  Quantization to_;
  const QuantizeKernels& kernels_ = quantize_kernels();
};

// Operand: bytes.
class DequantizeDriver final : public UnaryDriver {
 public:
  DequantizeDriver(int64_t n, const Quantization& from, Real to, int64_t threads)
      : UnaryDriver(n, threads), from_(from), to_(to) {}

 private:
  void piece(int64_t begin, int64_t end, uint8_t*) const override {
    kernels_.dequantize(input_of(from_, x_ + begin), end - begin, out_ + begin * real_bytes(to_), to_);
  }

  Quantization from_;
  Real to_;
  const QuantizeKernels& kernels_ = quantize_kernels();
};

}  // namespace pykernels
