// softmax(query x key^T * scale + mask) x value as a driver: a task takes rows of one head, whose keys and values it
// packs for dot tiles; all scores of a few rows stay in its cache. Everything is computed in fp32. Torch-free.
#pragma once

#include "cpu/attention/kernels.h"
#include "cpu/driver.h"
#include "cpu/tile/driver.h"

namespace pykernels {

// [images, heads, rows, elements of a row]; strides in elements, rows are dense.
struct HeadStrides {
  int64_t image, head, row;
};

struct AttentionShape {
  int64_t images, heads, kv_heads;  // heads / kv_heads of them share keys and values
  int64_t queries, keys, depth, value_depth;
  Real type;  // of query, key, value and output
  HeadStrides query, key, value, out;
  MaskRow::Kind mask = MaskRow::Kind::none;
  HeadStrides mask_strides{};  // 0 where it is the same for all
  bool causal = false;         // query i sees keys 0 to i
  float scale;
};

// Sizes and strides of a tensor.
struct Strided {
  const int64_t *sizes, *strides;
  int64_t dims;
};

// Of tensors of four dimensions whose rows are dense, without a mask; output and type are the caller's to fill in.
// Throws where they do not fit one another.
AttentionShape attention_shape(const char* op, const Strided& query, const Strided& key, const Strided& value);
// Adds a mask of [keys], [queries, keys], [heads, ...] or [images, ...], where every size but the last may be 1, and
// which is dense along the keys. Throws where it does not spread over the scores.
void set_mask(const char* op, AttentionShape* shape, const Strided& mask, MaskRow::Kind kind);

// Operands: query, key, value and the mask (u8, or reals of `type`) or null.
class AttentionDriver final : public Driver {
 public:
  AttentionDriver(const AttentionShape& shape, int64_t threads);
  void bind(const uint8_t* const* in, uint8_t* out) override;
  void run(int64_t task, uint8_t* memory) const override;

 private:
  struct Head;   // what a task has of its head
  struct Rows {  // of fp32, `stride` elements apart
    const float* at;
    int64_t stride, count;
  };
  struct Panels {  // of 16 columns and `words` rows
    const float* at;
    int64_t words, count;
  };

  void rows(const Head& head, int64_t first, int64_t count) const;
  void product(const Rows& a, const Panels& b, int64_t words, float* out, int64_t out_row, float* sums) const;

  AttentionShape s_;
  const DotKernel& dot_ = dot_kernels().f32;
  const AttentionKernels& kernels_ = attention_kernels();
  int64_t block_ = 0, splits_ = 0;  // rows whose scores are kept at once; pieces of the queries of a head
  int64_t keys_at_ = 0, values_at_ = 0, query_at_ = 0, scores_at_ = 0, out_at_ = 0, sums_at_ = 0;  // in scratch
  const uint8_t *query_ = nullptr, *key_ = nullptr, *value_ = nullptr, *mask_ = nullptr;
  uint8_t* out_ = nullptr;
};

}  // namespace pykernels
