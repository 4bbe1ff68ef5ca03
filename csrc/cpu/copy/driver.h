// Copies between strided tensors of one shape, and strided tensors filled with one value. Torch-free.
//
// Dimensions that run on into each other on both sides become one. Where the innermost dimension of the output is dense
// on both sides, it is copied as runs of memory; where another dimension is dense in the source, blocks of the two are
// transposed in registers; anything else goes element by element.
#pragma once

#include "cpu/pieces.h"

namespace pykernels {

// Operand: the source's first element (that of index 0). Elements of the output that the shape does not name stay.
class CopyDriver : public PiecesDriver {
 public:
  static constexpr int64_t kDims = 6;

  // Elements of 1, 2, 4 or 8 bytes, at multiples of that, in at most kDims dimensions; strides in elements: of the
  // source any, 0 included, of the output so that no two elements of it are one.
  CopyDriver(int64_t bytes, int64_t dims, const int64_t* sizes, const int64_t* from, const int64_t* to,
             int64_t threads);

  void bind(const uint8_t* const* in, uint8_t* out) override {
    from_ = in[0];
    to_ = out;
  }

 protected:
  const uint8_t* from_ = nullptr;
  uint8_t* to_ = nullptr;

 private:
  struct Dim {
    int64_t size, from, to;
  };
  // Where a walk over the outer dimensions stands: elements from the first of the source and of the output.
  struct Walk {
    int64_t index[kDims];
    int64_t from, to;
  };

  void piece(int64_t begin, int64_t end, uint8_t* memory) const override;
  template <class T>
  void copy_rows(int64_t begin, int64_t end) const;
  template <class T>
  void transpose_blocks(int64_t begin, int64_t end) const;
  Walk walk(int64_t index, int64_t outer) const;
  void next(Walk&, int64_t outer) const;

  int64_t bytes_, dims_ = 0;
  Dim dim_[kDims];  // outermost first, in the order of the output's strides
  // Transposed: the last dimension but one is dense in the source, the last in the output. Units are blocks of the two.
  bool transposed_ = false;
  int64_t blocks_[2] = {1, 1};
};

// No operand. Every element of the output gets the lowest `bytes` bytes of `value`.
class FillDriver final : public CopyDriver {
 public:
  FillDriver(int64_t bytes, int64_t dims, const int64_t* sizes, const int64_t* to, uint64_t value, int64_t threads);
  // n dense elements.
  FillDriver(int64_t bytes, int64_t n, uint64_t value, int64_t threads);

  void bind(const uint8_t* const*, uint8_t* out) override {
    from_ = reinterpret_cast<const uint8_t*>(&value_);
    to_ = out;
  }

 private:
  uint64_t value_;
};

}  // namespace pykernels
