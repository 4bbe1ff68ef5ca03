#include "cpu/attention/driver.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "cpu/pieces.h"

namespace pykernels {
namespace {

constexpr int64_t kScoreBytes = 96 << 10;  // of a block: with the panels of a few keys it stays in L2
constexpr int64_t kLeastRows = 64;         // of a task: packing its head's keys and values costs as much as a few rows

int64_t padded(int64_t n) { return round_up(n, kColumns); }

HeadStrides strides_of(const Strided& t) { return {t.strides[0], t.strides[1], t.strides[2]}; }

}  // namespace

AttentionShape attention_shape(const char* op, const Strided& query, const Strided& key, const Strided& value) {
  const struct {
    const char* name;
    const Strided& tensor;
  } tensors[] = {{"query", query}, {"key", key}, {"value", value}};
  for (const auto& [name, t] : tensors) {
    PK_CHECK(t.dims == 4, op, ": ", name, " must have 4 dimensions, not shape ", shape_of(t.sizes, t.dims));
    PK_CHECK(t.sizes[0] == query.sizes[0], op, ": ", name, " of shape ", shape_of(t.sizes, 4),
             " has not the images of query ", shape_of(query.sizes, 4));
  }
  AttentionShape s{};
  s.images = query.sizes[0], s.heads = query.sizes[1], s.queries = query.sizes[2], s.depth = query.sizes[3];
  s.kv_heads = key.sizes[1], s.keys = key.sizes[2], s.value_depth = value.sizes[3];
  PK_CHECK(key.sizes[3] == s.depth, op, ": key of shape ", shape_of(key.sizes, 4), " has not the depth of query ",
           shape_of(query.sizes, 4));
  PK_CHECK(value.sizes[1] == s.kv_heads && value.sizes[2] == s.keys, op, ": value of shape ", shape_of(value.sizes, 4),
           " has not the heads and keys of key ", shape_of(key.sizes, 4));
  PK_CHECK(s.heads == s.kv_heads || (s.kv_heads > 0 && s.heads % s.kv_heads == 0), op, ": query has ", s.heads,
           " heads, no multiple of key's ", s.kv_heads);
  s.query = strides_of(query), s.key = strides_of(key), s.value = strides_of(value);
  return s;
}

void set_mask(const char* op, AttentionShape* s, const Strided& mask, MaskRow::Kind kind) {
  const int64_t wanted[] = {s->images, s->heads, s->queries, s->keys}, dims = mask.dims;
  PK_CHECK(!s->causal, op, ": causal and a mask exclude one another");
  bool fits = dims >= 1 && dims <= 4 && mask.sizes[dims - 1] == s->keys;
  for (int64_t d = 0; fits && d < dims; ++d) fits = mask.sizes[d] == 1 || mask.sizes[d] == wanted[4 - dims + d];
  PK_CHECK(fits, op, ": mask of shape ", shape_of(mask.sizes, dims), " does not spread over ", shape_of(wanted, 4),
           ", whose last size it must have");
  int64_t strides[3] = {};
  for (int64_t d = 0; d < dims - 1; ++d)
    if (mask.sizes[d] != 1) strides[4 - dims + d] = mask.strides[d];
  s->mask = kind;
  s->mask_strides = {strides[0], strides[1], strides[2]};
}

AttentionDriver::AttentionDriver(const AttentionShape& shape, int64_t threads) : s_(shape) {
  if (s_.images * s_.heads * s_.queries * s_.value_depth == 0) return;
  const int64_t heads = s_.images * s_.heads, tile = dot_.max_rows;
  const int64_t score_row = std::max<int64_t>(padded(s_.keys), kColumns) * 4;
  block_ = std::min(round_up(s_.queries, tile), std::max(kScoreBytes / score_row / tile * tile, tile));
  const int64_t most = ceil_div(s_.queries, std::max(block_, kLeastRows));
  // Enough for the threads to end at one time.
  splits_ = heads >= 4 * threads ? 1 : std::min(ceil_div(4 * threads, heads), most);
  tasks = heads * splits_;
  const double elements =
      static_cast<double>(padded(s_.keys)) * static_cast<double>(s_.depth + padded(s_.value_depth)) +
      static_cast<double>(block_) * static_cast<double>(s_.depth + padded(s_.value_depth)) +
      static_cast<double>(block_) * static_cast<double>(score_row);
  if (elements > 1e17) {  // no machine has that: the plan or the allocator will say so
    scratch = std::numeric_limits<int64_t>::max() / 1024;
    return;
  }
  const auto take = [&](int64_t bytes) {
    const int64_t at = scratch;
    scratch += round_up(bytes, 64);
    return at;
  };
  keys_at_ = take(padded(s_.keys) * s_.depth * 4);
  values_at_ = take(padded(s_.value_depth) * s_.keys * 4);
  query_at_ = take(block_ * s_.depth * 4);
  scores_at_ = take(block_ * score_row);
  out_at_ = take(block_ * padded(s_.value_depth) * 4);
  sums_at_ = take(kMaxTile * 4);
}

void AttentionDriver::bind(const uint8_t* const* in, uint8_t* out) {
  query_ = in[0], key_ = in[1], value_ = in[2];
  mask_ = s_.mask == MaskRow::Kind::none ? nullptr : in[3];
  out_ = out;
}

struct AttentionDriver::Head {
  const uint8_t *query, *mask;
  uint8_t* out;
  float *keys, *values, *rows, *scores, *result, *sums;
};

// out[r][c] = sum over w < words of a[r][w] * panels[c / 16][w][c % 16].
void AttentionDriver::product(const Rows& a, const Panels& b, int64_t words, float* out, int64_t out_row,
                              float* sums) const {
  const DotTap tap{0, 0};
  const uint8_t* a_rows[kMaxRows];
  int64_t place[kMaxRows];
  Finish finish{place, nullptr, kNoAddend.data(), nullptr, 0.0f, nullptr, -HUGE_VALF, HUGE_VALF};
  const int64_t most = std::min<int64_t>(dot_.max_rows, a.count);
  const int64_t at_once = dot_.max_panels[most];
  for (int64_t panel = 0; panel < b.count; panel += at_once)
    for (int64_t row = 0; row < a.count; row += most) {
      const auto count = static_cast<int>(std::min(most, a.count - row));
      const auto wide = static_cast<int>(std::min(at_once, b.count - panel));
      for (int r = 0; r < count; ++r) {
        a_rows[r] = reinterpret_cast<const uint8_t*>(a.at + (row + r) * a.stride);
        place[r] = (row + r) * out_row + panel * kColumns;
      }
      DotArgs g{a_rows, 0, 0, &tap, 1, words};
      g.panels = reinterpret_cast<const uint8_t*>(b.at + panel * b.words * kColumns);
      g.panel_bytes = b.words * kBlockBytes;
      g.c = sums;
      finish.out = out;
      if (dot_.finishes) g.finish = &finish;
      dot_.tile[count][wide](g);
      if (!dot_.finishes)
        for (int r = 0; r < count; ++r) std::copy_n(sums + r * wide * kColumns, wide * kColumns, out + place[r]);
    }
}

// `count` rows of the head, at most a block.
void AttentionDriver::rows(const Head& h, int64_t first, int64_t count) const {
  const int64_t bytes = real_bytes(s_.type), score_row = std::max<int64_t>(padded(s_.keys), kColumns);
  const int64_t seen = s_.causal ? std::min(first + count, s_.keys) : s_.keys;  // keys that a row of these sees
  for (int64_t r = 0; r < count; ++r)
    kernels_.widen(h.query + (first + r) * s_.query.row * bytes, s_.type, s_.depth, s_.scale, h.rows + r * s_.depth);
  product({h.rows, s_.depth, count}, {h.keys, s_.depth, ceil_div(seen, kColumns)}, s_.depth, h.scores, score_row,
          h.sums);
  const int64_t mask_bytes = s_.mask == MaskRow::Kind::bytes ? 1 : bytes;
  float factors[kScoreBytes / (kColumns * 4)];
  for (int64_t r = 0; r < count; ++r) {
    const int64_t mine = s_.causal ? std::min(first + r + 1, s_.keys) : s_.keys;
    const MaskRow mask{s_.mask, s_.type, h.mask ? h.mask + (first + r) * s_.mask_strides.row * mask_bytes : nullptr};
    factors[r] = kernels_.weigh(h.scores + r * score_row, mine, padded(seen), mask);
  }
  const int64_t wide = padded(s_.value_depth);
  product({h.scores, score_row, count}, {h.values, s_.keys, wide / kColumns}, seen, h.result, wide, h.sums);
  for (int64_t r = 0; r < count; ++r)
    kernels_.narrow(h.result + r * wide, s_.value_depth, factors[r], s_.type, h.out + (first + r) * s_.out.row * bytes);
}

void AttentionDriver::run(int64_t task, uint8_t* memory) const {
  const int64_t bytes = real_bytes(s_.type), split = task % splits_, head = task / splits_ % s_.heads;
  const int64_t image = task / splits_ / s_.heads, shared = head / (s_.heads / s_.kv_heads);
  const auto place = [&](const HeadStrides& strides, int64_t of) { return image * strides.image + of * strides.head; };
  const auto part = [&](int64_t at) { return reinterpret_cast<float*>(memory + at); };
  Head h{};
  h.query = query_ + place(s_.query, head) * bytes;
  h.out = out_ + place(s_.out, head) * bytes;
  if (mask_) h.mask = mask_ + place(s_.mask_strides, head) * (s_.mask == MaskRow::Kind::bytes ? 1 : bytes);
  h.keys = part(keys_at_), h.values = part(values_at_), h.rows = part(query_at_), h.scores = part(scores_at_);
  h.result = part(out_at_), h.sums = part(sums_at_);
  kernels_.pack_rows(key_ + place(s_.key, shared) * bytes, s_.type, s_.keys, s_.key.row, s_.depth, h.keys);
  kernels_.pack_columns(value_ + place(s_.value, shared) * bytes, s_.type, s_.keys, s_.value.row, s_.value_depth,
                        h.values);
  const Pieces pieces{s_.queries, splits_, dot_.max_rows};
  for (int64_t row = pieces.begin(split); row < pieces.begin(split + 1); row += block_)
    rows(h, row, std::min(block_, pieces.begin(split + 1) - row));
}

}  // namespace pykernels
