// A linear layer as drivers: rows brought to whole words of bytes, and dot tiles over them. Torch-free.
#pragma once

#include "common/real.h"
#include "cpu/tile/driver.h"

namespace pykernels {

// Rows of `bytes` bytes to rows of whole words, zeros behind. Operand: the rows, one after another.
class WordRowsDriver final : public Driver {
 public:
  WordRowsDriver(int64_t rows, int64_t bytes, int64_t threads);
  void bind(const uint8_t* const* in, uint8_t* out) override { x_ = in[0], out_ = out; }
  void run(int64_t task, uint8_t* memory) const override;

 private:
  int64_t rows_, bytes_;
  const uint8_t* x_ = nullptr;
  uint8_t* out_ = nullptr;
};

// Real rows of k elements quantized to u8 rows of whole words, zeros behind. Operand: the rows.
class QuantizeRowsDriver final : public Driver {
 public:
  // With one scale and zero point.
  QuantizeRowsDriver(int64_t rows, int64_t k, Real type, double scale, int64_t zero_point, int64_t threads);
  // Each row with its own, which are written to `scales` and `zero_points`.
  QuantizeRowsDriver(int64_t rows, int64_t k, Real type, float* scales, int32_t* zero_points, int64_t threads);
  void bind(const uint8_t* const* in, uint8_t* out) override { x_ = in[0], out_ = out; }
  void run(int64_t task, uint8_t* memory) const override;

 private:
  int64_t rows_, k_;
  Real type_;
  float inverse_scale_ = 0.0f;
  int32_t zero_point_ = 0;
  float* scales_ = nullptr;
  int32_t* zero_points_ = nullptr;
  const uint8_t* x_ = nullptr;
  uint8_t* out_ = nullptr;
};

// Throws unless the weights were packed for a linear layer of k inputs and out_features outputs.
void check_linear_weight(const char* op, const PackedView& weights, int64_t k, int64_t out_features);

// For a TileDriver: over `rows` rows of whole words. `flip` turns s8 into u8: value + 128.
TileProblem linear_problem(int64_t rows, const PackedView& weights, const Epilogue& e, uint8_t flip);

}  // namespace pykernels
