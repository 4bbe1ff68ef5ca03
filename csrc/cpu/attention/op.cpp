// Attention of real numbers, without dropout. The output lies in memory as [N, queries, heads, depth].
#include "cpu/op.h"

#include <cmath>
#include <optional>

#include "cpu/attention/driver.h"

namespace pykernels {
namespace {

constexpr const char* kOp = "attention";

// With dense rows.
Tensor with_rows(const Tensor& t) {
  const int64_t dims = t.dim();
  return dims == 0 || t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1 ? t : to_contiguous(t);
}

Strided strided(const Tensor& t) { return {t.sizes().data(), t.strides().data(), t.dim()}; }

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> mask, bool causal,
                 std::optional<double> scale) {
  const struct {
    const char* name;
    const Tensor& tensor;
  } tensors[] = {{"query", query}, {"key", key}, {"value", value}};
  for (const auto& [name, t] : tensors) {
    check_real(kOp, name, t);
    PK_CHECK(t.scalar_type() == query.scalar_type(), kOp, ": ", name, " is ", dtype_name(t.scalar_type()),
             ", but query is ", dtype_name(query.scalar_type()));
  }
  const Tensor q = with_rows(query), k = with_rows(key), v = with_rows(value);
  AttentionShape s = attention_shape(kOp, strided(q), strided(k), strided(v));
  s.type = real_of(query.scalar_type());
  s.causal = causal;
  s.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(s.depth)));
  const Tensor held = mask ? with_rows(*mask) : q;
  if (mask) {
    check_cpu(kOp, "mask", *mask);
    const ScalarType dtype = mask->scalar_type();
    const bool bytes = dtype == ScalarType::Bool || dtype == ScalarType::Byte;
    PK_CHECK(bytes || dtype == query.scalar_type(), kOp, ": mask must be bool, uint8 or of query's dtype, not ",
             dtype_name(dtype));
    set_mask(kOp, &s, strided(held), bytes ? MaskRow::Kind::bytes : MaskRow::Kind::reals);
  }
  const Tensor out = empty({s.images, s.queries, s.heads, s.value_depth}, query.scalar_type());
  s.out = {out.stride(0), out.stride(2), out.stride(1)};
  AttentionDriver driver(s, torch::stable::get_num_threads());
  run(driver, {bytes_of(q), bytes_of(k), bytes_of(v), bytes_of(held)}, out);
  return torch::stable::transpose(out, 1, 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace pykernels
