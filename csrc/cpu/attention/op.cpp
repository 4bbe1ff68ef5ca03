// Attention of real numbers, without dropout. The output lies in memory as [N, queries, heads, depth].
#include "cpu/op.h"

#include <cmath>
#include <optional>

#include "cpu/attention/driver.h"

namespace pykernels {
namespace {

constexpr const char* kOp = "attention";

HeadStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// With dense rows.
Tensor with_rows(const Tensor& t) { return t.stride(3) == 1 || t.size(3) <= 1 ? t : to_contiguous(t); }

void check_heads(const char* name, const Tensor& t, const Tensor& query) {
  check_real(kOp, name, t);
  check_dim(kOp, name, t, 4);
  PK_CHECK(t.scalar_type() == query.scalar_type(), kOp, ": ", name, " is ", dtype_name(t.scalar_type()),
           ", but query is ", dtype_name(query.scalar_type()));
  PK_CHECK(t.size(0) == query.size(0), kOp, ": ", name, " of shape ", shape_of(t), " has not the images of query ",
           shape_of(query));
}

// The mask as the kernels read it, and what the shape says of it.
Tensor read_mask(const Tensor& mask, const Tensor& query, AttentionShape* s) {
  check_cpu(kOp, "mask", mask);
  const ScalarType dtype = mask.scalar_type();
  const bool bytes = dtype == ScalarType::Bool || dtype == ScalarType::Byte;
  PK_CHECK(bytes || dtype == query.scalar_type(), kOp, ": mask must be bool, uint8 or of query's dtype, not ",
           dtype_name(dtype));
  const int64_t wanted[] = {s->images, s->heads, s->queries, s->keys}, dims = mask.dim();
  bool fits = dims >= 1 && dims <= 4 && mask.size(dims - 1) == s->keys;
  for (int64_t d = 0; fits && d < dims; ++d) fits = mask.size(d) == 1 || mask.size(d) == wanted[4 - dims + d];
  PK_CHECK(fits, kOp, ": mask of shape ", shape_of(mask), " does not spread over [", s->images, ", ", s->heads, ", ",
           s->queries, ", ", s->keys, "], whose last size it must have");
  s->mask = bytes ? MaskRow::Kind::bytes : MaskRow::Kind::reals;
  const Tensor held = mask.stride(dims - 1) == 1 || s->keys <= 1 ? mask : to_contiguous(mask);
  int64_t strides[3] = {};
  for (int64_t d = 0; d < dims - 1; ++d)
    if (held.size(d) != 1) strides[4 - dims + d] = held.stride(d);
  s->mask_strides = {strides[0], strides[1], strides[2]};
  return held;
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> mask, bool causal,
                 std::optional<double> scale) {
  check_real(kOp, "query", query);
  check_dim(kOp, "query", query, 4);
  check_heads("key", key, query);
  check_heads("value", value, query);
  AttentionShape s{};
  s.images = query.size(0), s.heads = query.size(1), s.queries = query.size(2), s.depth = query.size(3);
  s.kv_heads = key.size(1), s.keys = key.size(2), s.value_depth = value.size(3);
  PK_CHECK(key.size(3) == s.depth, kOp, ": key of shape ", shape_of(key), " has not the depth of query ",
           shape_of(query));
  PK_CHECK(value.size(1) == s.kv_heads && value.size(2) == s.keys, kOp, ": value of shape ", shape_of(value),
           " has not the heads and keys of key ", shape_of(key));
  PK_CHECK(s.heads == s.kv_heads || (s.kv_heads > 0 && s.heads % s.kv_heads == 0), kOp, ": query has ", s.heads,
           " heads, no multiple of key's ", s.kv_heads);
  PK_CHECK(!mask || !causal, kOp, ": causal and a mask exclude one another");
  s.type = real_of(query.scalar_type());
  s.causal = causal;
  s.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(s.depth)));
  const Tensor held = mask ? read_mask(*mask, query, &s) : query;
  const Tensor q = with_rows(query), k = with_rows(key), v = with_rows(value);
  s.query = strides_of(q), s.key = strides_of(k), s.value = strides_of(v);
  const Tensor out = empty({s.images, s.queries, s.heads, s.value_depth}, query.scalar_type());
  s.out = {out.stride(0), out.stride(2), out.stride(1)};
  AttentionDriver driver(s, torch::stable::get_num_threads());
  run(driver, {bytes_of(q), bytes_of(k), bytes_of(v), bytes_of(held)}, out);
  return torch::stable::transpose(out, 1, 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace pykernels
