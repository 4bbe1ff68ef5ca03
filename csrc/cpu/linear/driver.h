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

// The s32 products of rows of whole words with an s8 matrix [k][n] that is packed on the way: a task packs as many
// columns as stay in L2 and multiplies all rows with them. Operands: the rows (as linear_problem() has them), the
// matrix.
class MatmulDriver final : public Driver {
 public:
  // Elements (i, j) of the matrix are row_stride * i + column_stride * j from its first; one of these is 1.
  MatmulDriver(int64_t rows, int64_t k, int64_t n, uint8_t flip, int64_t row_stride, int64_t column_stride,
               int64_t threads);
  void bind(const uint8_t* const* in, uint8_t* out) override { a_ = in[0], b_ = in[1], out_ = out; }
  void run(int64_t task, uint8_t* memory) const override;

 private:
  int64_t first_column(int64_t task) const;
  TileProblem problem(int64_t columns, const uint8_t* panels, const int32_t* sums) const;
  void pack(int64_t column, int64_t columns, uint8_t* to, int32_t* sums) const;

  int64_t rows_, k_, n_;
  uint8_t flip_;
  int64_t row_stride_, column_stride_;
  int64_t packed_ = 0;  // bytes of a task's panels and sums
  const uint8_t *a_ = nullptr, *b_ = nullptr;
  uint8_t* out_ = nullptr;
};

// Throws unless the weights were packed for a linear layer of k inputs and out_features outputs.
void check_linear_weight(const char* op, const PackedView& weights, int64_t k, int64_t out_features);

// For a TileDriver: over `rows` rows of whole words. `flip` turns s8 into u8: value + 128.
TileProblem linear_problem(int64_t rows, const PackedView& weights, const Epilogue& e, uint8_t flip);

}  // namespace pykernels
