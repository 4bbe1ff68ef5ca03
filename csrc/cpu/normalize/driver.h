// Softmax and layer norm as drivers over dense tensors of real numbers. Torch-free.
#pragma once

#include <optional>

#include "cpu/normalize/kernels.h"
#include "cpu/pieces.h"
#include "cpu/quantize/kernels.h"

namespace pykernels {

// Operand: x [outer, n, inner]. Down the dimension of n.
class SoftmaxDriver final : public PiecesDriver {
 public:
  SoftmaxDriver(int64_t outer, int64_t n, int64_t inner, Real type, int64_t threads);

  void bind(const uint8_t* const* in, uint8_t* out) override {
    x_ = in[0];
    out_ = out;
  }

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;

  int64_t n_, inner_;
  Real type_;
  const uint8_t* x_ = nullptr;
  uint8_t* out_ = nullptr;
  const NormalizeKernels& kernels_ = normalize_kernels();
};

// Operands: x [rows, n]; weight and bias [n] in fp32, each or null. With `to`, a row becomes bytes while it is in L1:
// those that QuantizeDriver makes of the row as it would be stored.
class LayerNormDriver final : public PiecesDriver {
 public:
  LayerNormDriver(int64_t rows, int64_t n, Real type, float eps, int64_t threads,
                  const std::optional<Quantization>& to = {});

  void bind(const uint8_t* const* in, uint8_t* out) override {
    x_ = in[0];
    weight_ = reinterpret_cast<const float*>(in[1]);
    bias_ = reinterpret_cast<const float*>(in[2]);
    out_ = out;
  }

 private:
  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;

  int64_t n_;
  Real type_;
  float eps_;
  std::optional<Quantization> to_;
  const uint8_t* x_ = nullptr;
  const float *weight_ = nullptr, *bias_ = nullptr;
  uint8_t* out_ = nullptr;
  const NormalizeKernels& kernels_ = normalize_kernels();
  const QuantizeKernels& bytes_ = quantize_kernels();
};

}  // namespace pykernels
